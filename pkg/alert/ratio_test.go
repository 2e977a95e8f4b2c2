package alert

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const second = usage.Micros(1_000_000)

// day is where the tests' stream time begins.
const day = 1_700_000_000 * second

func plain() Rule {
	r := DefaultRule()
	r.Window, r.Quiet, r.For, r.ResolveAfter, r.NoTrafficAfter = 10*time.Second, 30*time.Second, 3*time.Second, 5*time.Second, time.Minute
	return r
}

func newRatio(t interface{ Fatal(...any) }, r Rule) *Ratio {
	d, err := NewRatio(r, ScopeGlobal)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// feed observes calls of accounts [from, to) at stream time at.
func feed(d *Ratio, from, to int, code usage.Code, at usage.Micros) []usage.Alert {
	out := d.Advance(at, at)
	for i := from; i < to; i++ {
		d.Observe(fmt.Appendf(nil, "a%d", i), code, at)
	}
	return out
}

func TestASpikeFiresOnceAndResolvesOnce(t *testing.T) {
	t.Parallel()
	d := newRatio(t, plain())
	var got []usage.Alert
	for s := range usage.Micros(60) {
		at := day + s*second
		got = append(got, feed(d, 0, 100, "", at)...)
		if s >= 20 && s < 40 {
			got = append(got, feed(d, 0, 30, usage.QuotaExceeded, at)...)
		}
		if s == 20 {
			got = append(got, feed(d, 30, 35, usage.PaymentFailed, at)...)
		}
	}
	if len(got) != 2 {
		t.Fatalf("%d transitions, want firing and resolved: %+v", len(got), got)
	}
	fire, resolve := got[0], got[1]
	// In the bucket of second 20, so breached from boundary 21, and 3 s later for good.
	if fire.Transition != usage.AlertFiring || fire.StartedAt != day+21*second || fire.At != day+24*second {
		t.Errorf("fired %+v", fire)
	}
	if fire.Refused != 35 || fire.Active != 100 || fire.Value != 0.35 || fire.Threshold != 0.2 {
		t.Errorf("numbers of %+v", fire)
	}
	if diff := cmp.Diff([]usage.AlertCode{{Code: usage.QuotaExceeded, Accounts: 30}, {Code: usage.PaymentFailed, Accounts: 5}}, fire.Codes); diff != "" {
		t.Errorf("codes: %s", diff)
	}
	if len(fire.Accounts) != 10 || fire.Accounts[0] != (usage.AlertAccount{Account: "a0", Code: usage.QuotaExceeded, Refusals: 4}) {
		t.Errorf("accounts: %+v", fire.Accounts)
	}
	if want := "35 of 100 active accounts (35%) began to be refused with 402 within 10s, the threshold is 20%; codes: QUOTA_EXCEEDED 30, PAYMENT_FAILED 5"; fire.Summary != want {
		t.Errorf("summary %q", fire.Summary)
	}
	// The beginnings leave the window at 31, but the retries go on to 40.
	if resolve.Transition != usage.AlertResolved || resolve.StartedAt != fire.StartedAt || resolve.At != day+55*second || resolve.Reason != usage.ResolvedRecovered || resolve.StillRefused != 0 || resolve.PeakRefused != 35 {
		t.Errorf("resolved %+v", resolve)
	}
	if want := "no account of this alert gets 402s any more, of 35"; resolve.Summary != want {
		t.Errorf("summary %q", resolve.Summary)
	}
}

func TestRetriesOfRefusedAccountsNeverCountAgain(t *testing.T) {
	t.Parallel()
	d := newRatio(t, plain())
	// Half of the accounts have been refused for ever and retry every 29 s,
	// longer than the window, shorter than quiet: they began when the first of
	// the log was read, and that episode is over after 16 s.
	for s := range usage.Micros(40) {
		at := day + s*second
		if s == 0 || s == 29 {
			feed(d, 50, 100, usage.CreditsDepleted, at)
		}
		for _, a := range feed(d, 0, 50, "", at) {
			if a.At > day+16*second {
				t.Fatalf("second %d: %+v", s, a)
			}
		}
		if st := d.Stats(); s > 12 && st.Refused != 0 {
			t.Fatalf("second %d: %+v", s, st)
		}
	}
	// One that stayed away for longer than quiet begins anew.
	at := day + 100*second
	d.Advance(at, at)
	d.Observe([]byte("a50"), usage.CreditsDepleted, at)
	d.Advance(at+second, at+second)
	if st := d.Stats(); st.Refused != 1 {
		t.Fatalf("after quiet: %+v", st)
	}
}

func TestOnlyWhatAnswers402Counts(t *testing.T) {
	t.Parallel()
	for _, code := range []usage.Code{usage.RateLimited, usage.CostExceedsLimit, usage.BillingStateUnknown, "SOMETHING_ELSE"} {
		d := newRatio(t, plain())
		for s := range usage.Micros(20) {
			if got := feed(d, 0, 100, code, day+s*second); got != nil {
				t.Fatalf("%s: %+v", code, got)
			}
		}
		if st := d.Stats(); st.Active != 100 || st.Refused != 0 || st.StillRefused != 0 {
			t.Fatalf("%s: %+v", code, st)
		}
	}
}

func TestFewAccountsDoNotFire(t *testing.T) {
	t.Parallel()
	d := newRatio(t, plain())
	for s := range usage.Micros(20) {
		if got := feed(d, 0, 4, usage.QuotaExceeded, day+s*second); got != nil {
			t.Fatalf("4 accounts of 4, at least 5 are wanted: %+v", got)
		}
	}
}

// firing returns a detector that fired at day+4 s.
func firing(t *testing.T, r Rule) *Ratio {
	t.Helper()
	d := newRatio(t, r)
	var got []usage.Alert
	for s := range usage.Micros(5) {
		got = append(got, feed(d, 0, 10, usage.QuotaExceeded, day+s*second)...)
	}
	if len(got) != 1 || got[0].At != day+4*second {
		t.Fatalf("did not fire: %+v", got)
	}
	return d
}

func TestNoTrafficIsNotHealthy(t *testing.T) {
	t.Parallel()
	d := firing(t, plain())
	if got := d.Advance(day+64*second, day+64*second); got != nil {
		t.Fatalf("resolved without traffic: %+v", got)
	}
	got := d.Advance(day+66*second, day+66*second)
	if len(got) != 1 || got[0].Reason != usage.ResolvedNoTraffic || got[0].At != day+65*second || got[0].Value != 0 {
		t.Fatalf("a minute after the last call: %+v", got)
	}
	if !strings.HasPrefix(got[0].Summary, "no calls for 1m:") {
		t.Errorf("summary %q", got[0].Summary)
	}

	r := plain()
	r.NoTrafficAfter = 0
	d = firing(t, r)
	if got := d.Advance(day+1_000_000*second, day+1_000_000*second); got != nil {
		t.Fatalf("0 is never: %+v", got)
	}
}

func TestALagHoldsResolvedBackAndSaysSo(t *testing.T) {
	t.Parallel()
	d := firing(t, plain())
	s := usage.Micros(5)
	for ; s < 45; s++ { // the accounts do not call again: they are refused until quiet is over
		at := day + s*second
		if got := d.Advance(at, at+31*second); got != nil {
			t.Fatalf("second %d, 31 s behind: %+v", s, got)
		}
		d.Observe([]byte("fine"), "", at)
	}
	if !d.Stats().Held {
		t.Error("held back, and does not say so")
	}
	at := day + s*second
	got := d.Advance(at, at+30*second)
	if len(got) != 1 || got[0].Transition != usage.AlertResolved || got[0].LagSeconds != 30 || d.Stats().Held {
		t.Fatalf("30 s behind is allowed: %+v", got)
	}

	d = newRatio(t, plain())
	var fired []usage.Alert
	for s := range usage.Micros(5) {
		at := day + s*second
		fired = append(fired, d.Advance(at, at+100*second)...)
		for i := range 10 {
			d.Observe(fmt.Appendf(nil, "a%d", i), usage.QuotaExceeded, at)
		}
	}
	if len(fired) != 1 || !strings.HasSuffix(fired[0].Summary, "; the pipeline is 100 s behind") {
		t.Fatalf("firing behind time: %+v", fired)
	}
}

func TestALongGapCostsNoTimeAndFiresNothing(t *testing.T) {
	t.Parallel()
	d := newRatio(t, plain())
	feed(d, 0, 100, "", day)
	// A thousand years in steps of a second would take minutes.
	at := day + 1000*365*86400*second
	if got := d.Advance(at, at); got != nil {
		t.Fatal(got)
	}
	if st := d.Stats(); st.Active != 0 || st.Tracked != 0 {
		t.Fatalf("%+v", st)
	}
}

func TestMemoryIsBoundedAndTheSampleKeepsTheRatio(t *testing.T) {
	t.Parallel()
	r := plain()
	r.MaxAccounts = 2000
	d := newRatio(t, r)
	var got []usage.Alert
	for s := range usage.Micros(10) {
		at := day + s*second
		got = append(got, d.Advance(at, at)...)
		for i := range 20_000 {
			code := usage.Code("")
			if i%4 == 0 {
				code = usage.SpendCapReached
			}
			d.Observe(fmt.Appendf(nil, "account-%d", i), code, at)
		}
		if st := d.Stats(); st.Tracked > 2000 {
			t.Fatalf("%d accounts are kept, at most 2000 are allowed", st.Tracked)
		}
	}
	if len(got) != 1 || !got[0].Estimated || !strings.HasPrefix(got[0].Summary, "about ") {
		t.Fatalf("%+v", got)
	}
	if a := got[0]; a.Active < 16_000 || a.Active > 24_000 || a.Value < 0.22 || a.Value > 0.28 {
		t.Errorf("20,000 accounts, a quarter refused, are estimated as %d, %.3f", a.Active, a.Value)
	}
	if st := d.Stats(); st.Sampling < 16 {
		t.Errorf("%+v", st)
	}
	// When all of them are gone every account is kept again.
	at := day + 200*second
	d.Advance(at, at)
	if st := d.Stats(); st.Sampling != 1 || st.Tracked != 0 {
		t.Errorf("%+v", st)
	}
}

func TestCallsTooLateForTheWindowAreCountedApart(t *testing.T) {
	t.Parallel()
	d := newRatio(t, plain())
	feed(d, 0, 1, "", day+100*second)
	if d.Observe([]byte("x"), usage.QuotaExceeded, day+90*second) {
		t.Error("10 s late for a window of 10 s")
	}
	if !d.Observe([]byte("x"), usage.QuotaExceeded, day+91*second) {
		t.Error("9 s late fits into a window of 10 s")
	}
	if st := d.Stats(); st.Late != 1 {
		t.Errorf("%+v", st)
	}
}

func TestRulesThatMakeNoSenseAreRefused(t *testing.T) {
	t.Parallel()
	r := DefaultRule()
	if err := r.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Rule){
		"name": func(r *Rule) { r.Name = "a b" }, "step": func(r *Rule) { r.Step = 7 * time.Second }, "threshold": func(r *Rule) { r.Threshold = 1.1 },
		"min": func(r *Rule) { r.MinAccounts = 0 }, "hysteresis": func(r *Rule) { r.Hysteresis = 1 }, "quiet": func(r *Rule) { r.Quiet = time.Second },
		"lag": func(r *Rule) { r.MaxLag = 0 }, "accounts": func(r *Rule) { r.MaxAccounts = 1 }, "top": func(r *Rule) { r.Top = 21 }, "for": func(r *Rule) { r.For = -1 },
	} {
		r := DefaultRule()
		change(&r)
		if r.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// event is an entry of a random log with one call.
type event struct {
	stream, time usage.Micros
	account      string
	code         usage.Code
}

func randomLog(t *rapid.T) (Rule, []event) {
	r := plain()
	n := rapid.IntRange(1, 6).Draw(t, "window")
	r.Window = time.Duration(n) * time.Second
	r.Quiet = r.Window + time.Duration(rapid.IntRange(0, 8).Draw(t, "quiet"))*time.Second
	r.For = time.Duration(rapid.IntRange(0, 3).Draw(t, "for")) * time.Second
	r.ResolveAfter = time.Duration(rapid.IntRange(0, 4).Draw(t, "resolve")) * time.Second
	r.NoTrafficAfter = time.Duration(rapid.IntRange(0, 20).Draw(t, "no traffic")) * time.Second
	r.MinAccounts = rapid.IntRange(1, 3).Draw(t, "min")
	codes := []usage.Code{"", "", usage.QuotaExceeded, usage.TrialEnded, usage.RateLimited}
	log := make([]event, rapid.IntRange(1, 150).Draw(t, "length"))
	now := day
	for i := range log {
		now += usage.Micros(rapid.SampledFrom([]int{0, 50_000, 400_000, 1_000_000, 3_000_000, 15_000_000}).Draw(t, "pause"))
		log[i] = event{
			stream: now, time: now - usage.Micros(rapid.SampledFrom([]int{0, 0, 0, 700_000, 2_500_000, 9_000_000}).Draw(t, "late")),
			account: rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g"}).Draw(t, "account"),
			code:    rapid.SampledFrom(codes).Draw(t, "code"),
		}
	}
	return r, log
}

// model says the same as Ratio by going through the whole log at every step.
type model struct {
	r    Rule
	log  []event // those that came in time
	ends []end
}

// end of an episode, after so many entries of the log: who is not refused any more
// begins again with the next refusal.
type end struct {
	after int
	at    usage.Micros
}

func (m *model) at(boundary usage.Micros) (active, begun, still int) {
	window, quiet := usage.Micros(m.r.Window.Microseconds()), usage.Micros(m.r.Quiet.Microseconds())
	in := func(t usage.Micros) bool { return t >= boundary-window && t < boundary }
	act, beg, ref := map[string]bool{}, map[string]usage.Micros{}, map[string]usage.Micros{}
	refusedIn, stuck := map[string]bool{}, map[string]bool{}
	ends := m.ends
	forget := func(entries int) {
		for ; len(ends) > 0 && ends[0].after == entries; ends = ends[1:] {
			for account, last := range ref {
				if last < ends[0].at-window && !(stuck[account] && last >= ends[0].at-quiet) {
					delete(ref, account)
					stuck[account] = false
				}
			}
		}
	}
	for i, e := range m.log {
		forget(i)
		step := e.time / second * second
		if in(step) {
			act[e.account] = true
		}
		if e.code.Status() != 402 {
			if last, ok := ref[e.account]; e.code == "" && ok && step > last {
				stuck[e.account] = false
			}
			continue
		}
		if last, ok := ref[e.account]; !ok || step-last > quiet {
			beg[e.account] = step
		}
		if last, ok := ref[e.account]; !ok || step > last {
			ref[e.account], stuck[e.account] = step, true
		}
		if in(step) {
			refusedIn[e.account] = true
		}
	}
	forget(len(m.log))
	for account, is := range stuck {
		if is && ref[account] >= boundary-quiet {
			refusedIn[account] = true
		}
	}
	for _, b := range beg {
		if in(b) {
			begun++
		}
	}
	return len(act), begun, len(refusedIn)
}

func TestWindowsAreThoseOfTheModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r, log := randomLog(t)
		d, m := newRatio(t, r), &model{r: r}
		for i, e := range log {
			before := d.m.EvaluatedTo
			for _, a := range d.Advance(e.stream, e.stream) {
				if a.Transition == usage.AlertResolved && a.Reason != usage.ResolvedNewWave {
					m.ends = append(m.ends, end{len(m.log), a.At})
				}
			}
			if got := d.m.EvaluatedTo; i > 0 && got > before {
				active, begun, still := m.at(got)
				if st := d.Stats(); st.Active != active || st.Refused != begun || st.StillRefused != still {
					t.Fatalf("entry %d, step %d: %+v, the model says %d active, %d begun, %d refused", i, (got-day)/second, st, active, begun, still)
				}
			}
			if d.Observe([]byte(e.account), e.code, e.time) {
				m.log = append(m.log, e)
			}
		}
	})
}

func TestTransitionsAlternateAndKeepTheirWaits(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r, log := randomLog(t)
		var last usage.Alert
		for _, a := range run(t, newRatio(t, r), log) {
			if (a.Transition == usage.AlertFiring) == (last.Transition == usage.AlertFiring) {
				t.Fatalf("%+v follows %+v", a, last)
			}
			switch a.Transition {
			case usage.AlertFiring:
				if a.At-a.StartedAt < usage.Micros(r.For.Microseconds()) || a.Refused < r.MinAccounts || a.Value < r.Threshold || a.StartedAt <= last.At && last.At != 0 && last.Reason != usage.ResolvedNewWave {
					t.Fatalf("%+v follows %+v", a, last)
				}
			case usage.AlertResolved:
				if a.StartedAt != last.StartedAt || a.At <= last.At || a.Reason == usage.ResolvedRecovered && a.StillRefused-a.RefusedBefore >= r.MinAccounts && 10*(a.StillRefused-a.RefusedBefore) > a.PeakRefused || a.Reason == usage.ResolvedRecovered && a.At-last.At < usage.Micros(r.ResolveAfter.Microseconds()) {
					t.Fatalf("%+v follows %+v", a, last)
				}
				if a.Active == 0 != (a.Reason == usage.ResolvedNoTraffic) {
					t.Fatalf("the reason of %+v", a)
				}
			}
			last = a
		}
	})
}

func run(t interface{ Fatal(...any) }, d *Ratio, log []event) []usage.Alert {
	var out []usage.Alert
	for _, e := range log {
		out = append(out, d.Advance(e.stream, e.stream)...)
		d.Observe([]byte(e.account), e.code, e.time)
	}
	return out
}

// A restart anywhere, reading again from Lookback before what was evaluated,
// gives the transitions that one run gives: none lost, none doubled, the same
// beginnings. (Counts of retries may be smaller: what was before is not read.)
func TestARestartGivesTheSameTransitions(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r, log := randomLog(t)
		strip := func(all []usage.Alert) []usage.Alert {
			for i := range all {
				all[i].Accounts = nil
			}
			return all
		}
		want := strip(run(t, newRatio(t, r), log))

		cut := rapid.IntRange(0, len(log)).Draw(t, "cut")
		d := newRatio(t, r)
		got := run(t, d, log[:cut])
		memory := d.Memory()
		from := 0
		for from < len(log) && log[from].stream < memory.EvaluatedTo-usage.Micros(r.Lookback().Microseconds()) {
			from++
		}
		d = newRatio(t, r)
		d.Restore(memory)
		got = strip(append(got, run(t, d, log[from:])...))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("cut at %d, read again from %d (-one run +restarted): %s", cut, from, diff)
		}
	})
}

func TestAdoptedStateOfAnotherAlerterIsGoneOnFrom(t *testing.T) {
	t.Parallel()
	d := newRatio(t, plain())
	feed(d, 0, 10, "", day)
	d.Adopt(&usage.Alert{Transition: usage.AlertFiring, StartedAt: day - 5*second, At: day})
	var got []usage.Alert
	for s := usage.Micros(1); s < 20; s++ {
		got = append(got, feed(d, 0, 10, "", day+s*second)...)
	}
	if len(got) != 1 || got[0].Transition != usage.AlertResolved || got[0].StartedAt != day-5*second {
		t.Fatalf("%+v", got)
	}
	d = firing(t, plain())
	d.Adopt(&usage.Alert{Transition: usage.AlertResolved, StartedAt: day + 1*second, At: day + 8*second, Reason: usage.ResolvedRecovered})
	if got := feed(d, 0, 10, "", day+9*second); got != nil {
		t.Fatalf("resolved by another: %+v", got)
	}
}

func BenchmarkObserve(b *testing.B) {
	d := newRatio(b, DefaultRule())
	ids := make([][]byte, 100_000)
	for i := range ids {
		ids[i] = fmt.Appendf(nil, "account-%d", i)
	}
	d.Advance(day, day)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		at := day + usage.Micros(i)
		if i%1000 == 0 {
			d.Advance(at, at)
		}
		d.Observe(ids[i%len(ids)], "", at)
		i++
	}
}
