package gateway

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/leasetest"
)

// limited gives account tight limits of the tier eventual.
func (w *world) limited(limits ...usage.Limit) {
	w.t.Helper()
	if err := leasetest.Tell(w.t.Context(), w.js, shards, map[string][]usage.Limit{"tight": limits}, nil); err != nil {
		w.t.Fatal(err)
	}
	w.key("sk-tight", "k-tight", "tight")
}

var outputADay = usage.Limit{ID: "out", Meter: usage.OutputTokens, Window: usage.Day, Amount: 30, Tier: usage.TierEventual}

// provider is an upstream that answers as OpenAI does, and only there tells usage where
// it is asked for it.
func provider(t *testing.T, answer func(w http.ResponseWriter, r *http.Request, body string)) *httptest.Server {
	t.Helper()
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		answer(w, r, string(body))
	}))
	t.Cleanup(up.Close)
	return up
}

const (
	helloChunk = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]%s}` + "\n\n"
	helloUsage = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}` + "\n\n"
)

func chatStream(body string) string {
	null, last := "", ""
	if strings.Contains(body, `"include_usage":true`) {
		null, last = `,"usage":null`, helloUsage
	}
	return fmt.Sprintf(helloChunk, null) + last + "data: [DONE]\n\n"
}

// reading of a call's output, marked if it is an estimate.
func outputOf(c usage.Call) string {
	v, known := c.Quantities.Get(usage.OutputTokens)
	s := fmt.Sprint(v)
	if !known {
		s = "unknown"
	}
	if c.Flags&usage.Estimated != 0 {
		s += " estimated"
	}
	return s + " " + c.Ending.String()
}

func (w *world) callOf(id string) usage.Call {
	w.t.Helper()
	var found usage.Call
	w.callsUntil(func(all []usage.Call) bool {
		for _, c := range all {
			if c.RequestID == id {
				found = c
				return true
			}
		}
		return false
	})
	return found
}

// A stream tells its usage only if it is asked: whatever tier the limits are of, and
// also where there is none.
func TestStreamsAreMeasuredWhateverLimitsThereAre(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.limited(outputADay)
	up := provider(t, func(w http.ResponseWriter, r *http.Request, body string) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, chatStream(body))
	})
	off := false
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{
			{Name: "chat", Upstream: up.URL, Model: ModelConfig{JSON: "model"}},
			{Name: "bare", Prefix: "/bare", Upstream: up.URL, Usage: UsageJSON},
			{Name: "unasked", Prefix: "/unasked", Upstream: up.URL, Usage: UsageJSON, AskUsage: &off},
		}}
	})
	g.ready()
	within(t, 5*time.Second, "the key is known", func() bool {
		return do(t, http.MethodPost, g.proxy+"/v1/chat/completions", "sk-tight", `{}`).status == 200
	})
	const streamed = `{"model":"m","stream":true}`
	plain := chatStream("")
	for i, c := range []struct {
		path, key, body, want, output string
	}{
		{"/v1/chat/completions", "sk-search", streamed, plain, "7 finished"},
		{"/v1/chat/completions", "sk-tight", streamed, plain, "7 finished"},
		{"/v1/completions", "sk-tight", streamed, plain, "7 finished"},
		{"/openai/deployments/d/chat/completions?api-version=2024-10-21", "sk-tight", streamed, plain, "7 finished"},
		{"/bare/api/v1/chat/completions", "sk-tight", streamed, plain, "7 finished"},
		{"/v1/chat/completions", "sk-tight", `{"model":"m","stream":true,"stream_options":{"include_usage":true}}`, chatStream(`"include_usage":true`), "7 finished"},
		{"/v1/chat/completions", "sk-tight", `{"model":"m","stream":true,"stream_options":{"include_usage":false}}`, plain, "7 finished"},
		// Not asked, and not told: no less than what passed, where a limit counts it.
		{"/unasked/v1/chat/completions", "sk-tight", streamed, plain, "5 estimated finished"},
		{"/unasked/v1/chat/completions", "sk-search", streamed, plain, "unknown finished"},
	} {
		id := fmt.Sprint("stream-", i)
		got := do(t, http.MethodPost, g.proxy+c.path, c.key, c.body, "X-Request-Id", id, "Content-Type", "application/json")
		if got.status != 200 || got.body != c.want {
			t.Errorf("%s %s: %+v", c.path, c.body, got)
		}
		if output := outputOf(w.callOf(id)); output != c.output {
			t.Errorf("%s %s: %s", c.path, c.body, output)
		}
	}
}

// hangUp sends a call and leaves when the first bytes of its answer are there, or when
// the upstream has it and says nothing.
func hangUp(t *testing.T, url, key, body, id string, served <-chan struct{}) {
	t.Helper()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Request-Id", id)
	if served != nil {
		go func() {
			<-served
			leave()
		}()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return
	}
	if _, err := resp.Body.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	leave()
	_ = resp.Body.Close()
}

// What nobody measured is an estimate wherever a limit counts it, and says how the call
// ended.
func TestACallThatIsCutOffIsAnEstimate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.limited(outputADay, usage.Limit{ID: "in", Meter: usage.InputTokens, Window: usage.Day, Amount: 1000, Tier: usage.TierEventual})
	served := make(chan struct{}, 1)
	up := provider(t, func(w http.ResponseWriter, r *http.Request, body string) {
		flush := func(s string) {
			_, _ = io.WriteString(w, s)
			_ = http.NewResponseController(w).Flush()
		}
		switch {
		case r.URL.Path == "/known":
		case strings.Contains(body, "silent"):
			served <- struct{}{}
			<-r.Context().Done()
		case strings.Contains(body, "messages"):
			w.Header().Set("Content-Type", "text/event-stream")
			flush("event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n" + "data: {\"delta\":{\"text\":\"Hello\"}}\n\n")
			<-r.Context().Done()
		case strings.Contains(body, "json"):
			w.Header().Set("Content-Type", "application/json")
			flush(`{"choices":[{"message":{"content":"Hello you`)
			<-r.Context().Done()
		case strings.Contains(body, "breaks"):
			w.Header().Set("Content-Type", "text/event-stream")
			flush(fmt.Sprintf(helloChunk, ""))
			panic(http.ErrAbortHandler) // its client stays
		default:
			w.Header().Set("Content-Type", "text/event-stream")
			flush(fmt.Sprintf(helloChunk, `,"usage":null`))
			<-r.Context().Done()
		}
	})
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{{Name: "chat", Upstream: up.URL, Model: ModelConfig{JSON: "model"}}}}
	})
	g.ready()
	within(t, 5*time.Second, "the key is known", func() bool {
		return do(t, http.MethodGet, g.proxy+"/known", "sk-tight", "").status == 200
	})
	for i, c := range []struct {
		path, key, body, output string
		input                   int64
		silent                  bool
	}{
		{"/v1/chat/completions", "sk-tight", `{"model":"m","stream":true}`, "5 estimated client_left", 67, false},
		{"/v1/chat/completions", "sk-tight", `{"model":"json"}`, "9 estimated client_left", 16, false},
		{"/v1/chat/completions", "sk-tight", `{"model":"silent"}`, "1 estimated client_left", 18, true},
		{"/v1/messages", "sk-tight", `{"model":"m","messages":[],"stream":true}`, "6 estimated client_left", 25, false},
		// Law 9: what no limit counts is unknown.
		{"/v1/chat/completions", "sk-search", `{"model":"m","stream":true}`, "unknown client_left", 0, false},
		{"/v1/chat/completions", "sk-search", `{"model":"silent"}`, "unknown client_left", 0, true},
		{"/v1/messages", "sk-search", `{"model":"m","messages":[],"stream":true}`, "unknown client_left", 25, false},
	} {
		id := fmt.Sprint("cut-", i)
		var has chan struct{}
		if c.silent {
			has = served
		}
		hangUp(t, g.proxy+c.path, c.key, c.body, id, has)
		call := w.callOf(id)
		if output := outputOf(call); output != c.output {
			t.Errorf("%s %s: %s", c.path, c.body, output)
		}
		if in, _ := call.Quantities.Get(usage.InputTokens); in != c.input {
			t.Errorf("%s %s: %d in", c.path, c.body, in)
		}
	}
	// This client stays to the end.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.proxy+"/v1/chat/completions", strings.NewReader(`{"model":"breaks","stream":true}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer sk-tight")
	req.Header.Set("X-Request-Id", "breaks")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Error("an answer that broke off looks whole")
	}
	_ = resp.Body.Close()
	if output := outputOf(w.callOf("breaks")); output != "5 estimated upstream_failed" {
		t.Errorf("an upstream that breaks off: %s", output)
	}
}

// A stored answer was counted when it was made, however often it is asked for; one that
// was made in the background is counted when it first tells what it used.
func TestAnAnswerIsCountedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const done = `{"id":"resp_1","object":"response","model":"m","background":%v,"status":"completed","usage":{"input_tokens":11,"output_tokens":7,"total_tokens":18}}`
	up := provider(t, func(w http.ResponseWriter, r *http.Request, body string) {
		w.Header().Set("Content-Type", "application/json")
		stored := fmt.Sprintf(done, strings.Contains(r.URL.Path, "resp_b"))
		switch {
		case r.Method == http.MethodPost && strings.Contains(body, "background"):
			_, _ = io.WriteString(w, `{"id":"resp_1","object":"response","model":"m","background":true,"status":"queued","usage":null}`)
		case r.URL.Query().Get("stream") == "true":
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, "data: {\"type\":\"response.completed\",\"response\":"+stored+"}\n\n")
		default:
			_, _ = io.WriteString(w, stored)
		}
	})
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{{Name: "all", Upstream: up.URL, Profile: refusal.OpenAI, Model: ModelConfig{JSON: "model"}}}}
	})
	g.ready()
	n := 0
	tokens := func(method, path, body string) string {
		t.Helper()
		n++
		id := fmt.Sprint("once-", n)
		if got := do(t, method, g.proxy+path, "sk-acme", body, "X-Request-Id", id, "Content-Type", "application/json"); got.status != 200 {
			t.Fatalf("%+v", got)
		}
		return outputOf(w.callOf(id))
	}
	for _, c := range []struct{ method, path, body, want string }{
		{http.MethodPost, "/v1/responses", `{"model":"m"}`, "7 finished"},
		{http.MethodGet, "/v1/responses/resp_1", "", "unknown finished"},
		{http.MethodGet, "/v1/responses/resp_1?stream=true&starting_after=1", "", "unknown finished"},
		{http.MethodPost, "/v1/responses/resp_1/cancel", "{}", "unknown finished"},
		{http.MethodDelete, "/v1/responses/resp_1", "", "unknown finished"},
		{http.MethodGet, "/v1/chat/completions/chatcmpl-1", "", "unknown finished"},
		{http.MethodGet, "/v1/chat/completions", "", "unknown finished"},
		{http.MethodPost, "/v1/chat/completions/chatcmpl-1", "{}", "unknown finished"},
		{http.MethodGet, "/v1/batches/b", "", "unknown finished"},
		{http.MethodGet, "/v1/messages/batches/b/results", "", "unknown finished"},
		{http.MethodGet, "/v1/threads/t/runs/r", "", "unknown finished"},
		{http.MethodPost, "/v1/threads/t/runs", `{}`, "7 finished"},
		{http.MethodPost, "/v1/responses", `{"model":"m","background":true}`, "unknown finished"},
		{http.MethodGet, "/v1/responses/resp_b", "", "unknown finished"},
		{http.MethodGet, "/v1/responses/resp_b?stream=true", "", "unknown finished"},
		{http.MethodPost, "/v1/responses/resp_b/cancel", "{}", "unknown finished"},
	} {
		if got := tokens(c.method, c.path, c.body); got != c.want {
			t.Errorf("%s %s: %s", c.method, c.path, got)
		}
	}
	// Three answers told of the background one: three events of one identity.
	var events []usage.Call
	w.callsUntil(func(all []usage.Call) bool {
		events = events[:0]
		for _, c := range all {
			if c.EventID != "" {
				events = append(events, c)
			}
		}
		return len(events) == 3
	})
	for _, c := range events {
		calls, _ := c.Quantities.Get(usage.Calls)
		out, _ := c.Quantities.Get(usage.OutputTokens)
		if c.EventID != "resp_1" || c.Account != "acme" || c.Source != events[0].Source || calls != 0 || out != 7 || c.Model != "m" {
			t.Errorf("%+v", c)
		}
	}
}

// Every answer on a route that reads usage is counted in an outcome.
func TestEveryAnswerHasAnOutcome(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	answers := map[string]struct{ contentType, body string }{
		"/json": {"application/json", modelAnswer}, "/none": {"", modelAnswer}, "/plain": {"text/plain", modelAnswer}, "/charset": {"application/json; utf-8", modelAnswer},
		"/suffix": {"application/vnd.x+json", modelAnswer}, "/bytes": {"application/octet-stream", modelAnswer}, "/mark": {"application/json", "\xef\xbb\xbf" + modelAnswer},
		"/events": {"Text/Event-Stream;charset=UTF-8", helloUsage}, "/events-as-text": {"text/plain", helloUsage}, "/json-as-events": {"text/event-stream", modelAnswer},
		"/ndjson": {"application/x-ndjson", `{"message":{"content":"x"}}` + "\n" + `{"done":true,"prompt_eval_count":11,"eval_count":7}` + "\n"},
		"/page":   {"text/html", "<html>"}, "/speech": {"audio/mpeg", "\xff\xfb"}, "/empty": {"application/json", ""}, "/silent": {"application/json", "{}"},
	}
	up := provider(t, func(w http.ResponseWriter, r *http.Request, _ string) {
		if a, ok := answers[r.URL.Path]; ok {
			w.Header()["Content-Type"] = []string{a.contentType}
			if a.contentType == "" {
				w.Header()["Content-Type"] = nil
			}
			_, _ = io.WriteString(w, a.body)
			return
		}
		switch r.URL.Path {
		case "/nothing":
			w.WriteHeader(http.StatusNoContent)
		case "/unchanged":
			w.WriteHeader(http.StatusNotModified)
		default:
			w.WriteHeader(http.StatusTeapot)
		}
	})
	registry := prometheus.NewRegistry()
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Registerer = registry
		o.Config = Config{Routes: []RouteConfig{{Name: "all", Upstream: up.URL, Usage: UsageJSON}}}
	})
	g.ready()
	measured := 0
	for path := range answers {
		got := do(t, http.MethodPost, g.proxy+path, "sk-acme", `{}`, "X-Request-Id", "as"+strings.ReplaceAll(path, "/", "-"))
		if got.status != 200 || got.body != answers[path].body {
			t.Errorf("%s: %+v", path, got)
		}
		switch path {
		case "/page", "/speech", "/empty", "/silent":
			continue
		}
		measured++
		if output := outputOf(w.callOf("as" + strings.ReplaceAll(path, "/", "-"))); output != "7 finished" {
			t.Errorf("%s: %s", path, output)
		}
	}
	for method, paths := range map[string][]string{http.MethodPost: {"/nothing", "/unchanged", "/teapot"}, http.MethodHead: {"/json"}, http.MethodGet: {"/json"}} {
		for _, path := range paths {
			do(t, method, g.proxy+path, "sk-acme", "")
		}
	}
	for outcome, n := range map[string]int{"measured": measured, "unreadable": 1, "media": 1, "empty": 3, "none": 1, "failed": 2, "retrieved": 1} {
		within(t, 5*time.Second, outcome, func() bool { return answersWith(t, registry, outcome) == float64(n) })
	}
}

func answersWith(t *testing.T, from prometheus.Gatherer, outcome string) float64 {
	t.Helper()
	families, err := from.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "tollkeeper_gateway_usage_answers_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "outcome" && l.GetValue() == outcome {
					return m.GetCounter().GetValue()
				}
			}
		}
	}
	return 0
}
