package gateway

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// A limit on tokens concerns what can use tokens: whoever lists models, counts tokens or
// fetches a file is not asked for a bound, and not refused when the tokens are used up.
func TestWhatCantUseAMeterPassesItsLimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(
		usage.Limit{ID: "in", Meter: usage.InputTokens, Window: usage.Month, Amount: 1000, Tier: usage.TierExact},
		usage.Limit{ID: "out", Meter: usage.OutputTokens, Window: usage.Month, Amount: 7, Tier: usage.TierExact},
	)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		if r.Method == http.MethodPost && r.URL.Path == "/v1/chat/completions" {
			_, _ = io.WriteString(w, modelAnswer)
			return
		}
		_, _ = io.WriteString(w, `{}`)
	}))
	t.Cleanup(up.Close)
	r := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{
			{Name: "chat", Upstream: up.URL, Model: ModelConfig{JSON: "model"}},
			{Name: "based", Prefix: "/llm", StripPrefix: true, Upstream: up.URL + "/v1", Model: ModelConfig{JSON: "model"}},
			{Name: "openai", Host: "openai.example", Upstream: up.URL, Profile: refusal.OpenAI},
		}}
	})
	r.ready()
	chat := func() int {
		return do(t, http.MethodPost, r.proxy+"/v1/chat/completions", "sk-tight", `{"model":"m","max_tokens":7,"messages":[]}`, "Content-Type", "application/json").status
	}
	for _, spent := range []bool{false, true} {
		if spent {
			within(t, 5*time.Second, "the output is used up", func() bool { return chat() == 200 || own.Limit("tight", "of-tight/out").Used == 7 })
			within(t, 5*time.Second, "402", func() bool { return chat() == 402 })
		}
		for _, c := range []struct {
			method, path, body string
			want               int
		}{
			{"GET", "/v1/models", "", 200},
			{"GET", "/llm/models/m", "", 200},
			{"GET", "/v1/files/f/content", "", 200},
			{"DELETE", "/v1/files/f", "", 200},
			{"POST", "/v1/files", "--x", 200},
			{"POST", "/v1/messages/count_tokens", `{"model":"m","messages":[]}`, 200},
			{"POST", "/v1/moderations", `{"input":"x"}`, 200},
			{"POST", "/v1/images/generations", `{"model":"dall-e-3","prompt":"x"}`, 200},
			{"GET", "/v1/chat/completions/c", "", 200},
			{"HEAD", "/anything", "", 200},
			{"OPTIONS", "/anything", "", 200},
			{"POST", "/v1/embeddings", `{"model":"m","input":"x"}`, 200}, // no output, and 1,000 of input
			// What may use tokens has to say how many, or finds that there are none.
			{"POST", "/v1/images/generations", `{"model":"gpt-image-1","prompt":"x"}`, 403},
			{"POST", "/v1/chat/completions", `{"model":"m","messages":[]}`, 400},
			{"GET", "/generate", "", 400},
			{"GET", "/v1/models;x/../../generate", "", 400},
		} {
			within(t, 5*time.Second, "the key is known", func() bool { return do(t, "GET", r.proxy+"/v1/models", "sk-tight", "").status == 200 })
			got := do(t, c.method, r.proxy+c.path, "sk-tight", c.body, "Content-Type", "application/json")
			if got.status != c.want && !(spent && c.want != 200 && got.status == 402) {
				t.Errorf("spent %v, %s %s: %d %s", spent, c.method, c.path, got.status, got.body)
			}
		}
		// Who only asks, likewise.
		for uri, want := range map[string]int{"/v1/models": 200, "/generate": 403} {
			if got := do(t, "GET", r.admin+"/v1/admit?method=GET&uri="+uri, "sk-tight", ""); got.status != want && !(spent && want != 200 && got.status == 402) {
				t.Errorf("spent %v, asked for %s: %+v", spent, uri, got)
			}
		}
	}
	if got := do(t, "GET", r.proxy+"/v1/chat/completions", "sk-tight", "", "Connection", "Upgrade", "Upgrade", "websocket"); got.status != 402 && got.status != 400 {
		t.Errorf("what goes over a connection later is not known: %+v", got)
	}
}

// The same of limits that are not exact: a decision about tokens says nothing of calls
// that use none.
func TestADecisionAboutTokensSaysNothingOfCallsThatUseNone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := startGateway(t, w.srv.ClientURL())
	r.ready()
	w.decide("acme", usage.Deny, func(d *usage.Decision) { d.Meter, d.LimitID = usage.OutputTokens, "pro/tokens" })
	within(t, 5*time.Second, "402", func() bool {
		return do(t, "POST", r.proxy+"/v1/chat/completions", "sk-search", `{}`).status == 402
	})
	if got := do(t, "GET", r.proxy+"/v1/models", "sk-search", ""); got.status != 200 {
		t.Errorf("%+v", got)
	}
	w.decide("acme", usage.Deny)
	within(t, 5*time.Second, "402 of calls", func() bool { return do(t, "GET", r.proxy+"/v1/models", "sk-search", "").status == 402 })
}
