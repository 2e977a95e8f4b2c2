package gateway

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/leasetest"
)

// exact gives the world an owner that hands out leases, and account tight these limits.
func (w *world) exact(limits ...usage.Limit) *leasetest.Owner {
	w.t.Helper()
	o := leasetest.NewOwner(w.nc, w.js, shards, func(err error) { w.t.Error(err) })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	if err := leasetest.Tell(w.t.Context(), w.js, shards, map[string][]usage.Limit{"tight": limits}, nil); err != nil {
		w.t.Fatal(err)
	}
	w.key("sk-tight", "k-tight", "tight")
	return o
}

func TestAnExactLimitOnCallsThroughTheProxyAndForThoseWhoAsk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 10, Tier: usage.TierExact, ActionURL: "https://pay.example"})
	r := startGateway(t, w.srv.ClientURL())
	r.ready()
	within(t, 5*time.Second, "the key is known", func() bool {
		return do(t, http.MethodPost, r.proxy+"/x", "sk-tight", `{"model":"m"}`).status == 200
	})
	for range 4 {
		if got := do(t, http.MethodPost, r.proxy+"/x", "sk-tight", `{"model":"m"}`); got.status != 200 {
			t.Fatalf("%+v", got)
		}
	}
	for range 5 {
		if got := do(t, http.MethodGet, r.admin+"/v1/admit", "sk-tight", ""); got.status != 200 || got.header.Get(RecordedHeader) != "1" {
			t.Fatalf("%+v", got)
		}
	}
	for _, got := range []reply{do(t, http.MethodPost, r.proxy+"/x", "sk-tight", `{"model":"m"}`), do(t, http.MethodGet, r.admin+"/v1/admit", "sk-tight", "")} {
		if got.status != 402 || !strings.Contains(got.body, `"decision_id":"`) || !strings.Contains(got.body, `"requested":1`) || got.header.Get(RecordedHeader) != "" {
			t.Errorf("%+v", got)
		}
	}
	// Each once in the ledger, those who asked included.
	calls := w.callsUntil(func(all []usage.Call) bool { return len(all) == 12 })
	leased, refused := 0, 0
	for _, c := range calls {
		switch {
		case c.Code == "" && c.Flags&usage.FromLease != 0:
			leased++
		case c.Code == usage.QuotaExceeded && c.Flags&usage.FromLease == 0 && c.DecisionID != "":
			refused++
		}
	}
	if leased != 10 || refused != 2 {
		t.Errorf("%d from leases, %d refused: %+v", leased, refused, calls)
	}
	within(t, 5*time.Second, "all is counted once", func() bool {
		l := own.Limit("tight", "of-tight/calls")
		return l.Used == 10 && l.Lease != nil && l.Lease.Settled == 10 && l.Lease.Counts.Outside == 0
	})
	// An answer that is not about exact limits does not say that it recorded anything.
	if got := do(t, http.MethodGet, r.admin+"/v1/admit", "sk-acme", ""); got.status != 200 || got.header.Get(RecordedHeader) != "" {
		t.Errorf("%+v", got)
	}
}

func TestAnExactLimitOnTokensBoundsEveryCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(
		usage.Limit{ID: "out", Meter: usage.OutputTokens, Window: usage.Month, Amount: 1000, Tier: usage.TierExact},
		usage.Limit{ID: "in", Meter: usage.InputTokens, Window: usage.Month, Amount: 10_000, Tier: usage.TierExact},
	)
	seen := make(chan string, 16)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || int64(len(body)) != r.ContentLength {
			t.Errorf("%d bytes of %d: %v", len(body), r.ContentLength, err)
		}
		seen <- string(body)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, modelAnswer) // 11 tokens in, 7 out
	}))
	t.Cleanup(up.Close)
	r := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{
			{Name: "clamped", Prefix: "/clamped", Upstream: up.URL, Profile: refusal.OpenAI, Model: ModelConfig{JSON: "model"}, Clamp: ClampConfig{Member: "max_tokens", Tokens: 100}},
			{Name: "plain", Prefix: "/plain", Upstream: up.URL, Model: ModelConfig{JSON: "model"}},
		}}
	})
	r.ready()
	call := func(path, body string) reply {
		return do(t, http.MethodPost, r.proxy+path, "sk-tight", body, "Content-Type", "application/json")
	}
	within(t, 5*time.Second, "the key is known", func() bool { return call("/plain/v1/chat/completions", `{"model":"m","max_tokens":5}`).status == 200 })
	<-seen
	if got := call("/clamped", `{"model":"m"}`); got.status != 200 {
		t.Fatalf("%+v", got)
	}
	if body := <-seen; body != `{"max_tokens":100,"model":"m"}` {
		t.Errorf("the upstream was asked for %s", body)
	}
	settled := func(out, in int64) {
		t.Helper()
		within(t, 5*time.Second, "what was reported is settled, and no more", func() bool {
			o, i := own.Limit("tight", "of-tight/out"), own.Limit("tight", "of-tight/in")
			return o.Lease != nil && o.Lease.Settled == out && o.Used == out && i.Lease.Settled == in && i.Used == in
		})
	}
	settled(14, 22)
	for body, status := range map[string]int{
		`{"model":"m"}`:                   400,
		`{"model":"m","max_tokens":1001}`: 403,
		`{"model":"m","max_tokens":990}`:  402,
		`{"model":"m","max_tokens":10,"messages":[{"content":[{"type":"image_url"}]}]}`: 403,
	} {
		if got := call("/plain/v1/chat/completions", body); got.status != status {
			t.Errorf("%s: %+v", body, got)
		}
	}
	if got := call("/plain/v1/chat/completions", `{"model":"m","max_tokens":980}`); got.status != 200 {
		t.Errorf("what is left: %+v", got)
	}
	settled(21, 33)
	if got := do(t, http.MethodGet, r.admin+"/v1/admit", "sk-tight", ""); got.status != 403 {
		t.Errorf("a call that nobody here will see the end of: %+v", got)
	}
	// Who is refused because no bound is known of the call is refused as everybody else: it is in the ledger.
	w.callsUntil(func(all []usage.Call) bool {
		unbounded := 0
		for _, c := range all {
			if c.Code == usage.CostExceedsLimit && c.Status == 403 && c.Account == "tight" {
				unbounded++
			}
		}
		return unbounded == 2
	})
}

func TestAStreamedAnswerIsChargedWhatItReports(t *testing.T) {
	t.Parallel()
	const content = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}],\"usage\":null}\n\n"
	const unasked = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n"
	const reported = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7}}\n\n"
	const running = "data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":3}}\n\n"
	const done = "data: [DONE]\n\n"
	w := newWorld(t)
	own := w.exact(usage.Limit{ID: "out", Meter: usage.OutputTokens, Window: usage.Month, Amount: 1000, Tier: usage.TierExact})
	gone := make(chan struct{}, 2)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		_, _ = io.WriteString(w, content)
		if strings.Contains(string(body), "running") {
			_, _ = io.WriteString(w, running)
		}
		_ = http.NewResponseController(w).Flush()
		if strings.Contains(string(body), "hang") {
			<-r.Context().Done()
			gone <- struct{}{}
			return
		}
		if strings.Contains(string(body), `"include_usage":true`) {
			_, _ = io.WriteString(w, reported)
		}
		_, _ = io.WriteString(w, done)
	}))
	t.Cleanup(up.Close)
	r := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{{Name: "chat", Upstream: up.URL, Profile: refusal.OpenAI, Model: ModelConfig{JSON: "model"}}}}
	})
	r.ready()
	call := func(body string) reply {
		return do(t, http.MethodPost, r.proxy+"/v1/chat/completions", "sk-tight", body, "Content-Type", "application/json")
	}
	settled := func(want int64) {
		t.Helper()
		within(t, 5*time.Second, "what was reported is settled, and no more", func() bool {
			l := own.Limit("tight", "of-tight/out")
			return l.Lease != nil && l.Lease.Settled == want && l.Used <= want
		})
	}
	within(t, 5*time.Second, "the key is known", func() bool { return call(`{"model":"m","max_tokens":100,"messages":[],"stream":true}`).status == 200 })
	settled(7)
	if got := call(`{"model":"m","max_tokens":100,"messages":[],"stream":true}`); got.status != 200 || got.body != unasked+done {
		t.Errorf("who did not ask for the usage was told: %+v", got)
	}
	settled(14)
	if got := call(`{"model":"m","max_tokens":100,"messages":[],"stream":true,"stream_options":{"include_usage":true}}`); got.status != 200 || got.body != content+reported+done {
		t.Errorf("who asked for the usage: %+v", got)
	}
	settled(21)
	// Who hangs up before anything is reported has used the bound, and so has who hangs
	// up among reports of what was used so far.
	for user, heard := range map[string]string{"hang": unasked, "hang, running": unasked + running} {
		ctx, hangUp := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.proxy+"/v1/chat/completions", strings.NewReader(`{"model":"m","max_tokens":100,"messages":[],"stream":true,"user":"`+user+`"}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer sk-tight")
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		first := make([]byte, len(heard))
		if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != heard {
			t.Errorf("%q, %v", first, err)
		}
		hangUp()
		_ = resp.Body.Close()
		<-gone
	}
	settled(221)
}

// An upstream that is too late has the request all the same: what it may have used of a
// limit is not given back. One that was never reached has used nothing.
func TestAnUpstreamThatIsTooLateMayHaveUsedTheBound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(usage.Limit{ID: "out", Meter: usage.OutputTokens, Window: usage.Month, Amount: 1000, Tier: usage.TierExact})
	up := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if strings.HasPrefix(r.URL.Path, "/breaks") {
			panic(http.ErrAbortHandler) // it has served the call, and says nothing
		}
		<-r.Context().Done()
	}))
	t.Cleanup(up.Close)
	nobody := httptest.NewServer(http.NotFoundHandler())
	nobody.Close()
	r := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{
			{Name: "late", Prefix: "/late", Upstream: up.URL, Timeout: Duration(50 * time.Millisecond)},
			{Name: "gone", Prefix: "/gone", Upstream: nobody.URL},
			{Name: "breaks", Prefix: "/breaks", Upstream: up.URL},
		}}
	})
	r.ready()
	call := func(route string) int {
		return do(t, http.MethodPost, r.proxy+"/"+route+"/v1/chat/completions", "sk-tight", `{"max_tokens":100,"messages":[]}`, "Content-Type", "application/json").status
	}
	within(t, 5*time.Second, "the key is known", func() bool { return call("gone") == 502 })
	if got := call("late"); got != 504 {
		t.Errorf("status %d", got)
	}
	if got := call("gone"); got != 502 {
		t.Errorf("status %d", got)
	}
	if got := call("breaks"); got != 502 {
		t.Errorf("status %d", got)
	}
	within(t, 30*time.Second, "the bounds of what had the request are used, once", func() bool {
		l := own.Limit("tight", "of-tight/out")
		return l.Lease != nil && l.Lease.Settled == 200
	})
}
