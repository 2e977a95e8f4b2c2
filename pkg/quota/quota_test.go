package quota

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const second = usage.Micros(1_000_000)

// teller tells a shard's story entry by entry.
type teller struct {
	t      *testing.T
	s      *Shard
	seq    uint64
	number uint64
}

func newTeller(t *testing.T, limits ...usage.Limit) *teller {
	tl := &teller{t: t, s: New(Options{Shard: 7})}
	tl.plans("v1", limits...)
	return tl
}

func (tl *teller) apply(at usage.Micros, e Entry) *Effects {
	tl.t.Helper()
	tl.seq++
	e.Sequence, e.Time = tl.seq, at
	fx := tl.s.Apply(e)
	if fx.Invalid != nil {
		tl.t.Fatal(fx.Invalid)
	}
	return fx
}

func (tl *teller) plans(version string, limits ...usage.Limit) *Effects {
	tl.t.Helper()
	return tl.apply(max(tl.s.Now(), noon), Entry{Control: &Control{PlanSet: &PlanSet{Version: version, Plans: []usage.Plan{{ID: "free", Limits: limits}}}}})
}

func (tl *teller) accounts(as ...usage.Account) *Effects {
	tl.t.Helper()
	return tl.apply(tl.s.Now(), Entry{Control: &Control{Accounts: as}})
}

func (tl *teller) calls(at usage.Micros, calls ...usage.Call) *Effects {
	tl.t.Helper()
	tl.number++
	return tl.apply(at, Entry{Batch: batchOf(1, tl.number, calls)})
}

// n calls of an account at a time.
func n(account string, at usage.Micros, n int) []usage.Call {
	out := make([]usage.Call, n)
	for i := range out {
		out[i] = usage.Call{Account: account, Time: at + usage.Micros(i)}
	}
	return out
}

func perMinute(amount int64) usage.Limit {
	return usage.Limit{ID: "rpm", Meter: usage.Calls, Window: usage.Minute, Amount: amount, Tier: usage.TierEventual, Code: usage.RateLimited, WarnPercent: 80}
}

func TestADeniedAccountIsAllowedAtTheMinutesTurn(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, perMinute(10))
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	if _, due := tl.s.NextTimer(); due {
		t.Error("an account that is simply fine needs no timer")
	}
	fx := tl.calls(noon+5*second, n("acme", noon+4*second, 8)...)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Warn || fx.Decisions[0].Cause != noon+4*second+7 {
		t.Fatalf("got %+v", fx.Decisions)
	}
	fx = tl.calls(noon+6*second, n("acme", noon+5*second, 2)...)
	want := usage.Decision{
		ID: DecisionID(noon+6*second, 7, tl.seq, "acme", "free/rpm"), Account: "acme", LimitID: "free/rpm", Meter: usage.Calls,
		Verdict: usage.Deny, Code: usage.RateLimited, Revision: tl.seq, Shard: 7, Used: 10, Amount: 10, Window: usage.Minute,
		PeriodStart: noon, PeriodEnd: noon + 60*second, PlanVersion: "v1", DecidedAt: noon + 6*second, Cause: noon + 5*second + 1, WarnPercent: 80,
	}
	if diff := cmp.Diff([]usage.Decision{want}, fx.Decisions); diff != "" {
		t.Fatal(diff)
	}
	if at, due := tl.s.NextTimer(); !due || at != noon+60*second {
		t.Fatalf("the timer is at %d, %t", at, due)
	}
	if fx = tl.apply(noon+60*second-1, Entry{Control: &Control{}}); len(fx.Decisions) != 0 {
		t.Errorf("a microsecond too early: %+v", fx.Decisions)
	}
	fx = tl.apply(noon+60*second, Entry{Control: &Control{}})
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].Used != 0 || fx.Decisions[0].PeriodStart != noon+60*second || fx.Decisions[0].Code != "" {
		t.Fatalf("got %+v", fx.Decisions)
	}
	if fx = tl.apply(noon+61*second, Entry{}); len(fx.Decisions) != 0 {
		t.Errorf("a second owner's tick changes nothing: %+v", fx.Decisions)
	}
}

func TestTimersFireInTheOrderOfTimeAccountAndLimit(t *testing.T) {
	t.Parallel()
	hour := perMinute(1)
	hour.ID, hour.Window, hour.WarnPercent = "a-rph", usage.Hour, 0
	minute := perMinute(1)
	minute.WarnPercent = 0
	tl := newTeller(t, hour, minute)
	var accounts []usage.Account
	var calls []usage.Call
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(20) {
		id := fmt.Sprintf("account-%02d", i)
		accounts = append(accounts, usage.Account{ID: id, Plan: "free"})
		calls = append(calls, n(id, noon, 1)...)
	}
	tl.accounts(accounts...)
	if fx := tl.calls(noon+59*60*second, calls...); len(fx.Decisions) != 20 {
		t.Fatalf("the hour denies, the minute is past: %d decisions", len(fx.Decisions))
	}
	for i := range calls {
		calls[i].Time = noon + 59*60*second
	}
	tl.calls(noon+59*60*second+1, calls...)
	var got, want []string
	for _, d := range tl.apply(noon+2*3600*second, Entry{}).Decisions {
		got = append(got, d.Account+" "+d.LimitID+" "+d.Verdict.String())
	}
	for i := range 20 {
		want = append(want, fmt.Sprintf("account-%02d free/a-rph allow", i), fmt.Sprintf("account-%02d free/rpm allow", i))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

func TestALimitOfTheOrganisationDeniesForAllItsTeams(t *testing.T) {
	t.Parallel()
	month := perMinute(5)
	month.Window, month.WarnPercent = usage.Month, 0
	tl := newTeller(t, month)
	tl.accounts(usage.Account{ID: "key-1", Parent: "team"}, usage.Account{ID: "team", Parent: "org"}, usage.Account{ID: "org", Plan: "free"}, usage.Account{ID: "key-2", Parent: "org"})
	fx := tl.calls(noon, append(n("key-1", noon-10, 3), n("key-2", noon-5, 3)...)...)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Account != "org" || fx.Decisions[0].Used != 6 || fx.Decisions[0].Cause != noon-4 {
		t.Fatalf("got %+v", fx.Decisions)
	}
	for id, want := range map[string][2]int64{"key-1": {3, 3}, "key-2": {3, 3}, "team": {0, 3}, "org": {0, 6}} {
		if u, _ := tl.s.Account(id); u.Own.Admitted != want[0] || u.All.Admitted != want[1] {
			t.Errorf("%s: own %d, with those below %d, want %v", id, u.Own.Admitted, u.All.Admitted, want)
		}
	}
	if total := tl.s.Total(); total.Admitted != 6 {
		t.Errorf("each call once in the shard's total: %d", total.Admitted)
	}
}

func TestAPlanChangeKeepsWhatWasUsedAndUnblocks(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, perMinute(2))
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	tl.calls(noon, n("acme", noon, 3)...)
	fx := tl.plans("v2", perMinute(3))
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Amount != 3 || fx.Decisions[0].PlanVersion != "v2" || fx.Decisions[0].Cause != 0 {
		t.Fatalf("still denied, under another limit: %+v", fx.Decisions)
	}
	if fx = tl.plans("v2", perMinute(3)); len(fx.Decisions) != 0 {
		t.Errorf("the same plans again say nothing new: %+v", fx.Decisions)
	}
	if fx = tl.plans("v3", perMinute(10)); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].Used != 3 {
		t.Fatalf("got %+v", fx.Decisions)
	}
	tl.plans("v4", perMinute(3))
	if fx = tl.plans("v5"); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].LimitID != "free/rpm" {
		t.Fatalf("a limit that is gone denies nobody: %+v", fx.Decisions)
	}
}

func TestAClosedAccountIsNotDeniedAndOpeningItAgainIsNoRefill(t *testing.T) {
	t.Parallel()
	life := perMinute(2)
	life.Window, life.WarnPercent = usage.Lifetime, 0
	tl := newTeller(t, life)
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	tl.calls(noon, n("acme", noon, 3)...)
	if fx := tl.accounts(usage.Account{ID: "acme", Closed: true}); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow {
		t.Fatalf("got %+v", fx.Decisions)
	}
	if fx := tl.accounts(usage.Account{ID: "acme", Plan: "free"}); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Used != 3 {
		t.Fatalf("got %+v", fx.Decisions)
	}
}

func TestPlansTakeEffectAtTheirStreamTime(t *testing.T) {
	t.Parallel()
	tl := newTeller(t)
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	tl.apply(noon, Entry{Control: &Control{PlanSet: &PlanSet{Version: "v2", EffectiveAt: noon + 10*second, Plans: []usage.Plan{{ID: "free", Limits: []usage.Limit{perMinute(0)}}}}}})
	if at, due := tl.s.NextTimer(); !due || at != noon+10*second {
		t.Fatalf("the timer is at %d, %t", at, due)
	}
	if fx := tl.apply(noon+10*second-1, Entry{}); len(fx.Decisions) != 0 || tl.s.PlanVersion() != "v1" {
		t.Fatalf("too early: %+v", fx.Decisions)
	}
	if fx := tl.apply(noon+10*second, Entry{}); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || tl.s.PlanVersion() != "v2" {
		t.Fatalf("got %+v", fx.Decisions)
	}
	fx := tl.apply(noon+60*second, Entry{})
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].PeriodEnd != noon+120*second {
		t.Fatalf("nothing is allowed in the next minute either, and that is told: %+v", fx.Decisions)
	}
}

func TestLateAndFutureCalls(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, perMinute(100))
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	fx := tl.calls(noon+30*second, append(append(n("acme", noon-30*second, 2), n("acme", noon-90*second, 4)...), n("acme", noon+40*second, 8)...)...)
	if fx.Late != 4 || fx.Future != 8 || fx.Admitted != 14 {
		t.Errorf("late %d, future %d, admitted %d", fx.Late, fx.Future, fx.Admitted)
	}
	u, _ := tl.s.Account("acme")
	if u.Own.Admitted != 14 || u.Limits[0].Used != 8 || u.Limits[0].Previous != 2 {
		t.Errorf("got %+v", u)
	}
}

func TestSumsStopAtTheEndOfTheirRange(t *testing.T) {
	t.Parallel()
	l := perMinute(math.MaxInt64)
	l.Meter, l.Window = usage.Cost, usage.Lifetime
	tl := newTeller(t, l)
	tl.accounts(usage.Account{ID: "acme", Plan: "free"})
	calls := n("acme", noon, 3)
	for i := range calls {
		calls[i].Quantities.Set(usage.Cost, math.MaxInt64/2)
	}
	fx := tl.calls(noon, calls...)
	if fx.Overflows == 0 || len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Used != math.MaxInt64 {
		t.Errorf("got %+v", fx)
	}
	if u, _ := tl.s.Account("acme"); u.Own.Meters[usage.Cost] != math.MaxInt64 {
		t.Errorf("got %+v", u.Own)
	}
}

func TestWhatCannotBeFoldedIsRefusedWhole(t *testing.T) {
	t.Parallel()
	limit := func(change func(*usage.Limit)) *Control {
		l := perMinute(1)
		change(&l)
		return &Control{PlanSet: &PlanSet{Plans: []usage.Plan{{ID: "free", Limits: []usage.Limit{l}}}}}
	}
	long := make([]usage.Account, MaxDepth+1)
	for i := range long {
		long[i] = usage.Account{ID: fmt.Sprint("a", i), Parent: fmt.Sprint("a", i+1)}
	}
	for name, e := range map[string]Entry{
		"a circle":           {Control: &Control{Accounts: []usage.Account{{ID: "x", Parent: "y"}, {ID: "y", Parent: "x"}}}},
		"its own parent":     {Control: &Control{Accounts: []usage.Account{{ID: "x", Parent: "x"}}}},
		"a long path":        {Control: &Control{Accounts: long}},
		"an account twice":   {Control: &Control{Accounts: []usage.Account{{ID: "x"}, {ID: "x"}}}},
		"no account id":      {Control: &Control{Accounts: []usage.Account{{}}}},
		"an unknown window":  {Control: limit(func(l *usage.Limit) { l.Window = "fortnight" })},
		"an unknown tier":    {Control: limit(func(l *usage.Limit) { l.Tier = "precise" })},
		"a negative amount":  {Control: limit(func(l *usage.Limit) { l.Amount = -1 })},
		"a filter too long":  {Control: limit(func(l *usage.Limit) { l.Filter.Models = []string{strings.Repeat("m", MaxLimitBytes)} })},
		"the overflow":       {Control: &Control{Accounts: []usage.Account{{ID: OverflowAccount}}}},
		"no meter":           {Control: limit(func(l *usage.Limit) { l.Meter = "" })},
		"a call of nobody":   {Batch: batchOf(1, 1, []usage.Call{{Time: noon}, {Time: noon, Account: "x"}})},
		"a batch of nothing": {Batch: &Batch{Producer: dedup.Producer{1}, Number: 1}},
	} {
		s := New(Options{})
		e.Sequence, e.Time = 1, noon
		fx := s.Apply(e)
		if fx.Invalid == nil || s.Accounts() != 0 || s.Sequence() != 1 {
			t.Errorf("%s: %v, %d accounts, at %d", name, fx.Invalid, s.Accounts(), s.Sequence())
		}
	}
}

func TestACircleThroughAccountsThatAreKnownIsRefused(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	s.Apply(Entry{Sequence: 1, Time: noon, Control: &Control{Accounts: []usage.Account{{ID: "b", Parent: "a"}, {ID: "c", Parent: "b"}}}})
	if fx := s.Apply(Entry{Sequence: 2, Time: noon, Control: &Control{Accounts: []usage.Account{{ID: "a", Parent: "c"}}}}); fx.Invalid == nil {
		t.Error("a is its own ancestor")
	}
}

func TestAGapIsToldAndTheFrameCounted(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	s.Apply(Entry{Sequence: 1, Time: noon, Batch: batchOf(1, 1, n("a", noon, 1))})
	fx := s.Apply(Entry{Sequence: 2, Time: noon, Batch: batchOf(1, 4, n("a", noon, 1))})
	if fx.Frame != dedup.Gap || fx.Skipped != 2 || fx.Admitted != 1 {
		t.Errorf("got %+v", fx)
	}
}

func TestWhatIsMissingAtAProducersEndIsTold(t *testing.T) {
	t.Parallel()
	tl := newTeller(t)
	tl.calls(noon, n("a", noon, 1)...)
	p := dedup.Producer{1}
	if fx := tl.apply(noon, Entry{Control: &Control{ID: "1", Closed: &p, ClosedAt: 3}}); fx.Lost != 2 {
		t.Errorf("frames 2 and 3 never came: %d", fx.Lost)
	}
	if fx := tl.apply(noon, Entry{Control: &Control{ID: "1", Closed: &p, ClosedAt: 3}}); fx.Lost != 0 || !fx.Repeated {
		t.Errorf("said once, told once: %+v", fx)
	}
	if fx := tl.apply(noon, Entry{Control: &Control{ID: "2", Closed: &p, ClosedAt: 1}}); fx.Lost != 0 {
		t.Errorf("%d are missing of 1", fx.Lost)
	}
}

// A frame that was decoded stands in history, so it is counted: what a shard
// cannot take in is left out of one sum, never a call out of all.
func TestMetersBeyondTheBoundAreNotSummedUpAndTheirCallsCounted(t *testing.T) {
	t.Parallel()
	tl := newTeller(t)
	for i := 0; i < MaxMeters; i += 16 {
		c := usage.Call{Account: "a", Time: noon}
		for k := range 16 {
			c.Quantities.Set(usage.Meter(fmt.Sprint("own", i+k)), 1)
		}
		tl.calls(noon, c)
	}
	c := usage.Call{Account: "a", Time: noon}
	c.Quantities.Set("one.more", 5)
	c.Quantities.Set("own0", 1)
	c.Quantities.Set(usage.InputTokens, 7)
	fx := tl.calls(noon, c, usage.Call{Account: "a", Time: noon})
	if fx.Admitted != 2 || fx.Unmetered != 1 {
		t.Fatalf("got %+v", fx)
	}
	u, _ := tl.s.Account("a")
	if _, known := u.Own.Meters["one.more"]; known || u.Own.Meters["own0"] != 2 || u.Own.Meters[usage.InputTokens] != 7 {
		t.Errorf("got %v, %d, %d", known, u.Own.Meters["own0"], u.Own.Meters[usage.InputTokens])
	}
	// What callers made up does not keep the plans from changing.
	limit := perMinute(1)
	limit.Meter = "one.more"
	tl.plans("v2", limit)
	if tl.calls(noon, c); tl.s.PlanVersion() != "v2" {
		t.Error("the plans did not change")
	}
	if u, _ := tl.s.Account("a"); u.Own.Meters["one.more"] != 5 {
		t.Errorf("a meter that the plans name is summed up: %d", u.Own.Meters["one.more"])
	}
}

func TestCallsOfTooManyUnknownAccountsAreCountedTogether(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, perMinute(2))
	for i := 0; i < MaxUnknown; i += 4096 {
		var calls []usage.Call
		for k := range 4096 {
			calls = append(calls, usage.Call{Account: fmt.Sprint("u", i+k), Time: noon})
		}
		tl.calls(noon, calls...)
	}
	again, err := Read(tl.s.AppendBinary(nil))
	if err != nil {
		t.Fatal(err)
	}
	if tl.s.Unknown() != MaxUnknown || again.Unknown() != MaxUnknown {
		t.Fatalf("%d accounts are unknown, %d after a restart", tl.s.Unknown(), again.Unknown())
	}
	tl.accounts(usage.Account{ID: "u5", Plan: "free"}, usage.Account{ID: "set", Plan: "free"})
	tl.calls(noon, n("now.there.is.room", noon, 1)...)
	fx := tl.calls(noon, append(append(n("x", noon, 3), n("y", noon, 2)...), append(n("set", noon, 2), n("u7", noon, 1)...)...)...)
	if fx.Unplaced != 5 || fx.Admitted != 8 || len(fx.Decisions) != 1 || fx.Decisions[0].Account != "set" {
		t.Fatalf("got %+v", fx)
	}
	hash := uint64(0) // of the calls 0 to 4 of the newest frame
	for i := range 5 {
		hash += audit.RowHash(audit.FrameHash(audit.ProducerHash(ksuid.KSUID{1}.String()), 7, tl.number), i)
	}
	if u, _ := tl.s.Account(OverflowAccount); u.Own.Admitted != 5 || u.Own.Hash != hash {
		t.Errorf("got %+v", u)
	}
	if u, _ := tl.s.Account("u7"); u.Own.Admitted != 2 {
		t.Errorf("got %+v", u)
	}
	if total := tl.s.Total(); total.Admitted != MaxUnknown+1+8 {
		t.Errorf("%d calls in total", total.Admitted)
	}
}

func TestDecisionIDsAreKSUIDsOfTheStreamsTime(t *testing.T) {
	t.Parallel()
	at := usage.Micros(1_763_640_000_999_999)
	id, err := ksuid.Parse(DecisionID(at, 1, 2, "acme", "free/rpm"))
	if err != nil || id.Time().Unix() != int64(at)/1_000_000 {
		t.Errorf("%v: %s", err, id.Time().Format(time.RFC3339))
	}
	seen := map[string]bool{}
	for _, id := range []string{
		DecisionID(at, 1, 2, "acme", "free/rpm"), DecisionID(at, 2, 2, "acme", "free/rpm"), DecisionID(at, 1, 3, "acme", "free/rpm"),
		DecisionID(at, 1, 2, "acm", "efree/rpm"), DecisionID(at, 1, 2, "acme", "free/rph"),
	} {
		seen[id] = true
	}
	if len(seen) != 5 {
		t.Errorf("%d of 5 ids are different", len(seen))
	}
}

func TestTopAccountsComeInFallingOrder(t *testing.T) {
	t.Parallel()
	tl := newTeller(t)
	for i, id := range []string{"c", "a", "e", "b", "d"} {
		tl.calls(noon, n(id, noon, []int{3, 5, 1, 3, 4}[i])...)
	}
	var got []string
	for _, u := range tl.s.Top(4) {
		got = append(got, u.ID)
	}
	if diff := cmp.Diff([]string{"a", "d", "b", "c"}, got); diff != "" {
		t.Error(diff)
	}
	if len(tl.s.Top(99)) != 5 || len(tl.s.Top(0)) != 0 {
		t.Error("no more than there are, and none when none are wanted")
	}
}

func TestASnapshotThatIsDamagedIsRefused(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, perMinute(10))
	tl.accounts(usage.Account{ID: "acme", Plan: "free", Parent: "org"})
	tl.calls(noon, n("acme", noon, 3)...)
	data := tl.s.AppendBinary(nil)
	for i := range data {
		if _, err := Read(data[:i]); err == nil {
			t.Fatalf("cut at %d", i)
		}
		broken := append([]byte(nil), data...)
		broken[i] ^= 1
		if _, err := Read(broken); err == nil {
			t.Fatalf("bit flipped at %d", i)
		}
	}
}

func TestAppliesWithoutAllocating(t *testing.T) {
	// Not parallel: it counts the whole process's allocations.
	s := crowd(1000, onePlan(1<<40))
	batches := zipfBatches(8, 200, 1000, true)
	seq := s.Sequence()
	i := 0
	apply := func() {
		seq++
		b := batches[i%len(batches)]
		i++
		b.Number = seq
		s.Apply(Entry{Sequence: seq, Time: noon + 1000, Batch: b})
	}
	for range 32 {
		apply()
	}
	if got := testing.AllocsPerRun(100, apply); got > 0 {
		t.Errorf("%f allocations a frame", got)
	}
}

// Who publishes decisions says with the newest of them how far it is: so they
// must come in the same order from a state that was read from a snapshot.
func TestDecisionsOfAnEntryStandInTheOrderOfAccountAndLimit(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, perMinute(1), usage.Limit{ID: "always", Meter: usage.Calls, Window: usage.Lifetime, Amount: 1})
	tl.accounts(usage.Account{ID: "zeta", Plan: "free"}, usage.Account{ID: "alpha", Plan: "free"}, usage.Account{ID: "mid", Plan: "free"})
	fx := tl.calls(noon, append(append(n("zeta", noon, 1), n("alpha", noon, 1)...), n("mid", noon, 1)...)...)
	var got []string
	for _, d := range fx.Decisions {
		got = append(got, d.Account+" "+d.LimitID)
	}
	want := []string{"alpha free/always", "alpha free/rpm", "mid free/always", "mid free/rpm", "zeta free/always", "zeta free/rpm"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
