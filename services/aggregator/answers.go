package aggregator

import (
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/reply"
)

// answerAsks tells gateways what follows for their leases from what was read
// back. Until the shard is counted up to where the ledger was when we took it
// there is nothing to be told: all is told then. What is lost is asked for again.
func (o *owner) answerAsks(all []quota.LeaseAnswer) {
	if len(all) == 0 || !o.ready || !o.may() {
		return
	}
	parcels, err := reply.Answers(o.shard, o.pub.Last().Epoch, all)
	if err != nil {
		o.log.Error().Err(err).Msg("answers about leases cannot be written")
	}
	for _, p := range parcels {
		if err := o.nc.Publish(ledger.AnswersSubject(ksuid.KSUID(p.Gateway)), p.Data); err != nil {
			// While NATS is away there is nobody to hear it.
			o.log.Debug().Err(err).Msg("answers about leases could not be sent")
			return
		}
		o.m.Answers.Add(float64(p.Answers))
	}
}

// tickIn is how long until time must be let pass in the shard by an entry;
// false: nothing is due. What calls wait for is not made to wait for a second.
func (o *owner) tickIn(now time.Time) (time.Duration, bool) {
	stream := usage.At(o.streamTime(now))
	left := func(due usage.Micros, every time.Duration) time.Duration {
		return max(span(stream, due)+tickMargin, o.lastTick.Add(every).Sub(now))
	}
	due, ok := o.state.NextTimer()
	if !ok || o.still.Load() {
		return 0, false
	}
	wait := left(due, tickEvery)
	if due, ok := o.state.NextLease(); ok {
		wait = min(wait, left(due, leaseTickEvery))
	}
	return wait, true
}

// farthest bounds how far ahead the owner looks; it wakes more often anyway.
const farthest = usage.Micros(24 * 3600 * 1_000_000)

// span is how long it is from a time of the stream to one at which something is due,
// both not before 1970; a day at most either way. Without a bound the sum of a far
// time's span and a margin leaves its range, and what is due in 300 years is due at
// once, again and again.
func span(from, due usage.Micros) time.Duration {
	return time.Duration(min(max(due-from, -farthest), farthest)) * time.Microsecond
}
