package console

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

const testShards = 4

// world is a real NATS with the ledger's streams, and the part of the other
// services that the console sees.
type world struct {
	t        *testing.T
	server   *embednats.Server
	url      string
	nc       *nats.Conn
	js       jetstream.JetStream
	producer ksuid.KSUID

	mu     sync.Mutex
	frames map[uint32]uint64 // number by shard
	last   map[uint32]uint64 // sequence by shard
	counts map[string]*ledger.AccountUsage
	sent   map[string]int // calls of accounts with a limit
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s, err := embednats.Start(context.Background(), embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute, MaxFile: 100 << 30})
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nc.Close()
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
	return &world{t: t, server: s, url: s.ClientURL(), nc: nc, js: js, producer: ksuid.New(), frames: map[uint32]uint64{}, last: map[uint32]uint64{}, counts: map[string]*ledger.AccountUsage{}, sent: map[string]int{}}
}

func demoPlans() *plans.Document {
	return &plans.Document{
		Version: 1,
		Plans: []plans.Plan{
			{ID: "free", Limits: []plans.Limit{{ID: "calls-per-minute", Meter: "calls", Window: "minute", Amount: 100, WarnPercent: 80, ActionURL: "https://example.com/upgrade"}}},
			{ID: "team", Limits: []plans.Limit{{ID: "tokens", Meter: "output_tokens", Window: "month", Amount: 2_000_000, WarnPercent: 90, Code: "SPEND_CAP_REACHED"}}},
			{ID: "pro", Limits: []plans.Limit{{ID: "calls-per-minute", Meter: "calls", Window: "minute", Amount: 1000, Tier: "exact"}, {ID: "tokens", Meter: "input_tokens", Window: "day", Amount: 500_000_000}}},
		},
		Accounts: []plans.Account{
			{ID: "acme", Plan: "team"},
			{ID: "acme/search", Parent: "acme", Plan: "free", Keys: []plans.Key{{ID: "search-1", SHA256: plans.HashKey("s1")}}},
			{ID: "acme/support-bot", Parent: "acme", Plan: "pro", Keys: []plans.Key{{ID: "bot-1", SHA256: plans.HashKey("b1")}}},
			{ID: "hooli", Plan: "pro"},
			{ID: "initech", Plan: "free"},
			{ID: "umbrella", Plan: "free"},
		},
	}
}

func (w *world) apply(doc *plans.Document) {
	w.t.Helper()
	a := &plans.Applier{JS: w.js, NC: w.nc}
	if _, err := a.Apply(w.t.Context(), doc, "test"); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) root(account string) string {
	root, _, _ := strings.Cut(account, "/")
	return root
}

func (w *world) shard(account string) uint32 { return ledger.ShardOf(w.root(account), testShards) }

// publish appends calls as frames, as a gateway does, and counts them, as an
// aggregator does.
func (w *world) publish(calls ...usage.Call) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	byShard := map[uint32]*ledger.Builder{}
	for i := range calls {
		s := w.shard(calls[i].Account)
		if byShard[s] == nil {
			byShard[s] = &ledger.Builder{}
		}
		byShard[s].Add(&calls[i])
		w.count(&calls[i])
	}
	for s, b := range byShard {
		w.frames[s]++
		data := b.Seal(ledger.Header{Producer: w.producer, Shard: s, Number: w.frames[s], Gateway: "gateway-1", SealedAt: usage.At(time.Now())})
		ack, err := w.js.PublishMsg(context.Background(), ledger.FrameMessage(s, data))
		if err != nil {
			w.t.Error(err)
			return
		}
		w.last[s] = ack.Sequence
	}
}

func (w *world) count(c *usage.Call) {
	for _, id := range []string{c.Account, w.root(c.Account)} {
		u := w.counts[id]
		if u == nil {
			u = &ledger.AccountUsage{ID: id}
			u.Totals.Meters, u.Own.Meters = map[usage.Meter]int64{}, map[usage.Meter]int64{}
			if root := w.root(id); root != id {
				u.Parent = root
			}
			w.counts[id] = u
		}
		all := []*ledger.Totals{&u.Totals}
		if id == c.Account {
			all = append(all, &u.Own)
		}
		for _, t := range all {
			if !c.Admitted() {
				t.Refused++
				continue
			}
			t.Admitted++
			for _, m := range []usage.Meter{usage.InputTokens, usage.OutputTokens} {
				v, _ := c.Usage(m)
				t.Meters[m] += v
			}
		}
		if id == w.root(id) && c.Account == id {
			break
		}
	}
}

// own answers queries and sends beacons as the owner of all shards until ctx is
// done.
func (w *world) own(ctx context.Context) {
	index := plans.NewIndex(demoPlans())
	for s := range uint32(testShards) {
		sub, err := w.nc.Subscribe(ledger.UsageSubject(s), func(m *nats.Msg) {
			var q ledger.UsageRequest
			if err := json.Unmarshal(m.Data, &q); err != nil {
				w.t.Error(err)
				return
			}
			reply, err := json.Marshal(w.reply(s, q, index))
			if err != nil {
				w.t.Error(err)
				return
			}
			if err := m.Respond(reply); err != nil && ctx.Err() == nil {
				w.t.Error(err)
			}
		})
		if err != nil {
			w.t.Error(err)
			return
		}
		defer func() { _ = sub.Unsubscribe() }()
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		w.mu.Lock()
		for s := range uint32(testShards) {
			data, err := proto.Marshal(&tollkeeperv1.Beacon{Shard: s, Epoch: 1, LedgerSequence: w.countedTo(s), StreamTimeUnixMicros: time.Now().UnixMicro(), SentAtUnixMicros: time.Now().UnixMicro()})
			if err == nil {
				err = w.nc.Publish(ledger.BeaconSubject(s), data)
			}
			if err != nil && ctx.Err() == nil {
				w.t.Error(err)
			}
		}
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// countedTo is the newest entry of a shard.
func (w *world) countedTo(shard uint32) uint64 {
	counted := w.last[shard]
	if m, found, err := ledger.LastMessage(context.Background(), w.js, ledger.Stream, ledger.ControlSubject(shard)); err == nil && found {
		counted = max(counted, m.Sequence)
	}
	return counted
}

func (w *world) reply(shard uint32, q ledger.UsageRequest, index plans.Index) ledger.UsageReply {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now().UTC()
	minute := now.Truncate(time.Minute)
	month := time.Date(now.Year(), now.Month(), 1, 0, 0, 0, 0, time.UTC)
	r := ledger.UsageReply{Shard: shard, Epoch: 1, Sequence: w.countedTo(shard), StreamTime: usage.At(now), PlanVersion: plans.PlansVersion(demoPlans()), Total: ledger.Totals{Meters: map[usage.Meter]int64{}}}
	for id, u := range w.counts {
		if w.shard(id) != shard {
			continue
		}
		r.AccountCount++
		r.Total.Admitted += u.Own.Admitted
		r.Total.Refused += u.Own.Refused
		for m, v := range u.Own.Meters {
			r.Total.Meters[m] += v
		}
		wanted := len(q.Accounts) == 0 && q.Top > 0
		for _, a := range q.Accounts {
			wanted = wanted || a == id
		}
		if !wanted {
			continue
		}
		out := *u
		out.Own.Meters, out.Totals.Meters = maps.Clone(u.Own.Meters), maps.Clone(u.Totals.Meters)
		if a, ok := index.Account(id); ok {
			out.Plan = a.Plan
			p, _ := index.Plan(a.Plan)
			for i := range p.Limits {
				l := p.Limits[i].Usage()
				used := u.Totals.Admitted
				if l.Meter != usage.Calls {
					used = u.Totals.Meters[l.Meter]
				}
				lu := ledger.LimitUsage{LimitID: p.ID + "/" + l.ID, Meter: l.Meter, Window: l.Window, Amount: l.Amount, Used: used, Remaining: max(0, l.Amount-used), Verdict: "allow", Tier: l.Tier}
				if l.Tier.Leased() && used > 0 {
					lu.Lease = &ledger.LeaseUsage{Settled: used, Outstanding: min(3, lu.Remaining), Dead: min(1, lu.Remaining), Free: max(0, lu.Remaining-3), Gateways: 2, Grants: 4, DeniedEarly: 1}
				}
				lu.PeriodStart, lu.PeriodEnd = usage.At(minute), usage.At(minute.Add(time.Minute))
				if l.Window == usage.Month {
					lu.PeriodStart, lu.PeriodEnd = usage.At(month), usage.At(month.AddDate(0, 1, 0))
				}
				if l.Window == usage.Day {
					day := now.Truncate(24 * time.Hour)
					lu.PeriodStart, lu.PeriodEnd = usage.At(day), usage.At(day.Add(24*time.Hour))
				}
				if used >= l.Amount {
					lu.Verdict = "deny"
				} else if l.WarnPercent > 0 && used*100 >= l.Amount*int64(l.WarnPercent) {
					lu.Verdict = "warn"
				}
				out.Limits = append(out.Limits, lu)
			}
		}
		r.Accounts = append(r.Accounts, out)
	}
	return r
}

// decide publishes a decision.
func (w *world) decide(d usage.Decision) {
	w.t.Helper()
	d.Shard = w.shard(d.Account)
	data, err := ledger.MarshalDecision(&d)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.js.Publish(w.t.Context(), "$KV.decisions."+ledger.DecisionKey(d.Shard, d.Account, d.LimitID), data); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) alert(a usage.Alert) {
	w.t.Helper()
	data, err := json.Marshal(a)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.js.Publish(w.t.Context(), "alerts."+a.EpisodeID, data); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) deadLetter(reason, detail, origin string) {
	w.t.Helper()
	m := &nats.Msg{Subject: ledger.DeadLetterIntake(ksuid.New().String()), Data: []byte("{"), Header: nats.Header{}}
	m.Header.Set(ledger.ReasonHeader, reason)
	m.Header.Set(ledger.DetailHeader, detail)
	m.Header.Set(ledger.OriginHeader, origin)
	if _, err := w.js.PublishMsg(w.t.Context(), m); err != nil {
		w.t.Fatal(err)
	}
}

// start runs a console until the test ends and returns its base URL.
func (w *world) start(o Options) string {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	addr := make(chan net.Addr, 1)
	done := make(chan error, 1)
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	if o.NATS.URL == "" {
		o.NATS = natsconn.Options{URL: w.url}
	}
	o.Logger = zerolog.Nop()
	ready := telemetry.NewReadiness()
	if o.Readiness == nil {
		o.Readiness = ready
	}
	o.Ready = func(a net.Addr) { addr <- a }
	go func() { done <- Run(ctx, o) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("the console ended with %v", err)
		}
	})
	var base string
	select {
	case a := <-addr:
		base = "http://" + a.String()
	case err := <-done:
		done <- err
		w.t.Fatalf("the console did not start: %v", err)
	}
	w.until("the console is ready", func() bool {
		res, err := http.Get(base + "/v1/decisions?limit=1")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK || res.StatusCode == http.StatusUnauthorized
	})
	return base
}

// until polls another goroutine's or process's state.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.NewTimer(60 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			w.t.Fatalf("not within a minute: %s", what)
		}
	}
}

// get reads a JSON answer.
func get[T any](t *testing.T, url string) T {
	t.Helper()
	var v T
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s: %s", url, res.Status, data)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatalf("%s: %v: %s", url, err, data)
	}
	return v
}

func okCall(account string, in, out int64) usage.Call {
	c := usage.Call{Time: usage.At(time.Now()), Account: account, KeyID: "k", RequestID: ksuid.New().String(), Method: "POST", Route: "/v1/chat", Model: "large", Status: 200, Duration: 1200}
	c.Quantities.Set(usage.InputTokens, in)
	c.Quantities.Set(usage.OutputTokens, out)
	return c
}

func refusedCall(account string, code usage.Code) usage.Call {
	return usage.Call{Time: usage.At(time.Now()), Account: account, KeyID: "k", RequestID: ksuid.New().String(), Method: "POST", Route: "/v1/chat", Model: "large",
		Status: uint16(code.Status()), Code: code, DecisionID: decisionID(account)}
}

func decisionID(account string) string {
	id, err := ksuid.FromParts(time.Unix(1_700_000_000, 0), []byte(fmt.Sprintf("%-16.16s", account)))
	if err != nil {
		panic(err)
	}
	return id.String()
}

// fakeHistory answers like ClickHouse with what it was given.
type fakeHistory struct {
	mu        sync.Mutex
	calls     []history.CallsPoint
	asked     history.CallsQuery
	decisions []history.PastDecision
	corrected []history.PastCorrection
	position  uint64
	err       error
	// hold, if set, delays answers about calls of a span until it returns.
	hold func(ctx context.Context, span time.Duration)
}

// fail lets it fail from now on; nil: it answers.
func (f *fakeHistory) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeHistory) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeHistory) Ping(context.Context) error { return f.failure() }

func (f *fakeHistory) Position(context.Context) (uint64, error) { return f.position, f.failure() }

func (f *fakeHistory) Calls(ctx context.Context, q history.CallsQuery) ([]history.CallsPoint, error) {
	if f.hold != nil {
		f.hold(ctx, q.To.Sub(q.From))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = q
	return f.calls, f.err
}

func (f *fakeHistory) Corrections(_ context.Context, q history.CorrectionsQuery) ([]history.PastCorrection, error) {
	var out []history.PastCorrection
	for _, c := range f.corrected {
		if (q.Before == 0 || c.Sequence < q.Before) && (q.Account == "" || c.Account == q.Account) && len(out) < q.Limit {
			out = append(out, c)
		}
	}
	return out, f.failure()
}

func (f *fakeHistory) Decisions(_ context.Context, q history.DecisionsQuery) ([]history.PastDecision, error) {
	var out []history.PastDecision
	for _, d := range f.decisions {
		if (q.Before == 0 || d.Sequence < q.Before) && len(out) < q.Limit {
			out = append(out, d)
		}
	}
	return out, f.failure()
}
