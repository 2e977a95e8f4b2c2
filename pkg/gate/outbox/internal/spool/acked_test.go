package spool

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/segmentio/ksuid"
)

// found is what the next process knows of what is acknowledged.
func found(t *testing.T, s *Store, l *Log) *Log {
	t.Helper()
	again := &Log{store: s, dir: l.dir, identity: l.identity}
	if err := again.readAcked(); err != nil {
		t.Fatal(err)
	}
	return again
}

func TestWhatIsAcknowledgedIsKnownAfterAKill(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<20)
	l := begin(t, s)
	if again := found(t, s, l); again.Acked(0) != 0 || again.Acked(9) != 0 {
		t.Error("something is known of what nobody noted")
	}
	for _, notes := range [][]Acked{{{Shard: 5, Number: 7}, {Shard: 0, Number: 1}}, nil, {{Shard: 5, Number: 1 << 60}}} {
		if err := l.NoteAcked(notes); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Append(recs(1, 3, 10)); err != nil {
		t.Fatal(err)
	}
	_, logs := reopen(t, s, dir)
	for shard, want := range map[uint32]uint64{0: 1, 1: 0, 4: 0, 5: 1 << 60, 6: 0} {
		if got := logs[0].Acked(shard); got != want {
			t.Errorf("shard %d: up to %d, want %d", shard, got, want)
		}
	}
	if err := logs[0].Destroy(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.dir); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// Whatever a crash or a power cut leaves of it says what was noted once, or nothing.
func TestADamagedNoteSaysNothing(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<20)
	l := begin(t, s)
	if err := l.NoteAcked([]Acked{{0, 3}, {1, 0x0102030405060708}, {2, 4}}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(l.dir, ackedFile)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.NoteAcked([]Acked{{1, 0x1112131415161718}}); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	read := func(data []byte) (of [4]uint64) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		again := found(t, s, l)
		for shard := range uint32(4) {
			of[shard] = again.Acked(shard)
		}
		return of
	}
	for n := range after {
		whole := func(shard int, number uint64) uint64 {
			if n >= (shard+1)*ackedSlot {
				return number
			}
			return 0
		}
		if got, want := read(after[:n]), [4]uint64{whole(0, 3), whole(1, 0x1112131415161718), whole(2, 4)}; got != want {
			t.Fatalf("cut at %d: %v, want %v", n, got, want)
		}
		// The new slot only to here, and the old one behind it.
		torn := append(bytes.Clone(after[:n]), before[n:]...)
		want := [4]uint64{3, 0, 4}
		switch {
		case bytes.Equal(torn, before):
			want[1] = 0x0102030405060708
		case bytes.Equal(torn, after):
			want[1] = 0x1112131415161718
		}
		if got := read(torn); got != want {
			t.Fatalf("torn at %d: %v, want %v", n, got, want)
		}
		flipped := bytes.Clone(after)
		flipped[n] ^= 0x10
		want = [4]uint64{3, 0x1112131415161718, 4}
		want[n/ackedSlot] = 0
		if got := read(flipped); got != want {
			t.Fatalf("damaged at %d: %v, want %v", n, got, want)
		}
	}
	if got := read(make([]byte, 3*ackedSlot)); got != [4]uint64{} {
		t.Errorf("zeroes say %v", got)
	}
	// Of another shard, and of another producer.
	if got := read(append(bytes.Clone(after[ackedSlot:2*ackedSlot]), after...)); got != [4]uint64{} {
		t.Errorf("moved slots say %v", got)
	}
	l.identity.Producer = ksuid.New()
	if got := read(after); got != [4]uint64{} {
		t.Errorf("another producer's say %v", got)
	}
}
