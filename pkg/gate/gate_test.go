package gate

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/pace"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// box is an outbox that keeps what it gets, or refuses it.
type box struct {
	mu    sync.Mutex
	calls []usage.Call
	shard []uint32
	err   error
	enter chan struct{} // when set: Add says that it was reached …
	leave chan struct{} // … and waits
}

func (b *box) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (b *box) Close(context.Context) error   { return nil }
func (b *box) Producer() ksuid.KSUID         { return ksuid.KSUID{1} }

func (b *box) Add(ctx context.Context, shard uint32, c *usage.Call) error {
	if b.enter != nil {
		b.enter <- struct{}{}
		<-b.leave
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return b.err
	}
	b.calls, b.shard = append(b.calls, *c), append(b.shard, shard)
	return nil
}

func (b *box) one(t *testing.T) usage.Call {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.calls) != 1 {
		t.Fatalf("%d calls are settled, want 1: %+v", len(b.calls), b.calls)
	}
	return b.calls[0]
}

// offline is a gate as it is once its feeds have brought account acme with the
// key sk-acme, without a NATS behind it.
func offline(t testing.TB, edit ...func(*Options)) (*Gate, *box) {
	t.Helper()
	b := &box{}
	o := Options{
		Connect:    func(context.Context) (*nats.Conn, error) { return nil, errors.New("not in this test") },
		OpenOutbox: func(*nats.Conn, jetstream.JetStream, uint32) (Outbox, error) { return b, nil },
		Logger:     zerolog.Nop(), Registerer: prometheus.NewRegistry(),
	}
	for _, e := range edit {
		e(&o)
	}
	g, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	var out Outbox = b
	g.outbox.Store(&out)
	g.open(4, nil)
	(&directoryFeed{g}).Reset(recordsOf(t, []directory.Account{{ID: "acme"}}, directory.Key{Hash: HashKey("sk-acme"), ID: "k1", Account: "acme"}))
	(&decisionsFeed{g}).Reset(nil)
	g.beacons(1)
	return g, b
}

// recordsOf is a directory as it stands in the bucket.
func recordsOf(t testing.TB, accounts []directory.Account, keys ...directory.Key) []ledger.Change {
	t.Helper()
	records, err := directory.Records(nil, accounts, keys)
	if err != nil {
		t.Fatal(err)
	}
	var all []ledger.Change
	for key, value := range records {
		all = append(all, ledger.Change{Key: key, Value: value, Sequence: uint64(len(all) + 1)})
	}
	return all
}

func (g *Gate) beacons(epoch uint64) {
	now := usage.At(g.now())
	g.write.Lock()
	defer g.write.Unlock()
	for s := range uint32(4) {
		g.table.Load().Hear(table.Beacon{Shard: s, Epoch: epoch, StreamTime: now}, now)
	}
}

func change(t testing.TB, key string, m proto.Message, seq uint64) ledger.Change {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return ledger.Change{Key: key, Value: data, Sequence: seq}
}

func decision(t testing.TB, revision uint64, v usage.Verdict, cause time.Time) ledger.Change {
	t.Helper()
	return ofAccount(t, usage.Decision{ID: fmt.Sprint("d", revision), Account: "acme", LimitID: "pro/calls", Meter: usage.Calls, Verdict: v, Revision: revision, Used: 5, Amount: 5, Cause: usage.At(cause)})
}

// decisionOf is one about an exact limit, which leaves room.
func decisionOf(t testing.TB, account string, revision uint64, v usage.Verdict, room int64) ledger.Change {
	t.Helper()
	return ofAccount(t, usage.Decision{ID: fmt.Sprint("d", revision), Account: account, LimitID: "pro/calls", Meter: usage.Calls, Verdict: v, Revision: revision, Used: 5, Amount: 5, Tier: usage.TierExact, Room: room})
}

func ofAccount(t testing.TB, d usage.Decision) ledger.Change {
	t.Helper()
	if d.Verdict == usage.Deny {
		d.Code = usage.QuotaExceeded
	}
	data, err := ledger.MarshalDecision(&d)
	if err != nil {
		t.Fatal(err)
	}
	return ledger.Change{Key: ledger.DecisionKey(0, d.Account, d.LimitID), Value: data, Sequence: d.Revision}
}

func serve(g *Gate, next http.HandlerFunc, edit func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/v1/x", strings.NewReader("{}"))
	r.Header.Set("X-Api-Key", "sk-acme")
	if edit != nil {
		edit(r)
	}
	w := httptest.NewRecorder()
	g.Middleware(MiddlewareOptions{Route: "chat", Region: "eu"}, next).ServeHTTP(w, r)
	return w
}

func TestAnAdmittedCallIsRecordedAsItWas(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, b := offline(t)
		began := time.Now()
		w := serve(g, func(w http.ResponseWriter, r *http.Request) {
			if id, keyID := ReportFrom(r.Context()).Account(); id != "acme" || keyID != "k1" {
				t.Errorf("the handler sees %q, %q", id, keyID)
			}
			report := ReportFrom(r.Context())
			if err := report.Set(usage.InputTokens, 12); err != nil {
				t.Error(err)
			}
			// What can't be counted does not spoil the rest.
			for m, v := range map[usage.Meter]int64{usage.OutputTokens: -1, "a b": 1, usage.Cost: usage.MaxQuantity + 1} {
				if err := report.Set(m, v); err == nil {
					t.Errorf("%s %d is taken", m, v)
				}
			}
			for i := range usage.MaxCustomMeters + 1 {
				if err := report.Set(usage.Meter(fmt.Sprint("own-", i)), 1); (err != nil) != (i == usage.MaxCustomMeters) {
					t.Errorf("meter %d: %v", i, err)
				}
			}
			time.Sleep(20 * time.Millisecond) // of the bubble's clock
			w.WriteHeader(http.StatusTeapot)
			_, _ = io.WriteString(w, "short")
		}, nil)
		c := b.one(t)
		tokens, _ := c.Quantities.Get(usage.InputTokens)
		size, _ := c.Quantities.Get(usage.Bytes)
		if w.Code != http.StatusTeapot || w.Body.String() != "short" || c.Status != http.StatusTeapot || c.Account != "acme" || c.KeyID != "k1" || c.Route != "chat" ||
			c.Region != "eu" || c.Method != "POST" || c.Duration != 20_000 || c.Time != usage.At(began) || tokens != 12 || size != 5 || c.RequestID != w.Header().Get(RequestIDHeader) || c.RequestID == "" || c.Quantities.Len() != 2+usage.MaxCustomMeters {
			t.Errorf("%+v\n%+v", c, w)
		}
		if b.shard[0] != ledger.ShardOf("acme", 4) {
			t.Errorf("shard %d", b.shard[0])
		}
	})
}

func TestRefusalsAreRecordedAndUnauthenticatedCallsAreNot(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	never := func(http.ResponseWriter, *http.Request) { t.Error("the handler is called") }
	for _, key := range []string{"", "sk-nobody"} {
		if w := serve(g, never, func(r *http.Request) { r.Header.Set("X-Api-Key", key) }); w.Code != 401 {
			t.Fatalf("key %q: %d", key, w.Code)
		}
	}
	(&decisionsFeed{g}).Apply(decision(t, 1, usage.Deny, time.Time{}))
	if w := serve(g, never, nil); w.Code != 402 || w.Header().Get("Content-Type") != "application/problem+json" {
		t.Fatalf("%+v", w)
	}
	c := b.one(t)
	if c.Code != usage.QuotaExceeded || c.DecisionID != "d1" || c.Status != 402 || c.Quantities.Len() != 0 {
		t.Errorf("%+v", c)
	}
	if n := testutil.ToFloat64(g.metrics.refusals.WithLabelValues("QUOTA_EXCEEDED")); n != 1 {
		t.Errorf("refusals: %v", n)
	}
}

// Whatever kills the gateway, a client that has its whole answer has been metered.
func TestTheEventIsWithTheOutboxBeforeTheAnswerEnds(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]http.HandlerFunc{
		"announced length": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100000")
			_, _ = io.WriteString(w, strings.Repeat("x", 60000))
			_, _ = io.WriteString(w, strings.Repeat("x", 40000))
		},
		"unknown length, flushed": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat("x", 100000))
			w.(http.Flusher).Flush()
		},
		"short": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") },
		"empty": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				g, b := offline(t)
				b.enter, b.leave = make(chan struct{}), make(chan struct{})
				l := newPipes()
				srv := &http.Server{Handler: g.Middleware(MiddlewareOptions{}, handler)}
				served := make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				client := &http.Client{Transport: &http.Transport{DialContext: l.dial, DisableKeepAlives: true}}
				whole := make(chan error, 1)
				go func() {
					req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://gateway/", nil)
					if err != nil {
						whole <- err
						return
					}
					req.Header.Set("Authorization", "Bearer sk-acme")
					resp, err := client.Do(req)
					if err != nil {
						whole <- err
						return
					}
					_, err = io.Copy(io.Discard, resp.Body)
					whole <- errors.Join(err, resp.Body.Close())
				}()
				<-b.enter
				synctest.Wait() // everybody has done what can be done
				select {
				case <-whole:
					t.Fatal("the client had the whole answer before the outbox had the event")
				default:
				}
				close(b.leave)
				if err := <-whole; err != nil {
					t.Fatal(err)
				}
				b.one(t)
				if err := srv.Close(); err != nil {
					t.Fatal(err)
				}
				<-served
			})
		})
	}
}

// pipes is a listener without a network, which a synctest bubble can wait for.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case p.conns <- server:
		return client, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func TestAHandlerThatPanicsIsMeteredAndItsAnswerStaysBroken(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	defer func() {
		if v := recover(); v != http.ErrAbortHandler {
			t.Errorf("recovered %v", v)
		}
		c := b.one(t)
		if size, _ := c.Quantities.Get(usage.Bytes); c.Status != 200 || size != 3 {
			t.Errorf("%+v", c)
		}
	}()
	serve(g, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "10")
		_, _ = io.WriteString(w, "abc")
		panic(http.ErrAbortHandler)
	}, nil)
}

func TestAClientThatHangsUpIsMetered(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	serve(g, func(http.ResponseWriter, *http.Request) {}, func(r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		cancel()
		*r = *r.WithContext(ctx)
	})
	if c := b.one(t); c.Status != 200 {
		t.Errorf("%+v", c)
	}
}

func TestTheWriterKeepsWhatHandlersNeed(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	srv := httptest.NewServer(g.Middleware(MiddlewareOptions{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			w.WriteHeader(http.StatusEarlyHints)
			for i := range 2 {
				_, _ = fmt.Fprintf(w, "data: %d\n", i)
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Error(err)
				}
				if i == 0 {
					<-r.Context().Done() // the client has seen the first line and goes
					return
				}
			}
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nhello")
		_ = rw.Flush()
		_ = conn.Close()
	})))
	defer srv.Close()
	get := func(path string) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", "sk-acme")
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	resp := get("/hijack")
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Errorf("status %d", resp.StatusCode)
	}
	_ = resp.Body.Close()
	resp = get("/stream")
	line, err := bufio.NewReader(resp.Body).ReadString('\n')
	if err != nil || line != "data: 0\n" {
		t.Errorf("%q %v", line, err)
	}
	_ = resp.Body.Close()
	srv.Close() // waits for the handlers
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.calls) != 2 || b.calls[0].Status != 101 || b.calls[1].Status != 200 {
		t.Fatalf("%+v", b.calls)
	}
	// What went over a connection that was handed over nobody has seen (law 9).
	if size, known := b.calls[0].Quantities.Get(usage.Bytes); known {
		t.Errorf("%d bytes went over the connection", size)
	}
	if size, _ := b.calls[1].Quantities.Get(usage.Bytes); size != 8 {
		t.Errorf("%d bytes were streamed", size)
	}
}

func TestAFullOutboxRefusesCallsBeforeTheyCostAnything(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, b := offline(t)
		served := 0
		handler := func(http.ResponseWriter, *http.Request) { served++ }
		b.err = fmt.Errorf("wrapped: %w", outbox.ErrFull)
		if w := serve(g, handler, nil); w.Code != 200 {
			t.Fatalf("the first finds out: %d", w.Code)
		}
		for range 5 {
			if w := serve(g, handler, nil); w.Code != 503 || !strings.Contains(w.Body.String(), string(refusal.MeteringUnavailable)) {
				t.Fatalf("%+v", w)
			}
		}
		g.refresh()
		if err := g.Ready(); err == nil || !strings.Contains(err.Error(), "full") {
			t.Errorf("ready: %v", err)
		}
		time.Sleep(2 * pace.ProbeEvery)
		g.beacons(1)
		serve(g, handler, nil) // a probe, which fails
		if w := serve(g, handler, nil); w.Code != 503 {
			t.Fatalf("after the probe: %d", w.Code)
		}
		time.Sleep(2 * pace.ProbeEvery)
		g.beacons(1)
		b.err = nil
		for range 3 {
			if w := serve(g, handler, nil); w.Code != 200 {
				t.Fatalf("with room again: %d", w.Code)
			}
		}
		if served != 5 || testutil.ToFloat64(g.metrics.unsettled) != 2 {
			t.Errorf("%d served, %v unsettled", served, testutil.ToFloat64(g.metrics.unsettled))
		}
	})
}

func TestAnAnswerThatCannotBeRecordedIsBrokenOffWhereThatIsWanted(t *testing.T) {
	t.Parallel()
	for _, strict := range []bool{false, true} {
		g, b := offline(t, func(o *Options) { o.AbortUnsettled = strict })
		b.err = outbox.ErrNotSafe
		var w *httptest.ResponseRecorder
		aborted := func() (aborted bool) {
			defer func() {
				if v := recover(); v != nil {
					aborted = v == http.ErrAbortHandler
				}
			}()
			w = serve(g, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "answer") }, nil)
			return false
		}()
		if aborted != strict || !strict && w.Body.String() != "answer" {
			t.Errorf("strict %v: aborted %v", strict, aborted)
		}
	}
}

func TestAnAbsurdEventTimeIsNotTaken(t *testing.T) {
	t.Parallel()
	for _, at := range []time.Time{{}, time.Now().Add(48 * time.Hour)} {
		g, b := offline(t)
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("X-Api-Key", "sk-acme")
		g.Middleware(MiddlewareOptions{Time: func(*http.Request, time.Time) time.Time { return at }}, http.NotFoundHandler()).ServeHTTP(httptest.NewRecorder(), r)
		if c := b.one(t); time.Since(c.Time.Time()).Abs() > time.Minute {
			t.Errorf("%s became %s", at, c.Time.Time())
		}
	}
}

func TestBeforeAnythingIsKnown(t *testing.T) {
	t.Parallel()
	b := &box{}
	g, err := New(Options{
		Connect:    func(context.Context) (*nats.Conn, error) { return nil, errors.New("away") },
		OpenOutbox: func(*nats.Conn, jetstream.JetStream, uint32) (Outbox, error) { return b, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if w := serve(g, nil, nil); w.Code != 503 || !strings.Contains(w.Body.String(), "BILLING_STATE_UNKNOWN") {
		t.Fatalf("%+v", w)
	}
	if err := g.Settle(t.Context(), usage.Call{Account: "acme"}); !errors.Is(err, ErrNotReady) {
		t.Errorf("settle: %v", err)
	}
	if err := g.Ready(); err == nil {
		t.Error("it is ready")
	}
	if g.Admit(&Account{}, Request{}).Allowed {
		t.Error("it admits")
	}
}

func TestSettle(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	if err := g.Settle(t.Context(), usage.Call{Account: "acme", Status: 200}); err != nil {
		t.Fatal(err)
	}
	b.one(t)
	if err := g.Settle(t.Context(), usage.Call{Account: "nobody"}); !errors.Is(err, ErrUnknownAccount) {
		t.Errorf("%v", err)
	}
	if err := g.Ready(); err != nil {
		g.refresh()
		if err = g.Ready(); err != nil {
			t.Errorf("ready: %v", err)
		}
	}
}

func TestTheFeedMeasuresDecisionLatency(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, _ := offline(t)
		f := &decisionsFeed{g}
		f.Apply(decision(t, 3, usage.Deny, time.Now().Add(-4*time.Millisecond)))
		f.Apply(decision(t, 2, usage.Allow, time.Now().Add(-time.Second))) // older: not applied, not measured
		f.Apply(decision(t, 4, usage.Allow, time.Now().Add(-900*24*time.Hour)))
		f.Apply(ledger.Change{Key: ledger.CheckpointKey(0), Value: []byte("x"), Sequence: 9})
		f.Apply(ledger.Change{Key: "0.a.b", Value: []byte("\xff"), Sequence: 10})
		if got := time.Duration(g.metrics.maxLatency.Load()); got != 4*time.Millisecond {
			t.Errorf("max %s", got)
		}
		for name, c := range map[string]struct {
			c    prometheus.Collector
			want float64
		}{
			"outdated": {g.metrics.outdated, 1}, "implausible": {g.metrics.implausible, 1},
			"undecodable": {g.metrics.undecoded.WithLabelValues("decisions"), 1}, "denies": {g.metrics.decisions.WithLabelValues("deny"), 1},
		} {
			if got := testutil.ToFloat64(c.c); got != c.want {
				t.Errorf("%s: %v, want %v", name, got, c.want)
			}
		}
	})
}

// A gateway that starts on a large directory says how far it is.
func TestReadinessTellsHowMuchIsRead(t *testing.T) {
	t.Parallel()
	var told lastWord
	g, err := New(Options{
		Connect: func(context.Context) (*nats.Conn, error) { return nil, errors.New("not in this test") }, Logger: zerolog.Nop(),
		OpenOutbox: func(*nats.Conn, jetstream.JetStream, uint32) (Outbox, error) { return &box{}, nil }, DirectoryReadiness: &told,
	})
	if err != nil {
		t.Fatal(err)
	}
	g.open(4, func() usage.Micros { return 0 })
	g.ready.Reading(ledger.DirectoryBucket)(812, 2049)
	g.refresh()
	if want := "the directory was not read yet (812 of 2049 records are read)"; string(told) != want {
		t.Errorf("readiness says %q, want %q", told, want)
	}
	(&directoryFeed{g}).Reset(nil)
	if told != "" {
		t.Errorf("readiness says %q of a directory that is read", told)
	}
}

// lastWord is what readiness said last of a part.
type lastWord string

func (p *lastWord) OK()                    { *p = "" }
func (p *lastWord) NotReady(reason string) { *p = lastWord(reason) }

func TestTheFeedFollowsDeletions(t *testing.T) {
	t.Parallel()
	g, _ := offline(t)
	f, d := &decisionsFeed{g}, &directoryFeed{g}
	deny := decision(t, 1, usage.Deny, time.Time{})
	f.Apply(deny)
	f.Apply(ledger.Change{Key: deny.Key, Sequence: 2})
	a, _ := g.AccountByID("acme")
	if !g.Admit(a, Request{}).Allowed {
		t.Error("the deleted decision refuses")
	}
	h := HashKey("sk-acme")
	keys := directory.KeysKey(directory.KeyPart(h))
	if _, found := g.Account(&h); found != Found {
		t.Errorf("the key: %v", found)
	}
	d.Apply(ledger.Change{Key: keys, Sequence: 9})
	if _, found := g.Account(&h); found != NotFound {
		t.Errorf("the deleted key: %v", found)
	}
	const weird = "weird/ü id"
	for _, c := range recordsOf(t, []directory.Account{{ID: weird}}) {
		d.Apply(c)
	}
	if _, found := g.AccountByID(weird); found != Found {
		t.Errorf("a weird id: %v", found)
	}
	d.Apply(ledger.Change{Key: directory.AccountsKey(directory.AccountPart(weird)), Sequence: 11})
	if _, found := g.AccountByID(weird); found != NotFound {
		t.Errorf("a deleted weird id: %v", found)
	}
	for _, bad := range []ledger.Change{
		{Key: keys, Value: []byte("\xff")}, {Key: directory.PlansKey, Value: []byte("\xff")}, change(t, keys, &tollkeeperv1.DirectoryKeys{Keys: []*tollkeeperv1.DirectoryKey{{Sha256: []byte("short")}}}, 12),
		change(t, directory.AccountsKey(directory.AccountPart("acme")), &tollkeeperv1.DirectoryAccounts{Accounts: []*tollkeeperv1.DirectoryAccount{{Id: "other"}}}, 13),
	} {
		d.Apply(bad)
	}
	if _, found := g.AccountByID("acme"); found != Found {
		t.Errorf("a record that can't be read took an account away: %v", found)
	}
	if n := testutil.ToFloat64(g.metrics.undecoded.WithLabelValues("directory")); n != 4 {
		t.Errorf("%v records were found bad, want 4", n)
	}
	d.Apply(ledger.Change{Key: "later.thing", Value: []byte("x")})
}

func TestTraceparent(t *testing.T) {
	t.Parallel()
	const good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	trace, span, flags, ok := ParseTraceparent(good)
	if !ok || hex.EncodeToString(trace[:]) != good[3:35] || hex.EncodeToString(span[:]) != good[36:52] || flags != 1 {
		t.Errorf("%x %x %x %v", trace, span, flags, ok)
	}
	if _, _, _, ok := ParseTraceparent("cc" + good[2:] + "-what-comes-later"); !ok {
		t.Error("a later version is not read")
	}
	for _, s := range []string{
		"", "00", good[:54], good + "-x", "ff" + good[2:], strings.ToUpper(good), "00-00000000000000000000000000000000-b7ad6b7169203331-01",
		"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", "00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "00-0af7651916cd43dd8448eb211c80319g-b7ad6b7169203331-01", "cc" + good[2:] + "x",
	} {
		if trace, span, flags, ok := ParseTraceparent(s); ok || trace != [16]byte{} || span != [8]byte{} || flags != 0 {
			t.Errorf("%q is taken for a trace", s)
		}
	}
}

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	for _, sane := range []string{"a", "req_01HZX-9.~:/+=@", strings.Repeat("x", 128)} {
		if RequestID(sane) != sane {
			t.Errorf("%q is not kept", sane)
		}
	}
	for _, bad := range []string{"", strings.Repeat("x", 129), "a b", "a\nb", "ü", "<script>", `"`} {
		if got := RequestID(bad); got == bad || len(got) != 27 {
			t.Errorf("%q became %q", bad, got)
		}
	}
}

func TestKeysInHeaders(t *testing.T) {
	t.Parallel()
	key := KeyFromHeaders("Authorization", "X-Api-Key", "api-key")
	for want, h := range map[string]http.Header{
		"a": {"Authorization": {"Bearer a"}, "X-Api-Key": {"b"}},
		"b": {"Authorization": {"Basic zzz"}, "X-Api-Key": {" b "}},
		"c": {"Authorization": {"Bearer "}, "Api-Key": {"c"}},
		"d": {"Authorization": {"bearer  d"}},
		"":  {"Authorization": {"d"}},
	} {
		if got := key(&http.Request{Header: h}); got != want {
			t.Errorf("%v: %q, want %q", h, got, want)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	t.Parallel()
	connect := func(context.Context) (*nats.Conn, error) { return nil, nil }
	open := func(*nats.Conn, jetstream.JetStream, uint32) (Outbox, error) { return nil, nil }
	for name, o := range map[string]Options{
		"no NATS":      {OpenOutbox: open},
		"no outbox":    {Connect: connect},
		"unknown mode": {Connect: connect, OpenOutbox: open, Unknown: Unknown{Mode: "maybe"}},
		"shards":       {Connect: connect, OpenOutbox: open, Shards: ledger.MaxShards + 1},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestRunEndsWhenNATSCanNeverBeReached(t *testing.T) {
	t.Parallel()
	refused := errors.New("authorization violation")
	g, err := New(Options{
		Connect:    func(context.Context) (*nats.Conn, error) { return nil, refused },
		OpenOutbox: func(*nats.Conn, jetstream.JetStream, uint32) (Outbox, error) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Run(t.Context()); !errors.Is(err, refused) {
		t.Errorf("%v", err)
	}
}

// Admission as a caller sees it: key hash in, verdict out.
func BenchmarkAdmit(b *testing.B) {
	g, _ := offline(b)
	h := HashKey("sk-acme")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c, found := g.Account(&h)
			if found != Found || !g.Admit(c.Account, Request{Model: "m", Route: "r", Method: "POST"}).Allowed {
				b.Error("refused")
				return
			}
		}
	})
}

func BenchmarkMiddleware(b *testing.B) {
	g, box := offline(b)
	h := g.Middleware(MiddlewareOptions{Route: "chat"}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200) }))
	r := httptest.NewRequest(http.MethodPost, "/v1/x", nil)
	r.Header.Set("X-Api-Key", "sk-acme")
	b.ReportAllocs()
	for b.Loop() {
		h.ServeHTTP(httptest.NewRecorder(), r)
		box.calls, box.shard = box.calls[:0], box.shard[:0]
	}
}
