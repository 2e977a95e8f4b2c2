package lease

import (
	"container/heap"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
)

// faults of a simulated world; probabilities are per thousand.
type faults struct {
	delay                      Micros // greatest of a message; they overtake each other
	loss, duplicate            int
	crashes, spool             int    // per second of all gateways; of those, whose spool speaks
	ownerCrashes               int    // per second
	zombies                    bool   // a dead owner wakes up again and goes on
	skew                       Micros // greatest of a gateway's clock, either way
	amounts                    int    // changes per second
	release                    bool   // the leased tier
	above                      int    // settlements above the bound
	lateHolds, lostHolds, void int
	deaf                       int // gateways that hear and say nothing for a while
	// frames: calls are counted by the log too, each frame of them so long after
	// its calls at most; 0: they are not.
	frames   Micros
	complete int // crashes of which the spool has every call, and the log says so
	// journal: units are used up to a mark that takes so long at most to be noted,
	// and may fail to be; 0: as they come.
	journal Micros
	marked  int  // crashes after which the log is told the marks
	rests   bool // purses are made anew from their records
}

// plan of a simulated world.
type plan struct {
	seed              uint64
	gateways, clients int
	amount            int64
	windows           int
	levels            int // allowances that every call needs at once: account, parent, …
	width             Micros
	think             Micros // mean pause of a client
	most              int64  // units a counted call takes
	reserve           int    // calls that reserve, per thousand
	bound             int64  // greatest reservation
	faults            faults
	// broken is a way in which the protocol is violated on purpose.
	broken string
}

const (
	ms      = Micros(1000)
	second  = 1000 * ms
	simSkew = 20 * ms
)

func simHabits(f faults) Habits {
	h := Habits{Skew: simSkew, Term: 400 * ms, ReportEvery: 100 * ms, RetryAfter: 40 * ms, Recheck: 150 * ms, FirstWant: 8, MaxWant: 1 << 40}
	if f.release {
		h.ReleaseHolds = 20
	}
	h.Sealed = f.journal > 0
	return h
}

func simTerms(w int, width Micros, f faults) Terms {
	t := Terms{Start: second + Micros(w)*width, Term: 400 * ms, Patience: 120 * ms, Horizon: 10 * second, MaxLeases: 64}
	t.End = t.Start + width
	if f.release {
		t.ReleaseAfter, t.MaxExposure = 100*ms, 40
	}
	return t
}

type event struct {
	at    Micros
	order uint64
	do    func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

type simEntry struct {
	window int
	entry  Entry
}

type simOwner struct {
	epoch    uint64
	position int
	escrows  []*Escrow
	asleep   bool
	dead     bool
}

type simGateway struct {
	id      Gateway
	offset  Micros
	alive   bool
	deaf    bool
	leaving bool
	busy    bool     // several calls try one after the other
	purses  []*Purse // by allowance; nil: not yet
	holds   *Holds
	open    map[*Hold]simHold
	order   []*Hold
	waiters []*simClient
	spoke   bool // every lease has had its last word

	pending []int64 // units of calls that are in no frame yet, by allowance
	counted []int64 // units that the log has counted
	landing Micros  // of the last frame
	lost    bool    // what is not in the log never will be
	ended   bool    // its end by the log is on its way

	noting, noted []int64 // marks, by allowance: on the way to the disk and there
}

type simHold struct {
	allowances []int
	bound      int64
}

type simClient struct {
	gateway *simGateway
	waits   bool
	by      Micros
	window  int
	amount  int64
	reserve bool
	began   Micros
}

// truth of an allowance, whoever knows it.
type truth struct {
	admitted int64 // units: counted calls, open bounds, settled costs within the lease
	used     int64 // units spent for certain: never shrinks
	cap      int64 // what may be admitted
	calls    int64
	outside  int64 // units used by others than gateways
	added    int64 // the positive ones of them
}

type world struct {
	plan
	rng     *rand.Rand
	now     Micros
	queue   events
	order   uint64
	log     []simEntry
	fold    []*Escrow // of the log as it stands
	amounts []int64
	history [][]struct {
		sequence uint64
		amount   int64
	}
	truth    []truth
	gateways []*simGateway
	clients  []*simClient
	owners   []*simOwner
	ids      uint64
	stopped  bool
	stopAt   Micros
	failure  string
	snapshot *simOwner

	asks, answers, refused, refusedEarly, falseEarly, timeouts, admittedCalls int

	marks int       // that were to be noted
	given int64     // units that marks gave back
	rests int       // purses that were made of records
	early [][]int64 // amounts refused early, by window
}

func newWorld(p plan) *world {
	w := &world{plan: p, rng: rand.New(rand.NewPCG(p.seed, 7)), now: second / 2}
	for i := range w.allowances() {
		w.fold = append(w.fold, NewEscrow(w.first(i), w.terms(i)))
		w.amounts = append(w.amounts, w.first(i))
		w.truth = append(w.truth, truth{cap: w.first(i)})
		w.history = append(w.history, nil)
		w.note(i)
	}
	w.early = make([][]int64, w.allowances())
	w.stopAt = second + Micros(p.windows)*p.width
	w.newOwner()
	for range p.gateways {
		g := w.newGateway()
		for range p.clients {
			c := &simClient{gateway: g}
			w.clients = append(w.clients, c)
			w.after(w.upTo(p.think), func() { w.call(c) })
		}
	}
	w.every(20*ms, w.ownerTimers)
	f := p.faults
	if f.crashes > 0 {
		w.every(100*ms, func() {
			if w.chance(f.crashes / 10) {
				w.crash(w.rng.IntN(len(w.gateways)))
			}
		})
	}
	if f.ownerCrashes > 0 {
		w.every(100*ms, func() {
			if w.chance(f.ownerCrashes / 10) {
				w.crashOwner()
			}
		})
	}
	if f.frames > 0 {
		w.every(20*ms, func() {
			for _, g := range w.gateways {
				if g.alive && w.chance(200) {
					w.flush(g)
				}
			}
		})
	}
	if f.amounts > 0 {
		w.every(100*ms, func() {
			if w.chance(f.amounts / 10) {
				w.changeAmount()
			}
		})
	}
	if f.deaf > 0 {
		w.every(100*ms, func() {
			if g := w.gateways[w.rng.IntN(len(w.gateways))]; w.chance(f.deaf/10) && !g.deaf {
				g.deaf = true
				w.after(w.upTo(second), func() { g.deaf = false })
			}
		})
	}
	return w
}

// Allowances are numbered level by level; within one by window.
func (w *world) allowances() int { return w.windows * w.levels }

func (w *world) terms(i int) Terms { return simTerms(i%w.windows, w.width, w.plan.faults) }

// first is an allowance at the beginning: the levels differ by a quarter.
func (w *world) first(i int) int64 { return w.amount + w.amount*int64(i/w.windows)/4 }

func (w *world) note(i int) {
	w.history[i] = append(w.history[i], struct {
		sequence uint64
		amount   int64
	}{uint64(len(w.log)), w.amounts[i] - w.truth[i].outside})
}

func (w *world) fail(format string, args ...any) {
	if w.failure == "" {
		w.failure = fmt.Sprintf("seed %d at %d ms: ", w.seed, w.now/ms) + fmt.Sprintf(format, args...)
	}
}

func (w *world) chance(perThousand int) bool { return w.rng.IntN(1000) < perThousand }

func (w *world) upTo(d Micros) Micros { return 1 + Micros(w.rng.Int64N(int64(d)+1)) }

func (w *world) after(d Micros, do func()) {
	w.order++
	heap.Push(&w.queue, event{w.now + d, w.order, do})
}

func (w *world) every(d Micros, do func()) {
	w.after(d, func() {
		if !w.stopped {
			do()
			w.every(d, do)
		}
	})
}

// run goes on until nothing is left to do.
func (w *world) run() {
	for steps := 0; len(w.queue) > 0 && w.failure == ""; steps++ {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		if !w.stopped && w.now >= w.stopAt {
			w.stop()
		}
		e.do()
		if steps > 3_000_000 {
			w.fail("the world does not come to rest")
		}
	}
	w.audit()
}

// stop heals all faults, and every gateway that lives says goodbye.
func (w *world) stop() {
	w.stopped = true
	w.faults.loss, w.faults.duplicate = 0, 0
	for _, o := range w.owners {
		o.asleep = false
	}
	if w.owners[len(w.owners)-1].dead {
		w.newOwner()
	}
	for _, g := range w.gateways {
		g.deaf = false
		if g.alive {
			g.leaving = true
			w.leave(g)
		}
	}
}

func (w *world) leave(g *simGateway) {
	for _, h := range g.order {
		if hold, ok := g.open[h]; ok {
			w.resolve(g, h, hold, hold.bound)
		}
	}
	done := true
	for _, p := range g.purses {
		if p != nil {
			p.Close()
			done = done && p.Done()
		}
	}
	w.pump(g)
	w.flush(g)
	if w.faults.frames > 0 && w.reserve == 0 && !g.ended && w.chance(500) {
		// Nothing can be taken any more, so the log may say it before the gateway.
		w.end(g, 0)
	}
	if !done && w.now < w.stopAt+30*second {
		w.after(20*ms, func() { w.leave(g) })
	}
	g.spoke = done
}

// flush seals a frame of what was called; frames land in their order.
func (w *world) flush(g *simGateway) {
	if w.faults.frames == 0 {
		return
	}
	units := g.pending
	g.pending = make([]int64, w.allowances())
	g.landing = max(g.landing, w.now+w.upTo(w.faults.frames))
	copies := 1
	if w.broken == "a frame is counted twice" && w.chance(100) {
		copies = 2
	}
	w.after(g.landing-w.now, func() {
		if g.lost {
			return
		}
		for i, n := range units {
			if n > 0 {
				g.counted[i] += n
				for range copies {
					w.append(i, Entry{Counted: []Counted{{g.id, n}}})
				}
			}
		}
	})
}

// end has the log say that all calls of the gateway are counted.
func (w *world) end(g *simGateway, after Micros) {
	g.ended = true
	at := max(g.landing, w.now+after)
	if w.broken == "an end before all is counted" {
		at = w.now
	}
	w.after(at-w.now+1, func() {
		for i, p := range g.purses {
			if p != nil {
				w.append(i, Entry{Ended: &End{Gateway: g.id}})
			}
		}
	})
}

// endAtMarks has the log say how much of its leases a dead gateway can have used.
func (w *world) endAtMarks(g *simGateway) {
	g.ended = true
	at := max(g.landing, w.now+2*w.faults.delay+w.upTo(second))
	w.after(at-w.now+1, func() {
		for i, p := range g.purses {
			if p == nil {
				continue
			}
			back := w.fold[i].State().Counts.Returned
			w.append(i, Entry{Ended: &End{g.id, g.noted[i]}})
			w.given += w.fold[i].State().Counts.Returned - back
			for _, h := range w.fold[i].Holdings() {
				if h.Gateway == g.id && h.Outstanding > max(0, g.noted[i]-h.Used) {
					w.fail("%d units stay out of a lease of which %d are used and %d can be", h.Outstanding, h.Used, g.noted[i])
				}
			}
		}
	})
}

// The network.

func (w *world) carry(do func()) {
	copies := 1
	if w.chance(w.faults.loss) {
		copies = 0
	}
	if w.chance(w.faults.duplicate) {
		copies++
	}
	for range copies {
		w.after(w.upTo(w.faults.delay), do)
	}
}

func (w *world) append(window int, en Entry) {
	en.Sequence, en.Time = uint64(len(w.log)+1), w.now
	w.log = append(w.log, simEntry{window, en})
	before := w.fold[window].State()
	if en.Amount != nil {
		w.amounts[window] = *en.Amount
	}
	w.truth[window].outside += en.Outside
	w.truth[window].added += max(0, en.Outside)
	w.note(window)
	fx := w.fold[window].Apply(en)
	if fx.Invalid != "" {
		w.fail("an honest message is invalid: %s: %+v", fx.Invalid, *en.Ask)
	}
	if fx.Unknown && en.Ask.Used+en.Ask.Over > 0 && w.broken == "" {
		w.fail("an honest message is unknown: %+v", *en.Ask)
	}
	w.checkFold(window, before, en)
	for _, o := range w.owners {
		w.after(w.upTo(2*ms), func() { w.read(o) })
	}
}

func (w *world) hear(i int, m *Ask) {
	if w.broken == "answered before it is in the ledger" && w.chance(300) {
		o := w.owners[len(w.owners)-1]
		hasty := w.fold[i].Clone()
		for _, a := range hasty.Apply(Entry{Sequence: uint64(len(w.log) + 1), Time: w.now, Ask: m}).Answers {
			w.say(o, i, a)
		}
		return // and then it is lost
	}
	if w.broken == "who ends has used nothing" {
		// What a release without a word would do in the exact tier.
		e := w.fold[i]
		for k := range e.leases {
			if l := &e.leases[k]; l.lapsed && !l.closed && l.out() > 0 {
				w.append(i, Entry{Ask: &Ask{Gateway: l.gateway, Seq: finalSeq, Used: l.used, Closing: true}})
			}
		}
	}
	w.append(i, Entry{Ask: m})
}

// checkFold holds the state machine to its invariant after every entry.
func (w *world) checkFold(window int, before State, en Entry) {
	e := w.fold[window]
	s := e.State()
	var out, given int64
	for i := range e.leases {
		l := &e.leases[i]
		if l.out() < 0 || l.released < 0 || l.released > 0 && l.released != l.out() {
			w.fail("a lease has %d out, %d released", l.out(), l.released)
		}
		if l.released > 0 {
			given += l.out()
		} else {
			out += l.out()
		}
	}
	if out != s.Outstanding || given != s.Exposure {
		w.fail("outstanding is %d, exposure %d; the leases say %d and %d", s.Outstanding, s.Exposure, out, given)
	}
	if s.Settled+s.Outstanding > s.Amount+s.Excess || s.Excess > s.Counts.Lowered+s.Counts.Above+s.Counts.Late+w.truth[window].added {
		w.fail("settled %d + outstanding %d exceed the allowance of %d by more than was lowered, above or late: %+v", s.Settled, s.Outstanding, s.Amount, s)
	}
	if s.Settled < before.Settled+min(0, en.Outside) {
		w.fail("what was settled is unsettled: %d, was %d", s.Settled, before.Settled)
	}
	t := &w.truth[window]
	committed := s.Settled - s.Counts.Above - s.Counts.Outside + s.Outstanding + s.Exposure
	if en.Amount != nil {
		// Lowered: what is out already may be used.
		t.cap = max(*en.Amount-t.outside, committed-e.terms.MaxExposure)
	}
	t.cap -= min(0, en.Outside)
	if committed > t.cap+e.terms.MaxExposure {
		w.fail("%d units may be used where %d + %d are allowed", committed, t.cap, e.terms.MaxExposure)
	}
	if s.Exposure > e.terms.MaxExposure {
		w.fail("an exposure of %d, at most %d", s.Exposure, e.terms.MaxExposure)
	}
}

// Owners.

func (w *world) newOwner() {
	o := &simOwner{epoch: uint64(len(w.owners) + 1)}
	if s := w.snapshot; s != nil {
		o.position = s.position
		for _, e := range s.escrows {
			o.escrows = append(o.escrows, e.Clone())
		}
	} else {
		for i := range w.allowances() {
			o.escrows = append(o.escrows, NewEscrow(w.first(i), w.terms(i)))
		}
	}
	w.owners = append(w.owners, o)
	if w.broken == "grants die with the owner" && o.epoch > 1 {
		o.escrows, o.position = nil, len(w.log)
		for i := range w.allowances() {
			o.escrows = append(o.escrows, NewEscrow(w.first(i), w.terms(i)))
			w.fold[i] = o.escrows[i].Clone()
		}
	}
	w.replay(o, false)
	for i, e := range o.escrows {
		for _, a := range e.Resume() {
			w.say(o, i, a)
		}
	}
}

func (w *world) replay(o *simOwner, speak bool) {
	for ; o.position < len(w.log); o.position++ {
		en := w.log[o.position]
		fx := o.escrows[en.window].Apply(en.entry)
		if speak {
			for _, a := range fx.Answers {
				w.say(o, en.window, a)
			}
		}
	}
}

func (w *world) read(o *simOwner) {
	if !o.dead && !o.asleep {
		w.replay(o, true)
	}
}

func (w *world) say(o *simOwner, window int, a Answer) {
	a.Epoch = o.epoch
	w.answers++
	w.carry(func() {
		for _, g := range w.gateways {
			if g.id == a.Gateway && g.alive && !g.deaf {
				g.purses[window].Receive(a, w.clock(g))
				w.retry(g)
				w.pump(g)
			}
		}
	})
}

func (w *world) ownerTimers() {
	o := w.owners[len(w.owners)-1]
	if o.dead || o.asleep {
		return
	}
	for i, e := range o.escrows {
		if at, ok := e.Due(); ok && at <= w.now {
			w.append(i, Entry{})
		}
	}
	if w.chance(20) {
		w.snapshot = &simOwner{position: o.position}
		for i, e := range o.escrows {
			read, _, err := Read(e.Append(nil), w.terms(i))
			if err != nil {
				w.fail("a snapshot can't be read: %v", err)
				return
			}
			w.snapshot.escrows = append(w.snapshot.escrows, read)
		}
	}
}

func (w *world) crashOwner() {
	o := w.owners[len(w.owners)-1]
	if o.dead || o.asleep {
		return
	}
	if w.faults.zombies && w.chance(500) {
		o.asleep = true
		w.after(w.upTo(second), func() { o.asleep = false; w.read(o) })
	} else {
		o.dead = true
	}
	w.after(w.upTo(200*ms), func() {
		if !w.stopped || o.dead {
			w.newOwner()
		}
	})
}

func (w *world) changeAmount() {
	i := w.rng.IntN(w.allowances())
	n := w.rng.Int64N(2*w.amount + 1)
	if w.chance(300) {
		n = w.rng.Int64N(w.amount/4 + 1)
		if w.chance(500) {
			n = -min(n, w.fold[i].State().Counts.Outside) // a correction
		}
		w.append(i, Entry{Outside: n})
		return
	}
	if w.chance(300) {
		n = w.amounts[i] + w.rng.Int64N(w.amount+1)
	}
	w.append(i, Entry{Amount: &n})
}

// Gateways.

func (w *world) newGateway() *simGateway {
	w.ids++
	g := &simGateway{alive: true, holds: NewHolds(64), open: map[*Hold]simHold{}, purses: make([]*Purse, w.allowances())}
	g.pending, g.counted = make([]int64, w.allowances()), make([]int64, w.allowances())
	g.noting, g.noted = make([]int64, w.allowances()), make([]int64, w.allowances())
	binary.BigEndian.PutUint64(g.id[:], w.rng.Uint64())
	binary.BigEndian.PutUint64(g.id[8:], w.ids)
	w.gateways = append(w.gateways, g)
	w.skew(g)
	w.tick(g)
	return g
}

func (w *world) skew(g *simGateway) {
	if s := w.faults.skew; s > 0 {
		g.offset = Micros(w.rng.Int64N(int64(2*s+1))) - s
		w.after(w.upTo(second), func() {
			if g.alive && !w.stopped {
				w.skew(g)
			}
		})
	}
}

func (w *world) clock(g *simGateway) Micros { return w.now + g.offset }

func (w *world) tick(g *simGateway) {
	if !g.alive || w.stopped {
		return
	}
	g.holds.Sweep(w.clock(g))
	w.retry(g)
	w.pump(g)
	if w.faults.rests {
		w.rest(g)
	}
	w.after(20*ms, func() { w.tick(g) })
}

// rest drops purses that are not needed, and makes others of what is known of them.
func (w *world) rest(g *simGateway) {
	for i, p := range g.purses {
		if p == nil || w.rng.IntN(3) > 0 {
			continue
		}
		r, ok := p.Rest()
		if !ok {
			continue
		}
		w.rests++
		end := Micros(p.end.Load())
		g.purses[i] = NewPurse(g.id, end, p.habits)
		g.purses[i].Resume(r)
		g.noting[i] = 0
		if w.broken == "a purse that rests forgets its lease" {
			g.purses[i] = NewPurse(g.id, end, p.habits)
			g.purses[i].After(r.Seq)
		}
	}
}

func (w *world) pump(g *simGateway) {
	if g.busy {
		return
	}
	for i, p := range g.purses {
		if p == nil {
			continue
		}
		for n := 0; ; n++ {
			m, ok := p.Next(w.clock(g))
			if !ok {
				break
			}
			if n == 3 {
				w.fail("a purse does not stop talking: %+v", m)
				break
			}
			w.asks++
			if !g.deaf {
				w.carry(func() { w.hear(i, &m) })
			}
		}
		if m, ok := p.Mark(w.clock(g)); ok && m > g.noting[i] {
			w.journal(g, i, m)
		}
	}
}

// journal notes a mark on the gateway's disk, and lets the purse use it after that.
func (w *world) journal(g *simGateway, i int, m int64) {
	w.marks++
	g.noting[i] = m
	if w.broken == "units are used before their mark is noted" {
		g.purses[i].Unlocked(m)
	}
	w.after(w.upTo(w.faults.journal), func() {
		fails := w.faults.crashes > 0 && w.chance(50) && !w.stopped
		if !fails || w.chance(500) { // nobody knows what a failed write has left
			g.noted[i] = max(g.noted[i], m)
		}
		switch {
		case !g.alive:
		case fails:
			g.noting[i] = 0
		default:
			g.purses[i].Unlocked(m)
			w.retry(g)
			w.pump(g)
		}
	})
}

func (w *world) crash(at int) {
	g := w.gateways[at]
	if !g.alive {
		return
	}
	g.alive = false
	complete := w.faults.frames > 0 && w.reserve == 0 && w.chance(w.faults.complete)
	marked := !complete && w.faults.journal > 0 && w.chance(w.faults.marked)
	speaks := !complete && !marked && w.chance(w.faults.spool)
	if complete || speaks {
		w.flush(g)
	} else {
		g.lost = w.chance(500)
	}
	if complete {
		w.end(g, 2*w.faults.delay+w.upTo(second)) // after all that it has said
	}
	if marked {
		w.endAtMarks(g)
	}
	for _, hold := range g.open {
		if speaks {
			for _, i := range hold.allowances {
				w.truth[i].used += hold.bound // what the spool will say
			}
		}
	}
	for i, p := range g.purses {
		if p != nil && speaks {
			m := LastWord(g.id, w.now, p.used.Load()+p.held.Load(), p.over.Load())
			if w.broken == "the spool forgets" {
				m.Used -= min(m.Used, 3)
			}
			w.after(w.upTo(second), func() { w.append(i, Entry{Ask: &m}) })
		}
	}
	g.spoke = speaks || complete
	var next *simGateway
	for _, c := range w.clients {
		if c.gateway != g {
			continue
		}
		c.waits = false
		if next == nil {
			next = w.newGateway()
			if w.broken == "a restarted gateway keeps its name" {
				next.id = g.id
				next.purses = append([]*Purse(nil), g.purses...)
				for i, p := range next.purses {
					if p != nil {
						n := NewPurse(g.id, Micros(p.end.Load()), p.habits)
						n.seq = p.seq
						next.purses[i] = n
					}
				}
			}
		}
		c.gateway = next
		w.after(w.upTo(100*ms), func() { w.call(c) })
	}
}

// Clients.

func (w *world) call(c *simClient) {
	g := c.gateway
	if w.stopped || !g.alive || c.waits {
		return
	}
	c.reserve = w.chance(w.reserve)
	c.amount = 1 + w.rng.Int64N(w.most)
	if c.reserve {
		c.amount = 1 + w.rng.Int64N(w.bound)
	}
	c.window = int(max(0, (w.clock(g)-second)/w.width))
	c.by = w.now + 300*ms
	w.attempt(c)
}

func (w *world) again(c *simClient, d Micros) {
	g := c.gateway
	w.after(w.upTo(d), func() {
		if c.gateway == g {
			w.call(c)
		}
	})
}

func (w *world) attempt(c *simClient) {
	g := c.gateway
	for c.window < w.windows {
		out, at := w.try(c)
		switch out {
		case Over:
			c.window++
			continue
		case Admitted, AdmittedLow:
			w.admittedCalls++
			if out == AdmittedLow {
				w.pump(g)
			}
			w.again(c, 2*w.think)
		case Fetch:
			if w.now < c.by {
				g.purses[at].Need(c.amount, w.clock(g)+c.by-w.now)
				if !c.waits {
					c.waits = true
					g.waiters = append(g.waiters, c)
				}
				w.pump(g)
				return
			}
			w.timeouts++
			w.again(c, 4*w.think)
		case Refused:
			w.refused++
			w.checkRefusal(c, at)
			w.again(c, 8*w.think)
		case RefusedEarly:
			w.refusedEarly++
			w.early[at] = append(w.early[at], c.amount)
			w.again(c, 8*w.think)
		case Full:
			w.again(c, 8*w.think)
		}
		break
	}
	c.waits = false
}

func (w *world) retry(g *simGateway) {
	waiting := g.waiters
	g.waiters = nil
	g.busy = true
	defer func() { g.busy = false }()
	for _, c := range waiting {
		if c.gateway == g && c.waits {
			c.waits = false
			if !w.stopped {
				w.attempt(c)
			}
		}
	}
}

// try takes what the call needs of every level, and returns the allowance that
// decided.
func (w *world) try(c *simClient) (Outcome, int) {
	g := c.gateway
	now := w.clock(g)
	var parts []Part
	var which []int
	for i := c.window; i < w.allowances(); i += w.windows {
		p := g.purses[i]
		if p == nil {
			p = NewPurse(g.id, w.terms(i).End, simHabits(w.plan.faults))
			g.purses[i] = p
		}
		if w.broken == "use goes on after the lease's end" {
			p.until.Store(int64(never))
		}
		parts, which = append(parts, Part{p, c.amount}), append(which, i)
	}
	var h *Hold
	var out Outcome
	var at int
	if c.reserve {
		h, out, at = g.holds.Reserve(parts, now, now+60*ms)
	} else {
		out, at = Take(parts, now)
	}
	if !out.OK() {
		return out, which[at]
	}
	for _, i := range which {
		t := &w.truth[i]
		t.calls++
		t.admitted += c.amount
		if !c.reserve {
			t.used += c.amount
			g.pending[i] += c.amount
		}
		if w.broken == "a unit is used twice" && w.chance(5) {
			t.admitted += c.amount
		}
		w.checkAdmission(i)
	}
	if !c.reserve {
		return out, 0
	}
	hold := simHold{which, c.amount}
	g.open[h] = hold
	g.order = append(g.order, h)
	f := w.faults
	cost := w.rng.Int64N(c.amount + 1)
	takes := w.upTo(50 * ms)
	switch {
	case w.chance(f.above):
		cost = c.amount + 1 + w.rng.Int64N(5)
	case w.chance(f.lateHolds):
		takes += 60 * ms
	case w.chance(f.lostHolds):
		return out, 0 // resolved when the world ends
	case w.chance(f.void):
		cost = -1
	}
	w.after(takes, func() {
		if g.alive {
			w.resolve(g, h, hold, cost)
			w.retry(g)
			w.pump(g)
		}
	})
	return out, 0
}

// resolve settles a hold, twice, and keeps the truth of it.
func (w *world) resolve(g *simGateway, h *Hold, hold simHold, cost int64) {
	if _, ok := g.open[h]; !ok {
		return
	}
	delete(g.open, h)
	var over []int64
	var actual []int64
	for _, i := range hold.allowances {
		over, actual = append(over, g.purses[i].over.Load()), append(actual, max(0, cost))
	}
	var how Resolution
	if cost < 0 {
		cost, how = 0, h.Void(w.clock(g))
	} else {
		how, _ = h.Settle(actual, w.clock(g))
	}
	if again, _ := h.Settle(actual, w.clock(g)); again != Already || how == Already {
		w.fail("a reservation was resolved as %d and then as %d", how, again)
	}
	for _, i := range hold.allowances {
		g.pending[i] += cost
	}
	if how == Forgotten {
		return // it stays held
	}
	for n, i := range hold.allowances {
		t := &w.truth[i]
		t.admitted += cost - hold.bound - (g.purses[i].over.Load() - over[n])
		t.used += cost
		w.checkBound(i)
	}
}

func (w *world) checkBound(window int) {
	t := &w.truth[window]
	allowed := t.cap
	if w.plan.faults.release {
		allowed += w.fold[window].terms.MaxExposure + int64(len(w.gateways))*simHabits(w.faults).ReleaseHolds
	}
	if t.admitted > allowed {
		w.fail("allowance %d: %d units are admitted, %d are allowed", window, t.admitted, allowed)
	}
}

func (w *world) checkAdmission(i int) {
	w.checkBound(i)
	t := w.terms(i)
	if w.plan.faults.skew <= simSkew && (w.now < t.Start || w.now >= t.End) {
		w.fail("a call is admitted in the wrong window: %d, which is [%d, %d) ms", i, t.Start/ms, t.End/ms)
	}
	// What the log says may be used covers what is.
	s := w.fold[i].State()
	if able := s.Settled - s.Counts.Above - s.Counts.Outside + s.Outstanding + s.Exposure; w.truth[i].admitted > able && !w.plan.faults.release {
		w.fail("%d units are admitted, the ledger knows of %d", w.truth[i].admitted, able)
	}
}

// checkRefusal: a refusal for good must be true by the calls that are finished,
// under the allowance of the position that the gateway has heard of.
func (w *world) checkRefusal(c *simClient, i int) {
	amount := int64(0)
	for _, h := range w.history[i] {
		if h.sequence <= c.gateway.purses[i].seen {
			amount = h.amount
		}
	}
	if used := w.truth[i].used; used+c.amount <= amount {
		w.fail("a call of %d is refused for good where %d of %d are used", c.amount, used, amount)
	}
}

// audit is the end: what everybody believes is what is true.
func (w *world) audit() {
	if w.failure != "" {
		return
	}
	last := w.owners[len(w.owners)-1]
	w.replay(last, false)
	for i := range w.allowances() {
		e := w.fold[i]
		e.answers, last.escrows[i].answers = nil, nil
		if !reflect.DeepEqual(e, last.escrows[i]) {
			w.fail("the last owner's state of window %d is not the fold of the log:\n%+v\n%+v", i, *e, *last.escrows[i])
		}
		settled, silent := w.truth[i].outside, int64(0)
		for _, g := range w.gateways {
			p := g.purses[i]
			if p == nil {
				continue
			}
			used := p.used.Load() + p.over.Load()
			if !g.alive {
				used += p.held.Load()
			}
			if w.faults.frames > 0 && p.held.Load() != 0 {
				used = max(used, g.counted[i]) // of calls that were forgotten
			}
			at, known := e.find(g.id)
			if !known {
				if used != 0 {
					w.fail("allowance %d: the ledger does not know a lease of which %d units were used", i, used)
				}
				continue
			}
			l := &e.leases[at]
			settled += l.used + l.over
			switch {
			case l.counted != g.counted[i]:
				w.fail("allowance %d: %d units of a lease are counted, %d were", i, l.counted, g.counted[i])
			case l.used+l.over != max(l.said+l.beyond, g.counted[i]):
				w.fail("allowance %d: of a lease %d + %d units are settled where it said %d + %d and %d were counted", i, l.used, l.over, l.said, l.beyond, g.counted[i])
			case g.alive && !p.Done() && p.held.Load() == 0:
				w.fail("allowance %d: a living gateway could not close its lease: %+v", i, p.sent)
			case g.spoke && (l.used+l.over != used || l.out() != 0):
				w.fail("allowance %d: the ledger knows of %d units used and %d out, the gateway used %d", i, l.used+l.over, l.out(), used)
			case used < l.used+l.over || used > l.used+l.over+l.out()+p.over.Load():
				w.fail("allowance %d: a silent gateway used %d units; the ledger knows of %d and %d out", i, used, l.used, l.out())
			}
			if !g.spoke {
				silent += l.out()
			}
		}
		s := e.State()
		if settled != s.Settled {
			w.fail("allowance %d: %d units are settled, the leases say %d", i, s.Settled, settled)
		}
		if s.Outstanding+s.Exposure != silent {
			w.fail("allowance %d: %d units are out, %d of them with who never spoke", i, s.Outstanding+s.Exposure, silent)
		}
		for _, n := range w.early[i] {
			if s.Settled+n <= s.Amount {
				w.falseEarly++
			}
		}
	}
}

// Clone returns a copy that shares nothing.
func (e *Escrow) Clone() *Escrow {
	c := *e
	c.leases, c.answers = slices.Clone(e.leases), nil
	return &c
}
