package quota

import (
	"container/heap"
	"encoding/binary"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// A limit counts what an account uses in a window, whatever its plan is meanwhile. So
// when an account loses a limit, or its plan does, the counter is not thrown away: it
// is retired, goes on counting without any verdict, and is taken up where a limit of
// the same meter, filter and window comes. It ends with its window. What gateways hold
// of it is kept with it: they may have used it, and it comes back or is counted as if
// the limit were there.

// retired is a counter of an account that no limit of it has.
type retired struct {
	// limit as it was last; only what it counts matters, and its lease terms.
	limit   *limit
	counter counter
	open    opened // see Opening
	// allowances of the present window and the next, of which gateways hold something;
	// each has formers only.
	allowances []*allowance
}

// maxRetired counters of an account are kept, as many as a plan may have limits.
// Beyond, the oldest of which gateways hold nothing is forgotten: the ledger tells it
// again. Of those of which gateways hold something, which it does not tell, maxHeld are
// kept.
const (
	maxRetired = MaxPlanLimits
	maxHeld    = 1024
)

// sameKey says whether two limits count the same: meter, window and calls.
func sameKey(a, b *limit) bool {
	return a.meter == b.meter && a.kind == b.kind && sameSet(a.Filter.Models, b.Filter.Models) &&
		sameSet(a.Filter.Routes, b.Filter.Routes) && sameSet(a.Filter.Methods, b.Filter.Methods)
}

// sameSet says whether two lists have the same elements, in whatever order and however
// often. The lists of filters are short.
func sameSet(a, b []string) bool {
	if slices.Equal(a, b) {
		return true
	}
	within := func(a, b []string) bool {
		return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) })
	}
	return len(a) > 0 && len(b) > 0 && within(a, b) && within(b, a)
}

// goesOn says whether a counter of limit a goes on under limit b, by the shard's rules.
func (s *Shard) goesOn(a, b *limit) bool {
	if s.core.Version < keepsCounters {
		return sameCount(a, b)
	}
	return sameKey(a, b)
}

// findRetired returns the retired counter that counts what a limit does; -1: there is none.
func findRetired(list []retired, l *limit) int {
	return slices.IndexFunc(list, func(r retired) bool { return sameKey(r.limit, l) })
}

// retire keeps the counter of a limit that an account loses, and what it lacks.
func (s *Shard) retire(i uint32, l *limit, c *counter, open opened) *retired {
	c.roll(s.windows[l.kind].number)
	at := findRetired(s.retired[i], l)
	if at < 0 {
		if list := s.retired[i]; len(list) >= maxRetired {
			first := slices.IndexFunc(list, func(r retired) bool { return len(r.allowances) == 0 })
			if first >= 0 || len(list) == maxHeld {
				s.forgetRetired(i, list, max(0, first))
			}
		}
		at = s.addRetired(i, l)
	}
	r := &s.retired[i][at]
	r.counter, r.open = counter{cur: c.cur, prev: c.prev, number: c.number}, open
	switch {
	case len(r.allowances) == 0:
		r.limit = l
	case l.leased:
		r.limit = l
		for _, x := range r.allowances {
			x.parked = l
			x.retarget(&l.terms)
			s.stir(x)
		}
	}
	return r
}

func (s *Shard) addRetired(i uint32, l *limit) int {
	if len(s.retired)+len(s.opens) == 0 {
		s.settlePurged()
	}
	s.retirements[l.kind]++
	s.retired[i] = append(s.retired[i], retired{limit: l})
	s.accounts[i].flags |= retires
	return len(s.retired[i]) - 1
}

// retarget has what is out under former names follow other terms.
func (x *allowance) retarget(terms *lease.Terms) {
	x.entry.Terms = terms
	for _, f := range x.formers {
		f.entry.Terms = terms
	}
}

// forgetRetired takes one away, with what gateways hold of it.
func (s *Shard) forgetRetired(i uint32, list []retired, at int) {
	s.retirements[list[at].limit.kind]--
	for _, x := range list[at].allowances {
		heap.Remove(&s.leaseTimes, x.at)
		x.stirred = false
	}
	list = slices.Delete(list, at, at+1)
	s.soil(i)
	if len(list) == 0 {
		delete(s.retired, i)
		s.accounts[i].flags &^= retires
		return
	}
	s.retired[i] = list
}

// purge forgets what was retired of windows that have ended, unless gateways hold
// something of the one that begins, and what was open.
func (s *Shard) purge() {
	var ended [window.NumKinds]bool
	any, retires := false, false
	for k := range s.windows {
		if s.purged[k] != s.windows[k].number {
			s.purged[k] = s.windows[k].number
			ended[k], any, retires = true, true, retires || s.retirements[k] > 0
		}
	}
	if any {
		s.closeOpen(&ended)
	}
	if !retires {
		return
	}
	for i := range s.retired {
		for at := len(s.retired[i]) - 1; at >= 0; at-- {
			r := &s.retired[i][at]
			if !ended[r.limit.kind] {
				continue
			}
			r.open = opened{}
			if r.counter.roll(s.windows[r.limit.kind].number); len(r.allowances) > 0 {
				s.soil(i)
				continue
			}
			s.forgetRetired(i, s.retired[i], at)
		}
	}
}

// settlePurged says that nothing that is kept is of an earlier window.
func (s *Shard) settlePurged() {
	for k := range s.windows {
		s.purged[k] = s.windows[k].number
	}
}

// countRetired adds what a dictionary entry's calls used to the counters that account p
// has no limit for.
func (s *Shard) countRetired(p uint32, d int) {
	list := s.retired[p]
	for k := range list {
		r := &list[k]
		w := &s.windows[r.limit.kind]
		r.counter.roll(w.number)
		used, before := s.usedBy(d, r.limit, w)
		r.counter.prev, r.counter.cur = s.add(r.counter.prev, before), s.add(r.counter.cur, used)
		if used > 0 {
			for _, x := range r.allowances {
				if x.key.window == w.number {
					s.countAllowance(x, r.limit, d, used)
				}
			}
		}
	}
}

// correctRetired adjusts the counters of account p that a correction belongs to, and
// reports whether it is older than what one of them keeps.
func (s *Shard) correctRetired(p, meter uint32, c *Correction, at usage.Micros, by int64) (late bool) {
	list := s.retired[p]
	for k := range list {
		r := &list[k]
		if r.limit.meter != meter || !r.limit.Filter.Match(c.Model, c.Route, c.Method) {
			continue
		}
		w := &s.windows[r.limit.kind]
		r.counter.roll(w.number)
		switch {
		case at < w.before:
			late = true
		case at < w.at:
			r.counter.prev = adjusted(r.counter.prev, by)
		default:
			r.open.owes(r.counter.cur, by)
			r.counter.cur = adjusted(r.counter.cur, by)
		}
	}
	return late
}

// park keeps what gateways hold of an allowance whose limit is gone, or is not leased
// any more. Its counter is where it was.
func (s *Shard) park(x *allowance, l *limit) {
	i := x.key.account
	c := s.counters[s.accounts[i].first+x.key.limit]
	delete(s.allowances, x.key)
	x.escrow.Retire()
	x.remember(&former{name: l.fullID, escrow: x.escrow})
	x.escrow, x.entry = lease.NewEscrow(0, termsOf(l, x.key.window)), lease.Entry{}
	x.retarget(&l.terms)
	r := s.retire(i, l, &c, s.opens[openKey{i, x.key.limit}])
	x.parked, x.key.limit = l, noLimit
	if at := slices.IndexFunc(r.allowances, func(y *allowance) bool { return y.key.window == x.key.window }); at >= 0 {
		s.merge(r.allowances[at], x)
		return
	}
	r.allowances = append(r.allowances, x)
	slices.SortFunc(r.allowances, func(a, b *allowance) int { return int(a.key.window - b.key.window) })
	s.stir(x)
}

// remember adds a former; of too many the oldest is only reserved.
func (x *allowance) remember(f *former) {
	x.formers = append(x.formers, f)
	if len(x.formers) > maxFormers {
		x.forgotten = saturated(x.forgotten, x.formers[0].escrow.Loose())
		x.formers = slices.Delete(x.formers, 0, 1)
	}
}

// merge gives one allowance what another of the same account, window and count has out
// under former names, and takes the other away.
func (s *Shard) merge(into, from *allowance) {
	for _, f := range from.formers {
		into.remember(f)
	}
	into.forgotten = saturated(into.forgotten, from.forgotten)
	terms := &s.limitAt(into).terms
	for _, f := range into.formers {
		f.entry.Terms = terms
	}
	into.reserve()
	heap.Remove(&s.leaseTimes, from.at)
	from.stirred, from.formers = false, nil
	s.stir(into)
}

// unpark gives the leased limits of an account what gateways hold of allowances of the
// same count that were parked.
func (s *Shard) unpark(i uint32, limits []limit) {
	list := s.retired[i]
	for at := range list {
		r := &list[at]
		if len(r.allowances) == 0 {
			continue
		}
		k := slices.IndexFunc(limits, func(l limit) bool { return l.leased && sameKey(r.limit, &l) })
		if k < 0 {
			continue
		}
		l := &limits[k]
		number := s.windows[l.kind].number
		r.counter.roll(number)
		for _, x := range r.allowances {
			key := allowanceKey{i, uint32(k), x.key.window}
			if y := s.allowances[key]; y != nil {
				s.merge(y, x)
				continue
			}
			x.key, x.parked = key, nil
			s.allowances[key] = x
			x.escrow, x.entry = lease.NewEscrow(l.Amount, termsOf(l, key.window)), lease.Entry{}
			for _, f := range x.formers {
				f.entry.Terms = &l.terms
			}
			x.reserve()
			if key.window == number {
				x.entry.Outside = r.counter.cur
			}
			s.stir(x)
		}
		r.allowances = nil
	}
}

// takeUp gives a limit of an account the count that a retired counter has, and what it
// lacks; false: there is none.
func (s *Shard) takeUp(i, k uint32, l *limit, c *counter) bool {
	at := findRetired(s.retired[i], l)
	if at < 0 {
		return false
	}
	from := &s.retired[i][at].counter
	from.roll(s.windows[l.kind].number)
	c.cur, c.prev, c.number = from.cur, from.prev, from.number
	if open := s.retired[i][at].open; open.since != 0 {
		s.opens[openKey{i, k}] = open
	}
	return true
}

// dropTaken forgets the retired counters that a limit has taken up, unless gateways
// hold something of them.
func (s *Shard) dropTaken(i uint32, limits []limit) {
	for at := len(s.retired[i]) - 1; at >= 0; at-- {
		r := &s.retired[i][at]
		if len(r.allowances) == 0 && slices.ContainsFunc(limits, func(l limit) bool { return sameKey(r.limit, &l) }) {
			s.forgetRetired(i, s.retired[i], at)
		}
	}
}

// dropParked takes a parked allowance away that is over, or of which nothing is out.
func (s *Shard) dropParked(x *allowance) {
	heap.Remove(&s.leaseTimes, x.at)
	list := s.retired[x.key.account]
	for at := range list {
		list[at].allowances = slices.DeleteFunc(list[at].allowances, func(y *allowance) bool { return y == x })
	}
}

// everyAllowance calls do for each, also for those that are parked.
func (s *Shard) everyAllowance(do func(*allowance)) {
	for _, x := range s.allowances {
		do(x)
	}
	for _, list := range s.retired {
		for at := range list {
			for _, x := range list[at].allowances {
				do(x)
			}
		}
	}
}

// Counted returns the count of an account that a limit ("<plan>/<limit>") of that meter,
// window and filter has, or another that counts the same, or none at the moment, and the
// window's begin (0 for lifetime); false: nothing counts that.
func (s *Shard) Counted(account, limitID string, meter usage.Meter, kind usage.WindowKind, filter *usage.Filter) (used int64, begin usage.Micros, ok bool) {
	i, known := s.find([]byte(account))
	m, metered := s.meterIDs[meter]
	k, parsed := window.Parse(kind)
	if !known || !metered || !parsed {
		return 0, 0, false
	}
	want := limit{Limit: usage.Limit{Filter: *filter}, kind: k, meter: m}
	w := &s.windows[k]
	if k != window.Lifetime {
		begin = w.at
	}
	def := s.plans.defs[s.accounts[i].plan]
	limits := s.plans.limits[def.first : def.first+def.n]
	n := slices.IndexFunc(limits, func(l limit) bool { return l.fullID == limitID && sameKey(&l, &want) })
	if n < 0 {
		n = slices.IndexFunc(limits, func(l limit) bool { return sameKey(&l, &want) })
	}
	if n >= 0 {
		c := s.counters[s.accounts[i].first+uint32(n)]
		c.roll(w.number)
		return c.cur, begin, true
	}
	if at := findRetired(s.retired[i], &want); at >= 0 {
		c := s.retired[i][at].counter
		c.roll(w.number)
		return c.cur, begin, true
	}
	return 0, 0, false
}

// appendRetired appends what is retired of an account that has something.
func (s *Shard) appendRetired(out []byte, i uint32) []byte {
	list := s.retired[i]
	out = binary.AppendUvarint(out, uint64(len(list)))
	for at := range list {
		r := &list[at]
		out = appendLimit(out, &usage.Limit{Meter: r.limit.Meter, Filter: r.limit.Filter, Window: r.limit.Window, Tier: r.limit.Tier, Lease: r.limit.Lease})
		out = binary.AppendVarint(out, r.counter.cur)
		out = binary.AppendVarint(out, r.counter.prev)
		out = binary.AppendVarint(out, int64(r.counter.number))
		out = binary.AppendUvarint(out, r.open.since)
		out = binary.AppendVarint(out, r.open.owed)
		out = binary.AppendUvarint(out, uint64(len(r.allowances)))
		for _, x := range r.allowances {
			out = binary.AppendVarint(out, int64(x.key.window))
			state := x.appendFormers(x.escrow.Append(nil))
			out = binary.AppendUvarint(out, uint64(len(state)))
			out = append(out, state...)
		}
	}
	return out
}

// readRetired reads them; shared has the limits of all accounts by their text.
func (s *Shard) readRetired(r *reader, i uint32, shared map[string]*limit) bool {
	n := r.count()
	if n == 0 || n > maxHeld {
		return false
	}
	for range n {
		text := r.b
		spec := r.limit()
		text = text[:len(text)-len(r.b)]
		c := counter{cur: r.varint(), prev: r.varint()}
		number := r.varint()
		c.number = int32(number)
		open := opened{since: r.uvarint(), owed: r.varint()}
		parked := r.count()
		if r.bad || parked > 2 || open.owed < 0 || open.since > s.sequence || open.since == 0 && open.owed != 0 {
			return false
		}
		l := shared[string(text)]
		if l == nil {
			spec.ID = "retired"
			set := PlanSet{Plans: []usage.Plan{{ID: "retired", Limits: []usage.Limit{spec}}}}
			if checkPlanSet(&set) != nil {
				return false
			}
			if _, known := s.meterIDs[spec.Meter]; !known {
				return false
			}
			made := s.ready("retired", &spec)
			l = &made
			shared[string(text)] = l
		}
		if number != int64(s.windows[l.kind].number) || parked > 0 && !l.leased || findRetired(s.retired[i], l) >= 0 {
			return false
		}
		at := s.addRetired(i, l)
		s.retired[i][at].counter, s.retired[i][at].open = c, open
		for range parked {
			if !s.readParked(r, i, at, l) {
				return false
			}
		}
	}
	return !r.bad
}

func (s *Shard) readParked(r *reader, i uint32, at int, l *limit) bool {
	number := r.varint()
	state := r.bytes()
	into := &s.retired[i][at]
	present := int64(s.windows[l.kind].number)
	if r.bad || number < present || number > present+1 || l.kind == window.Lifetime && number != 0 || len(into.allowances) > 0 && int64(into.allowances[0].key.window) >= number {
		return false
	}
	e, rest, err := lease.Read(state, termsOf(l, int32(number)))
	if err != nil {
		return false
	}
	formers, forgotten, ok := readFormers(rest, termsOf(l, int32(number)))
	if !ok || len(formers) == 0 && forgotten == 0 {
		return false
	}
	x := s.newAllowance(allowanceKey{i, noLimit, int32(number)}, l, e)
	x.parked, x.formers, x.forgotten = l, formers, forgotten
	x.reserve()
	x.due = x.next()
	heap.Fix(&s.leaseTimes, x.at)
	into.allowances = append(into.allowances, x)
	return true
}
