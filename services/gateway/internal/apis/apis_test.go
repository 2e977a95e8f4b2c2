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
		{"POST /v1beta/models/gemini-2.5-pro:countTokens", false, "", false, false},
		{"POST /v1beta/interactions/v1_x/cancel", false, "", false, false},
		{"POST /v1/threads/t/runs/r", false, "", false, false},
		{"POST /v1/threads/t/runs/r/cancel", false, "", false, false},
		// Anything else may.
		{"POST /v1beta/models/gemini:countTokensX", false, "", true, true},
		{"POST /x/models/gemini:countTokens", false, "", true, true},
		{"POST /v1beta/models/x/y:countTokens", false, "", true, true},
		{"POST /v1/threads/t/runs/r/submit_tool_outputs", false, "", true, true},
		{"POST /v1beta/interactions", false, "", true, true},
		{"GET /v1/chat/deferred-completion/x", true, "", true, true},
		{"POST /v2/chat", false, "", true, true},
		{"POST /api/chat", false, "", true, true},
		{"POST /model/anthropic.claude/invoke", false, "", true, true},
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
		{"GET", "/v1/chat/deferred-completion/x", nil, true},
		{"POST", "/api/chat", nil, true},
		{"POST", "/v1beta/models/gemini:streamGenerateContent", nil, true},
		{"POST", "/v1/threads/t/runs/r", nil, false},
	} {
		o := Of(c.method, c.path, false)
		if !slices.Equal(o.Maxima, c.maxima) || o.Produces() != c.produces {
			t.Errorf("%s %s: %+v", c.method, c.path, o)
		}
	}
	for path, text := range map[string]bool{
		"/v1/chat/completions": true, "/v1/fim/completions": true, "/v1/messages": true, "/v1/responses": true, "/v2/chat": true, "/v1beta/interactions": true,
		"/api/chat": true, "/api/generate": true, "/infill": true, "/generate_stream": true, "/v1beta/models/gemini:generateContent": true,
		"/v1/projects/p/locations/l/publishers/anthropic/models/claude:streamRawPredict": true, "/model/m/converse": true, "/model/arn%3Aaws/converse-stream": true,
		"/model/m/invoke": true, "/bedrock/model/m/invoke-with-response-stream": true,
		"/chat": false, "/v1/embeddings": false, "/v1/audio/speech": false, "/v1/rerank": false, "/generateContent": false, "/model/converse": false, "/v1/files": false,
	} {
		if o := Of("POST", path, false); o.Text != text {
			t.Errorf("%s: made of tokens: %v", path, o.Text)
		}
		if o := Of("GET", path, false); o.Text {
			t.Errorf("GET %s: made of tokens", path)
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
