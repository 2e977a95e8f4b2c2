// Package tail follows the end of the ledger once for all who want to see it.
package tail

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/live"
)

const (
	// tailBack is how many entries before the end are read at the start, so that
	// a console that was restarted has something to show.
	tailBack = 10_000
	// tailBehind is how many entries the tail may be behind before it skips to
	// the end: it shows what is now, the counters are elsewhere.
	tailBehind = 20_000
)

var errBehind = errors.New("too far behind")

// Tail is the end of the ledger. Safe for concurrent use.
type Tail struct {
	log zerolog.Logger

	mu      sync.Mutex
	fold    live.Fold
	shards  map[uint32]uint64 // newest entry of each
	calls   uint64            // newest entry with calls
	pending uint64
	skipped uint64
	bad     uint64
	err     error // of the last interruption; nil while reading
}

// New returns a tail; Run starts it.
func New(log zerolog.Logger) *Tail {
	return &Tail{log: log, shards: map[uint32]uint64{}}
}

// Run follows until ctx is done, then returns nil.
func (t *Tail) Run(ctx context.Context, js jetstream.JetStream) error {
	back := uint64(tailBack)
	for ctx.Err() == nil {
		from, err := endOf(ctx, js, back)
		if err == nil {
			t.note(nil)
			var f ledger.Frame
			err = ledger.Read(ctx, js, ledger.ReadOptions{Stream: ledger.Stream, From: from, OnError: t.note}, func(m ledger.Message) error {
				return t.handle(&f, m)
			})
		}
		if errors.Is(err, errBehind) {
			back = 1
			t.log.Warn().Msg("the live view was too far behind the ledger and skipped to its end")
			continue
		}
		if err != nil {
			t.note(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// endOf returns where to begin so that back entries are read before the end.
func endOf(ctx context.Context, js jetstream.JetStream, back uint64) (uint64, error) {
	ask, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := js.Stream(ask, ledger.Stream)
	if err != nil {
		return 0, err
	}
	at := s.CachedInfo().State
	from := max(at.FirstSeq, 1)
	if at.LastSeq >= back {
		from = max(from, at.LastSeq-back+1)
	}
	return from, nil
}

func (t *Tail) note(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
}

func (t *Tail) handle(f *ledger.Frame, m ledger.Message) error {
	kind, shard, err := ledger.ParseSubject(m.Subject)
	if err == nil && kind == ledger.KindCalls {
		err = ledger.DecodeCalls(f, m.Subject, m.Header, m.Data)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err, t.pending = nil, m.Pending
	at := usage.At(m.Time)
	t.shards[shard] = m.Sequence
	switch {
	case err != nil:
		t.bad++ // the aggregator makes a dead letter of it
		t.fold.Passed(m.Sequence, at)
	case kind == ledger.KindCalls:
		t.calls = m.Sequence
		t.fold.Apply(f, m.Sequence, at)
	default:
		t.fold.Passed(m.Sequence, at)
	}
	if m.Pending > tailBehind {
		t.skipped += m.Pending
		return errBehind
	}
	return nil
}

// View is a copy of what the tail knows at a time.
type View struct {
	Seconds  []live.Second
	Busiest  []live.Busy
	Refusals []live.Refusal
	Gateways []live.Gateway
	Shards   map[uint32]uint64
	Sequence uint64
	Calls    uint64
	StreamAt usage.Micros
	Pending  uint64
	Skipped  uint64
	Err      error
}

// View returns what is known at a time: the newest seconds, accounts and refusals,
// as many as are asked for.
func (t *Tail) View(now usage.Micros, seconds, busiest, refusals int) View {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := View{
		Seconds: t.fold.Seconds(now, seconds), Busiest: t.fold.Busiest(now, busiest), Refusals: t.fold.Refusals(refusals),
		Gateways: t.fold.Gateways(), Shards: make(map[uint32]uint64, len(t.shards)), Calls: t.calls, Pending: t.pending, Skipped: t.skipped, Err: t.err,
	}
	v.Sequence, v.StreamAt = t.fold.Position()
	for s, e := range t.shards {
		v.Shards[s] = e
	}
	return v
}
