package aggregator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
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
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func leakFree(m *testing.M) {
	// An object store's PutBytes begins a goroutine that ends with its publisher,
	// and waits for ever when the publisher is done before it has begun.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/nats-io/nats.go/jetstream.(*jetStream).resetPendingAcksOnReconnect"))
}

// world is a real NATS server with a ledger, and a gateway's pen to write it.
type world struct {
	t      testing.TB
	o      embednats.Options
	server *embednats.Server
	nc     *nats.Conn
	js     jetstream.JetStream
	shards uint32
	number map[ksuid.KSUID]map[uint32]uint64
}

func newWorld(t testing.TB, shards uint32, sync time.Duration) *world {
	t.Helper()
	o := embednats.Options{StoreDir: t.TempDir(), Logger: zerolog.Nop(), Sync: sync, MaxFile: 200 << 30}
	server, err := embednats.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, o: o, server: server, shards: shards, number: map[ksuid.KSUID]map[uint32]uint64{}}
	w.o.Port = server.Addr().(*net.TCPAddr).Port
	t.Cleanup(w.stopServer)
	nc, err := natsconn.Connect(t.Context(), natsconn.Options{URL: server.ClientURL(), Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: shards}); err != nil {
		t.Fatal(err)
	}
	w.nc, w.js = nc, js
	return w
}

func (w *world) stopServer() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := w.server.Stop(ctx); err != nil {
		w.t.Error(err)
	}
}

// restartServer stops NATS and starts it again at the same address.
func (w *world) restartServer() {
	w.t.Helper()
	w.stopServer()
	server, err := embednats.Start(w.t.Context(), w.o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.server = server
}

// running is an aggregator that can be stopped and killed.
type running struct {
	cancel   context.CancelFunc
	done     chan error
	registry *prometheus.Registry
}

func (w *world) run(o Options) *running {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	o.NATS = natsconn.Options{URL: w.server.ClientURL(), Logger: zerolog.Nop()}
	o.Registerer, o.Readiness = prometheus.NewRegistry(), telemetry.NewReadiness()
	if o.Member == "" {
		o.Member, o.Sole = "alone", true
	}
	r := &running{cancel: cancel, done: make(chan error, 1), registry: o.Registerer}
	go func() { r.done <- Run(ctx, o) }()
	w.t.Cleanup(func() { cancel() })
	readiness := o.Readiness
	eventually(w.t, "the aggregator is ready", func() bool {
		select {
		case err := <-r.done:
			w.t.Fatalf("it ended: %v", err)
		default:
		}
		return readiness.Component("aggregator") != nil && readiness.Status().Ready
	})
	return r
}

func (r *running) stop(t testing.TB) error {
	t.Helper()
	r.cancel()
	select {
	case err := <-r.done:
		return err
	case <-time.After(10 * time.Second):
		t.Fatal("it does not stop")
		return nil
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(15 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it did not come to pass that %s", what)
		}
	}
}

func (w *world) shardOf(account string) uint32 { return ledger.ShardOf(account, w.shards) }

func (w *world) publish(m *nats.Msg) uint64 {
	w.t.Helper()
	ack, err := w.js.PublishMsg(w.t.Context(), m)
	if err != nil {
		w.t.Fatal(err)
	}
	return ack.Sequence
}

func (w *world) control(shard uint32, e *tollkeeperv1.ControlEntry) uint64 {
	w.t.Helper()
	e.Id, e.Author = ksuid.New().String(), "test"
	m, err := ledger.ControlMessage(shard, e)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.publish(m)
}

// plans sets one plan of every shard.
func (w *world) plans(version string, limits ...usage.Limit) {
	w.t.Helper()
	plan := ledger.PlanToProto(&usage.Plan{ID: "free", Limits: limits})
	for shard := range w.shards {
		w.control(shard, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &tollkeeperv1.PlanSet{Version: version, Plans: []*tollkeeperv1.Plan{plan}}}})
	}
}

func (w *world) account(id, plan string) {
	w.t.Helper()
	w.control(w.shardOf(id), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{
		Accounts: []*tollkeeperv1.Account{{Id: id, Plan: plan}},
	}}})
}

// calls returns n calls of an account, now.
func calls(account string, n int) []usage.Call {
	out := make([]usage.Call, n)
	for i := range out {
		out[i] = usage.Call{Time: usage.At(time.Now()), Account: account, Method: "POST", Route: "/v1/chat", Model: "gpt-4o", Status: 200}
		out[i].Quantities.Set(usage.InputTokens, 10)
	}
	return out
}

func (w *world) frame(p ksuid.KSUID, shard uint32, number uint64, cs []usage.Call) *nats.Msg {
	var b ledger.Builder
	for i := range cs {
		b.Add(&cs[i])
	}
	return ledger.FrameMessage(shard, b.Seal(ledger.Header{Producer: p, Shard: shard, Number: number, Gateway: "test", SealedAt: usage.At(time.Now())}))
}

// send appends one frame of calls of one root account.
func (w *world) send(p ksuid.KSUID, cs []usage.Call) uint64 {
	w.t.Helper()
	shard := w.shardOf(cs[0].Account)
	if w.number[p] == nil {
		w.number[p] = map[uint32]uint64{}
	}
	w.number[p][shard]++
	return w.publish(w.frame(p, shard, w.number[p][shard], cs))
}

func (w *world) usage(shard uint32, accounts ...string) ledger.UsageReply {
	w.t.Helper()
	q, err := json.Marshal(ledger.UsageRequest{Accounts: accounts})
	if err != nil {
		w.t.Fatal(err)
	}
	m, err := w.nc.Request(ledger.UsageSubject(shard), q, 5*time.Second)
	if err != nil {
		w.t.Fatal(err)
	}
	var r ledger.UsageReply
	if err := json.Unmarshal(m.Data, &r); err != nil {
		w.t.Fatalf("%v: %s %v", err, m.Data, m.Header)
	}
	return r
}

// counted waits until a shard has counted an entry.
func (w *world) counted(shard uint32, sequence uint64) ledger.UsageReply {
	w.t.Helper()
	var r ledger.UsageReply
	eventually(w.t, fmt.Sprintf("shard %d counts entry %d", shard, sequence), func() bool {
		r = w.usage(shard)
		return r.Sequence >= sequence
	})
	return r
}

// decisions returns everything that was ever published on an account's limit.
func (w *world) decisions(account, limit string) []usage.Decision {
	w.t.Helper()
	kv, err := w.js.KeyValue(w.t.Context(), ledger.DecisionsBucket)
	if err != nil {
		w.t.Fatal(err)
	}
	entries, err := kv.History(w.t.Context(), ledger.DecisionKey(w.shardOf(account), account, limit))
	if err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
		w.t.Fatal(err)
	}
	var out []usage.Decision
	for _, e := range entries {
		d, err := ledger.UnmarshalDecision(e.Value())
		if err != nil {
			w.t.Fatal(err)
		}
		out = append(out, d)
	}
	return out
}

func (w *world) decided(account, limit string, verdict usage.Verdict) usage.Decision {
	w.t.Helper()
	var last usage.Decision
	eventually(w.t, fmt.Sprintf("%s of %s is decided: %s", limit, account, verdict), func() bool {
		if ds := w.decisions(account, limit); len(ds) > 0 {
			last = ds[len(ds)-1]
		}
		return last.Verdict == verdict
	})
	return last
}

func lifetimeLimit(amount int64) usage.Limit {
	return usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Lifetime, Amount: amount, Tier: usage.TierEventual, ActionURL: "https://example.com/upgrade"}
}

func TestACallThatSpendsTheQuotaIsDecidedAndARaisedPlanPushed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	r := w.run(Options{})
	w.plans("v1", lifetimeLimit(10))
	w.account("acme", "free")
	p := ksuid.New()
	w.send(p, calls("acme", 9))
	last := calls("acme", 3)
	seq := w.send(p, last)
	d := w.decided("acme", "free/calls", usage.Deny)
	want := usage.Decision{
		ID: d.ID, Account: "acme", LimitID: "free/calls", Meter: usage.Calls, Verdict: usage.Deny, Code: usage.QuotaExceeded, Revision: seq,
		Shard: w.shardOf("acme"), Used: 12, Amount: 10, Window: usage.Lifetime, PlanVersion: "v1", DecidedAt: d.DecidedAt,
		Cause: last[0].Time, ActionURL: "https://example.com/upgrade", Epoch: d.Epoch,
	}
	if d.Epoch == 0 || fmt.Sprintf("%+v", d) != fmt.Sprintf("%+v", want) {
		t.Errorf("got  %+v\nwant %+v", d, want)
	}
	w.plans("v2", lifetimeLimit(100))
	if d := w.decided("acme", "free/calls", usage.Allow); d.Used != 12 || d.Amount != 100 || d.PlanVersion != "v2" || d.Code != "" {
		t.Errorf("got %+v", d)
	}
	u := w.usage(w.shardOf("acme"), "acme")
	if len(u.Accounts) != 1 || u.Accounts[0].Own.Admitted != 12 || u.Accounts[0].Own.Meters[usage.InputTokens] != 120 || u.Accounts[0].Limits[0].Remaining != 88 {
		t.Errorf("got %+v", u)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}
