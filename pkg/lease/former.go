package lease

import "slices"

// A limit that gets another name or plan while it goes on counting has a new escrow,
// for the gateways begin new leases of it. What is out of the old one may still be
// used, and is counted with everything else: the new one reserves it until it was
// counted or has come back.

// Retire has the escrow hand out nothing any more, if nobody asks it for more: there
// is a new one. Who waits is not served.
func (e *Escrow) Retire() {
	for i := range e.leases {
		if l := &e.leases[i]; !l.closed {
			l.waiting, l.need, l.want, l.verdict = 0, 0, 0, Open
		}
	}
}

// Reserve says what other escrows of the same allowance have out: units, which are not
// handed out here, and exposure, which counts towards Terms.MaxExposure. It replaces
// what was said before, is not part of the snapshot, and takes effect with the next
// Apply.
func (e *Escrow) Reserve(units, exposure int64) {
	e.reserved, e.elsewhere = bounded(units), bounded(exposure)
}

// Loose is what may be counted yet of what was handed out: what did not come back, was
// not given up and was not counted.
func (e *Escrow) Loose() int64 {
	sum := int64(0)
	for i := range e.leases {
		sum += e.leases[i].loose()
	}
	return sum
}

// LooseOf is the part of Loose that one gateway may have used.
func (e *Escrow) LooseOf(g Gateway) int64 {
	if i, known := e.find(g); known {
		return e.leases[i].loose()
	}
	return 0
}

func (l *lease) loose() int64 { return max(0, l.granted-l.returned-l.released-l.counted) }

// Uncount takes back what was counted of leases beyond what they can have been used:
// units that came back since. It returns what it was, in the order of gateways.
func (e *Escrow) Uncount() []Counted {
	var back []Counted
	for i := range e.leases {
		l := &e.leases[i]
		if n := l.counted - max(l.granted-l.returned, l.said+l.beyond); n > 0 {
			l.counted -= n
			back = append(back, Counted{l.gateway, n})
		}
	}
	return back
}

// Resting reports whether no gateway has a lease that it could use or speak of.
func (e *Escrow) Resting() bool {
	return !slices.ContainsFunc(e.leases, func(l lease) bool { return !l.closed })
}
