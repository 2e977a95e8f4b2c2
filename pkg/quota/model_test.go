package quota

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/segmentio/ksuid"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// batchOf writes calls as columns, the way a gateway seals them.
func batchOf(producer byte, number uint64, calls []usage.Call) *Batch {
	b := &Batch{Number: number, N: len(calls)}
	if producer != 0 {
		b.Producer = dedup.Producer{producer}
	}
	column := func(to *Strings, get func(*usage.Call) string) {
		ids := map[string]uint32{}
		for i := range calls {
			v := get(&calls[i])
			id, ok := ids[v]
			if !ok {
				id = uint32(len(to.Dict))
				ids[v] = id
				to.Dict = append(to.Dict, []byte(v))
			}
			to.Index = append(to.Index, id)
		}
		switch {
		case len(to.Dict) == 1 && len(to.Dict[0]) == 0:
			*to = Strings{}
		case len(to.Dict) == 1:
			to.Index = nil
		}
	}
	column(&b.Account, func(c *usage.Call) string { return c.Account })
	column(&b.Code, func(c *usage.Call) string { return string(c.Code) })
	column(&b.Model, func(c *usage.Call) string { return c.Model })
	column(&b.Route, func(c *usage.Call) string { return c.Route })
	column(&b.Method, func(c *usage.Call) string { return c.Method })
	column(&b.Source, func(c *usage.Call) string { return c.Source })
	column(&b.EventID, func(c *usage.Call) string { return c.EventID })
	meter := func(to *Ints, m usage.Meter) bool {
		known := make([]byte, (len(calls)+7)/8)
		values, n := make([]int64, len(calls)), 0
		for i := range calls {
			if v, ok := calls[i].Quantities.Get(m); ok {
				known[i>>3] |= 1 << (i & 7)
				values[i] = v
				n++
			} else {
				values[i] = 7777 // what stands at an unknown row is not to be read
			}
		}
		if n == 0 {
			return false
		}
		to.Values = values
		if n < len(calls) {
			to.Known = known
		}
		return true
	}
	for i, m := range usage.BuiltInMeters() {
		meter(&b.BuiltIns[i], m)
	}
	var own []usage.Meter
	for i := range calls {
		b.Time = append(b.Time, int64(calls[i].Time))
		for _, q := range calls[i].Quantities.Custom() {
			if !slices.Contains(own, q.Meter) {
				own = append(own, q.Meter)
			}
		}
	}
	for _, m := range own {
		c := CustomMeter{Meter: m}
		meter(&c.Ints, m)
		b.Custom = append(b.Custom, c)
	}
	return b
}

// model counts the same as a Shard, call by call, in maps, slowly.
type model struct {
	now      usage.Micros
	version  string
	plans    map[string]usage.Plan
	pending  []PlanSet
	accounts map[string]*modelAccount
	numbers  map[dedup.Producer]uint64
	foreign  map[string]bool
	acts     map[string]bool
	calls    uint64 // hash of all
	ended    map[dedup.Producer]bool
	shard    *Shard // says whose asks are refused: what is handed out is not modelled
}

const modelShard = 3

type modelAccount struct {
	parent, plan string
	closed       bool
	own, all     Totals
	limits       map[string]*modelLimit // by limit id
}

type modelLimit struct {
	usage.Limit
	plan    string
	used    map[int64]int64 // by window
	verdict usage.Verdict
	period  int64
	forced  bool
	cause   map[usage.Verdict]usage.Micros // of this entry
	roomy   bool
	leases  map[int64]*modelAllowance // by window
}

func newModel() *model {
	return &model{
		plans: map[string]usage.Plan{}, accounts: map[string]*modelAccount{}, numbers: map[dedup.Producer]uint64{},
		foreign: map[string]bool{}, acts: map[string]bool{}, ended: map[dedup.Producer]bool{},
	}
}

func (m *model) account(id string) *modelAccount {
	a := m.accounts[id]
	if a == nil {
		a = &modelAccount{limits: map[string]*modelLimit{}, own: Totals{Meters: map[usage.Meter]int64{}}, all: Totals{Meters: map[usage.Meter]int64{}}}
		m.accounts[id] = a
	}
	return a
}

// told is what matters of a decision.
type told struct {
	Account, Limit string
	Verdict        usage.Verdict
	Used, Amount   int64
	Start, Cause   usage.Micros
	Version        string
	Room           bool
}

func (m *model) apply(e Entry, calls []usage.Call) []told {
	m.now = max(m.now, e.Time)
	out := map[string]told{}
	for len(m.pending) > 0 && m.pending[0].EffectiveAt <= m.now {
		set := m.pending[0]
		m.pending = m.pending[1:]
		m.setPlans(set, out)
	}
	for _, a := range m.accounts {
		for _, l := range a.limits {
			l.cause = map[usage.Verdict]usage.Micros{}
		}
	}
	switch {
	case e.Batch != nil:
		m.frame(e, calls)
	case e.Control != nil && (e.Control.ID == "" || !m.acts[e.Control.ID]):
		m.acts[e.Control.ID] = true
		m.control(e.Control, out)
	}
	for i := range e.Asks {
		m.ask(&e.Asks[i])
	}
	for id, a := range m.accounts {
		for _, l := range a.limits {
			kind, _ := window.Parse(l.Window)
			period := kind.Number(m.now)
			used := l.settled(period)
			verdict, roomy := usage.Allow, false
			if !a.closed {
				switch {
				case used >= l.Amount:
					verdict = usage.Deny
				case l.WarnPercent > 0 && used*100 >= l.Amount*int64(l.WarnPercent):
					verdict = usage.Warn
				}
				if verdict != usage.Deny && m.refused(id, l, period) {
					verdict, roomy = usage.Deny, true
				}
			}
			tell := verdict != l.verdict || roomy != l.roomy || verdict != usage.Allow && (l.forced || l.period != period)
			l.forced = false
			if !tell {
				continue
			}
			l.verdict, l.period, l.roomy = verdict, period, roomy
			start, _ := kind.Bounds(m.now)
			out[id+" "+l.plan+"/"+l.ID] = told{id, l.plan + "/" + l.ID, verdict, used, l.Amount, start, l.cause[verdict], m.version, roomy}
		}
	}
	list := slices.Collect(maps.Values(out))
	slices.SortFunc(list, func(x, y told) int { return strings.Compare(x.Account+" "+x.Limit, y.Account+" "+y.Limit) })
	return list
}

func (m *model) control(c *Control, out map[string]told) {
	if c.PlanSet != nil {
		if c.PlanSet.EffectiveAt > m.now {
			m.pending = append(m.pending, *c.PlanSet)
			slices.SortStableFunc(m.pending, func(x, y PlanSet) int { return int(x.EffectiveAt - y.EffectiveAt) })
			return
		}
		m.setPlans(*c.PlanSet, out)
	}
	if c.Correction != nil {
		m.correct(c.Correction)
	}
	if c.Closed != nil {
		m.end(c)
	}
	for _, in := range c.Accounts {
		a := m.account(in.ID)
		if in.Parent != "" {
			m.account(in.Parent)
		}
		a.parent, a.closed = in.Parent, in.Closed
		if !in.Closed && in.Plan != a.plan {
			a.plan = in.Plan
			m.replan(in.ID, a, m.version, true, out)
		}
	}
}

func (m *model) correct(c *Correction) {
	at := c.Time
	if at == 0 || at > m.now {
		at = m.now
	}
	for _, q := range c.Adjustments {
		own := m.account(c.Account)
		adjust := func(t *Totals) {
			by := q.Value
			if q.Meter != usage.Calls {
				by = max(by, -t.Meters[q.Meter])
				t.Meters[q.Meter] += by
			}
			if t.Adjusted == nil {
				t.Adjusted = map[usage.Meter]int64{}
			}
			t.Adjusted[q.Meter] += by
		}
		adjust(&own.own)
		for id := c.Account; id != ""; id = m.accounts[id].parent {
			for _, l := range m.accounts[id].limits {
				kind, _ := window.Parse(l.Window)
				n := kind.Number(at)
				if l.Meter == q.Meter && l.Filter.Match(c.Model, c.Route, c.Method) && n >= kind.Number(m.now)-1 {
					before := l.used[n]
					l.used[n] = max(0, before+q.Value)
					if x := l.leases[n]; x != nil && n == kind.Number(m.now) {
						x.outside += l.used[n] - before
					}
				}
			}
		}
	}
}

func (m *model) setPlans(set PlanSet, out map[string]told) {
	old := m.version
	m.version, m.plans = set.Version, map[string]usage.Plan{}
	for _, p := range set.Plans {
		m.plans[p.ID] = p
	}
	for id, a := range m.accounts {
		m.replan(id, a, old, old != m.version, out)
	}
}

func (m *model) replan(id string, a *modelAccount, version string, changed bool, out map[string]told) {
	old := a.limits
	a.limits = map[string]*modelLimit{}
	for _, l := range m.plans[a.plan].Limits {
		n := &modelLimit{Limit: l, plan: a.plan, used: map[int64]int64{}, verdict: usage.Allow, forced: true, cause: map[usage.Verdict]usage.Micros{}, leases: map[int64]*modelAllowance{}}
		if o := old[l.ID]; o != nil {
			same := o.Meter == l.Meter && o.Window == l.Window && cmp.Equal(o.Filter, l.Filter)
			if same {
				n.used = o.used
			}
			if o.plan == a.plan {
				n.verdict, n.period, n.roomy = o.verdict, o.period, o.roomy
				if same && o.Tier.Leased() && l.Tier.Leased() {
					n.leases = o.leases
				}
				n.forced = changed || o.forced || !cmp.Equal(o.Limit, l)
				o.verdict = usage.Allow
			}
		}
		a.limits[l.ID] = n
	}
	for _, o := range old {
		if o.verdict > usage.Allow {
			kind, _ := window.Parse(o.Window)
			start, _ := kind.Bounds(m.now)
			out[id+" "+o.plan+"/"+o.ID] = told{id, o.plan + "/" + o.ID, usage.Allow, o.used[kind.Number(m.now)], o.Amount, start, 0, version, false}
		}
	}
}

func (m *model) frame(e Entry, calls []usage.Call) {
	if e.Batch.Producer != (dedup.Producer{}) {
		if e.Batch.Number <= m.numbers[e.Batch.Producer] {
			return
		}
		m.numbers[e.Batch.Producer] = e.Batch.Number
		delete(m.ended, e.Batch.Producer) // it was not its end
	}
	producer := audit.ProducerHash(ksuid.KSUID(e.Batch.Producer).String())
	for i := range calls {
		c := &calls[i]
		hash := audit.RowHash(audit.FrameHash(producer, modelShard, e.Batch.Number), i)
		if e.Batch.Producer == (dedup.Producer{}) {
			hash = audit.ForeignHash([]byte(c.Account), []byte(c.Source), []byte(c.EventID))
		}
		if c.Source != "" {
			key := fmt.Sprintf("%q %q %q", c.Account, c.Source, c.EventID)
			if m.foreign[key] {
				continue
			}
			m.foreign[key] = true
		}
		own := m.account(c.Account)
		m.total(&own.own, c)
		own.own.Hash += hash
		m.calls += hash
		for id := c.Account; id != ""; id = m.accounts[id].parent {
			a := m.accounts[id]
			m.total(&a.all, c)
			for _, l := range a.limits {
				v, ok := c.Usage(l.Meter)
				if !ok || !l.Filter.Match(c.Model, c.Route, c.Method) {
					continue
				}
				kind, _ := window.Parse(l.Window)
				n := kind.Number(min(c.Time, e.Time))
				if n < kind.Number(m.now)-1 {
					continue // that window is not kept
				}
				before := l.used[n]
				l.used[n] += v
				if n != kind.Number(m.now) {
					continue
				}
				l.count(n, v, e.Batch, i, m.now)
				warn := (l.Amount*int64(l.WarnPercent) + 99) / 100
				if before < l.Amount && l.used[n] >= l.Amount {
					l.cause[usage.Deny] = c.Time
				}
				if before < warn && l.used[n] >= warn {
					l.cause[usage.Warn] = c.Time
				}
			}
		}
	}
}

func (m *model) total(t *Totals, c *usage.Call) {
	if !c.Admitted() {
		t.Refused++
		return
	}
	t.Admitted++
	for _, meter := range append(slices.Collect(maps.Keys(map[usage.Meter]bool{"images": true})), usage.Calls, usage.InputTokens, usage.Cost) {
		if v, ok := c.Quantities.Get(meter); ok {
			t.Meters[meter] += v
		}
	}
}

// Generators of small worlds in which everything meets everything.
var (
	accountIDs = []string{"a", "b", "c", "d", "e", "f"}
	planIDs    = []string{"p", "q"}
	models     = []string{"", "m1", "m2"}

	genLimit = rapid.Custom(func(t *rapid.T) usage.Limit {
		l := usage.Limit{
			ID:     rapid.SampledFrom([]string{"l1", "l2", "l3"}).Draw(t, "id"),
			Meter:  rapid.SampledFrom([]usage.Meter{usage.Calls, usage.Calls, usage.InputTokens, "images"}).Draw(t, "meter"),
			Window: rapid.SampledFrom([]usage.WindowKind{usage.Minute, usage.Minute, usage.Hour, usage.Month, usage.Lifetime}).Draw(t, "window"),
			Amount: rapid.Int64Range(0, 25).Draw(t, "amount"), Tier: usage.TierEventual,
			WarnPercent: rapid.SampledFrom([]uint32{0, 50, 100}).Draw(t, "warn"),
		}
		if rapid.Bool().Draw(t, "filtered") {
			l.Filter.Models = []string{rapid.SampledFrom(models[1:]).Draw(t, "model")}
		}
		return l
	})
	genPlans = rapid.Custom(func(t *rapid.T) *PlanSet {
		set := &PlanSet{Version: rapid.SampledFrom([]string{"v1", "v2"}).Draw(t, "version")}
		for _, id := range planIDs {
			if rapid.IntRange(0, 3).Draw(t, "there") > 0 {
				set.Plans = append(set.Plans, usage.Plan{ID: id, Limits: rapid.SliceOfNDistinct(genLimit, 0, 3, func(l usage.Limit) string { return l.ID }).Draw(t, "limits")})
			}
		}
		return set
	})
	genCall = func(now usage.Micros) *rapid.Generator[usage.Call] {
		return rapid.Custom(func(t *rapid.T) usage.Call {
			c := usage.Call{
				Account: rapid.SampledFrom(accountIDs).Draw(t, "account"), Model: rapid.SampledFrom(models).Draw(t, "model"),
				Time: now + usage.Micros(rapid.SampledFrom([]int64{0, 0, 0, -1, 5, -30, -61, -200, -4000, 60}).Draw(t, "age")*1_000_000),
			}
			if rapid.IntRange(0, 5).Draw(t, "refused") == 0 {
				c.Code = usage.QuotaExceeded
			}
			if rapid.Bool().Draw(t, "tokens") {
				c.Quantities.Set(usage.InputTokens, rapid.Int64Range(0, 6).Draw(t, "n"))
			}
			switch rapid.IntRange(0, 7).Draw(t, "more") {
			case 0:
				c.Quantities.Set("images", rapid.Int64Range(0, 6).Draw(t, "images"))
			case 1:
				c.Quantities.Set(usage.Calls, rapid.Int64Range(0, 4).Draw(t, "calls"))
			case 2:
				c.Source, c.EventID = "s", rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "event")
			}
			return c
		})
	}
)

// step is one entry with what the model needs of it.
type step struct {
	Entry
	calls []usage.Call
}

type story struct {
	now     usage.Micros
	seq     uint64
	numbers map[byte]uint64
	tiers   bool
	kinds   []string   // of entries; nil: of all
	first   []*Control // entries before all others
}

func (st *story) next(t *rapid.T) step {
	st.seq += rapid.Uint64Range(1, 3).Draw(t, "skip")
	st.now += usage.Micros(rapid.SampledFrom([]int64{0, 0, 1, 20, 61, 3600}).Draw(t, "pass") * 1_000_000)
	e := step{Entry: Entry{Sequence: st.seq, Time: st.now}}
	if len(st.first) > 0 {
		e.Control, st.first = st.first[0], st.first[1:]
		return e
	}
	if rapid.IntRange(0, 9).Draw(t, "clock goes back") == 0 {
		e.Time -= 2_000_000
	}
	kinds := st.kinds
	if kinds == nil {
		kinds = []string{"calls", "calls", "calls", "calls", "foreign", "plans", "accounts", "accounts", "correction", "nothing"}
	}
	switch rapid.SampledFrom(kinds).Draw(t, "kind") {
	case "calls":
		producer := rapid.SampledFrom([]byte{1, 2}).Draw(t, "producer")
		if rapid.IntRange(0, 5).Draw(t, "again") > 0 {
			st.numbers[producer]++
		}
		e.calls = rapid.SliceOfN(genCall(e.Time), 1, 12).Draw(t, "calls")
		e.Batch = batchOf(producer, max(st.numbers[producer], 1), e.calls)
	case "foreign":
		e.calls = rapid.SliceOfN(genCall(e.Time), 1, 1).Draw(t, "calls")
		e.calls[0].Source, e.calls[0].EventID = "s", rapid.SampledFrom([]string{"1", "2", "3", "4"}).Draw(t, "event")
		e.Batch = batchOf(0, 0, e.calls)
	case "plans":
		set := genPlans.Draw(t, "plans")
		if st.tiers {
			set = genTiered.Draw(t, "tiered plans")
		}
		if rapid.IntRange(0, 3).Draw(t, "later") == 0 {
			set.EffectiveAt = st.now + usage.Micros(rapid.Int64Range(1, 100).Draw(t, "in")*1_000_000)
		}
		e.Control = &Control{ID: rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, "act"), PlanSet: set}
	case "correction":
		c := &Correction{
			Account: rapid.SampledFrom(accountIDs).Draw(t, "account"), Model: rapid.SampledFrom(models).Draw(t, "model"),
			Time: max(0, e.Time-usage.Micros(rapid.SampledFrom([]int64{0, 30, 61, 4000, -50}).Draw(t, "age")*1_000_000)),
		}
		if rapid.Bool().Draw(t, "now") {
			c.Time = 0
		}
		for _, m := range rapid.SliceOfNDistinct(rapid.SampledFrom([]usage.Meter{usage.Calls, usage.InputTokens, "images"}), 1, 3, rapid.ID).Draw(t, "meters") {
			by := rapid.OneOf(rapid.Int64Range(-9, -1), rapid.Int64Range(1, 5)).Draw(t, "by")
			c.Adjustments = append(c.Adjustments, usage.Quantity{Meter: m, Value: by})
		}
		e.Control = &Control{ID: rapid.SampledFrom([]string{"", "x", "z"}).Draw(t, "act"), Correction: c}
	case "accounts":
		for _, i := range rapid.SliceOfNDistinct(rapid.IntRange(0, len(accountIDs)-1), 1, 3, rapid.ID).Draw(t, "accounts") {
			a := usage.Account{ID: accountIDs[i], Plan: rapid.SampledFrom(append(planIDs, "", "unheard of")).Draw(t, "plan"), Closed: rapid.IntRange(0, 6).Draw(t, "closed") == 0}
			if i > 0 && rapid.Bool().Draw(t, "nested") {
				a.Parent = accountIDs[rapid.IntRange(0, i-1).Draw(t, "parent")]
			}
			if e.Control == nil {
				e.Control = &Control{}
			}
			e.Control.Accounts = append(e.Control.Accounts, a)
		}
	}
	return e
}

func tell(ds []usage.Decision) []told {
	list := []told{}
	for _, d := range ds {
		list = append(list, told{d.Account, d.LimitID, d.Verdict, d.Used, d.Amount, d.PeriodStart, d.Cause, d.PlanVersion, d.Room > 0})
	}
	slices.SortFunc(list, func(x, y told) int { return strings.Compare(x.Account+" "+x.Limit, y.Account+" "+y.Limit) })
	return list
}

func TestAShardAgreesWithASlowModelAndWithItselfAfterARestart(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) { agrees(t, &story{}) })
}

// Of limits whose units are leased the model knows what is settled, of what was
// counted and what gateways have said, and the verdicts that follow.
func TestAShardAgreesWithASlowModelOnWhatIsSettledOfLeases(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) { agrees(t, &story{tiers: true}) })
}

// Corrections belong to the window of their time, the present one or the one
// before, and to what is settled of a lease in the present one.
func TestAShardAgreesWithASlowModelOnCorrections(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		limit := func(id string, m usage.Meter, tier usage.Tier) usage.Limit {
			return usage.Limit{ID: id, Meter: m, Window: usage.Minute, Amount: 12, Tier: tier, WarnPercent: 50}
		}
		agrees(t, &story{
			tiers: true, kinds: []string{"calls", "calls", "correction", "correction", "nothing"},
			first: []*Control{
				{PlanSet: &PlanSet{Version: "v1", Plans: []usage.Plan{
					{ID: "p", Limits: []usage.Limit{limit("l1", usage.Calls, usage.TierEventual), limit("l2", usage.Calls, usage.TierExact), limit("l3", usage.InputTokens, usage.TierExact)}},
				}}},
				{Accounts: []usage.Account{{ID: "a", Plan: "p"}, {ID: "b", Plan: "p", Parent: "a"}, {ID: "c", Plan: "p", Parent: "b"}, {ID: "d", Plan: "p", Parent: "a"}}},
			},
		})
	})
}

func agrees(t *rapid.T, st *story) {
	st.now, st.numbers = noon, map[byte]uint64{}
	s, m := New(Options{Shard: modelShard}), newModel()
	var log []step
	var decisions [][]usage.Decision
	for range rapid.IntRange(1, 40).Draw(t, "entries") {
		e := st.next(t)
		if st.tiers && len(log) >= 2 {
			e = st.leased(t, e, s, m)
		}
		fx := s.Apply(e.Entry)
		m.shard = s
		if fx.Invalid != nil {
			t.Fatalf("refused: %v", fx.Invalid)
		}
		if diff := cmp.Diff(m.apply(e.Entry, e.calls), tell(fx.Decisions), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("entry %d: decisions, -model +shard:\n%s", e.Sequence, diff)
		}
		log, decisions = append(log, e), append(decisions, slices.Clone(fx.Decisions))
		m.compare(t, s)
		if rapid.IntRange(0, 5).Draw(t, "restart") == 0 {
			data := s.AppendBinary(nil)
			restored, err := Read(data)
			if err != nil {
				t.Fatal(err)
			}
			if again := restored.AppendBinary(nil); !bytes.Equal(data, again) {
				t.Fatal("a snapshot of a restored state is another one")
			}
			before, after := s.Hash(), restored.Hash()
			if before != after {
				t.Fatal("a restored state has another hash")
			}
			s = restored
		}
	}
	for id, want := range m.accounts {
		got, ok := s.Account(id)
		if !ok {
			t.Fatalf("account %s is not known", id)
		}
		if diff := cmp.Diff([]Totals{want.own}, []Totals{got.Own}); diff != "" {
			t.Fatalf("account %s, own: -model +shard:\n%s", id, diff)
		}
	}
	if got := s.Total().Hash; got != m.calls {
		t.Fatalf("all calls have the hash %x, want %x", got, m.calls)
	}
	again := New(Options{Shard: modelShard})
	for i, e := range log {
		fx := again.Apply(e.Entry)
		if diff := cmp.Diff(decisions[i], fx.Decisions, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("entry %d read again: %s", e.Sequence, diff)
		}
		if old := again.Apply(e.Entry); !old.Old || len(old.Decisions) != 0 {
			t.Fatalf("entry %d was folded twice", e.Sequence)
		}
	}
	if again.Hash() != s.Hash() {
		t.Fatal("the same log gave another hash")
	}
}

func TestHowCallsAreCutIntoFramesDoesNotMatter(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		whole, cut := New(Options{}), New(Options{})
		set := genPlans.Draw(t, "plans")
		for i := range set.Plans {
			for k := range set.Plans[i].Limits {
				set.Plans[i].Limits[k].Tier = rapid.SampledFrom([]usage.Tier{usage.TierExact, usage.TierEventual}).Draw(t, "tier")
			}
		}
		var accounts []usage.Account
		for i, id := range accountIDs {
			a := usage.Account{ID: id, Plan: rapid.SampledFrom(planIDs).Draw(t, "plan")}
			if i > 0 && rapid.Bool().Draw(t, "nested") {
				a.Parent = accountIDs[rapid.IntRange(0, i-1).Draw(t, "parent")]
			}
			accounts = append(accounts, a)
		}
		verdicts := func(s *Shard, into map[string]usage.Verdict, e Entry) {
			for _, d := range s.Apply(e).Decisions {
				into[d.Account+" "+d.LimitID] = d.Verdict
			}
		}
		wholeVerdicts, cutVerdicts := map[string]usage.Verdict{}, map[string]usage.Verdict{}
		for i, c := range []*Control{{PlanSet: set}, {Accounts: accounts}} {
			verdicts(whole, wholeVerdicts, Entry{Sequence: uint64(i + 1), Time: noon, Control: c})
			verdicts(cut, cutVerdicts, Entry{Sequence: uint64(i + 1), Time: noon, Control: c})
		}
		// Two gateways have leases of what is leased, of the one the calls may come from.
		var asks []LeaseAsk
		for _, a := range accounts {
			for _, p := range set.Plans {
				for _, l := range p.Limits {
					kind, _ := window.Parse(l.Window)
					start, _ := kind.Bounds(noon)
					asks = append(asks, LeaseAsk{a.ID, p.ID + "/" + l.ID, start, lease.Ask{Gateway: lease.Gateway{1}, Seq: 1, Need: 3, Want: 6, Sent: lease.Micros(noon)}})
				}
			}
		}
		withAsks := func(s *Shard, into map[string]usage.Verdict, seq uint64, g lease.Gateway, n uint64) []LeaseAnswer {
			var answers []LeaseAnswer
			for i := range asks {
				asks[i].Gateway, asks[i].Seq = g, n
			}
			e := Entry{Sequence: seq, Time: noon, Asks: asks}
			verdicts(s, into, e)
			for _, a := range s.effects.Answers {
				a.Revision, a.Decision, a.Recall = 0, nil, min(a.Recall, 1) // which entry led to it differs
				answers = append(answers, a)
			}
			return answers
		}
		if len(asks) > 0 {
			withAsks(whole, wholeVerdicts, 3, lease.Gateway{1}, 1)
			withAsks(cut, cutVerdicts, 3, lease.Gateway{1}, 1)
		}
		calls := rapid.SliceOfN(genCall(noon), 1, 60).Draw(t, "calls")
		flags := map[string]int64{}
		for i := range calls {
			calls[i].RequestID = fmt.Sprint(i)
			if rapid.Bool().Draw(t, "of a lease") {
				flags[calls[i].RequestID] = int64(usage.FromLease)
			}
		}
		batch := func(number uint64, calls []usage.Call) *Batch {
			b := batchOf(1, number, calls)
			for i := range calls {
				b.Flags.Values = append(b.Flags.Values, flags[calls[i].RequestID])
			}
			return b
		}
		for i := range calls {
			// Of two foreign events with one identity the first is counted:
			// there the order matters.
			calls[i].Source, calls[i].EventID = "", ""
		}
		verdicts(whole, wholeVerdicts, Entry{Sequence: 4, Time: noon, Batch: batch(1, calls)})
		// Cut, shuffled within the entry's time, and every frame sent twice.
		order := rapid.Permutation(calls).Draw(t, "order")
		seq, number := uint64(4), uint64(0)
		for len(order) > 0 {
			n := rapid.IntRange(1, len(order)).Draw(t, "cut")
			number++
			for range 2 {
				verdicts(cut, cutVerdicts, Entry{Sequence: seq, Time: noon, Batch: batch(number, order[:n])})
				seq++
			}
			order = order[n:]
		}
		// Half of a frame may show more used without a lease than there is, until
		// the other half says that a lease paid for the rest: then units are called
		// back that the whole frame leaves where they are. What is used, held and
		// decided is the same; who is asked next is not.
		calledBack := false
		compare := func() {
			if diff := cmp.Diff(wholeVerdicts, cutVerdicts); diff != "" {
				t.Fatalf("verdicts: -whole +cut\n%s", diff)
			}
			for _, id := range accountIDs {
				x, _ := whole.Account(id)
				y, _ := cut.Account(id)
				x.Own.Hash, y.Own.Hash = 0, 0 // a call's is of its frame
				for i := range x.Limits {
					// Which entry decided is the one thing that differs.
					x.Limits[i].DecisionID, y.Limits[i].DecisionID, x.Limits[i].Revision, y.Limits[i].Revision = "", "", 0, 0
					if a, b := x.Limits[i].Lease, y.Limits[i].Lease; a != nil && b != nil && a.Counts.Recalls < b.Counts.Recalls {
						calledBack = true
						b.Counts.Recalls = a.Counts.Recalls
					}
				}
				if diff := cmp.Diff(x, y); diff != "" {
					t.Fatalf("account %s: -whole +cut\n%s", id, diff)
				}
			}
		}
		compare()
		if len(asks) > 0 && !calledBack {
			x, y := withAsks(whole, wholeVerdicts, seq, lease.Gateway{2}, 1), withAsks(cut, cutVerdicts, seq, lease.Gateway{2}, 1)
			if diff := cmp.Diff(x, y); diff != "" {
				t.Fatalf("answers: -whole +cut\n%s", diff)
			}
			compare()
		}
	})
}
