package quota

import "github.com/tollkeeper/tollkeeper/pkg/usage"

// NextLease returns the part of NextTimer that allowances of the tiers exact and
// leased wait for, such as the end of the patience with which gateways are asked
// to give back; calls wait for these.
func (s *Shard) NextLease() (usage.Micros, bool) {
	if len(s.leaseTimes) == 0 {
		return 0, false
	}
	return s.leaseTimes[0].due, true
}

// Allowances returns how many allowances gateways share, over all accounts,
// limits and windows.
func (s *Shard) Allowances() int { return len(s.allowances) }
