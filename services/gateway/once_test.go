package gateway

import (
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
)

// What was admitted once reaches the upstream once, also where connections that were
// idle break one after the other.
func TestACallIsSentOnce(t *testing.T) {
	t.Parallel()
	const idle = 4
	var gone atomic.Int64
	var together sync.WaitGroup
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 0 || len(r.TransferEncoding) > 0 && r.Method != http.MethodPost {
			t.Errorf("%s announces a body: %d %v", r.Method, r.ContentLength, r.TransferEncoding)
		}
		if r.URL.Path == "/together" {
			together.Done()
			together.Wait()
			return
		}
		gone.Add(1)
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_ = c.Close() // it was served, and nobody hears of it
	}))
	t.Cleanup(up.Close)
	p, _ := newProxyWithoutGate(t, Config{Routes: []RouteConfig{{Name: "a", Upstream: up.URL, Usage: UsageNone}}})
	transport := newTransport(DefaultTimeout)
	t.Cleanup(transport.CloseIdleConnections)
	h, err := p.upstream(&RouteConfig{Name: "a", Upstream: up.URL, Usage: UsageNone}, nil, transport)
	if err != nil {
		t.Fatal(err)
	}
	send := func(method, path string) int {
		w, r := httptest.NewRecorder(), httptest.NewRequest(method, path, nil)
		r.Header.Set("Idempotency-Key", "1") // has what has no body sent again too
		h.ServeHTTP(w, r)
		return w.Code
	}
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodDelete, http.MethodPost} {
		together.Add(idle)
		var all sync.WaitGroup
		for range idle {
			all.Go(func() { send(method, "/together") })
		}
		all.Wait()
		gone.Store(0)
		if status := send(method, "/gone"); status != http.StatusBadGateway || gone.Load() != 1 {
			t.Errorf("%s: status %d, and the upstream had it %d times", method, status, gone.Load())
		}
	}
}
