// Package points reads what the points of the pipeline hold of one traffic:
// ledger, counters and history, call by call, and compares them with what the
// clients saw.
package points

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Sums of an account's calls.
type Sums struct {
	Admitted, Refused int64
	Meters            map[usage.Meter]int64
}

func (s *Sums) add(m usage.Meter, v int64) {
	if s.Meters == nil {
		s.Meters = map[usage.Meter]int64{}
	}
	s.Meters[m] += v
}

// Equal reports whether two points agree in counts and in every meter that
// either of them knows.
func (s Sums) Equal(o Sums) bool {
	return s.Admitted == o.Admitted && s.Refused == o.Refused && maps.Equal(nonZero(s.Meters), nonZero(o.Meters))
}

func nonZero(m map[usage.Meter]int64) map[usage.Meter]int64 {
	out := map[usage.Meter]int64{}
	for k, v := range m {
		// calls is the number of admitted calls, which stands beside.
		if v != 0 && k != usage.Calls {
			out[k] = v
		}
	}
	return out
}

// Held is how often a point has a call.
type Held struct{ Admitted, Refused uint8 }

// Times the call is there at all.
func (h Held) Times() int { return int(h.Admitted) + int(h.Refused) }

// Ledger is what the ledger holds of one traffic. It is read on from where it
// was read to.
type Ledger struct {
	// Calls by number; the slice may be shorter than what was sent.
	Calls []Held
	// Accounts by id.
	Accounts map[string]*Sums
	// Repeated frames are redeliveries, which count once; Gaps are numbers that
	// a producer skipped.
	Frames, Repeated, Gaps int64
	// Last is the newest sequence that was read; LastOurs the newest with a call
	// of the traffic, LastOfShard by shard.
	Last, LastOurs uint64
	LastOfShard    map[uint32]uint64
	// Unreadable entries.
	Unreadable int64

	// times are when entries came, for the silences between them; the newest
	// mostTimes are kept.
	times  []time.Time
	number func(requestID string) (int, bool)
	seen   map[uint32]*dedup.Set
}

// NewLedger reads nothing yet. number returns a call's number by its request id.
func NewLedger(number func(requestID string) (int, bool)) *Ledger {
	return &Ledger{Accounts: map[string]*Sums{}, LastOfShard: map[uint32]uint64{}, number: number, seen: map[uint32]*dedup.Set{}}
}

// mostTimes are enough for some minutes of load.
const mostTimes = 500_000

// Silence is the longest time between two entries of which the later came after
// a moment.
func (l *Ledger) Silence(after time.Time) time.Duration {
	longest := time.Duration(0)
	for i := len(l.times) - 1; i > 0 && l.times[i].After(after); i-- {
		longest = max(longest, l.times[i].Sub(l.times[i-1]))
	}
	return longest
}

var errEnd = errors.New("end")

// Read reads up to the ledger's present end.
func (l *Ledger) Read(ctx context.Context, js jetstream.JetStream) error {
	stream, err := js.Stream(ctx, ledger.Stream)
	if err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	end := stream.CachedInfo().State.LastSeq
	if end <= l.Last {
		return nil
	}
	var frame ledger.Frame
	err = ledger.Read(ctx, js, ledger.ReadOptions{Stream: ledger.Stream, From: l.Last + 1}, func(m ledger.Message) error {
		if m.Sequence <= l.Last {
			return nil
		}
		l.Last = m.Sequence
		if len(l.times) == 2*mostTimes {
			l.times = append(l.times[:0], l.times[mostTimes:]...)
		}
		l.times = append(l.times, m.Time)
		if kind, _, err := ledger.ParseSubject(m.Subject); err == nil && kind == ledger.KindCalls {
			if err := ledger.DecodeCalls(&frame, m.Subject, m.Header, m.Data); err != nil {
				l.Unreadable++
			} else {
				l.frame(&frame, m.Sequence)
			}
		}
		if m.Sequence >= end {
			return errEnd
		}
		return nil
	})
	if err == nil || errors.Is(err, errEnd) {
		return ctx.Err()
	}
	return fmt.Errorf("read the ledger: %w", err)
}

func (l *Ledger) frame(f *ledger.Frame, sequence uint64) {
	l.Frames++
	if f.Producer != ksuid.Nil {
		set := l.seen[f.Shard]
		if set == nil {
			set = dedup.New(0)
			l.seen[f.Shard] = set
		}
		switch v, _ := set.Frame(dedup.Producer(f.Producer), f.Number); v {
		case dedup.Duplicate:
			l.Repeated++
			return
		case dedup.Gap:
			l.Gaps++
		case dedup.Fresh:
		}
	}
	for i := range f.N {
		n, ok := l.number(string(f.RequestID.At(i)))
		if !ok {
			continue
		}
		l.LastOurs, l.LastOfShard[f.Shard] = sequence, sequence
		for len(l.Calls) <= n {
			l.Calls = append(l.Calls, make([]Held, 1+len(l.Calls))...)
		}
		account := string(f.Account.At(i))
		sums := l.Accounts[account]
		if sums == nil {
			sums = &Sums{}
			l.Accounts[account] = sums
		}
		if !f.Admitted(i) {
			sums.Refused++
			l.Calls[n].Refused = once(l.Calls[n].Refused)
			continue
		}
		sums.Admitted++
		l.Calls[n].Admitted = once(l.Calls[n].Admitted)
		for b, meter := range usage.BuiltInMeters() {
			if v, ok := f.Meters[b].Get(i); ok {
				sums.add(meter, v)
			}
		}
		for k := range f.Custom {
			if v, ok := f.Custom[k].Get(i); ok {
				sums.add(f.Custom[k].Meter, v)
			}
		}
	}
}

// once more, but a count stays where it can't grow.
func once(n uint8) uint8 {
	if n == 255 {
		return n
	}
	return n + 1
}

// At returns what is held of a call.
func (l *Ledger) At(n int) Held {
	if n < len(l.Calls) {
		return l.Calls[n]
	}
	return Held{}
}
