package console

import (
	"net/http"
	"testing"

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
	w.publish(okCall("acme/search", 1, 30), small, okCall("acme", 1, 40))
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
	c.do(exchange{path: "/v1/decisions/nonsense/explain", status: 400})
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
	decode(t, fresh.do(exchange{path: "/v1/decisions/" + d.ID + "/explain", status: 410}), &p)
	if p.Code != front.CodeGone || p.Status != http.StatusGone {
		t.Errorf("%+v", p)
	}
}
