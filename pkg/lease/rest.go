package lease

// Record is what must outlive a purse that rests: with it, and nothing less, a purse
// is made that goes on with the same lease. Returned is Granted - Used, and the mark
// is where Used is: what may be used beyond it is to be noted again.
type Record struct {
	// Seq of the newest message.
	Seq uint64
	// Granted, Used and Over are the totals, as they were said and heard.
	Granted, Used, Over int64
}

// Rest returns the record of a purse that has nothing in hand, has said everything and
// heard that it was, and will be granted nothing that it does not ask for. Nothing is
// taken of it any more, and it can be dropped; false: it is needed, and stays as it is.
// No reservation that names it, if only with 0 units, may be open.
func (p *Purse) Rest() (Record, bool) {
	m := &p.sent
	if p.closing || p.closed || p.ended.Load() || p.seq != p.answered || p.verdict == Waiting || p.need > 0 || p.answer {
		return Record{}, false
	}
	over := p.over.Load()
	if m.Held != 0 || m.Used+m.Returned != p.granted || m.Returned != p.returned || m.Over != over {
		return Record{}, false
	}
	// Used only grows, and with what was returned makes all that was granted: nobody
	// is between two of the counters, and there is nothing that could be taken.
	if p.used.Load() != m.Used || p.held.Load() != 0 || p.exposed.Load() != 0 {
		return Record{}, false
	}
	p.until.Store(0)
	return Record{p.seq, p.granted, m.Used, over}, true
}

// Resume makes a new purse go on where one of the same allowance and gateway rested. It
// is called before anything else.
func (p *Purse) Resume(r Record) {
	p.After(r.Seq)
	p.granted, p.returned, p.usedThen = r.Granted, r.Granted-r.Used, r.Used
	p.used.Store(r.Used)
	p.over.Store(r.Over)
	p.sent = Ask{Gateway: p.gateway, Seq: r.Seq, Known: r.Granted, Used: r.Used, Returned: p.returned, Over: r.Over}
}

// LastWord closes the lease of a purse that rests.
func (r Record) LastWord(g Gateway, now Micros) Ask {
	return Ask{Gateway: g, Seq: r.Seq + 1, Sent: now, Known: r.Granted, Used: r.Used, Returned: r.Granted - r.Used, Over: r.Over, Closing: true}
}

// Sent is the newest message.
func (p *Purse) Sent() Ask { return p.sent }
