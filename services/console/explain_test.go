package console

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// countShard makes the decisions that an aggregator makes of an account's shard,
// and publishes them.
func (w *world) countShard(account string) []usage.Decision {
	w.t.Helper()
	shard := w.shard(account)
	stream, err := w.js.Stream(w.t.Context(), ledger.Stream)
	if err != nil {
		w.t.Fatal(err)
	}
	state := quota.New(quota.Options{Shard: shard})
	var decoder fold.Decoder
	var decided []usage.Decision
	for seq := range stream.CachedInfo().State.LastSeq {
		m, err := stream.GetMsg(w.t.Context(), seq+1)
		if err != nil {
			w.t.Fatal(err)
		}
		if _, s, err := ledger.ParseSubject(m.Subject); err != nil || s != shard {
			continue
		}
		e, _, err := decoder.Decode(&ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: m.Sequence, Time: m.Time})
		if err != nil {
			w.t.Fatal(err)
		}
		decided = append(decided, state.Apply(e).Decisions...)
	}
	for _, d := range decided {
		w.decide(d)
	}
	return decided
}

func TestADecisionIsExplainedOverHTTP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(&plans.Document{
		Version:  1,
		Plans:    []plans.Plan{{ID: "free", Limits: []plans.Limit{{ID: "tokens", Meter: "output_tokens", Window: "lifetime", Amount: 100, WarnPercent: 80, ActionURL: "https://example.com/upgrade", Filter: &plans.Filter{Models: []string{"large"}}}}}},
		Accounts: []plans.Account{{ID: "acme", Plan: "free"}, {ID: "acme/search", Parent: "acme"}},
	})
	small := okCall("acme", 1, 1000)
	small.Model = "small"
	left := okCall("acme", 1, 40)
	left.Ending, left.Flags = usage.ClientLeft, left.Flags|usage.Estimated
	w.publish(okCall("acme/search", 1, 30), small, left)
	w.publish(okCall("acme", 1, 20), okCall("acme/search", 1, 20), refusedCall("acme", usage.QuotaExceeded))
	decided := w.countShard("acme")
	if len(decided) != 1 || decided[0].Verdict != usage.Deny {
		t.Fatalf("decided: %+v", decided)
	}
	d := decided[0]
	c := newContract(t, w.start(Options{}))

	var e explain.Explanation
	decode(t, c.do(exchange{path: "/v1/decisions/" + d.ID + "/explain"}), &e)
	var adds []int64
	for _, call := range e.Calls {
		adds = append(adds, call.Adds)
	}
	if !e.Replay.Same || !e.Replay.Published || e.Decision.Used != 110 || e.Counter != (explain.Counter{Before: 70, After: 110}) || e.Crossing == nil || e.Crossing.UsedAfter != 110 || e.Crossing.Account != "acme/search" {
		t.Errorf("%+v", e)
	}
	if diff := cmp.Diff([]int64{20, 20, 40, 30}, adds); diff != "" || e.Fed.Used != 110 || e.Fed.Calls != 4 {
		t.Errorf("%+v: %s", e.Fed, diff)
	}
	var endings []string
	for _, call := range e.Calls {
		endings = append(endings, fmt.Sprint(call.Ending, " ", call.Estimated))
	}
	if diff := cmp.Diff([]string{" false", " false", "client_left true", " false"}, endings); diff != "" {
		t.Errorf("how the calls ended: %s", diff)
	}
	var paged []explain.Call
	for cursor := ""; ; {
		var page explain.Explanation
		decode(t, c.do(exchange{path: "/v1/decisions/" + d.ID + "/explain?limit=3&cursor=" + cursor}), &page)
		paged = append(paged, page.Calls...)
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if diff := cmp.Diff(e.Calls, paged); diff != "" {
		t.Error(diff)
	}

	// By the id of a request that it has refused, given by a client or made by a gateway.
	made := ksuid.New().String()
	for i, id := range []string{"client's/own:id", made} {
		refused := refusedCall("acme", usage.QuotaExceeded)
		refused.RequestID, refused.DecisionID, refused.Time = id, d.ID, usage.At(time.Now())
		passed := okCall("acme", 1, 1)
		passed.Model, passed.RequestID = "small", id // the id stands for a call that passed, too
		w.publish(refused, passed)
		for _, path := range []string{"/v1/requests/", "/v1/decisions/"} {
			var by explain.Explanation
			decode(t, c.do(exchange{path: path + url.PathEscape(id) + "/explain"}), &by)
			if by.Decision.ID != d.ID || by.Request == nil || by.Request.RequestID != id || by.Request.Status != 402 || !by.Replay.Same || len(by.Calls) != 4 {
				t.Errorf("%d: %+v, %+v", i, by.Decision, by.Request)
			}
		}
	}
	fine := okCall("acme", 1, 1)
	fine.Model, fine.RequestID = "small", "fine"
	unknown := refusedCall("acme", usage.BillingStateUnknown)
	unknown.RequestID, unknown.DecisionID, unknown.Status = "unknown", "", 503
	w.publish(fine, unknown)
	for id, says := range map[string]string{"fine": "passed with status 200", "unknown": "refused with BILLING_STATE_UNKNOWN", "never-seen": "no such request"} {
		var p front.Problem
		decode(t, c.do(exchange{path: "/v1/requests/" + id + "/explain", status: 404}), &p)
		if !strings.Contains(p.Detail, says) {
			t.Errorf("%s: %s", id, p.Detail)
		}
	}

	// A decision that no call made has no crossing call.
	w.apply(&plans.Document{
		Version:  1,
		Plans:    []plans.Plan{{ID: "free", Limits: []plans.Limit{{ID: "tokens", Meter: "output_tokens", Window: "lifetime", Amount: 1000, Filter: &plans.Filter{Models: []string{"large"}}}}}},
		Accounts: []plans.Account{{ID: "acme", Plan: "free"}, {ID: "acme/search", Parent: "acme"}},
	})
	decided = w.countShard("acme")
	lifted := decided[len(decided)-1]
	var after explain.Explanation
	decode(t, c.do(exchange{path: "/v1/decisions/" + lifted.ID + "/explain"}), &after)
	if !after.Replay.Same || after.Crossing != nil || after.Reason.Kind != explain.ReasonPlan || after.Decision.Verdict != "allow" || after.Fed.Used != 110 {
		t.Errorf("%+v", after)
	}

	var p front.Problem
	decode(t, c.do(exchange{path: "/v1/decisions/" + ksuid.New().String() + "/explain", status: 404}), &p)
	if p.Code != front.CodeNotFound {
		t.Errorf("%+v", p)
	}
	c.do(exchange{path: "/v1/decisions/no%20sense/explain", status: 400})
	c.do(exchange{path: "/v1/decisions/" + d.ID + "/explain?cursor=nonsense", status: 400})
	c.do(exchange{path: "/v1/decisions/" + d.ID + "/explain?limit=1001", status: 400})

	stream, err := w.js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	w.publish(okCall("acme", 1, 1))
	if err := stream.Purge(t.Context(), jetstream.WithPurgeKeep(1)); err != nil {
		t.Fatal(err)
	}
	decode(t, c.do(exchange{path: "/v1/decisions/" + lifted.ID + "/explain?cursor=1.0", status: 200}), &after)
	fresh := newContract(t, w.start(Options{Listen: "127.0.0.1:0"}))
	w.publish(func() usage.Call {
		late := refusedCall("acme", usage.QuotaExceeded)
		late.RequestID, late.DecisionID = "late", d.ID
		return late
	}())
	decode(t, fresh.do(exchange{path: "/v1/requests/late/explain", status: 410}), &p)
	decode(t, fresh.do(exchange{path: "/v1/decisions/" + d.ID + "/explain", status: 410}), &p)
	if p.Code != front.CodeGone || p.Status != http.StatusGone {
		t.Errorf("%+v", p)
	}
}
