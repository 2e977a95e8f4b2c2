package quota

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// Totals are lifetime sums. A meter that nobody reported is absent.
type Totals struct {
	Admitted, Refused int64
	Meters            map[usage.Meter]int64
	// Adjusted is what of Meters stems from corrections: without it they are
	// what was reported. Admitted and Refused are events and are not corrected:
	// the entry of the meter calls says by how much the use of calls differs
	// from what was admitted, and is in no other sum. Nil when nothing was
	// corrected.
	Adjusted map[usage.Meter]int64
	// Hash is the sum, modulo 2^64, of the hashes of the calls in Admitted and
	// Refused, by which the conservation audit knows them (pkg/audit). It is 0 in
	// AccountUse.All.
	Hash uint64
}

// LimitUse is how a limit of an account stands at the shard's time.
type LimitUse struct {
	LimitID                string
	Meter                  usage.Meter
	Window                 usage.WindowKind
	Amount, Used, Previous int64
	PeriodStart, PeriodEnd usage.Micros
	Verdict                usage.Verdict
	// DecisionID and Revision are those of the last decision; empty and 0
	// when there was none.
	DecisionID string
	Revision   uint64
	Tier       usage.Tier
	// Room is that of the last decision, while it denies in the present window:
	// what could still be had by a smaller call. Tiers exact and leased only.
	Room int64
	// Lease is how the allowance of the present window stands; nil while no
	// gateway has asked for any of it, and in the tier eventual.
	Lease *lease.State
}

// AccountUse is what an account has used.
type AccountUse struct {
	ID, Parent, Plan string
	Closed           bool
	Own              Totals // its own calls
	All              Totals // and those of all below it
	Limits           []LimitUse
}

// Total sums every account of the shard, each call once.
func (s *Shard) Total() Totals {
	t := s.totals(s.total.admitted, s.total.refused, []adjustmentKey{{of: ofAll}}, s.total.sums)
	t.Hash = s.calls
	return t
}

// LeaseSums returns, by meter, the sums of how all open allowances of the tiers
// exact and leased stand; what their counts say is since they began, and
// Effects.Leases is what an entry added. It looks at every allowance.
func (s *Shard) LeaseSums() map[usage.Meter]lease.State {
	var none lease.Counts
	sums := map[usage.Meter]lease.State{}
	for key, x := range s.allowances {
		def := s.plans.defs[s.accounts[key.account].plan]
		if key.limit >= def.n {
			continue // of a plan that the account had before
		}
		meter := s.plans.limits[def.first+key.limit].Meter
		st, sum := x.escrow.State(), sums[meter]
		sum.Amount, sum.Settled = saturated(sum.Amount, st.Amount), saturated(sum.Settled, st.Settled)
		sum.Outstanding, sum.Excess = saturated(sum.Outstanding, st.Outstanding), saturated(sum.Excess, st.Excess)
		sum.Exposure, sum.Overdraft = saturated(sum.Exposure, st.Exposure), saturated(sum.Overdraft, st.Overdraft)
		sum.Dead = saturated(sum.Dead, st.Dead)
		sum.Leases += st.Leases
		sum.Waits += st.Waits
		sum.Counts.Add(&none, &st.Counts)
		sums[meter] = sum
	}
	return sums
}

// Account returns what an account has used; false when it is not known.
func (s *Shard) Account(id string) (AccountUse, bool) {
	i, ok := s.find([]byte(id))
	if !ok {
		return AccountUse{}, false
	}
	return s.use(i), true
}

// Top returns the n accounts with the most admitted calls, their descendants'
// included, in falling order; equals by id. It looks at every account.
func (s *Shard) Top(n int) []AccountUse {
	n = min(n, len(s.accounts))
	if n <= 0 {
		return nil
	}
	// A heap whose root is the least of the best n so far.
	best := make([]uint32, 0, n)
	worse := func(x, y uint32) int {
		if c := cmp.Compare(s.admitted(x), s.admitted(y)); c != 0 {
			return c
		}
		return bytes.Compare(s.idOf(&s.accounts[y]), s.idOf(&s.accounts[x]))
	}
	sift := func(i int) {
		for {
			least := i
			for _, child := range [...]int{2*i + 1, 2*i + 2} {
				if child < len(best) && worse(best[child], best[least]) < 0 {
					least = child
				}
			}
			if least == i {
				return
			}
			best[i], best[least] = best[least], best[i]
			i = least
		}
	}
	for i := range uint32(len(s.accounts)) {
		switch {
		case len(best) < n:
			if best = append(best, i); len(best) == n {
				for k := n/2 - 1; k >= 0; k-- {
					sift(k)
				}
			}
		case worse(best[0], i) < 0:
			best[0] = i
			sift(0)
		}
	}
	slices.SortFunc(best, func(x, y uint32) int { return worse(y, x) })
	out := make([]AccountUse, len(best))
	for k, i := range best {
		out[k] = s.use(i)
	}
	return out
}

func (s *Shard) admitted(i uint32) int64 {
	a := &s.accounts[i]
	return saturated(a.admitted, s.rollups[a.rollup].admitted)
}

func saturated(a, b int64) int64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return int64(maxMicros)
}

func (s *Shard) use(i uint32) AccountUse {
	a := &s.accounts[i]
	r := &s.rollups[a.rollup]
	var own, all []adjustmentKey
	if a.flags&corrected != 0 {
		all = []adjustmentKey{{i, 0, ofOwn}, {i, 0, ofBelow}}
		own = all[:1]
	}
	u := AccountUse{
		ID: string(s.idOf(a)), Plan: s.plans.names[a.plan], Closed: a.flags&closed != 0,
		Own: s.totals(a.admitted, a.refused, own, a.sums),
		All: s.totals(saturated(a.admitted, r.admitted), saturated(a.refused, r.refused), all, a.sums, r.sums),
	}
	u.Own.Hash = a.hash
	if a.parent >= 0 {
		u.Parent = s.name(uint32(a.parent))
	}
	def := s.plans.defs[a.plan]
	for k := range def.n {
		l := &s.plans.limits[def.first+k]
		c := s.counters[a.first+k] // a copy: looking changes nothing
		w := &s.windows[l.kind]
		c.roll(w.number)
		use := LimitUse{
			LimitID: l.fullID, Meter: l.Meter, Window: l.Window, Amount: l.Amount, Used: c.cur, Previous: c.prev,
			Verdict: max(usage.Verdict(c.verdict), usage.Allow), Revision: c.revision, Tier: l.Tier,
		}
		if x := s.allowances[allowanceKey{i, k, w.number}]; l.leased && x != nil {
			state := x.escrow.State()
			use.Lease = &state
			if c.flags&isRoomy != 0 && use.Verdict == usage.Deny {
				use.Room = max(1, l.Amount-state.Settled)
			}
		}
		if l.kind != window.Lifetime {
			use.PeriodStart, use.PeriodEnd = w.at, w.end
		}
		if c.revision != 0 {
			use.DecisionID = DecisionID(usage.Micros(c.decidedAt)*1_000_000, s.shard, c.revision, u.ID, l.fullID)
		}
		u.Limits = append(u.Limits, use)
	}
	return u
}

func (s *Shard) totals(admitted, refused int64, adjusted []adjustmentKey, at ...uint32) Totals {
	t := Totals{Admitted: admitted, Refused: refused, Meters: map[usage.Meter]int64{}}
	for _, i := range at {
		x := &s.sums[i]
		for m := range x.values {
			if x.known&(1<<m) != 0 {
				t.Meters[s.meters[m]] = saturated(t.Meters[s.meters[m]], x.values[m])
			}
		}
		for _, c := range s.customs[x.custom] {
			t.Meters[s.meters[c.meter]] = saturated(t.Meters[s.meters[c.meter]], c.value)
		}
	}
	for _, key := range adjusted {
		for m := range uint32(len(s.meters)) {
			key.meter = m
			if n, ok := s.adjusted[key]; ok {
				if t.Adjusted == nil {
					t.Adjusted = map[usage.Meter]int64{}
				}
				t.Adjusted[s.meters[m]] += n
			}
		}
	}
	return t
}
