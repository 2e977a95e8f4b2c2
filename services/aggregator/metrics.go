package aggregator

import (
	"time"

	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
)

// sumLeases keeps the sums for who asks for metrics. It looks at every allowance,
// so it takes a hundredth of the owner's time at most.
func (o *owner) sumLeases(now time.Time) {
	if now.Before(o.sumAt) {
		return
	}
	sums := meter.Sum(o.state.LeaseSums())
	o.leaseUnits.Store(&sums)
	o.sumAt = now.Add(max(2*time.Second, 100*time.Since(now)))
}

// stand says how the shards stand, for who asks for metrics.
func (s *service) stand() []meter.Shard {
	all := make([]meter.Shard, len(s.owners))
	for i, o := range s.owners {
		all[i] = meter.Shard{Number: o.shard, LastBeacon: o.lastBeacon.Load(), Allowances: o.allowances.Load(), Open: o.open.Load()}
		if sums := o.leaseUnits.Load(); sums != nil {
			all[i].Leases = *sums
		}
	}
	return all
}
