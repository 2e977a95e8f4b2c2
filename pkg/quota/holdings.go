package quota

import "github.com/tollkeeper/tollkeeper/pkg/lease"

// Holdings returns what each gateway has of an account's limit ("<plan>/<limit>")
// in the present window, in the order of gateways; nil while none has asked for any
// of it, and for limits of the tier eventual.
func (s *Shard) Holdings(account, limitID string) []lease.Holding {
	i, ok := s.find([]byte(account))
	if !ok {
		return nil
	}
	def := s.plans.defs[s.accounts[i].plan]
	for k := range def.n {
		l := &s.plans.limits[def.first+k]
		if x := s.allowances[allowanceKey{i, k, s.windows[l.kind].number}]; x != nil && l.fullID == limitID {
			return x.escrow.Holdings()
		}
	}
	return nil
}
