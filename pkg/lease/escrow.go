package lease

import (
	"bytes"
	"slices"
)

// Terms are an allowance's rules. They come out of the ledger (plan, limit and
// window), so that every reader folds with the same.
type Terms struct {
	// Start and End bound the window [Start, End); End 0 is never. Nothing is
	// granted before Start, no lease outlives End.
	Start, End Micros
	// Term is how long a lease may be used after it was last granted or renewed.
	Term Micros
	// Patience is how long a gateway may take to answer a recall before others
	// are denied without waiting for it; a gateway that waits must repeat its
	// ask more often than twice in this time.
	Patience Micros
	// ReleaseAfter is how long after a lease's end its gateway may be silent
	// before what it held is handed out again; 0 is never, which makes the tier
	// exact. At most MaxExposure units are given up so at any time, which is
	// the bound of the leased tier.
	ReleaseAfter Micros
	MaxExposure  int64
	// Horizon is how long a closed lease is remembered: an older message that
	// would begin a lease is ignored.
	Horizon Micros
	// MaxLeases that may be remembered at a time.
	MaxLeases int
}

// maxRecalls is how many gateways are called at a time on behalf of one.
const maxRecalls = 16

// lease is what one gateway has of the allowance.
type lease struct {
	gateway                       Gateway
	seq, seen                     uint64
	granted, used, returned, over int64 // totals; used and over as they are settled
	said, beyond                  int64 // used and over, by its own words
	counted                       int64 // used and over, by the calls that were counted
	held                          int64 // of what is out, by its last word
	released                      int64 // all that is out, when it was given up
	need, want                    int64
	waiting                       uint64 // sequence since which it is in the queue; 0: it isn't
	expiry, heard                 Micros
	recall                        uint64 // sequence of the last recall
	recallBy                      Micros // when patience with it ends
	room                          int64
	verdict                       Verdict
	lapsed, silent, closed        bool
	due                           bool // an answer
}

// known is what was used for certain, of the lease or beyond it: by the gateway's
// words or by the calls that were counted, two totals of the same thing.
func (l *lease) known() int64 { return max(l.said+l.beyond, l.counted) }

// out is what the gateway may have used without our knowing.
func (l *lease) out() int64 { return l.granted - l.used - l.returned }

// spare is what of it is not reserved for calls, by its last word.
func (l *lease) spare() int64 { return l.out() - min(l.held, l.out()) }

func (l *lease) recalled() bool { return l.recall > l.seen }

// Counts are totals since the allowance began.
type Counts struct {
	Grants, Granted    int64 // times, units
	Recalls            int64
	Returned           int64 // units
	DeniedEarly        int64 // times something was out that would have sufficed
	DeniedFinal        int64
	Released           int64 // units given up by policy
	Above              int64 // units that cost more than was reserved
	Late               int64 // units settled after they were given up, or after the lease was closed
	Lowered            int64 // units that were out or spent when the allowance was lowered below them
	Outside            int64 // units used without a lease
	Duplicate, Unknown int64 // messages
}

func (c *Counts) fields() [13]*int64 {
	return [...]*int64{
		&c.Grants, &c.Granted, &c.Recalls, &c.Returned, &c.DeniedEarly, &c.DeniedFinal, &c.Released, &c.Above, &c.Late, &c.Lowered, &c.Outside, &c.Duplicate, &c.Unknown,
	}
}

// Add adds what was counted between two moments of an allowance.
func (c *Counts) Add(before, after *Counts) {
	from, to := before.fields(), after.fields()
	for i, n := range c.fields() {
		*n += *to[i] - *from[i]
	}
}

// Escrow is the fold of one allowance: account, limit and window. It hands out
// no more than there is. Not safe for concurrent use.
type Escrow struct {
	terms       Terms
	amount      int64
	sequence    uint64
	now         Micros
	settled     int64 // spent, by the gateways' words, above and late included
	outstanding int64 // out and not given up
	exposure    int64 // out and given up
	reserved    int64 // out under other escrows, not handed out here
	elsewhere   int64 // exposure of other escrows
	leases      []lease
	since       uint64 // sequence at which more was out than there is; calls it back
	counts      Counts
	answers     []Answer
}

// NewEscrow returns the escrow of an untouched allowance.
func NewEscrow(amount int64, t Terms) *Escrow { return &Escrow{terms: t, amount: bounded(amount)} }

func bounded(n int64) int64 { return max(0, min(n, MaxUnits)) }

// Counted says that calls were counted whose units a gateway took from its lease.
type Counted struct {
	Gateway Gateway
	// Units of the entry's calls, not a total: each call is counted once.
	Units int64
}

// Entry is an entry of the ledger that concerns the allowance; with no body it
// only lets time pass. Its bodies are folded in the order in which they stand.
type Entry struct {
	Sequence uint64
	// Time is the stream's own.
	Time Micros
	Ask  *Ask
	// Terms replace the allowance's; its window stays.
	Terms *Terms
	// Amount replaces the allowance's.
	Amount *int64
	// Outside units were used without a lease (foreign events, what was counted
	// before the limit had leases); negative ones were not used after all.
	Outside int64
	// Counted is use of leases that the ledger knows before, or without, the
	// gateway's word. The gateway reports the same units in time: the larger of
	// the two totals holds. Use of a lease that is not remembered is Outside.
	Counted []Counted
	// Ended gateway, of which nothing is to come.
	Ended *End
}

// End of a gateway. Its lease is closed, and what it has not used comes back.
type End struct {
	Gateway Gateway
	// Keep is how much of the lease it may have used at most, by its own mark, or 0
	// when every call that it let through has been counted. What was not counted of
	// that stays outstanding: calls that come all the same settle it.
	Keep int64
}

// Effects of an entry.
type Effects struct {
	// Answers to send, valid until the next Apply. A lost one is asked for again.
	Answers []Answer
	// Old: the entry is not after the last one and was ignored.
	Old bool
	// Duplicate ask: it changed nothing and is answered again.
	Duplicate bool
	// Unknown: the ask speaks of a lease that is not remembered; it was ignored.
	Unknown bool
	// Invalid says why the ask was ignored: it belongs in the dead letters.
	Invalid string
}

// Apply folds one entry.
func (e *Escrow) Apply(en Entry) Effects {
	var fx Effects
	if en.Sequence <= e.sequence {
		fx.Old = true
		return fx
	}
	e.sequence = en.Sequence
	e.now = max(e.now, en.Time)
	e.answers = e.answers[:0]
	e.elapse()
	before := e.excess()
	if en.Terms != nil {
		start, end := e.terms.Start, e.terms.End
		e.terms = *en.Terms
		e.terms.Start, e.terms.End = start, end
	}
	if en.Amount != nil {
		e.amount = bounded(*en.Amount)
		e.counts.Lowered += max(0, e.excess()-before)
	}
	e.outside(en.Outside)
	for _, c := range en.Counted {
		e.count(c)
	}
	if en.Ended != nil {
		e.end(*en.Ended)
	}
	if en.Ask != nil {
		e.ask(en.Ask, &fx)
	}
	if e.excess() > before {
		e.since = en.Sequence
	}
	e.serve()
	for i := range e.leases {
		if l := &e.leases[i]; l.due {
			l.due = false
			e.answers = append(e.answers, e.answer(l))
		}
	}
	fx.Answers = e.answers
	return fx
}

// maxSettled keeps sums inside of their range, whatever is counted.
const maxSettled = int64(1) << 60

// outside notes use without a lease.
func (e *Escrow) outside(n int64) {
	n = min(max(n, -e.settled), maxSettled-e.settled)
	e.settled += n
	e.counts.Outside += n
}

// count notes use of a lease.
func (e *Escrow) count(c Counted) {
	if c.Units <= 0 {
		return
	}
	i, known := e.find(c.Gateway)
	if !known {
		e.outside(c.Units)
		return
	}
	l := &e.leases[i]
	l.counted += min(c.Units, maxSettled/2-min(l.counted, maxSettled/2))
	e.settle(l, 0)
}

// end closes the lease of a gateway of which nothing is to come.
func (e *Escrow) end(x End) {
	if i, known := e.find(x.Gateway); known && !e.leases[i].closed {
		l := &e.leases[i]
		e.settle(l, max(0, l.out()-max(0, x.Keep-l.used)))
		l.heard = e.now
		e.close(l)
	}
}

func (e *Escrow) close(l *lease) {
	l.closed, l.lapsed, l.waiting, l.need, l.want, l.held, l.verdict = true, true, 0, 0, 0, 0, Ended
}

// Holds reports whether a lease of the gateway is remembered and not closed.
func (e *Escrow) Holds(g Gateway) bool {
	i, known := e.find(g)
	return known && !e.leases[i].closed
}

// free is what can be handed out; negative after the allowance was lowered.
func (e *Escrow) free() int64 { return e.amount - e.settled - e.outstanding - e.reserved }

func (e *Escrow) excess() int64 { return max(0, -e.free()) }

func (e *Escrow) ended() bool { return e.terms.End != 0 && e.now >= e.terms.End }

func (e *Escrow) until() Micros {
	if end := e.terms.End; end != 0 {
		return min(e.now+e.terms.Term, end)
	}
	return e.now + e.terms.Term
}

// elapse does what time does.
func (e *Escrow) elapse() {
	gone := false
	for i := range e.leases {
		l := &e.leases[i]
		if !l.closed {
			l.lapsed = l.lapsed || l.expiry <= e.now
			l.silent = l.silent || l.recalled() && l.recallBy <= e.now
			if l.waiting != 0 && e.staleAt(l) <= e.now {
				l.waiting, l.need, l.want = 0, 0, 0 // its gateway has died or does not wait any more
			}
		}
		if out := l.out(); e.releaseAt(l) <= e.now && out <= e.terms.MaxExposure-e.exposure-e.elsewhere {
			l.released = out
			e.outstanding -= out
			e.exposure += out
			e.counts.Released += out
		}
		gone = gone || e.forgettable(l)
	}
	if gone {
		e.leases = slices.DeleteFunc(e.leases, func(l lease) bool { return e.forgettable(&l) })
	}
}

// uncountedFor is for how many horizons a closed lease is remembered of which not
// every call was counted: they may yet be, and are not to be settled twice. One of
// which some is out is remembered until the window ends.
const uncountedFor = 32

func (e *Escrow) forgettable(l *lease) bool {
	age := e.now - l.heard
	return l.closed && l.out() == 0 && age > e.terms.Horizon && (l.counted >= l.said+l.beyond || age/uncountedFor > e.terms.Horizon)
}

const never = Micros(1<<63 - 1)

func (e *Escrow) staleAt(l *lease) Micros { return l.heard + 2*e.terms.Patience }

func (e *Escrow) releaseAt(l *lease) Micros {
	if e.terms.ReleaseAfter <= 0 || !l.lapsed || l.released != 0 || l.out() == 0 {
		return never
	}
	return max(l.expiry, l.heard) + e.terms.ReleaseAfter
}

// Due returns the stream time at which an entry must come even if nobody asks;
// false: none.
func (e *Escrow) Due() (Micros, bool) {
	at := never
	waiting := false
	for i := range e.leases {
		l := &e.leases[i]
		if !l.lapsed {
			at = min(at, l.expiry)
		}
		if l.recalled() && !l.silent && !l.closed {
			at = min(at, l.recallBy)
		}
		if l.waiting != 0 {
			waiting = true
			at = min(at, e.staleAt(l))
		}
		if r := e.releaseAt(l); r > e.now { // else it waits for room in the exposure
			at = min(at, r)
		}
	}
	if waiting {
		for _, t := range [...]Micros{e.terms.Start, e.terms.End} {
			if t > e.now {
				at = min(at, t)
			}
		}
	}
	return at, at != never
}

func (e *Escrow) find(g Gateway) (int, bool) {
	return slices.BinarySearchFunc(e.leases, g, func(l lease, g Gateway) int { return bytes.Compare(l.gateway[:], g[:]) })
}

func (e *Escrow) ask(m *Ask, fx *Effects) {
	if fx.Invalid = m.wrong(); fx.Invalid != "" {
		return
	}
	i, known := e.find(m.Gateway)
	if !known {
		verdict := Open
		switch {
		case m.Known|m.Used|m.Returned|m.Over != 0:
			// Its lease was closed long ago, or never was: what it used is settled.
			fx.Unknown, verdict = true, Ended
		case e.ended():
			verdict = Ended
		case e.now-m.Sent > e.terms.Horizon:
			fx.Unknown, verdict = true, Ended // maybe a copy from before its end
		case len(e.leases) >= e.terms.MaxLeases:
			verdict = DeniedEarly
			e.counts.DeniedEarly++
		}
		if fx.Unknown {
			e.counts.Unknown++
		}
		if verdict != Open {
			e.answers = append(e.answers, Answer{Gateway: m.Gateway, Revision: e.sequence, Seq: m.Seq, Verdict: verdict, Soon: MaxUnits})
			return
		}
		e.leases = slices.Insert(e.leases, i, lease{gateway: m.Gateway, heard: e.now, expiry: e.until()})
	}
	l := &e.leases[i]
	l.due = true
	if m.Seq <= l.seq {
		fx.Duplicate = true
		e.counts.Duplicate++
		return
	}
	used, returned, over := max(m.Used, l.said), max(m.Returned, l.returned), max(m.Over, l.beyond)
	switch {
	case l.closed:
		// All that it had was settled, has come back or is out for good: more use is beyond it.
		of := min(used, l.granted-l.returned)
		used, returned, over = of, l.returned, over+used-of
	case m.Known > l.granted || used+returned > l.granted:
		fx.Invalid = "the gateway speaks of more than it was granted"
		return
	}
	l.said, l.beyond = used, over
	e.settle(l, returned-l.returned)
	l.seq, l.seen, l.held, l.heard, l.silent = m.Seq, max(l.seen, m.Seen), m.Held, e.now, false
	if l.released > 0 && l.released <= e.free() {
		// It lives, and there is room: no longer given up.
		e.outstanding += l.released
		e.exposure -= l.released
		l.released = 0
	}
	switch {
	case l.closed:
	case m.Closing:
		e.settle(l, l.out())
		e.close(l)
	default:
		e.demand(l, m)
	}
}

// settle takes account of what is known of a lease's use, and of units that came
// back. Calls that were counted and not yet reported are taken to be of what is
// out as far as that goes; the gateway's own word corrects it. However they are
// attributed, used + out is granted - returned, so no unit is handed out twice.
func (e *Escrow) settle(l *lease, returned int64) {
	l.returned += returned
	all := l.known()
	over := max(l.over, l.beyond, all-(l.granted-l.returned))
	used := max(l.said, all-over)
	more, above := used-l.used, over-l.over
	l.used, l.over = used, over
	if l.released > 0 {
		l.released -= more + returned
		e.exposure -= more + returned
		e.counts.Late += max(0, more)
	} else {
		e.outstanding -= more + returned
	}
	e.settled = min(e.settled+more+above, maxSettled)
	e.counts.Returned += returned
	if l.closed {
		e.counts.Late += above
	} else {
		e.counts.Above += above
	}
}

// demand notes what the gateway would like.
func (e *Escrow) demand(l *lease, m *Ask) {
	l.need, l.want = 0, 0
	if e.ended() || m.Need == 0 && m.Want == 0 && !m.Renew {
		l.waiting = 0
		return
	}
	if l.released > 0 {
		// What it holds was handed out to others: until that is settled it gets
		// no more.
		if m.Need > 0 {
			e.deny(l, DeniedEarly, 0)
		}
		return
	}
	l.expiry, l.lapsed = max(l.expiry, e.until()), false
	switch {
	case m.Known < l.granted:
		l.waiting = 0 // there is more on its way than it knows
	case m.Need > 0:
		l.need, l.want = m.Need, m.Want
		if l.waiting == 0 {
			l.waiting = e.sequence
		}
	default:
		l.waiting = 0
		if free := e.free(); m.Want > 0 && free > 0 && e.head() == nil && e.now >= e.terms.Start {
			l.want = m.Want
			e.grant(l, free)
		}
	}
}

// head returns the one that has waited longest.
func (e *Escrow) head() *lease {
	var first *lease
	for i := range e.leases {
		if l := &e.leases[i]; l.waiting != 0 && (first == nil || l.waiting < first.waiting) {
			first = l
		}
	}
	return first
}

// serve goes through the queue as far as it gets, and then looks who was denied
// what can be had now.
func (e *Escrow) serve() {
	if e.now < e.terms.Start {
		return
	}
	idle := e.queue()
	if e.ended() {
		return
	}
	if over := e.excess(); over > 0 {
		e.recallFor(nil, e.since, over)
	}
	for i := range e.leases {
		l := &e.leases[i]
		if l.closed {
			continue
		}
		// What comes back goes to those that wait first.
		if l.verdict == DeniedFinal && e.amount-e.settled > l.room || l.verdict == DeniedEarly && idle && e.free()+l.spare() > l.room {
			l.verdict, l.due = Open, true
		}
	}
}

// queue serves those that wait, and reports whether nobody does any more. In
// order: else a call that needs much would never be served before those that
// need little.
func (e *Escrow) queue() bool {
	for l := e.head(); l != nil; l = e.head() {
		free := e.free()
		switch {
		case e.ended():
			l.waiting, l.due = 0, true
		case l.need <= free:
			e.grant(l, free)
		case e.settled+l.spare()+l.need > e.amount:
			e.deny(l, DeniedFinal, max(0, e.amount-e.settled))
		case e.recallFor(l, l.waiting, l.need-free):
			return false
		default:
			e.deny(l, DeniedEarly, max(0, free)+l.spare())
		}
	}
	return true
}

// grant hands out what is asked for, but no more than a fair share of half of
// what is left, so that leases shrink as the allowance runs out; never less than
// what helps.
func (e *Escrow) grant(l *lease, free int64) {
	active := int64(0)
	for i := range e.leases {
		if o := &e.leases[i]; o == l || !o.closed && !o.lapsed && e.now-o.heard < e.terms.Term {
			active++
		}
	}
	n := min(free, max(l.need, min(l.want, max(1, free/(2*active)))))
	l.granted += n
	e.outstanding += n
	e.counts.Grants++
	e.counts.Granted += n
	l.expiry, l.lapsed = max(l.expiry, e.until()), false
	l.need, l.want, l.waiting, l.verdict, l.due = 0, 0, 0, Open, true
}

func (e *Escrow) deny(l *lease, v Verdict, room int64) {
	l.need, l.want, l.waiting, l.due = 0, 0, 0, true
	l.verdict, l.room = v, room
	if v == DeniedEarly {
		e.counts.DeniedEarly++
	} else {
		e.counts.DeniedFinal++
	}
}

// recallFor calls unused units back from others until what they are believed to
// have suffices, and reports whether somebody's word is still awaited. Who has
// answered a recall since the sequence is not asked again, who was silent
// neither: it speaks when it can.
func (e *Escrow) recallFor(asker *lease, since uint64, short int64) bool {
	pending, expected := 0, int64(0)
	for i := range e.leases {
		if o := &e.leases[i]; o != asker && o.recalled() && !o.silent && !o.closed {
			pending++
			expected += o.spare()
		}
	}
	for expected < short && pending < maxRecalls {
		var best *lease
		for i := range e.leases {
			o := &e.leases[i]
			if o == asker || o.closed || o.out() == 0 || o.released > 0 || o.silent || o.recalled() || o.recall != 0 && o.recall >= since {
				continue
			}
			if best == nil || o.spare() > best.spare() {
				best = o
			}
		}
		if best == nil {
			break
		}
		best.recall, best.recallBy, best.due = e.sequence, e.now+e.terms.Patience, true
		e.counts.Recalls++
		pending++
		expected += best.spare()
	}
	return pending > 0
}

func (e *Escrow) answer(l *lease) Answer {
	a := Answer{Gateway: l.gateway, Revision: e.sequence, Seq: l.seq, Granted: l.granted, Expiry: l.expiry, Verdict: l.verdict, Room: l.room}
	switch {
	case l.waiting != 0:
		a.Verdict = Waiting
	case e.ended():
		a.Verdict = Ended
	}
	if a.Verdict == DeniedEarly {
		a.Soon = e.soon(l)
	}
	if l.recalled() {
		a.Recall = l.recall
	}
	if l.closed {
		// Nothing of it may be used, whoever asks in its gateway's name.
		a.Granted, a.Expiry = 0, 0
	}
	return a
}

// soon is what may come back in a while: of what the asker has reserved, and of what is
// with others that live, or have spoken although their lease has lapsed, as one does
// that ends and waits for its calls.
func (e *Escrow) soon(asker *lease) int64 {
	sum := e.reserved + asker.out() - asker.spare()
	for i := range e.leases {
		if l := &e.leases[i]; l != asker && !l.closed && l.released == 0 && (!l.lapsed || e.now-l.heard < e.terms.Term) {
			sum += l.out()
		}
	}
	return sum
}

// Resume returns the answers that a new owner sends: what its predecessor said
// last may have died with it.
func (e *Escrow) Resume() []Answer {
	var all []Answer
	for i := range e.leases {
		if l := &e.leases[i]; !l.closed {
			all = append(all, e.answer(l))
		}
	}
	return all
}

// Settled is what is spent for certain.
func (e *Escrow) Settled() int64 { return e.settled }

// Denied reports whether what a gateway asked for was refused, and stands so.
func (e *Escrow) Denied() bool {
	return !e.ended() && slices.ContainsFunc(e.leases, func(l lease) bool { return l.verdict == DeniedEarly || l.verdict == DeniedFinal })
}

// Exposure is what was given up and may yet turn out to be used.
func (e *Escrow) Exposure() int64 { return e.exposure }

// Counts returns the totals since the allowance began.
func (e *Escrow) Counts() Counts { return e.counts }

// State is how an allowance stands.
type State struct {
	Amount int64
	// Settled + Outstanding is at most Amount + Excess, and Excess at most what
	// Counts say is Lowered, Above, Late and Outside: 0 in the exact tier unless
	// the allowance was lowered, a call cost more than it reserved or had no lease.
	Settled, Outstanding, Excess int64
	// Exposure is what was given up and may yet turn out to be used; it plus
	// Settled and Outstanding never passes what there was by more than
	// Terms.MaxExposure.
	Exposure int64
	// Reserved is out under names that the limit had before: see Escrow.Reserve.
	Reserved int64
	// Overdraft is what was spent beyond the allowance.
	Overdraft int64
	// Dead is the part of Outstanding in leases that have ended: it is spent
	// unless its gateway or its marks say otherwise.
	Dead   int64
	Leases int
	Waits  int
	Ended  bool
	Counts Counts
}

// State returns how the allowance stands.
func (e *Escrow) State() State {
	s := State{
		Amount: e.amount, Settled: e.settled, Outstanding: e.outstanding, Excess: e.excess(), Exposure: e.exposure, Reserved: e.reserved,
		Overdraft: max(0, e.settled-e.amount),
		Leases:    len(e.leases), Ended: e.ended(), Counts: e.counts,
	}
	for i := range e.leases {
		l := &e.leases[i]
		if l.lapsed && l.released == 0 {
			s.Dead += l.out()
		}
		if l.waiting != 0 {
			s.Waits++
		}
	}
	return s
}
