package console

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/services/console/internal/conservation"
	"github.com/tollkeeper/tollkeeper/services/console/internal/plansapi"
	"github.com/tollkeeper/tollkeeper/services/internal/contracttest"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Every operation, and every status that it documents, at consoles in as many states as it
// takes: each answer is what its schema says, errors are problems, and what is not
// documented is not served.
func TestEveryPathAnswersAsTheContractSays(t *testing.T) {
	t.Parallel()
	const token = "a-long-token"
	w := newWorld(t)
	w.apply(demoPlans())
	defer w.owned()()
	w.publish(okCall("acme/search", 10, 20), refusedCall("acme/search", "QUOTA_EXCEEDED"))
	plain := w.start(Options{History: &fakeHistory{position: 1, calls: []history.CallsPoint{{Step: 1, Admitted: 3}}, corrected: pastCorrections()}})
	// Other machines can reach this one.
	locked := w.start(Options{Listen: "0.0.0.0:0", Token: token, History: &fakeHistory{}})
	locked = "http://127.0.0.1" + locked[strings.LastIndex(locked, ":"):]
	waiting := w.waiting()

	c := contracttest.New(t, openapi.Console)
	c.Routes((&console{audit: &conservation.Source{}, o: Options{Web: fstest.MapFS{}, Registry: prometheus.NewRegistry(), Readiness: telemetry.NewReadiness()}}).routes().Patterns(), "GET /{$}", "GET /assets/", "GET /favicon.svg")

	// Who may ask, and what can be said before NATS is there, is the same everywhere.
	for path, item := range c.Doc.Paths.Map() {
		for method := range item.Operations() {
			if path == "/healthz" {
				continue
			}
			concrete := strings.ReplaceAll(path, "{id}", "x")
			c.Do(plain, contracttest.Exchange{Method: method, Path: concrete, Host: "evil.example", Status: 403})
			c.Do(locked, contracttest.Exchange{Method: method, Path: concrete, Status: 401})
			if strings.HasPrefix(path, "/v1/") || path == "/readyz" {
				c.Do(waiting, contracttest.Exchange{Method: method, Path: concrete, Status: 503})
			}
		}
	}
	for _, path := range []string{"/v1/accounts", "/v1/accounts/hooli", "/v1/usage", "/v1/plans", "/v1/decisions", "/v1/decisions/history", "/v1/corrections", "/v1/history/calls",
		"/v1/alerts", "/v1/audit", "/v1/deadletters", "/v1/health", "/metrics", "/healthz", "/readyz", "/openapi.yaml"} {
		c.Do(plain, contracttest.Exchange{Path: path})
	}
	c.Do(plain, contracttest.Exchange{Path: "/v1/plans", Header: map[string]string{"Accept": "application/yaml"}})
	for _, bad := range []string{"/v1/accounts?limit=0", "/v1/usage?top=x", "/v1/decisions?verdict=maybe", "/v1/decisions/history?cursor=x", "/v1/corrections?limit=0", "/v1/history/calls?group=shoe",
		"/v1/alerts?limit=-1", "/v1/audit?open=maybe", "/v1/deadletters?limit=99999", "/v1/decisions/x%20y/explain", "/v1/requests/x%20y/explain"} {
		c.Do(plain, contracttest.Exchange{Path: bad, Status: 400})
	}
	c.Do(plain, contracttest.Exchange{Path: "/v1/accounts/nobody", Status: 404})
	for _, of := range []string{"decisions", "requests"} {
		c.Do(plain, contracttest.Exchange{Path: "/v1/" + of + "/" + ksuid.New().String() + "/explain", Status: 404})
	}

	put := func(status int, contentType, query, body string) {
		t.Helper()
		c.Do(plain, contracttest.Exchange{Method: "PUT", Path: "/v1/plans" + query, Header: map[string]string{"Content-Type": contentType, "If-Match": `"another"`}, Body: body, Status: status})
	}
	put(412, "application/yaml", "", "version: 1\n")
	c.Do(plain, contracttest.Exchange{Method: "PUT", Path: "/v1/plans", Header: map[string]string{"Content-Type": "application/yaml", "If-Match": "*"}, Body: "version: 1\n", Status: 409})
	c.Do(plain, contracttest.Exchange{Method: "PUT", Path: "/v1/plans", Header: map[string]string{"Content-Type": "application/yaml"}, Body: "version: 1\n", Status: 428})
	c.Do(plain, contracttest.Exchange{Method: "PUT", Path: "/v1/plans?dry_run=true&removals=remove", Header: map[string]string{"Content-Type": "application/yaml"}, Body: "version: 1\n"})
	put(400, "application/yaml", "?dry_run=perhaps", "version: 1\n")
	put(413, "application/yaml", "", strings.Repeat("#", plansapi.MaxBody+1))
	put(415, "text/plain", "", "version: 1\n")
	put(422, "application/yaml", "", "version: one\n")
	post := func(status int, contentType, body string) {
		t.Helper()
		c.Do(plain, contracttest.Exchange{Method: "POST", Path: "/v1/corrections", Header: map[string]string{"Content-Type": contentType}, Body: body, Status: status})
	}
	id := ksuid.New().String()
	post(200, "application/json", fmt.Sprintf(`{"id":%q,"account":"acme/search","adjustments":{"calls":-1},"reason":"twice"}`, id))
	post(409, "application/json", fmt.Sprintf(`{"id":%q,"account":"acme/search","adjustments":{"calls":1},"reason":"twice"}`, id))
	post(400, "application/json", "calls=-1")
	post(404, "application/json", `{"account":"nobody","adjustments":{"calls":1},"reason":"r"}`)
	post(413, "application/json", strings.Repeat(" ", 1<<20))
	post(415, "text/plain", "{}")
	post(422, "application/json", `{"account":"acme/search","adjustments":{"calls":1}}`)

	c.Undocumented(plain, nil)
	c.Undocumented(locked, map[string]string{"Authorization": "Bearer " + token})
	for _, path := range []string{"/v1", "/v1/", "/v1/nothing", "/assets/nothing.js", "/assets/", "/v2/accounts", "/index.html", "/v1/decisions/x"} {
		res, err := http.Get(plain + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 404 || res.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %s, %s", path, res.Status, res.Header.Get("Content-Type"))
		}
	}
	c.Complete(map[string]string{
		"GET /v1/live 200":                   "a stream that does not end: TestTheLiveStreamMoves",
		"GET /v1/decisions/{id}/explain 200": "TestADecisionIsExplainedOverHTTP",
		"GET /v1/decisions/{id}/explain 410": "TestADecisionIsExplainedOverHTTP",
		"GET /v1/requests/{id}/explain 200":  "TestADecisionIsExplainedOverHTTP",
		"GET /v1/requests/{id}/explain 410":  "TestADecisionIsExplainedOverHTTP",
		"GET /healthz 400":                   "net/http's own answer, before any handler: TestWhatIsNoHTTPIsRefused",
	})
}

func TestWhatIsNoHTTPIsRefused(t *testing.T) {
	t.Parallel()
	base := newWorld(t).waiting()
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET /healthz HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 12)
	if _, err := conn.Read(answer); err != nil || string(answer) != "HTTP/1.1 400" {
		t.Errorf("%v: %q", err, answer)
	}
}

// waiting is a console that does not reach NATS.
func (w *world) waiting() string {
	w.t.Helper()
	addr := make(chan net.Addr, 1)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		done <- Run(ctx, Options{Listen: "127.0.0.1:0", NATS: natsconn.Options{URL: "nats://127.0.0.1:1"}, Ready: func(a net.Addr) { addr <- a }})
	}()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	return "http://" + (<-addr).String()
}
