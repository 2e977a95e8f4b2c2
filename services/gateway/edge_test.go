package gateway

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// raw sends a request as it is written and returns the connection and the answer.
func raw(t *testing.T, base, request string) (net.Conn, *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return conn, resp
}

// net/http lets go of a connection that was upgraded, and of handlers whose time is
// over: their calls are recorded nevertheless.
func TestStoppingRecordsUpgradedConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(io.Discard, rw) // until the gateway hangs up
	}))
	t.Cleanup(up.Close)
	for range 5 { // it is a race
		g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.Config = SingleUpstream("x", up.URL, "") })
		g.ready()
		const open = 8
		for i := range open {
			_, resp := raw(t, g.proxy, fmt.Sprintf("GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\nX-Request-Id: ws-%d\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", i))
			if resp.StatusCode != http.StatusSwitchingProtocols {
				t.Fatalf("status %d", resp.StatusCode)
			}
		}
		began := time.Now()
		if err := g.stop(); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("it took %s", d)
		}
	}
	for _, c := range w.calls(5 * 8) {
		if c.Status != http.StatusSwitchingProtocols {
			t.Errorf("%+v", c)
		}
	}
}

func TestWhatAClientCannotSmuggle(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hints" {
			w.WriteHeader(http.StatusEarlyHints)
		}
		var seen []string
		for name, values := range r.Header {
			if plain := strings.ReplaceAll(strings.ToLower(name), "_", "-"); strings.HasPrefix(plain, "x-tollkeeper") || plain == "x-model" {
				seen = append(seen, fmt.Sprint(name, values))
			}
		}
		_, _ = fmt.Fprint(w, r.URL.EscapedPath(), seen)
	}))
	t.Cleanup(up.Close)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{
			{Name: "cheap", Prefix: "/", Upstream: up.URL},
			{Name: "dear", Prefix: "/dear", Upstream: up.URL, StripPrefix: true},
			{Name: "model", Prefix: "/model", Upstream: up.URL, Model: ModelConfig{JSON: "model"}},
			{Name: "header", Prefix: "/header", Upstream: up.URL, Model: ModelConfig{Header: "x-model"}},
		}}
	})
	g.ready()

	t.Run("who it is, in any spelling", func(t *testing.T) {
		_, resp := raw(t, g.proxy, "GET /echo HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\nConnection: X-Tollkeeper-Account\r\n"+
			"X-Tollkeeper-Account: victim\r\nX_Tollkeeper_Account: victim\r\nX-TOLLKEEPER_KEY-ID: k\r\nX-Tollkeeper-Admitted-Unknown: 1\r\n\r\n")
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(body); strings.Contains(got, "victim") || strings.Contains(got, "Unknown") || strings.Contains(got, "_") || !strings.Contains(got, "X-Tollkeeper-Account[search]") {
			t.Error(got)
		}
	})
	t.Run("another route's name", func(t *testing.T) {
		for _, path := range []string{"/cheap/../dear/x", "/cheap/%2e%2e/dear/x", "/dear/./x", "/dear/..", "/a/..%2fdear/x"} {
			_, resp := raw(t, g.proxy, "GET "+path+" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\n\r\n")
			if resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%s: %d", path, resp.StatusCode)
			}
		}
		if got := do(t, http.MethodGet, g.proxy+"/a..b/...", "sk-search", ""); got.status != 200 || !strings.HasPrefix(got.body, "/a..b/...[") {
			t.Errorf("dots in names are names: %+v", got)
		}
	})
	t.Run("another model", func(t *testing.T) {
		for i, body := range []string{`{"model":"dear"} trailing`, `{"model":"dear"}{"model":"cheap"}`, "\xef\xbb\xbf" + `{"model":"dear"}`, `{"model":"cheap","model":"dear"}`} {
			id := fmt.Sprint("model-", i)
			if got := do(t, http.MethodPost, g.proxy+"/model", "sk-search", body, "X-Request-Id", id, "Content-Type", "application/json"); got.status != 200 {
				t.Errorf("%s: %+v", body, got)
			}
			w.callsUntil(func(all []usage.Call) bool {
				for _, c := range all {
					if c.RequestID == id {
						if c.Model != "dear" {
							t.Errorf("%q is counted for model %q", body, c.Model)
						}
						return true
					}
				}
				return false
			})
		}
	})
	t.Run("another model, by the number or the spelling of headers", func(t *testing.T) {
		ask := func(header string) (int, string) {
			_, resp := raw(t, g.proxy, "GET /header HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\n"+header+"\r\n")
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, string(body)
		}
		if status, _ := ask("X-Model: cheap\r\nX-Model: dear\r\n"); status != http.StatusBadRequest {
			t.Errorf("two models: %d", status)
		}
		if status, body := ask("X-Model: cheap\r\nX_Model: dear\r\n"); status != http.StatusOK || !strings.Contains(body, "X-Model[cheap]") || strings.Contains(body, "dear") {
			t.Errorf("two spellings: %d, the upstream sees %s", status, body)
		}
	})
	t.Run("the request id, by early hints of the upstream", func(t *testing.T) {
		if got := do(t, http.MethodGet, g.proxy+"/hints", "sk-search", "", gate.RequestIDHeader, "hints"); got.header.Get(gate.RequestIDHeader) != "hints" {
			t.Errorf("%+v", got)
		}
	})
}

// Proxies that only ask pass their clients' headers on: what they do not set
// themselves says nothing.
func TestAskingProxies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.AdminToken = "admin-token"
		o.Config = Config{Routes: []RouteConfig{
			{Name: "dear", Prefix: "/dear", Upstream: "http://127.0.0.1:1"},
			{Name: "cheap", Prefix: "/", Upstream: "http://127.0.0.1:1"},
			{Name: "models", Prefix: "/models", Upstream: "http://127.0.0.1:1", Model: ModelConfig{Header: "X-Model"}},
		}}
	})
	g.ready()
	w.decide("acme", usage.Deny, func(d *usage.Decision) { d.Filter.Routes, d.Filter.Methods = []string{"dear"}, []string{"POST"} })
	within(t, 5*time.Second, "402", func() bool {
		return do(t, http.MethodGet, g.admin+"/v1/admit?route=dear&method=POST", "sk-search", "").status == 402
	})
	for name, c := range map[string]struct {
		method, path string
		header       []string
		want         int
	}{
		"Caddy and Traefik":                   {"GET", "/v1/admit", []string{"X-Forwarded-Method", "POST", "X-Forwarded-Uri", "/dear/x"}, 402},
		"with a header of their client":       {"GET", "/v1/admit", []string{"X-Forwarded-Method", "POST", "X-Forwarded-Uri", "/dear/x", "X-Original-Uri", "/", "X-Original-Method", "GET"}, 402},
		"nginx":                               {"GET", "/v1/admit?nginx=1", []string{"X-Original-Method", "POST", "X-Original-Uri", "/dear/x"}, 403},
		"nginx with a header of its client":   {"GET", "/v1/admit?nginx=1", []string{"X-Original-Method", "POST", "X-Original-Uri", "/dear/x", "X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET"}, 403},
		"Envoy, which appends the path":       {"POST", "/v1/admit/dear/x?a=b", nil, 402},
		"Envoy, another path":                 {"POST", "/v1/admit/other", nil, 200},
		"Envoy, another method":               {"GET", "/v1/admit/dear/x", nil, 200},
		"Envoy with a query of its client":    {"POST", "/v1/admit/dear/x?route=cheap&method=GET&uri=/&nginx=1", nil, 402},
		"Envoy with a header of its client":   {"POST", "/v1/admit/dear/x", []string{"X-Forwarded-Uri", "/", "X-Forwarded-Method", "GET", "X-Original-Uri", "/"}, 402},
		"a path that can't be read":           {"POST", "/v1/admit", []string{"X-Forwarded-Method", "POST", "X-Forwarded-Uri", "/dear/%zz"}, 400},
		"a path that is another's in the end": {"POST", "/v1/admit?uri=/x/../dear/x", nil, 400},
	} {
		if got := do(t, c.method, g.admin+c.path, "sk-search", "", c.header...); got.status != c.want {
			t.Errorf("%s: %d, want %d", name, got.status, c.want)
		}
	}
	for header, want := range map[string]int{"X-Model: a\r\n": 200, "X-Model: a\r\nX-Model: b\r\n": 400} {
		if _, resp := raw(t, g.admin, "GET /v1/admit/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\n"+header+"\r\n"); resp.StatusCode != want {
			t.Errorf("%q: %d", header, resp.StatusCode)
		}
	}
	// The rate of what passes is half of what bounds the eventual tier (law 4).
	if got := do(t, http.MethodGet, g.admin+"/metrics", "admin-token", "").body; !strings.Contains(got, `tollkeeper_gateway_admit_answers_total{outcome="admitted"} `) || strings.Contains(got, `tollkeeper_gateway_admit_answers_total{outcome="admitted"} 0`) {
		t.Error("the admissions are not counted")
	}
}

// A file's or a secret store's newline at the end of a secret would cost every call.
func TestASecretWithANewline(t *testing.T) {
	t.Setenv("EDGE_TEST_KEY", "s3cret\n")
	c := SingleUpstream("x", "http://127.0.0.1:1", "")
	c.Routes[0].SetHeaders = map[string]string{"Authorization": "Bearer ${EDGE_TEST_KEY}"}
	err := c.Validate()
	var bad *ConfigError
	if !errors.As(err, &bad) || !strings.Contains(bad.Text, "Authorization") || !strings.Contains(bad.Text, "line break") || strings.Contains(bad.Error(), "s3cret") {
		t.Errorf("%v", err)
	}
}

func TestWhatHTTPAllows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/trailer":
			w.Header().Set("Trailer", "X-Sum")
			_, _ = io.Copy(w, r.Body)
			w.Header().Set("X-Sum", "42")
		case "/length":
			w.Header().Set("Content-Length", "5")
			if r.Method != http.MethodHead {
				_, _ = io.WriteString(w, "12345")
			}
		case "/none":
			w.WriteHeader(http.StatusNoContent)
		}
	}))
	t.Cleanup(up.Close)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.Config = SingleUpstream("x", up.URL, "") })
	g.ready()
	key := "Host: x\r\nAuthorization: Bearer sk-search\r\n"

	conn, resp := raw(t, g.proxy, "POST /trailer HTTP/1.1\r\n"+key+"Transfer-Encoding: chunked\r\nX-Request-Id: chunks\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "abcde" || resp.Trailer.Get("X-Sum") != "42" {
		t.Errorf("chunks and trailers: %q %v %v", body, resp.Trailer, err)
	}
	_ = conn.Close()

	conn, resp = raw(t, g.proxy, "POST /trailer HTTP/1.1\r\n"+key+"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
	if resp.StatusCode != http.StatusContinue {
		t.Errorf("who asks first is told %d", resp.StatusCode)
	}
	_, _ = io.WriteString(conn, "abcde")
	answers := bufio.NewReader(conn)
	for resp.StatusCode == http.StatusContinue { // the upstream's too
		if resp, err = http.ReadResponse(answers, nil); err != nil {
			t.Fatal(err)
		}
	}
	if resp.StatusCode != 200 {
		t.Errorf("and then %d", resp.StatusCode)
	}
	_ = resp.Body.Close()
	_ = conn.Close()

	if got := do(t, http.MethodHead, g.proxy+"/length", "sk-search", "", "X-Request-Id", "head"); got.status != 200 || got.header.Get("Content-Length") != "5" || got.body != "" {
		t.Errorf("HEAD: %+v", got)
	}
	if got := do(t, http.MethodPost, g.proxy+"/none", "sk-search", ""); got.status != 204 {
		t.Errorf("no content: %+v", got)
	}
	if _, resp = raw(t, g.proxy, "GET /length HTTP/1.1\r\n"+key+"X-Long: "+strings.Repeat("x", 80<<10)+"\r\n\r\n"); resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("huge headers: %d", resp.StatusCode)
	}

	w.decide("acme", usage.Deny)
	within(t, 5*time.Second, "402", func() bool { return do(t, http.MethodHead, g.proxy+"/length", "sk-search", "").status == 402 })
	if got := do(t, http.MethodHead, g.proxy+"/length", "sk-search", ""); got.body != "" || got.header.Get("Content-Length") == "" || got.header.Get("Link") == "" {
		t.Errorf("HEAD refused: %+v", got)
	}
	if _, resp = raw(t, g.proxy, "POST /trailer HTTP/1.1\r\n"+key+"Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n"); resp.StatusCode != http.StatusPaymentRequired {
		t.Errorf("who asks first and has used it up is told %d", resp.StatusCode)
	}
	seen := map[string]int64{}
	for _, c := range w.callsUntil(func(all []usage.Call) bool { return len(all) >= 6 }) {
		n, _ := c.Quantities.Get(usage.Bytes)
		seen[c.RequestID] = n
	}
	if seen["chunks"] != 5 || seen["head"] != 0 {
		t.Errorf("bytes: %v", seen)
	}
}

// freezer stands between the gateway and NATS and can stop passing anything on.
type freezer struct {
	net.Listener
	mu sync.RWMutex // held while frozen
}

func freeze(t *testing.T, target string) *freezer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &freezer{Listener: l}
	var wg sync.WaitGroup
	pass := func(from, to net.Conn) {
		defer wg.Done()
		defer func() { _, _ = from.Close(), to.Close() }()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			f.mu.RLock()
			_, err = to.Write(buf[:n])
			f.mu.RUnlock()
			if err != nil {
				return
			}
		}
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", strings.TrimPrefix(target, "nats://"))
			if err != nil {
				_ = in.Close()
				continue
			}
			wg.Add(2)
			go pass(in, out)
			go pass(out, in)
		}
	}()
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return f
}

// Ctrl-C ends everything within 5 s and loses nothing, whatever NATS does.
func TestStoppingWithoutNATSLosesNothing(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"away", "hangs", "hangs, and calls too"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			dir, spool := t.TempDir(), t.TempDir()
			srv := startNATS(t, dir, 0)
			port := srv.Addr().(*net.TCPAddr).Port
			w := worldOn(t, srv)
			between := freeze(t, srv.ClientURL())
			hold := make(chan struct{})
			up := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/hang" {
					<-hold
				}
			}))
			t.Cleanup(up.Close)
			t.Cleanup(func() { close(hold) })
			config := func(o *Options) { o.SpoolDir, o.Config = spool, SingleUpstream("x", up.URL, "") }
			g := startGateway(t, "nats://"+between.Addr().String(), config)
			g.ready()
			thawed := false
			if mode == "away" {
				stopNATS(t, srv)
			} else {
				between.mu.Lock()
			}
			thaw := func() {
				if !thawed && mode != "away" {
					between.mu.Unlock()
				}
				thawed = true
			}
			t.Cleanup(thaw)
			const n = 20
			for i := range n {
				if got := do(t, http.MethodGet, g.proxy+"/", "sk-search", "", "X-Request-Id", fmt.Sprint("last-", i)); got.status != 200 {
					t.Fatalf("%+v", got)
				}
			}
			want := n
			if mode == "hangs, and calls too" {
				want++
				conn, err := net.Dial("tcp", strings.TrimPrefix(g.proxy, "http://"))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = conn.Close() })
				if _, err := io.WriteString(conn, "GET /hang HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\nX-Request-Id: hung\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				within(t, 5*time.Second, "it is in flight", func() bool {
					return strings.Contains(do(t, http.MethodGet, g.admin+"/metrics", "", "").body, fmt.Sprintf("tollkeeper_gate_calls_total{outcome=\"admitted\"} %d", n+1))
				})
			}
			began := time.Now()
			err := g.stop()
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("it took %s (%v)", d, err)
			} else if err != nil {
				t.Errorf("after %s: %v", d, err)
			} else {
				t.Logf("stopped within %s", d)
			}
			thaw()
			if mode == "away" {
				w = worldOn(t, startNATS(t, dir, port))
			}
			startGateway(t, w.srv.ClientURL(), config).ready()
			seen := map[string]int{}
			w.callsUntil(func(all []usage.Call) bool {
				clear(seen)
				for _, c := range all {
					seen[c.RequestID]++
				}
				return len(seen) == want
			})
		})
	}
}
