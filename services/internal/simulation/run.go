package simulation

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

const (
	shards = 2
	// begin is a quarter of a minute before a turn of all short windows.
	begin   = usage.Micros(1_772_366_385_000_000)
	maxSkew = usage.Micros(200_000)
	// leaseTerm is short, so that leases lapse within a run.
	leaseTerm    = usage.Micros(2_000_000)
	releaseAfter = usage.Micros(1_500_000)
	maxExposure  = int64(10)
)

// account is one that calls.
type account struct {
	id, parent, plan string
	shard            uint32
	path             []*pathLimit
	reserve          int64 // upper bound of a call's cost; 0: calls only
	share            float64
}

// pathLimit is a limit on an account's path.
type pathLimit struct {
	account, fullID string
	shard           uint32
	limit           usage.Limit
}

func plans(scale int64) []usage.Plan {
	terms := usage.LeaseTerms{Term: leaseTerm}
	leased := usage.LeaseTerms{Term: leaseTerm, ReleaseAfter: releaseAfter, MaxExposure: maxExposure}
	return []usage.Plan{
		{ID: "eventual", Limits: []usage.Limit{{ID: "calls", Meter: usage.Calls, Window: usage.Minute, Amount: 60 * scale, Tier: usage.TierEventual, WarnPercent: 80}}},
		{ID: "exact", Limits: []usage.Limit{{ID: "calls", Meter: usage.Calls, Window: usage.Minute, Amount: 40 * scale, Tier: usage.TierExact, WarnPercent: 50, Lease: terms}}},
		{ID: "tokens", Limits: []usage.Limit{{ID: "out", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: 3000 * scale, Tier: usage.TierExact, Lease: terms}}},
		{ID: "leased", Limits: []usage.Limit{{ID: "calls", Meter: usage.Calls, Window: usage.Hour, Amount: 50 * scale, Tier: usage.TierLeased, Lease: leased}}},
		{ID: "team", Limits: []usage.Limit{{ID: "calls", Meter: usage.Calls, Window: usage.Minute, Amount: 50 * scale, Tier: usage.TierExact, Lease: terms}}},
	}
}

// Draw returns the world of a seed. There are eight kinds, so that one thing that
// goes wrong is not always in the company of all others.
func Draw(seed uint64) Options {
	o := Options{Seed: seed, Trouble: 25 * time.Second}
	switch seed % 8 {
	case 0: // nothing goes wrong
	case 1:
		o.Kills = 0.8
	case 2:
		o.Stops, o.Takeovers = 0.6, 0.3
	case 3:
		o.Cuts = 0.6
	case 4:
		o.Loss = 0.08
	case 5:
		o.Takeovers = 1
	case 6:
		o.Ends, o.Takeovers = 0.4, 0.2
	default:
		o.Ends, o.Kills, o.Stops, o.Cuts, o.Takeovers, o.Loss = 0.1, 0.4, 0.3, 0.3, 0.2, 0.03
	}
	return o
}

// Run runs a world and returns an error when a law is broken:
//
//   - every call that was answered, or sent by a gateway that spools before it
//     answers, is in the ledger, in the counters and in ClickHouse once
//   - what is published are exactly the decisions of a pure fold of the ledger,
//     each account's and limit's in their order
//   - whoever has folded the ledger has the same state, bit for bit
//   - of no exact allowance more was admitted than there is, of a leased one at
//     most its exposure more, whether or not the calls were answered or recorded
func Run(o Options) (Report, error) {
	w := &world{o: o, r: rand.New(rand.NewPCG(o.Seed, 0x70110)), now: begin, byID: make(map[string]*call)}
	w.report.Seed = o.Seed
	w.build()
	trouble := usage.Micros(o.Trouble.Microseconds())
	w.clients(trouble)
	w.faults(trouble)
	w.run(begin + trouble)
	w.mend()
	w.settle()
	if len(w.broken) == 0 {
		w.check()
	}
	return w.report, w.err()
}

func (w *world) build() {
	w.nats = &natsServer{w: w, proc: &proc{w: w, name: "nats", up: true, start: func() {}}, objects: make(map[string][]byte)}
	w.nats.ledger.last, w.nats.decisions.last = make(map[string]uint64), make(map[string]uint64)
	w.clickhouse = &clickhouse{w: w, proc: &proc{w: w, name: "clickhouse", up: true, start: func() {}}}
	w.historian = w.newHistorian()
	w.procs = append(w.procs, w.nats.proc, w.clickhouse.proc, w.historian.proc)
	for i := range 2 {
		m := w.newMember(fmt.Sprintf("aggregator-%d", i))
		w.members, w.procs = append(w.members, m), append(w.procs, m.proc)
	}
	careful := w.chance(0.7)
	for i := range 3 {
		g := w.newGateway(fmt.Sprintf("gateway-%d", i), careful)
		w.gateways, w.procs = append(w.gateways, g), append(w.procs, g.proc)
	}
	w.accounts = []*account{
		{id: "ev", plan: "eventual", share: 3},
		{id: "ex", plan: "exact", share: 4},
		{id: "tok", plan: "tokens", reserve: 100, share: 3},
		{id: "lsd", plan: "leased", share: 3},
		{id: "org", plan: "team", share: 0},
		{id: "org/a", parent: "org", plan: "exact", share: 3},
		{id: "org/b", parent: "org", share: 2},
	}
	for s := range uint32(shards) {
		w.control(s, &tollkeeperv1.ControlEntry{Id: w.ksuid().String(), Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{
			Version: quota.CoreVersion, ForeignHorizonMicros: int64(dedup.DefaultHorizon),
		}}})
	}
	w.plan(plans(1), "v1")
	for s := range uint32(shards) {
		set := &tollkeeperv1.AccountSet{}
		for _, a := range w.accounts {
			if a.shard == s {
				set.Accounts = append(set.Accounts, &tollkeeperv1.Account{Id: a.id, Parent: a.parent, Plan: a.plan})
			}
		}
		w.control(s, &tollkeeperv1.ControlEntry{Id: w.ksuid().String(), Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: set}})
	}
	w.historian.begin()
	for _, g := range w.gateways {
		g.begin()
	}
	for s := range uint32(shards) {
		w.members[0].take(s)
	}
}

// plan makes a set of plans hold, in the ledger and for the gateways.
func (w *world) plan(set []usage.Plan, version string) {
	w.changed = w.changed || version != "v1"
	entry := &tollkeeperv1.PlanSet{Version: version}
	byID := make(map[string]*usage.Plan)
	for i := range set {
		entry.Plans = append(entry.Plans, ledger.PlanToProto(&set[i]))
		byID[set[i].ID] = &set[i]
	}
	parents := make(map[string]*account)
	for _, a := range w.accounts {
		parents[a.id] = a
	}
	for _, a := range w.accounts {
		root := a
		a.path = nil
		for at := a; at != nil; at = parents[at.parent] {
			root = at
			if p := byID[at.plan]; p != nil {
				for _, l := range p.Limits {
					a.path = append(a.path, &pathLimit{account: at.id, fullID: p.ID + "/" + l.ID, limit: l})
				}
			}
		}
		a.shard = ledger.ShardOf(root.id, shards)
		for _, l := range a.path {
			l.shard = a.shard
		}
	}
	id := w.ksuid().String()
	for s := range uint32(shards) {
		w.control(s, &tollkeeperv1.ControlEntry{Id: id, Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: entry}})
	}
}

func (w *world) control(shard uint32, e *tollkeeperv1.ControlEntry) {
	m, err := ledger.ControlMessage(shard, e)
	if err != nil {
		w.fail("%v", err)
		return
	}
	w.nats.publish(&w.nats.ledger, m)
}

func (w *world) callID() string { return fmt.Sprintf("call-%d", len(w.calls)) }

// clients call until the trouble is over.
func (w *world) clients(trouble usage.Micros) {
	total := 0.0
	for _, a := range w.accounts {
		total += a.share
	}
	var next func()
	next = func() {
		if w.now >= begin+trouble {
			return
		}
		x := w.r.Float64() * total
		for _, a := range w.accounts {
			if x -= a.share; x < 0 {
				g := w.gateways[w.r.IntN(len(w.gateways))]
				if g.proc.up && !g.proc.stopped {
					g.call(a)
				}
				break
			}
		}
		w.after(w.between(1_000, 40_000), next)
	}
	w.after(100_000, next)
	if w.chance(0.5) {
		// The plans are raised once, and half as often lowered again.
		at := w.between(trouble/4, trouble*3/4)
		w.after(at, func() { w.plan(plans(2), "v2") })
		if w.chance(0.5) {
			w.after(at+trouble/8, func() { w.plan(plans(1), "v3") })
		}
	}
	var correct func()
	correct = func() {
		if w.now >= begin+trouble {
			return
		}
		a := w.accounts[w.r.IntN(len(w.accounts))]
		meter, value := usage.Calls, int64(w.r.IntN(9)-4)
		if a.reserve > 0 {
			meter, value = usage.OutputTokens, int64(w.r.IntN(201)-100)
		}
		if value != 0 {
			id := w.ksuid().String()
			w.changed = true
			for range 1 + w.r.IntN(2) { // the same act may enter twice
				w.control(a.shard, &tollkeeperv1.ControlEntry{Id: id, Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{
					Account: a.id, Reason: "simulated", Adjustments: []*tollkeeperv1.Quantity{{Meter: string(meter), Value: value}},
				}}})
			}
		}
		w.after(w.between(1_000_000, 6_000_000), correct)
	}
	if w.chance(0.4) {
		w.after(2_000_000, correct)
	}
}

// faults go on until the trouble is over.
func (w *world) faults(trouble usage.Micros) {
	every := func(perSecond float64, do func()) {
		if perSecond <= 0 {
			return
		}
		var next func()
		next = func() {
			if w.now >= begin+trouble {
				return
			}
			do()
			w.after(usage.Micros(w.r.ExpFloat64()/perSecond*1e6), next)
		}
		w.after(usage.Micros(w.r.ExpFloat64()/perSecond*1e6), next)
	}
	every(w.o.Kills, func() {
		victims := []*proc{w.procs[w.r.IntN(len(w.procs))]}
		if w.chance(0.05) {
			victims = w.procs
		}
		for _, p := range victims {
			p.kill()
			w.after(w.between(50_000, 1_500_000), p.rise)
		}
	})
	every(w.o.Ends, func() { w.gateways[w.r.IntN(len(w.gateways))].end() })
	every(w.o.Stops, func() {
		p := w.procs[w.r.IntN(len(w.procs))]
		p.stop()
		w.after(w.between(20_000, 3_000_000), p.wake)
	})
	every(w.o.Cuts, func() {
		p := w.procs[w.r.IntN(len(w.procs))]
		if !p.cut {
			p.cut = true
			w.report.Cuts++
			w.trace("%s is cut off", p.name)
			w.after(w.between(50_000, 3_000_000), func() { p.cut = false })
		}
	})
	every(w.o.Takeovers, func() { w.members[w.r.IntN(len(w.members))].take(uint32(w.r.IntN(shards))) })
	w.guard()
}

// guard lets somebody take a shard that nobody owns.
func (w *world) guard() {
	for s := range uint32(shards) {
		owned := false
		for _, m := range w.members {
			owned = owned || m.proc.up && !m.proc.stopped && !m.proc.cut && (m.owners[s] != nil || m.taking[s])
		}
		if !owned {
			w.members[w.r.IntN(len(w.members))].take(s)
		}
		if w.chance(0.3) {
			w.members[w.r.IntN(len(w.members))].standBy(s)
		}
	}
	w.after(400_000, w.guard)
}

// mend makes everything work from now on.
func (w *world) mend() {
	w.trace("everything works from now on")
	w.calm = true
	for _, p := range w.procs {
		p.wake()
		p.rise()
		p.cut = false
	}
}

// settle lets everything come to rest.
func (w *world) settle() {
	for range 120 {
		w.run(w.now + 1_000_000)
		if len(w.broken) > 0 || w.atRest() {
			return
		}
	}
	w.fail("it does not come to rest: %s", w.unrest())
}

func (w *world) atRest() bool { return w.unrest() == "" }

func (w *world) unrest() string {
	for _, g := range w.gateways {
		for _, l := range g.old {
			if !l.Empty() {
				return g.proc.name + " has not sent what a run before it left"
			}
		}
		for s, l := range g.lanes {
			if !l.Empty() || g.careful && g.told[s] < len(g.added[s]) {
				return g.proc.name + " has not sent everything"
			}
		}
		if len(g.waiting) > 0 {
			return fmt.Sprintf("%d calls wait at %s", len(g.waiting), g.proc.name)
		}
	}
	for s := range uint32(shards) {
		owners := 0
		for _, m := range w.members {
			o := m.owners[s]
			if o == nil {
				continue
			}
			if w.nats.position(s).Found.Owner != o.pub.Last().Owner {
				continue // does not know yet that it was replaced
			}
			owners++
			if o.reader.next <= w.nats.ledger.end() || o.pub.Queued() > 0 || o.pub.Flight() != nil {
				return fmt.Sprintf("shard %d is not counted and published", s)
			}
			if due, ok := o.state.NextTimer(); ok && due <= w.now {
				return fmt.Sprintf("a timer of shard %d is due", s)
			}
		}
		if owners != 1 {
			return fmt.Sprintf("shard %d has %d owners", s, owners)
		}
	}
	if last := w.nats.ledger.end(); w.historian.committed < last {
		return fmt.Sprintf("the history stands at %d of %d", w.historian.committed, last)
	}
	return ""
}

func (w *world) check() {
	v := w.foldAll()
	if len(w.broken) > 0 {
		return
	}
	w.report.Entries, w.report.Decisions, w.report.Grants, w.report.Denials, w.report.DuplicateFrames = len(w.nats.ledger.messages), len(v.decisions), v.grants, v.denials, v.twice
	w.checkCalls(v)
	w.checkStates(v)
	w.checkDecisions(v)
	w.checkAllowances()
}

// checkCalls compares what clients were answered with the ledger, the counters
// and ClickHouse.
func (w *world) checkCalls(v *verdict) {
	sent := make(map[string]bool)
	numbers := make(map[string]bool)
	var f ledger.Frame
	for i := range w.nats.ledger.messages {
		m := &w.nats.ledger.messages[i]
		if kind, _, _ := ledger.ParseSubject(m.Subject); kind != ledger.KindCalls {
			continue
		}
		if err := ledger.DecodeCalls(&f, m.Subject, m.Header, m.Data); err != nil {
			w.fail("%v", err)
			return
		}
		frame := fmt.Sprint(f.Producer, f.Shard, f.Number)
		for k := range f.N {
			id := string(f.RequestID.At(k))
			if sent[id] && !numbers[frame] {
				w.fail("call %s stands in the ledger in two frames", id)
			}
			sent[id] = true
		}
		numbers[frame] = true
	}
	admitted, refused := make(map[string]int64), make(map[string]int64)
	for _, c := range w.calls {
		if c.admitted && c.answered && !sent[c.id] {
			if c.gateway.careful || c.life == c.gateway.proc.life {
				w.fail("call %s (careful %v, life %d of %d, admitted at %d) was answered by %s and never sent", c.id, c.gateway.careful, c.life, c.gateway.proc.life, c.at-begin, c.gateway.proc.name)
			}
			w.report.Unsent++
		}
		if sent[c.id] {
			if c.admitted {
				admitted[c.account.id]++
			} else {
				refused[c.account.id]++
			}
		}
	}
	for _, a := range w.accounts {
		u, _ := v.states[a.shard].Account(a.id)
		if u.Own.Admitted != admitted[a.id] || u.Own.Refused != refused[a.id] {
			w.fail("%s: sent %d admitted and %d refused, counted %d and %d", a.id, admitted[a.id], refused[a.id], u.Own.Admitted, u.Own.Refused)
		}
	}
	rows := make(map[string]int)
	for _, r := range w.clickhouse.rows {
		rows[r.id]++
	}
	for id := range sent {
		if rows[id] != 1 {
			w.fail("call %s is in ClickHouse %d times", id, rows[id])
		}
	}
	if len(rows) != len(sent) {
		w.fail("%d calls in ClickHouse, %d in the ledger", len(rows), len(sent))
	}
}

// checkStates compares every owner's state with the pure fold's.
func (w *world) checkStates(v *verdict) {
	for _, m := range w.members {
		for s, o := range m.owners {
			if o == nil || o.state.Sequence() != v.states[s].Sequence() {
				continue // it was replaced and has not read on
			}
			if o.state.Hash() != v.states[s].Hash() {
				w.fail("%s has another state of shard %d than a fold of the ledger", m.proc.name, s)
			}
			if again, err := quota.Read(o.state.AppendBinary(nil)); err != nil || again.Hash() != o.state.Hash() || !bytes.Equal(again.AppendBinary(nil), o.state.AppendBinary(nil)) {
				w.fail("shard %d: a snapshot is not the state: %v", s, err)
			}
		}
	}
}

// checkDecisions compares what is published with the pure fold's decisions.
func (w *world) checkDecisions(v *verdict) {
	type key struct{ account, limit string }
	want := make(map[key][]usage.Decision)
	for _, d := range v.decisions {
		k := key{d.Account, d.LimitID}
		want[k] = append(want[k], d)
	}
	got := make(map[key][]usage.Decision)
	for i := range w.nats.decisions.messages {
		m := &w.nats.decisions.messages[i]
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil || d.Account == "" {
			continue // a checkpoint
		}
		k := key{d.Account, d.LimitID}
		if n := len(got[k]); n > 0 && got[k][n-1].ID == d.ID {
			continue // twice, one right after the other
		}
		got[k] = append(got[k], d)
	}
	for k, list := range want {
		if len(got[k]) != len(list) {
			w.fail("%s %s: %d decisions are published, the fold has %d", k.account, k.limit, len(got[k]), len(list))
			continue
		}
		for i := range list {
			if g := got[k][i]; g.ID != list[i].ID || g.Verdict != list[i].Verdict || g.Revision != list[i].Revision || g.Used != list[i].Used {
				w.fail("%s %s: decision %d is %+v, the fold has %+v", k.account, k.limit, i, g, list[i])
			}
		}
	}
	for k := range got {
		if len(want[k]) == 0 {
			w.fail("%s %s: a decision is published that the fold does not have", k.account, k.limit)
		}
	}
}

// checkAllowances compares what clients were answered with what there was.
func (w *world) checkAllowances() {
	used := make(map[leaseKey]int64)
	refused := make(map[string]int)
	for _, c := range w.calls {
		if c.code == usage.QuotaExceeded {
			refused[c.account.id]++
		}
		if !c.admitted {
			continue
		}
		for _, k := range c.windows {
			n := int64(1)
			if k.limit == "tokens/out" {
				n = c.cost
			}
			used[k] += n
		}
	}
	scale := int64(1)
	for i := range w.nats.ledger.messages {
		if m := &w.nats.ledger.messages[i]; bytes.Contains(m.Data, []byte("v2")) {
			if e, err := ledger.DecodeControl(m.Header, m.Data); err == nil && e.GetPlanSet().GetVersion() == "v2" {
				scale = 2
			}
		}
	}
	for _, p := range plans(scale) {
		for _, l := range p.Limits {
			for k, n := range used {
				if k.limit != p.ID+"/"+l.ID {
					continue
				}
				most := l.Amount + w.credited(k)
				if l.Tier == usage.TierLeased {
					most += maxExposure
				}
				if n > most {
					w.fail("%s %s from %s: %d admitted, there are %d", k.account, k.limit, k.start.Time().Format(time.TimeOnly), n, most)
				}
				// Where nothing went wrong nothing is left over: no call was refused
				// while another gateway still had room.
				if early := l.Amount - n; early > 0 && k.account == "ex" && k.start < begin && refused["ex"] > 0 && w.quiet() {
					w.fail("%s %s from %s: %d of %d admitted and others refused", k.account, k.limit, k.start.Time().Format(time.TimeOnly), n, l.Amount)
				}
			}
		}
	}
}

// quiet reports whether nothing went wrong, and nothing was changed.
func (w *world) quiet() bool {
	return w.o.Kills+w.o.Ends+w.o.Stops+w.o.Cuts+w.o.Takeovers+w.o.Loss == 0 && !w.changed
}

// credited is how much corrections may have given back to an allowance.
func (w *world) credited(k leaseKey) int64 {
	seen := make(map[string]bool)
	total := int64(0)
	for i := range w.nats.ledger.messages {
		m := &w.nats.ledger.messages[i]
		if kind, _, _ := ledger.ParseSubject(m.Subject); kind != ledger.KindControl {
			continue
		}
		e, err := ledger.DecodeControl(m.Header, m.Data)
		x := e.GetCorrection()
		if err != nil || x == nil || seen[e.GetId()] || (x.GetAccount() != k.account && !(k.account == "org" && x.GetAccount() != "org" && len(x.GetAccount()) > 3 && x.GetAccount()[:3] == "org")) {
			continue
		}
		seen[e.GetId()] = true
		for _, q := range x.GetAdjustments() {
			if (q.GetMeter() == string(usage.OutputTokens)) == (k.limit == "tokens/out") {
				total += max(0, -q.GetValue())
			}
		}
	}
	return total
}
