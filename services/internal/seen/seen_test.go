package seen

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

func TestForeignEventsAreKnownAgainWhoeverBringsThem(t *testing.T) {
	t.Parallel()
	var b ledger.Builder
	for range 3 {
		b.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a", Source: "s", EventID: "1"})
	}
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.KSUID{1}, Number: 1})); err != nil {
		t.Fatal(err)
	}
	s := New(0).Pass(0, usage.OldestTimeMicros)
	if got := s.Calls(&f, nil); len(got.Keep) != 1 || got.Foreign != 2 {
		t.Errorf("of three copies of one event %v were kept, %d were left out", got.Keep, got.Foreign)
	}
	if got := s.Calls(&f, nil); got.Verdict != dedup.Duplicate {
		t.Errorf("the same frame again is %v", got.Verdict)
	}
	f.Number = 2
	if got := s.Calls(&f, nil); got.Keep == nil || len(got.Keep) != 0 || got.Foreign != 3 {
		t.Errorf("a frame of events that are all known keeps %v", got.Keep)
	}
}

// The counters forget foreign events when the ledger says so; history must forget
// the same, or it would count what they don't, or the other way round.
func TestTheLedgerSaysHowLongForeignEventsAreRemembered(t *testing.T) {
	t.Parallel()
	const hour = usage.Micros(3_600_000_000)
	var b ledger.Builder
	b.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a", Source: "s", EventID: "1"})
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.KSUID{1}, Number: 1})); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		core *tollkeeperv1.CoreVersion
		kept int
	}{
		"nothing said":               {nil, 1},
		"ten hours":                  {&tollkeeperv1.CoreVersion{Version: 1, ForeignHorizonMicros: int64(10 * hour)}, 0},
		"a horizon that can't be it": {&tollkeeperv1.CoreVersion{Version: 1, ForeignHorizonMicros: -1}, 1},
	} {
		fold := New(hour)
		s := fold.Pass(0, usage.OldestTimeMicros)
		if c.core != nil {
			s.Control(&tollkeeperv1.ControlEntry{Id: "core", Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: c.core}})
		}
		f.Number = 1
		s.Calls(&f, nil)
		s = fold.Pass(0, usage.OldestTimeMicros+4*hour)
		f.Number = 2
		got := s.Calls(&f, nil)
		if kept := f.N - got.Foreign; kept != c.kept {
			t.Errorf("%s: after four hours %d of one event are new, wanted %d", name, kept, c.kept)
		}
	}
}

func TestWhatANewerProgramHasSeenIsNotFoldedFurther(t *testing.T) {
	t.Parallel()
	version := func(v uint32) *tollkeeperv1.ControlEntry {
		return &tollkeeperv1.ControlEntry{Id: "core", Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: v, ForeignHorizonMicros: 1}}}
	}
	if newer := Beyond(3, 17, version(quota.CoreVersion)); newer != nil {
		t.Errorf("known rules are %v", newer)
	}
	if newer := Beyond(3, 17, version(quota.CoreVersion+1)); newer == nil || *newer != (quota.NewerError{Shard: 3, Sequence: 17, Version: quota.CoreVersion + 1}) {
		t.Errorf("got %v", newer)
	}
	fold := New(1)
	fold.Pass(2, usage.OldestTimeMicros)
	fold.Pass(3, usage.OldestTimeMicros).Control(version(quota.CoreVersion))
	read, _, _, err := Unmarshal(fold.Marshal(9, "x"))
	if err != nil || !bytes.Equal(read.Marshal(9, "x"), fold.Marshal(9, "x")) {
		t.Errorf("it is read as something else: %v", err)
	}
	fold.shards[3].version = quota.CoreVersion + 1 // as a newer program would write it
	var newer *quota.NewerError
	if _, _, _, err := Unmarshal(fold.Marshal(9, "x")); !errors.As(err, &newer) || newer.Shard != 3 {
		t.Errorf("a newer program's gave %v", err)
	}
}

// A fold that was written before folds said it is of the first rules.
func TestAFoldFromBeforeTheRulesWereNamedIsRead(t *testing.T) {
	t.Parallel()
	data := New(5).Marshal(9, "x")
	old := append([]byte(unversioned), data[len(foldMagic):len(data)-4]...)
	old = binary.LittleEndian.AppendUint32(old, crc32.Checksum(old, castagnoli))
	if f, at, _, err := Unmarshal(old); err != nil || at != 9 || !bytes.Equal(f.Marshal(9, "x"), data) {
		t.Errorf("%d, %v", at, err)
	}
	// With a shard: its version stands between its time and its set.
	f := New(5)
	f.Pass(2, usage.OldestTimeMicros)
	set := f.shards[2].set.AppendBinary(nil)
	data = f.Marshal(9, "x")
	end := len(data) - 4 - len(set)
	old = append(append([]byte(unversioned), data[len(foldMagic):end-1]...), set...)
	old = binary.LittleEndian.AppendUint32(old, crc32.Checksum(old, castagnoli))
	if f, _, _, err := Unmarshal(old); err != nil || !bytes.Equal(f.Marshal(9, "x"), data) {
		t.Errorf("with a shard: %v", err)
	}
}
