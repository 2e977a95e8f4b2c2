package gateway

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// From a decision's publication (the answer of JetStream included) to the first
// answer at the gateway that obeys it, through real sockets.
func BenchmarkDecisionToAnswer(b *testing.B) {
	w := newWorld(b)
	g := startGateway(b, w.srv.ClientURL())
	g.ready()
	status := func() int {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, g.proxy+"/", strings.NewReader("{}"))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("X-Api-Key", "sk-search")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	var took []time.Duration
	verdict, want := usage.Deny, http.StatusPaymentRequired
	for b.Loop() {
		began := time.Now()
		w.decide("search", verdict)
		for status() != want {
		}
		took = append(took, time.Since(began))
		if verdict, want = usage.Allow, http.StatusOK; len(took)%2 == 0 {
			verdict, want = usage.Deny, http.StatusPaymentRequired
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}

// A whole call through the reverse proxy, keep-alive, one client.
func BenchmarkProxiedCall(b *testing.B) {
	w := newWorld(b)
	g := startGateway(b, w.srv.ClientURL())
	g.ready()
	b.ReportAllocs()
	for b.Loop() {
		if got := g.chat("sk-search"); got.status != http.StatusOK {
			b.Fatalf("%+v", got)
		}
	}
}
