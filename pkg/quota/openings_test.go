package quota

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// newOpenDesk has acme make 5 calls under a plan without limits, of which one is of the
// model m, with 7 input tokens in all.
func newOpenDesk(t *testing.T) *desk {
	d := newLeaseDesk(t)
	d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	d.apply(Entry{Control: freeAndPro("v1", nil, nil)})
	calls := n("acme", d.now, 5)
	calls[2].Model = "m"
	calls[3].Quantities.Set(usage.InputTokens, 7)
	d.number++
	d.apply(Entry{Batch: batchOf(1, d.number, calls)})
	return d
}

func (d *desk) useOf(limit string) LimitUse {
	d.t.Helper()
	u, _ := d.s.Account("acme")
	for _, l := range u.Limits {
		if l.LimitID == limit {
			return l
		}
	}
	d.t.Fatalf("there is no %s", limit)
	return LimitUse{}
}

// A limit that nothing has counted for lacks what was used before it: the state says
// what, and takes it once.
func TestANewLimitTakesWhatWasUsedBeforeIt(t *testing.T) {
	t.Parallel()
	d := newOpenDesk(t)
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{perDay("l")}, nil)})
	since := d.s.Sequence()
	d.calls(d.now, n("acme", d.now, 1)...)
	open := d.s.Openings()
	day := d.s.windows[2].at
	want := []Opening{{Account: "acme", Meter: usage.Calls, Window: usage.Day, WindowStart: day, Since: since}}
	if diff := cmp.Diff(want, open); diff != "" || d.s.Open() != 1 {
		t.Fatal(diff)
	}
	d.is("until then it has what it counted", d.useOf("free/l").Used, int64(1))
	open[0].Used, open[0].Previous = 5, 2
	for name, wrong := range map[string]func(*Opening){
		"of another counter": func(o *Opening) { o.Since-- }, "of another window": func(o *Opening) { o.WindowStart -= 24 * 3600 * second }, "of another kind": func(o *Opening) { o.Window = usage.Hour },
		"of other calls": func(o *Opening) { o.Filter.Models = []string{"m"} }, "of another meter": func(o *Opening) { o.Meter = usage.InputTokens }, "of nobody": func(o *Opening) { o.Account = "nobody" },
		"of none": func(o *Opening) { o.Since = 0 },
	} {
		o := open[0]
		wrong(&o)
		d.apply(Entry{Control: &Control{Openings: []Opening{o}}})
		if d.useOf("free/l").Used != 1 || d.s.Open() != 1 {
			t.Errorf("what is %s was taken", name)
		}
	}
	for range 2 { // two owners may say it
		fx := d.apply(Entry{Control: &Control{Openings: open}})
		d.is("used", d.useOf("free/l").Used, int64(6))
		d.is("before", d.useOf("free/l").Previous, int64(2))
		if len(fx.Decisions) > 1 {
			t.Errorf("%+v", fx.Decisions)
		}
	}
	d.is("verdict", d.useOf("free/l").Verdict, usage.Deny)
	d.is("open", d.s.Open(), 0)
}

func TestWhatTheStateProvesIsNotAskedOfTheLedger(t *testing.T) {
	t.Parallel()
	life := func(m usage.Meter, models ...string) usage.Limit {
		return usage.Limit{ID: "l", Meter: m, Window: usage.Lifetime, Amount: 1000, Filter: usage.Filter{Models: models}}
	}
	for name, c := range map[string]struct {
		limit usage.Limit
		used  int64 // -1: it is open
	}{
		"all calls for ever":             {life(usage.Calls), 5},
		"all tokens for ever":            {life(usage.InputTokens), 7},
		"a meter that was not reported":  {life(usage.OutputTokens), 0},
		"a meter of its own":             {life("pages"), 0},
		"not reported, today":            {with(perDay("l"), func(l *usage.Limit) { l.Meter = usage.OutputTokens }), 0},
		"some calls for ever":            {life(usage.Calls, "m"), -1},
		"all calls today":                {perDay("l"), -1},
		"tokens today":                   {with(perDay("l"), func(l *usage.Limit) { l.Meter = usage.InputTokens }), -1},
		"not reported, of other calls":   {life(usage.OutputTokens, "m"), 0},
		"the tier exact, of all tokens":  {with(life(usage.InputTokens), func(l *usage.Limit) { l.Tier = usage.TierExact }), 7},
		"the tier exact, of calls today": {with(perDay("l"), func(l *usage.Limit) { l.Tier = usage.TierExact }), -1},
	} {
		d := newOpenDesk(t)
		d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{c.limit}, nil)})
		if open := d.s.Open() == 1; open != (c.used < 0) || !open && d.useOf("free/l").Used != c.used {
			t.Errorf("%s: open %t, used %d", name, open, d.useOf("free/l").Used)
		}
	}
	// An account that has used nothing needs no reading, as the many of an import.
	d := newOpenDesk(t)
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{perDay("l")}, nil)})
	d.accounts(usage.Account{ID: "new", Plan: "free"})
	d.is("open", d.s.Open(), 1)
	// Of corrected sums it is not known when and of which calls they were.
	d = newOpenDesk(t)
	d.apply(Entry{Control: &Control{Correction: &Correction{Account: "acme", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: 3}}}}})
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{life(usage.Calls)}, nil)})
	d.is("open after a correction", d.s.Open(), 1)
}

// Until it is known how much is left of an exact limit nothing of it is handed out: who
// asks hears nothing, and asks again.
func TestNothingIsHandedOutOfAnExactLimitThatIsOpen(t *testing.T) {
	t.Parallel()
	d := newOpenDesk(t)
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{exactly(8)}, nil)})
	ask := func(seq uint64, need int64) *Effects {
		return d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: "free/rpm", WindowStart: d.s.windows[0].at, Ask: lease.Ask{Gateway: anna, Seq: seq, Need: need, Sent: lease.Micros(d.now)}}}})
	}
	if fx := ask(1, 1); len(fx.Answers) != 0 || d.s.Allowances() != 0 {
		t.Fatalf("%+v", fx.Answers)
	}
	open := d.s.Openings()
	open[0].Used = 5
	d.apply(Entry{Control: &Control{Openings: open}})
	if fx := ask(2, 4); len(fx.Answers) != 1 || fx.Answers[0].Verdict != lease.DeniedFinal {
		t.Errorf("of 8, 5 are used: %+v", fx.Answers)
	}
	if fx := ask(3, 3); len(fx.Answers) != 1 || fx.Answers[0].Granted != 3 {
		t.Errorf("of 8, 5 are used: %+v", fx.Answers)
	}
}

// What is open follows its counter: to another name, into retirement and back; and ends
// with its window.
func TestWhatIsOpenFollowsItsCounter(t *testing.T) {
	t.Parallel()
	d := newOpenDesk(t)
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{perDay("l"), with(perDay("m"), func(l *usage.Limit) { l.Window = usage.Minute })}, nil)})
	open := d.s.Openings()
	d.is("open", len(open), 2)
	d.apply(Entry{Control: freeAndPro("v3", []usage.Limit{with(perDay("other"), func(l *usage.Limit) { l.Meter = usage.OutputTokens }), perDay("renamed")}, nil)})
	d.is("the minute's is retired", d.s.Open(), 1)
	if diff := cmp.Diff(open, d.s.Openings()); diff != "" {
		t.Error(diff)
	}
	d.moveTo("pro")
	d.calls(d.now, n("acme", d.now, 1)...)
	open[0].Used, open[1].Used = 5, 5
	d.apply(Entry{Control: &Control{Openings: open}})
	d.is("nothing is open", len(d.s.Openings()), 0)
	d.moveTo("free")
	d.is("used", d.useOf("free/renamed").Used, int64(6))

	d = newOpenDesk(t)
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{with(perDay("m"), func(l *usage.Limit) { l.Window = usage.Minute })}, nil)})
	open = d.s.Openings()
	d.now += 60 * second
	d.calls(d.now, n("acme", d.now, 1)...)
	d.is("the window has ended", d.s.Open(), 0)
	open[0].Used = 5
	d.apply(Entry{Control: &Control{Openings: open}})
	d.is("used", d.useOf("free/m").Used, int64(1))
}

// 100,000 accounts that are given a new limit at once are open one by one, in little
// memory, and closed by entries of a bounded size.
func TestAHugeApplyOpensCountersInLittleMemory(t *testing.T) {
	t.Parallel()
	s := crowd(20_000, &PlanSet{Version: "v1", Plans: []usage.Plan{{ID: "free"}}})
	seq := s.Sequence()
	apply := func(e Entry) *Effects {
		seq++
		e.Sequence, e.Time = seq, noon
		return s.Apply(e)
	}
	apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	for k, b := range zipfBatches(20, 1000, 20_000, false) {
		b.Number = uint64(k + 1)
		apply(Entry{Batch: b})
	}
	used := 0
	for i := range s.accounts {
		used += int(min(1, s.accounts[i].admitted))
	}
	apply(Entry{Control: &Control{PlanSet: &PlanSet{Version: "v2", Plans: []usage.Plan{{ID: "free", Limits: []usage.Limit{perDay("l")}}}}}})
	if s.Open() != used {
		t.Fatalf("%d are open, %d accounts have used something", s.Open(), used)
	}
	for open := s.Openings(); len(open) > 0; {
		part := open[:min(MaxOpenings, len(open))]
		if fx := apply(Entry{Control: &Control{Openings: part}}); fx.Invalid != nil {
			t.Fatal(fx.Invalid)
		}
		open = open[len(part):]
	}
	if s.Open() != 0 {
		t.Errorf("%d are open", s.Open())
	}
	if fx := apply(Entry{Control: &Control{Openings: make([]Opening, MaxOpenings+1)}}); fx.Invalid == nil {
		t.Error("an entry of any size is folded")
	}
	if fx := apply(Entry{Control: &Control{Openings: []Opening{{Account: "a", Meter: usage.Calls, Window: usage.Day, Used: -1}}}}); fx.Invalid == nil {
		t.Error("less than nothing was used")
	}
}
