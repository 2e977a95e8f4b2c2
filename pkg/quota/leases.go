package quota

import (
	"bytes"
	"cmp"
	"container/heap"
	"encoding/binary"
	"math"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

const (
	// leaseHorizon is how old the first ask of a gateway may be.
	leaseHorizon = lease.Micros(2 * 60 * 1_000_000)
	// maxLeases that an allowance has at a time.
	maxLeases = 4096
	// aheadAtMost is how long before its window an allowance may be asked for: a
	// gateway's clock may be ahead of the ledger's.
	aheadAtMost = usage.Micros(60 * 1_000_000)
)

// allowanceKey is where an allowance belongs: the account's limit of that
// number, in a window.
type allowanceKey struct {
	account, limit uint32
	window         int32
}

// allowance is the escrow of one account, limit and window. It begins with the
// first ask, at what was counted until then, and is gone when its window is over.
type allowance struct {
	key    allowanceKey
	escrow *lease.Escrow
	end    usage.Micros // of the window
	due    usage.Micros // when an entry must come
	at     int          // in the heap

	// formers are what gateways hold under names that the limit had before, oldest
	// first; forgotten is what they may hold under still earlier ones.
	formers   []*former
	forgotten int64
	// parked is the limit that it was of, if the account has none that is leased and
	// counts the same any more: see retired.
	parked *limit

	// What this entry brings to it:
	stirred bool
	entry   lease.Entry
	ask     lease.Ask
	ended   lease.End
	counted [1]lease.Counted
	// refusing: an ask for more of an account that is closed.
	refusing bool
}

// allowanceHeap has the allowance first that is due first.
type allowanceHeap []*allowance

func (h allowanceHeap) Len() int           { return len(h) }
func (h allowanceHeap) Less(i, j int) bool { return h[i].due < h[j].due }
func (h allowanceHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}
func (h *allowanceHeap) Push(x any) {
	a := x.(*allowance)
	a.at = len(*h)
	*h = append(*h, a)
}
func (h *allowanceHeap) Pop() any {
	last := len(*h) - 1
	a := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	a.at = -1
	return a
}

func checkTier(plan string, l *usage.Limit) *usage.InvalidError {
	t := &l.Lease
	bad := func(format string, args ...any) *usage.InvalidError {
		return invalid(usage.ReasonMalformed, "limit %s/%s: "+format, append([]any{plan, l.ID}, args...)...)
	}
	if l.Tier != "" && l.Tier != usage.TierEventual && !l.Tier.Leased() {
		return bad("the tier %q is not known", l.Tier)
	}
	if !l.Tier.Leased() {
		if *t != (usage.LeaseTerms{}) {
			return bad("terms of leases are of the tiers %s and %s", usage.TierExact, usage.TierLeased)
		}
		return nil
	}
	if l.Amount > lease.MaxUnits {
		return bad("an amount of %d: at most %d can be handed out", l.Amount, lease.MaxUnits)
	}
	for _, span := range [...]usage.Micros{t.Term, t.Patience, t.ReleaseAfter} {
		if span < 0 || span > usage.MaxLeaseSpan {
			return bad("a lease's span of %d microseconds: 0 to %d are possible", span, usage.MaxLeaseSpan)
		}
	}
	switch {
	case t.MaxExposure < 0 || t.MaxExposure > lease.MaxUnits:
		return bad("an exposure of %d units: 0 to %d are possible", t.MaxExposure, lease.MaxUnits)
	case l.Tier == usage.TierExact && (t.ReleaseAfter != 0 || t.MaxExposure != 0):
		return bad("what is handed out again is the tier %s, not %s", usage.TierLeased, usage.TierExact)
	case l.Tier == usage.TierLeased && (t.ReleaseAfter == 0 || t.MaxExposure == 0):
		return bad("the tier %s states after how long what is handed out again (release_after), and how much at most (max_exposure)", usage.TierLeased)
	}
	return nil
}

// leaseTerms are a limit's terms, without a window.
func leaseTerms(l *usage.Limit) lease.Terms {
	return lease.Terms{
		Term: lease.Micros(cmp.Or(l.Lease.Term, usage.DefaultLeaseTerm)), Patience: lease.Micros(cmp.Or(l.Lease.Patience, usage.DefaultLeasePatience)),
		ReleaseAfter: lease.Micros(l.Lease.ReleaseAfter), MaxExposure: l.Lease.MaxExposure, Horizon: leaseHorizon, MaxLeases: maxLeases,
	}
}

// termsOf are the terms of a limit's allowance in a window.
func termsOf(l *limit, number int32) lease.Terms {
	t := l.terms
	if l.kind != window.Lifetime {
		t.Start, t.End = lease.Micros(l.kind.Start(int64(number))), lease.Micros(l.kind.End(int64(number)))
	}
	return t
}

func (s *Shard) addAllowance(key allowanceKey, l *limit, e *lease.Escrow) *allowance {
	x := s.newAllowance(key, l, e)
	s.allowances[key] = x
	return x
}

func (s *Shard) newAllowance(key allowanceKey, l *limit, e *lease.Escrow) *allowance {
	x := &allowance{key: key, escrow: e, end: maxMicros}
	if l.kind != window.Lifetime {
		x.end = l.kind.End(int64(key.window))
	}
	x.due = x.next()
	heap.Push(&s.leaseTimes, x)
	return x
}

func (s *Shard) dropAllowance(x *allowance) {
	if x.parked != nil {
		s.dropParked(x)
		return
	}
	delete(s.allowances, x.key)
	heap.Remove(&s.leaseTimes, x.at)
}

// next is when an entry must come.
func (x *allowance) next() usage.Micros {
	due := x.end
	if at, ok := x.escrow.Due(); ok {
		due = min(due, usage.Micros(at))
	}
	for _, f := range x.formers {
		if at, ok := f.escrow.Due(); ok {
			due = min(due, usage.Micros(at))
		}
	}
	return due
}

// stir has the allowance applied in this entry.
func (s *Shard) stir(x *allowance) {
	if !x.stirred {
		x.stirred = true
		s.stirred = append(s.stirred, x)
	}
}

// fireLeases stirs what is due. What is over is done with at once: nothing else
// of this entry concerns it, and the plans may change its limit.
func (s *Shard) fireLeases() {
	s.stirDue(0)
	kept := s.stirred[:0]
	for _, x := range s.stirred {
		if x.end <= s.now {
			s.settle(x)
		} else {
			kept = append(kept, x)
		}
	}
	clear(s.stirred[len(kept):])
	s.stirred = kept
}

// stirDue stirs what is due of the heap below i. Allowances do not touch each
// other: the order does not matter.
func (s *Shard) stirDue(i int) {
	if i < len(s.leaseTimes) && s.leaseTimes[i].due <= s.now {
		s.stir(s.leaseTimes[i])
		s.stirDue(2*i + 1)
		s.stirDue(2*i + 2)
	}
}

// asks takes in what a gateway says.
func (s *Shard) asks(asks []LeaseAsk) {
	if len(asks) > MaxAsks {
		s.effects.Invalid = invalid(usage.ReasonOversized, "%d asks in an entry, at most %d are folded", len(asks), MaxAsks)
		return
	}
	for i := range asks {
		s.ask(&asks[i])
	}
}

func (s *Shard) ask(m *LeaseAsk) {
	over := func() {
		s.answer(LeaseAnswer{
			Account: m.Account, LimitID: m.LimitID, WindowStart: m.WindowStart,
			Answer: lease.Answer{Gateway: m.Gateway, Revision: s.sequence, Seq: m.Seq, Verdict: lease.Ended},
		})
	}
	i, ok := s.find([]byte(m.Account))
	if !ok {
		over()
		return
	}
	a := &s.accounts[i]
	def := s.plans.defs[a.plan]
	k := slices.IndexFunc(s.plans.limits[def.first:def.first+def.n], func(l limit) bool { return l.leased && l.fullID == m.LimitID })
	if x, f := s.formerOf(i, m); f != nil {
		f.says(&m.Ask)
		s.stir(x)
		return
	}
	if k < 0 {
		over()
		return
	}
	l := &s.plans.limits[def.first+uint32(k)]
	w := &s.windows[l.kind]
	number := l.kind.Number(m.WindowStart)
	if m.WindowStart != l.kind.Start(number) || number != int64(w.number) && (number != int64(w.number)+1 || m.WindowStart-s.now > aheadAtMost) {
		over()
		return
	}
	key := allowanceKey{i, uint32(k), int32(number)}
	x := s.allowances[key]
	wants := m.Need > 0 || m.Want > 0
	if x == nil {
		if key.window == w.number && wants && s.opens[openKey{i, uint32(k)}].since != 0 {
			return // how much there is is not known yet: the gateway asks again
		}
		if !wants || m.Known != 0 || a.flags&closed != 0 || s.dedup.Closed(dedup.Producer(m.Gateway)) {
			over() // its lease is gone with the allowance it was of, or it wants none
			return
		}
		e := lease.NewEscrow(l.Amount, termsOf(l, key.window))
		x = s.addAllowance(key, l, e)
		c := &s.counters[a.first+uint32(k)]
		c.roll(w.number)
		if key.window == w.number {
			x.entry.Outside = c.cur
		}
	} else if wants && s.dedup.Closed(dedup.Producer(m.Gateway)) && !x.escrow.Holds(m.Gateway) {
		over() // overtaken by its gateway's end
		return
	}
	s.stir(x)
	if x.entry.Ask != nil && x.ask.Seq >= m.Seq {
		return
	}
	x.ask, x.entry.Ask = m.Ask, &x.ask
	if a.flags&closed != 0 {
		x.refusing = wants
		x.ask.Need, x.ask.Want, x.ask.Renew = 0, 0, false
	}
}

func (s *Shard) answer(a LeaseAnswer) { s.effects.Answers = append(s.effects.Answers, a) }

// countLeased tells the allowance of the present window what a dictionary
// entry's calls used of it.
func (s *Shard) countLeased(p, k uint32, d int, used int64) {
	def := s.plans.defs[s.accounts[p].plan]
	l := &s.plans.limits[def.first+k]
	w := &s.windows[l.kind]
	x := s.allowances[allowanceKey{p, k, w.number}]
	if x == nil {
		return
	}
	s.countAllowance(x, l, d, used)
}

// countAllowance tells an allowance of the present window what a dictionary entry's
// calls used of it.
func (s *Shard) countAllowance(x *allowance, l *limit, d int, used int64) {
	f := &s.f
	w := &s.windows[l.kind]
	s.stir(x)
	leased := int64(0)
	if f.b.Flags.Values != nil && f.b.Producer != (dedup.Producer{}) {
		for _, i := range f.rowsOf(d) {
			flags, _ := f.b.Flags.get(int(i))
			if usage.Flags(flags)&usage.FromLease == 0 || min(f.b.Time[i], f.now) < int64(w.at) {
				continue
			}
			if v, ok := s.uses(int(i), l); ok {
				leased = saturated(leased, v)
			}
		}
	}
	// What may be of a lease that was given under another name is: it is reserved
	// until it is counted.
	mine := leased - x.countFormers(lease.Gateway(f.b.Producer), leased)
	x.entry.Outside = saturated(x.entry.Outside, used-min(used, mine))
	if leased = mine; leased > 0 {
		x.counted[0].Gateway = lease.Gateway(f.b.Producer)
		x.counted[0].Units = saturated(x.counted[0].Units, leased)
		x.entry.Counted = x.counted[:]
	}
}

// endLeases closes the leases of a gateway of which nothing is to come. Its marks say
// how much of them it can have used. Where it has none, those of limits of calls have
// used what was counted, when all its calls were; others stay, because what another
// meter of an open call might have used nobody knows.
func (s *Shard) endLeases(g lease.Gateway, complete bool, marks *LeaseMarks) {
	if !complete && marks == nil {
		return
	}
	keep := marked(marks)
	s.everyAllowance(func(x *allowance) {
		l := s.limitAt(x)
		if marks == nil && l.meter != uint32(usage.CallsIndex) {
			return
		}
		account := s.name(x.key.account)
		if x.escrow.Holds(g) {
			x.ended = lease.End{Gateway: g, Keep: keep.of(account, l.fullID, l.kind, x.key.window)}
			x.entry.Ended = &x.ended
			s.stir(x)
		}
		for _, f := range x.formers {
			if f.escrow.Holds(g) {
				f.ended = lease.End{Gateway: g, Keep: keep.of(account, f.name, l.kind, x.key.window)}
				f.entry.Ended = &f.ended
				s.stir(x)
			}
		}
	})
}

// usedAtMost has marks by account and limit.
type usedAtMost map[[2]string][]*LeaseMark

func marked(marks *LeaseMarks) usedAtMost {
	if marks == nil {
		return nil
	}
	all := make(usedAtMost, len(marks.Marks))
	for n := range marks.Marks {
		m := &marks.Marks[n]
		at := [2]string{m.Account, m.LimitID}
		all[at] = append(all[at], m)
	}
	return all
}

// of returns the mark of an allowance; 0 without one.
func (all usedAtMost) of(account, limit string, kind window.Kind, number int32) int64 {
	most := int64(0)
	for _, m := range all[[2]string{account, limit}] {
		if kind.Number(m.WindowStart) == int64(number) {
			most = max(most, m.UsedAtMost)
		}
	}
	return most
}

// settleLeases applies what this entry brought.
func (s *Shard) settleLeases() {
	for n, x := range s.stirred {
		s.stirred[n] = nil
		if x.stirred { // else its limit is gone
			s.settle(x)
		}
	}
	s.stirred = s.stirred[:0]
}

// settle applies what this entry brought to an allowance, and takes it away if
// it is over.
func (s *Shard) settle(x *allowance) {
	l := s.limitAt(x)
	s.settleFormers(x, l)
	x.entry.Sequence, x.entry.Time = s.sequence, lease.Micros(s.now)
	before := x.escrow.Counts()
	fx := x.escrow.Apply(x.entry)
	after := x.escrow.Counts()
	s.effects.Leases.Add(&before, &after)
	if fx.Invalid != "" && s.effects.Invalid == nil {
		s.effects.Invalid = invalid(usage.ReasonMalformed, "an ask of account %q, limit %s: %s", s.name(x.key.account), l.fullID, fx.Invalid)
	}
	for _, a := range fx.Answers {
		if x.refusing && a.Gateway == x.ask.Gateway && a.Verdict != lease.Ended {
			a.Verdict, a.Room = lease.DeniedFinal, 0
		}
		s.answerOf(x, l.fullID, l, a)
	}
	s.soil(x.key.account)
	if x.parked == nil && x.key.window == s.windows[l.kind].number {
		s.touch(x.key.account, x.key.limit, false)
	}
	x.entry, x.counted[0], x.stirred, x.refusing = lease.Entry{}, lease.Counted{}, false, false
	if x.end <= s.now || x.parked != nil && len(x.formers) == 0 && x.forgotten == 0 {
		s.dropAllowance(x)
		return
	}
	x.due = x.next()
	heap.Fix(&s.leaseTimes, x.at)
}

func (s *Shard) limitAt(x *allowance) *limit {
	if x.parked != nil {
		return x.parked
	}
	return &s.plans.limits[s.plans.defs[s.accounts[x.key.account].plan].first+x.key.limit]
}

// answerOf answers under a name of the limit, the present or a former one.
func (s *Shard) answerOf(x *allowance, name string, l *limit, a lease.Answer) {
	full := LeaseAnswer{Account: s.name(x.key.account), LimitID: name, Answer: a}
	if l.kind != window.Lifetime {
		full.WindowStart, full.WindowEnd = l.kind.Start(int64(x.key.window)), x.end
	}
	s.answer(full)
}

// moveAllowances has an account's allowances follow its limits. Of one whose limit
// is gone, counts something else or is not leased any more gateways are told that it is
// over; what they hold of it is kept.
func (s *Shard) moveAllowances(i uint32, old, limits []limit) {
	if len(s.allowances) > 0 {
		s.followLimits(i, old, limits)
	}
	if s.accounts[i].flags&retires != 0 {
		s.unpark(i, limits)
	}
}

func (s *Shard) followLimits(i uint32, old, limits []limit) {
	var moved []*allowance
	for o := range old {
		if !old[o].leased {
			continue
		}
		present := s.windows[old[o].kind].number
		for number := present; number <= present+1; number++ {
			x := s.allowances[allowanceKey{i, uint32(o), number}]
			if x == nil {
				continue
			}
			k := slices.IndexFunc(limits, func(l limit) bool { return l.leased && l.fullID == old[o].fullID && s.goesOn(&old[o], &l) })
			if k < 0 {
				s.endNamed(x, old[o].fullID, &old[o], x.escrow)
				if k = s.successor(&old[o], limits); k >= 0 && s.succeeded(old, &limits[k], moved, uint32(k), number) {
					k = -1 // another goes on there, which takes up what is parked here
				}
				if k < 0 {
					s.leave(x, &old[o])
					continue
				}
				s.succeed(x, uint32(o), &old[o], &limits[k])
			}
			l := &limits[k]
			if l.Amount != old[o].Amount {
				x.entry.Amount = &l.Amount
				s.stir(x)
			}
			if l.terms != old[o].terms {
				x.entry.Terms = &l.terms
				for _, f := range x.formers {
					f.entry.Terms = &l.terms
				}
				s.stir(x)
			}
			if k != o {
				delete(s.allowances, x.key)
				x.key.limit = uint32(k)
				moved = append(moved, x)
			}
		}
	}
	for _, x := range moved {
		s.allowances[x.key] = x
	}
}

// succeeded says whether the allowance of a window goes to a limit from elsewhere: from
// the limit of its own name, or from one that has moved there.
func (s *Shard) succeeded(old []limit, l *limit, moved []*allowance, k uint32, number int32) bool {
	return slices.ContainsFunc(moved, func(x *allowance) bool { return x.key.limit == k && x.key.window == number }) ||
		slices.ContainsFunc(old, func(from limit) bool { return from.leased && from.fullID == l.fullID && s.goesOn(&from, l) })
}

// leave is the end of an allowance that no limit goes on with.
func (s *Shard) leave(x *allowance, l *limit) {
	if s.core.Version >= keepsCounters {
		s.park(x, l)
		return
	}
	for _, f := range x.formers {
		s.endNamed(x, f.name, l, f.escrow)
	}
	s.dropAllowance(x)
	x.stirred = false
}

// settled is what is spent of a limit in the present window: what was counted,
// or what its allowance knows beside that.
func (s *Shard) settled(t touch, l *limit, c *counter) int64 {
	if l.leased && t.limit != noLimit {
		if x := s.allowances[allowanceKey{t.account, t.limit, s.windows[l.kind].number}]; x != nil {
			return x.escrow.Settled()
		}
	}
	return c.cur
}

// standing is the verdict on a limit, and whether a denial leaves room: of the
// tiers exact and leased, a gateway may be refused what it asked for although
// not all is spent.
func (s *Shard) standing(t touch, l *limit, c *counter) (usage.Verdict, bool) {
	if !l.leased {
		return l.level(c.cur), false
	}
	x := s.allowances[allowanceKey{t.account, t.limit, s.windows[l.kind].number}]
	if x == nil {
		return l.level(c.cur), false
	}
	v := l.level(x.escrow.Settled())
	if v != usage.Deny && x.escrow.Denied() {
		return usage.Deny, true
	}
	return v, false
}

// finishAnswers puts the answers in order and says which decision a denial
// leads to.
func (s *Shard) finishAnswers() {
	all := s.effects.Answers
	s.explain(all)
	if len(all) > 1 {
		slices.SortStableFunc(all, func(x, y LeaseAnswer) int {
			return cmp.Or(cmp.Compare(x.Account, y.Account), cmp.Compare(x.LimitID, y.LimitID), bytes.Compare(x.Gateway[:], y.Gateway[:]), cmp.Compare(x.WindowStart, y.WindowStart))
		})
	}
}

func (s *Shard) explain(all []LeaseAnswer) {
	for n := range all {
		a := &all[n]
		if a.Verdict != lease.DeniedEarly && a.Verdict != lease.DeniedFinal {
			continue
		}
		i, ok := s.find([]byte(a.Account))
		if !ok {
			continue
		}
		def := s.plans.defs[s.accounts[i].plan]
		k := slices.IndexFunc(s.plans.limits[def.first:def.first+def.n], func(l limit) bool { return l.fullID == a.LimitID })
		if k < 0 {
			continue
		}
		t := touch{i, uint32(k)}
		l, c, _ := s.limitOf(t)
		if c.verdict != uint8(usage.Deny) || c.revision == 0 {
			continue // the account is closed
		}
		at := usage.Micros(c.decidedAt) * 1_000_000
		if c.revision == s.sequence {
			at = s.now
		}
		d := s.describe(t, c, l, s.plans.version, c.revision, at)
		a.Decision = &d
	}
}

// Resume returns the answers that a new owner sends: what its predecessor said
// last may have died with it. They are in the order of Effects.Answers.
func (s *Shard) Resume() []LeaseAnswer {
	kept := s.effects.Answers
	s.effects.Answers = nil
	s.everyAllowance(func(x *allowance) {
		l := s.limitAt(x)
		for _, a := range x.escrow.Resume() {
			s.answerOf(x, l.fullID, l, a)
		}
		for _, f := range x.formers {
			s.endNamed(x, f.name, l, f.escrow)
		}
	})
	s.finishAnswers()
	all := s.effects.Answers
	s.effects.Answers = kept
	return all
}

// appendAllowances appends the allowances of an account's limit: of the present
// window and the next. Each says itself of which: that a window has ended changes
// nothing here, so that what is not touched then has no other hash.
func (s *Shard) appendAllowances(out []byte, t touch) []byte {
	l, _, _ := s.limitOf(t)
	if !l.leased {
		return out
	}
	present := s.windows[l.kind].number
	for ahead := int32(0); ahead <= 1 && !(l.kind == window.Lifetime && ahead > 0); ahead++ {
		x := s.allowances[allowanceKey{t.account, t.limit, present + ahead}]
		if x == nil {
			continue
		}
		state := x.appendFormers(x.escrow.Append(nil)) // which is not empty
		out = binary.AppendUvarint(out, uint64(len(state)))
		out = append(out, state...)
		out = binary.AppendVarint(out, int64(x.key.window))
	}
	return append(out, 0)
}

func (s *Shard) readAllowances(r *reader, t touch, l *limit) bool {
	if !l.leased {
		return true
	}
	present := s.windows[l.kind].number
	for before := int64(math.MinInt64); ; {
		state := r.bytes()
		if len(state) == 0 {
			return !r.bad
		}
		number := r.varint()
		if number <= before || number < int64(present) || number > int64(present)+1 || l.kind == window.Lifetime && number != 0 {
			return false
		}
		e, rest, err := lease.Read(state, termsOf(l, int32(number)))
		if err != nil || r.bad {
			return false
		}
		formers, forgotten, ok := readFormers(rest, termsOf(l, int32(number)))
		if !ok {
			return false
		}
		x := s.addAllowance(allowanceKey{t.account, t.limit, int32(number)}, l, e)
		x.formers, x.forgotten = formers, forgotten
		x.reserve()
		x.due = x.next()
		heap.Fix(&s.leaseTimes, x.at)
		before = number
	}
}
