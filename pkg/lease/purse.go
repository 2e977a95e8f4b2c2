package lease

import (
	"math/bits"
	"sync/atomic"
)

// Habits are how a gateway deals with its leases.
type Habits struct {
	// Skew is the most by which the gateway's estimate of the ledger's time is
	// wrong, either way.
	Skew Micros
	// Term is how far ahead a want looks, and the Terms' Term.
	Term Micros
	// ReportEvery is how long what was used stays unreported at most.
	ReportEvery Micros
	// RetryAfter is when an unanswered message is repeated at first; the pause
	// doubles up to 16 times that. Less than Terms.Patience.
	RetryAfter Micros
	// Recheck is how long a denial stands before a call asks again.
	Recheck Micros
	// FirstWant and MaxWant bound what is wished for beyond what is needed.
	FirstWant, MaxWant int64
	// ReleaseHolds is how many units of expired reservations may be used again
	// before their calls are settled; 0 makes the tier exact.
	ReleaseHolds int64
	// Sealed: what is granted may only be used up to the purse's mark (see
	// Purse.Mark), so that it is known of a gateway that was killed how much it can
	// have used at most.
	Sealed bool
}

const (
	// leastMark is how far the mark is moved at least: so much of a lease may stay
	// spent after a kill although nobody used it.
	leastMark = 16
	// markParts of the last grant are unlocked one after the other.
	markParts = 8
	unmarked  = 1<<63 - 1
)

// Outcome of an attempt to take units.
type Outcome uint8

// The outcomes.
const (
	// Admitted: the units are taken.
	Admitted Outcome = iota
	// AdmittedLow: taken, and it is time to call Next.
	AdmittedLow
	// Fetch: not here; call Purse.Need and Next, and try again after Receive.
	Fetch
	// Refused for good: only a raise or the next window brings more.
	Refused
	// RefusedEarly: others hold what is left and may not use it.
	RefusedEarly
	// Over: the window is over or about to be; ask the purse of the next one.
	Over
	// Full: too many reservations are open.
	Full
)

// OK reports whether the units are taken.
func (o Outcome) OK() bool { return o <= AdmittedLow }

// denial is what is known about calls of more than room units.
type denial struct {
	room  int64
	until Micros // when to ask again
	early bool
	soon  int64 // what may come back in a while
}

// Purse is a gateway's side of one allowance. Take, Reserve, a Hold's methods
// and Outcome may be called by any number of goroutines, take no lock of the
// purse and allocate nothing but the Hold; the other methods by one goroutine at
// a time, beside them.
//
// Units move sealed → free (Unlocked), free → used (Take), free → held → used or
// free (Reserve, Settle), sealed or free → returned. They are taken away before
// they are added: the sum is never more than was granted, and less only while
// somebody is between the two. Used + held + free is never more than the mark.
type Purse struct {
	free, low, used atomic.Int64
	until           atomic.Int64 // of the lease, skew taken off
	// Start of the window, for whoever chooses the purse; nothing here looks at it.
	Start Micros
	_     [24]byte // one line for all that an admission touches

	held, over, exposed atomic.Int64
	denial              atomic.Pointer[denial]
	ended               atomic.Bool // the ledger says that the window is over, whatever our clock says

	gateway                             Gateway
	habits                              Habits
	end                                 atomic.Int64
	granted, returned, sealed           int64
	mark                                int64 // what can be used at most since the lease began
	newest                              int64 // grant
	expiry, needUntil, grantedAt, pause Micros
	seq, answered, after                uint64
	asked                               uint64 // since when as much is needed
	seen, epoch                         uint64
	recalled                            uint64
	verdict                             Verdict
	tight                               bool // what comes free goes back
	answer                              bool // a recall is to be answered, if only with nothing
	closing, closed                     bool
	useless                             bool // what was granted last came too late to be used, or a clock is wrong
	need                                int64
	sent                                Ask
	sentAt, retryAt, hopeAt, renewAt    Micros
	usedThen                            int64    // when it was last granted
	_                                   [16]byte // 512 in all: the allocator then begins it with a line
}

// NewPurse returns the purse of gateway g for an allowance whose window ends at
// end (0: never). It is empty.
func NewPurse(g Gateway, end Micros, h Habits) *Purse {
	p := &Purse{gateway: g, habits: h, pause: h.RetryAfter}
	p.SetEnd(end)
	if !h.Sealed {
		p.mark = unmarked
	}
	return p
}

// SetEnd changes when the window ends (0: never).
func (p *Purse) SetEnd(end Micros) { p.end.Store(int64(end)) }

// After numbers the purse's messages after seq, where another purse of the same
// allowance and gateway was before it: what that one said and is still on its way
// must not be taken for this one's, nor what it was answered: units of its lease,
// which is over. It is called before anything else.
func (p *Purse) After(seq uint64) { p.seq, p.answered, p.after = seq, seq, seq }

// take takes n units if they are there and the lease is good at now.
func (p *Purse) take(n int64, now Micros) bool {
	if n == 0 {
		return true
	}
	if int64(now) >= p.until.Load() {
		return false
	}
	for {
		free := p.free.Load()
		if free < n {
			return false
		}
		if p.free.CompareAndSwap(free, free-n) {
			return true
		}
	}
}

// TakeOne is Take of one unit of one allowance; it does not say why it took none.
func (p *Purse) TakeOne(now Micros) (taken, low bool) {
	for int64(now) < p.until.Load() {
		free := p.free.Load()
		if free < 1 {
			break
		}
		if p.free.CompareAndSwap(free, free-1) {
			p.used.Add(1)
			return true, free-1 <= p.low.Load()
		}
	}
	return false, false
}

// Part is what a call needs of one allowance. Amount is not negative.
type Part struct {
	Purse  *Purse
	Amount int64
}

// Take takes every part or none; the index is that of the part that decided
// when it fails. now is the ledger's time as the gateway estimates it.
func Take(parts []Part, now Micros) (Outcome, int) {
	for i := takeParts(parts, now); i < len(parts); i = takeParts(parts, now) {
		if out, at := why(parts, i, now); !out.OK() {
			return out, at
		} // else what was missing has come back meanwhile
	}
	out := Admitted
	for i := range parts {
		p := parts[i].Purse
		p.used.Add(parts[i].Amount)
		if p.free.Load() <= p.low.Load() {
			out = AdmittedLow
		}
	}
	return out, 0
}

// takeParts returns the first part that can't be had, len(parts) when all are.
func takeParts(parts []Part, now Micros) int {
	for i := range parts {
		if n := parts[i].Amount; n < 0 || n > MaxUnits || !parts[i].Purse.take(n, now) {
			for j := range parts[:i] {
				parts[j].Purse.free.Add(parts[j].Amount)
			}
			return i
		}
	}
	return len(parts)
}

// why says what stands against the parts from i on: a refusal, wherever it is,
// before what would have to be fetched.
func why(parts []Part, i int, now Micros) (Outcome, int) {
	out, at := parts[i].Purse.Outcome(parts[i].Amount, now), i
	for j := i + 1; j < len(parts) && out != Refused; j++ {
		if o := parts[j].Purse.Outcome(parts[j].Amount, now); o == Refused || o == RefusedEarly && out != RefusedEarly {
			out, at = o, j
		}
	}
	return out, at
}

// Outcome says what an attempt to take n units would meet.
func (p *Purse) Outcome(n int64, now Micros) Outcome {
	switch d := p.denial.Load(); {
	case n == 0 || n > 0 && n <= p.free.Load() && int64(now) < p.until.Load():
		return Admitted
	case p.ending(now):
		return Over
	case d == nil || n <= d.room || now >= d.until:
		return Fetch
	case d.early:
		return RefusedEarly
	}
	return Refused
}

// Hopeless reports of n units that were RefusedEarly whether nothing of what is missing
// can come back in a while, also of what was reserved here since: to wait for it would
// be in vain.
func (p *Purse) Hopeless(n int64) bool {
	d := p.denial.Load()
	return d != nil && d.early && n > d.room+d.soon+p.held.Load()
}

// ending: nobody can tell any more which window it is.
func (p *Purse) ending(now Micros) bool {
	end := Micros(p.end.Load())
	return p.ended.Load() || end != 0 && now >= end-p.habits.Skew
}

// past: the window is over, and the ledger has not said so.
func (p *Purse) past(now Micros) bool {
	end := Micros(p.end.Load())
	return end != 0 && now >= end+p.habits.Skew && p.seq > 0 && !p.ended.Load()
}

// Ended reports whether the ledger has said that the window is over, or that it does
// not know the lease.
func (p *Purse) Ended() bool { return p.ended.Load() }

// Need notes that a call waits for n units, until a time.
func (p *Purse) Need(n int64, until Micros) {
	p.need, p.needUntil = max(p.need, n), max(p.needUntil, until)
}

// Close begins the end of the lease: what is free goes back now, the rest when
// the open reservations are resolved. Nothing is taken any more, whether or not anybody
// calls Next after that: nobody may be there to keep account of it.
func (p *Purse) Close() {
	p.closing = true
	p.until.Store(0)
	p.giveBack()
}

// Done reports that the lease is closed and that this is known: the purse can
// be dropped.
func (p *Purse) Done() bool { return p.closed && p.answered >= p.seq }

// giveBack takes all that is free or sealed out of use.
func (p *Purse) giveBack() {
	p.returned += p.free.Swap(0) + p.sealed
	p.sealed = 0
}

// open is what was unlocked and did not go back: used, held or free.
func (p *Purse) open() int64 { return p.granted - p.returned - p.sealed }

// Mark returns up to which total, since the lease began, units should be made
// usable next: note it where a kill leaves it, and then call Unlocked. False: the
// mark is far enough. Ask after Need, Receive, Unlocked and an AdmittedLow; what is
// under way need not be noted again.
func (p *Purse) Mark(now Micros) (int64, bool) {
	if p.mark == unmarked || p.closing || p.ending(now) {
		return 0, false
	}
	free, open := p.free.Load(), p.open()
	step := max(p.newest/markParts, leastMark)
	to := open + p.sealed
	switch short := p.need - free; {
	case short > 0 && now < p.needUntil:
		// A call waits. Where more has to be fetched the mark is there before it.
		step = max(step, short)
		to = max(min(to, open+step), open+short)
		if short > p.sealed {
			to = max(to, open+leastMark)
		}
	case p.sealed > 0 && free <= p.low.Load():
		to = min(to, open+step)
	default:
		return 0, false
	}
	return to, to > p.mark
}

// Unlocked says that a mark is noted: whatever happens to this process, it will be
// known. The caller then tries again all that waits, and calls Next after that.
func (p *Purse) Unlocked(mark int64) {
	p.mark = max(p.mark, mark)
	if p.unlock() && p.need <= p.free.Load() {
		p.need = 0
	}
}

// unlock makes usable what the mark allows.
func (p *Purse) unlock() bool {
	n := min(p.sealed, p.mark-p.open())
	if n > 0 {
		p.sealed -= n
		p.free.Add(n)
	}
	if p.sealed > 0 {
		// Early enough for the next mark to be noted before this one is reached.
		p.low.Store(max(p.newest/markParts, leastMark) / 2)
	} else {
		p.low.Store(p.newest / 2)
	}
	return n > 0
}

// Receive takes in an answer. The caller then tries again all that waits, and
// calls Next after that.
func (p *Purse) Receive(a Answer, now Micros) {
	if a.Gateway != p.gateway || a.Epoch < p.epoch || p.after > 0 && a.Seq <= p.after {
		return
	}
	p.epoch = a.Epoch
	if a.Seq > p.answered && a.Seq <= p.seq {
		p.answered = a.Seq
		p.pause = p.habits.RetryAfter
	}
	if p.closed {
		return
	}
	more := a.Granted - p.granted
	if more > 0 {
		p.granted = a.Granted
		p.grantedAt, p.usedThen = now, p.used.Load()+p.held.Load()
		p.newest = more
		p.need, p.tight, p.hopeAt = 0, false, now
		if p.closing {
			p.returned += more
		} else {
			p.sealed += more
			p.unlock()
		}
	}
	if a.Expiry > p.expiry {
		p.expiry = a.Expiry
		p.grantedAt, p.usedThen = now, p.used.Load()+p.held.Load()
		if !p.closing {
			p.until.Store(int64(a.Expiry - p.habits.Skew))
		}
	}
	p.useless = more > 0 && now >= Micros(p.until.Load())
	if a.Revision < p.seen {
		return
	}
	p.seen = a.Revision
	if a.Recall > p.recalled {
		// What was granted for calls that wait goes to them first: Next gives
		// back what is left, else two gateways could pass it to and fro for ever.
		p.recalled, p.tight, p.answer = a.Recall, true, true
	}
	if a.Seq < p.asked && (a.Verdict == DeniedEarly || a.Verdict == DeniedFinal) {
		return // about something else than was asked last
	}
	p.verdict = a.Verdict
	switch a.Verdict {
	case DeniedEarly:
		p.need = 0
		p.denial.Store(&denial{a.Room, now + p.habits.Recheck, true, a.Soon})
	case DeniedFinal:
		p.need = 0
		p.denial.Store(&denial{a.Room, now + 8*p.habits.Recheck, false, 0})
	case Open, Waiting:
		p.denial.Store(nil)
	case Ended:
		p.ended.Store(true)
	}
}

// Next returns the message that is due at now, false when none is. Call it
// after Need, Close, Receive, an AdmittedLow, a resolved Hold, and at least
// every RetryAfter; send what it returns at once.
func (p *Purse) Next(now Micros) (Ask, bool) {
	if now < p.sentAt {
		p.setBack(p.sentAt - now)
	}
	if p.closed {
		if p.Done() || now < p.retryAt {
			return Ask{}, false
		}
		return p.send(p.facts(now), now), true
	}
	over := p.closing || p.ending(now)
	if now >= p.needUntil || over {
		p.need = 0
	}
	if over || p.answer || p.granted > 0 && now >= Micros(p.until.Load()) || p.tight && p.need == 0 {
		p.giveBack()
	}
	m := p.facts(now)
	if over && p.last(&m) {
		p.closed = true
		if p.seq == 0 {
			return Ask{}, false // nobody has heard of it
		}
		return p.send(m, now), true
	}
	if !over {
		p.wish(&m, now)
	}
	switch {
	case p.answer:
	case p.useless && now < p.retryAt:
		return Ask{}, false
	case p.seq > p.answered || m.Need > 0 && p.verdict == Waiting:
		// Something was said and not heard, or is waited for: say it again in a
		// while, or at once when there is more to say.
		if now < p.retryAt && m.Need <= p.sent.Need && m.Returned == p.sent.Returned {
			return Ask{}, false
		}
	case m.Need > 0 || m.Want > 0 || m.Renew || m.Returned != p.sent.Returned:
	case m.Used != p.sent.Used || m.Held != p.sent.Held || m.Over != p.sent.Over:
		// While others want what is here, whether they are denied, and how, may rest
		// on it.
		if !p.tight && now < p.sentAt+p.habits.ReportEvery {
			return Ask{}, false
		}
	case p.past(now):
		// What is held may be held for ever: that the window is over is to be heard.
		if now < p.sentAt+p.habits.ReportEvery {
			return Ask{}, false
		}
	default:
		return Ask{}, false
	}
	return p.send(m, now), true
}

// setBack does with what is to come what was done to the clock: else the purse would be
// silent, and a denial stand, until the clock is where it was. What is needed stays so
// until there is an answer: it may have been said after that.
func (p *Purse) setBack(by Micros) {
	p.grantedAt -= by
	p.put(-by)
}

// Shift puts the purse's pauses off: until it repeats a message, until a denial is asked
// about again, and how long a call waits. Where the ledger's time jumps by and nothing
// else did, they are as long as they were; a negative by has them pass although the
// ledger's time stands still. What a lease and its window last is not changed. Call it
// before Next and Receive.
func (p *Purse) Shift(by Micros) {
	p.needUntil += by
	p.put(by)
}

// put moves pauses.
func (p *Purse) put(by Micros) {
	for _, at := range [...]*Micros{&p.sentAt, &p.retryAt, &p.hopeAt, &p.renewAt} {
		*at += by
	}
	if d := p.denial.Load(); d != nil {
		p.denial.Store(&denial{d.room, d.until + by, d.early, d.soon})
	}
}

// facts is what can be said for certain. Used is read before Held and only
// grows, so that no unit is in both; Returned is ours.
func (p *Purse) facts(now Micros) Ask {
	m := Ask{Gateway: p.gateway, Sent: now, Seen: p.seen, Known: p.granted, Used: p.used.Load(), Returned: p.returned, Over: min(p.over.Load(), MaxUnits), Closing: p.closed}
	m.Held = p.held.Load()
	return m
}

// last makes m the last word if nothing can be taken, given back or settled any
// more. Nothing is free: so what is neither used nor held is between the two in
// some goroutine, and the sum tells.
func (p *Purse) last(m *Ask) bool {
	if m.Held != 0 || p.exposed.Load() != 0 || m.Used+m.Returned != m.Known {
		return false
	}
	m.Closing = true
	return true
}

// wish adds what the gateway would like.
func (p *Purse) wish(m *Ask, now Micros) {
	free := p.free.Load() + p.sealed
	spent := m.Used + m.Held - p.usedThen
	if p.need > free && p.Outcome(p.need, now) == Fetch {
		m.Need = p.need - free
		m.Want = max(m.Need, p.foresee(spent, now))
		return
	}
	good := now < Micros(p.until.Load())
	if p.granted == 0 || p.tight || !good {
		return
	}
	if spent > 0 && free <= p.newest/2 && now >= p.hopeAt && p.denial.Load() == nil {
		m.Want = p.foresee(spent, now)
	}
	end := Micros(p.end.Load())
	m.Renew = (spent > 0 && free > 0 || m.Held > 0) && (end == 0 || p.expiry < end) && now >= max(p.renewAt, p.expiry-p.habits.Skew-p.habits.Term/2)
}

// foresee is what a term will use at the rate since the last grant.
func (p *Purse) foresee(spent int64, now Micros) int64 {
	elapsed := max(int64(now-p.grantedAt), int64(p.habits.RetryAfter), 1)
	hi, lo := bits.Mul64(uint64(max(spent, 0)), uint64(max(p.habits.Term, 0)))
	rate := p.habits.MaxWant
	if hi < uint64(elapsed) {
		if q, _ := bits.Div64(hi, lo, uint64(elapsed)); q < uint64(rate) {
			rate = int64(q)
		}
	}
	return max(rate, min(p.habits.FirstWant, p.habits.MaxWant))
}

func (p *Purse) send(m Ask, now Micros) Ask {
	if p.seq > p.answered {
		p.pause = min(2*p.pause, 16*p.habits.RetryAfter)
	}
	if m.Need > 0 {
		// Whoever waits must be heard to live.
		p.pause = p.habits.RetryAfter
	}
	if m.Want > 0 {
		p.hopeAt = now + p.habits.Recheck
	}
	if m.Renew {
		p.renewAt = now + p.habits.Term/8
	}
	p.answer = false
	p.seq++
	m.Seq = p.seq
	if m.Need == 0 || m.Need > p.sent.Need {
		p.asked = p.seq // else it says again what it said: an answer to that holds
	}
	p.sent, p.sentAt, p.retryAt = m, now, now+p.pause
	return m
}
