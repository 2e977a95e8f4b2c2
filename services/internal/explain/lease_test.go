package explain

import (
	"strings"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

var leaseNoon = usage.At(time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC))

// ask appends what a gateway says.
func (l *shardLog) ask(gateway ksuid.KSUID, a *tollkeeperv1.LeaseAsk) uint64 {
	l.t.Helper()
	a.Account, a.Limit, a.SentUnixMicros = "acme", "p/calls", int64(l.now)
	a.WindowStartUnixMicros = int64(usage.At(l.now.Time().Truncate(24 * time.Hour)))
	m, err := ledger.LeaseMessage(0, &tollkeeperv1.LeaseEntry{Gateway: gateway.Bytes(), Asks: []*tollkeeperv1.LeaseAsk{a}})
	if err != nil {
		l.t.Fatal(err)
	}
	return l.append(m)
}

func exactLog(t *testing.T) *shardLog {
	l := newShardLog(t, leaseNoon)
	l.plans("v1", 0, usage.Plan{ID: "p", Limits: []usage.Limit{{ID: "calls", Meter: usage.Calls, Window: usage.Day, Amount: 10, Tier: usage.TierExact}}})
	l.accounts(usage.Account{ID: "acme", Plan: "p"})
	return l
}

func (l *shardLog) only() usage.Decision {
	l.t.Helper()
	if len(l.decided) != 1 {
		l.t.Fatalf("decided was %+v", l.decided)
	}
	return l.decided[0]
}

func TestADenialOfAnExactLimitShowsTheLeases(t *testing.T) {
	t.Parallel()
	l := exactLog(t)
	first, second := ksuid.New(), ksuid.New()
	l.ask(first, &tollkeeperv1.LeaseAsk{Seq: 1, Need: 6})
	l.now += 1000
	l.ask(second, &tollkeeperv1.LeaseAsk{Seq: 1, Need: 4})
	l.now += 1000
	l.calls(first, 1, usage.Call{Time: l.now, Account: "acme", Status: 200, Flags: usage.FromLease}, usage.Call{Time: l.now, Account: "acme", Status: 200, Flags: usage.FromLease})
	l.ask(first, &tollkeeperv1.LeaseAsk{Seq: 2, Known: 6, Used: 6})
	l.snapshot()
	from := l.state.Sequence()
	l.now += 1000
	l.ask(second, &tollkeeperv1.LeaseAsk{Seq: 2, Known: 4, Used: 4})
	d := l.only()
	if d.Verdict != usage.Deny || d.Room != 0 || d.Used != 10 {
		t.Fatalf("decided was %+v", d)
	}
	for _, begin := range []uint64{0, from} {
		e, _ := l.explain(d, begin)
		if !e.Replay.Same || e.Reason.Kind != ReasonLease || !strings.Contains(e.Reason.Text, "all was used") {
			t.Errorf("from %d: %+v, %+v", begin, e.Replay, e.Reason)
		}
		// Two calls were counted; of the others gateways have only said that they were.
		if e.Fed.Used+e.Fed.Carried != 2 || e.Fed.Reported != 8 || e.Counter.After != 2 {
			t.Errorf("from %d: fed by %+v, counter %+v", begin, e.Fed, e.Counter)
		}
		if e.Allowance == nil || e.Allowance.Settled != 10 || e.Allowance.Outstanding != 0 || len(e.Allowance.Leases) != 2 {
			t.Fatalf("from %d: %+v", begin, e.Allowance)
		}
		used := map[string]int64{}
		for _, x := range e.Allowance.Leases {
			used[x.Gateway] = x.Used
			if x.State != "live" || x.Granted != x.Used || x.Expires <= l.now {
				t.Errorf("from %d: %+v", begin, x)
			}
		}
		if used[first.String()] != 6 || used[second.String()] != 4 {
			t.Errorf("from %d: used is %v", begin, used)
		}
	}
}

func TestADenialOfOneCallsNeedSaysWhoHoldsTheRest(t *testing.T) {
	t.Parallel()
	l := exactLog(t)
	holder, asker := ksuid.New(), ksuid.New()
	l.ask(holder, &tollkeeperv1.LeaseAsk{Seq: 1, Need: 9})
	l.now += 1000
	l.ask(asker, &tollkeeperv1.LeaseAsk{Seq: 1, Need: 3})
	for range 20 { // the holder says nothing; patience with it ends
		if l.now += 100_000; len(l.decided) == 0 {
			l.tick()
		}
	}
	d := l.only()
	if d.Verdict != usage.Deny || d.Room == 0 {
		t.Fatalf("decided was %+v", d)
	}
	e, _ := l.explain(d, 0)
	if !e.Replay.Same || e.Reason.Kind != ReasonLease || !strings.Contains(e.Reason.Text, "needed more than could be given, while 0 of 10 calls were used for certain, 9 were held by 2 gateways") {
		t.Errorf("%+v, %+v", e.Replay, e.Reason)
	}
	if e.Decision.Room != d.Room || e.Allowance == nil || e.Allowance.Outstanding != 9 || e.Fed.Reported != 0 {
		t.Errorf("%+v, %+v, %+v", e.Decision, e.Allowance, e.Fed)
	}
}

func TestACallWithoutALeaseThatReachesAnExactLimitIsTheCrossing(t *testing.T) {
	t.Parallel()
	l := exactLog(t)
	gateway := ksuid.New()
	l.ask(gateway, &tollkeeperv1.LeaseAsk{Seq: 1, Need: 9})
	l.ask(gateway, &tollkeeperv1.LeaseAsk{Seq: 2, Known: 9, Used: 9})
	l.now += 1000
	l.calls(ksuid.New(), 1, usage.Call{Time: l.now, Account: "acme", Status: 200})
	e, rows := l.explain(l.only(), 0)
	if !e.Replay.Same || e.Fed.Used != 1 || e.Fed.Reported != 9 || len(rows) != 1 {
		t.Errorf("%+v, %+v, %v", e.Replay, e.Fed, rows)
	}
}

func TestACorrectionStandsInTheTrailOfWhatItLedTo(t *testing.T) {
	t.Parallel()
	l := newShardLog(t, leaseNoon)
	l.plans("v1", 0, usage.Plan{ID: "p", Limits: []usage.Limit{{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Month, Amount: 100}}})
	l.accounts(usage.Account{ID: "acme", Plan: "p"}, usage.Account{ID: "acme/search", Parent: "acme"})
	p := ksuid.New()
	spend := func(number uint64, n int64) {
		c := usage.Call{Time: l.now, Account: "acme/search", Status: 200}
		c.Quantities.Set(usage.OutputTokens, n)
		l.calls(p, number, c)
		l.now += 1000
	}
	spend(1, 60)
	spend(2, 60)
	at := l.control(&tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{
		Account: "acme/search", Adjustments: []*tollkeeperv1.Quantity{{Meter: "output_tokens", Value: -60}}, Reason: "sent twice", Reference: "batch/17",
	}}})
	spend(3, 45)
	if len(l.decided) != 3 {
		t.Fatalf("decided was %+v", l.decided)
	}
	unblocked, blocked := l.decided[1], l.decided[2]
	e, rows := l.explain(unblocked, 0)
	if unblocked.Verdict != usage.Allow || unblocked.Revision != at || !e.Replay.Same || e.Reason.Kind != ReasonCorrection {
		t.Errorf("%+v, %+v, %+v", unblocked, e.Replay, e.Reason)
	}
	if want := "a correction by test brought output_tokens from 120 to 60 of 100: allow. usage of acme/search corrected: output_tokens -60 (sent twice; batch/17)"; e.Reason.Text != want {
		t.Errorf("the reason is %q", e.Reason.Text)
	}
	if e.Fed.Used != 120 || e.Fed.Adjusted != -60 || e.Fed.Calls != 2 || len(rows) != 3 || rows[2].Index != -1 || rows[2].Adds != -60 || rows[2].After != 60 {
		t.Errorf("%+v, %+v", e.Fed, rows)
	}
	e, rows = l.explain(blocked, 0)
	if !e.Replay.Same || e.Fed.Adjusted != -60 || e.Fed.Used != 165 || blocked.Used != 105 || e.Crossing == nil || len(rows) != 4 {
		t.Errorf("%+v, %+v, %+v", blocked, e.Fed, rows)
	}
	// Whoever reads the page is told who did it, and why.
	var c Call
	control, err := ledger.DecodeControl(l.entries[at-1].Header, l.entries[at-1].Data)
	if err != nil {
		t.Fatal(err)
	}
	actOf(&c, control)
	if c.Account != "acme/search" || c.Act == nil || c.Act.Author != "test" || c.Act.Reason != "sent twice" || c.Act.Reference != "batch/17" || c.Act.ID != control.GetId() {
		t.Errorf("the act is %+v", c.Act)
	}
}
