package letters

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newLedger(t *testing.T) jetstream.JetStream {
	t.Helper()
	s, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Logger: zerolog.Nop(), Sync: time.Minute, MaxFile: 100 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 2}); err != nil {
		t.Fatal(err)
	}
	return js
}

func add(t *testing.T, js jetstream.JetStream, subject string, n int) (all []uint64) {
	t.Helper()
	for range n {
		ack, err := js.Publish(t.Context(), subject, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, ack.Sequence)
	}
	return all
}

// seek seeks until nothing more is to be found, and returns what was kept.
func seek(t *testing.T, s *Strays) (kept []uint64, rounds int) {
	t.Helper()
	was := letters(t, s.JS)
	counted := 0
	s.Kept = func() { counted++ }
	for {
		rounds++
		more, err := s.Seek(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
	}
	for sequence := range letters(t, s.JS) {
		if !was[sequence] {
			kept = append(kept, sequence)
		}
	}
	if counted != len(kept) {
		t.Errorf("%d are kept, %d counted", len(kept), counted)
	}
	slices.Sort(kept)
	return kept, rounds
}

// letters returns the entries that are kept.
func letters(t *testing.T, js jetstream.JetStream) map[uint64]bool {
	t.Helper()
	dead, err := js.Stream(t.Context(), ledger.DeadLetterStream)
	if err != nil {
		t.Fatal(err)
	}
	info, err := dead.Info(t.Context(), jetstream.WithSubjectFilter(">"))
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[uint64]bool)
	for subject := range info.State.Subjects {
		sequence, err := strconv.ParseUint(subject[strings.LastIndexByte(subject, '.')+1:], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		all[sequence] = true
	}
	return all
}

func TestAllStraysAreKeptOnceAndSomeAtATime(t *testing.T) {
	t.Parallel()
	js := newLedger(t)
	s := &Strays{JS: js, Shards: 2}
	if kept, _ := seek(t, s); len(kept) != 0 {
		t.Errorf("kept %v of nothing", kept)
	}
	var want []uint64
	for i := range 3 {
		want = append(want, add(t, js, "calls.2", most)...)
		add(t, js, "calls.1", 1)
		add(t, js, "control.0", 1)
		want = append(want, add(t, js, fmt.Sprint("leases.0", i), 1)...)
	}
	kept, rounds := seek(t, s)
	if slices.Sort(want); !slices.Equal(kept, want) {
		t.Errorf("kept %d, wanted %d", len(kept), len(want))
	}
	if rounds < 4 {
		t.Errorf("%d at once", len(want)/rounds)
	}
	if kept, _ := seek(t, s); len(kept) != 0 {
		t.Errorf("kept twice: %v", kept)
	}
	// On a subject that is known by now, and a new one.
	want = append(add(t, js, "calls.2", 1), add(t, js, "closings.x", 1)...)
	if kept, _ := seek(t, s); !slices.Equal(kept, want) {
		t.Errorf("kept %v, wanted %v", kept, want)
	}
	m, found, err := ledger.LastMessage(t.Context(), js, ledger.DeadLetterStream, ledger.DeadLetterSubject(0, want[1]))
	if err != nil || !found || m.Header.Get(ledger.ReasonHeader) != usage.ReasonWrongShard || string(m.Data) != "x" {
		t.Errorf("kept is %+v, %v", m, err)
	}
}

// Old letters give way to new ones; those who come after do not write them again.
func TestWhoeverGoesOnBeginsWhereAllWasKept(t *testing.T) {
	t.Parallel()
	js := newLedger(t)
	add(t, js, "calls.2", 3)
	if kept, _ := seek(t, &Strays{JS: js, Shards: 2}); len(kept) != 3 {
		t.Fatalf("kept %v", kept)
	}
	dead, err := js.Stream(t.Context(), ledger.DeadLetterStream)
	if err != nil {
		t.Fatal(err)
	}
	if err := dead.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := add(t, js, "calls.2", 1)
	next := &Strays{JS: js, Shards: 2}
	if kept, _ := seek(t, next); !slices.Equal(kept, want) {
		t.Errorf("kept %v, wanted %v", kept, want)
	}
	// In another ledger every place is another.
	if err := js.DeleteStream(t.Context(), ledger.Stream); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := dead.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	want = add(t, js, "calls.2", 4)
	if kept, _ := seek(t, next); !slices.Equal(kept, want) {
		t.Errorf("kept %v, wanted %v", kept, want)
	}
}

func TestAPlaceThatCannotBeReadIsNone(t *testing.T) {
	t.Parallel()
	js := newLedger(t)
	kv, err := js.KeyValue(t.Context(), ledger.ConfigBucket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kv.PutString(t.Context(), placeKey, "{"); err != nil {
		t.Fatal(err)
	}
	want := add(t, js, "calls.2", 2)
	if kept, _ := seek(t, &Strays{JS: js, Shards: 2}); !slices.Equal(kept, want) {
		t.Errorf("kept %v, wanted %v", kept, want)
	}
}

func TestALetterThatIsTooLargeIsCutUntilItFits(t *testing.T) {
	t.Parallel()
	js := newLedger(t)
	whole := bytes.Repeat([]byte("x"), 1<<20)
	m := Message(1, 7, "calls.1", "oversized", "line\nbreak", nil, whole)
	for _, want := range []bool{true, false} {
		if stored, err := Keep(t.Context(), js, m); err != nil || stored != want {
			t.Fatalf("stored %v, %v", stored, err)
		}
	}
	got, _, err := ledger.LastMessage(t.Context(), js, ledger.DeadLetterStream, ledger.DeadLetterSubject(1, 7))
	if err != nil || len(got.Data) != 1<<19 || got.Header.Get(truncatedHeader) != fmt.Sprint(1<<20) || got.Header.Get(ledger.DetailHeader) != "line break" {
		t.Errorf("kept is %v of %d bytes, %v", got.Header, len(got.Data), err)
	}
}
