// Package replay checks that what recorded traffic sent through a gateway is what was
// written down, counted and kept, and how its limits were kept.
package replay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Totals of a set of accounts at one point of the pipeline.
type Totals struct {
	Admitted, Refused int64
	Meters            map[usage.Meter]int64
}

func newTotals() Totals { return Totals{Meters: map[usage.Meter]int64{}} }

// Equal reports whether two points agree: every count, and every meter that
// either of them knows.
func (t Totals) Equal(o Totals) bool {
	return t.Admitted == o.Admitted && t.Refused == o.Refused && maps.Equal(nonZero(t.Meters), nonZero(o.Meters))
}

// within reports whether o agrees in all that t knows: clients don't know the
// meters that the gateway measures, nor the estimates for calls that reported none.
func (t Totals) within(o Totals, estimates map[usage.Meter]bool) bool {
	for m, v := range t.Meters {
		if o.Meters[m] != v && !(estimates[m] && o.Meters[m] > v) {
			return false
		}
	}
	return t.Admitted == o.Admitted && t.Refused == o.Refused
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

// LedgerFold is what the ledger holds of a set of accounts.
type LedgerFold struct {
	Totals
	Frames, Duplicates, Gaps int64
	// Estimated is how many calls hold estimates in place of readings.
	Estimated int64
	// Last is the newest sequence that was read.
	Last uint64
	// LastOfShard is the newest sequence with a call of the accounts, by shard.
	LastOfShard map[uint32]uint64
	// Transit is the longest time from a frame's sealing to the ledger.
	Transit time.Duration
	// Latest is the longest time from a call's beginning to the ledger; it is
	// meaningless when calls carry recorded times.
	Latest time.Duration
}

// ReadLedger folds the ledger from a sequence to its present end, for the
// accounts that ours reports. stored hears of every entry when the server stored it.
func ReadLedger(ctx context.Context, js jetstream.JetStream, from uint64, ours func(account []byte) bool, stored func(sequence uint64, at time.Time)) (LedgerFold, error) {
	fold := LedgerFold{Totals: newTotals(), LastOfShard: map[uint32]uint64{}}
	stream, err := js.Stream(ctx, ledger.Stream)
	if err != nil {
		return fold, fmt.Errorf("ledger: %w", err)
	}
	end := stream.CachedInfo().State.LastSeq
	fold.Last = end
	if end < max(from, 1) {
		return fold, nil
	}
	seen := map[uint32]*dedup.Set{}
	geometry, err := ledger.ReadGeometry(ctx, js)
	if err != nil {
		return fold, err
	}
	frame := ledger.Frame{CostsIn: geometry.Currency}
	errEnd := errors.New("end")
	err = ledger.Read(ctx, js, ledger.ReadOptions{Stream: ledger.Stream, From: from}, func(m ledger.Message) error {
		stored(m.Sequence, m.StoredAt)
		if kind, shard, err := ledger.ParseSubject(m.Subject); err == nil && kind == ledger.KindCalls {
			if err := ledger.DecodeCalls(&frame, m.Subject, m.Header, m.Data); err == nil {
				set := seen[shard]
				if set == nil {
					set = dedup.New(0)
					seen[shard] = set
				}
				fold.frame(&frame, set, m, ours)
			}
		}
		if m.Sequence >= end {
			return errEnd
		}
		return nil
	})
	if errors.Is(err, errEnd) {
		return fold, nil
	}
	if err == nil {
		err = ctx.Err()
	}
	return fold, fmt.Errorf("read the ledger: %w", err)
}

func (l *LedgerFold) frame(f *ledger.Frame, set *dedup.Set, m ledger.Message, ours func([]byte) bool) {
	mine := make([]bool, len(f.Account.Dict))
	any := false
	for i, account := range f.Account.Dict {
		mine[i] = ours(account)
		any = any || mine[i]
	}
	if f.Producer != ksuid.Nil {
		switch v, _ := set.Frame(dedup.Producer(f.Producer), f.Number); v {
		case dedup.Duplicate:
			if any {
				l.Duplicates++
			}
			return
		case dedup.Gap:
			if any && f.Number > 1 {
				l.Gaps++
			}
		case dedup.Fresh:
		}
	}
	if !any {
		return
	}
	l.Frames++
	l.LastOfShard[f.Shard] = m.Sequence
	l.Transit = max(l.Transit, m.StoredAt.Sub(f.SealedAt.Time()))
	for i := range f.N {
		if !mine[f.Account.ID(i)] {
			continue
		}
		if len(f.Source.At(i)) > 0 && !set.Foreign(dedup.ForeignID(f.Account.At(i), f.Source.At(i), f.EventID.At(i)), usage.At(m.Time)) {
			continue
		}
		l.Latest = max(l.Latest, m.StoredAt.Sub(usage.Micros(f.Time.At(i)).Time()))
		if !f.Admitted(i) {
			l.Refused++
			continue
		}
		l.Admitted++
		if flags, ok := f.Flags.Get(i); ok && usage.Flags(flags)&usage.Estimated != 0 {
			l.Estimated++
		}
		for b, meter := range usage.BuiltInMeters() {
			if v, ok := f.Meters[b].Get(i); ok {
				l.Meters[meter] += v
			}
		}
		for k := range f.Custom {
			if v, ok := f.Custom[k].Get(i); ok {
				l.Meters[f.Custom[k].Meter] += v
			}
		}
	}
}

// SettledLedger reads the ledger until nothing more of ours has come into it for a
// while: a foreign gateway may have a spool to send.
func SettledLedger(ctx context.Context, fold LedgerFold, read func() (LedgerFold, error)) (LedgerFold, error) {
	const quiet = 2 * time.Second
	since, last := time.Now(), fold.Admitted+fold.Refused
	for time.Since(since) < quiet {
		select {
		case <-ctx.Done():
			return fold, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		var err error
		if fold, err = read(); err != nil {
			return fold, err
		}
		if n := fold.Admitted + fold.Refused; n != last {
			since, last = time.Now(), n
		}
	}
	return fold, nil
}

// ReadCounters asks the aggregator for the accounts' counters, once it has
// counted the ledger up to the given sequences.
func ReadCounters(ctx context.Context, nc *nats.Conn, shards uint32, accounts []string, upTo map[uint32]uint64) (Totals, error) {
	byShard := map[uint32][]string{}
	for _, a := range accounts {
		s := ledger.ShardOf(a, shards)
		byShard[s] = append(byShard[s], a)
	}
	out := newTotals()
	for _, shard := range slices.Sorted(maps.Keys(byShard)) {
		for chunk := range slices.Chunk(byShard[shard], ledger.MaxUsageAccounts) {
			reply, err := askUsage(ctx, nc, shard, chunk, upTo[shard])
			if err != nil {
				return out, err
			}
			for _, a := range reply.Accounts {
				out.Admitted += a.Own.Admitted
				out.Refused += a.Own.Refused
				for m, v := range a.Own.Meters {
					if m != usage.Calls { // of those it is not in there
						v -= a.Own.Adjusted[m] // corrections are in the counters alone
					}
					out.Meters[m] += v
				}
			}
		}
	}
	return out, nil
}

func askUsage(ctx context.Context, nc *nats.Conn, shard uint32, accounts []string, upTo uint64) (ledger.UsageReply, error) {
	req, err := json.Marshal(ledger.UsageRequest{Accounts: accounts})
	if err != nil {
		return ledger.UsageReply{}, fmt.Errorf("marshal usage request: %w", err)
	}
	var lastErr error
	for {
		var reply ledger.UsageReply
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		msg, err := nc.RequestWithContext(ask, ledger.UsageSubject(shard), req)
		cancel()
		if err == nil {
			if err = json.Unmarshal(msg.Data, &reply); err == nil {
				if reply.Sequence >= upTo {
					return reply, nil
				}
				err = fmt.Errorf("it has counted up to %d of %d", reply.Sequence, upTo)
			}
		}
		lastErr = fmt.Errorf("aggregator, shard %d: %w", shard, err)
		select {
		case <-ctx.Done():
			return ledger.UsageReply{}, errors.Join(ctx.Err(), lastErr)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
