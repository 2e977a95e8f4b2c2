package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/testclock"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

// timesOf reads entries from a sequence on and returns "subject at time" of each
// that is no advance.
func timesOf(t *testing.T, js jetstream.JetStream, from uint64, subjects ...string) []string {
	t.Helper()
	stream, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	last := stream.CachedInfo().State.LastSeq
	var all []string
	end := errors.New("end")
	err = ledger.Read(t.Context(), js, ledger.ReadOptions{Stream: ledger.Stream, Subjects: subjects, From: from}, func(m ledger.Message) error {
		if e, err := ledger.DecodeControl(m.Header, m.Data); err != nil || e.GetClockAdvance() == nil {
			all = append(all, fmt.Sprintf("%s at %s", m.Subject, m.Time.UTC().Format(time.RFC3339Nano)))
		}
		if since := time.Since(m.StoredAt); since < 0 || since > time.Hour {
			t.Errorf("entry %d was stored at %s, says the reader", m.Sequence, m.StoredAt)
		}
		if m.Sequence == last {
			return end
		}
		return nil
	})
	if !errors.Is(err, end) {
		t.Fatal(err)
	}
	return all
}

func advanceMessage(t *testing.T, js jetstream.JetStream, shard uint32, to time.Time) uint64 {
	t.Helper()
	m, err := ledger.ControlMessage(shard, &tollkeeperv1.ControlEntry{Id: "x", Body: &tollkeeperv1.ControlEntry_ClockAdvance{ClockAdvance: &tollkeeperv1.ClockAdvance{ToUnixMicros: to.UnixMicro()}}})
	if err != nil {
		t.Fatal(err)
	}
	ack, err := js.PublishMsg(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	return ack.Sequence
}

func TestTheTestClockIsTheTimeOfEveryEntryWhereverAReaderBegins(t *testing.T) {
	t.Parallel()
	_, js := newEngine(t, embednats.Options{}).connect()
	birth := time.Date(2024, 2, 28, 23, 59, 59, 0, time.UTC)
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 2, TestClock: birth}); err != nil {
		t.Fatal(err)
	}
	clock, err := testclock.Open(t.Context(), js)
	if err != nil {
		t.Fatal(err)
	}
	if clock.Now() != usage.At(birth) {
		t.Errorf("the clock is born at %s, want %s", clock.Now().Time(), birth)
	}
	publish := func(subject string) {
		if _, err := js.Publish(t.Context(), subject, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	publish("calls.0")
	leap := time.Date(2024, 2, 29, 0, 0, 0, 1000, time.UTC)
	if err := clock.Advance(t.Context(), usage.At(leap)); err != nil {
		t.Fatal(err)
	}
	publish("calls.0")
	publish("leases.1")
	if err := clock.Advance(t.Context(), usage.At(leap)); err != nil {
		t.Errorf("to advance to where the clock stands: %v", err)
	}
	if err := clock.Advance(t.Context(), usage.At(birth)); err == nil {
		t.Error("the clock goes back")
	}
	advanceMessage(t, js, 0, birth) // past the clock's own check: it changes nothing
	next := time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := clock.Advance(t.Context(), usage.At(next)); err != nil {
		t.Fatal(err)
	}
	publish("calls.1")

	want := []string{"calls.0 at 2024-02-28T23:59:59Z", "calls.0 at 2024-02-29T00:00:00.000001Z", "leases.1 at 2024-02-29T00:00:00.000001Z", "calls.1 at 2031-01-01T00:00:00Z"}
	if got := timesOf(t, js, 1); !slices.Equal(got, want) {
		t.Errorf("from the beginning: got %q, want %q", got, want)
	}
	// calls.0 is 1, two advances follow, then calls.0 and leases.1.
	for from, left := range map[uint64]int{2: 3, 4: 3, 5: 2, 6: 1, 9: 1} {
		if got := timesOf(t, js, from); !slices.Equal(got, want[len(want)-left:]) {
			t.Errorf("from %d: got %q, want %q", from, got, want[len(want)-left:])
		}
	}
	if got := timesOf(t, js, 5, ledger.ShardSubjects(1)...); !slices.Equal(got, want[2:]) {
		t.Errorf("shard 1 from 5: got %q, want %q", got, want[2:])
	}
	again, err := testclock.Open(t.Context(), js)
	if err != nil || again.Now() != usage.At(next) {
		t.Errorf("opened again the clock stands at %s, want %s (%v)", again.Now().Time(), next, err)
	}
}

// Whoever may write control entries must not be able to turn a real ledger's clock.
func TestAProductionLedgerRefusesToBeAdvanced(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	if _, err := testclock.Open(t.Context(), js); !errors.Is(err, ledger.ErrRealClock) {
		t.Errorf("OpenTestClock: %v", err)
	}
	// Nor does it get a test clock after its birth.
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{TestClock: time.Unix(1, 0)}); err == nil {
		if _, err := testclock.Open(t.Context(), js); !errors.Is(err, ledger.ErrRealClock) {
			t.Errorf("OpenTestClock after another Provision: %v", err)
		}
	}
	at := advanceMessage(t, js, 0, time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := ledger.Read(ctx, js, ledger.ReadOptions{Stream: ledger.Stream, From: at}, func(m ledger.Message) error {
		defer cancel()
		if d := time.Since(m.Time); d < 0 || d > time.Hour {
			t.Errorf("the entry's time is %s", m.Time)
		}
		var d fold.Decoder
		e, _, err := d.Decode(&m)
		var invalid *usage.InvalidError
		if !errors.As(err, &invalid) || invalid.Reason != usage.ReasonMisplaced || e.Control != nil {
			t.Errorf("the core gets %+v, %v: want a dead letter (%s)", e.Control, err, usage.ReasonMisplaced)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
