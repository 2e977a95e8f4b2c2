package lease

import (
	"slices"
	"sync"
)

// Resolution of a reservation.
type Resolution uint8

// The resolutions.
const (
	// Settled: what the call cost is used, the rest is free again.
	Settled Resolution = iota + 1
	// Voided: the call cost nothing.
	Voided
	// Late: as Settled or Voided, after the reservation's deadline.
	Late
	// Already: it was resolved before; nothing changed.
	Already
	// Forgotten: it was open so long after its deadline that it was given up;
	// its units stay held until the window ends.
	Forgotten
)

type holdState uint8

const (
	open holdState = iota
	expired
	resolved
	forgotten
)

// Hold is the upper bound that one call of unknown cost has reserved. Its
// methods are safe for concurrent use.
type Hold struct {
	holds    *Holds
	parts    []Part
	again    []bool // units that were made free at the deadline; nil: none
	deadline Micros
	state    holdState
	at       int
}

// HoldCounts are totals; units where it says so.
type HoldCounts struct {
	Open, Expired                    int // now
	Settled, Voided, Late, Forgotten int64
	Already                          int64 // attempts to resolve a second time
	Above                            int64 // units that cost more than was reserved
}

// Holds are a gateway's reservations. Safe for concurrent use.
type Holds struct {
	mu      sync.Mutex
	max     int
	open    []*Hold
	next    Micros  // no reservation that is not expired has an earlier deadline
	expired []*Hold // in this order; some were resolved since
	counts  HoldCounts
}

// NewHolds returns room for max reservations.
func NewHolds(max int) *Holds { return &Holds{max: max, next: never} }

// Reserve takes the upper bound of every part or none. A call that is not
// resolved before the deadline (the gateway's estimate of the ledger's time) is
// expired: whoever uses this must end calls before it. It keeps parts. The
// index is that of the part that decided when it fails.
func (hs *Holds) Reserve(parts []Part, now, deadline Micros) (*Hold, Outcome, int) {
	for i := takeParts(parts, now); i < len(parts); i = takeParts(parts, now) {
		if out, at := why(parts, i, now); !out.OK() {
			return nil, out, at
		} // else what was missing has come back meanwhile
	}
	h := &Hold{holds: hs, parts: parts, deadline: deadline}
	if !hs.add(h) {
		for i := range parts {
			parts[i].Purse.free.Add(parts[i].Amount)
		}
		return nil, Full, 0
	}
	out := Admitted
	for i := range parts {
		p := parts[i].Purse
		p.held.Add(parts[i].Amount)
		if p.free.Load() <= p.low.Load() {
			out = AdmittedLow
		}
	}
	return h, out, 0
}

func (hs *Holds) add(h *Hold) bool {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if len(hs.open) >= hs.max && !hs.forgetOne() {
		return false
	}
	h.at = len(hs.open)
	hs.open = append(hs.open, h)
	hs.next = min(hs.next, h.deadline)
	hs.counts.Open++
	return true
}

// forgetOne makes room at the cost of the one that expired first.
func (hs *Holds) forgetOne() bool {
	for len(hs.expired) > 0 {
		first := hs.expired[0]
		hs.expired[0] = nil
		hs.expired = hs.expired[1:]
		if first.state == expired {
			hs.remove(first, forgotten)
			hs.counts.Expired--
			hs.counts.Forgotten++
			return true
		}
	}
	return false
}

func (hs *Holds) remove(h *Hold, s holdState) {
	last := len(hs.open) - 1
	hs.open[h.at] = hs.open[last]
	hs.open[h.at].at = h.at
	hs.open[last] = nil
	hs.open = hs.open[:last]
	h.state = s
}

// Sweep expires what is past its deadline. In the exact tier the units stay
// held, since the call may have cost them; else they are free again as far as
// Habits.ReleaseHolds allows.
func (hs *Holds) Sweep(now Micros) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if now < hs.next {
		return
	}
	// In order of deadlines, so that it does not matter how often it is done.
	var due []*Hold
	hs.next = never
	for _, h := range hs.open {
		switch {
		case h.state != open:
		case now >= h.deadline:
			due = append(due, h)
		default:
			hs.next = min(hs.next, h.deadline)
		}
	}
	slices.SortStableFunc(due, func(a, b *Hold) int { return int(max(-1, min(1, a.deadline-b.deadline))) })
	for _, h := range due {
		hs.expire(h)
	}
}

func (hs *Holds) expire(h *Hold) {
	h.state = expired
	hs.counts.Open--
	hs.counts.Expired++
	for i, part := range h.parts {
		if !part.Purse.release(part.Amount) {
			continue
		}
		if h.again == nil {
			h.again = make([]bool, len(h.parts))
		}
		h.again[i] = true
	}
	if h.again != nil {
		return // it may be resolved any time, and what it made free then counts
	}
	if len(hs.expired) > 2*hs.counts.Expired+64 {
		hs.expired = slices.DeleteFunc(hs.expired, func(h *Hold) bool { return h.state != expired })
	}
	hs.expired = append(hs.expired, h)
}

// release makes held units free although their call may yet cost them.
func (p *Purse) release(n int64) bool {
	for {
		exposed := p.exposed.Load()
		if exposed+n > p.habits.ReleaseHolds {
			return false
		}
		if p.exposed.CompareAndSwap(exposed, exposed+n) {
			p.held.Add(-n)
			p.free.Add(n)
			return true
		}
	}
}

// Settle resolves the reservation with what the call did cost, part by part:
// the bound where nothing is said. What is above the bound is taken from what
// is free, and else reported as beyond the lease. The second result is how much
// was above.
func (h *Hold) Settle(actual []int64, now Micros) (Resolution, int64) {
	return h.resolve(now, Settled, func(i int) int64 {
		if i >= len(actual) || actual[i] < 0 {
			return h.parts[i].Amount
		}
		return min(actual[i], MaxUnits)
	})
}

// Void resolves the reservation of a call that cost nothing.
func (h *Hold) Void(now Micros) Resolution {
	r, _ := h.resolve(now, Voided, func(int) int64 { return 0 })
	return r
}

func (h *Hold) resolve(now Micros, how Resolution, cost func(int) int64) (Resolution, int64) {
	hs := h.holds
	hs.mu.Lock()
	defer hs.mu.Unlock()
	if h.state == open && now >= h.deadline {
		hs.expire(h) // whether or not a Sweep came first
	}
	switch h.state {
	case resolved:
		hs.counts.Already++
		return Already, 0
	case forgotten:
		h.state = resolved
		return Forgotten, 0
	case expired:
		how = Late
		hs.counts.Expired--
		hs.counts.Late++
	case open:
		hs.counts.Open--
		if how == Settled {
			hs.counts.Settled++
		} else {
			hs.counts.Voided++
		}
	}
	hs.remove(h, resolved)
	above := int64(0)
	for i, part := range h.parts {
		n := cost(i)
		above += max(0, n-part.Amount)
		if h.again != nil && h.again[i] {
			part.Purse.charge(n)
			part.Purse.exposed.Add(-part.Amount)
			continue
		}
		part.Purse.held.Add(-part.Amount)
		if n > part.Amount {
			part.Purse.charge(n - part.Amount)
			n = part.Amount
		}
		part.Purse.used.Add(n)
		part.Purse.free.Add(part.Amount - n)
	}
	hs.counts.Above += above
	return how, above
}

// charge uses n units that were not reserved: of what is free as far as it goes.
func (p *Purse) charge(n int64) {
	for {
		free := p.free.Load()
		of := min(free, n)
		if p.free.CompareAndSwap(free, free-of) {
			p.used.Add(of)
			p.over.Add(n - of)
			return
		}
	}
}

// Counts returns the totals.
func (hs *Holds) Counts() HoldCounts {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	return hs.counts
}
