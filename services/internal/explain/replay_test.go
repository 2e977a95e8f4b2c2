package explain

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

// shardLog is a shard's ledger in memory.
type shardLog struct {
	t       *testing.T
	now     usage.Micros
	entries []ledger.Message
	sealed  map[ksuid.KSUID]uint64
	decided []usage.Decision
	state   *quota.Shard
	decoder fold.Decoder
	asked   uint64
	// snapshots by position.
	snapshots map[uint64][]byte
}

func newShardLog(t *testing.T, now usage.Micros) *shardLog {
	return &shardLog{t: t, now: now, sealed: map[ksuid.KSUID]uint64{}, state: quota.New(quota.Options{}), snapshots: map[uint64][]byte{}}
}

// append counts as an aggregator does.
func (l *shardLog) append(m *nats.Msg) uint64 {
	l.t.Helper()
	in := ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: uint64(len(l.entries) + 1), Time: l.now.Time()}
	l.entries = append(l.entries, in)
	e, _, err := l.decoder.Decode(&in)
	if err != nil {
		l.t.Fatal(err)
	}
	fx := l.state.Apply(e)
	if fx.Invalid != nil {
		l.t.Fatal(fx.Invalid)
	}
	l.decided = append(l.decided, fx.Decisions...)
	return in.Sequence
}

func (l *shardLog) control(e *tollkeeperv1.ControlEntry) uint64 {
	l.t.Helper()
	e.Id, e.Author = ksuid.New().String(), "test"
	m, err := ledger.ControlMessage(0, e)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.append(m)
}

func (l *shardLog) plans(version string, at usage.Micros, plans ...usage.Plan) uint64 {
	set := &tollkeeperv1.PlanSet{Version: version, EffectiveAtUnixMicros: int64(at)}
	for i := range plans {
		set.Plans = append(set.Plans, ledger.PlanToProto(&plans[i]))
	}
	return l.control(&tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: set}})
}

func (l *shardLog) accounts(accounts ...usage.Account) uint64 {
	set := &tollkeeperv1.AccountSet{}
	for i := range accounts {
		set.Accounts = append(set.Accounts, ledger.AccountToProto(&accounts[i]))
	}
	return l.control(&tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: set}})
}

func (l *shardLog) tick() uint64 {
	return l.control(&tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{}}})
}

func (l *shardLog) calls(p ksuid.KSUID, number uint64, calls ...usage.Call) uint64 {
	var b ledger.Builder
	for i := range calls {
		b.Add(&calls[i])
	}
	return l.append(ledger.FrameMessage(0, b.Seal(ledger.Header{Producer: p, Number: number, SealedAt: l.now})))
}

// snapshot keeps the state as it stands.
func (l *shardLog) snapshot() { l.snapshots[l.state.Sequence()] = l.state.AppendBinary(nil) }

// explain replays up to a decision, from a snapshot's position or from 0.
func (l *shardLog) explain(d usage.Decision, from uint64) (*Explanation, []trace.Row) {
	l.t.Helper()
	b := &base{state: quota.New(quota.Options{})}
	if from > 0 {
		state, err := quota.Read(l.snapshots[from])
		if err != nil {
			l.t.Fatal(err)
		}
		b = &base{state: state, snapshot: "snapshot", data: l.snapshots[from]}
	}
	t := trace.New(b.trace(&d, trace.Newest))
	e := &Explanation{Decision: decisionOf(&d)}
	for i := from; i < d.Revision; i++ {
		if err := t.Apply(&l.entries[i]); err != nil {
			l.t.Fatal(err)
		}
	}
	describe(t, &d, e, &l.entries[d.Revision-1])
	judge(t, e, &found{Decision: d, published: true})
	rows, _ := t.Rows()
	return e, rows
}

func TestAPeriodThatEndsIsExplainedByTime(t *testing.T) {
	t.Parallel()
	minute := usage.Micros(time.Minute / time.Microsecond)
	l := newShardLog(t, 28_000_000*minute)
	l.plans("v1", 0, usage.Plan{ID: "free", Limits: []usage.Limit{{ID: "calls", Meter: usage.Calls, Window: usage.Minute, Amount: 2, Tier: usage.TierEventual}}})
	l.accounts(usage.Account{ID: "acme", Plan: "free"})
	p := ksuid.New()
	call := func() usage.Call { return usage.Call{Time: l.now, Account: "acme", RequestID: ksuid.New().String()} }
	l.calls(p, 1, call(), call(), call())
	l.now += minute + 1
	tick := l.tick()
	// In the new period a call of the old one does not count.
	old := call()
	old.Time -= minute
	crossing := call()
	l.calls(p, 2, old, call(), crossing, call())
	if len(l.decided) != 3 {
		t.Fatalf("decided: %+v", l.decided)
	}
	for i, want := range []struct {
		verdict, reason string
		used, before    int64
		calls           int64
		crossed         string
	}{{"deny", ReasonCall, 3, 0, 3, ""}, {"allow", ReasonPeriod, 0, 0, 0, ""}, {"deny", ReasonCall, 3, 0, 3, crossing.RequestID}} {
		e, rows := l.explain(l.decided[i], 0)
		if !e.Replay.Same || e.Decision.Verdict != want.verdict || e.Reason.Kind != want.reason || e.Counter.After != want.used || e.Counter.Before != want.before || e.Fed.Calls != want.calls || len(rows) != int(want.calls) {
			t.Errorf("decision %d: %+v\n%+v\n%+v\n%+v", i, e.Replay, e.Reason, e.Counter, e.Fed)
		}
		if want.crossed != "" && e.Crossing.RequestID != want.crossed {
			t.Errorf("crossed by %+v", e.Crossing)
		}
	}
	if e, _ := l.explain(l.decided[1], 0); e.Entry.Sequence != tick || e.Entry.What != "time passed" {
		t.Errorf("%+v", e.Entry)
	}
}

// Whatever happens in a shard, each of its decisions is made again by a replay,
// from the beginning and from a snapshot, and is made of the calls that are
// listed.
func TestEveryDecisionOfARandomShardIsExplained(t *testing.T) {
	t.Parallel()
	reasons := map[string]int{}
	for seed := range uint64(10) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			l := randomShard(t, seed)
			if len(l.decided) == 0 {
				t.Fatal("nothing was decided: this says nothing")
			}
			var positions []uint64
			for at := range l.snapshots {
				positions = append(positions, at)
			}
			slices.Sort(positions)
			r := rand.New(rand.NewPCG(seed, 8))
			for i := range l.decided {
				if i%3 != int(seed%3) {
					continue
				}
				d := l.decided[i]
				e, rows := l.explain(d, 0)
				check(t, e, rows, &d)
				reasons[e.Reason.Kind]++
				if (e.Crossing == nil) != (d.Cause == 0) || e.Crossing != nil && e.Crossing.Time != d.Cause {
					t.Errorf("%+v was crossed by %+v", d, e.Crossing)
				}
				if n, _ := slices.BinarySearch(positions, d.Revision); n > 0 {
					at := positions[r.IntN(n)]
					from, rows := l.explain(d, at)
					check(t, from, rows, &d)
					if from.Counter != e.Counter || from.Reason != e.Reason {
						t.Errorf("from %d: %+v %+v, from the beginning %+v %+v", at, from.Counter, from.Reason, e.Counter, e.Reason)
					}
				}
			}
		})
	}
	for _, kind := range []string{ReasonCall, ReasonPlan, ReasonAccount, ReasonPeriod, ReasonCorrection, ReasonLease} {
		if reasons[kind] == 0 {
			t.Errorf("no decision was due to %q: %v", kind, reasons)
		}
	}
}

func check(t *testing.T, e *Explanation, rows []trace.Row, d *usage.Decision) {
	t.Helper()
	sum, calls := e.Fed.Carried, int64(0)
	for _, r := range rows {
		sum += r.Adds
		if r.Index >= 0 {
			calls++
		}
		if r.After != sum {
			t.Errorf("after %s the counter is said to be %d, the calls add up to %d", r.Position, r.After, sum)
		}
	}
	if !e.Replay.Same || e.Counter.After != sum || e.Fed.Unexplained != 0 || d.Tier == "" && e.Fed.Reported != 0 || sum+e.Fed.Reported != d.Used || calls != e.Fed.Calls {
		t.Errorf("%+v\n%+v\n%+v\n%+v: %d calls add up to %d", d, e.Replay, e.Counter, e.Fed, calls, sum)
	}
}

// randomShard is a shard in which plans, accounts and parents change, frames and
// foreign events repeat, calls come late and ahead.
func randomShard(t *testing.T, seed uint64) *shardLog {
	r := rand.New(rand.NewPCG(seed, 7))
	l := newShardLog(t, 1_700_000_000_000_000)
	accounts := []string{"root", "root/a", "root/b", "root/a/x", "solo", "unheard"}
	models := []string{"small", "large", "huge"}
	version := 0
	newPlans := func() {
		version++
		var plans []usage.Plan
		for _, id := range []string{"free", "pro", "a/b"} {
			p := usage.Plan{ID: id}
			for _, name := range []string{"calls", "tokens", "b/tokens", "pages"} {
				if r.IntN(4) == 0 {
					continue
				}
				limit := usage.Limit{ID: name, Meter: map[string]usage.Meter{"calls": usage.Calls, "tokens": usage.InputTokens, "b/tokens": usage.InputTokens, "pages": "pages"}[name], Tier: usage.TierEventual}
				limit.Window = []usage.WindowKind{usage.Minute, usage.Hour, usage.Lifetime, usage.Lifetime}[r.IntN(4)]
				limit.Amount = []int64{0, 5, 20, 60, 200}[r.IntN(5)]
				limit.WarnPercent = []uint32{0, 50, 77}[r.IntN(3)]
				if r.IntN(3) == 0 {
					limit.Filter.Models = models[:1+r.IntN(2)]
				}
				if r.IntN(4) == 0 {
					limit.Tier = usage.TierExact
				}
				p.Limits = append(p.Limits, limit)
			}
			plans = append(plans, p)
		}
		at := usage.Micros(0)
		if r.IntN(3) == 0 {
			at = l.now + usage.Micros(r.IntN(30_000_000))
		}
		l.plans(fmt.Sprint("v", version), at, plans...)
	}
	newAccounts := func() {
		var set []usage.Account
		for _, id := range accounts[:5] {
			if r.IntN(2) == 0 {
				continue
			}
			a := usage.Account{ID: id, Plan: []string{"", "free", "pro", "a/b"}[r.IntN(4)], Closed: r.IntN(10) == 0}
			switch id {
			case "root/a", "root/b":
				a.Parent = []string{"root", "root", ""}[r.IntN(3)]
			case "root/a/x":
				a.Parent = []string{"root/a", "root/b", "root"}[r.IntN(3)]
			}
			set = append(set, a)
		}
		if len(set) > 0 {
			l.accounts(set...)
		}
	}
	if seed%3 != 0 { // else by the rules before the ledger said any
		l.control(&tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: quota.CoreVersion, ForeignHorizonMicros: int64(dedup.DefaultHorizon)}}})
	}
	newPlans()
	newAccounts()
	producers := []ksuid.KSUID{ksuid.New(), ksuid.New()}
	numbers := map[ksuid.KSUID]uint64{}
	for range 200 {
		l.now += usage.Micros(r.IntN(8_000_000))
		switch r.IntN(20) {
		case 0:
			newPlans()
		case 1:
			newAccounts()
		case 2:
			l.tick()
		case 3:
			l.snapshot()
		case 4:
			c := &tollkeeperv1.Correction{Account: accounts[r.IntN(len(accounts))], Model: models[r.IntN(3)], Reason: "random"}
			if r.IntN(2) == 0 {
				c.TimeUnixMicros = int64(l.now) - r.Int64N(200_000_000)
			}
			for _, m := range []string{"calls", "input_tokens", "pages"}[:1+r.IntN(3)] {
				c.Adjustments = append(c.Adjustments, &tollkeeperv1.Quantity{Meter: m, Value: []int64{-30, -7, -1, 1, 9}[r.IntN(5)]})
			}
			l.control(&tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Correction{Correction: c}})
		case 5, 6, 7, 8, 9:
			l.randomAsk(r, accounts, producers[r.IntN(2)])
		default:
			p := producers[r.IntN(2)]
			if r.IntN(8) > 0 || numbers[p] == 0 {
				numbers[p]++
			}
			var calls []usage.Call
			for range 1 + r.IntN(6) {
				c := usage.Call{Time: l.now - usage.Micros(r.IntN(1_000_000)), Account: accounts[r.IntN(len(accounts))], Model: models[r.IntN(3)], RequestID: ksuid.New().String()}
				switch r.IntN(12) {
				case 0:
					c.Time -= usage.Micros(r.IntN(200_000_000))
				case 1:
					c.Time += usage.Micros(r.IntN(100_000_000))
				case 2:
					c.Code = usage.QuotaExceeded
				case 3, 4, 5:
					c.Source, c.EventID = "theirs", fmt.Sprint(r.IntN(60))
				}
				if r.IntN(3) > 0 {
					c.Quantities.Set(usage.InputTokens, int64(r.IntN(10)))
				}
				if r.IntN(3) == 0 {
					c.Quantities.Set("pages", int64(r.IntN(10)))
				}
				if r.IntN(10) == 0 {
					c.Quantities.Set(usage.Calls, int64(r.IntN(4)))
				}
				calls = append(calls, c)
			}
			l.calls(p, numbers[p], calls...)
		}
	}
	return l
}

// randomAsk appends what a gateway may say about one of the allowances there are.
func (l *shardLog) randomAsk(r *rand.Rand, accounts []string, gateway ksuid.KSUID) {
	l.t.Helper()
	account := accounts[r.IntN(len(accounts))]
	u, _ := l.state.Account(account)
	for i := range u.Limits {
		if !u.Limits[i].Tier.Leased() || r.IntN(2) == 0 {
			continue
		}
		ask := &tollkeeperv1.LeaseAsk{
			Account: account, Limit: u.Limits[i].LimitID, WindowStartUnixMicros: int64(u.Limits[i].PeriodStart), SentUnixMicros: int64(l.now),
			Seq: l.asked + 1, Need: r.Int64N(12),
		}
		for _, h := range l.state.Holdings(account, ask.GetLimit()) {
			if h.Gateway == lease.Gateway(gateway) {
				ask.Known, ask.Returned, ask.Used = h.Granted, h.Returned, h.Used+r.Int64N(h.Outstanding+1)
			}
		}
		l.asked++
		m, err := ledger.LeaseMessage(0, &tollkeeperv1.LeaseEntry{Gateway: gateway.Bytes(), Asks: []*tollkeeperv1.LeaseAsk{ask}})
		if err != nil {
			l.t.Fatal(err)
		}
		l.append(m)
		return
	}
}

func TestThePagesOfAnIndexFollowEachOther(t *testing.T) {
	t.Parallel()
	var index []trace.Row
	for n := range uint64(5) {
		index = append(index, trace.Row{Position: trace.Position{Sequence: (n + 7) / 2, Index: int32(n+7) % 2}})
	}
	r := &replayed{below: trace.Newest, rows: index, dropped: true}
	names := func(rows []trace.Row) (out []string) {
		for _, r := range rows {
			out = append(out, r.String())
		}
		return out
	}
	rows, next := r.page(trace.Newest, 3)
	if fmt.Sprint(names(rows)) != "[5.1 5.0 4.1]" || next != "4.1" {
		t.Errorf("%v, then %q", names(rows), next)
	}
	below, err := trace.ParsePosition(next)
	if err != nil {
		t.Fatal(err)
	}
	if rows, next = r.page(below, 3); fmt.Sprint(names(rows)) != "[4.0 3.1]" || next != "3.1" {
		t.Errorf("%v, then %q", names(rows), next)
	}
	for _, c := range []struct {
		below trace.Position
		limit int
		want  bool
	}{{trace.Newest, 4, true}, {trace.Newest, 5, false}, {below, 1, true}, {below, 2, false}} {
		if got := r.covers(c.below, c.limit); got != c.want {
			t.Errorf("covers(%s, %d) = %v", c.below, c.limit, got)
		}
	}
	r.dropped = false
	if rows, next = r.page(below, 3); len(rows) != 2 || next != "" || !r.covers(below, 100) {
		t.Errorf("the last page is %v, then %q", names(rows), next)
	}
	// What was indexed for an older page says nothing of newer calls.
	r.below = below
	if r.covers(trace.Newest, 1) {
		t.Error("it covers what it left out")
	}
}
