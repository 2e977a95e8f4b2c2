package apis

import (
	"slices"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// What is said to use no tokens passes their limits: it must be certain.
func TestOnlyWhatCantUseTokensIsSaidNotTo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		call     string
		provider bool
		model    string
		in, out  bool // can be used
	}{
		{"GET /v1/models", false, "", false, false},
		{"GET /v1/models/gpt-5", false, "", false, false},
		{"GET /openai/v1/models/", false, "", false, false},
		{"GET /api/openai/models", false, "", false, false},
		{"DELETE /v1/models/ft:x", false, "", false, false},
		{"GET /v1/files/f/content", false, "", false, false},
		{"POST /v1/files", false, "", false, false},
		{"GET /v1/responses/r", false, "", false, false},
		{"GET /v1/responses/r/input_items", false, "", false, false},
		{"POST /v1/responses/r/cancel", false, "", false, false},
		{"DELETE /v1/responses/r", false, "", false, false},
		{"GET /v1/chat/completions", false, "", false, false},
		{"GET /v1/chat/completions/c/messages", false, "", false, false},
		{"POST /v1/chat/completions/c", false, "", false, false},
		{"POST /v1/messages/count_tokens", false, "", false, false},
		{"POST /v1/responses/input_tokens", false, "", false, false},
		{"GET /v1/messages/batches/b/results", false, "", false, false},
		{"POST /v1/moderations", false, "", false, false},
		{"OPTIONS /anything", false, "", false, false},
		{"HEAD /anything", false, "", false, false},
		{"GET /models", true, "", false, false},
		{"GET /v1/whatever/is/new", true, "", false, false},
		{"POST /v1/embeddings", false, "", true, false},
		{"POST /v1/images/generations", false, "dall-e-3", false, false},
		{"POST /v1/images/generations", false, "gpt-image-1", true, true},
		{"POST /v1/images/generations", false, "", true, true},
		{"POST /v1/audio/transcriptions", false, "whisper-1", false, false},
		{"POST /v1/audio/transcriptions", false, "gpt-4o-transcribe", true, true},
		{"POST /v1/audio/speech", false, "tts-1-hd", false, false},
		{"POST /v1/audio/speech", false, "gpt-4o-mini-tts", true, true},
		// Anything else may.
		{"POST /v1/chat/completions", true, "", true, true},
		{"POST /v1/messages", true, "", true, true},
		{"POST /v1/responses", true, "", true, true},
		{"POST /v1/responses/compact", true, "", true, true},
		{"POST /v1/messages/batches", true, "", true, true},
		{"POST /v1/batches", true, "", true, true},
		{"POST /v1/threads/t/runs", true, "", true, true},
		{"GET /v1/realtime", true, "", true, true},
		{"GET /v1/responses", true, "", true, true},
		{"PUT /v1/models", true, "", true, true},
		{"POST /v1/models", true, "", true, true},
		{"POST /v1beta/models/gemini:generateContent", false, "", true, true},
		{"GET /generate", false, "", true, true},
		{"GET /models", false, "", true, true},
		{"GET /generate/models/x", false, "", true, true},
		{"POST /generate/count_tokens", false, "", true, true},
		{"POST /v1/x/messages/count_tokens", false, "", true, true},
		{"POST /v1/chat/completions/c/d", false, "", true, true},
		{"GET /v1/modelsx", false, "", true, true},
		{"get /v1/models", false, "", true, true},
		{"E /v1/models", false, "", true, true},
		{"POST /v1/chat//completions", false, "", true, true},
		{"POST /v1//c/cancel", false, "", true, true},
		{"GET /V1/models", false, "", true, true},
	} {
		method, path, _ := cut(c.call)
		o := Of(method, path, c.provider)
		unused := o.UnusedBy(c.model)
		if unused.Has(usage.InputTokens) == c.in || unused.Has(usage.OutputTokens) == c.out || unused.Has(usage.Calls) || unused.Has(usage.Bytes) || unused.Has("images") {
			t.Errorf("%s of %q: %b", c.call, c.model, unused)
		}
	}
}

func cut(call string) (method, path string, ok bool) {
	for i := range call {
		if call[i] == ' ' {
			return call[:i], call[i+1:], true
		}
	}
	return call, "", false
}

func TestWhatBoundsAnAnswerAndWhoseUsageItTells(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		method, path string
		maxima       []string
		produces     bool
	}{
		{"POST", "/v1/chat/completions", []string{"max_tokens", "max_completion_tokens"}, true},
		{"POST", "/openai/deployments/d/chat/completions", []string{"max_tokens", "max_completion_tokens"}, true},
		{"POST", "/chat/completions/", []string{"max_tokens", "max_completion_tokens"}, true},
		{"POST", "/x/messages", []string{"max_tokens"}, true},
		{"POST", "/v1/responses", []string{"max_output_tokens"}, true},
		{"POST", "/v1/embeddings", nil, true},
		{"POST", "/v1/other", nil, true},
		{"GET", "/v1/responses/r", nil, false},
		{"GET", "/v1/chat/completions/c", nil, false},
		{"POST", "/v1/responses/r/cancel", nil, false},
	} {
		o := Of(c.method, c.path, false)
		if !slices.Equal(o.Maxima, c.maxima) || o.Produces() != c.produces {
			t.Errorf("%s %s: %+v", c.method, c.path, o)
		}
	}
	if m := Maxima(); !slices.Equal(m, []string{"max_tokens", "max_completion_tokens", "max_output_tokens"}) {
		t.Errorf("%q", m)
	}
}

// It is looked up for every call.
func TestLookingACallUpCostsNoAllocation(t *testing.T) {
	for _, call := range []string{"POST /v1/chat/completions", "GET /v1/models/m", "POST /a/path/of/something/else"} {
		method, path, _ := strings.Cut(call, " ")
		if n := testing.AllocsPerRun(100, func() { Of(method, path, true) }); n > 0 {
			t.Errorf("%s: %v allocations", call, n)
		}
	}
}
