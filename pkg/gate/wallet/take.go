package wallet

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Standing says what became of a request for units.
type Standing uint8

// The standings.
const (
	// Taken: they are the call's.
	Taken Standing = iota
	// Denied: only money, a raise or the next window brings more.
	Denied
	// DeniedEarly: others hold what is left and may not use it; counted apart.
	DeniedEarly
	// NoAnswer: nobody said anything in time.
	NoAnswer
	// Turning: the window ends, and the next begins later than a call waits.
	Turning
	// Busy: one of the wallet's bounds is reached.
	Busy
	// Closed: the gateway ends.
	Closed
)

// Part is what a call needs of a limit.
type Part struct {
	table.Draw
	Units int64
}

// Result of Take.
type Result struct {
	Standing Standing
	// Time that the call's event must have: it is in the windows that the units
	// are of. Taken only.
	Time usage.Micros
	// Hold is what to settle or void; nil where units were taken for good.
	Hold *Hold
	// At is the index of the part that stood against it, and Decision what it
	// rests on; nil when it is not known yet. Denied and DeniedEarly only.
	At       int
	Decision *usage.Decision
	Start    usage.Micros // of the window
	// Bound that is reached. Busy only.
	Bound Bound
}

// Bound is one of the wallet's.
type Bound uint8

// The bounds.
const (
	Unbounded Bound = iota
	// Purses: Options.MaxPurses.
	Purses
	// Waiting: Options.MaxWaiting.
	Waiting
	// Reservations: Options.MaxHolds.
	Reservations
)

// String says to a person what is bounded.
func (b Bound) String() string {
	return [...]string{"nothing", "leases", "calls that wait for units", "open reservations"}[b]
}

// Hold is the reservation of one call. Its methods are safe for concurrent use.
type Hold struct {
	d       *desk
	hold    *lease.Hold
	parts   []Part
	pockets []*pocket
	over    atomic.Bool // settled or voided, or about to be
}

// Settle says what the call did cost, part by part: the bound where nothing is
// said (-1).
func (h *Hold) Settle(actual []int64) {
	if h.over.Swap(true) {
		return
	}
	how, above := h.hold.Settle(actual, h.d.w.tell())
	h.d.w.metrics.above.Add(float64(above))
	h.d.resolved(h.pockets, how)
}

// Parts that are reserved; the caller must not change them.
func (h *Hold) Parts() []Part { return h.parts }

// OfCalls reports that only calls are reserved.
func (h *Hold) OfCalls() bool { return ofCalls(h.parts) }

func ofCalls(parts []Part) bool {
	for i := range parts {
		if parts[i].Limit.Meter != usage.Calls {
			return false
		}
	}
	return true
}

// Void gives everything back: the call cost nothing. It reports whether that was so:
// false when it was settled before.
func (h *Hold) Void() bool {
	if h.over.Swap(true) {
		return false
	}
	how := h.hold.Void(h.d.w.tell())
	h.d.resolved(h.pockets, how)
	return how == lease.Voided || how == lease.Late
}

// waiter is a call that waits for units.
type waiter struct {
	parts    []Part
	pockets  []*pocket
	lease    []lease.Part
	reserve  bool
	lifetime lease.Micros // of the reservation
	until    lease.Micros // how long it waits, by the wallet's pace
	grace    lease.Micros // how long after an early denial, by the wallet's pace; 0: there was none
	turn     lease.Micros // when the next window may be tried
	done     chan struct{}
	over     bool // result is there, or nobody waits for it any more
	result   Result
}

// Take takes every part or none, and waits for units that have to be fetched until
// Options.Wait is over or ctx is done. All parts belong to accounts of one path.
// With reserve they are held until Settle or Void, for which lifetime bounds the
// time; else they are used for good.
func (w *Wallet) Take(ctx context.Context, parts []Part, reserve bool, lifetime time.Duration) Result {
	d := &w.desks[parts[0].Shard()]
	x := &waiter{
		parts: parts, pockets: make([]*pocket, len(parts)), lease: make([]lease.Part, len(parts)),
		reserve: reserve, lifetime: lease.Micros(lifetime.Microseconds()),
	}
	began := w.tell()
	x.until = w.pace(began) + lease.Micros(w.o.Wait.Microseconds())
	d.mu.Lock()
	if d.try(x, began) {
		d.mu.Unlock()
		return w.counted(x)
	}
	if w.waiting.Add(1) > int64(w.o.MaxWaiting) {
		x.over = true
		if x.result.Standing != DeniedEarly {
			x.result = Result{Standing: Busy, Bound: Waiting}
		}
	} else {
		x.done = make(chan struct{})
	}
	d.mu.Unlock()
	defer w.waiting.Add(-1)
	if x.done == nil {
		return w.counted(x)
	}
	d.wake()
	timer := time.NewTimer(w.o.Wait)
	defer timer.Stop()
	from := time.Now()
	select {
	case <-x.done:
	case <-timer.C:
	case <-ctx.Done():
	}
	d.mu.Lock()
	if !x.over {
		x.over = true // whoever finds it in a queue passes it by
	}
	d.mu.Unlock()
	w.metrics.waits.Observe(time.Since(from).Seconds())
	return w.counted(x)
}

func (w *Wallet) counted(x *waiter) Result {
	w.metrics.standing(x.result.Standing)
	if x.result.Standing == Busy {
		w.metrics.bounds[x.result.Bound].Inc()
	}
	return x.result
}

// try takes the units or finds out why not; true: the result is there. Else the
// call is in a queue. With d.mu.
func (d *desk) try(x *waiter, now lease.Micros) bool {
	end := func(r Result) bool {
		x.result, x.over = r, true
		return true
	}
	if d.w.closing.Load() {
		return end(Result{Standing: Closed})
	}
	for i := range x.parts {
		p, bound := d.pocket(&x.parts[i].Draw, now)
		if p == nil {
			return end(Result{Standing: Busy, Bound: bound})
		}
		x.pockets[i], x.lease[i] = p, lease.Part{Purse: p.purse, Amount: x.parts[i].Units}
	}
	pace := d.w.pace(now)
	until := now + x.until - pace
	var out lease.Outcome
	var at int
	var hold *lease.Hold
	if x.reserve {
		hold, out, at = d.w.holds.Reserve(x.lease, now, now+x.lifetime)
	} else {
		out, at = lease.Take(x.lease, now)
	}
	p := x.pockets[min(at, len(x.pockets)-1)]
	switch out {
	case lease.Admitted, lease.AdmittedLow:
		if out == lease.AdmittedLow {
			d.all(x.pockets)
		}
		r := Result{Standing: Taken, Time: usage.Micros(now)}
		if hold != nil {
			r.Hold = &Hold{d: d, hold: hold, parts: x.parts, pockets: x.pockets}
			for _, p := range x.pockets {
				p.holds++
			}
		}
		return end(r)
	case lease.Refused:
		return end(Result{Standing: Denied, At: at, Decision: p.decision, Start: usage.Micros(p.start)})
	case lease.RefusedEarly:
		r := Result{Standing: DeniedEarly, At: at, Decision: p.decision, Start: usage.Micros(p.start)}
		if x.grace == 0 {
			x.grace = pace + d.w.grace
			if x.reserve && !ofCalls(x.parts) {
				x.grace = x.until // calls are held for as long as it takes to send them
			}
		}
		if pace >= x.grace || len(p.queue) >= maxGrace || p.purse.Hopeless(x.parts[at].Units) {
			return end(r)
		}
		// What others hold may come back any moment, and then the owner says so.
		x.result, p.grace = r, true
		p.queue = append(p.queue, x)
		d.look(p)
		return false
	case lease.Full:
		return end(Result{Standing: Busy, Bound: Reservations})
	case lease.Over:
		// Nobody can tell any more which window it is: the next one is asked for
		// as soon as it has begun for certain.
		if p.end == 0 || p.end >= until {
			return end(Result{Standing: Turning})
		}
		x.result = Result{Standing: Turning}
		if x.turn = now; now >= p.end-d.w.skew {
			x.turn = p.end
		}
		d.turning = append(d.turning, x)
		return false
	}
	// What is there already must not go back while the rest is fetched.
	for i := range x.lease {
		x.lease[i].Purse.Need(x.lease[i].Amount, until)
	}
	d.all(x.pockets)
	if x.result.Standing != DeniedEarly || x.result.At != at {
		// Else it was denied while it waited here, which stands until more is known.
		x.result = Result{Standing: NoAnswer}
	}
	p.queue = append(p.queue, x)
	return false
}

// maxGrace is how many calls wait at a purse although an early denial stands.
const maxGrace = 1024

// maxBarren is how many of those that wait are tried in vain before the rest is
// left for the next answer, but for those that have now what they need or are refused.
const maxBarren = 64

// stuck reports whether to try the call again would tell nothing new: it lacks something,
// and if that was denied early it knows.
func (x *waiter) stuck(now, pace lease.Micros) bool {
	lacks := false
	for i := range x.lease {
		switch x.lease[i].Purse.Outcome(x.lease[i].Amount, now) {
		case lease.Fetch:
			lacks = true
		case lease.RefusedEarly:
			if x.result.Standing != DeniedEarly || pace >= x.grace || x.lease[i].Purse.Hopeless(x.lease[i].Amount) {
				return false
			}
			lacks = true
		case lease.Refused:
			return false
		}
	}
	return lacks
}

// retry lets those go on that can. The rest is in queue's memory. With d.mu.
func (d *desk) retry(queue []*waiter, now lease.Micros) (rest []*waiter) {
	barren := 0
	rest = queue[:0]
	for _, x := range queue {
		switch {
		case x.over:
		case barren >= maxBarren && x.stuck(now, d.w.pace(now)):
			rest = append(rest, x)
		case d.try(x, now):
			close(x.done)
			barren = 0
		default:
			barren++
		}
	}
	return rest
}
