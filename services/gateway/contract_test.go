package gateway

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/contracttest"
	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Every operation of the admin listener, and every status that it documents: each answer
// is what its schema says, errors are problems, and what is not documented is not served.
func TestEveryAdminPathAnswersAsTheContractSays(t *testing.T) {
	t.Parallel()
	const token = "admin-token"
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) { o.AdminToken, o.MaxEventsBody, o.MaxEventsBatch = token, 64<<10, 10 })
	g.ready()
	// This one never reaches NATS.
	away := startGateway(t, "nats://127.0.0.1:1", func(o *Options) { o.StopTimeout = 100 * time.Millisecond })

	c := contracttest.New(t, openapi.Gateway)
	c.Routes(append(adminRoutes(nil, nil, telemetry.Routes(telemetry.HandlerOptions{Gatherer: telemetry.NewRegistry(), Readiness: telemetry.NewReadiness()})).Patterns(), "GET "+admitPath))

	authorized := map[string]string{"Authorization": "Bearer " + token}
	for _, path := range []string{"/v1/sent", "/metrics", "/readyz", "/openapi.yaml"} {
		c.Do(g.admin, contracttest.Exchange{Path: path, Header: authorized})
		c.Do(g.admin, contracttest.Exchange{Path: path, Status: 401})
	}
	c.Do(g.admin, contracttest.Exchange{Path: "/healthz"})
	c.Do(away.admin, contracttest.Exchange{Path: "/readyz", Status: 503})

	post := func(base string, status int, contentType, body string) {
		t.Helper()
		c.Do(base, contracttest.Exchange{Method: "POST", Path: "/v1/events", Header: map[string]string{"Authorization": "Bearer " + token, "Content-Type": contentType}, Body: body, Status: status})
	}
	post(g.admin, 202, "application/cloudevents+json", event("one", "search", ""))
	post(g.admin, 207, "application/cloudevents-batch+json", "["+event("two", "search", "")+","+event("three", "nobody", "")+"]")
	post(g.admin, 400, "application/cloudevents+json", "{")
	post(g.admin, 413, "application/cloudevents+json", strings.Repeat(" ", 65<<10))
	post(g.admin, 415, "text/plain", "hello")
	post(g.admin, 422, "application/cloudevents+json", event("four", "nobody", ""))
	post(away.admin, 503, "application/cloudevents+json", event("one", "search", ""))
	c.Do(g.admin, contracttest.Exchange{Method: "POST", Path: "/v1/events", Body: "{}", Status: 401})

	admit := func(base string, status int, key, query string, header ...string) {
		t.Helper()
		h := map[string]string{"Authorization": "Bearer " + key}
		for i := 0; i < len(header); i += 2 {
			h[header[i]] = header[i+1]
		}
		c.Do(base, contracttest.Exchange{Path: "/v1/admit" + query, Header: h, Status: status})
	}
	admit(g.admin, 200, "sk-search", "?method=GET")
	admit(g.admin, 401, "sk-nobody", "")
	admit(g.admin, 400, "sk-search", "", "X-Forwarded-Uri", "http:opaque")
	admit(away.admin, 503, "sk-search", "")
	deny := func(account, method string, code usage.Code) {
		w.decide(account, usage.Deny, func(d *usage.Decision) {
			d.Code, d.Filter.Methods = code, []string{method}
			d.LimitID = "pro/" + method
		})
	}
	deny("acme", "POST", usage.QuotaExceeded)
	deny("acme", "PUT", usage.RateLimited)
	deny("acme", "PATCH", usage.CostExceedsLimit)
	for method, status := range map[string]int{"POST": 402, "PUT": 429, "PATCH": 403} {
		within(t, 5*time.Second, method+" is refused", func() bool {
			return do(t, http.MethodGet, g.admin+"/v1/admit?method="+method, "sk-search", "").status == status
		})
		admit(g.admin, status, "sk-search", "?method="+method)
	}

	// /v1/admit is asked with the client's methods.
	c.Undocumented(g.admin, authorized, "/v1/admit")
	for _, path := range []string{"/", "/v1", "/v1/", "/v1/event", "/v1/accounts", "/debug/pprof/"} {
		got := do(t, http.MethodGet, g.admin+path, token, "")
		if got.status != 404 || got.header.Get("Content-Type") != problem.ContentType {
			t.Errorf("%s: %d %s", path, got.status, got.body)
		}
	}
	c.Complete(map[string]string{
		"GET /healthz 400":      "net/http's own answer, before any handler",
		"GET /metrics 403":      "of the console only, which checks Host",
		"GET /readyz 403":       "of the console only, which checks Host",
		"GET /openapi.yaml 403": "of the console only, which checks Host",
	})
}
