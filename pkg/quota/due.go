package quota

import "github.com/tollkeeper/tollkeeper/pkg/usage"

// NextLease returns the part of NextTimer that allowances of the tiers exact and
// leased wait for, such as the end of the patience with which gateways are asked
// to give back; calls wait for these.
func (s *Shard) NextLease() (usage.Micros, bool) {
	// An allowance of a lifetime whose leases have lapsed waits for nothing.
	if len(s.leaseTimes) == 0 || s.leaseTimes[0].due == maxMicros {
		return 0, false
	}
	return s.leaseTimes[0].due, true
}

// NextTimer returns the stream time at which an entry is due although no call
// may come: a denied account's period ends, a plan set takes effect, a lease lapses.
// After that time is folded it is another, later one; false: nothing is due ever.
func (s *Shard) NextTimer() (usage.Micros, bool) {
	at, ok := s.NextLease()
	if len(s.timers) > 0 && (!ok || s.timers[0].end < at) {
		at, ok = s.timers[0].end, true
	}
	if len(s.pending) > 0 && (!ok || s.pending[0].EffectiveAt < at) {
		at, ok = s.pending[0].EffectiveAt, true
	}
	return at, ok
}

// Allowances returns how many allowances gateways share, over all accounts,
// limits and windows.
func (s *Shard) Allowances() int { return len(s.allowances) }
