package gateway

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// A page of an origin that may call gets its preflight from the gateway, without a key
// and without a call, and can read what it is answered, refusals and failures too.
func TestPagesOfOtherOriginsReadRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodOptions {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		// It has a mind of its own about origins.
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Vary", "Accept")
		if strings.HasSuffix(r.URL.Path, "/hints") {
			w.WriteHeader(http.StatusEarlyHints)
		}
	}))
	t.Cleanup(up.Close)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{
			CORS: &CORSConfig{Origins: []string{"https://app.example", "https://*.pages.example"}, MaxAge: Duration(10 * time.Minute), Expose: []string{"X-Mine"}},
			Routes: []RouteConfig{
				{Name: "post", Prefix: "/v1", Methods: []string{"POST", "PURGE"}, Upstream: up.URL, Profile: refusal.Anthropic},
				{Name: "cookies", Prefix: "/cookies", Upstream: up.URL, CORS: &CORSConfig{Origins: []string{"https://bank.example"}, Credentials: true, Headers: []string{"X-One"}}},
				{Name: "any", Prefix: "/any", Upstream: up.URL, CORS: &CORSConfig{Origins: []string{"*"}}},
				{Name: "none", Prefix: "/none", Upstream: up.URL, CORS: &CORSConfig{}},
				{Name: "dead", Prefix: "/dead", Upstream: "http://127.0.0.1:1"},
			},
		}
	})
	g.ready()
	const allow = "Access-Control-Allow-Origin"
	for _, c := range []struct {
		name, path, origin, method, headers string
		status                              int
		allowed                             string
	}{
		{"the origin", "/v1/x", "https://app.example", "POST", "authorization,content-type,x-stainless-os", 204, "https://app.example"},
		{"a method of the route", "/v1/x", "https://app.example", "PURGE", "", 204, "https://app.example"},
		{"a part of a domain", "/v1/x", "https://a.b.pages.example", "POST", "", 204, "https://a.b.pages.example"},
		{"another origin", "/v1/x", "https://evil.example", "POST", "", 204, ""},
		{"one that only looks like it", "/v1/x", "https://pages.example.evil.example", "POST", "", 204, ""},
		{"the origin null", "/v1/x", "null", "POST", "", 204, ""},
		{"no route", "/nothing", "https://app.example", "GET", "", 204, "https://app.example"},
		{"another route's", "/cookies", "https://app.example", "GET", "", 204, ""},
		{"with cookies", "/cookies", "https://bank.example", "GET", "x-one", 204, "https://bank.example"},
		{"another header", "/cookies", "https://bank.example", "GET", "x-two", 204, ""},
		{"any", "/any", "https://whoever.example", "DELETE", "authorization", 204, "*"},
		{"a route for no other origin", "/none", "https://app.example", "GET", "", 401, ""},
		{"no preflight", "/v1/x", "", "POST", "", 404, ""},
		{"no method", "/none", "https://app.example", "", "", 401, ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, g.proxy+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for name, v := range map[string]string{"Origin": c.origin, "Access-Control-Request-Method": c.method, "Access-Control-Request-Headers": c.headers} {
			if v != "" {
				req.Header.Set(name, v)
			}
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		h := resp.Header
		if resp.StatusCode != c.status || h.Get(allow) != c.allowed {
			t.Errorf("%s: %d, %v", c.name, resp.StatusCode, h)
		}
		if c.allowed != "" && (!strings.Contains(h.Get("Access-Control-Allow-Methods"), c.method) || h.Get("Access-Control-Allow-Headers") != c.headers) {
			t.Errorf("%s: %v", c.name, h)
		}
		if c.status == 204 && !strings.Contains(strings.Join(h.Values("Vary"), ","), "Origin") || (h.Get("Access-Control-Allow-Credentials") != "") != (c.name == "with cookies") {
			t.Errorf("%s: %v", c.name, h)
		}
	}
	d := w.decide("acme", usage.Deny, func(d *usage.Decision) { d.Filter.Methods = []string{"POST"} })
	within(t, 5*time.Second, "402", func() bool { return do(t, "POST", g.proxy+"/v1/x", "sk-search", "").status == 402 })
	read := func(method, path, key, origin string, status int, allowed string) http.Header {
		t.Helper()
		got := do(t, method, g.proxy+path, key, "", "Origin", origin)
		if values := got.header.Values(allow); got.status != status || strings.Join(values, " ") != allowed || len(values) > 1 {
			t.Errorf("%s %s from %s: %d, %v", method, path, origin, got.status, got.header)
		}
		return got.header
	}
	const app = "https://app.example"
	h := read("POST", "/v1/x", "sk-search", app, 402, app)
	exposed := strings.Split(strings.ToLower(strings.Join(h.Values("Access-Control-Expose-Headers"), ",")), ",")
	for i := range exposed {
		exposed[i] = strings.TrimSpace(exposed[i])
	}
	for _, name := range []string{"x-request-id", "request-id", "x-tollkeeper-decision-id", "x-mine", "retry-after", "ratelimit"} {
		if !slices.Contains(exposed, name) {
			t.Errorf("%s is not readable: %q", name, exposed)
		}
	}
	if h.Get(DecisionIDHeader) != d.ID || h.Get("Request-Id") == "" || h.Get("Request-Id") != h.Get("X-Request-Id") {
		t.Errorf("%v", h)
	}
	read("POST", "/v1/x", "sk-nobody", app, 401, app)
	read("POST", "/v1/x", "sk-nobody", "https://evil.example", 401, "")
	read("GET", "/nothing", "sk-search", app, 404, app)
	read("GET", "/dead", "sk-search", app, 502, app)
	read("GET", "/v1/../x", "sk-search", app, 400, app)
	read("GET", "/any/hints", "sk-search", app, 200, "*")
	if h := read("GET", "/cookies/hints", "sk-search", "https://bank.example", 200, "https://bank.example"); h.Get("Access-Control-Allow-Credentials") != "true" || !slices.Contains(h.Values("Vary"), "Accept") || !slices.Contains(h.Values("Vary"), "Origin") {
		t.Errorf("%v", h)
	}
	read("GET", "/none", "sk-search", app, 200, "*") // the upstream's own word
	if h := do(t, "GET", g.proxy+"/cookies", "sk-search", "").header; h.Get(allow) != "" || !slices.Contains(h.Values("Vary"), "Origin") {
		t.Errorf("a cache must know that it depends on the origin: %v", h)
	}
	// None of the preflights is a call.
	for _, c := range w.calls(5) {
		if c.Method == http.MethodOptions {
			t.Errorf("%+v", c)
		}
	}
}
