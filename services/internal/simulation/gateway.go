package simulation

import (
	"cmp"
	"slices"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// call is one call of a client, as the client sees it.
type call struct {
	id       string
	account  *account
	at       usage.Micros // by the gateway's clock
	bound    int64        // reserved
	cost     int64
	admitted bool
	answered bool
	windows  []leaseKey // whose leases it was taken from
	code     usage.Code
	gateway  *gateway
	life     int
	source   string
}

type leaseKey struct {
	account, limit string
	start          usage.Micros
}

// purse is a gateway's side of one allowance.
type purse struct {
	key   leaseKey
	end   usage.Micros
	shard uint32
	lease *lease.Purse
	noted int64 // mark that is on its way to the disk, or there
}

// gateway admits calls, and brings them to the ledger.
type gateway struct {
	w    *world
	proc *proc
	skew usage.Micros // of its clock
	// careful: calls are spooled before they are answered.
	careful  bool
	producer ksuid.KSUID
	lanes    [shards]*lane.Lane
	added    [shards][]*call
	told     [shards]int
	old      []*lane.Lane
	purses   map[leaseKey]*purse
	said     map[leaseKey]uint64 // newest message about an allowance, whichever purse's
	order    []*purse
	holds    *lease.Holds
	waiting  []*waiter
	underWay int
	ending   bool
	denies   map[string]usage.Decision

	written usage.Micros // when what is being written will be
	noting  usage.Micros // likewise, of marks
	disk    []spooled    // what a kill leaves
	runs    []run        // likewise
	feed    *reader
}

// spooled is a frame on a gateway's disk.
type spooled struct {
	producer ksuid.KSUID
	shard    uint32
	frame    lane.Frame
}

// run is a producer that the disk knows of.
type run struct {
	producer ksuid.KSUID
	ended    bool // in order: no call was under way, and all are on the disk
	// marks are how much of its leases it can have used.
	marks map[mark]int64
}

type mark struct {
	shard uint32
	leaseKey
}

type waiter struct {
	c     *call
	until usage.Micros
}

func (w *world) newGateway(name string, careful bool) *gateway {
	g := &gateway{w: w, careful: careful}
	g.proc = &proc{w: w, name: name, up: true, killed: func() {}}
	g.proc.start = g.begin
	return g
}

// now is the ledger's time as the gateway estimates it.
func (g *gateway) now() usage.Micros { return g.w.now + g.skew }

func (g *gateway) begin() {
	w := g.w
	g.skew = w.between(-maxSkew, maxSkew)
	g.producer = w.ksuid()
	for s := range g.lanes {
		g.lanes[s] = lane.New(g.producer, uint32(s), g.proc.name)
		g.added[s], g.told[s] = nil, 0
	}
	g.purses, g.order, g.waiting = make(map[leaseKey]*purse), nil, nil
	g.said = make(map[leaseKey]uint64)
	g.holds = lease.NewHolds(1000)
	g.denies = make(map[string]usage.Decision)
	g.old, g.underWay, g.ending = nil, 0, false
	// What the runs before have left: all of it, then their closing entries.
	for _, r := range g.runs {
		for s := range uint32(shards) {
			l := lane.Earlier(r.producer, s)
			for i := range g.disk {
				if d := &g.disk[i]; d.producer == r.producer && d.shard == s && l.Wants(d.frame.Number) {
					f := d.frame
					l.Loaded(&f)
				}
			}
			// Calls may have been under way that nobody has a record of: only a run
			// that ended in order has used no more than the ledger says. Of others the
			// marks tell.
			l.Retire(w.closing(r.producer, l.Last(), r.ended, r.of(s)))
			g.old = append(g.old, l)
		}
	}
	g.runs = append(g.runs, run{producer: g.producer, marks: make(map[mark]int64)})
	g.feed = g.proc.read(&w.nats.decisions, 1, 200, g.follow)
	g.beat()
}

// of returns the marks of a shard.
func (r *run) of(shard uint32) *tollkeeperv1.LeaseMarks {
	out := &tollkeeperv1.LeaseMarks{}
	for k, most := range r.marks {
		if k.shard == shard {
			out.Marks = append(out.Marks, &tollkeeperv1.LeaseMark{Account: k.account, Limit: k.limit, WindowStartUnixMicros: int64(k.start), UsedAtMost: most})
		}
	}
	slices.SortFunc(out.Marks, func(a, b *tollkeeperv1.LeaseMark) int {
		return cmp.Or(cmp.Compare(a.GetAccount(), b.GetAccount()), cmp.Compare(a.GetLimit(), b.GetLimit()), cmp.Compare(a.GetWindowStartUnixMicros(), b.GetWindowStartUnixMicros()))
	})
	return out
}

func (w *world) closing(producer ksuid.KSUID, last uint64, complete bool, leases *tollkeeperv1.LeaseMarks) []byte {
	m, err := ledger.ControlMessage(0, &tollkeeperv1.ControlEntry{
		Id: producer.String(), Author: "gateway",
		Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: producer.Bytes(), LastNumber: last, Complete: complete, Leases: leases}},
	})
	if err != nil {
		w.fail("%v", err)
		return nil
	}
	return m.Data
}

// follow takes a decision in: an older one never replaces a newer one.
func (g *gateway) follow(m ledger.Message, _ uint64) bool {
	if d, err := ledger.UnmarshalDecision(m.Data); err == nil && d.Account != "" {
		if old := g.denies[d.Account+" "+d.LimitID]; d.Revision >= old.Revision {
			g.denies[d.Account+" "+d.LimitID] = d
		}
	}
	return true
}

// beat is what time does to a gateway.
func (g *gateway) beat() {
	for _, l := range append(slices.Clone(g.lanes[:]), g.old...) {
		if number, sent, ok := l.Inflight(); ok && g.w.now-sent > callTimeout {
			l.Failed(number, g.w.now, g.w.r.Float64())
		}
		g.send(l)
	}
	for s := range g.lanes {
		g.spool(uint32(s))
	}
	g.holds.Sweep(lease.Micros(g.now()))
	g.retry()
	g.speak()
	g.proc.after(g.w.between(10_000, 40_000), g.beat)
}

// end is an orderly one: nothing is admitted any more, what is under way comes to
// its end, the leases are given back, and what is not sent is left on the disk.
func (g *gateway) end() {
	if !g.proc.up || g.ending {
		return
	}
	g.w.trace("%s ends", g.proc.name)
	g.ending = true
	for _, p := range g.order {
		p.lease.Close()
	}
	var look func()
	look = func() {
		g.speak()
		busy := g.underWay > 0 || len(g.waiting) > 0
		for s := range g.lanes {
			if l := g.lanes[s]; !busy {
				g.write(uint32(s))
				busy = !l.Safe()
			}
		}
		if busy {
			g.proc.after(10_000, look)
			return
		}
		g.runs[len(g.runs)-1].ended = true
		g.w.report.Ends++
		g.proc.exit()
		g.w.after(g.w.between(50_000, 500_000), g.proc.rise)
	}
	g.proc.after(0, look) // not while it is stopped
}

// call lets a client call.
func (g *gateway) call(a *account) {
	w := g.w
	if g.ending {
		return
	}
	c := &call{id: w.callID(), account: a, at: g.now(), gateway: g, life: g.proc.life}
	w.report.Calls++
	w.calls = append(w.calls, c)
	w.byID[c.id] = c
	if a.reserve > 0 {
		c.bound = a.reserve
		c.cost = w.r.Int64N(a.reserve + 1)
	}
	if !g.admit(c) {
		g.waiting = append(g.waiting, &waiter{c, w.now + 800_000})
		g.speak()
	}
}

// admit decides, and reports false when an answer has to be waited for.
func (g *gateway) admit(c *call) bool {
	w := g.w
	var parts []lease.Part
	var purses []*purse
	now := g.now()
	for _, l := range c.account.path {
		d, denied := g.denies[l.account+" "+l.fullID]
		if denied && d.Verdict == usage.Deny && d.Room == 0 && (d.PeriodEnd == 0 || now < d.PeriodEnd) {
			g.refuse(c, d.Code)
			return true
		}
		if !l.limit.Tier.Leased() {
			continue
		}
		p := g.purse(l, now)
		n := int64(1)
		if l.limit.Meter != usage.Calls {
			n = c.bound
		}
		parts, purses = append(parts, lease.Part{Purse: p.lease, Amount: n}), append(purses, p)
	}
	var out lease.Outcome
	var at int
	var hold *lease.Hold
	switch {
	case len(parts) == 0:
	case c.bound > 0:
		hold, out, at = g.holds.Reserve(parts, lease.Micros(now), lease.Micros(now+3_000_000))
	default:
		out, at = lease.Take(parts, lease.Micros(now))
	}
	switch out {
	case lease.Admitted, lease.AdmittedLow:
	case lease.Refused, lease.RefusedEarly:
		g.refuse(c, usage.QuotaExceeded)
		return true
	case lease.Fetch:
		for i := range parts {
			if i >= at && parts[i].Purse.Outcome(parts[i].Amount, lease.Micros(now)) == lease.Fetch {
				parts[i].Purse.Need(parts[i].Amount, lease.Micros(now+800_000))
			}
		}
		return false
	default: // the turn of a window, too many holds
		return false
	}
	c.admitted = true
	for _, p := range purses {
		c.windows = append(c.windows, p.key)
	}
	if len(parts) > 0 {
		c.at = now
	}
	if hold == nil {
		g.record(c)
		return true
	}
	// The upstream takes its time.
	g.underWay++
	g.proc.after(w.between(1_000, 2_000_000), func() {
		g.underWay--
		actual := make([]int64, len(parts))
		for i := range parts {
			actual[i] = c.cost
			if c.account.path[i].limit.Meter == usage.Calls {
				actual[i] = 1
			}
		}
		hold.Settle(actual, lease.Micros(g.now()))
		g.record(c)
	})
	return true
}

func (g *gateway) refuse(c *call, code usage.Code) {
	c.code = code
	g.w.report.Refused++
	g.record(c)
}

// record hands the call to the outbox; a careful gateway answers when it is safe.
func (g *gateway) record(c *call) {
	e := usage.Call{Time: c.at, Account: c.account.id, RequestID: c.id, Status: 200, Code: c.code}
	if c.admitted {
		if c.bound > 0 {
			e.Quantities.Set(usage.OutputTokens, c.cost)
		}
		if len(c.windows) > 0 {
			e.Flags |= usage.FromLease
		}
	} else {
		e.Status = 402
	}
	s := c.account.shard
	g.lanes[s].Add(&e, lane.Charge(&e), g.w.now)
	g.added[s] = append(g.added[s], c)
	if !g.careful {
		g.answer(c)
	}
	g.send(g.lanes[s])
	g.proc.after(2_000, func() { g.spool(s) })
}

func (g *gateway) answer(c *call) {
	if c.admitted && !c.answered {
		c.answered = true
		g.w.report.Answered++
	}
}

// safe answers what is acknowledged or on disk.
func (g *gateway) safe(s uint32) {
	_, safe, _ := g.lanes[s].Calls()
	for ; g.told[s] < int(safe); g.told[s]++ {
		g.answer(g.added[s][g.told[s]])
	}
}

// spool writes what is to be written to the disk.
func (g *gateway) spool(s uint32) {
	if !g.careful && !g.lanes[s].Failing() {
		return
	}
	g.write(s)
}

// write has everything of a shard written that is not yet, behind what is being
// written.
func (g *gateway) write(s uint32) {
	l := g.lanes[s]
	l.Seal(g.w.now)
	frames := l.Handout(nil, 1<<20)
	if len(frames) == 0 {
		return
	}
	producer := g.producer
	// One write after the other, until each is synced.
	g.written = max(g.written, g.w.now) + g.w.between(200, 4_000)
	g.proc.after(g.written-g.w.now, func() {
		for _, f := range frames {
			copied := *f
			g.disk = append(g.disk, spooled{producer, s, copied})
			l.Spooled(f.Number, lane.Position{Segment: 1, Offset: int64(len(g.disk))})
		}
		g.safe(s)
	})
}

// send publishes a lane's next frame.
func (g *gateway) send(l *lane.Lane) {
	if g.proc.cut {
		return
	}
	f, _ := l.Publish(g.w.now)
	if f == nil {
		return
	}
	m := ledger.FrameMessage(l.Shard(), f.Data)
	if f.Closing {
		m = ledger.ClosingMessage(l.Shard(), f.Data)
	}
	w := g.w
	number := f.Number
	g.proc.ask(func() any { return w.nats.publish(&w.nats.ledger, m) }, func(_ any, ok bool) {
		if !ok {
			l.Failed(number, w.now, w.r.Float64())
			return
		}
		l.Acked(number)
		if l == g.lanes[l.Shard()] {
			g.safe(l.Shard())
		}
		g.send(l)
	})
}

// purse returns the gateway's purse for a limit's present window.
func (g *gateway) purse(l *pathLimit, now usage.Micros) *purse {
	kind, _ := window.Parse(l.limit.Window)
	key := leaseKey{account: l.account, limit: l.fullID}
	end := usage.Micros(0)
	if kind != window.Lifetime {
		n := kind.Number(now)
		key.start, end = kind.Start(n), kind.End(n)
	}
	p := g.purses[key]
	if p == nil {
		habits := lease.Habits{
			Skew: lease.Micros(maxSkew + 50_000), Term: lease.Micros(leaseTerm), ReportEvery: 1_000_000, RetryAfter: 100_000, Recheck: 500_000,
			FirstWant: 10, MaxWant: 1000, Sealed: true,
		}
		p = &purse{key: key, end: end, shard: l.shard, lease: lease.NewPurse(lease.Gateway(g.producer), lease.Micros(end), habits)}
		// What an earlier purse was answered is of its lease, which is over.
		p.lease.After(g.said[key])
		g.purses[key] = p
		g.order = append(g.order, p)
	}
	return p
}

// hear takes an owner's answer in.
func (g *gateway) hear(a quota.LeaseAnswer) {
	p := g.purses[leaseKey{a.Account, a.LimitID, a.WindowStart}]
	if p == nil {
		return
	}
	p.lease.Receive(a.Answer, lease.Micros(g.now()))
	g.retry()
	g.speak()
}

// retry tries again what waits.
func (g *gateway) retry() {
	waiting := g.waiting
	g.waiting = nil
	for _, x := range waiting {
		switch {
		case g.admit(x.c):
		case g.w.now >= x.until:
			x.c.code = usage.BillingStateUnknown
			g.w.report.Unknown++
			g.record(x.c)
		default:
			g.waiting = append(g.waiting, x)
		}
	}
}

// speak sends what the purses have to say.
func (g *gateway) speak() {
	w := g.w
	asks := make([]*tollkeeperv1.LeaseEntry, shards)
	kept := g.order[:0]
	var wanted []*purse
	for _, p := range g.order {
		m, ok := p.lease.Next(lease.Micros(g.now()))
		if p.lease.Done() {
			delete(g.purses, p.key)
			continue
		}
		kept = append(kept, p)
		if to, more := p.lease.Mark(lease.Micros(g.now())); more && to > p.noted {
			p.noted = to
			wanted = append(wanted, p)
		}
		if !ok {
			continue
		}
		g.said[p.key] = m.Seq
		if asks[p.shard] == nil {
			asks[p.shard] = &tollkeeperv1.LeaseEntry{Gateway: g.producer.Bytes(), Name: g.proc.name}
		}
		asks[p.shard].Asks = append(asks[p.shard].Asks, &tollkeeperv1.LeaseAsk{
			Account: p.key.account, Limit: p.key.limit, WindowStartUnixMicros: int64(p.key.start),
			Seq: m.Seq, SentUnixMicros: int64(m.Sent), Seen: m.Seen, Known: m.Known, Used: m.Used, Returned: m.Returned, Over: m.Over,
			Held: m.Held, Need: m.Need, Want: m.Want, Renew: m.Renew, Closing: m.Closing,
		})
	}
	g.order = kept
	g.note(wanted)
	for s, e := range asks {
		if e == nil {
			continue
		}
		m, err := ledger.LeaseMessage(uint32(s), e)
		if err != nil {
			w.fail("%v", err)
			return
		}
		g.proc.ask(func() any { return w.nats.publish(&w.nats.ledger, m) }, func(any, bool) {})
	}
}

// note writes marks to the disk, and lets units be used up to them when they are
// synced; whether they are there before that nobody knows.
func (g *gateway) note(purses []*purse) {
	if len(purses) == 0 {
		return
	}
	w, r := g.w, &g.runs[len(g.runs)-1]
	marks := make([]int64, len(purses))
	for i, p := range purses {
		marks[i] = p.noted
	}
	keep := func() {
		for i, p := range purses {
			k := mark{p.shard, p.key}
			r.marks[k] = max(r.marks[k], marks[i])
		}
	}
	fails := !w.calm && w.chance(w.o.Kills/100)
	if w.chance(0.5) {
		keep()
	}
	g.noting = max(g.noting, w.now) + w.between(200, 20_000)
	g.proc.after(g.noting-w.now, func() {
		for i, p := range purses {
			switch {
			case !fails:
				keep()
				p.lease.Unlocked(marks[i])
			case p.noted == marks[i]:
				p.noted = 0 // again, when somebody looks
			}
		}
		g.retry()
		g.speak()
	})
}
