package explanation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/aggregator"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// explained is a real NATS with a ledger, a real aggregator that counts it, and
// a gateway's pen.
type explained struct {
	t        testing.TB
	url      string
	nc       *nats.Conn
	js       jetstream.JetStream
	producer ksuid.KSUID
	number   map[uint32]uint64
	sent     int
	x        *explain.Explainer
}

const explainShards = 2

func TestMain(m *testing.M) {
	// nats.go leaves it behind, now and then, when a connection is closed right
	// after an object was stored.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/nats-io/nats.go/jetstream.(*jetStream).resetPendingAcksOnReconnect"))
}

func newExplained(t testing.TB) *explained {
	t.Helper()
	server, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Logger: zerolog.Nop(), Sync: time.Minute, MaxFile: 200 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	nc, err := natsconn.Connect(t.Context(), natsconn.Options{URL: server.ClientURL(), Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: explainShards}); err != nil {
		t.Fatal(err)
	}
	return &explained{
		t: t, url: server.ClientURL(), nc: nc, js: js, producer: ksuid.New(), number: map[uint32]uint64{},
		x: explain.New(explain.Options{JS: js}),
	}
}

// count runs an aggregator; the returned function stops it cleanly, which leaves
// a snapshot.
func (w *explained) count() (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	ready := telemetry.NewReadiness()
	go func() {
		done <- aggregator.Run(ctx, aggregator.Options{
			NATS: natsconn.Options{URL: w.url, Logger: zerolog.Nop()}, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry(), Readiness: ready,
		})
	}()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("the aggregator ended with %v", err)
		}
	}
	w.t.Cleanup(stop)
	w.until("the aggregator is ready", func() bool { return ready.Component("aggregator") != nil && ready.Status().Ready })
	return stop
}

func (w *explained) until(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			w.t.Fatalf("it did not come to pass that %s", what)
		}
	}
}

func (w *explained) shard(root string) uint32 { return ledger.ShardOf(root, explainShards) }

func (w *explained) publish(m *nats.Msg) uint64 {
	w.t.Helper()
	ack, err := w.js.PublishMsg(w.t.Context(), m)
	if err != nil {
		w.t.Fatal(err)
	}
	return ack.Sequence
}

func (w *explained) control(shard uint32, e *tollkeeperv1.ControlEntry) uint64 {
	w.t.Helper()
	e.Id, e.Author, e.CreatedAtUnixMicros = ksuid.New().String(), "alice", time.Now().UnixMicro()
	m, err := ledger.ControlMessage(shard, e)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.publish(m)
}

func (w *explained) plans(version string, plans ...usage.Plan) (last uint64) {
	w.t.Helper()
	set := &tollkeeperv1.PlanSet{Version: version}
	for i := range plans {
		set.Plans = append(set.Plans, ledger.PlanToProto(&plans[i]))
	}
	for shard := range uint32(explainShards) {
		last = w.control(shard, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: set}})
	}
	return last
}

func plan(id string, limits ...usage.Limit) usage.Plan { return usage.Plan{ID: id, Limits: limits} }

func (w *explained) accounts(root string, accounts ...usage.Account) uint64 {
	w.t.Helper()
	set := &tollkeeperv1.AccountSet{}
	for i := range accounts {
		set.Accounts = append(set.Accounts, ledger.AccountToProto(&accounts[i]))
	}
	return w.control(w.shard(root), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: set}})
}

// call is a call that can be told apart from all others by its request id.
func (w *explained) call(account, model string, tokens int64) usage.Call {
	w.sent++
	c := usage.Call{Time: usage.At(time.Now()), Account: account, KeyID: "k", RequestID: fmt.Sprintf("request-%d", w.sent), Method: "POST", Route: "/v1/chat", Model: model, Status: 200}
	c.Quantities.Set(usage.InputTokens, tokens)
	return c
}

// send appends a frame of calls below one root account.
func (w *explained) send(root string, calls ...usage.Call) uint64 {
	w.t.Helper()
	shard := w.shard(root)
	w.number[shard]++
	return w.publish(w.frame(shard, w.producer, w.number[shard], calls))
}

func (w *explained) frame(shard uint32, producer ksuid.KSUID, number uint64, calls []usage.Call) *nats.Msg {
	var b ledger.Builder
	for i := range calls {
		b.Add(&calls[i])
	}
	return ledger.FrameMessage(shard, b.Seal(ledger.Header{Producer: producer, Shard: shard, Number: number, Gateway: "gateway-1", SealedAt: usage.At(time.Now())}))
}

// decided waits for a verdict on a limit.
func (w *explained) decided(root, account, limit string, verdict usage.Verdict) usage.Decision {
	w.t.Helper()
	kv, err := w.js.KeyValue(w.t.Context(), ledger.DecisionsBucket)
	if err != nil {
		w.t.Fatal(err)
	}
	var d usage.Decision
	w.until(fmt.Sprintf("%s of %s is decided: %s", limit, account, verdict), func() bool {
		e, err := kv.Get(w.t.Context(), ledger.DecisionKey(w.shard(root), account, limit))
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return false
		}
		if err == nil {
			d, err = ledger.UnmarshalDecision(e.Value())
		}
		if err != nil {
			w.t.Fatal(err)
		}
		return d.Verdict == verdict
	})
	return d
}

// counted waits until the aggregator has counted an entry.
func (w *explained) counted(root string, sequence uint64) {
	w.t.Helper()
	w.until(fmt.Sprintf("entry %d is counted", sequence), func() bool {
		m, err := w.nc.Request(ledger.UsageSubject(w.shard(root)), nil, 5*time.Second)
		if err != nil {
			w.t.Fatal(err)
		}
		var r ledger.UsageReply
		if err := json.Unmarshal(m.Data, &r); err != nil {
			w.t.Fatal(err)
		}
		return r.Sequence >= sequence
	})
}

func (w *explained) explain(id string) *explain.Explanation {
	w.t.Helper()
	e, err := w.x.Explain(w.t.Context(), explain.Query{ID: id, Limit: explain.MaxPage})
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

// adds checks that a replay gave the same and that the listed calls are all that
// fed the counter.
func (w *explained) adds(e *explain.Explanation, d usage.Decision) {
	w.t.Helper()
	if !e.Replay.Same || len(e.Replay.Differences) != 0 {
		w.t.Errorf("%s: %+v", e.Replay.Text, e.Replay.Differences)
	}
	if e.Decision.ID != d.ID || e.Decision.Used != d.Used || e.Decision.Verdict != d.Verdict.String() || e.Counter.After != d.Used || e.Entry.Sequence != d.Revision {
		w.t.Errorf("%+v\n%+v\n%+v\nis not of %+v", e.Decision, e.Counter, e.Entry, d)
	}
	sum := e.Fed.Carried
	for i := len(e.Calls) - 1; i >= 0; i-- {
		c := &e.Calls[i]
		if sum += c.Adds; c.UsedAfter != sum {
			w.t.Errorf("after %s the counter is said to be %d, but the calls up to it add up to %d", c.RequestID, c.UsedAfter, sum)
		}
	}
	if sum != d.Used || e.Fed.Used+e.Fed.Carried != d.Used || e.NextCursor != "" || e.Fed.Unexplained != 0 || int64(len(e.Calls)) != e.Fed.Calls {
		w.t.Errorf("the calls add up to %d, used is %d: %+v, cursor %q, %d calls", sum, d.Used, e.Fed, e.NextCursor, len(e.Calls))
	}
}

func lifetime(id string, meter usage.Meter, amount int64) usage.Limit {
	return usage.Limit{ID: id, Meter: meter, Window: usage.Lifetime, Amount: amount, Tier: usage.TierEventual}
}

func TestACrossingIsExplainedByItsCalls(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	limit := lifetime("calls", usage.Calls, 10)
	limit.WarnPercent = 75
	limit.ActionURL = "https://example.com/upgrade"
	w.plans("v1", plan("free", limit))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"}, usage.Account{ID: "other", Plan: "free"})
	w.send("acme", w.call("acme", "m", 1), w.call("other", "m", 1), w.call("acme", "m", 1))
	refused := w.call("acme", "m", 1)
	refused.Code, refused.Status = usage.QuotaExceeded, 402
	w.send("acme", w.call("acme", "m", 1), refused, w.call("acme", "m", 1))
	warn := w.send("acme", w.call("other", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1))
	d := w.decided("acme", "acme", "free/calls", usage.Warn)
	e := w.explain(d.ID)
	w.adds(e, d)
	if e.Crossing == nil || e.Crossing.Sequence != warn || e.Crossing.Index != 4 || e.Crossing.UsedAfter != 8 || e.Limit.WarnAt != 8 {
		t.Errorf("the warning came with %+v, limit %+v", e.Crossing, e.Limit)
	}

	// A repeated frame feeds nothing.
	w.publish(w.frame(w.shard("acme"), w.producer, w.number[w.shard("acme")], []usage.Call{w.call("acme", "m", 1)}))
	first := w.call("acme", "m", 1)
	crossing := w.call("acme", "m", 1)
	after := w.call("acme", "m", 1)
	seq := w.send("acme", first, w.call("other", "m", 1), crossing, after)
	w.send("acme", w.call("acme", "m", 1))
	d = w.decided("acme", "acme", "free/calls", usage.Deny)
	e = w.explain(d.ID)
	w.adds(e, d)
	if !e.Replay.Published || e.Replay.Text != "replayed: same verdict" || e.Replay.Snapshot != "" || e.Counter.Before != 8 || e.Counter.After != 11 {
		t.Errorf("%+v, %+v", e.Replay, e.Counter)
	}
	c := e.Crossing
	if c == nil || c.RequestID != crossing.RequestID || c.Index != 2 || c.Sequence != seq || c.UsedAfter != 10 || c.Time != crossing.Time || c.Time != d.Cause || c.Producer != w.producer.String() || c.Frame != 4 {
		t.Errorf("crossed by %+v", c)
	}
	if e.Reason.Kind != explain.ReasonCall || e.Entry.Kind != "calls" || e.Entry.Producer != w.producer.String() || e.Entry.Gateway != "gateway-1" || e.Entry.Calls != 4 || e.Entry.Shard != d.Shard || e.Entry.Stream != "LEDGER" {
		t.Errorf("%+v, %+v", e.Reason, e.Entry)
	}
	if e.Limit.PlanVersion != "v1" || e.Limit.Amount != 10 || e.Limit.Meter != usage.Calls || e.Limit.WarnPercent != 75 || e.Limit.ActionURL != limit.ActionURL {
		t.Errorf("%+v", e.Limit)
	}
	if e.Calls[0].RequestID != after.RequestID || e.Calls[2].RequestID != first.RequestID {
		t.Errorf("the newest are %s and %s", e.Calls[0].RequestID, e.Calls[2].RequestID)
	}

	// Page by page it is the same.
	var paged []explain.Call
	for cursor := ""; ; {
		page, err := w.x.Explain(t.Context(), explain.Query{ID: d.ID, Limit: 2, Cursor: cursor})
		if err != nil {
			t.Fatal(err)
		}
		paged = append(paged, page.Calls...)
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	if fmt.Sprint(paged) != fmt.Sprint(e.Calls) {
		t.Errorf("by pages:\n%+v\nat once:\n%+v", paged, e.Calls)
	}
}

func TestFilteredTokensInAWindowAreExplained(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	limit := usage.Limit{ID: "large", Meter: usage.InputTokens, Window: usage.Month, Amount: 100, Tier: usage.TierEventual, Filter: usage.Filter{Models: []string{"large", "huge"}, Methods: []string{"POST"}}}
	pages := usage.Limit{ID: "pages", Meter: "pages", Window: usage.Day, Amount: 5, Tier: usage.TierEventual}
	w.plans("v1", plan("free", limit, pages))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	unknown := w.call("acme", "large", 0)
	unknown.Quantities = usage.Quantities{}
	elsewhere := w.call("acme", "large", 50)
	elsewhere.Method = "GET"
	late := w.call("acme", "large", 60)
	late.Time -= 70 * 24 * 3600 * 1_000_000
	ahead := w.call("acme", "huge", 20)
	ahead.Time += 3600 * 1_000_000
	page := w.call("acme", "small", 1)
	page.Quantities.Set("pages", 7)
	w.send("acme", w.call("acme", "large", 30), w.call("acme", "small", 500), unknown, elsewhere, late, ahead)
	w.send("acme", page, w.call("acme", "huge", 49), w.call("acme", "large", 2))
	for limitID, calls := range map[string]int64{"free/large": 4, "free/pages": 1} {
		d := w.decided("acme", "acme", limitID, usage.Deny)
		e := w.explain(d.ID)
		w.adds(e, d)
		if e.Fed.Calls != calls || e.Crossing == nil || e.Crossing.Time != d.Cause {
			t.Errorf("%s: %+v by %+v", limitID, e.Fed, e.Crossing)
		}
	}
}

func TestANestedAccountIsExplainedByTheCallsBelowIt(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	w.plans("v1", plan("org", lifetime("calls", usage.Calls, 8)), plan("team", lifetime("calls", usage.Calls, 100)))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "org"}, usage.Account{ID: "acme/a", Parent: "acme", Plan: "team"}, usage.Account{ID: "acme/a/x", Parent: "acme/a"}, usage.Account{ID: "acme/b"})
	w.send("acme", w.call("acme/a/x", "m", 1), w.call("acme/a", "m", 1), w.call("acme/b", "m", 1), w.call("acme", "m", 1), w.call("acme/unheard", "m", 1))
	// From here on b is below acme too.
	w.accounts("acme", usage.Account{ID: "acme/b", Parent: "acme"})
	w.send("acme", w.call("acme/b", "m", 1), w.call("acme/a/x", "m", 1), w.call("acme/unheard", "m", 1))
	w.send("acme", w.call("acme/b", "m", 1), w.call("acme/b", "m", 1), w.call("acme/a", "m", 1), w.call("acme/a", "m", 1))
	d := w.decided("acme", "acme", "org/calls", usage.Deny)
	e := w.explain(d.ID)
	w.adds(e, d)
	by := map[string]int{}
	for _, c := range e.Calls {
		by[c.Account]++
	}
	if by["acme"] != 1 || by["acme/a"] != 3 || by["acme/a/x"] != 2 || by["acme/b"] != 3 || len(by) != 4 || e.Crossing.Account != "acme/a" {
		t.Errorf("fed by %v, crossed by %+v", by, e.Crossing)
	}
}

func TestAPlanChangeIsExplainedAndWhatItCarriesOver(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	filtered := lifetime("tokens", usage.InputTokens, 1000)
	filtered.Filter.Models = []string{"large"}
	w.plans("v1", plan("free", lifetime("calls", usage.Calls, 100), filtered))
	// Counted before there is a limit, which starts from them.
	w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	w.send("acme", w.call("acme", "m", 5), w.call("acme", "large", 5), w.call("acme", "m", 5))
	lowered := w.plans("v2", plan("free", lifetime("calls", usage.Calls, 3)), plan("pro", lifetime("calls", usage.Calls, 6), lifetime("tokens", usage.InputTokens, 40)))
	d := w.decided("acme", "acme", "free/calls", usage.Deny)
	e := w.explain(d.ID)
	w.adds(e, d)
	if e.Reason.Kind != explain.ReasonPlan || e.Crossing != nil || e.Entry.Kind != "control" || e.Entry.Author != "alice" || e.Entry.What != "plans of version v2" || e.Fed.Calls != 5 || e.Limit.PlanVersion != "v2" {
		t.Errorf("%+v, %+v, %+v of %d", e.Reason, e.Entry, e.Fed, lowered)
	}
	// Another plan lifts the one limit and goes on with the counter in the other.
	moved := w.accounts("acme", usage.Account{ID: "acme", Plan: "pro"})
	d = w.decided("acme", "acme", "free/calls", usage.Allow)
	e = w.explain(d.ID)
	w.adds(e, d)
	if e.Reason.Kind != explain.ReasonAccount || e.Entry.Sequence != moved {
		t.Errorf("%+v, %+v", e.Reason, e.Entry)
	}
	w.send("acme", w.call("acme", "m", 30), w.call("acme", "large", 10), w.call("acme", "m", 1))
	d = w.decided("acme", "acme", "pro/calls", usage.Deny)
	e = w.explain(d.ID)
	w.adds(e, d)
	if e.Fed.Calls != 8 || e.Counter.Before != 5 {
		t.Errorf("the counter went on with the plan: %+v, %+v", e.Fed, e.Counter)
	}
	// The limit of that name counted other calls before: it starts from all that were made.
	d = w.decided("acme", "acme", "pro/tokens", usage.Deny)
	e = w.explain(d.ID)
	w.adds(e, d)
	if e.Fed.Calls != 8 || e.Counter.Before != 17 {
		t.Errorf("the counter starts from what was used: %+v, %+v", e.Fed, e.Counter)
	}
}

func TestALimitThatIsOpenedOutOfTheLedgerIsExplainedByTheCallsBeforeIt(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	daily := usage.Limit{ID: "daily", Meter: usage.InputTokens, Window: usage.Day, Amount: 40, Tier: usage.TierEventual}
	daily.Filter.Models = []string{"large"}
	w.plans("v1", plan("free", usage.Limit{ID: "m", Meter: usage.Calls, Window: usage.Month, Amount: 1000, Tier: usage.TierEventual}), plan("pro", daily))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	w.send("acme", w.call("acme", "large", 20), w.call("acme", "small", 500), w.call("acme", "large", 9))
	w.control(w.shard("acme"), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{
		Account: "acme", Model: "large", Reason: "counted twice", Adjustments: []*tollkeeperv1.Quantity{{Meter: string(usage.InputTokens), Value: -4}},
	}}})
	w.accounts("acme", usage.Account{ID: "acme", Plan: "pro"})
	w.send("acme", w.call("acme", "large", 16))
	d := w.decided("acme", "acme", "pro/daily", usage.Deny)
	e := w.explain(d.ID)
	if !e.Replay.Same || e.Fed.Calls != 3 || e.Fed.Used != 45 || e.Fed.Adjusted != -4 || e.Fed.Unexplained != 0 || d.Used != 41 || len(e.Calls) != 4 {
		t.Errorf("%+v of %d: %+v, %+v", e.Fed, d.Used, e.Replay, e.Calls)
	}
	after := int64(0)
	for i := len(e.Calls) - 1; i >= 0; i-- {
		if after += e.Calls[i].Adds; after != e.Calls[i].UsedAfter {
			t.Errorf("after call %d the counter is said to be %d; the calls add up to %d", i, e.Calls[i].UsedAfter, after)
		}
	}
	if after != d.Used {
		t.Errorf("the calls add up to %d, used is %d", after, d.Used)
	}
	// What denied is the last call, or, where the owner was slower, what it counted.
	if k := e.Reason.Kind; k != explain.ReasonOpening && k != explain.ReasonCall {
		t.Errorf("reason %+v", e.Reason)
	}
}

func TestTheClosingOfAnAccountIsExplained(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	limit := lifetime("calls", usage.Calls, 2)
	w.plans("v1", plan("free", limit))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1))
	w.decided("acme", "acme", "free/calls", usage.Deny)
	closed := w.accounts("acme", usage.Account{ID: "acme", Plan: "free", Closed: true})
	d := w.decided("acme", "acme", "free/calls", usage.Allow)
	e := w.explain(d.ID)
	w.adds(e, d)
	if e.Reason.Kind != explain.ReasonAccount || e.Entry.Sequence != closed {
		t.Errorf("%+v, %+v", e.Reason, e.Entry)
	}
}

func TestAfterARestartFromASnapshotItIsExplainedAllTheSame(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	stop := w.count()
	w.plans("v1", plan("free", lifetime("calls", usage.Calls, 6)))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	w.counted("acme", w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1)))
	stop()
	w.count()
	seq := w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1))
	d := w.decided("acme", "acme", "free/calls", usage.Deny)
	// All that fed the counter is in the ledger: it begins there.
	e := w.explain(d.ID)
	w.adds(e, d)
	if e.Replay.Snapshot != "" || e.Fed.Calls != 6 {
		t.Errorf("%+v, %+v", e.Replay, e.Fed)
	}
	// The ledger's beginning is gone: the snapshot has what it brought along.
	stream, err := w.js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context(), jetstream.WithPurgeSequence(seq)); err != nil {
		t.Fatal(err)
	}
	w.x = explain.New(explain.Options{JS: w.js})
	e = w.explain(d.ID)
	w.adds(e, d)
	if e.Replay.Snapshot == "" || e.Fed.Calls != 2 || e.Fed.Carried != 4 || e.Fed.Used != 2 || e.Crossing == nil {
		t.Errorf("%+v, %+v", e.Replay, e.Fed)
	}
	// And when the entry itself is gone, it is said.
	w.send("acme", w.call("acme", "m", 1))
	if err := stream.Purge(t.Context(), jetstream.WithPurgeSequence(seq+1)); err != nil {
		t.Fatal(err)
	}
	w.x = explain.New(explain.Options{JS: w.js})
	if _, err := w.x.Explain(t.Context(), explain.Query{ID: d.ID}); !errors.Is(err, ledger.ErrPurged) || !strings.Contains(err.Error(), "older than what can be explained") {
		t.Errorf("of a ledger that was purged: %v", err)
	}
}

func TestADecisionWithoutAPublishedCopyIsFoundInTheLedger(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	w.plans("v1", plan("free", lifetime("calls", usage.Calls, 3)))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1))
	d := w.decided("acme", "acme", "free/calls", usage.Deny)
	stream, err := w.js.Stream(t.Context(), "KV_"+ledger.DecisionsBucket)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context(), jetstream.WithPurgeSubject("$KV.decisions."+ledger.DecisionKey(d.Shard, "acme", "free/calls"))); err != nil {
		t.Fatal(err)
	}
	e := w.explain(d.ID)
	w.adds(e, d)
	if e.Replay.Published {
		t.Errorf("%+v", e.Replay)
	}
	for name, id := range map[string]string{"of that very second": sameSecond(t, d.ID), "of another time": ksuid.New().String(), "of long ago": "0o5Fs0EELR0fUjHjbCnEtdUwQe3"} {
		if _, err := w.x.Explain(t.Context(), explain.Query{ID: id}); !errors.Is(err, explain.ErrUnknown) {
			t.Errorf("an id %s: %v", name, err)
		}
	}
	for _, id := range []string{"", "a b", d.ID + "\n", strings.Repeat("x", 257), "\xff"} {
		if _, err := w.x.Explain(t.Context(), explain.Query{ID: id}); !errors.Is(err, explain.ErrID) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"x", d.ID + "x"} { // which may be a client's
		if _, err := w.x.Explain(t.Context(), explain.Query{ID: id}); !errors.Is(err, explain.ErrUnknown) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, cursor := range []string{"x", "1", "1.x", "-1.0", "1.-2"} {
		if _, err := w.x.Explain(t.Context(), explain.Query{ID: d.ID, Cursor: cursor}); !errors.Is(err, explain.ErrCursor) {
			t.Errorf("%q: %v", cursor, err)
		}
	}
}

func sameSecond(t *testing.T, id string) string {
	t.Helper()
	k, err := ksuid.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ksuid.FromParts(k.Time(), bytes.Repeat([]byte{1}, 16))
	if err != nil {
		t.Fatal(err)
	}
	return other.String()
}

func TestForeignEventsThatCameTwiceAreNotListedTwice(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	w.plans("v1", plan("free", lifetime("tokens", usage.InputTokens, 1000)))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	foreign := func(id string, tokens int64) usage.Call {
		c := w.call("acme", "m", tokens)
		c.Source, c.EventID, c.RequestID = "their-gateway", id, ""
		return c
	}
	w.send("acme", foreign("a", 100), foreign("b", 100), w.call("acme", "m", 100))
	// b again, c twice within a frame, each with other figures.
	w.send("acme", foreign("b", 50), foreign("c", 200), foreign("c", 70), w.call("acme", "m", 100), foreign("d", 50))
	w.send("acme", foreign("e", 400), foreign("d", 400))
	d := w.decided("acme", "acme", "free/tokens", usage.Deny)
	e := w.explain(d.ID)
	w.adds(e, d)
	var got []string
	for i := len(e.Calls) - 1; i >= 0; i-- {
		got = append(got, fmt.Sprintf("%s%d", e.Calls[i].EventID, e.Calls[i].Adds))
	}
	if fmt.Sprint(got) != "[a100 b100 100 c200 100 d50 e400]" || e.Crossing == nil || e.Crossing.EventID != "e" {
		t.Errorf("fed by %v, crossed by %+v", got, e.Crossing)
	}
}

// Whoever changed a decision after it was made, or counts by other rules, is
// found out.
func TestADecisionThatTheLedgerDoesNotGiveIsShouted(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	stop := w.count()
	w.plans("v1", plan("free", lifetime("calls", usage.Calls, 3)))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1), w.call("acme", "m", 1))
	d := w.decided("acme", "acme", "free/calls", usage.Deny)
	stop()
	key := "$KV.decisions." + ledger.DecisionKey(d.Shard, "acme", "free/calls")
	stream, err := w.js.Stream(t.Context(), "KV_"+ledger.DecisionsBucket)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context(), jetstream.WithPurgeSubject(key)); err != nil {
		t.Fatal(err)
	}
	d.Used, d.Amount = 4, 2
	data, err := ledger.MarshalDecision(&d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.js.Publish(t.Context(), key, data); err != nil {
		t.Fatal(err)
	}
	e := w.explain(d.ID)
	if e.Replay.Same || !strings.HasPrefix(e.Replay.Text, "REPLAYED: NOT THE SAME") || fmt.Sprint(e.Replay.Differences) != "[{used 4 3} {amount 2 3} {calls 4 3}]" {
		t.Errorf("%+v", e.Replay)
	}
	var out bytes.Buffer
	if err := Print(t.Context(), Options{ID: d.ID, NATS: natsconn.Options{URL: w.url}, Calls: 5, Out: &out}); !errors.Is(err, ErrNotSame) || !strings.Contains(out.String(), "used: decided 4, replayed 3") {
		t.Errorf("%v:\n%s", err, &out)
	}
}

func TestTheCommandWritesForPeopleAndForMachines(t *testing.T) {
	t.Parallel()
	w := newExplained(t)
	w.count()
	w.plans("v1", plan("free", lifetime("calls", usage.Calls, 1003)))
	w.accounts("acme", usage.Account{ID: "acme", Plan: "free"})
	evil := w.call("acme", "m", 1)
	evil.Route = "/\x1b[2Jevil"
	first := w.send("acme", evil)
	for range 2 {
		calls := make([]usage.Call, 500)
		for i := range calls {
			calls[i] = w.call("acme", "m", 1)
		}
		w.send("acme", calls...)
	}
	w.send("acme", w.call("acme", "m", 1), w.call("acme", "m", 1))
	d := w.decided("acme", "acme", "free/calls", usage.Deny)
	run := func(o Options) string {
		t.Helper()
		var out bytes.Buffer
		o.ID, o.NATS, o.Out = d.ID, natsconn.Options{URL: w.url}, &out
		if err := Print(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	text := run(Options{Calls: 2000})
	for _, want := range []string{"DENY  free/calls for acme  (QUOTA_EXCEEDED)", "replayed: same verdict", "1001 before the entry, 1003 after it", "request request-1003, account acme", "1003 calls that added 1003", fmt.Sprintf("  %d.0 ", first), "plans version v1"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%.3000s", want, text)
		}
	}
	if strings.Contains(text, "\x1b") || strings.Count(text, "request-") != 1003+1 {
		t.Errorf("%d request ids, or something a terminal obeys:\n%.500s", strings.Count(text, "request-"), text)
	}
	if text := run(Options{Calls: 3}); !strings.Contains(text, "and more: --calls") || strings.Count(text, "request-") != 3+1 {
		t.Errorf("three calls:\n%s", text)
	}
	var e explain.Explanation
	if err := json.Unmarshal([]byte(run(Options{Calls: 0, JSON: true})), &e); err != nil || !e.Replay.Same || len(e.Calls) != 0 || e.Decision.ID != d.ID {
		t.Errorf("%v: %+v", err, e)
	}
	if err := Print(t.Context(), Options{Calls: -1}); err == nil {
		t.Error("minus one call was shown")
	}
}
