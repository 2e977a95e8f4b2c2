package quota

import (
	"cmp"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// A limit that nothing has counted for, in a window in which its account has used
// something, starts from what the ledger holds of the window. The state does not have
// that: whoever owns the shard counts it out of the ledger and appends it as an entry,
// which is folded like any other: the counter is what it has counted since it began, and
// that. Until then the counter is open. Of the tiers exact and leased nothing is handed
// out of it, and gateways that ask hear nothing; eventual limits decide by what is
// counted. A counter that is open when its window ends needs nothing any more.

// Opening is what an account had used of a limit before the limit was there.
type Opening struct {
	Account string
	// Meter, Filter and Window say what is counted.
	Meter  usage.Meter
	Filter usage.Filter
	Window usage.WindowKind
	// WindowStart is 0 for lifetime.
	WindowStart usage.Micros
	// Since is the sequence of the entry at which the counter began.
	Since uint64
	// Used in this window before that entry, and Previous in the one before.
	Used, Previous int64
}

// MaxOpenings of an entry.
const MaxOpenings = 1024

// openKey is an account's limit of that number.
type openKey struct{ account, limit uint32 }

// opened says that a counter lacks what was used before an entry; 0: it lacks nothing.
type opened struct {
	since uint64
	// owed is what corrections would have taken off beyond what was counted: a sum does
	// not fall below 0, and what is lacking is corrected too.
	owed int64
}

// settle returns what is to be added of what was used before.
func (o opened) settle(used int64) int64 { return max(0, used-o.owed) }

// owes takes note of a correction of a sum that is as yet too low.
func (o *opened) owes(sum, by int64) {
	if o.since != 0 && by < 0 && sum+by < 0 {
		o.owed = saturated(o.owed, -(sum + by))
	}
}

// correctOpen takes note of a correction of a limit's counter.
func (s *Shard) correctOpen(t touch, sum, by int64) {
	key := openKey(t)
	if o := s.opens[key]; o.since != 0 {
		o.owes(sum, by)
		s.opens[key] = o
	}
}

func checkOpenings(list []Opening) *usage.InvalidError {
	if len(list) > MaxOpenings {
		return invalid(usage.ReasonOversized, "%d openings, at most %d are folded", len(list), MaxOpenings)
	}
	for i := range list {
		o := &list[i]
		if _, ok := window.Parse(o.Window); !ok || o.Used < 0 || o.Previous < 0 || !o.Meter.Valid() || o.Account == "" {
			return invalid(usage.ReasonMalformed, "opening %d names no account, meter or window, or says that less than 0 was used", i)
		}
	}
	return nil
}

// open says that a limit's counter, which begins in this entry, lacks what was used
// before; nothing, where the state proves how much that is.
func (s *Shard) open(i, k uint32, l *limit, c *counter) {
	if s.core.Version < keepsCounters {
		return
	}
	if used, proven := s.proven(&s.accounts[i], l); proven {
		c.cur = used
		return
	}
	if len(s.retired)+len(s.opens) == 0 {
		s.settlePurged()
	}
	s.opens[openKey{i, k}] = opened{since: s.sequence}
}

// proven returns what an account has used of a limit in the present window, if its sums
// tell: the meter was never reported, or all that ever was counts.
func (s *Shard) proven(a *account, l *limit) (int64, bool) {
	if a.flags&corrected != 0 {
		return 0, false // of when and of which calls the sums do not tell
	}
	own, below := &s.sums[a.sums], &s.sums[s.rollups[a.rollup].sums]
	used, known := int64(0), false
	if l.meter < usage.NumBuiltIn {
		known = (own.known|below.known)&(1<<l.meter) != 0
		used = saturated(own.values[l.meter], below.values[l.meter])
	} else {
		if len(s.meters) > MaxMeters {
			return 0, false // readings of it may be in no sum
		}
		for _, x := range [...]*sums{own, below} {
			for _, c := range s.customs[x.custom] {
				if c.meter == l.meter {
					used, known = saturated(used, c.value), true
				}
			}
		}
	}
	if l.meter == uint32(usage.CallsIndex) {
		if known {
			return 0, false // some calls say themselves how many they are
		}
		used = saturated(a.admitted, s.rollups[a.rollup].admitted)
		known = used > 0
	}
	switch {
	case !known:
		return 0, true
	case l.kind == window.Lifetime && l.plain:
		return used, true
	}
	return 0, false
}

// moveOpen has what is open follow the limits of an account; from says with the counter
// of which of the old ones each new one goes on, -1: of none.
func (s *Shard) moveOpen(i uint32, old int, from []int) {
	if len(s.opens) == 0 {
		return
	}
	were := make([]opened, old)
	for o := range were {
		key := openKey{i, uint32(o)}
		were[o] = s.opens[key]
		delete(s.opens, key)
	}
	for k, o := range from {
		if o >= 0 && were[o].since != 0 {
			s.opens[openKey{i, uint32(k)}] = were[o]
		}
	}
}

// closeOpen forgets what is open of windows that have ended: the counter has counted all
// of the one that follows.
func (s *Shard) closeOpen(ended *[window.NumKinds]bool) {
	for key := range s.opens {
		a := &s.accounts[key.account]
		if l := &s.plans.limits[s.plans.defs[a.plan].first+key.limit]; ended[l.kind] {
			delete(s.opens, key)
			s.soil(key.account)
		}
	}
}

// takeOpenings adds what was used before to the counters that lack it.
func (s *Shard) takeOpenings(list []Opening) {
	for n := range list {
		o := &list[n]
		i, known := s.find([]byte(o.Account))
		m, metered := s.meterIDs[o.Meter]
		kind, _ := window.Parse(o.Window)
		if !known || !metered || o.Since == 0 || o.WindowStart != s.beginOf(kind) {
			continue
		}
		s.takeOpening(i, o, &limit{Limit: usage.Limit{Filter: o.Filter}, kind: kind, meter: m})
	}
}

func (s *Shard) takeOpening(i uint32, o *Opening, want *limit) {
	number := s.windows[want.kind].number
	add := func(c *counter, of opened) int64 {
		used := of.settle(o.Used)
		c.roll(number)
		c.cur, c.prev = s.add(c.cur, used), s.add(c.prev, o.Previous)
		s.soil(i)
		return used
	}
	a := &s.accounts[i]
	def := s.plans.defs[a.plan]
	for k := range def.n {
		key := openKey{i, k}
		of := s.opens[key]
		if of.since != o.Since || !sameKey(&s.plans.limits[def.first+k], want) {
			continue
		}
		delete(s.opens, key)
		used := add(&s.counters[a.first+k], of)
		if x := s.allowances[allowanceKey{i, k, number}]; x != nil {
			x.entry.Outside = saturated(x.entry.Outside, used)
			s.stir(x)
		}
		s.touch(i, k, false)
	}
	if at := findRetired(s.retired[i], want); at >= 0 && s.retired[i][at].open.since == o.Since {
		r := &s.retired[i][at]
		add(&r.counter, r.open)
		r.open = opened{}
	}
}

// beginOf is the begin of the present window; 0 for lifetime.
func (s *Shard) beginOf(kind window.Kind) usage.Micros {
	if kind == window.Lifetime {
		return 0
	}
	return s.windows[kind].at
}

// Open returns how many counters of limits are open. Those that no limit has at the
// moment are not among them.
func (s *Shard) Open() int { return len(s.opens) }

// Openings returns what is open, Used and Previous left out, in the order in which it
// began, then by account. It looks at all that is open or retired.
func (s *Shard) Openings() []Opening {
	var all []Opening
	note := func(account uint32, l *limit, since uint64) {
		all = append(all, Opening{Account: s.name(account), Meter: l.Meter, Filter: l.Filter, Window: l.Window, WindowStart: s.beginOf(l.kind), Since: since})
	}
	for key, of := range s.opens {
		note(key.account, &s.plans.limits[s.plans.defs[s.accounts[key.account].plan].first+key.limit], of.since)
	}
	for i, list := range s.retired {
		for at := range list {
			if since := list[at].open.since; since != 0 {
				note(i, list[at].limit, since)
			}
		}
	}
	slices.SortFunc(all, func(a, b Opening) int {
		return cmp.Or(cmp.Compare(a.Since, b.Since), cmp.Compare(a.Account, b.Account), cmp.Compare(a.Meter, b.Meter), cmp.Compare(a.Window, b.Window),
			slices.Compare(a.Filter.Models, b.Filter.Models), slices.Compare(a.Filter.Routes, b.Filter.Routes), slices.Compare(a.Filter.Methods, b.Filter.Methods))
	})
	return all
}
