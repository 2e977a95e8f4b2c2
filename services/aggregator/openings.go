package aggregator

import (
	"context"
	"time"

	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/opening"
)

const (
	// openingsTimeout bounds one reading of the shard's ledger; the next begins again.
	openingsTimeout = time.Hour
	// openingsAgain is the pause after a round, which may have failed or left something
	// open.
	openingsAgain = time.Second
)

// openings is what an owner does for limits that began with nothing counted.
type openings struct {
	counting bool
	upTo     uint64    // the last entry that was appended; nothing begins before it is folded
	at       time.Time // when the next round may begin
}

// countOpenings reads the shard's ledger anew for what accounts had used of limits before
// the limits were there, and appends it. Who takes the shard over begins again; what two
// append is added once.
func (o *owner) countOpenings(io context.Context, now time.Time) (wake time.Duration) {
	o.open.Store(int64(o.state.Open()))
	if o.openings.counting || o.state.Open() == 0 || o.state.Sequence() < o.openings.upTo {
		return time.Hour
	}
	if wait := o.openings.at.Sub(now); wait > 0 {
		return wait
	}
	list := o.state.Openings()
	count := opening.New(o.shard, o.horizon(), list)
	o.openings.counting = true
	o.log.Info().Int("limits", len(list)).Uint64("to", count.Last()).Msg("new limits lack what was used before them; the shard's ledger is read for it")
	from := opening.Ledger{JS: o.js, Shard: o.shard, Currency: o.currency, Author: "aggregator", Log: o.log}
	o.do(io, openingsTimeout, func(ctx context.Context) func() error {
		last, err := from.Tell(ctx, count)
		return func() error {
			o.openings = openings{upTo: last, at: time.Now().Add(openingsAgain)}
			switch {
			case err == nil:
				o.log.Info().Int("limits", len(count.Counted())).Dur("took_ms", time.Since(now)).Msg("what was used before new limits is counted")
			case !o.unknown(err):
				o.log.Warn().Err(err).Msg("cannot count what was used before new limits; their tiers exact and leased hand out nothing; trying again")
			}
			return nil
		}
	})
	return time.Hour
}
