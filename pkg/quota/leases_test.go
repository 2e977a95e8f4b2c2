package quota

import (
	"bytes"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func exactly(amount int64) usage.Limit {
	return usage.Limit{ID: "rpm", Meter: usage.Calls, Window: usage.Minute, Amount: amount, Tier: usage.TierExact, WarnPercent: 80}
}

var (
	anna = lease.Gateway{11}
	bert = lease.Gateway{12}
)

// desk tells a shard with the account acme and what gateways ask of it.
type desk struct {
	runs bool // it goes on with the state that it has, not with what is read of it
	*teller
	now  usage.Micros
	said map[lease.Gateway]LeaseAnswer
}

func newLeaseDesk(t *testing.T, limits ...usage.Limit) *desk {
	d := &desk{teller: newTeller(t, limits...), now: noon, said: map[lease.Gateway]LeaseAnswer{}}
	d.accounts(usage.Account{ID: "acme", Plan: "free"})
	return d
}

// apply folds an entry, and goes on with what a snapshot of it gives.
func (d *desk) apply(e Entry) *Effects {
	d.t.Helper()
	fx := *d.teller.apply(d.now, e)
	for _, a := range fx.Answers {
		d.said[a.Gateway] = a
	}
	data := d.s.AppendBinary(nil)
	read, err := Read(data)
	if err != nil || !bytes.Equal(read.AppendBinary(nil), data) || read.Hash() != d.s.Hash() {
		d.t.Fatalf("a snapshot is read as something else: %v", err)
	}
	a, okA := read.NextTimer()
	b, okB := d.s.NextTimer()
	if a != b || okA != okB {
		d.t.Fatalf("the timer is at %d, %t, read again %d, %t", b, okB, a, okA)
	}
	if !d.runs {
		d.s = read
	}
	return &fx
}

func (d *desk) ask(m lease.Ask) (LeaseAnswer, *Effects) {
	d.t.Helper()
	m.Sent = lease.Micros(d.now)
	start := d.s.windows[0].at
	fx := d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: "free/rpm", WindowStart: start, Ask: m}}})
	return d.said[m.Gateway], fx
}

// leased calls of acme in a frame of the gateway.
func (d *desk) leased(g lease.Gateway, number uint64, calls int) *Effects {
	d.t.Helper()
	b := batchOf(1, number, n("acme", d.now, calls))
	b.Producer = dedup.Producer(g)
	b.Flags.Values = make([]int64, calls)
	for i := range b.Flags.Values {
		b.Flags.Values[i] = int64(usage.FromLease)
	}
	return d.apply(Entry{Batch: b})
}

func (d *desk) state() lease.State {
	d.t.Helper()
	u, _ := d.s.Account("acme")
	if u.Limits[0].Lease == nil {
		d.t.Fatal("there is no allowance")
	}
	return *u.Limits[0].Lease
}

func (d *desk) is(what string, got, want any) {
	d.t.Helper()
	if got != want {
		d.t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestALeaseIsGrantedOfWhatIsLeftAndItsCallsAreCountedOnce(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.now += 5 * second
	d.calls(d.now, n("acme", d.now, 2)...) // before anybody asked
	a, _ := d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 6})
	d.is("granted", a.Granted, int64(6))
	d.is("the window's end", a.WindowEnd, noon+60*second)
	d.is("settled", d.state().Settled, int64(2))
	d.leased(anna, 1, 3)
	d.is("settled by the count", d.state().Settled, int64(5))
	d.is("outstanding", d.state().Outstanding, int64(3))
	d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 6, Used: 5})
	d.is("settled by the gateway's word", d.state().Settled, int64(7))
	d.leased(anna, 2, 2)
	d.is("settled, told before it is counted", d.state().Settled, int64(7))
	d.is("allowances", d.s.Allowances(), 1)
	d.is("sums of meters", len(d.s.LeaseSums()), 1)
	d.is("in sum", d.s.LeaseSums()[usage.Calls], d.state())
	b, fx := d.ask(lease.Ask{Gateway: bert, Seq: 1, Need: 4})
	d.is("bert", b.Verdict, lease.DeniedFinal)
	d.is("what the entry added", fx.Leases, lease.Counts{DeniedFinal: 1})
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Room != 3 || fx.Decisions[0].Tier != usage.TierExact || b.Decision == nil || b.Decision.ID != fx.Decisions[0].ID {
		t.Fatalf("a call of 4 was refused, one of 3 may pass: %+v, %+v", fx.Decisions, b.Decision)
	}
	first := fx.Decisions[0].ID
	d.now += second
	b, fx = d.ask(lease.Ask{Gateway: bert, Seq: 2, Need: 5})
	if len(fx.Decisions) != 0 || b.Decision == nil || b.Decision.ID != first {
		t.Fatalf("nothing has changed: %+v, %+v", fx.Decisions, b.Decision)
	}
	d.ask(lease.Ask{Gateway: bert, Seq: 3, Need: 2})
	fx = d.leased(anna, 3, 1)
	d.is("settled", d.state().Settled, int64(8))
	fx = d.leased(bert, 1, 2)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Room != 0 || fx.Decisions[0].Used != 10 {
		t.Fatalf("all is spent: %+v", fx.Decisions)
	}
}

func TestTheNextWindowHasAnAllowanceOfItsOwn(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.now = noon + 60*second - 300_000
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 10})
	ask := LeaseAsk{Account: "acme", LimitID: "free/rpm", WindowStart: noon + 60*second, Ask: lease.Ask{Gateway: bert, Seq: 1, Need: 4, Sent: lease.Micros(d.now)}}
	d.apply(Entry{Asks: []LeaseAsk{ask}})
	d.is("bert, whose clock is ahead", d.said[bert].Verdict, lease.Waiting)
	at, _ := d.s.NextTimer()
	d.is("the timer", at, noon+60*second)
	d.now = at
	d.apply(Entry{})
	d.is("bert at the window's begin", d.said[bert].Granted, int64(4))
	d.is("anna's window", d.state().Settled, int64(0))
	ask.WindowStart, ask.Gateway = noon, anna
	d.apply(Entry{Asks: []LeaseAsk{ask}})
	d.is("anna, who is late", d.said[anna].Verdict, lease.Ended)
	ask.WindowStart = noon + 180*second
	d.apply(Entry{Asks: []LeaseAsk{ask}})
	d.is("anna, who is early", d.said[anna].Verdict, lease.Ended)
}

func TestAProducersCompleteEndGivesItsLeasesBack(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 10})
	d.leased(anna, 1, 3)
	p := dedup.Producer(anna)
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 1}})
	d.is("outstanding after an end that is not complete", d.state().Outstanding, int64(7))
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 2, Complete: true}})
	d.is("outstanding while a frame is missing", d.state().Outstanding, int64(7))
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 1, Complete: true}})
	d.is("outstanding", d.state().Outstanding, int64(0))
	d.is("settled", d.state().Settled, int64(3))
	a, _ := d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 10, Need: 1})
	d.is("its word from before", a.Verdict, lease.Ended)
	d.leased(anna, 2, 1)
	d.is("a call that comes all the same", d.state().Settled, int64(4))
}

// A gateway that was killed says by its marks how much it can have used: of limits of
// all meters, since reservations are below the marks, too.
func TestAKilledProducersMarksGiveBackWhatIsBeyondThem(t *testing.T) {
	t.Parallel()
	tokens := exactly(100)
	tokens.ID, tokens.Meter = "out", usage.OutputTokens
	d := newLeaseDesk(t, exactly(10), tokens)
	ask := func(limit string, m lease.Ask) {
		m.Sent = lease.Micros(d.now)
		d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: limit, WindowStart: noon, Ask: m}}})
	}
	ask("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 8})
	ask("free/out", lease.Ask{Gateway: anna, Seq: 1, Need: 90})
	ask("free/rpm", lease.Ask{Gateway: bert, Seq: 1, Need: 2})
	out := func() [2]int64 {
		u, _ := d.s.Account("acme")
		return [2]int64{u.Limits[0].Lease.Outstanding, u.Limits[1].Lease.Outstanding}
	}
	d.leased(anna, 1, 3)
	d.is("outstanding", out(), [2]int64{7, 90})
	p := dedup.Producer(anna)
	marks := &LeaseMarks{Marks: []LeaseMark{
		{"acme", "free/rpm", noon, 5}, {"acme", "free/rpm", noon - 60*second, 10}, {"acme", "free/none", noon, 10}, {"nobody", "free/rpm", noon, 10},
	}}
	// A frame is missing: its calls are below the mark.
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 2, Marks: marks}})
	d.is("of calls two may have been under way, of tokens there was no mark", out(), [2]int64{2 + 2, 0})
	d.is("settled", d.state().Settled, int64(3))
	a, _ := d.ask(lease.Ask{Gateway: bert, Seq: 2, Known: 2, Need: 3})
	d.is("bert", a.Granted, int64(5))
	// Marks count also where all calls were counted: one may be under way still.
	ask("free/out", lease.Ask{Gateway: bert, Seq: 1, Need: 90})
	q := dedup.Producer(bert)
	d.apply(Entry{Control: &Control{Closed: &q, Complete: true, Marks: &LeaseMarks{Marks: []LeaseMark{{"acme", "free/rpm", noon, 5}, {"acme", "free/out", noon, 40}}}}})
	d.is("after an end in order", out(), [2]int64{2 + 5, 40})
}

func TestACorrectionChangesSumsCountersAndALiveBlock(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.accounts(usage.Account{ID: "acme", Plan: "free", Parent: "org"})
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 10})
	if fx := d.leased(anna, 1, 10); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny {
		t.Fatalf("got %+v", fx.Decisions)
	}
	c := &Control{ID: "act", Correction: &Correction{Account: "acme", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: -4}, {Meter: usage.InputTokens, Value: 7}}}}
	fx := d.apply(Entry{Control: c})
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].Used != 6 || !fx.Corrected {
		t.Fatalf("got %+v", fx)
	}
	if again := d.apply(Entry{Control: c}); !again.Repeated || again.Corrected {
		t.Fatalf("an act is done once: %+v", again)
	}
	d.is("settled", d.state().Settled, int64(6))
	u, _ := d.s.Account("acme")
	d.is("used", u.Limits[0].Used, int64(6))
	d.is("tokens", u.Own.Meters[usage.InputTokens], int64(7))
	d.is("adjusted tokens", u.Own.Adjusted[usage.InputTokens], int64(7))
	d.is("adjusted calls", u.Own.Adjusted[usage.Calls], int64(-4))
	d.is("admitted", u.Own.Admitted, int64(10))
	org, _ := d.s.Account("org")
	d.is("the organisation's own", org.Own.Adjusted[usage.Calls], int64(0))
	d.is("the organisation's all", org.All.Adjusted[usage.Calls], int64(-4))
	d.is("in total", d.s.Total().Adjusted[usage.Calls], int64(-4))
	a, _ := d.ask(lease.Ask{Gateway: bert, Seq: 1, Need: 4})
	d.is("bert", a.Granted, int64(4))
}

func TestTiersAndTheirTermsAreChecked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*usage.Limit)
		valid  bool
	}{
		"exact by default terms":     {func(l *usage.Limit) {}, true},
		"exact by terms of its own":  {func(l *usage.Limit) { l.Lease = usage.LeaseTerms{Term: second, Patience: second} }, true},
		"exact that hands out again": {func(l *usage.Limit) { l.Lease.ReleaseAfter = second }, false},
		"exact with an exposure":     {func(l *usage.Limit) { l.Lease.MaxExposure = 1 }, false},
		"leased": {func(l *usage.Limit) {
			l.Tier, l.Lease = usage.TierLeased, usage.LeaseTerms{ReleaseAfter: 1, MaxExposure: 1}
		}, true},
		"leased without an exposure":    {func(l *usage.Limit) { l.Tier, l.Lease = usage.TierLeased, usage.LeaseTerms{ReleaseAfter: 1} }, false},
		"leased that is never released": {func(l *usage.Limit) { l.Tier, l.Lease = usage.TierLeased, usage.LeaseTerms{MaxExposure: 1} }, false},
		"a negative term":               {func(l *usage.Limit) { l.Lease.Term = -1 }, false},
		"the longest patience":          {func(l *usage.Limit) { l.Lease.Patience = usage.MaxLeaseSpan }, true},
		"a longer one":                  {func(l *usage.Limit) { l.Lease.Patience = usage.MaxLeaseSpan + 1 }, false},
		"more than can be handed out":   {func(l *usage.Limit) { l.Amount = lease.MaxUnits + 1 }, false},
		"terms where nothing is leased": {func(l *usage.Limit) { l.Tier, l.Lease.Term = usage.TierEventual, second }, false},
	} {
		l := exactly(10)
		c.change(&l)
		fx := New(Options{}).Apply(Entry{Sequence: 1, Time: noon, Control: &Control{PlanSet: &PlanSet{Plans: []usage.Plan{{ID: "free", Limits: []usage.Limit{l}}}}}})
		if (fx.Invalid == nil) != c.valid {
			t.Errorf("%s: %v", name, fx.Invalid)
		}
	}
}

func TestAPlanChangeFollowsTheAllowanceOrEndsIt(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 6})
	d.leased(anna, 1, 2)
	b, _ := d.ask(lease.Ask{Gateway: bert, Seq: 1, Need: 9})
	d.is("bert, who wants too much", b.Verdict, lease.DeniedFinal)
	// Another limit comes before it, and there is more.
	other := perMinute(100)
	other.ID = "first"
	plans := func(version string, limits ...usage.Limit) *Effects {
		return d.apply(Entry{Control: &Control{PlanSet: &PlanSet{Version: version, Plans: []usage.Plan{{ID: "free", Limits: limits}}}}})
	}
	fx := plans("v2", other, exactly(20))
	d.is("bert is told", d.said[bert].Verdict, lease.Open)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].Amount != 20 {
		t.Fatalf("got %+v", fx.Decisions)
	}
	u, _ := d.s.Account("acme")
	d.is("outstanding", u.Limits[1].Lease.Outstanding, int64(4))
	d.is("amount", u.Limits[1].Lease.Amount, int64(20))
	// Leased instead of exact is the same allowance under other terms.
	l := exactly(20)
	l.Tier, l.Lease = usage.TierLeased, usage.LeaseTerms{Term: second, ReleaseAfter: second, MaxExposure: 100}
	plans("v3", l)
	d.now += 20 * second
	d.apply(Entry{})
	d.now += 20 * second
	d.apply(Entry{})
	d.is("given up", d.state().Exposure, int64(4))
	// A tier that is not leased ends it, and its gateways are told.
	l = exactly(20)
	l.Tier = usage.TierEventual
	plans("v4", l)
	d.is("anna is told", d.said[anna].Verdict, lease.Ended)
	if _, due := d.s.NextTimer(); due {
		t.Error("nothing is due")
	}
	d.leased(anna, 2, 1)
	plans("v5", exactly(20))
	c, _ := d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 6, Need: 1})
	d.is("anna's old lease", c.Verdict, lease.Ended)
	d.ask(lease.Ask{Gateway: lease.Gateway{13}, Seq: 1, Need: 17})
	d.is("what was counted is used", d.state().Settled, int64(3))
	d.is("granted of the rest", d.said[lease.Gateway{13}].Granted, int64(17))
}

func TestAnAccountThatIsClosedIsGrantedNothingAndSaysWhatItUsed(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 6})
	d.apply(Entry{Control: &Control{Accounts: []usage.Account{{ID: "acme", Closed: true}}}})
	a, _ := d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 6, Used: 4, Need: 1})
	d.is("anna", a.Verdict, lease.DeniedFinal)
	if a.Decision != nil {
		t.Errorf("a closed account has no verdicts: %+v", a.Decision)
	}
	d.is("settled", d.state().Settled, int64(4))
	d.apply(Entry{Control: &Control{Accounts: []usage.Account{{ID: "acme", Plan: "free"}}}})
	a, _ = d.ask(lease.Ask{Gateway: anna, Seq: 3, Known: 6, Used: 4, Need: 4})
	d.is("anna, when it is open again", a.Granted, int64(10))
}

func TestANewOwnerSaysAgainWhatStands(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.ask(lease.Ask{Gateway: bert, Seq: 1, Need: 6})
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 11})
	all := d.s.Resume()
	if len(all) != 2 || all[0].Gateway != anna || all[0].Verdict != lease.DeniedFinal || all[0].Decision == nil || all[1].Granted != 6 || all[1].WindowEnd != noon+60*second {
		t.Fatalf("got %+v", all)
	}
	d.is("the decision", all[0].Decision.ID, d.said[anna].Decision.ID)
}

func TestAsksOfWhatIsNotLeasedAreToldSo(t *testing.T) {
	t.Parallel()
	eventual := perMinute(10)
	eventual.ID = "soft"
	life := exactly(10)
	life.ID, life.Window = "life", usage.Lifetime
	d := newLeaseDesk(t, exactly(10), eventual, life)
	for name, ask := range map[string]LeaseAsk{
		"no such account":       {Account: "nobody", LimitID: "free/rpm", WindowStart: noon},
		"no such limit":         {Account: "acme", LimitID: "free/none", WindowStart: noon},
		"a limit that counts":   {Account: "acme", LimitID: "free/soft", WindowStart: noon},
		"no window begins then": {Account: "acme", LimitID: "free/rpm", WindowStart: noon + 1},
		"a lifetime has none":   {Account: "acme", LimitID: "free/life", WindowStart: noon},
	} {
		ask.Ask = lease.Ask{Gateway: anna, Seq: 3, Need: 1, Sent: lease.Micros(noon)}
		fx := d.apply(Entry{Asks: []LeaseAsk{ask}})
		if len(fx.Answers) != 1 || fx.Answers[0].Verdict != lease.Ended || fx.Answers[0].Seq != 3 || fx.Answers[0].LimitID != ask.LimitID {
			t.Errorf("%s: %+v", name, fx.Answers)
		}
	}
	fx := d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: "free/life", Ask: lease.Ask{Gateway: anna, Seq: 1, Need: 4, Sent: lease.Micros(noon)}}}})
	if len(fx.Answers) != 1 || fx.Answers[0].Granted != 4 || fx.Answers[0].WindowEnd != 0 {
		t.Errorf("of a lifetime: %+v", fx.Answers)
	}
	// What no gateway can mean is said to be wrong, and the other ask is folded.
	d.seq++
	at := Entry{Sequence: d.seq, Time: noon, Asks: []LeaseAsk{
		{Account: "acme", LimitID: "free/life", Ask: lease.Ask{Gateway: bert, Seq: 1, Need: -1}},
		{Account: "acme", LimitID: "free/rpm", WindowStart: noon, Ask: lease.Ask{Gateway: bert, Seq: 1, Need: 1, Sent: lease.Micros(noon)}},
	}}
	if fx := d.s.Apply(at); fx.Invalid == nil || len(fx.Answers) != 1 || fx.Answers[0].Granted != 1 {
		t.Errorf("got %v, %+v", fx.Invalid, fx.Answers)
	}
}

func TestCallsOfOthersAndOfNoLeaseAreSettledBesideIt(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 4})
	d.calls(d.now, n("acme", d.now, 3)...) // another producer, without the flag
	s := d.state()
	d.is("outside", s.Counts.Outside, int64(3))
	d.is("outstanding", s.Outstanding, int64(4))
	// With the flag and without a lease it is no less used.
	d.leased(bert, 1, 2)
	d.is("outside", d.state().Counts.Outside, int64(5))
	a, _ := d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 4, Need: 2})
	d.is("denied, for there is 1 left", a.Verdict, lease.DeniedFinal)
	fx := d.calls(d.now, n("acme", d.now, 5)...)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Room != 0 || fx.Decisions[0].Verdict != usage.Deny {
		t.Fatalf("got %+v", fx.Decisions)
	}
}

func TestTheLedgerSaysByWhichRulesItIsFolded(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	if c := d.s.Core(); c.Version != 0 || c.Horizon != dedup.DefaultHorizon {
		t.Errorf("before: %+v", c)
	}
	call := n("acme", noon, 1)
	call[0].Source, call[0].EventID = "s", "1"
	foreign := func() *Effects { return d.apply(Entry{Batch: batchOf(0, 0, call)}) }
	foreign()
	core := Core{Version: CoreVersion, Horizon: 10 * second}
	d.apply(Entry{Control: &Control{Core: &core}})
	d.is("the rules", d.s.Core(), core)
	d.is("a copy within the horizon", foreign().Duplicates, 1)
	d.now += 12 * second
	d.is("a copy beyond it", foreign().Duplicates, 0)
	for name, c := range map[string]Core{"none": {Horizon: 1}, "no horizon": {Version: 1}} {
		d.seq++
		if fx := d.s.Apply(Entry{Sequence: d.seq, Time: d.now, Control: &Control{Core: &c}}); fx.Invalid == nil || d.s.Core() != core {
			t.Errorf("%s: %v, %+v", name, fx.Invalid, d.s.Core())
		}
	}
	if same := New(Options{Shard: 7, Horizon: 99 * second}); same.Core() == core {
		t.Error("what nobody said is no rule")
	}
}

// A program that does not know the rules would count otherwise than one that does, and
// nobody would notice.
func TestNothingIsFoldedByAnOlderProgramWhereNewerRulesBegin(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.calls(d.now, n("acme", d.now, 3)...)
	before, at, now := d.s.Hash(), d.s.Sequence(), d.s.Now()
	stands := func(what string, fx *Effects, err bool) {
		t.Helper()
		if (fx.Newer != nil) != err || fx.Invalid != nil || fx.Admitted != 0 || len(fx.Decisions) != 0 || d.s.Hash() != before || d.s.Sequence() != at || d.s.Now() != now {
			t.Errorf("%s: %+v; the shard stands at %d, %d", what, fx, d.s.Sequence(), d.s.Now())
		}
	}
	next := Entry{Sequence: d.seq + 1, Time: d.now + 100*second, Control: &Control{ID: "upgrade", Core: &Core{Version: CoreVersion + 1}}}
	fx := d.s.Apply(next)
	stands("the entry that says so", fx, true)
	if want := (NewerError{Shard: d.s.Number(), Sequence: d.seq + 1, Version: CoreVersion + 1}); *fx.Newer != want || !strings.Contains(fx.Newer.Error(), "run a newer version") {
		t.Errorf("got %v", fx.Newer)
	}
	call := batchOf(0, 0, n("acme", d.now, 1))
	stands("a call after it", d.s.Apply(Entry{Sequence: d.seq + 2, Time: d.now, Batch: call}), true)
	stands("an entry from before", d.s.Apply(Entry{Sequence: d.seq, Time: d.now, Batch: call}), false)
	restarted, err := Read(d.s.AppendBinary(nil))
	if err != nil {
		t.Fatal(err)
	}
	if fx := restarted.Apply(next); fx.Newer == nil {
		t.Error("a restart reads over it")
	}
}

func TestACorrectionBelongsToTheWindowsOfItsTime(t *testing.T) {
	t.Parallel()
	filtered := perMinute(100)
	filtered.ID, filtered.Filter.Models = "big", []string{"m1"}
	d := newLeaseDesk(t, perMinute(100), filtered)
	d.now += 30 * second
	d.calls(d.now, append(n("acme", d.now, 5), n("acme", d.now-40*second, 6)...)...)
	correct := func(c Correction) (cur, prev, big int64, late int) {
		c.Account = "acme"
		fx := d.apply(Entry{Control: &Control{Correction: &c}})
		u, _ := d.s.Account("acme")
		return u.Limits[0].Used, u.Limits[0].Previous, u.Limits[1].Used, fx.Late
	}
	by := func(n int64) []usage.Quantity { return []usage.Quantity{{Meter: usage.Calls, Value: n}} }
	check := func(what string, got func() (int64, int64, int64, int), want [4]int64) {
		a, b, c, late := got()
		d.is(what, [4]int64{a, b, c, int64(late)}, want)
	}
	check("of now", func() (int64, int64, int64, int) { return correct(Correction{Adjustments: by(-2)}) }, [4]int64{3, 6, 0, 0})
	check("of the window before", func() (int64, int64, int64, int) { return correct(Correction{Time: noon - 1, Adjustments: by(-4)}) }, [4]int64{3, 2, 0, 0})
	check("of long ago", func() (int64, int64, int64, int) {
		return correct(Correction{Time: noon - 61*second, Adjustments: by(-4)})
	}, [4]int64{3, 2, 0, 1})
	check("of the future", func() (int64, int64, int64, int) {
		return correct(Correction{Time: noon + 3600*second, Adjustments: by(1)})
	}, [4]int64{4, 2, 0, 0})
	check("of a model", func() (int64, int64, int64, int) { return correct(Correction{Model: "m1", Adjustments: by(3)}) }, [4]int64{7, 2, 3, 0})
	check("of more than there is", func() (int64, int64, int64, int) { return correct(Correction{Adjustments: by(-99)}) }, [4]int64{0, 2, 3, 0})
	u, _ := d.s.Account("acme")
	d.is("admitted", u.Own.Admitted, int64(11))
	for name, c := range map[string]Correction{
		"no account":       {Adjustments: by(1)},
		"the overflow":     {Account: OverflowAccount, Adjustments: by(1)},
		"no adjustment":    {Account: "acme"},
		"a meter twice":    {Account: "acme", Adjustments: append(by(1), by(2)...)},
		"nothing":          {Account: "acme", Adjustments: by(0)},
		"too much":         {Account: "acme", Adjustments: by(-usage.MaxQuantity - 1)},
		"no meter":         {Account: "acme", Adjustments: []usage.Quantity{{Value: 1}}},
		"a time before":    {Account: "acme", Time: -1, Adjustments: by(1)},
		"seventeen meters": {Account: "acme", Adjustments: make([]usage.Quantity, 17)},
	} {
		d.seq++
		if fx := d.s.Apply(Entry{Sequence: d.seq, Time: d.now, Control: &Control{Correction: &c}}); fx.Invalid == nil || fx.Corrected {
			t.Errorf("%s is folded", name)
		}
	}
}

func TestACorrectionOfReadingsStopsAtZeroAndIsKnownApart(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.accounts(usage.Account{ID: "acme", Parent: "org"})
	c := n("acme", noon, 1)
	c[0].Quantities.Set(usage.InputTokens, 5)
	c[0].Quantities.Set("images", 3)
	d.calls(noon, c...)
	d.apply(Entry{Control: &Control{Correction: &Correction{Account: "acme", Adjustments: []usage.Quantity{
		{Meter: usage.InputTokens, Value: -8}, {Meter: "images", Value: 2}, {Meter: "new", Value: 1}, {Meter: usage.Calls, Value: -1},
	}}}})
	acme, _ := d.s.Account("acme")
	org, _ := d.s.Account("org")
	for name, x := range map[string]Totals{"own": acme.Own, "all": acme.All, "org": org.All, "total": d.s.Total()} {
		for m, want := range map[usage.Meter][2]int64{usage.InputTokens: {0, -5}, "images": {5, 2}, "new": {1, 1}, usage.Calls: {0, -1}} {
			d.is(name+" "+string(m), [2]int64{x.Meters[m], x.Adjusted[m]}, want)
		}
		d.is(name+" admitted", x.Admitted, int64(1))
	}
	if org.Own.Adjusted != nil {
		t.Errorf("the organisation's own: %v", org.Own.Adjusted)
	}
}
