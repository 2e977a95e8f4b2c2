package quota

import (
	"math"
	"math/bits"
	"reflect"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// limit is a limit of a plan, made ready for counting.
type limit struct {
	usage.Limit
	fullID string // "<plan>/<limit>"
	kind   window.Kind
	meter  uint32
	// plain: it counts every call, whatever its model, route or method.
	plain bool
	// leased: calls are admitted from leases, by these terms.
	leased bool
	terms  lease.Terms
	// warnAt is the use from which the verdict is Warn.
	warnAt int64
	// next is the use from which a verdict changes to a more severe one.
	next [usage.Deny + 1]int64
}

// level returns the verdict on a use.
func (l *limit) level(used int64) usage.Verdict {
	switch {
	case used >= l.Amount:
		return usage.Deny
	case used >= l.warnAt:
		return usage.Warn
	}
	return usage.Allow
}

// planDef is where a plan's limits stand; n is 0 for a plan that the present
// set does not have.
type planDef struct{ first, n uint32 }

// planBook holds the plans that hold now. Names are numbered for ever, in the
// order of their first appearance; number 0 is "no plan".
type planBook struct {
	version string
	plans   []usage.Plan
	names   []string
	numbers map[string]uint32
	defs    []planDef // by number
	limits  []limit
}

func (p *planBook) init() {
	p.numbers = make(map[string]uint32)
	p.number("")
}

func (p *planBook) number(name string) uint32 {
	if n, ok := p.numbers[name]; ok {
		return n
	}
	n := uint32(len(p.names))
	p.names = append(p.names, name)
	p.numbers[name] = n
	p.defs = append(p.defs, planDef{})
	return n
}

// checkPlans refuses what could not be counted by, and more meters than there
// may be.
func (s *Shard) checkPlans(set *PlanSet) *usage.InvalidError {
	if err := checkPlanSet(set); err != nil {
		return err
	}
	more := make(map[usage.Meter]bool)
	for i := range set.Plans {
		for k := range set.Plans[i].Limits {
			if m := set.Plans[i].Limits[k].Meter; !more[m] {
				if _, known := s.meterIDs[m]; !known {
					more[m] = true
				}
			}
		}
	}
	if len(s.meters)+len(more) > 2*MaxMeters {
		return invalid(usage.ReasonOversized, "more than %d different meters in one shard", 2*MaxMeters)
	}
	return nil
}

func checkPlanSet(set *PlanSet) *usage.InvalidError {
	if len(set.Plans) > MaxPlans {
		return invalid(usage.ReasonOversized, "%d plans, at most %d in a set", len(set.Plans), MaxPlans)
	}
	plans := make(map[string]bool, len(set.Plans))
	for i := range set.Plans {
		p := &set.Plans[i]
		if p.ID == "" || len(p.ID) > usage.MaxIDBytes || plans[p.ID] {
			return invalid(usage.ReasonMalformed, "plan %q has no id of its own of at most %d bytes", p.ID, usage.MaxIDBytes)
		}
		plans[p.ID] = true
		if len(p.Limits) > MaxPlanLimits {
			return invalid(usage.ReasonOversized, "plan %q has %d limits, at most %d are possible", p.ID, len(p.Limits), MaxPlanLimits)
		}
		limits := make(map[string]bool, len(p.Limits))
		for k := range p.Limits {
			l := &p.Limits[k]
			if _, ok := window.Parse(l.Window); !ok {
				return invalid(usage.ReasonMalformed, "limit %s/%s: %q is no window", p.ID, l.ID, l.Window)
			}
			switch {
			case l.ID == "" || len(l.ID) > usage.MaxIDBytes || limits[l.ID]:
				return invalid(usage.ReasonMalformed, "a limit of plan %q has no id of its own: %q", p.ID, l.ID)
			case !l.Meter.Valid():
				return invalid(usage.ReasonMalformed, "limit %s/%s: %q cannot name a meter", p.ID, l.ID, l.Meter)
			case l.Amount < 0 || l.WarnPercent > 100:
				return invalid(usage.ReasonMalformed, "limit %s/%s: the amount %d is negative, or %d percent is more than 100", p.ID, l.ID, l.Amount, l.WarnPercent)
			case textBytes(l) > MaxLimitBytes:
				return invalid(usage.ReasonOversized, "limit %s/%s: its texts have %d bytes, at most %d can stand in a decision", p.ID, l.ID, textBytes(l), MaxLimitBytes)
			}
			if err := checkTier(p.ID, l); err != nil {
				return err
			}
			limits[l.ID] = true
		}
	}
	return nil
}

// textBytes is what the texts of a limit take in a decision, about.
func textBytes(l *usage.Limit) int {
	n := len(l.Code) + len(l.ActionURL)
	for _, list := range [...][]string{l.Filter.Models, l.Filter.Routes, l.Filter.Methods} {
		for _, text := range list {
			n += len(text) + 4
		}
	}
	return n
}

// compile makes the limits of a set ready and returns them with the place of
// each plan by its number.
func (s *Shard) compile(plans []usage.Plan) (limits []limit, defs []planDef) {
	for i := range plans {
		s.plans.number(plans[i].ID)
	}
	defs = make([]planDef, len(s.plans.names))
	for i := range plans {
		p := &plans[i]
		defs[s.plans.number(p.ID)] = planDef{first: uint32(len(limits)), n: uint32(len(p.Limits))}
		for k := range p.Limits {
			limits = append(limits, s.ready(p.ID, &p.Limits[k]))
		}
	}
	return limits, defs
}

// ready makes a limit that was checked ready for counting.
func (s *Shard) ready(plan string, of *usage.Limit) limit {
	l := limit{Limit: *of, fullID: plan + "/" + of.ID, warnAt: math.MaxInt64}
	l.kind, _ = window.Parse(l.Window)
	l.meter = s.meter(l.Meter)
	l.plain = l.Filter.Empty()
	l.leased, l.terms = l.Tier.Leased(), leaseTerms(&l.Limit)
	if l.WarnPercent > 0 {
		// used*100 >= amount*percent, without leaving 64 bits: the
		// least such use is the product's hundredth, rounded up.
		hi, lo := bits.Mul64(uint64(l.Amount), uint64(l.WarnPercent))
		q, r := bits.Div64(hi, lo, 100)
		if r > 0 {
			q++
		}
		l.warnAt = int64(q)
	}
	l.next[usage.Allow] = min(l.warnAt, l.Amount)
	l.next[0] = l.next[usage.Allow] // a new counter
	l.next[usage.Warn] = l.Amount
	l.next[usage.Deny] = math.MaxInt64
	return l
}

// sameCount says whether a counter of limit a goes on under limit b, by the rules before
// keepsCounters.
func sameCount(a, b *limit) bool {
	return a.ID == b.ID && a.meter == b.meter && a.kind == b.kind && slices.Equal(a.Filter.Models, b.Filter.Models) &&
		slices.Equal(a.Filter.Routes, b.Filter.Routes) && slices.Equal(a.Filter.Methods, b.Filter.Methods)
}

// setPlans replaces the plans. A counter goes on where a limit counts the same meter,
// window and calls.
func (s *Shard) setPlans(set *PlanSet) {
	old := s.plans
	limits, defs := s.compile(set.Plans)
	s.plans.version, s.plans.plans, s.plans.limits, s.plans.defs = set.Version, set.Plans, limits, defs
	for i := range s.accounts {
		a := &s.accounts[i]
		before := planDef{}
		if int(a.plan) < len(old.defs) {
			before = old.defs[a.plan]
		}
		now := defs[a.plan]
		if before.n == 0 && now.n == 0 {
			continue
		}
		s.soil(uint32(i))
		s.moveCounters(uint32(i), old.limits[before.first:before.first+before.n], limits[now.first:now.first+now.n], old.version)
	}
}

// changePlan moves an account to another plan of the present set. What was
// used counts on, also while no limit has its counter: changing plans is no
// free refill.
func (s *Shard) changePlan(i, plan uint32) {
	a := &s.accounts[i]
	before, now := s.plans.defs[a.plan], s.plans.defs[plan]
	a.plan = plan
	s.moveCounters(i, s.plans.limits[before.first:before.first+before.n], s.plans.limits[now.first:now.first+now.n], s.plans.version)
}

// precursor is the limit of an account whose counter another of its limits goes on
// with: of its own id, or any that counts the same; -1: there is none.
func (s *Shard) precursor(old []limit, l *limit) int {
	if o := slices.IndexFunc(old, func(from limit) bool { return from.ID == l.ID && s.goesOn(&from, l) }); o >= 0 {
		return o
	}
	return slices.IndexFunc(old, func(from limit) bool { return s.goesOn(&from, l) })
}

// moveCounters gives an account the counters of its new limits. A limit that is
// gone while it warned or denied is lifted by a decision of its own.
func (s *Shard) moveCounters(i uint32, old, limits []limit, oldVersion string) {
	s.moveAllowances(i, old, limits)
	first := s.accounts[i].first
	sameVersion := oldVersion == s.plans.version
	if !s.sameBlock(old, limits) {
		fresh := s.block(uint32(len(limits)))
		from := make([]int, len(limits))
		for k := range limits {
			from[k] = s.precursor(old, &limits[k])
		}
		for o := range old {
			if s.core.Version >= keepsCounters && !slices.ContainsFunc(limits, func(l limit) bool { return sameKey(&old[o], &l) }) {
				s.retire(i, &old[o], &s.counters[first+uint32(o)], s.opens[openKey{i, uint32(o)}])
			}
		}
		s.moveOpen(i, len(old), from)
		for k := range limits {
			c := &s.counters[fresh+uint32(k)]
			c.number = s.windows[limits[k].kind].number
			if o := from[k]; o >= 0 {
				from := &s.counters[first+uint32(o)]
				c.cur, c.prev, c.number = from.cur, from.prev, from.number
			} else if !s.takeUp(i, uint32(k), &limits[k], c) {
				s.open(i, uint32(k), &limits[k], c)
			}
			for o := range old {
				from := &s.counters[first+uint32(o)]
				if old[o].fullID == limits[k].fullID {
					// The same limit to those outside: its last decision stands
					// until the next.
					c.verdict, c.published, c.revision, c.decidedAt = from.verdict, from.published, from.revision, from.decidedAt
					c.flags |= from.flags & isRoomy
					from.verdict = 0
				}
			}
		}
		for o := range old {
			c := &s.counters[first+uint32(o)]
			if c.verdict > uint8(usage.Allow) {
				s.lift(i, c, &old[o], oldVersion)
			}
		}
		s.release(first, uint32(len(old)))
		s.accounts[i].first = fresh
	}
	if s.accounts[i].flags&retires != 0 {
		s.dropTaken(i, limits)
	}
	for k := range limits {
		// What gateways were told while it warns or denies must stay true.
		same := sameVersion && k < len(old) && reflect.DeepEqual(old[k], limits[k])
		s.touch(i, uint32(k), !same)
	}
}

// sameBlock says whether every counter stays where it is.
func (s *Shard) sameBlock(old, limits []limit) bool {
	if len(old) != len(limits) {
		return false
	}
	for k := range old {
		if old[k].fullID != limits[k].fullID || !s.goesOn(&old[k], &limits[k]) {
			return false
		}
	}
	return true
}
