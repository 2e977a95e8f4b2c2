package gateway

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/routes"
)

// failing are upstreams that fail in every way, below one host each.
func failing(t *testing.T) (routesOf func(uncounted []string) []RouteConfig) {
	t.Helper()
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/5xx"):
			w.WriteHeader(http.StatusServiceUnavailable)
		case strings.HasPrefix(r.URL.Path, "/breaks"):
			panic(http.ErrAbortHandler)
		case strings.HasPrefix(r.URL.Path, "/late"):
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		case strings.HasPrefix(r.URL.Path, "/4xx"):
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	t.Cleanup(up.Close)
	// One that takes connections and is not what it is said to be.
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	untrusted := httptest.NewUnstartedServer(http.NotFoundHandler())
	untrusted.Config.ErrorLog = stdlog.New(io.Discard, "", 0)
	untrusted.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	untrusted.StartTLS()
	t.Cleanup(untrusted.Close)
	nobody := httptest.NewServer(nil)
	nobody.Close()
	return func(uncounted []string) []RouteConfig {
		rs := []RouteConfig{
			{Name: "refused", Upstream: nobody.URL}, {Name: "dns", Upstream: "http://no-such-host.invalid"},
			{Name: "tls", Upstream: strings.Replace(plain.URL, "http:", "https:", 1)}, {Name: "untrusted", Upstream: untrusted.URL},
			{Name: "5xx", Upstream: up.URL}, {Name: "4xx", Upstream: up.URL}, {Name: "breaks", Upstream: up.URL}, {Name: "late", Upstream: up.URL, Timeout: Duration(50 * time.Millisecond)}, {Name: "fine", Upstream: up.URL},
		}
		for i := range rs {
			rs[i].Prefix, rs[i].Uncounted = "/"+rs[i].Name, uncounted
		}
		return rs
	}
}

// What reached nobody counts no call, and what was not answered none either unless the
// route says so. All of it is recorded.
func TestACallThatNobodyServedIsRecordedAndNotCounted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	routesOf := failing(t)
	for _, c := range []struct {
		name      string
		uncounted []string
		counts    map[string]int64
	}{
		{"by default", nil, map[string]int64{"refused": 0, "dns": 0, "tls": 0, "untrusted": 0, "5xx": 1, "4xx": 1, "breaks": 0, "late": 0, "fine": 1}},
		{"all that reached it", []string{}, map[string]int64{"refused": 0, "dns": 0, "tls": 0, "untrusted": 0, "5xx": 1, "4xx": 1, "breaks": 1, "late": 1, "fine": 1}},
		{"no failure", []string{routes.Unanswered, routes.ServerErrors}, map[string]int64{"refused": 0, "dns": 0, "tls": 0, "untrusted": 0, "5xx": 0, "4xx": 1, "breaks": 0, "late": 0, "fine": 1}},
	} {
		g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.Config = Config{Routes: routesOf(c.uncounted)} })
		g.ready()
		status := map[string]int{}
		for name := range c.counts {
			status[name] = do(t, http.MethodPost, g.proxy+"/"+name, "sk-search", `{"model":"m"}`, "X-Request-Id", c.name[:2]+name).status
		}
		for name, want := range map[string]int{"refused": 502, "dns": 502, "tls": 502, "untrusted": 502, "5xx": 503, "4xx": 418, "breaks": 502, "late": 504, "fine": 200} {
			if status[name] != want {
				t.Errorf("%s: %d", name, status[name])
			}
		}
		w.callsUntil(func(all []usage.Call) bool {
			seen := 0
			for _, call := range all {
				name, mine := strings.CutPrefix(call.RequestID, c.name[:2])
				if !mine {
					continue
				}
				seen++
				n, known := call.Usage(usage.Calls)
				_, bytes := call.Usage(usage.Bytes)
				if n != c.counts[name] || !known || call.Status != uint16(status[name]) || !call.Admitted() || bytes != (n > 0) {
					t.Errorf("%s, %s: %+v", c.name, name, call)
				}
			}
			return seen == len(c.counts)
		})
		if err := g.stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// The exact tier: units of calls that reached nobody come back; of what the upstream may
// have served none does, however it ended.
func TestALeasedCallThatNobodyServedGivesItsUnitBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(
		usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 10, Tier: usage.TierExact},
		usage.Limit{ID: "posts", Meter: usage.Calls, Window: usage.Day, Amount: 10, Tier: usage.TierExact, Filter: usage.Filter{Methods: []string{"POST"}}},
	)
	routesOf := failing(t)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: routesOf([]string{routes.Unanswered, routes.ServerErrors})}
	})
	g.ready()
	call := func(name string) int {
		return do(t, http.MethodPost, g.proxy+"/"+name, "sk-tight", `{}`).status
	}
	within(t, 5*time.Second, "the key is known", func() bool { return call("refused") == 502 })
	for range 15 {
		for _, name := range []string{"refused", "tls", "untrusted"} {
			if got := call(name); got != 502 {
				t.Fatalf("%s: %d", name, got)
			}
		}
	}
	used := func(n int64) {
		t.Helper()
		within(t, 10*time.Second, fmt.Sprintf("%d calls are counted and settled", n), func() bool {
			c, p := own.Limit("tight", "of-tight/calls"), own.Limit("tight", "of-tight/posts")
			return c.Used == n && c.Lease != nil && c.Lease.Settled == n && c.Lease.Counts.Outside == 0 && p.Used == n && p.Lease.Settled == n
		})
	}
	for name, want := range map[string]int{"fine": 200, "5xx": 503, "breaks": 502, "late": 504, "4xx": 418} {
		if got := call(name); got != want {
			t.Errorf("%s: %d", name, got)
		}
	}
	used(5)
	for range 5 {
		if got := call("fine"); got != 200 {
			t.Errorf("%d", got)
		}
		if got := call("refused"); got != 502 && got != 402 {
			t.Errorf("%d", got)
		}
	}
	if got := call("fine"); got != 402 {
		t.Errorf("the 11th that was served: %d", got)
	}
	used(10)
}

// A client that hangs up while the upstream has its call has made it; one that hangs up
// before anybody has it has not.
func TestAClientThatHangsUpHasMadeTheCallThatTheUpstreamHas(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 10, Tier: usage.TierExact})
	began := make(chan struct{}, 1)
	up := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		began <- struct{}{}
		<-r.Context().Done()
	}))
	t.Cleanup(up.Close)
	// A listener that lets nobody in: its queue is taken off by nobody, and TLS waits.
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mute.Close() })
	accepted := make(chan net.Conn, 4)
	go func() {
		for {
			c, err := mute.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{{Name: "up", Prefix: "/up", Upstream: up.URL}, {Name: "mute", Prefix: "/mute", Upstream: "https://" + mute.Addr().String()}, {Name: "gone", Prefix: "/gone", Upstream: "http://127.0.0.1:1"}}}
	})
	g.ready()
	within(t, 5*time.Second, "the key is known", func() bool { return do(t, "GET", g.proxy+"/gone", "sk-tight", "").status == 502 })
	hangUp := func(path string, when func()) {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.proxy+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer sk-tight")
		req.Header.Set("X-Request-Id", path)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if resp, err := http.DefaultClient.Do(req); err == nil {
				_ = resp.Body.Close()
			}
		}()
		when()
		cancel()
		<-done
	}
	hangUp("/mute", func() { c := <-accepted; t.Cleanup(func() { _ = c.Close() }) })
	hangUp("/up", func() { <-began })
	w.callsUntil(func(all []usage.Call) bool {
		n := 0
		for _, c := range all {
			if c.RequestID == "/mute" || c.RequestID == "/up" {
				n++
				if used, _ := c.Usage(usage.Calls); c.Status != 499 || used != map[string]int64{"/mute": 0, "/up": 1}[c.RequestID] {
					t.Errorf("%+v", c)
				}
			}
		}
		return n == 2
	})
	within(t, 10*time.Second, "one call is counted", func() bool {
		l := own.Limit("tight", "of-tight/calls")
		return l.Used == 1 && l.Lease != nil && l.Lease.Settled == 1
	})
}
