package tokens

import (
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Answers in the forms that providers document and that are like no other's.
func TestUsageInEveryProvidersForm(t *testing.T) {
	t.Parallel()
	type want = map[usage.Meter]int64
	in, out, cached, reasoning := usage.InputTokens, usage.OutputTokens, usage.CachedInputTokens, usage.ReasoningTokens
	for name, c := range map[string]struct {
		body string
		want want
	}{
		"Gemini's interaction": {`{"id":"v1_x","object":"interaction","status":"completed","outputs":[{"type":"text","text":"Hi"}],"usage":{"total_input_tokens":20,"input_tokens_by_modality":[{"modality":"text","tokens":20}],"total_cached_tokens":8,"total_output_tokens":5,"total_thought_tokens":7,"total_tool_use_tokens":3,"total_tokens":35}}`,
			want{in: 23, out: 12, cached: 8, reasoning: 7}},
		"Gemini's interaction, streamed": {"event: interaction.start\ndata: {\"interaction\":{\"id\":\"v1_x\",\"status\":\"in_progress\"},\"event_type\":\"interaction.start\"}\n\nevent: content.delta\ndata: {\"index\":0,\"delta\":{\"type\":\"text\",\"text\":\"Hi\"},\"event_type\":\"content.delta\"}\n\nevent: interaction.complete\ndata: {\"interaction\":{\"id\":\"v1_x\",\"status\":\"completed\",\"usage\":{\"total_input_tokens\":20,\"total_output_tokens\":5,\"total_thought_tokens\":7,\"total_tokens\":32}},\"event_type\":\"interaction.complete\"}\n\nevent: done\ndata: [DONE]\n\n",
			want{in: 20, out: 12, reasoning: 7}},
		// The top tells of the model's own turns only.
		"Anthropic's compaction": {`{"usage":{"input_tokens":23000,"output_tokens":1000,"cache_read_input_tokens":10,"iterations":[{"type":"compaction","input_tokens":180000,"output_tokens":3500,"cache_read_input_tokens":7},{"type":"message","input_tokens":23000,"output_tokens":1000,"cache_read_input_tokens":10}]}}`,
			want{in: 203017, out: 4500, cached: 17}},
		"Anthropic's compaction, streamed": {"data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":180000,\"output_tokens\":1}}}\n\ndata: {\"type\":\"message_delta\",\"usage\":{\"input_tokens\":23000,\"output_tokens\":1000,\"iterations\":[{\"type\":\"compaction\",\"input_tokens\":180000,\"output_tokens\":3500},{\"type\":\"message\",\"input_tokens\":23000,\"output_tokens\":1000}]}}\n\ndata: {\"type\":\"message_stop\"}\n\n",
			want{in: 203000, out: 4500}},
		"Anthropic's turns with tools of its own": {`{"usage":{"input_tokens":300,"output_tokens":30,"server_tool_use":{"web_search_requests":2},"iterations":[{"type":"message","input_tokens":100,"output_tokens":10},{"type":"message","input_tokens":200,"output_tokens":20}]}}`,
			want{in: 300, out: 30}},
		"Anthropic's caches by their time": {`{"usage":{"input_tokens":10,"cache_creation":{"ephemeral_5m_input_tokens":40,"ephemeral_1h_input_tokens":60},"cache_creation_input_tokens":100,"cache_read_input_tokens":1000,"output_tokens":5,"service_tier":"standard"}}`,
			want{in: 1110, out: 5, cached: 1000}},
		"Anthropic's caches by their time alone": {`{"usage":{"input_tokens":10,"cache_creation":{"ephemeral_5m_input_tokens":40,"ephemeral_1h_input_tokens":60},"output_tokens":5}}`,
			want{in: 110, out: 5}},
		// The total says that both stand beside the prompt.
		"caches beside the prompt":         {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":1115,"cache_read_input_tokens":1000,"cache_creation_input_tokens":100}}`, want{in: 1111, out: 4, cached: 1000}},
		"a new cache beside the prompt":    {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":115,"cache_creation_input_tokens":100}}`, want{in: 111, out: 4}},
		"cache and reasoning beside":       {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":118,"prompt_tokens_details":{"cached_tokens":100},"completion_tokens_details":{"reasoning_tokens":3}}}`, want{in: 111, out: 7, cached: 100, reasoning: 3}},
		"Mistral's connectors":             {`{"usage":{"prompt_tokens":188,"completion_tokens":55,"total_tokens":7355,"connector_tokens":7112,"connectors":{"web_search":1},"num_cached_tokens":4}}`, want{in: 7300, out: 55, cached: 4}},
		"Cohere's chat before, streamed":   {`{"event_type":"text-generation","text":"Hi"}` + "\n" + `{"event_type":"stream-end","response":{"text":"Hi","meta":{"billed_units":{"input_tokens":11,"output_tokens":7}}}}` + "\n", want{in: 11, out: 7}},
		"Cohere's cache":                   {`{"id":"x","message":{"role":"assistant","content":[]},"usage":{"billed_units":{"input_tokens":3,"output_tokens":24},"tokens":{"input_tokens":65,"output_tokens":26},"cached_tokens":16}}`, want{in: 65, out: 26, cached: 16}},
		"a transcription":                  {`{"text":"Hi","usage":{"type":"tokens","input_tokens":14,"input_token_details":{"text_tokens":4,"audio_tokens":10,"cached_tokens":2},"output_tokens":45,"total_tokens":59}}`, want{in: 14, out: 45, cached: 2}},
		"a transcription, streamed":        {"data: {\"type\":\"transcript.text.delta\",\"delta\":\"Hi\"}\n\ndata: {\"type\":\"transcript.text.done\",\"text\":\"Hi\",\"usage\":{\"type\":\"tokens\",\"input_tokens\":14,\"output_tokens\":45,\"total_tokens\":59}}\n\n", want{in: 14, out: 45}},
		"a picture":                        {`{"data":[{"b64_json":"iVBORw0"}],"usage":{"total_tokens":100,"input_tokens":50,"output_tokens":50,"input_tokens_details":{"text_tokens":10,"image_tokens":40}}}`, want{in: 50, out: 50}},
		"a picture, streamed":              {"event: image_generation.completed\ndata: {\"type\":\"image_generation.completed\",\"b64_json\":\"iVBOR\",\"usage\":{\"total_tokens\":100,\"input_tokens\":50,\"output_tokens\":50}}\n\n", want{in: 50, out: 50}},
		"OpenRouter":                       {": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"\"},\"finish_reason\":null}],\"usage\":{\"completion_tokens\":2,\"completion_tokens_details\":{\"reasoning_tokens\":0},\"cost\":0.95,\"cost_details\":{\"upstream_inference_cost\":19},\"prompt_tokens\":194,\"prompt_tokens_details\":{\"cached_tokens\":0,\"audio_tokens\":0},\"total_tokens\":196}}\n\ndata: [DONE]\n\n", want{in: 194, out: 2, cached: 0, reasoning: 0}},
		"xAI":                              {`{"usage":{"prompt_tokens":32,"completion_tokens":9,"total_tokens":135,"prompt_tokens_details":{"text_tokens":32,"audio_tokens":0,"image_tokens":0,"cached_tokens":6},"completion_tokens_details":{"reasoning_tokens":94,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0},"num_sources_used":0}}`, want{in: 32, out: 103, cached: 6, reasoning: 94}},
		"Titan":                            {`{"inputTextTokenCount":11,"results":[{"tokenCount":7,"outputText":"Hi","completionReason":"FINISH"}]}`, want{in: 11}},
		"Llama at Bedrock":                 {`{"generation":"Hi","prompt_token_count":11,"generation_token_count":7,"stop_reason":"stop"}`, want{in: 11, out: 7}},
		"Bedrock's chunks":                 {`{"type":"message_stop","amazon-bedrock-invocationMetrics":{"inputTokenCount":11,"outputTokenCount":7,"invocationLatency":9,"cacheReadInputTokenCount":100,"cacheWriteInputTokenCount":10}}`, want{in: 121, out: 7, cached: 100}},
		"records with their separator":     {"\x1e{\"choices\":[{}]}\n\x1e{\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7}}\n", want{in: 11, out: 7}},
		"a mark before the only event":     {"\xef\xbb\xbfdata: {\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7}}\n\n", want{in: 11, out: 7}},
		"in powers of ten":                 {`{"usage":{"prompt_tokens":1.1e1,"completion_tokens":7E0}}`, want{in: 11, out: 7}},
		"twice, the second time null":      {`{"usage":{"prompt_tokens":11,"completion_tokens":7},"usage":null}`, want{in: 11, out: 7}},
		"twice, the second time 0":         {`{"usage":{"prompt_tokens":11,"completion_tokens":7},"usage":{"prompt_tokens":0,"completion_tokens":0}}`, want{in: 11, out: 7}},
		"twice, the second time no object": {`{"usage":{"prompt_tokens":11,"completion_tokens":7},"id":"x","usage":{}}`, want{in: 11, out: 7}},
	} {
		for how, r := range map[string]io.Reader{"at once": strings.NewReader(c.body), "byte by byte": iotest.OneByteReader(strings.NewReader(c.body))} {
			got, outcome := read(t, r, "")
			if outcome != Measured || cmp.Diff(c.want, got) != "" {
				t.Errorf("%s, %s: %s, %v", name, how, outcome, cmp.Diff(c.want, got))
			}
		}
	}
}
