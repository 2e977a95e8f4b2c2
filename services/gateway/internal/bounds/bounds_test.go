package bounds

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

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
		"max_tokens":            {Rules{}, `{"max_tokens":50}`, map[usage.Meter]int64{usage.OutputTokens: 50, usage.ReasoningTokens: 50}},
		"max_completion_tokens": {Rules{}, `{"max_completion_tokens":51,"messages":[{"role":"user","content":"hi"}]}`, map[usage.Meter]int64{usage.OutputTokens: 51}},
		"max_output_tokens":     {Rules{}, `{"max_output_tokens":52,"input":"hi"}`, map[usage.Meter]int64{usage.OutputTokens: 52}},
		"two of them":           {Rules{}, `{"max_output_tokens":52,"max_tokens":60}`, map[usage.Meter]int64{usage.OutputTokens: 60}},
		"choices":               {Rules{}, `{"max_tokens":50,"n":3}`, map[usage.Meter]int64{usage.OutputTokens: 150}},
		"a list of prompts":     {Rules{}, `{"max_tokens":5,"n":2,"prompt":["a","b","c"]}`, map[usage.Meter]int64{usage.OutputTokens: 30}},
		"a prompt of tokens":    {Rules{}, `{"max_tokens":5,"prompt":[1,2,3]}`, map[usage.Meter]int64{usage.OutputTokens: 5}},
		"best of":               {Rules{}, `{"max_tokens":50,"n":3,"best_of":5}`, map[usage.Meter]int64{usage.OutputTokens: 250}},
		"input":                 {Rules{InputOverhead: 7}, `{"prompt":"0123456789"}`, map[usage.Meter]int64{usage.InputTokens: 30, usage.CachedInputTokens: 30}},
		"reserved":              {Rules{Reserve: map[usage.Meter]int64{"gpu_ms": 9, usage.Bytes: 100}}, `not read`, map[usage.Meter]int64{"gpu_ms": 9, usage.Bytes: 100}},
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
		`{"model":"m"}`:                     `{"max_completion_tokens":100,"model":"m"}`,
		`{"model":"m","max_tokens":null}`:   `{"max_completion_tokens":100,"model":"m"}`,
		`{}`:                                `{"max_completion_tokens":100}`,
		`{"max_completion_tokens":7,"x":1}`: `{"max_completion_tokens":7,"x":1}`,
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
		`{"messages":[]}`:                                      400,
		`{"max_tokens":-1}`:                                    400,
		`{"max_tokens":1.5}`:                                   400,
		`{"max_tokens":"9"}`:                                   400,
		`{"max_tokens":1,"max_tokens":100000}`:                 400,
		`{"max_tokens":1,"Max_Tokens":100000}`:                 400,
		`{"Max_Tokens":1}`:                                     400,
		`{"max_tokens":1,"n":"many"}`:                          400,
		`{"max_tokens":9007199254740993,"n":9007199254740993}`: 400,
		`[1]`:                          400,
		`{"max_tokens":1`:              400,
		`{"max_tokens":1} {}`:          400,
		`{"max_tokens":1,"tools":"x"}`: 400,
		`{"max_tokens":1,"tools":[{"type":"web_search_20250305"}]}`:                                                     403,
		`{"max_tokens":1,"tools":[{"type":"file_search"}]}`:                                                             403,
		`{"max_tokens":1,"web_search_options":{}}`:                                                                      403,
		`{"max_tokens":1,"previous_response_id":"r"}`:                                                                   403,
		`{"max_tokens":1,"prompt":{"id":"p"}}`:                                                                          403,
		`{"max_tokens":1,"modalities":["text","audio"]}`:                                                                403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}`:                 403,
		`{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"image"}]}]}]}`: 403,
		`{"max_tokens":1,"input":[{"type":"input_file","file_id":"f"}]}`:                                                403,
		`{"max_tokens":1,"input":[{"type":"message","content":[{"type":"input_image","image_url":"data:"}]}]}`:          403,
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
