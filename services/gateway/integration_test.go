package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/leasetest"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const shards = 4

// world is a ledger with somebody who does the aggregator's and the plans' work
// by hand.
type world struct {
	t         testing.TB
	srv       *embednats.Server
	nc        *nats.Conn
	js        jetstream.JetStream
	directory jetstream.KeyValue
	decisions jetstream.KeyValue

	mu       sync.Mutex
	revision uint64
	last     uint64 // sequence of the decisions' stream
	silent   bool
}

func startNATS(t testing.TB, dir string, port int) *embednats.Server {
	t.Helper()
	srv, err := embednats.Start(t.Context(), embednats.Options{StoreDir: dir, Port: port, Sync: time.Minute, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopNATS(t, srv) })
	return srv
}

func stopNATS(t testing.TB, srv *embednats.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return worldOn(t, startNATS(t, t.TempDir(), 0))
}

func worldOn(t testing.TB, srv *embednats.Server) *world {
	t.Helper()
	w := &world{t: t, srv: srv}
	var err error
	if w.nc, err = nats.Connect(srv.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: shards}); err != nil {
		t.Fatal(err)
	}
	if w.directory, err = w.js.KeyValue(t.Context(), ledger.DirectoryBucket); err != nil {
		t.Fatal(err)
	}
	if err := leasetest.PutPlan(t.Context(), w.directory, usage.Plan{ID: "pro"}); err != nil {
		t.Fatal(err)
	}
	if w.decisions, err = w.js.KeyValue(t.Context(), ledger.DecisionsBucket); err != nil {
		t.Fatal(err)
	}
	w.account("acme")
	w.account("search", "acme")
	w.key("sk-acme", "k-acme", "acme")
	w.key("sk-search", "k-search", "search")
	w.beacons()
	return w
}

// beacons says four times as often as an aggregator does that all shards are
// counted, until the test is over.
func (w *world) beacons() {
	stop, done := make(chan struct{}), make(chan struct{})
	w.t.Cleanup(func() { close(stop); <-done })
	go func() {
		defer close(done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			w.mu.Lock()
			silent, last := w.silent, w.last
			w.mu.Unlock()
			for s := range uint32(shards) {
				if silent {
					break
				}
				now := time.Now().UnixMicro()
				data, err := proto.Marshal(&tollkeeperv1.Beacon{Shard: s, Epoch: 1, StreamTimeUnixMicros: now, DecisionsSequence: last, SentAtUnixMicros: now})
				if err != nil {
					panic(err)
				}
				_ = w.nc.Publish(ledger.BeaconSubject(s), data) // NATS may be away
			}
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()
}

func (w *world) hush(silent bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.silent = silent
}

func (w *world) put(kv jetstream.KeyValue, key string, m proto.Message) {
	w.t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := kv.Put(w.t.Context(), key, data); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) account(path ...string) {
	w.t.Helper()
	for i, id := range path {
		a := directory.Account{ID: id, Plan: "pro"}
		if i+1 < len(path) {
			a.Parent = path[i+1]
		}
		if err := leasetest.PutAccount(w.t.Context(), w.directory, a); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) key(key, id, account string) {
	w.t.Helper()
	if err := leasetest.PutKey(w.t.Context(), w.directory, directory.Key{Hash: sha256.Sum256([]byte(key)), ID: id, Account: account}); err != nil {
		w.t.Fatal(err)
	}
}

// decide publishes a decision as an aggregator does and returns it.
func (w *world) decide(account string, v usage.Verdict, edit ...func(*usage.Decision)) usage.Decision {
	w.t.Helper()
	w.mu.Lock()
	w.revision++
	d := usage.Decision{
		ID: ksuid.New().String(), Account: account, LimitID: "pro/calls", Meter: usage.Calls, Verdict: v, Revision: w.revision, Used: 10, Amount: 10,
		Window: usage.Day, PeriodStart: usage.At(time.Now().Add(-time.Hour)), PeriodEnd: usage.At(time.Now().Add(time.Hour)),
		Cause: usage.At(time.Now()), ActionURL: "https://pay.example/acme",
	}
	w.mu.Unlock()
	if v == usage.Deny {
		d.Code = usage.QuotaExceeded
	}
	for _, e := range edit {
		e(&d)
	}
	data, err := ledger.MarshalDecision(&d)
	if err != nil {
		w.t.Fatal(err)
	}
	seq, err := w.decisions.Put(w.t.Context(), ledger.DecisionKey(0, account, d.LimitID), data)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.last = seq
	w.mu.Unlock()
	return d
}

// calls reads at least n calls from the ledger.
func (w *world) calls(n int) []usage.Call {
	w.t.Helper()
	return w.callsUntil(func(all []usage.Call) bool { return len(all) >= n })
}

// callsUntil reads calls from the ledger until they are enough.
func (w *world) callsUntil(enough func([]usage.Call) bool) []usage.Call {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	var out []usage.Call
	var f ledger.Frame
	err := ledger.Read(ctx, w.js, ledger.ReadOptions{Stream: ledger.Stream, Subjects: []string{ledger.AllCalls}}, func(m ledger.Message) error {
		if err := ledger.DecodeCalls(&f, m.Subject, m.Header, m.Data); err != nil {
			return err
		}
		for i := range f.N {
			out = append(out, f.Call(i))
		}
		if enough(out) {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		w.t.Fatalf("the ledger has %d calls, not those that were waited for: %v", len(out), err)
	}
	return out
}

var errEnough = errors.New("enough")

// running is a gateway under test.
type running struct {
	t            testing.TB
	proxy, admin string
	readiness    *telemetry.Readiness
	stop         func() error
}

const modelAnswer = `{"id":"x","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,"prompt_tokens_details":{"cached_tokens":4}}}`

// upstream is a model provider that answers every question the same way.
func upstream(t testing.TB) *httptest.Server {
	t.Helper()
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		for _, h := range []string{"Authorization", "X-Api-Key", EventTimeHeader} {
			if r.Header.Get(h) != "" {
				t.Errorf("the upstream sees %s", h)
			}
		}
		w.Header().Set("X-Seen-Account", r.Header.Get(AccountHeader))
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, modelAnswer)
	}))
	t.Cleanup(up.Close)
	return up
}

func startGateway(t testing.TB, natsURL string, edit ...func(*Options)) *running {
	t.Helper()
	r := &running{t: t, readiness: telemetry.NewReadiness()}
	ctx, cancel := context.WithCancel(context.Background())
	o := Options{
		NATS: natsconn.Options{URL: natsURL}, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", Name: "g1",
		Logger: zerolog.Nop(), Readiness: r.readiness, SpoolDir: t.TempDir(), StopTimeout: 5 * time.Second,
	}
	ports := make(chan [2]string, 1)
	o.Ready = func(p, a net.Addr) { ports <- [2]string{"http://" + p.String(), "http://" + a.String()} }
	for _, e := range edit {
		e(&o)
	}
	if len(o.Config.Routes) == 0 {
		o.Config = SingleUpstream("chat", upstream(t).URL, refusal.Problem)
	}
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	var once sync.Once
	var result error
	r.stop = func() error {
		once.Do(func() {
			cancel()
			result = <-done
		})
		return result
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	select {
	case p := <-ports:
		r.proxy, r.admin = p[0], p[1]
	case err := <-done:
		done <- err
		t.Fatalf("the gateway ended: %v", err)
	}
	return r
}

// within polls what another process has to bring about.
func within(t testing.TB, d time.Duration, what string, f func() bool) {
	t.Helper()
	deadline := time.After(d)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

func (r *running) ready() {
	r.t.Helper()
	within(r.t, 10*time.Second, "the gateway is ready", func() bool { return r.readiness.Status().Ready })
}

type reply struct {
	status int
	header http.Header
	body   string
}

func do(t testing.TB, method, url, key, body string, header ...string) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header, string(data)}
}

func (r *running) chat(key string, header ...string) reply {
	r.t.Helper()
	return do(r.t, http.MethodPost, r.proxy+"/v1/chat/completions", key, `{"model":"big","messages":[]}`, append([]string{"Content-Type", "application/json"}, header...)...)
}

func TestACallBecomesAnEventAndADecisionA402(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL())
	g.ready()

	if got := g.chat("sk-nobody"); got.status != 401 || got.header.Get("WWW-Authenticate") == "" {
		t.Fatalf("an unknown key: %+v", got)
	}
	if got := g.chat(""); got.status != 401 {
		t.Fatalf("no key: %+v", got)
	}
	got := g.chat("sk-search", "X-Request-Id", "req-1", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Tollkeeper-Account", "forged", EventTimeHeader, "2001-01-01T00:00:00Z")
	if got.status != 200 || got.body != modelAnswer || got.header.Get("X-Request-Id") != "req-1" || got.header.Get("X-Seen-Account") != "search" {
		t.Fatalf("an admitted call: %+v", got)
	}

	// A deny on the root refuses its service too, at once, with everything a
	// client needs to know.
	d := w.decide("acme", usage.Deny)
	within(t, 5*time.Second, "402", func() bool { return g.chat("sk-search", "X-Request-Id", "req-2").status == 402 })
	refused := g.chat("sk-search", "X-Request-Id", "req-3")
	var doc map[string]any
	if err := json.Unmarshal([]byte(refused.body), &doc); err != nil {
		t.Fatal(err)
	}
	if doc["decision_id"] != d.ID || doc["code"] != "QUOTA_EXCEEDED" || doc["request_id"] != "req-3" || refused.header.Get("Link") != `<https://pay.example/acme>; rel="payment"` {
		t.Fatalf("%+v", refused)
	}

	// Paid.
	w.decide("acme", usage.Allow)
	within(t, 5*time.Second, "200 again", func() bool { return g.chat("sk-search").status == 200 })

	if err := g.stop(); err != nil {
		t.Fatal(err)
	}
	paid := func(all []usage.Call) bool { // how often was asked meanwhile depends on the machine
		denied := slices.IndexFunc(all, func(c usage.Call) bool { return c.RequestID == "req-3" })
		return denied >= 0 && slices.ContainsFunc(all[denied:], func(c usage.Call) bool { return c.Admitted() })
	}
	for _, c := range w.callsUntil(paid) {
		switch c.RequestID {
		case "req-1":
			in, _ := c.Quantities.Get(usage.InputTokens)
			out, _ := c.Quantities.Get(usage.OutputTokens)
			cached, _ := c.Quantities.Get(usage.CachedInputTokens)
			size, _ := c.Quantities.Get(usage.Bytes)
			_, reasoning := c.Quantities.Get(usage.ReasoningTokens)
			if c.Account != "search" || c.KeyID != "k-search" || c.Model != "big" || c.Route != "chat" || c.Method != "POST" || c.Status != 200 ||
				in != 11 || out != 7 || cached != 4 || reasoning || size != int64(len(modelAnswer)) || c.Duration <= 0 || c.Flags != 0 {
				t.Errorf("%+v", c)
			}
			if hex.EncodeToString(c.TraceID[:]) != "0af7651916cd43dd8448eb211c80319c" || hex.EncodeToString(c.SpanID[:]) != "b7ad6b7169203331" || c.TraceFlags != 1 {
				t.Errorf("trace context: %+v", c)
			}
			if age := time.Since(c.Time.Time()); age < 0 || age > time.Minute {
				t.Errorf("the event time is not the gateway's: %s", c.Time.Time())
			}
		case "req-3":
			if c.Code != usage.QuotaExceeded || c.DecisionID != d.ID || c.Status != 402 || c.Quantities.Len() != 0 {
				t.Errorf("%+v", c)
			}
		}
	}
}

func TestADenyEndsByItself(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL())
	g.ready()
	end := time.Now().Add(1500 * time.Millisecond)
	w.decide("search", usage.Deny, func(d *usage.Decision) { d.PeriodEnd = usage.At(end) })
	within(t, time.Second, "402", func() bool { return g.chat("sk-search").status == 402 })
	within(t, 5*time.Second, "200", func() bool { return g.chat("sk-search").status == 200 })
	if early := time.Until(end); early > 0 {
		t.Errorf("it ended %s early", early)
	}
	if late := time.Since(end); late > time.Second {
		t.Errorf("it ended %s late", late)
	}
}

func TestLimitsWithFilters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL())
	g.ready()
	w.decide("search", usage.Deny, func(d *usage.Decision) { d.Filter.Models = []string{"big"} })
	within(t, 5*time.Second, "402", func() bool { return g.chat("sk-search").status == 402 })
	if got := do(t, http.MethodPost, g.proxy+"/v1/chat/completions", "sk-search", `{"model":"small"}`); got.status != 200 {
		t.Fatalf("another model: %+v", got)
	}
	// Whatever it calls itself, and however the member is written.
	for _, body := range []string{`{"m\u006fdel":"big"}`, `{"model":"small","model":"big"}`, ` {"x":{"model":"small"},"model":"big"}`} {
		if got := do(t, http.MethodPost, g.proxy+"/x", "sk-search", body, "Content-Type", "text/plain"); got.status != 402 {
			t.Fatalf("%s: %+v", body, got)
		}
	}
}

func TestSilenceIsUnknownAndThePolicyDecides(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	pass := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Unknown = gate.Unknown{Mode: gate.PassUnknown, MaxCalls: 3}
		o.StaleAfter = 300 * time.Millisecond
	})
	refuse := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Unknown.Mode = gate.RefuseUnknown
		o.StaleAfter = 300 * time.Millisecond
	})
	pass.ready()
	refuse.ready()
	w.hush(true)
	within(t, 5*time.Second, "503", func() bool { return refuse.chat("sk-search").status == 503 })
	got := refuse.chat("sk-search")
	if !strings.Contains(got.body, "BILLING_STATE_UNKNOWN") || got.header.Get("Retry-After") == "" {
		t.Fatalf("%+v", got)
	}
	within(t, 5*time.Second, "unready", func() bool { return !pass.readiness.Status().Ready })
	for i := range 3 {
		if got := pass.chat("sk-search", "X-Request-Id", fmt.Sprint("unknown-", i)); got.status != 200 {
			t.Fatalf("call %d: %+v", i, got)
		}
	}
	if got := pass.chat("sk-search"); got.status != 503 {
		t.Fatalf("past the bound: %+v", got)
	}
	w.hush(false)
	within(t, 5*time.Second, "known again", func() bool { return refuse.chat("sk-search").status == 200 })
	pass.ready()
	if err := pass.stop(); err != nil {
		t.Fatal(err)
	}
	w.callsUntil(func(all []usage.Call) bool {
		flagged := 0
		for _, c := range all {
			if !strings.HasPrefix(c.RequestID, "unknown-") {
				continue
			}
			flagged++
			if c.Flags&usage.AdmittedUnknown == 0 {
				t.Errorf("no flag: %+v", c)
			}
		}
		return flagged == 3
	})
}

func TestNATSAwayAtTheStart(t *testing.T) {
	t.Parallel()
	// A port that is free now, and a ledger that was there before.
	dir := t.TempDir()
	first := startNATS(t, dir, 0)
	port := first.Addr().(*net.TCPAddr).Port
	worldOn(t, first)
	stopNATS(t, first)

	g := startGateway(t, fmt.Sprintf("nats://127.0.0.1:%d", port))
	if got := g.chat("sk-search"); got.status != 503 || !strings.Contains(got.body, "BILLING_STATE_UNKNOWN") {
		t.Fatalf("without a directory: %+v", got)
	}
	if got := do(t, http.MethodPost, g.admin+"/v1/events", "", event("e1", "search", ""), "Content-Type", "application/cloudevents+json"); got.status != 503 {
		t.Fatalf("an event without a directory: %+v", got)
	}
	if got := do(t, http.MethodGet, g.admin+"/readyz", "", ""); got.status != 503 || !strings.Contains(got.body, "nats") {
		t.Fatalf("readyz: %+v", got)
	}
	w := worldOn(t, startNATS(t, dir, port))
	g.ready()
	if got := g.chat("sk-search"); got.status != 200 {
		t.Fatalf("%+v", got)
	}
	w.calls(1)
}

func TestNothingIsLostWhileNATSIsAway(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := startNATS(t, dir, 0)
	port := srv.Addr().(*net.TCPAddr).Port
	worldOn(t, srv)
	g := startGateway(t, srv.ClientURL())
	g.ready()
	stopNATS(t, srv)
	for i := range 5 {
		if got := g.chat("sk-search", "X-Request-Id", fmt.Sprint("away-", i)); got.status != 200 {
			t.Fatalf("call %d: %+v", i, got)
		}
	}
	if got := do(t, http.MethodPost, g.admin+"/v1/events", "", event("e1", "search", ""), "Content-Type", "application/cloudevents+json"); got.status != 202 {
		t.Fatalf("an event: %+v", got)
	}
	within(t, 10*time.Second, "unready", func() bool { return !g.readiness.Status().Ready })
	w := worldOn(t, startNATS(t, dir, port))
	seen := make(map[string]int)
	for _, c := range w.calls(6) {
		seen[c.RequestID+c.EventID]++
	}
	for i := range 5 {
		if n := seen[fmt.Sprint("away-", i)]; n != 1 {
			t.Errorf("call %d is there %d times", i, n)
		}
	}
	if seen["e1"] != 1 {
		t.Errorf("the event is there %d times", seen["e1"])
	}
}

// event is a CloudEvent of a call.
func event(id, account, extra string) string {
	return fmt.Sprintf(`{"specversion":"1.0","type":%q,"source":"test","id":%q,"time":%q,"data":{"account":%q,"method":"POST","meters":{"input_tokens":5,"output_tokens":null}%s}}`,
		ledger.CloudEventType, id, time.Now().UTC().Format(time.RFC3339Nano), account, extra)
}

func (w *world) deadLetters(n int) []*jetstream.RawStreamMsg {
	w.t.Helper()
	s, err := w.js.Stream(w.t.Context(), ledger.DeadLetterStream)
	if err != nil {
		w.t.Fatal(err)
	}
	var out []*jetstream.RawStreamMsg
	for i := range n {
		m, err := s.GetMsg(w.t.Context(), uint64(i+1))
		if err != nil {
			w.t.Fatalf("dead letter %d of %d: %v", i+1, n, err)
		}
		out = append(out, m)
	}
	return out
}

func TestEventsOfForeignGateways(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.MaxEventsBody, o.MaxEventsBatch = 64<<10, 10 })
	g.ready()
	post := func(contentType, body string, header ...string) (int, map[string]any) {
		t.Helper()
		got := do(t, http.MethodPost, g.admin+"/v1/events", "", body, append([]string{"Content-Type", contentType}, header...)...)
		var doc map[string]any
		if err := json.Unmarshal([]byte(got.body), &doc); err != nil {
			t.Fatalf("%d %s", got.status, got.body)
		}
		return got.status, doc
	}
	if status, doc := post("application/cloudevents+json", event("structured", "search", "")); status != 202 || doc["accepted"] != 1.0 {
		t.Fatalf("structured: %d %v", status, doc)
	}
	if status, doc := post("application/json", `{"meters":{"calls":3},"status":200}`, "Ce-Specversion", "1.0", "Ce-Type", ledger.CloudEventType, "Ce-Source", "test%20source", "Ce-Id", "binary", "Ce-Subject", "acme"); status != 202 || doc["accepted"] != 1.0 {
		t.Fatalf("binary: %d %v", status, doc)
	}
	if status, doc := post("application/cloudevents-batch+json", "["+event("b1", "search", "")+","+event("b2", "acme", "")+"]"); status != 202 || doc["accepted"] != 2.0 {
		t.Fatalf("batch: %d %v", status, doc)
	}
	if status, doc := post("application/cloudevents-batch+json", "[]"); status != 202 || doc["accepted"] != 0.0 {
		t.Fatalf("empty batch: %d %v", status, doc)
	}

	// One bad event spoils no other.
	bad := []string{
		event("mixed", "search", ""),
		strings.Replace(event("neg", "search", ""), `"input_tokens":5`, `"input_tokens":-5`, 1),
		event("who", "nobody", ""),
		strings.Replace(event("old", "search", ""), time.Now().UTC().Format("2006"), "1999", 1),
		strings.Replace(event("schema", "search", ""), ledger.CloudEventType, "com.example.other", 1),
		`"text"`,
		strings.Replace(event("future", "search", ""), time.Now().UTC().Format("2006"), "2999", 1),
	}
	status, doc := post("application/cloudevents-batch+json", "["+strings.Join(bad, ",")+"]")
	if status != 207 || doc["accepted"] != 1.0 {
		t.Fatalf("mixed: %d %v", status, doc)
	}
	reasons := make(map[float64]string)
	for _, r := range doc["rejected"].([]any) {
		m := r.(map[string]any)
		reasons[m["index"].(float64)] = m["reason"].(string)
		if m["kept"] != true {
			t.Errorf("not kept: %v", m)
		}
	}
	for i, want := range []string{"", usage.ReasonNegativeCount, usage.ReasonUnknownAccount, usage.ReasonAbsurdTime, usage.ReasonUnknownSchema, usage.ReasonMalformed, usage.ReasonAbsurdTime} {
		if reasons[float64(i)] != want {
			t.Errorf("event %d: %q, want %q", i, reasons[float64(i)], want)
		}
	}
	letters := w.deadLetters(6)
	if l := letters[1]; l.Header.Get(ledger.ReasonHeader) != usage.ReasonUnknownAccount || l.Header.Get(ledger.OriginHeader) != "g1" || !bytes.Contains(l.Data, []byte(`"nobody"`)) || l.Header.Get(ledger.DetailHeader) == "" {
		t.Errorf("%+v %s", l.Header, l.Data)
	}

	for name, c := range map[string]struct {
		contentType, body string
		status            int
		reason            string
	}{
		"all bad":        {"application/cloudevents+json", event("x", "nobody", ""), 422, usage.ReasonUnknownAccount},
		"not JSON":       {"application/cloudevents+json", "{", 400, usage.ReasonMalformed},
		"broken batch":   {"application/cloudevents-batch+json", "[" + event("x", "search", ""), 400, usage.ReasonMalformed},
		"no batch":       {"application/cloudevents-batch+json", "{}", 400, usage.ReasonMalformed},
		"too many":       {"application/cloudevents-batch+json", "[" + strings.Repeat("{},", 10) + "{}]", 413, usage.ReasonOversized},
		"too large":      {"application/cloudevents+json", strings.Repeat(" ", 65<<10), 413, usage.ReasonOversized},
		"another format": {"application/cloudevents+avro", "x", 415, usage.ReasonUnknownSchema},
		"no event":       {"text/plain", "hello", 415, usage.ReasonUnknownSchema},
	} {
		status, doc := post(c.contentType, c.body)
		var reason any
		if list, ok := doc["rejected"].([]any); ok && len(list) > 0 {
			reason = list[0].(map[string]any)["reason"]
		}
		if status != c.status || reason != c.reason {
			t.Errorf("%s: %d %v", name, status, doc)
		}
	}
	w.deadLetters(14)

	if err := g.stop(); err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]usage.Call)
	for _, c := range w.calls(5) {
		seen[c.EventID] = c
	}
	for _, id := range []string{"structured", "binary", "b1", "b2", "mixed"} {
		if _, ok := seen[id]; !ok {
			t.Errorf("%s is not in the ledger", id)
		}
	}
	if c := seen["binary"]; c.Account != "acme" || c.Source != "test source" {
		t.Errorf("%+v", c)
	}
	c := seen["structured"]
	if n, ok := c.Quantities.Get(usage.InputTokens); !ok || n != 5 {
		t.Errorf("input tokens: %d, %v", n, ok)
	}
	if _, ok := c.Quantities.Get(usage.OutputTokens); ok {
		t.Error("null is unknown, not 0")
	}
}

func TestForwardAuth(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.AdminToken = "admin-token" })
	g.ready()
	if got := do(t, http.MethodGet, g.admin+"/v1/admit", "sk-search", "", "X-Forwarded-Method", "POST", "X-Forwarded-Uri", "/v1/chat"); got.status != 200 || got.header.Get(AccountHeader) != "search" || got.header.Get(KeyIDHeader) != "k-search" {
		t.Fatalf("%+v", got)
	}
	if got := do(t, http.MethodGet, g.admin+"/v1/admit", "sk-nobody", ""); got.status != 401 {
		t.Fatalf("%+v", got)
	}
	if got := do(t, http.MethodGet, g.admin+"/metrics", "", ""); got.status != 401 {
		t.Fatalf("the rest needs the admin's token: %+v", got)
	}
	if got := do(t, http.MethodGet, g.admin+"/metrics", "admin-token", ""); got.status != 200 || !strings.Contains(got.body, "tollkeeper_gate_accounts 2") {
		t.Fatalf("%+v", got)
	}
	d := w.decide("acme", usage.Deny, func(d *usage.Decision) { d.Filter.Methods = []string{"POST"} })
	within(t, 5*time.Second, "402", func() bool {
		return do(t, http.MethodGet, g.admin+"/v1/admit", "sk-search", "", "X-Forwarded-Method", "POST").status == 402
	})
	got := do(t, http.MethodGet, g.admin+"/v1/admit?method=POST&profile=flat", "sk-search", "")
	if got.status != 402 || !strings.Contains(got.body, `"status":402`) || got.header.Get(DecisionIDHeader) != d.ID {
		t.Fatalf("%+v", got)
	}
	got = do(t, http.MethodGet, g.admin+"/v1/admit?nginx=1", "sk-search", "", "X-Original-Method", "POST")
	if got.status != 403 || got.header.Get(StatusHeader) != "402" || got.header.Get(CodeHeader) != "QUOTA_EXCEEDED" || got.header.Get("Link") == "" {
		t.Fatalf("%+v", got)
	}
	if got := do(t, http.MethodGet, g.admin+"/v1/admit?nginx=1", "sk-nobody", ""); got.status != 401 {
		t.Fatalf("%+v", got)
	}
	if got := do(t, http.MethodGet, g.admin+"/v1/admit", "sk-search", "", "X-Forwarded-Method", "GET"); got.status != 200 {
		t.Fatalf("%+v", got)
	}
	// Refusals are recorded, admissions are the caller's to report.
	for _, c := range w.calls(3) {
		if c.Code != usage.QuotaExceeded || c.DecisionID != d.ID || c.Method != "POST" {
			t.Errorf("%+v", c)
		}
	}
	if got := do(t, http.MethodGet, g.admin+"/v1/sent", "admin-token", ""); !strings.Contains(got.body, `"admitted_calls":0`) {
		t.Errorf("%s", got.body)
	}
}
