package gateway

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func newProxyWithoutGate(t *testing.T, c Config) (*proxy, *gate.Gate) {
	t.Helper()
	g, err := gate.New(gate.Options{
		Connect:    func(context.Context) (*nats.Conn, error) { return nil, errors.New("not in this test") },
		OpenOutbox: func(*nats.Conn, jetstream.JetStream, uint32) (gate.Outbox, error) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProxy(proxyOptions{config: &c, gate: g, logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	return p, g
}

// One gateway in front of an upstream that misbehaves in every way.
func TestTheProxy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	release := make(chan struct{})
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stream":
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, "data: {\"usage\":{\"prompt_tokens\":9}}\n\n")
			w.(http.Flusher).Flush()
			<-release
			_, _ = io.WriteString(w, "data: [DONE]\n\n")
		case "/gzip":
			if r.Header.Get("Accept-Encoding") != "identity" {
				t.Errorf("the upstream is asked for %q", r.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			w.Header().Set("Content-Encoding", "gzip") // all the same
			z := gzip.NewWriter(w)
			_, _ = io.WriteString(z, modelAnswer)
			_ = z.Close()
		case "/large":
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"x":"`+strings.Repeat("y", 4<<20)+`","usage":{"input_tokens":5,"output_tokens":6}}`)
		case "/broken-off":
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `{"usage":{"input_tokens":5}`)
		case "/error":
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, `{"usage":{"input_tokens":5}}`)
		case "/hang":
			<-r.Context().Done()
		case "/echo":
			w.Header().Set("X-Request-Id", "the upstream's own")
			body, err := io.ReadAll(r.Body) // HTTP/1 does not read and answer at once
			if err != nil {
				t.Error(err)
			}
			_, _ = w.Write(body)
		case "/upgrade":
			conn, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			_ = rw.Flush()
			line, _ := rw.ReadString('\n')
			_, _ = rw.WriteString(line)
			_ = rw.Flush()
		default:
			_, _ = fmt.Fprintf(w, "%s host=%s key=%s secret=%s for=%s", r.URL.Path, r.Host, r.Header.Get("Authorization"), r.Header.Get("X-Secret"), r.Header.Get("X-Forwarded-For"))
		}
	}))
	t.Cleanup(up.Close)
	closed := httptest.NewServer(nil)
	closed.Close()
	model := ModelConfig{JSON: "model", MaxBody: 1 << 20}
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.TrustEventTime = true
		o.Config = Config{Routes: []RouteConfig{
			{Name: "main", Upstream: up.URL, Model: model},
			{Name: "hang", Prefix: "/hang", Upstream: up.URL, Timeout: Duration(50 * time.Millisecond), Profile: refusal.Flat},
			{Name: "slow", Prefix: "/slow", Upstream: up.URL + "/hang"},
			{Name: "closed", Prefix: "/closed", Upstream: closed.URL, Profile: refusal.OpenAI},
			{Name: "strip", Prefix: "/strip", Upstream: up.URL + "/base", StripPrefix: true, SetHeaders: map[string]string{"X-Secret": "s3"}},
			{Name: "keep", Prefix: "/keep", Upstream: up.URL, KeepKey: true, KeepHost: true},
			{Name: "post-only", Host: "post.example", Prefix: "/", Methods: []string{"POST"}, Upstream: up.URL},
		}}
	})
	g.ready()
	events := func(id string) usage.Call {
		t.Helper()
		var found usage.Call
		w.callsUntil(func(all []usage.Call) bool {
			n := 0
			for _, c := range all {
				if c.RequestID == id {
					found = c
					n++
				}
			}
			if n > 1 {
				t.Errorf("%s: %d events", id, n)
			}
			return n == 1
		})
		return found
	}
	tokens := func(c usage.Call) string {
		in, okIn := c.Quantities.Get(usage.InputTokens)
		out, okOut := c.Quantities.Get(usage.OutputTokens)
		return fmt.Sprint(in, okIn, out, okOut)
	}

	t.Run("streams are passed on as they come, and read", func(t *testing.T) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.proxy+"/stream", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", "sk-search")
		req.Header.Set("X-Request-Id", "stream")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		r := bufio.NewReader(resp.Body)
		if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "data:") {
			t.Fatalf("%q %v", line, err)
		}
		close(release) // only now does the upstream go on
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Fatal(err)
		}
		if c := events("stream"); tokens(c) != "9 true 0 false" || c.Status != 200 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("gzip, although it was not asked for", func(t *testing.T) {
		got := do(t, http.MethodPost, g.proxy+"/gzip", "sk-search", "", "X-Request-Id", "gzip", "Accept-Encoding", "gzip, br")
		if got.body != modelAnswer || got.header.Get("Content-Encoding") != "" {
			t.Errorf("%+v", got)
		}
		if c := events("gzip"); tokens(c) != "11 true 7 true" {
			t.Errorf("%+v", c)
		}
	})
	t.Run("an answer of any size", func(t *testing.T) {
		if got := do(t, http.MethodPost, g.proxy+"/large", "sk-search", "", "X-Request-Id", "large"); len(got.body) < 4<<20 {
			t.Fatalf("%d bytes", len(got.body))
		}
		if c := events("large"); tokens(c) != "5 true 6 true" {
			t.Errorf("%+v", c)
		}
	})
	t.Run("an answer that breaks off stays broken, and is an event", func(t *testing.T) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.proxy+"/broken-off", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", "sk-search")
		req.Header.Set("X-Request-Id", "broken")
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		if err == nil {
			t.Error("the client can't tell that it is broken off")
		}
		if c := events("broken"); tokens(c) != "0 false 0 false" || c.Status != 200 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("an upstream's error has no usage", func(t *testing.T) {
		if got := do(t, http.MethodPost, g.proxy+"/error", "sk-search", "", "X-Request-Id", "error"); got.status != 500 {
			t.Fatalf("%+v", got)
		}
		if c := events("error"); tokens(c) != "0 false 0 false" || c.Status != 500 || c.Code != "" {
			t.Errorf("%+v", c)
		}
	})
	t.Run("504 and 502 in the route's form, and as events", func(t *testing.T) {
		got := do(t, http.MethodPost, g.proxy+"/hang", "sk-search", "", "X-Request-Id", "hang")
		if got.status != 504 || !strings.HasPrefix(got.body, `{"status":504,"code":"UPSTREAM_TIMEOUT"`) {
			t.Errorf("%+v", got)
		}
		if c := events("hang"); c.Status != 504 {
			t.Errorf("%+v", c)
		}
		got = do(t, http.MethodPost, g.proxy+"/closed", "sk-search", "", "X-Request-Id", "closed")
		if got.status != 502 || !strings.Contains(got.body, `"server_error"`) {
			t.Errorf("%+v", got)
		}
		if c := events("closed"); c.Status != 502 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("who hangs up is metered", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.proxy+"/slow", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", "sk-search")
		req.Header.Set("X-Request-Id", "gone")
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_ = resp.Body.Close()
		}
		if c := events("gone"); c.Status != 200 && c.Status != gate.StatusClientGone {
			t.Errorf("%+v", c)
		}
	})
	t.Run("paths, hosts, keys and headers", func(t *testing.T) {
		host := strings.TrimPrefix(up.URL, "http://")
		if got, want := do(t, http.MethodGet, g.proxy+"/strip/a%2Fb/c", "sk-search", "", "X-Secret", "forged", "X-Forwarded-For", "1.2.3.4").body, "/base/a/b/c host="+host+" key= secret=s3 for=127.0.0.1"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if got, want := do(t, http.MethodGet, g.proxy+"/keep/x", "sk-search", "").body, "/keep/x host="+strings.TrimPrefix(g.proxy, "http://")+" key=Bearer sk-search secret= for=127.0.0.1"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
	t.Run("the body that was read for the model arrives whole", func(t *testing.T) {
		for name, body := range map[string]string{
			"json": `{"model":"big","x":"` + strings.Repeat("z", 100_000) + `"}`, "text": strings.Repeat("no json ", 300_000), "empty": "", "cut off": `{"model":"big`,
		} {
			got := do(t, http.MethodPost, g.proxy+"/echo", "sk-search", body, "X-Request-Id", "echo-"+strings.ReplaceAll(name, " ", "-"))
			if got.body != body || got.header.Values("X-Request-Id")[0] != "echo-"+strings.ReplaceAll(name, " ", "-") || len(got.header.Values("X-Request-Id")) != 1 {
				t.Errorf("%s: %d bytes came back of %d, %v", name, len(got.body), len(body), got.header)
			}
		}
		if c := events("echo-json"); c.Model != "big" {
			t.Errorf("%+v", c)
		}
		if c := events("echo-text"); c.Model != "" {
			t.Errorf("%+v", c)
		}
	})
	t.Run("a model that can't be read is not passed", func(t *testing.T) {
		if got := do(t, http.MethodPost, g.proxy+"/echo", "sk-search", `{"x":"`+strings.Repeat("z", 2<<20)+`","model":"big"}`); got.status != 413 {
			t.Errorf("%+v", got)
		}
		if got := do(t, http.MethodPost, g.proxy+"/echo", "sk-search", "\x1f\x8b", "Content-Encoding", "gzip"); got.status != 415 {
			t.Errorf("%+v", got)
		}
		if got := do(t, http.MethodPost, g.proxy+"/echo", "sk-search", `{"model":"`+strings.Repeat("z", 2000)+`"}`); got.status != 400 {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a trusted replay keeps its time", func(t *testing.T) {
		do(t, http.MethodPost, g.proxy+"/echo", "sk-search", "", "X-Request-Id", "replay", EventTimeHeader, "2023-11-16T18:17:03.9799600Z")
		if c := events("replay"); c.Time.Time().Format(time.RFC3339Nano) != "2023-11-16T18:17:03.97996Z" {
			t.Errorf("%s", c.Time.Time())
		}
	})
	t.Run("upgrades", func(t *testing.T) {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", strings.TrimPrefix(g.proxy, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = io.WriteString(conn, "GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\nX-Api-Key: sk-search\r\nX-Request-Id: upgrade\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatalf("%+v %v", resp, err)
		}
		if _, err := io.WriteString(conn, "hello\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := r.ReadString('\n'); err != nil || line != "hello\n" {
			t.Errorf("%q %v", line, err)
		}
		_ = conn.Close()
		if c := events("upgrade"); c.Status != 101 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("no route", func(t *testing.T) {
		p, _ := newProxyWithoutGate(t, Config{Routes: []RouteConfig{{Name: "a", Prefix: "/a", Upstream: up.URL}}})
		rec := httptest.NewRecorder()
		p.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/b", nil))
		if rec.Code != 404 || !bytes.Contains(rec.Body.Bytes(), []byte("NO_ROUTE")) {
			t.Errorf("%+v", rec)
		}
	})
}

// Stopping lets calls in flight finish and brings their events to the ledger.
func TestStoppingFinishesCallsInFlight(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	arrived, finish := make(chan struct{}), make(chan struct{})
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(arrived)
		<-finish
		_, _ = io.WriteString(w, "done")
	}))
	t.Cleanup(up.Close)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.Config = SingleUpstream("x", up.URL, "") })
	g.ready()
	answer := make(chan reply, 1)
	go func() {
		answer <- do(t, http.MethodPost, g.proxy+"/", "sk-search", "", "X-Request-Id", "last")
	}()
	<-arrived
	stopped := make(chan error, 1)
	began := time.Now()
	go func() { stopped <- g.stop() }()
	within(t, 5*time.Second, "the port is closed", func() bool {
		c, err := net.DialTimeout("tcp", strings.TrimPrefix(g.proxy, "http://"), time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	close(finish)
	if got := <-answer; got.status != 200 || got.body != "done" {
		t.Errorf("%+v", got)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("it took %s", d)
	}
	if c := w.calls(1)[0]; c.RequestID != "last" {
		t.Errorf("%+v", c)
	}
}

func TestWhatRunRefuses(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	good := SingleUpstream("x", "http://127.0.0.1:1", "")
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"no routes":       {Options{}, "there is no route"},
		"a taken port":    {Options{Config: good, Listen: taken.Addr().String()}, "--gateway-listen"},
		"admin for all":   {Options{Config: good, Listen: "127.0.0.1:0", AdminListen: "0.0.0.0:0"}, telemetry.ErrNotLoopback.Error()},
		"unknown mode":    {Options{Config: good, Unknown: gate.Unknown{Mode: "x"}}, "choose pass or refuse"},
		"no spool":        {Options{Config: good, Listen: "127.0.0.1:0", SpoolBeforeAnswer: true}, "needs a spool directory"},
		"a small spool":   {Options{Config: good, Listen: "127.0.0.1:0", SpoolBytes: -1}, "too few"},
		"a long name":     {Options{Config: good, Listen: "127.0.0.1:0", Name: strings.Repeat("n", 65)}, "at most 64"},
		"no NATS address": {Options{Config: good, Listen: "127.0.0.1:0"}, "no address of NATS"},
	} {
		err := Run(t.Context(), c.o)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
