package alerter

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/tollkeeper/tollkeeper/pkg/alert"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// testSecret signs in tests: "whsec_" and base64 of 24 bytes.
const testSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

// deadline of what a test waits for.
const deadline = 30 * time.Second

// bed is a real NATS server with the ledger's streams.
type bed struct {
	t      *testing.T
	url    string
	server *embednats.Server
	o      embednats.Options
	nc     *nats.Conn
	js     jetstream.JetStream
	mu     sync.Mutex
	number map[uint32]uint64
	id     ksuid.KSUID
}

func newBed(t *testing.T) *bed {
	t.Helper()
	o := embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute}
	s, err := embednats.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	o.Port = s.Addr().(*net.TCPAddr).Port
	b := &bed{t: t, url: s.ClientURL(), server: s, o: o, number: map[uint32]uint64{}, id: ksuid.New()}
	t.Cleanup(func() {
		if err := b.server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	nc, err := nats.Connect(s.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 2}); err != nil {
		t.Fatal(err)
	}
	b.nc, b.js = nc, js
	return b
}

// restart stops NATS, calls meanwhile, and starts it again at the same address.
func (b *bed) restart(meanwhile func()) {
	b.t.Helper()
	if err := b.server.Stop(context.Background()); err != nil {
		b.t.Fatal(err)
	}
	meanwhile()
	s, err := embednats.Start(b.t.Context(), b.o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.server = s
	eventually(b.t, "connected again", b.nc.IsConnected)
}

// publish appends one frame with a call of each account and returns its message.
func (b *bed) publish(accounts []string, code usage.Code) *nats.Msg {
	b.mu.Lock()
	defer b.mu.Unlock()
	const shard = 1
	var f ledger.Builder
	for _, a := range accounts {
		status := uint16(200)
		if code != "" {
			status = uint16(code.Status())
		}
		f.Add(&usage.Call{Time: usage.At(time.Now()), Account: a, Status: status, Code: code})
	}
	b.number[shard]++
	m := ledger.FrameMessage(shard, f.Seal(ledger.Header{Producer: b.id, Shard: shard, Number: b.number[shard], SealedAt: usage.At(time.Now())}))
	if _, err := b.js.PublishMsg(context.Background(), m); err != nil {
		b.t.Errorf("publish: %v", err)
	}
	return m
}

func names(from, to int) []string {
	var all []string
	for i := from; i < to; i++ {
		all = append(all, fmt.Sprintf("account-%d", i))
	}
	return all
}

// traffic calls with 20 accounts every 50 ms until the test ends; those that
// spike was called for are refused.
type traffic struct {
	// Held while a round is published, and by pause.
	round sync.Mutex
	mu    sync.Mutex
	bad   int
	began time.Time
}

func (tr *traffic) pause()  { tr.round.Lock() }
func (tr *traffic) resume() { tr.round.Unlock() }

func (b *bed) traffic() *traffic {
	tr := &traffic{}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			tr.round.Lock()
			tr.mu.Lock()
			bad := tr.bad
			if bad > 0 && tr.began.IsZero() {
				tr.began = time.Now()
			}
			tr.mu.Unlock()
			if bad > 0 {
				b.publish(names(0, bad), usage.CreditsDepleted)
			}
			if bad < 20 {
				b.publish(names(bad, 20), "")
			}
			tr.round.Unlock()
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	b.t.Cleanup(func() { stop(); <-done })
	return tr
}

func (tr *traffic) spike(bad int) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.bad = bad
}

func (tr *traffic) spikeBegan() time.Time {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.began
}

// quick is the default rule in small.
func quick() alert.Rule {
	r := alert.DefaultRule()
	r.Window, r.Step, r.Quiet = 2*time.Second, 100*time.Millisecond, 20*time.Second
	r.For, r.ResolveAfter = 300*time.Millisecond, 500*time.Millisecond
	return r
}

func quickOptions(url string, hooks ...Webhook) Options {
	return Options{
		NATS: natsconn.Options{URL: url}, Rules: []alert.Rule{quick()}, Webhooks: hooks,
		Timeout: time.Second, RetryMin: 50 * time.Millisecond, RetryMax: 200 * time.Millisecond,
		RepeatEvery: 500 * time.Millisecond, SaveEvery: 200 * time.Millisecond, Logger: zerolog.Nop(),
	}
}

// started is a running alerter.
type started struct {
	stop func()
	done chan error
}

// start runs an alerter and returns when it reads.
func start(t *testing.T, o Options) *started {
	t.Helper()
	if os.Getenv("ALERTER_TEST_LOG") != "" {
		o.Logger = zerolog.New(zerolog.NewTestWriter(t))
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &started{done: make(chan error, 1)}
	ready := make(chan struct{})
	o.Ready = func() { close(ready) }
	go func() { s.done <- Run(ctx, o) }()
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-s.done; err != nil {
				t.Errorf("alerter: %v", err)
			}
		})
	}
	t.Cleanup(s.stop)
	select {
	case <-ready:
	case err := <-s.done:
		s.done <- err
		t.Fatalf("alerter ended: %v", err)
	case <-time.After(deadline):
		t.Fatal("the alerter is not ready")
	}
	return s
}

// hookBody is what a webhook's body says.
type hookBody struct {
	Type string `json:"type"`
	usage.Alert
}

// hookCall is what a webhook got.
type hookCall struct {
	at     time.Time
	id     string
	status int // what it answered
	body   hookBody
}

// hook is a webhook receiver that verifies with the official library.
type hook struct {
	t      *testing.T
	srv    *httptest.Server
	answer func(n int, c *hookCall) int // n counts from 0
	calls  chan hookCall

	mu sync.Mutex
	n  int
}

func newHook(t *testing.T, answer func(n int, c *hookCall) int) *hook {
	t.Helper()
	wh, err := standardwebhooks.NewWebhook(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	h := &hook{t: t, answer: answer, calls: make(chan hookCall, 1000)}
	h.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the alerter was killed in the middle
		}
		if err := wh.Verify(body, r.Header); err != nil {
			t.Errorf("the official library says: %v", err)
		}
		c := hookCall{at: time.Now(), id: r.Header.Get("webhook-id")}
		if err := json.Unmarshal(body, &c.body); err != nil {
			t.Errorf("body %s: %v", body, err)
		}
		h.mu.Lock()
		n := h.n
		h.n++
		h.mu.Unlock()
		c.status = 204
		if h.answer != nil {
			c.status = h.answer(n, &c)
		}
		h.calls <- c
		w.WriteHeader(c.status)
	}))
	t.Cleanup(h.srv.Close)
	return h
}

func (h *hook) webhook(t *testing.T) Webhook {
	t.Helper()
	s, err := ParseSecret(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	return Webhook{Name: "test", URL: h.srv.URL + "/alerts", Secret: s}
}

// next waits for a call.
func (h *hook) next() hookCall {
	h.t.Helper()
	select {
	case c := <-h.calls:
		return c
	case <-time.After(deadline):
		h.t.Fatal("the webhook was not called")
		return hookCall{}
	}
}

// accepted waits for a call that was answered 2xx.
func (h *hook) accepted() hookCall {
	h.t.Helper()
	for {
		if c := h.next(); c.status < 300 {
			return c
		}
	}
}

// none checks that no further call came.
func (h *hook) none() {
	h.t.Helper()
	select {
	case c := <-h.calls:
		h.t.Errorf("called once more: %s %+v", c.id, c.body)
	default:
	}
}

// stored returns every alert of the ALERTS stream.
func (b *bed) stored() []usage.Alert {
	b.t.Helper()
	stream, err := b.js.Stream(b.t.Context(), ledger.AlertsStream)
	if err != nil {
		b.t.Fatal(err)
	}
	var all []usage.Alert
	for seq := stream.CachedInfo().State.FirstSeq; seq != 0 && seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(b.t.Context(), seq)
		if err != nil {
			b.t.Fatal(err)
		}
		var a usage.Alert
		if err := json.Unmarshal(m.Data, &a); err != nil {
			b.t.Fatal(err)
		}
		if m.Subject != "alerts."+a.EpisodeID || m.Header.Get("Nats-Msg-Id") != a.TransitionID() {
			b.t.Errorf("%s with id %s holds %+v", m.Subject, m.Header.Get("Nats-Msg-Id"), a)
		}
		all = append(all, a)
	}
	return all
}

// storedOnce checks that the stream holds one episode, fired and resolved.
func (b *bed) storedOnce() {
	b.t.Helper()
	all := b.stored()
	var steps []string
	for _, a := range all {
		steps = append(steps, fmt.Sprintf("%d %s", a.N, a.Transition))
	}
	if !slices.Equal(steps, []string{"1 firing", "2 resolved"}) || all[0].EpisodeID != all[1].EpisodeID {
		b.t.Errorf("ALERTS holds %+v", all)
	}
}

// eventually waits until a condition of NATS or another process holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(deadline)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("after %s still not: %s", deadline, what)
		}
	}
}

func newRegistry() *prometheus.Registry  { return prometheus.NewRegistry() }
func newReadiness() *telemetry.Readiness { return telemetry.NewReadiness() }

type nopReadiness struct{}

func (nopReadiness) OK()             {}
func (nopReadiness) NotReady(string) {}

func counter(t *testing.T, c prometheus.Metric) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// gauge returns the sum of a gauge's series, of those with all of these label values.
func gauge(t *testing.T, r *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				if slices.ContainsFunc(labels, func(v string) bool {
					return !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetValue() == v })
				}) {
					continue
				}
				sum += m.GetGauge().GetValue()
			}
		}
	}
	return sum
}
