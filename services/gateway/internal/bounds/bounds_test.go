package bounds

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func of(t *testing.T, rules Rules, body string, meters ...usage.Meter) (usage.Quantities, string, *refusal.Refusal) {
	t.Helper()
	if rules.MaxBody == 0 {
		rules.MaxBody = 1 << 20
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	q, err := rules.Of(r, meters)
	if err != nil {
		var f *refusal.Refusal
		if !errors.As(err, &f) || f.Detail == "" {
			t.Fatalf("%v", err)
		}
		return q, "", f
	}
	sent, err := io.ReadAll(r.Body)
	if err != nil || r.ContentLength >= 0 && r.ContentLength != int64(len(sent)) {
		t.Fatalf("%d bytes, announced are %d: %v", len(sent), r.ContentLength, err)
	}
	return q, string(sent), nil
}

func TestBounds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		rules Rules
		body  string
		want  map[usage.Meter]int64
	}{
		"max_tokens":                {Rules{}, `{"max_tokens":50}`, map[usage.Meter]int64{usage.OutputTokens: 50, usage.ReasoningTokens: 50}},
		"max_completion_tokens":     {Rules{}, `{"max_completion_tokens":51,"messages":[{"role":"user","content":"hi"}]}`, map[usage.Meter]int64{usage.OutputTokens: 51}},
		"two of them":               {Rules{}, `{"max_completion_tokens":52,"max_tokens":60}`, map[usage.Meter]int64{usage.OutputTokens: 60}},
		"one that is not meant":     {Rules{}, `{"max_output_tokens":1,"max_tokens":60}`, map[usage.Meter]int64{usage.OutputTokens: 60}},
		"none of zero choices":      {Rules{}, `{"max_tokens":50,"n":0}`, map[usage.Meter]int64{usage.OutputTokens: 50}},
		"tokens first, texts after": {Rules{}, `{"max_tokens":5,"prompt":[1,"b"]}`, map[usage.Meter]int64{usage.OutputTokens: 10}},
		"what asks for nothing":     {Rules{}, `{"max_tokens":5,"new":null,"newer":false}`, map[usage.Meter]int64{usage.OutputTokens: 5}},
		"choices":                   {Rules{}, `{"max_tokens":50,"n":3}`, map[usage.Meter]int64{usage.OutputTokens: 150}},
		"a list of prompts":         {Rules{}, `{"max_tokens":5,"n":2,"prompt":["a","b","c"]}`, map[usage.Meter]int64{usage.OutputTokens: 30}},
		"a prompt of tokens":        {Rules{}, `{"max_tokens":5,"prompt":[1,2,3]}`, map[usage.Meter]int64{usage.OutputTokens: 5}},
		"best of":                   {Rules{}, `{"max_tokens":50,"n":3,"best_of":5}`, map[usage.Meter]int64{usage.OutputTokens: 250}},
		"input":                     {Rules{InputOverhead: 7}, `{"prompt":"0123456789"}`, map[usage.Meter]int64{usage.InputTokens: 30, usage.CachedInputTokens: 30}},
		"reserved":                  {Rules{Reserve: map[usage.Meter]int64{"gpu_ms": 9, usage.Bytes: 100}}, `not read`, map[usage.Meter]int64{"gpu_ms": 9, usage.Bytes: 100}},
		"own tools, own text": {Rules{}, `{"max_tokens":1,"modalities":[ "text" ],"tools":[{"type":"function","function":{"parameters":{"type":"object"}}},{"name":"x","input_schema":{}}],"messages":[{"role":"user","content":[{"type":"text","text":"image_url"},{"type":"tool_result","content":[{"type":"text","text":"x"}]}]}]}`,
			map[usage.Meter]int64{usage.OutputTokens: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for m, want := range c.want {
				q, sent, f := of(t, c.rules, c.body, m)
				if f != nil {
					t.Fatal(f.Detail)
				}
				if got, _ := q.Get(m); got != want || sent != c.body {
					t.Errorf("%s: %d, want %d; the upstream gets %s", m, got, want, sent)
				}
			}
		})
	}
}

func TestTheClampIsWhatTheUpstreamGets(t *testing.T) {
	t.Parallel()
	rules := Rules{ClampMember: "max_completion_tokens", Clamp: 100}
	for body, want := range map[string]string{
		`{"model":"m"}`:                        `{"max_completion_tokens":100,"model":"m"}`,
		`{"model":"m","max_tokens":null}`:      `{"max_completion_tokens":100,"model":"m"}`,
		`{}`:                                   `{"max_completion_tokens":100}`,
		`{"max_completion_tokens":7,"seed":1}`: `{"max_completion_tokens":7,"seed":1}`,
		// The upstream may not know the other name.
		`{"max_tokens":7}`:     `{"max_completion_tokens":7}`,
		`{"user":"<é\u0041>"}`: `{"max_completion_tokens":100,"user":"<é\u0041>"}`,
	} {
		q, sent, f := of(t, rules, body, usage.OutputTokens, usage.InputTokens)
		if f != nil || sent != want {
			t.Fatalf("%s became %s: %v", body, sent, f)
		}
		if in, _ := q.Get(usage.InputTokens); in != int64(len(want)) {
			t.Errorf("the input's bound is %d for %d bytes", in, len(want))
		}
	}
}

func TestWhatIsNotBoundedIsRefused(t *testing.T) {
	t.Parallel()
	for body, status := range map[string]int{
		`{"messages":[]}`:                           400,
		`{"max_tokens":-1}`:                         400,
		`{"max_tokens":1.5}`:                        400,
		`{"max_tokens":1e2}`:                        400,
		`{"max_tokens":0}`:                          400,
		`{"max_tokens":99999999999999999999}`:       400,
		`{"max_tokens":true}`:                       400,
		`{"max_output_tokens":5}`:                   400,
		`{"max_tokens":1,"n":-1}`:                   400,
		`{"max_tokens":1,"max_to\u212aens":100000}`: 400,
		`{"max_tokens":1,"m\u0061x_tokens":100000}`: 400,
		`{"max_tokens":1,"tool\u017f":[]}`:          400,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"text","type":"image_url","text":"x"}]}]}`: 400,
		`{"max_tokens":1,"n":1125899906842624,"prompt":[` + strings.Repeat(`"",`, 1<<14) + `""]}`:                 400,
		`null`:                                 400,
		``:                                     400,
		`{"max_tokens":1}x`:                    400,
		`{"max_tokens":1,}`:                    400,
		`{"max_tokens":"9"}`:                   400,
		`{"max_tokens":1,"max_tokens":100000}`: 400,
		`{"max_tokens":1,"Max_Tokens":100000}`: 400,
		`{"Max_Tokens":1}`:                     400,
		`{"max_tokens":1,"n":"many"}`:          400,
		`{"max_tokens":9007199254740993,"n":9007199254740993}`: 400,
		`[1]`:                          400,
		`{"max_tokens":1`:              400,
		`{"max_tokens":1} {}`:          400,
		`{"max_tokens":1,"tools":"x"}`: 400,
		`{"max_tokens":1,"tools":[{"type":"web_search_20250305"}]}`:                                                        403,
		`{"max_tokens":1,"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}`:             403,
		`{"max_tokens":1,"num_return_sequences":9}`:                                                                        403,
		`{"max_tokens":1,"enable_search":true}`:                                                                            403,
		`{"max_tokens":1,"data_sources":[{}]}`:                                                                             403,
		`{"max_tokens":1,"tools":[{"google_search":{}}]}`:                                                                  403,
		`{"max_tokens":1,"tools":[{"type":7}]}`:                                                                            403,
		`{"max_tokens":1,"tools":[{"Type":"web_search","type":"function"}]}`:                                               403,
		`{"max_tokens":1,"messages":[{"role":"user","content":"x","images":["aGk="]}]}`:                                    403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"image_url":{"url":"x"}}]}]}`:                              403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"text","text":"x","image_url":{}}]}]}`:              403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[[[[[[[[{"text":"","content":[{"type":"image"}]}]]]]]]]]}]}`: 403,
		`{"max_tokens":1,"input":[{"id":"msg_1"}]}`:                                                                        403,
		`{"max_tokens":1,"input":[{"type":"item_reference","id":"msg_1"}]}`:                                                403,
		`{"max_tokens":1,"input":[{"type":"reasoning","id":"rs_1","summary":[]}]}`:                                         403,
		`{"max_tokens":1,"tools":[{"type":"file_search"}]}`:                                                                403,
		`{"max_tokens":1,"web_search_options":{}}`:                                                                         403,
		`{"max_tokens":1,"previous_response_id":"r"}`:                                                                      403,
		`{"max_tokens":1,"prompt":{"id":"p"}}`:                                                                             403,
		`{"max_tokens":1,"modalities":["text","audio"]}`:                                                                   403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}`:                    403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"image"}]}]}]}`:    403,
		`{"max_tokens":1,"input":[{"type":"input_file","file_id":"f"}]}`:                                                   403,
		`{"max_tokens":1,"input":[{"type":"message","content":[{"type":"input_image","image_url":"data:"}]}]}`:             403,
	} {
		_, sent, f := of(t, Rules{}, body, usage.InputTokens, usage.OutputTokens)
		if f == nil {
			t.Errorf("%s is bounded; the upstream gets %s", body, sent)
		} else if f.HTTPStatus() != status {
			t.Errorf("%s: %d, want %d: %s", body, f.HTTPStatus(), status, f.Detail)
		}
	}
	for _, m := range []usage.Meter{usage.Bytes, usage.Cost, "gpu_ms"} {
		if _, _, f := of(t, Rules{}, `{"max_tokens":1}`, m); f == nil || f.HTTPStatus() != 403 {
			t.Errorf("%s: %v", m, f)
		}
	}
	if _, _, f := of(t, Rules{MaxBody: 5}, `{"max_tokens":1}`, usage.OutputTokens); f == nil || f.HTTPStatus() != 413 {
		t.Errorf("a large body: %v", f)
	}
}

// A byte that opens an object must not take hundreds.
func TestABodyIsNotFollowedIntoAnyDepth(t *testing.T) {
	t.Parallel()
	body := strings.Repeat(`{"a":`, 1<<17)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _, f := of(t, Rules{}, body, usage.OutputTokens)
	runtime.ReadMemStats(&after)
	if f == nil || f.HTTPStatus() != http.StatusBadRequest || !strings.Contains(f.Detail, "nested") {
		t.Errorf("%+v", f)
	}
	t.Logf("%d bytes took up to %d", len(body), after.TotalAlloc-before.TotalAlloc)
	deep := `{"max_tokens":1,"metadata":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + `}`
	if _, _, f := of(t, Rules{}, deep, usage.OutputTokens); f != nil {
		t.Errorf("what is not that deep: %s", f.Detail)
	}
}

// What bounds the output of one API is nothing to another.
func TestABoundIsOneOfTheApiThatIsCalled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		path, body string
		want       int64 // -1: refused
	}{
		{"/v1/chat/completions", `{"max_completion_tokens":5,"messages":[]}`, 5},
		{"/v1/chat/completions/", `{"max_output_tokens":5,"messages":[]}`, -1},
		{"/v1/completions", `{"max_completion_tokens":5,"prompt":"x"}`, -1},
		{"/v1/messages", `{"max_tokens":5,"messages":[]}`, 5},
		{"/v1/messages", `{"max_completion_tokens":5,"messages":[]}`, -1},
		{"/v1/responses", `{"max_output_tokens":5,"input":"x"}`, 5},
		{"/v1/responses", `{"max_tokens":5,"input":"x","messages":[]}`, -1},
		{"/v1/embeddings", `{"input":"x"}`, 0},
		// Ollama's own API, for one, takes no notice of max_tokens.
		{"/api/chat", `{"max_tokens":5,"messages":[]}`, -1},
		{"/api/generate", `{"max_tokens":5,"prompt":"x"}`, -1},
		{"/x", `{"max_output_tokens":5,"input":"x"}`, -1},
		{"/x", `{"max_tokens":5}`, -1},
	} {
		r := httptest.NewRequest(http.MethodPost, c.path, strings.NewReader(c.body))
		q, err := (&Rules{MaxBody: 1 << 20}).Of(r, []usage.Meter{usage.OutputTokens})
		if got, _ := q.Get(usage.OutputTokens); (err != nil) != (c.want < 0) || err == nil && got != c.want {
			t.Errorf("%s %s: %d, %v", c.path, c.body, got, err)
		}
	}
	// Where the path says nothing, the operator does, who names the member.
	for _, c := range []struct {
		member, body string
		want         int64
		sent         string
	}{
		{"max_tokens", `{"max_tokens":5,"messages":[]}`, 5, `{"max_tokens":5,"messages":[]}`},
		{"max_tokens", `{"max_completion_tokens":5,"messages":[]}`, 5, `{"max_tokens":5,"messages":[]}`},
		{"max_tokens", `{"prompt":"x"}`, 9, `{"max_tokens":9,"prompt":"x"}`},
		{"max_output_tokens", `{"max_output_tokens":5,"input":"x"}`, 5, `{"max_output_tokens":5,"input":"x"}`},
		{"max_output_tokens", `{"max_output_tokens":5,"messages":[]}`, -1, ""},
		{"max_tokens", `{"max_tokens":5,"input":"x"}`, -1, ""},
		{"max_tokens", `{"max_tokens":5,"max_output_tokens":5,"input":"x","messages":[]}`, -1, ""},
		{"max_tokens", `{"max_tokens":5,"max_output_tokens":6}`, 6, `{"max_tokens":5,"max_output_tokens":6}`},
	} {
		r := httptest.NewRequest(http.MethodPost, "/x", strings.NewReader(c.body))
		q, err := (&Rules{MaxBody: 1 << 20, ClampMember: c.member, Clamp: 9}).Of(r, []usage.Meter{usage.OutputTokens})
		if got, _ := q.Get(usage.OutputTokens); (err != nil) != (c.want < 0) || err == nil && got != c.want {
			t.Errorf("%s, clamped by %s: %d, %v", c.body, c.member, got, err)
		}
		if sent, _ := io.ReadAll(r.Body); err == nil && string(sent) != c.sent {
			t.Errorf("%s, clamped by %s: the upstream gets %s", c.body, c.member, sent)
		}
	}
	// Nor is a clamp written where it would be none.
	r := httptest.NewRequest(http.MethodPost, "/v1/responses", strings.NewReader(`{"input":"x"}`))
	if _, err := (&Rules{MaxBody: 1 << 20, ClampMember: "max_tokens", Clamp: 5}).Of(r, []usage.Meter{usage.OutputTokens}); err == nil {
		t.Error("max_tokens clamps no response")
	}
}

// What is read here is what the upstream reads, or nothing is.
func TestABodyThatMayBeReadOtherwiseIsRefused(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*http.Request){
		"gzip":                  func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") },
		"gzip, said second":     func(r *http.Request) { r.Header["Content-Encoding"] = []string{"identity", "gzip"} },
		"another character set": func(r *http.Request) { r.Header.Set("Content-Type", "application/json; charset=utf-7") },
		"a form":                func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=x") },
		"two types":             func(r *http.Request) { r.Header["Content-Type"] = []string{"application/json", "text/plain"} },
		"no body":               func(r *http.Request) { r.Body = http.NoBody },
		"broken off": func(r *http.Request) {
			r.Body = io.NopCloser(iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(`{"max_tokens":1}`))))
		},
	} {
		r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", strings.NewReader(`{"max_tokens":1}`))
		r.Header.Set("Content-Type", "application/json; charset=UTF-8")
		change(r)
		if _, err := (&Rules{MaxBody: 100}).Of(r, []usage.Meter{usage.OutputTokens}); err == nil {
			t.Errorf("%s: it is bounded", name)
		}
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", io.MultiReader(strings.NewReader(`{"max_tok`), strings.NewReader(`ens":1}`)))
	r.TransferEncoding = []string{"chunked"}
	if q, err := (&Rules{MaxBody: 100}).Of(r, []usage.Meter{usage.InputTokens}); err != nil || r.ContentLength != 16 {
		t.Errorf("in chunks: %v, %v, %d", q, err, r.ContentLength)
	}
}

// room counts what is taken and has no more than it begins with.
type room int64

func (r *room) Take(_ context.Context, n int64) bool {
	*r -= room(n)
	return *r >= 0
}

func TestLargeBodiesTakeRoom(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		size int
		has  room
		left room
		ok   bool
	}{{1 << 10, 0, 0, true}, {smallBody, 0, 0, true}, {smallBody + 1, copies * roomStep, 0, true}, {smallBody + 1, 0, -copies * roomStep, false}, {2*roomStep + smallBody, 9 * roomStep, 3 * roomStep, true}} {
		const frame = len(`{"user":""}`)
		body := `{"user":"` + strings.Repeat("a", c.size-frame) + `"}`
		has := c.has
		r := httptest.NewRequest(http.MethodPost, "/v1/chat/completions", strings.NewReader(body))
		q, err := (&Rules{MaxBody: 4 << 20, Bodies: &has}).Of(r, []usage.Meter{usage.InputTokens})
		if n, _ := q.Get(usage.InputTokens); has != c.left || (err == nil) != c.ok || c.ok && n != int64(c.size) {
			t.Errorf("%d bytes: %d tokens, room for %d is left: %v", c.size, n, has, err)
		}
	}
}
