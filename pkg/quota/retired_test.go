package quota

import (
	"fmt"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// perDay is a limit of 3 calls a day.
func perDay(id string) usage.Limit {
	return usage.Limit{ID: id, Meter: usage.Calls, Window: usage.Day, Amount: 3}
}

func with(l usage.Limit, change func(*usage.Limit)) usage.Limit {
	change(&l)
	return l
}

// free and pro are the plans of a set: the free one's limits, and those of the other.
func freeAndPro(version string, free, pro []usage.Limit) *Control {
	return &Control{PlanSet: &PlanSet{Version: version, Plans: []usage.Plan{{ID: "free", Limits: free}, {ID: "pro", Limits: pro}}}}
}

// A limit starts from what its account has used in the window, whatever the account's
// plan was meanwhile. In each story acme makes 2 calls under a limit of 3 a day, the
// limit goes away and comes back, and a call is made meanwhile: 3 are used, and the
// next is denied.
func TestALimitThatGoesAwayAndComesBackHasForgottenNothing(t *testing.T) {
	t.Parallel()
	move := func(plan string) *Control {
		return &Control{Accounts: []usage.Account{{ID: "acme", Plan: plan}}}
	}
	limits := []usage.Limit{perDay("l")}
	filtered := with(perDay("l"), func(l *usage.Limit) { l.Filter.Models = []string{"m1", "m2"} })
	for name, c := range map[string]struct {
		begin      []usage.Limit // of free
		away, back []*Control
		limit      string // which it is then
	}{
		"another plan and back":      {limits, []*Control{move("pro")}, []*Control{move("free")}, "free/l"},
		"no plan and back":           {limits, []*Control{move("")}, []*Control{move("free")}, "free/l"},
		"an unknown plan and back":   {limits, []*Control{move("gone")}, []*Control{move("free")}, "free/l"},
		"to and fro":                 {limits, []*Control{move("pro"), move("free"), move("pro"), move("free"), move("pro")}, []*Control{move("free")}, "free/l"},
		"removed from the plan":      {limits, []*Control{freeAndPro("v2", nil, nil)}, []*Control{freeAndPro("v3", limits, nil)}, "free/l"},
		"the plan removed":           {limits, []*Control{{PlanSet: &PlanSet{Version: "v2"}}}, []*Control{freeAndPro("v3", limits, nil)}, "free/l"},
		"renamed":                    {limits, nil, []*Control{freeAndPro("v2", []usage.Limit{perDay("r")}, nil)}, "free/r"},
		"removed, and added renamed": {limits, []*Control{freeAndPro("v2", nil, nil)}, []*Control{freeAndPro("v3", []usage.Limit{perDay("r")}, nil)}, "free/r"},
		"into another plan, renamed": {limits, nil, []*Control{freeAndPro("v2", limits, []usage.Limit{perDay("other"), perDay("x")}), move("pro")}, "pro/x"},
		"another amount and back":    {limits, []*Control{freeAndPro("v2", []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Amount = 100 })}, nil)}, []*Control{freeAndPro("v3", limits, nil)}, "free/l"},
		"another tier and back": {
			limits, []*Control{freeAndPro("v2", []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Tier = usage.TierExact })}, nil)}, []*Control{freeAndPro("v3", limits, nil)}, "free/l",
		},
		"another window and back": {
			limits, []*Control{freeAndPro("v2", []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Window = usage.Hour })}, nil)}, []*Control{freeAndPro("v3", limits, nil)}, "free/l",
		},
		"another filter and back": {
			limits, []*Control{freeAndPro("v2", []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Filter.Models = []string{"other"} })}, nil)}, []*Control{freeAndPro("v3", limits, nil)}, "free/l",
		},
		"the filter in another order": {
			[]usage.Limit{filtered}, nil, []*Control{freeAndPro("v2", []usage.Limit{with(filtered, func(l *usage.Limit) { l.Filter.Models = []string{"m2", "m1", "m2"} })}, nil)}, "free/l",
		},
		"filtered, away and back": {[]usage.Limit{filtered}, []*Control{move("pro")}, []*Control{move("free")}, "free/l"},
		"closed, opened under another plan and back": {
			limits, []*Control{{Accounts: []usage.Account{{ID: "acme", Closed: true}}}, move("pro")}, []*Control{move("free")}, "free/l",
		},
		"under another parent and back": {
			limits, []*Control{{Accounts: []usage.Account{{ID: "acme", Parent: "org", Plan: "pro"}}}}, []*Control{move("free")}, "free/l",
		},
		"for ever": {
			[]usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Window = usage.Lifetime })}, []*Control{move("pro")}, []*Control{move("free")}, "free/l",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newLeaseDesk(t)
			d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
			d.apply(Entry{Control: freeAndPro("v1", c.begin, nil)})
			call := func(models ...string) {
				calls := n("acme", d.now, len(models))
				for i := range calls {
					calls[i].Model = models[i]
				}
				d.number++
				d.apply(Entry{Batch: batchOf(1, d.number, calls)})
			}
			call("m1", "m2")
			for _, a := range c.away {
				d.apply(Entry{Control: a})
			}
			call("m1")
			for _, b := range c.back {
				d.apply(Entry{Control: b})
			}
			u, _ := d.s.Account("acme")
			for _, l := range u.Limits {
				if l.LimitID == c.limit {
					d.is("used", l.Used, int64(3))
					d.is("verdict", l.Verdict, usage.Deny)
					return
				}
			}
			t.Errorf("there is no %s: %+v", c.limit, u.Limits)
		})
	}
}

// The key's own limit, the team's and the organisation's: each account has its own
// counters, and a plan that changes above changes nothing below.
func TestTheCountersOfNestedAccountsOutliveTheirPlansEach(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	limit := []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Amount = 100 })}
	d.apply(Entry{Control: freeAndPro("v1", limit, nil)})
	tree := func(org, team, key string) {
		d.accounts(usage.Account{ID: "org", Plan: org}, usage.Account{ID: "team", Parent: "org", Plan: team}, usage.Account{ID: "key", Parent: "team", Plan: key})
	}
	tree("free", "free", "free")
	d.calls(d.now, n("key", d.now, 5)...)
	tree("pro", "free", "pro")
	d.calls(d.now, append(n("key", d.now, 7), n("team", d.now, 2)...)...)
	tree("free", "pro", "free")
	d.calls(d.now, n("key", d.now, 1)...)
	tree("free", "free", "free")
	d.accounts(usage.Account{ID: "key", Plan: "free"}) // leaves the team
	d.calls(d.now, n("key", d.now, 4)...)
	for id, want := range map[string]int64{"org": 15, "team": 15, "key": 17} {
		u, _ := d.s.Account(id)
		d.is(id, u.Limits[0].Used, want)
	}
}

// Corrections of usage reach a counter that no limit has at the moment.
func TestACorrectionReachesARetiredCounter(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	d.apply(Entry{Control: freeAndPro("v1", []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Amount = 100 })}, nil)})
	d.calls(d.now, n("acme", d.now, 3)...)
	d.moveTo("pro")
	d.apply(Entry{Control: &Control{Correction: &Correction{Account: "acme", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: -2}}}}})
	d.moveTo("free")
	u, _ := d.s.Account("acme")
	d.is("used", u.Limits[0].Used, int64(1))
}

// What nobody takes up is forgotten when its window ends, and costs nothing then.
func TestARetiredCounterEndsWithItsWindow(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	minute := with(perDay("m"), func(l *usage.Limit) { l.Window, l.Tier = usage.Minute, usage.TierExact })
	d.apply(Entry{Control: freeAndPro("v1", []usage.Limit{perDay("l"), minute}, nil)})
	d.askOf("free/m", lease.Ask{Gateway: anna, Seq: 1, Need: 2})
	d.calls(d.now, n("acme", d.now, 2)...)
	d.moveTo("pro")
	d.is("retired", len(d.s.retired[0]), 2)
	d.now += 60 * second
	d.apply(Entry{})
	d.is("after a minute", len(d.s.retired[0]), 1)
	d.is("times of allowances", len(d.s.leaseTimes), 0)
	d.now += 24 * 3600 * second
	d.apply(Entry{})
	d.is("after a day", len(d.s.retired), 0)
	if at, due := d.s.NextTimer(); due {
		t.Errorf("something is due at %d", at)
	}
}

// What gateways hold of an exact limit while it goes away is not handed out again when
// it comes back: they may have used it.
func TestWhatGatewaysHoldOfALimitThatGoesAwayIsReservedWhenItComesBack(t *testing.T) {
	t.Parallel()
	exact := func(id string, amount int64) []usage.Limit {
		return []usage.Limit{{ID: id, Meter: usage.Calls, Window: usage.Minute, Amount: amount, Tier: usage.TierExact}}
	}
	for name, c := range map[string]struct {
		away, back *Control
		limit      string
	}{
		"another plan and back":        {&Control{Accounts: []usage.Account{{ID: "acme", Plan: "pro"}}}, &Control{Accounts: []usage.Account{{ID: "acme", Plan: "free"}}}, "free/rpm"},
		"removed and added":            {freeAndPro("v2", nil, nil), freeAndPro("v3", exact("rpm", 10), nil), "free/rpm"},
		"removed and added, renamed":   {freeAndPro("v2", nil, nil), freeAndPro("v3", exact("other", 10), nil), "free/other"},
		"eventual and exact again":     {freeAndPro("v2", []usage.Limit{with(exact("rpm", 10)[0], func(l *usage.Limit) { l.Tier = usage.TierEventual })}, nil), freeAndPro("v3", exact("rpm", 10), nil), "free/rpm"},
		"another window, then renamed": {freeAndPro("v2", []usage.Limit{with(exact("rpm", 10)[0], func(l *usage.Limit) { l.Window = usage.Hour })}, nil), freeAndPro("v3", exact("x", 10), nil), "free/x"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newLeaseDesk(t)
			d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
			d.apply(Entry{Control: freeAndPro("v1", exact("rpm", 10), nil)})
			d.is("granted", d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 6}).Granted, int64(6))
			d.leased(anna, 1, 1)
			fx := d.apply(Entry{Control: c.away})
			if len(fx.Answers) != 1 || fx.Answers[0].Verdict != lease.Ended || fx.Answers[0].LimitID != "free/rpm" {
				t.Fatalf("anna is to hear that it is over: %+v", fx.Answers)
			}
			d.leased(anna, 2, 1) // it was under way
			fx = d.apply(Entry{Control: c.back})
			d.is("bert", d.askOf(c.limit, lease.Ask{Gateway: bert, Seq: 1, Need: 5}).Granted, int64(0))
			d.is("bert gets what nobody has", d.askOf(c.limit, lease.Ask{Gateway: bert, Seq: 2, Need: 4}).Granted, int64(4))
			// anna has used 3 in all and gives the other 3 back; one is not counted yet.
			d.is("its last word", d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 2, Known: 6, Used: 3, Returned: 3, Closing: true}).Verdict, lease.Ended)
			d.leased(anna, 3, 1)
			s := d.stateOf(c.limit)
			if s.Settled != 3 || s.Reserved != 0 || s.Outstanding != 4 {
				t.Errorf("3 are used, 4 are out: %+v", s)
			}
		})
	}
}

// A killed gateway's marks give back what it held of a limit that is away.
func TestMarksGiveBackWhatWasHeldOfALimitThatIsAway(t *testing.T) {
	t.Parallel()
	d := newMovingDesk(t, CoreVersion)
	d.apply(Entry{Control: freeAndPro("v2", []usage.Limit{exactly(10)}, nil)})
	d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 9})
	d.moveTo("pro")
	p := dedup.Producer(anna)
	d.apply(Entry{Control: &Control{Closed: &p, Marks: &LeaseMarks{Marks: []LeaseMark{{Account: "acme", LimitID: "free/rpm", WindowStart: d.s.windows[0].at, UsedAtMost: 2}}}}})
	d.moveTo("free")
	d.is("bert", d.askOf("free/rpm", lease.Ask{Gateway: bert, Seq: 1, Need: 8}).Granted, int64(8))
}

// By earlier rules a limit that comes back begins with nothing, for ever.
func TestByEarlierRulesALimitThatComesBackIsEmpty(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.apply(Entry{Control: &Control{Core: &Core{Version: keepsCounters - 1, Horizon: 3600 * second}}})
	d.apply(Entry{Control: freeAndPro("v1", []usage.Limit{with(perDay("l"), func(l *usage.Limit) { l.Amount = 100 })}, nil)})
	d.calls(d.now, n("acme", d.now, 3)...)
	d.moveTo("pro")
	d.moveTo("free")
	u, _ := d.s.Account("acme")
	d.is("used", u.Limits[0].Used, int64(0))
}

func TestRetiredCountersOfAnAccountAreBounded(t *testing.T) {
	t.Parallel()
	tl := newTeller(t)
	tl.apply(noon, Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	for i := range maxRetired + 20 {
		tl.plans("v", with(perDay("l"), func(l *usage.Limit) { l.Filter.Models = []string{string(rune('a' + i))} }))
	}
	if got := len(tl.s.retired[0]); got != maxRetired {
		t.Errorf("%d are kept", got)
	}
}

// What gateways hold under names that are remembered no longer stays reserved, also when
// the limit goes away and comes back, and after a restart.
func TestWhatIsForgottenOfFormerNamesStaysReservedWhenTheLimitComesBack(t *testing.T) {
	t.Parallel()
	for _, runs := range []bool{false, true} {
		t.Run(fmt.Sprintf("without a restart %t", runs), func(t *testing.T) { forgottenStays(t, runs) })
	}
}

func forgottenStays(t *testing.T, runs bool) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.runs = runs
	d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	d.apply(Entry{Control: freeAndPro("v1", []usage.Limit{{ID: "rpm", Meter: usage.Calls, Window: usage.Minute, Amount: 20, Tier: usage.TierExact}}, nil)})
	const rounds = maxFormers + 2
	holder := func(i int) lease.Gateway { return lease.Gateway{100, byte(i)} }
	for i := range rounds {
		d.is("granted", d.askOf("free/rpm", lease.Ask{Gateway: holder(i), Seq: 1, Need: 1}).Granted, int64(1))
		d.moveTo("pro")
		d.moveTo("free")
	}
	for i := range rounds {
		d.askOf("free/rpm", lease.Ask{Gateway: holder(i), Seq: 2, Known: 1, Returned: 1, Closing: true})
	}
	d.moveTo("pro")
	d.moveTo("free")
	d.is("the two that are forgotten may be used", d.askOf("free/rpm", lease.Ask{Gateway: bert, Seq: 1, Need: 19}).Granted, int64(0))
	d.is("the others came back", d.askOf("free/rpm", lease.Ask{Gateway: bert, Seq: 2, Need: 18}).Granted, int64(18))
}

// Of too many retired counters those are forgotten that the ledger can tell again; what
// gateways hold is not.
func TestOfTooManyRetiredCountersWhatGatewaysHoldIsKept(t *testing.T) {
	t.Parallel()
	tl := newTeller(t)
	tl.apply(noon, Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	limit := func(i int) usage.Limit {
		return usage.Limit{ID: "day", Meter: usage.Calls, Window: usage.Day, Amount: 3, Tier: usage.TierExact, Filter: usage.Filter{Models: []string{fmt.Sprint(i)}}}
	}
	granted := func(i int) (units int64) {
		g := lease.Gateway{100, byte(i >> 8), byte(i)}
		fx := tl.apply(noon, Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: "free/day", WindowStart: tl.s.windows[window.Day].at, Ask: lease.Ask{Gateway: g, Seq: 1, Sent: lease.Micros(noon), Need: 3}}}})
		for _, a := range fx.Answers {
			units += a.Granted
		}
		return units
	}
	rounds := maxRetired + 5
	for i := range rounds {
		tl.plans("v", limit(i))
		if got := granted(i); got != 3 {
			t.Fatalf("limit %d: a gateway got %d of 3", i, got)
		}
	}
	if _, err := Read(tl.s.AppendBinary(nil)); err != nil {
		t.Error(err)
	}
	for i := range rounds {
		tl.plans("v", limit(i))
		if got := granted(rounds + i); got != 0 {
			t.Fatalf("limit %d: the first gateway may have used all of it, and another got %d", i, got)
		}
	}
}
