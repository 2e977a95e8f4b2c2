package console

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/conservation"
	"github.com/tollkeeper/tollkeeper/services/console/internal/counters"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// owned lets an owner of all shards answer until the test or stop ends it.
func (w *world) owned() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); w.own(ctx) }()
	stop = func() { cancel(); <-done }
	w.t.Cleanup(stop)
	return stop
}

// of reads the freshness of an answer.
func of(t *testing.T, url string) freshness.Freshness {
	t.Helper()
	return get[struct{ Freshness freshness.Freshness }](t, url).Freshness
}

func (w *world) audited(at time.Time) {
	w.t.Helper()
	bucket, err := w.js.KeyValue(w.t.Context(), ledger.AuditBucket)
	if err == nil {
		_, err = bucket.Put(w.t.Context(), ledger.AuditStatusKey, fmt.Appendf(nil, `{"at_unix_micros":%d,"whole":true,"points":[
			{"pair":"gateway-ledger","ok":true},{"pair":"ledger-counters","ok":true},{"pair":"ledger-history","ok":true,"at_unix_micros":%d}]}`, usage.At(at), usage.At(at)))
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// An account whose keys are refused was shown as open.
func TestARemovedAccountIsNotOpen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	defer w.owned()()
	w.publish(okCall("umbrella", 1, 1), okCall("stranger", 1, 1))
	less := demoPlans()
	less.Accounts = less.Accounts[:len(less.Accounts)-1] // without umbrella
	w.apply(less)
	base := w.start(Options{})
	status := func(id string) (status, verdict string) {
		a := get[struct{ Status, Verdict string }](t, base+"/v1/accounts/"+url.PathEscape(id))
		return a.Status, a.Verdict
	}
	for id, want := range map[string][2]string{"umbrella": {"removed", "deny"}, "stranger": {"unnamed", "allow"}, "hooli": {"open", "allow"}} {
		if s, v := status(id); s != want[0] || v != want[1] {
			t.Errorf("%s is %s, %s, want %v", id, s, v, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	next, _ := events(t, ctx, base)
	byID := map[string]topAccount{}
	for try := 0; try < 10 && len(byID) < 2; try++ {
		for _, a := range next().Top {
			byID[a.ID] = a
		}
	}
	if a := byID["umbrella"]; a.Status != "removed" || a.Verdict != "deny" {
		t.Errorf("live: %+v", a)
	}
	if a := byID["stranger"]; a.Status != "unnamed" || a.Verdict != "allow" {
		t.Errorf("live: %+v", a)
	}
	// A second life under the same name is open.
	w.apply(demoPlans())
	w.until("it is open again", func() bool { s, v := status("umbrella"); return s == "open" && v == "allow" })
}

// The decision that refuses says 100 of 100 while the counters are those of an aggregator
// that has just begun, and a block ends with its period whatever the counters say last.
func TestALimitSaysTheSameAsItsDecision(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	defer w.owned()()
	now := time.Now()
	minute := now.Truncate(time.Minute)
	w.publish(okCall("initech", 1, 1), okCall("umbrella", 1, 1))
	deny := usage.Decision{ID: decisionID("initech"), Account: "initech", LimitID: "free/calls-per-minute", Meter: usage.Calls, Verdict: usage.Deny, Code: usage.QuotaExceeded, Revision: 9,
		Used: 100, Amount: 100, Window: usage.Minute, PeriodStart: usage.At(minute), PeriodEnd: usage.At(minute.Add(time.Hour))}
	w.decide(deny)
	deny.ID, deny.Account, deny.PeriodEnd = decisionID("umbrella"), "umbrella", usage.At(minute)
	w.decide(deny)
	base := w.start(Options{})
	type account struct {
		Verdict   string
		Usage     *counters.Account
		Decisions []decisionLine
	}
	var a account
	w.until("the decision has arrived", func() bool {
		a = get[account](t, base+"/v1/accounts/initech")
		return len(a.Decisions) == 1
	})
	l := a.Usage.Limits[0]
	if a.Verdict != "deny" || l.Verdict != "deny" || l.Used != 100 || l.Remaining != 0 || l.DecisionID != a.Decisions[0].ID {
		t.Errorf("beside a decision of %d of %d: %s, %+v", a.Decisions[0].Used, a.Decisions[0].Amount, a.Verdict, l)
	}
	w.until("the ended decision has arrived", func() bool {
		a = get[account](t, base+"/v1/accounts/umbrella")
		return len(a.Decisions) == 1
	})
	if l := a.Usage.Limits[0]; a.Verdict != "allow" || l.Verdict != "allow" || l.Used != 1 || l.Remaining != 99 || a.Decisions[0].Effective != "allow" {
		t.Errorf("a block that ended: %s, %+v", a.Verdict, l)
	}
	u := get[counters.Answer](t, base+"/v1/usage?account=initech")
	if l := u.Accounts[0].Limits[0]; l.Used != 100 || l.Verdict != "deny" {
		t.Errorf("usage: %+v", l)
	}
}

// A stopped ClickHouse: the audit is not green, charts and lists out of it say so or fail.
func TestConservationIsNotGreenWhileClickHouseIsStopped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	defer w.owned()()
	h := &fakeHistory{position: 1 << 40}
	base := w.start(Options{History: h})
	audit := func() conservation.Answer {
		w.audited(time.Now())
		return get[conservation.Answer](t, base+"/v1/audit")
	}
	w.until("all agree", func() bool { a := audit(); return a.State == "ok" && a.Freshness.Current })
	h.fail(errors.New("dial tcp 127.0.0.1:9000: connection refused"))
	w.until("the audit is not green", func() bool {
		a := audit()
		return a.State == "waiting" && !a.Freshness.Current && a.Points[2].State == "waiting" && strings.Contains(a.Detail, "ClickHouse does not answer")
	})
	for _, path := range []string{"/v1/history/calls", "/v1/corrections", "/v1/decisions/history"} {
		newContract(t, base).do(exchange{path: path, status: 503})
	}
	h.fail(nil)
	w.until("all agree again", func() bool {
		a := audit()
		return a.State == "ok" && a.Freshness.Current && of(t, base+"/v1/history/calls").Current
	})
}

// While nobody owns the shards, what was counted is not told as if it were now.
func TestWithoutAnAggregatorNothingIsCurrentThatItCounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	stop := w.owned()
	w.publish(okCall("hooli", 1, 1))
	base := w.start(Options{})
	w.until("all is current", func() bool {
		return of(t, base+"/v1/usage").Current && of(t, base+"/v1/accounts/hooli").Current && of(t, base+"/v1/accounts").Current && of(t, base+"/v1/health").Current
	})
	stop()
	if f := of(t, base+"/v1/usage"); f.Current || f.Age != -1 || f.Reason == "" {
		t.Errorf("usage: %+v", f)
	}
	if f := of(t, base+"/v1/accounts/hooli"); f.Current || f.Reason == "" {
		t.Errorf("account: %+v", f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	next, _ := events(t, ctx, base)
	w.until("the page is told", func() bool {
		m := next()
		return len(m.Top) > 0 && !m.Top[0].Freshness.Current && !m.Freshness["counters"].Current && !m.Lag.CountedKnown && m.Freshness["decisions"].Current
	})
}

// Without NATS the console goes on with what it has read, and says of when that is.
func TestWithoutNATSEverythingSaysHowOldItIs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	defer w.owned()()
	base := w.start(Options{})
	paths := []string{"/v1/accounts", "/v1/decisions", "/v1/alerts", "/v1/deadletters", "/v1/plans"}
	for _, path := range paths {
		w.until(path+" is current", func() bool { return of(t, base+path).Current })
	}
	if err := w.server.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		w.until(path+" says how old it is", func() bool { f := of(t, base+path); return !f.Current && f.Age > 0 && f.Reason != "" })
	}
	w.until("health says so", func() bool {
		h := get[health.Health](t, base+"/v1/health")
		return h.State == health.StateDown && h.Parts[5].State == health.StateDown
	})
}

// A console that follows other plans than it answered before says the new ones.
func TestAChangeOfPlanAndAMoveAreSeenAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	defer w.owned()()
	base := w.start(Options{})
	doc := demoPlans()
	doc.Accounts[3].Plan = "free" // hooli
	doc.Accounts = append(doc.Accounts, plans.Account{ID: "hooli/new", Parent: "hooli", Plan: "pro"})
	w.apply(doc)
	w.until("the new plan is shown", func() bool {
		a := get[accountLine](t, base+"/v1/accounts/hooli")
		child := get[accountLine](t, base+"/v1/accounts/hooli%2Fnew")
		return a.Plan == "free" && child.Status == "open" && child.Root == "hooli" && child.Shard == a.Shard
	})
}
