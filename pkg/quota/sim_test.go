package quota

import (
	"cmp"
	"container/heap"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var (
	simSeed  = flag.Uint64("quota.seed", 0, "run one simulated world only")
	simSeeds = flag.Int("quota.seeds", 150, "simulated worlds of each kind")
)

const (
	ms      = usage.Micros(1000)
	simSkew = 20 * ms
	simFrom = noon + 50*second // worlds run across a minute's turn
	simTill = noon + 72*second
)

// simPlan of a simulated world: a shard, gateways that hold leases of it, what
// lies between them, and how it fails. Probabilities are per thousand.
type simPlan struct {
	seed              uint64
	gateways, clients int
	amount            int64
	think             usage.Micros
	tier              usage.Tier
	delay, frames     usage.Micros // greatest of a message, of a frame
	loss, duplicate   int
	kills             int // per second
	complete          int // of the kills: every call that was answered is in the spool
	failovers         int // per second
	skew              bool
	changes           int  // raises, corrections and foreign calls per second
	moves             int  // of acme to another plan with the same limits, per second
	bare              bool // or to one without any
	broken            string
}

func (p *simPlan) exposure() int64 {
	if p.tier == usage.TierLeased {
		return 15
	}
	return 0
}

// simParts are the limits that a call of acme meets.
var simParts = []struct {
	account, plan, limit string
	meter                usage.Meter
	times                int64 // of the world's amount
}{
	{"acme", "", "calls", usage.Calls, 1}, // of the plan that acme has
	{"acme", "", "tokens", usage.InputTokens, 2},
	{"org", "org", "calls", usage.Calls, 2},
}

// simTeams are the plans that acme may have.
var simTeams = [...]string{"team", "team-b", "team-c", bareTeam}

// bareTeam has no limits.
const bareTeam = "team-bare"

func limitOf(part int, team string) string {
	return cmp.Or(simParts[part].plan, team) + "/" + simParts[part].limit
}

func (p *simPlan) plans(amount int64) *PlanSet {
	limit := func(id string, m usage.Meter, amount int64) usage.Limit {
		l := usage.Limit{ID: id, Meter: m, Window: usage.Minute, Amount: amount, Tier: p.tier, WarnPercent: 80, Lease: usage.LeaseTerms{Term: 400 * ms, Patience: 120 * ms}}
		if p.tier == usage.TierLeased {
			l.Lease.ReleaseAfter, l.Lease.MaxExposure = 100*ms, p.exposure()
		}
		return l
	}
	set := &PlanSet{Version: fmt.Sprint(amount), Plans: []usage.Plan{{ID: "org", Limits: []usage.Limit{limit("calls", usage.Calls, 2*amount)}}}}
	for i, id := range simTeams {
		if id == bareTeam {
			set.Plans = append(set.Plans, usage.Plan{ID: id})
			continue
		}
		limits := []usage.Limit{limit("calls", usage.Calls, amount), limit("tokens", usage.InputTokens, 2*amount)}
		if i == 2 {
			slices.Reverse(limits)
		}
		set.Plans = append(set.Plans, usage.Plan{ID: id, Limits: limits})
	}
	return set
}

type simEvent struct {
	at    usage.Micros
	order uint64
	do    func()
}

type simEvents []simEvent

func (e simEvents) Len() int { return len(e) }
func (e simEvents) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(e[i].at, e[j].at), cmp.Compare(e[i].order, e[j].order)) < 0
}
func (e simEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *simEvents) Push(x any)   { *e = append(*e, x.(simEvent)) }
func (e *simEvents) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

type simIdentity struct {
	part  int
	start usage.Micros
}

type simPurse struct {
	simIdentity
	team string
}

type simGateway struct {
	team    string // acme's plan, as far as it knows
	told    uint64
	seqs    map[simPurse]uint64 // of messages
	id      lease.Gateway
	offset  usage.Micros
	alive   bool
	leaving bool
	purses  map[simPurse]*lease.Purse
	pending []usage.Call
	number  uint64
	landing usage.Micros
	lost    bool // what has not landed never will
	waiters []*simClient
	busy    bool
}

type simClient struct {
	gateway *simGateway
	tokens  int64
	by      usage.Micros
	waits   bool
}

type logged struct {
	Entry
	decisions []usage.Decision
	answers   []LeaseAnswer
}

type simWorld struct {
	simPlan
	rng     *rand.Rand
	now     usage.Micros
	queue   simEvents
	order   uint64
	s       *Shard
	epoch   uint64
	log     []logged
	failure string
	stopped bool

	gateways []*simGateway
	clients  []*simClient
	ids      uint64
	number   uint64

	admitted, limits         map[simIdentity]int64 // units; what may be admitted
	answered, counted        int                   // calls
	team                     string
	moved                    uint64
	outside, kills           int
	denied, early, failovers int
	byWindow                 map[simIdentity]int64 // units that were counted
	openings                 int
}

func newSimWorld(p simPlan) *simWorld {
	w := &simWorld{
		simPlan: p, rng: rand.New(rand.NewPCG(p.seed, 11)), now: simFrom, s: New(Options{Shard: 3}), epoch: 1, team: "team",
		admitted: map[simIdentity]int64{}, limits: map[simIdentity]int64{}, byWindow: map[simIdentity]int64{},
	}
	w.append(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	w.append(Entry{Control: &Control{PlanSet: p.plans(p.amount)}})
	w.append(Entry{Control: &Control{Accounts: []usage.Account{{ID: "acme", Parent: "org", Plan: "team"}, {ID: "org", Plan: "org"}}}})
	for range p.gateways {
		g := w.newGateway()
		for range p.clients {
			c := &simClient{gateway: g}
			w.clients = append(w.clients, c)
			w.after(w.upTo(p.think), func() { w.call(c) })
		}
	}
	w.every(20*ms, func() {
		if at, ok := w.s.NextTimer(); ok && at <= w.now {
			w.append(Entry{Control: &Control{}})
		}
	})
	w.every(30*ms, func() {
		for _, g := range w.gateways {
			if g.alive && w.chance(300) {
				w.flush(g)
			}
		}
	})
	w.sometimes(p.kills, func() { w.kill(w.gateways[w.rng.IntN(len(w.gateways))]) })
	w.sometimes(p.failovers, w.failover)
	w.sometimes(p.changes, w.change)
	w.sometimes(p.moves, w.move)
	return w
}

func (w *simWorld) fail(format string, args ...any) {
	if w.failure == "" {
		w.failure = fmt.Sprintf("seed %d at %d ms: ", w.seed, (w.now-noon)/ms) + fmt.Sprintf(format, args...)
	}
}

func (w *simWorld) chance(perThousand int) bool { return w.rng.IntN(1000) < perThousand }

func (w *simWorld) upTo(d usage.Micros) usage.Micros {
	return 1 + usage.Micros(w.rng.Int64N(int64(d)+1))
}

func (w *simWorld) after(d usage.Micros, do func()) {
	w.order++
	heap.Push(&w.queue, simEvent{w.now + d, w.order, do})
}

func (w *simWorld) every(d usage.Micros, do func()) {
	w.after(d, func() {
		do()
		if w.now < simTill+20*second {
			w.every(d, do)
		}
	})
}

func (w *simWorld) sometimes(perSecond int, do func()) {
	if perSecond > 0 {
		w.every(100*ms, func() {
			if !w.stopped && w.chance(perSecond/10) {
				do()
			}
		})
	}
}

func (w *simWorld) run() {
	for len(w.queue) > 0 && w.failure == "" {
		e := heap.Pop(&w.queue).(simEvent)
		w.now = e.at
		if !w.stopped && w.now >= simTill {
			w.stopped = true
			w.loss = 0
			for _, g := range w.gateways {
				if g.alive {
					g.leaving = true
					w.leave(g)
				}
			}
		}
		e.do()
	}
	if w.failure == "" {
		w.audit()
	}
}

// carry brings a message, or doesn't, or twice.
func (w *simWorld) carry(do func()) {
	copies := 1
	if w.chance(w.loss) {
		copies = 0
	}
	if w.chance(w.duplicate) {
		copies++
	}
	for range copies {
		w.after(w.upTo(w.delay), do)
	}
}

// The ledger and who owns the shard.

func (w *simWorld) append(e Entry) *Effects {
	e.Sequence, e.Time = uint64(len(w.log)+1), w.now
	fx := w.s.Apply(e)
	if fx.Invalid != nil {
		w.fail("what is honest is invalid: %v", fx.Invalid)
	}
	w.check(fx)
	w.log = append(w.log, logged{e, slices.Clone(fx.Decisions), slices.Clone(fx.Answers)})
	for _, a := range fx.Answers {
		w.say(a)
	}
	return fx
}

// check holds what is decided to what is known.
func (w *simWorld) check(fx *Effects) {
	seen := map[touchName]bool{}
	for i := range fx.Decisions {
		d := &fx.Decisions[i]
		if seen[touchName{d.Account, d.LimitID}] {
			w.fail("two decisions of one entry: %+v", fx.Decisions)
		}
		seen[touchName{d.Account, d.LimitID}] = true
		lifted := d.Account == "acme" && !strings.HasPrefix(d.LimitID, w.team+"/")
		if spent := d.Used >= d.Amount && !lifted; (d.Verdict == usage.Deny && d.Room == 0) != spent {
			w.fail("%s, room %d, where %d of %d are used", d.Verdict, d.Room, d.Used, d.Amount)
		}
		if d.Verdict == usage.Deny {
			w.denied++
		}
	}
	for i := range fx.Answers {
		a := &fx.Answers[i]
		if a.Verdict != lease.DeniedEarly && a.Verdict != lease.DeniedFinal {
			continue
		}
		if a.Decision == nil || a.Decision.Verdict != usage.Deny || a.Decision.LimitID != a.LimitID || a.Decision.Account != a.Account {
			w.fail("a denial without its decision: %+v", a)
		}
		if a.Verdict == lease.DeniedEarly {
			w.early++
		}
	}
	for key, x := range w.s.allowances {
		st := x.escrow.State()
		if c := &w.s.counters[w.s.accounts[key.account].first+key.limit]; key.window == c.number && st.Settled < c.cur {
			w.fail("limit %d of account %d: %d units are settled, %d are counted", key.limit, key.account, st.Settled, c.cur)
		}
		if st.Exposure > w.exposure() {
			w.fail("an exposure of %d", st.Exposure)
		}
	}
}

func (w *simWorld) say(a LeaseAnswer) {
	a.Epoch = w.epoch
	w.carry(func() {
		for _, g := range w.gateways {
			if g.id != a.Gateway || !g.alive {
				continue
			}
			for _, team := range simTeams {
				for part := range simParts {
					if simParts[part].account != a.Account || limitOf(part, team) != a.LimitID {
						continue
					}
					if p := g.purses[simPurse{simIdentity{part, a.WindowStart}, team}]; p != nil {
						p.Receive(a.Answer, lease.Micros(w.clock(g)))
						w.retry(g)
						w.pump(g)
					}
				}
			}
		}
	})
}

// failover gives the shard to another owner, from a snapshot.
func (w *simWorld) failover() {
	w.failovers++
	read, err := Read(w.s.AppendBinary(nil))
	if err != nil {
		w.fail("the snapshot can't be read: %v", err)
		return
	}
	w.s = read
	w.epoch++
	for _, a := range w.s.Resume() {
		w.say(a)
	}
}

// change raises the amounts, corrects, or lets a call come from elsewhere.
func (w *simWorld) change() {
	start := w.now - w.now%(60*second)
	w.number++
	switch w.rng.IntN(3) {
	case 0:
		w.amount += w.rng.Int64N(20)
		w.append(Entry{Control: &Control{PlanSet: w.plans(w.amount)}})
	case 1:
		n := 1 + w.rng.Int64N(10)
		w.append(Entry{}) // so that what is used is of this window
		u, _ := w.s.Account("acme")
		for _, l := range u.Limits {
			if l.Meter == usage.Calls {
				n = min(n, l.Used)
			}
		}
		if n == 0 || w.team == bareTeam {
			return
		}
		fx := w.append(Entry{Control: &Control{ID: fmt.Sprint("c", w.number), Correction: &Correction{Account: "acme", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: -n}}}}})
		if !fx.Corrected {
			w.fail("a correction was not folded: %+v", fx)
		}
		for part, p := range simParts {
			if p.meter == usage.Calls {
				w.limits[simIdentity{part, start}] += n
				w.byWindow[simIdentity{part, start}] -= n
			}
		}
	case 2:
		c := usage.Call{Account: "acme", Time: w.now, Source: "elsewhere", EventID: fmt.Sprint(w.number)}
		for range 1 + w.rng.IntN(2) {
			if fx := w.append(Entry{Batch: batchOf(0, 0, []usage.Call{c})}); fx.Admitted == 1 {
				w.outside++
				w.note(&c)
			}
		}
	}
}

// move gives acme another plan with the same limits; gateways hear of it in a while.
func (w *simWorld) move() {
	team := simTeams[w.rng.IntN(len(simTeams)-1)]
	if w.bare && w.chance(400) {
		team = bareTeam
	}
	if team == w.team {
		return
	}
	w.team = team
	w.moved++
	n := w.moved
	w.append(Entry{Control: &Control{Accounts: []usage.Account{{ID: "acme", Parent: "org", Plan: team}}}})
	open := w.s.Openings()
	// What was open before is on its way.
	open = slices.DeleteFunc(open, func(o Opening) bool { return o.Since != w.s.Sequence() })
	if len(open) > 0 {
		// The owner reads the ledger for what was counted before, which takes a while.
		w.openings += len(open)
		for i := range open {
			for part, p := range simParts {
				if p.plan == "" && p.meter == open[i].Meter {
					open[i].Used = max(0, w.byWindow[simIdentity{part, open[i].WindowStart}])
				}
			}
		}
		w.after(w.upTo(20*w.delay), func() { w.append(Entry{Control: &Control{Openings: open}}) })
	}
	for _, g := range w.gateways {
		w.after(w.upTo(10*w.delay), func() {
			if !g.alive || g.told > n {
				return
			}
			g.told, g.team = n, team
			for at, p := range g.purses {
				if at.team != team && simParts[at.part].plan == "" {
					p.Close()
				}
			}
			w.pump(g)
		})
	}
}

// note keeps what a counted call used.
func (w *simWorld) note(c *usage.Call) {
	for part, p := range simParts {
		if v, ok := c.Usage(p.meter); ok {
			w.byWindow[simIdentity{part, c.Time - c.Time%(60*second)}] += v
		}
	}
}

// Gateways.

func (w *simWorld) newGateway() *simGateway {
	w.ids++
	g := &simGateway{alive: true, team: w.team, told: w.moved, purses: map[simPurse]*lease.Purse{}, seqs: map[simPurse]uint64{}}
	binary.BigEndian.PutUint64(g.id[:], w.rng.Uint64())
	binary.BigEndian.PutUint64(g.id[8:], w.ids)
	if w.skew {
		g.offset = w.upTo(2*simSkew) - 1 - simSkew
	}
	w.gateways = append(w.gateways, g)
	var tick func()
	tick = func() {
		if g.alive && !w.stopped {
			w.retry(g)
			w.pump(g)
			w.after(20*ms, tick)
		}
	}
	tick()
	return g
}

func (w *simWorld) clock(g *simGateway) usage.Micros { return w.now + g.offset }

// purse returns the one of a part and the window of a time.
func (w *simWorld) purse(g *simGateway, part int, start usage.Micros) *lease.Purse {
	id := simPurse{simIdentity{part, start}, g.team}
	if simParts[part].plan != "" {
		id.team = simTeams[0]
	}
	p := g.purses[id]
	if p == nil || p.Done() && id.team == g.team && w.moves > 0 && !g.leaving {
		p = lease.NewPurse(g.id, lease.Micros(start+60*second), lease.Habits{
			Skew: lease.Micros(simSkew), Term: lease.Micros(400 * ms), ReportEvery: lease.Micros(100 * ms), RetryAfter: lease.Micros(40 * ms),
			Recheck: lease.Micros(150 * ms), FirstWant: 8, MaxWant: 1 << 40,
		})
		p.After(g.seqs[id])
		g.purses[id] = p
	}
	return p
}

// pump says all that is to be said, some of it in one entry.
func (w *simWorld) pump(g *simGateway) {
	if g.busy {
		return
	}
	var asks []LeaseAsk
	for _, start := range [...]usage.Micros{noon, noon + 60*second} {
		for part := range simParts {
			for _, team := range simTeams {
				id := simPurse{simIdentity{part, start}, team}
				p := g.purses[id]
				if p == nil {
					continue
				}
				for range 4 {
					m, ok := p.Next(lease.Micros(w.clock(g)))
					if !ok {
						break
					}
					g.seqs[id] = max(g.seqs[id], m.Seq)
					asks = append(asks, LeaseAsk{simParts[part].account, limitOf(part, team), start, m})
				}
			}
		}
	}
	for len(asks) > 0 {
		n := 1 + w.rng.IntN(len(asks))
		e := Entry{Asks: asks[:n]}
		asks = asks[n:]
		w.carry(func() { w.append(e) })
	}
}

// flush seals a frame; frames land in their order, some of them twice.
func (w *simWorld) flush(g *simGateway) {
	if len(g.pending) == 0 {
		return
	}
	calls := g.pending
	g.pending = nil
	g.number++
	b := batchOf(0, g.number, calls)
	b.Producer = dedup.Producer(g.id)
	b.Flags.Values = make([]int64, len(calls))
	for i := range calls {
		b.Flags.Values[i] = int64(usage.FromLease)
	}
	land := func() {
		if g.lost {
			return
		}
		if fx := w.append(Entry{Batch: b}); fx.Frame == dedup.Fresh {
			w.counted += len(calls)
			for i := range calls {
				w.note(&calls[i])
			}
		} else if fx.Frame != dedup.Duplicate {
			w.fail("a frame is missing before this: %+v", fx)
		}
	}
	g.landing = max(g.landing, w.now+w.upTo(w.frames))
	w.after(g.landing-w.now, land)
	if w.chance(w.duplicate) {
		w.after(g.landing-w.now+w.upTo(second), land)
	}
}

// end has the log say that all of the gateway's calls are in it.
func (w *simWorld) end(g *simGateway, after usage.Micros) {
	at := max(g.landing, w.now+after)
	if w.broken == "an end before all is counted" {
		at = w.now
	}
	w.after(at-w.now+1, func() {
		p := dedup.Producer(g.id)
		w.append(Entry{Control: &Control{ID: fmt.Sprintf("end %x", g.id), Closed: &p, ClosedAt: w.s.dedup.Last(p), Complete: true}})
	})
}

func (w *simWorld) kill(g *simGateway) {
	if !g.alive {
		return
	}
	w.kills++
	g.alive = false
	if w.chance(w.complete) {
		w.flush(g)
		w.end(g, 2*w.delay+w.upTo(second))
	} else {
		w.answered -= len(g.pending)
		g.lost = w.chance(500)
	}
	var next *simGateway
	for _, c := range w.clients {
		if c.gateway == g {
			if next == nil {
				next = w.newGateway()
			}
			c.gateway, c.waits = next, false
			w.after(w.upTo(100*ms), func() { w.call(c) })
		}
	}
}

func (w *simWorld) leave(g *simGateway) {
	done := true
	for _, p := range g.purses {
		p.Close()
		done = done && p.Done()
	}
	w.pump(g)
	w.flush(g)
	if !done && w.now < simTill+15*second {
		w.after(20*ms, func() { w.leave(g) })
		return
	}
	if !done {
		w.fail("a gateway could not leave")
	}
	w.end(g, 0)
}

// Clients.

func (w *simWorld) call(c *simClient) {
	if w.stopped || c.waits || !c.gateway.alive {
		return
	}
	c.tokens, c.by = 1+w.rng.Int64N(3), w.now+300*ms
	w.attempt(c)
}

func (w *simWorld) again(c *simClient, d usage.Micros) {
	g := c.gateway
	w.after(w.upTo(d), func() {
		if c.gateway == g {
			w.call(c)
		}
	})
}

func (w *simWorld) attempt(c *simClient) {
	g := c.gateway
	now := w.clock(g)
	for start := now - now%(60*second); start <= noon+60*second; start += 60 * second {
		var parts []lease.Part
		var of []int
		for part, p := range simParts {
			if p.plan == "" && g.team == bareTeam {
				continue
			}
			n := int64(1)
			if p.meter != usage.Calls {
				n = c.tokens
			}
			parts, of = append(parts, lease.Part{Purse: w.purse(g, part, start), Amount: n}), append(of, part)
		}
		out, at := lease.Take(parts, lease.Micros(now))
		switch out {
		case lease.Over:
			continue
		case lease.Admitted, lease.AdmittedLow:
			w.answered++
			// The lease says which window it is, whatever the clock.
			event := usage.Call{Account: "acme", Time: max(now, start)}
			event.Quantities.Set(usage.InputTokens, c.tokens)
			g.pending = append(g.pending, event)
			for i := range parts {
				w.admit(simIdentity{of[i], start}, parts[i].Amount)
			}
			if out == lease.AdmittedLow {
				w.pump(g)
			}
			w.again(c, 2*w.think)
		case lease.Fetch:
			if w.now < c.by {
				parts[at].Purse.Need(parts[at].Amount, lease.Micros(now+c.by-w.now))
				c.waits = true
				g.waiters = append(g.waiters, c)
				w.pump(g)
				return
			}
			w.again(c, 4*w.think)
		default:
			w.again(c, 8*w.think)
		}
		return
	}
}

func (w *simWorld) retry(g *simGateway) {
	waiting := g.waiters
	g.waiters = nil
	g.busy = true
	for _, c := range waiting {
		if c.gateway == g && c.waits {
			c.waits = false
			if !w.stopped {
				w.attempt(c)
			}
		}
	}
	g.busy = false
}

// admit holds every admission to the bound.
func (w *simWorld) admit(id simIdentity, n int64) {
	w.admitted[id] += n
	if most := simParts[id.part].times*w.amount + w.limits[id] + w.exposure(); w.admitted[id] > most {
		w.fail("%s: %d units are admitted where %d are allowed", limitOf(id.part, w.team), w.admitted[id], most)
	}
	if w.now+2*simSkew < id.start || w.now > id.start+60*second {
		w.fail("a call is admitted in the wrong window")
	}
}

// audit is the end: all that was answered is counted once, nothing is out that
// could come back, and whoever reads the log again comes to the same.
func (w *simWorld) audit() {
	if w.kills == 0 && w.counted != w.answered {
		w.fail("%d calls were answered, %d are counted", w.answered, w.counted)
	}
	acme, _ := w.s.Account("acme")
	org, _ := w.s.Account("org")
	if got := acme.Own.Admitted; got != int64(w.counted+w.outside) || org.All.Admitted != got || w.s.Total().Admitted != got {
		w.fail("%d calls are in the sums of acme, %d of org, %d were counted", got, org.All.Admitted, w.counted+w.outside)
	}
	for part, p := range simParts {
		if p.plan == "" && w.team == bareTeam {
			continue
		}
		u := org.Limits[0]
		for _, l := range acme.Limits {
			if l.LimitID == limitOf(part, w.team) {
				u = l
			}
		}
		for i, got := range [...]int64{u.Used, u.Previous} {
			id := simIdentity{part, u.PeriodStart - usage.Micros(i)*60*second}
			if w.bare && i > 0 {
				break // a limit that was away when its window ended says nothing of that one
			}
			if got != w.byWindow[id] {
				w.fail("%s: %d units are in the counter, %d were counted (window %d)", u.LimitID, got, w.byWindow[id], i)
			}
			if w.kills+w.outside == 0 && w.changes == 0 && !w.bare && got != w.admitted[id] {
				w.fail("%s: %d units are counted, %d were admitted (window %d)", u.LimitID, got, w.admitted[id], i)
			}
		}
		if u.Lease == nil {
			continue
		}
		forgotten := int64(0) // of too many changes of plan at a time
		for key, x := range w.s.allowances {
			if w.s.name(key.account) == p.account && w.s.limitAt(x).fullID == u.LimitID && x.end == u.PeriodEnd {
				forgotten = x.forgotten
			}
		}
		if w.kills == 0 && (u.Lease.Outstanding+u.Lease.Reserved != forgotten || u.Lease.Settled != max(0, u.Used)) {
			w.fail("%s: %d units are out, %d reserved and %d settled where all have left and used %d", u.LimitID, u.Lease.Outstanding, u.Lease.Reserved, u.Lease.Settled, u.Used)
		}
		// What is not out can be had to the last unit.
		if rest := u.Amount - u.Lease.Settled - u.Lease.Outstanding - u.Lease.Reserved; rest > 0 {
			ask := lease.Ask{Gateway: lease.Gateway{255, byte(part)}, Seq: 1, Sent: lease.Micros(w.now), Need: rest}
			fx := w.append(Entry{Asks: []LeaseAsk{{p.account, u.LimitID, u.PeriodStart, ask}}})
			if !slices.ContainsFunc(fx.Answers, func(a LeaseAnswer) bool { return a.Gateway == ask.Gateway && a.Granted == rest }) {
				w.fail("%s: %d units are left and can't be had: %+v", u.LimitID, rest, fx.Answers)
			}
		}
	}
	again := New(Options{Shard: 3})
	for i := range w.log {
		l := &w.log[i]
		fx := again.Apply(l.Entry)
		if len(l.decisions)+len(fx.Decisions) > 0 && !reflect.DeepEqual(l.decisions, fx.Decisions) {
			w.fail("entry %d read again gives other decisions:\n%s", l.Sequence, gocmp.Diff(l.decisions, fx.Decisions))
			return
		}
		if len(l.answers)+len(fx.Answers) > 0 && !reflect.DeepEqual(l.answers, fx.Answers) {
			w.fail("entry %d read again gives other answers:\n%s", l.Sequence, gocmp.Diff(l.answers, fx.Answers))
			return
		}
	}
	if again.Hash() != w.s.Hash() {
		w.fail("the same log gives another state")
	}
}

func randomSim(seed uint64) simPlan {
	r := rand.New(rand.NewPCG(seed, 5))
	on := func(n int) int {
		if r.IntN(2) == 0 {
			return 0
		}
		return 1 + r.IntN(n)
	}
	return simPlan{
		seed: seed, gateways: 1 + r.IntN(4), clients: 1 + r.IntN(4), amount: 1 + r.Int64N(150), think: usage.Micros(20+r.IntN(200)) * ms, tier: usage.TierExact,
		delay: usage.Micros(1+r.IntN(30)) * ms, frames: usage.Micros(1+r.IntN(int(1+r.Int64N(3000)))) * ms, loss: on(200), duplicate: on(300),
		kills: on(1000), complete: r.IntN(1001), failovers: on(1000), skew: r.IntN(2) == 0, changes: on(2000),
	}
}

func simWorlds(t *testing.T, name string, make func(uint64) simPlan) {
	t.Helper()
	first, n := uint64(1), uint64(*simSeeds)
	if *simSeed != 0 {
		first, n = *simSeed, 1
	}
	if raceDetector {
		n = min(n, 10) // there is one goroutine in a world
	}
	var sum simWorld
	entries := 0
	for seed := first; seed < first+n; seed++ {
		w := newSimWorld(make(seed))
		w.run()
		if w.failure != "" {
			t.Fatalf("%s; run it alone with -args -quota.seed=%d\n%+v", w.failure, seed, w.simPlan)
		}
		entries += len(w.log)
		sum.answered += w.answered
		sum.kills += w.kills
		sum.failovers += w.failovers
		sum.denied += w.denied
		sum.early += w.early
	}
	t.Logf("%s: %d worlds from seed %d: %d entries, %d calls answered, %d kills, %d failovers, %d denials decided, %d asks denied early",
		name, n, first, entries, sum.answered, sum.kills, sum.failovers, sum.denied, sum.early)
}

func TestNoMoreIsAdmittedThanTheAmountWhateverDies(t *testing.T) {
	t.Parallel()
	simWorlds(t, "exact", randomSim)
}

func TestTheLeasedTierAdmitsItsExposureMoreAtMost(t *testing.T) {
	t.Parallel()
	simWorlds(t, "leased", func(seed uint64) simPlan {
		p := randomSim(seed)
		p.tier = usage.TierLeased
		return p
	})
}

func TestNoMoreIsAdmittedWhereAnAccountChangesPlans(t *testing.T) {
	t.Parallel()
	moving := func(tier usage.Tier) func(seed uint64) simPlan {
		return func(seed uint64) simPlan {
			p := randomSim(seed)
			p.tier, p.moves = tier, 200+int(seed*97%3000)
			return p
		}
	}
	simWorlds(t, "exact, moving", moving(usage.TierExact))
	simWorlds(t, "leased, moving", moving(usage.TierLeased))
}

// To and fro between plans with a limit and one without: what gateways were admitted
// under the limit in a window is never more than its amount, however often it was away,
// and its counter has every call of the window.
func TestNoMoreIsAdmittedWhereALimitGoesAwayAndComesBack(t *testing.T) {
	t.Parallel()
	simWorlds(t, "exact, to and fro", func(seed uint64) simPlan {
		p := randomSim(seed)
		p.moves, p.bare = 500+int(seed*97%4000), true
		return p
	})
}

// A simulation that can't fail proves nothing.
func TestTheSimulationFindsAnEndThatComesTooEarly(t *testing.T) {
	t.Parallel()
	for seed := uint64(1); seed <= 300; seed++ {
		p := randomSim(seed)
		p.broken, p.kills, p.complete = "an end before all is counted", 3000, 1000
		p.gateways, p.clients, p.think, p.amount, p.frames, p.loss = 3, 3, 20*ms, 60, 2*second, 0
		w := newSimWorld(p)
		w.run()
		if w.failure != "" {
			t.Log(w.failure)
			return
		}
	}
	t.Error("300 worlds did not show it")
}
