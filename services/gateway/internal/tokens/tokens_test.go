package tokens

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/andybalholm/brotli"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func read(t *testing.T, body io.Reader, encoding string) (map[usage.Meter]int64, Outcome) {
	t.Helper()
	var got map[usage.Meter]int64
	outcome := NumOutcomes
	plain := io.NopCloser(body)
	if Decodes(encoding) {
		plain = Plain(plain, encoding)
	}
	r := NewReader(plain, Options{Opaque: !IsPlain(encoding) && !Decodes(encoding), Length: -1}, func(r *Result) {
		outcome = r.Outcome
		for _, q := range r.Readings {
			if got == nil {
				got = make(map[usage.Meter]int64)
			}
			got[q.Meter] = q.Value
		}
	})
	if _, err := io.Copy(io.Discard, r); err != nil && outcome == NumOutcomes {
		t.Logf("read: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return got, outcome
}

func TestUsageOfAnAnswer(t *testing.T) {
	t.Parallel()
	type want = map[usage.Meter]int64
	for name, c := range map[string]struct {
		body    string
		want    want
		outcome Outcome
	}{
		"chat completion": {`{"id":"x","choices":[{"message":{"content":"usage: {\"prompt_tokens\":9}"}}],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":3}}}`,
			want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.CachedInputTokens: 4, usage.ReasoningTokens: 3}, Measured},
		"responses": {`{"object":"response","usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":0},"output_tokens":87,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":123}}`,
			want{usage.InputTokens: 36, usage.OutputTokens: 87, usage.CachedInputTokens: 0, usage.ReasoningTokens: 0}, Measured},
		"messages": {`{"type":"message","usage":{"input_tokens":10,"cache_creation_input_tokens":100,"cache_read_input_tokens":1000,"output_tokens":5}}`,
			want{usage.InputTokens: 1110, usage.OutputTokens: 5, usage.CachedInputTokens: 1000}, Measured},
		"messages with empty caches": {`{"usage":{"input_tokens":10,"cache_creation_input_tokens":null,"cache_read_input_tokens":0,"output_tokens":5}}`,
			want{usage.InputTokens: 10, usage.OutputTokens: 5, usage.CachedInputTokens: 0}, Measured},
		"messages in a larger shape": {`{"usage":{"prompt_tokens":null,"input_tokens":10,"cache_creation_input_tokens":100,"cache_read_input_tokens":1000,"output_tokens":5}}`,
			want{usage.InputTokens: 1110, usage.OutputTokens: 5, usage.CachedInputTokens: 1000}, Measured},
		// What a part of the input is that can't be counted, the input can't be either.
		"messages with a cache that is no count": {`{"usage":{"input_tokens":10,"cache_creation_input_tokens":100,"cache_read_input_tokens":-1,"output_tokens":5}}`,
			want{usage.OutputTokens: 5}, Malformed},
		// What a total says beyond input and output was left out of one of them.
		"reasoning beside output":               {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":18,"completion_tokens_details":{"reasoning_tokens":3}}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.ReasoningTokens: 3}, Measured},
		"reasoning inside output":               {`{"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,"completion_tokens_details":{"reasoning_tokens":3}}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.ReasoningTokens: 3}, Measured},
		"reasoning beside output, responses":    {`{"usage":{"input_tokens":11,"output_tokens":4,"total_tokens":18,"output_tokens_details":{"reasoning_tokens":3}}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.ReasoningTokens: 3}, Measured},
		"reasoning at the top":                  {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"reasoning_tokens":3,"total_tokens":18}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.ReasoningTokens: 3}, Measured},
		"reasoning is more than output":         {`{"usage":{"prompt_tokens":7,"completion_tokens":10,"total_tokens":17,"reasoning_tokens":95}}`, want{usage.InputTokens: 7, usage.OutputTokens: 105, usage.ReasoningTokens: 95}, Measured},
		"reasoning that is not told":            {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":18}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7}, Measured},
		"a total that is less":                  {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":0}}`, want{usage.InputTokens: 11, usage.OutputTokens: 4}, Measured},
		"a total without output":                {`{"usage":{"prompt_tokens":11,"total_tokens":18}}`, want{usage.InputTokens: 11}, Measured},
		"cached beside input":                   {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"total_tokens":115,"prompt_tokens_details":{"cached_tokens":100}}}`, want{usage.InputTokens: 111, usage.OutputTokens: 4, usage.CachedInputTokens: 100}, Measured},
		"cached is more than input":             {`{"usage":{"prompt_tokens":11,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":100}}}`, want{usage.InputTokens: 111, usage.OutputTokens: 4, usage.CachedInputTokens: 100}, Measured},
		"caches that the total says are inside": {`{"usage":{"input_tokens":1110,"cache_creation_input_tokens":100,"cache_read_input_tokens":1000,"output_tokens":5,"total_tokens":1115}}`, want{usage.InputTokens: 1110, usage.OutputTokens: 5, usage.CachedInputTokens: 1000}, Measured},
		"Gemini":                                {`{"usageMetadata":{"promptTokenCount":20,"cachedContentTokenCount":8,"candidatesTokenCount":5,"thoughtsTokenCount":7,"toolUsePromptTokenCount":3,"totalTokenCount":35}}`, want{usage.InputTokens: 23, usage.OutputTokens: 12, usage.CachedInputTokens: 8, usage.ReasoningTokens: 7}, Measured},
		"Gemini without candidates":             {`{"usageMetadata":{"promptTokenCount":20,"thoughtsTokenCount":7,"totalTokenCount":27}}`, want{usage.InputTokens: 20, usage.OutputTokens: 7, usage.ReasoningTokens: 7}, Measured},
		"Bedrock":                               {`{"usage":{"inputTokens":30,"outputTokens":5,"totalTokens":135,"cacheReadInputTokens":60,"cacheWriteInputTokens":40}}`, want{usage.InputTokens: 130, usage.OutputTokens: 5, usage.CachedInputTokens: 60}, Measured},
		"DeepSeek":                              {`{"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,"prompt_cache_hit_tokens":4,"prompt_cache_miss_tokens":7}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.CachedInputTokens: 4}, Measured},
		"Cohere, the chat before":               {`{"text":"x","meta":{"api_version":{"version":"1"},"billed_units":{"input_tokens":11.0,"output_tokens":7}}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7}, Measured},
		"Ollama":                                {`{"model":"m","response":"x","done":true,"prompt_eval_count":11,"eval_count":7}`, want{usage.InputTokens: 11, usage.OutputTokens: 7}, Measured},
		"the same count by two names":           {`{"usage":{"prompt_tokens":0,"completion_tokens":0,"input_tokens":11,"output_tokens":7}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7}, Measured},
		"audio":                                 {`{"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,"prompt_tokens_details":{"audio_tokens":5,"cached_tokens":0},"completion_tokens_details":{"audio_tokens":6,"reasoning_tokens":0}}}`, want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.CachedInputTokens: 0, usage.ReasoningTokens: 0}, Measured},
		"embeddings":                            {`{"data":[{"embedding":[0.1,-2e3]}],"usage":{"prompt_tokens":8,"total_tokens":8}}`, want{usage.InputTokens: 8}, Measured},
		"usage first":                           {`{"usage":{"prompt_tokens":1,"completion_tokens":2},"choices":[]}`, want{usage.InputTokens: 1, usage.OutputTokens: 2}, Measured},
		"the name is escaped":                   {`{"us\u0061ge":{"prompt_tokens":1}}`, want{usage.InputTokens: 1}, Measured},
		"twice: the last counts":                {`{"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}}`, want{usage.InputTokens: 2}, Measured},
		"space everywhere":                      {" {\n \"usage\" : { \"prompt_tokens\" : 5 } } \n", want{usage.InputTokens: 5}, Measured},
		"inside another object":                 {`{"nested":{"usage":{"prompt_tokens":5}},"list":[{"usage":1}]}`, nil, None},
		"no usage":                              {`{"id":"x"}`, nil, None},
		"null":                                  {`{"usage":null}`, nil, None},
		"empty usage":                           {`{"usage":{}}`, nil, None},
		"not an object":                         {`{"usage":"lots"}`, nil, Malformed},
		"a list":                                {`{"usage":[1]}`, nil, Malformed},
		"text for a count":                      {`{"usage":{"prompt_tokens":"11","completion_tokens":7}}`, want{usage.OutputTokens: 7}, Malformed},
		"a fraction":                            {`{"usage":{"prompt_tokens":1.5,"completion_tokens":7}}`, want{usage.OutputTokens: 7}, Malformed},
		"negative":                              {`{"usage":{"prompt_tokens":-1,"completion_tokens":7}}`, want{usage.OutputTokens: 7}, Malformed},
		"too much":                              {`{"usage":{"prompt_tokens":9007199254740993,"completion_tokens":7}}`, want{usage.OutputTokens: 7}, Malformed},
		"far too much":                          {`{"usage":{"prompt_tokens":99999999999999999999,"completion_tokens":7}}`, want{usage.OutputTokens: 7}, Malformed},
		"details are not an object":             {`{"usage":{"prompt_tokens":3,"prompt_tokens_details":"none"}}`, want{usage.InputTokens: 3}, Measured},
		"the usage object is huge":              {`{"usage":{"x":"` + strings.Repeat("a", MaxUsageObject) + `","prompt_tokens":3}}`, nil, TooLarge},
		"a huge answer":                         {`{"content":"` + strings.Repeat(`a\"{`, 1<<15) + `","usage":{"prompt_tokens":3}}`, want{usage.InputTokens: 3}, Measured},
		"cut off":                               {`{"usage":{"prompt_tokens":3}`, nil, Broken},
		"cut off in the value":                  {`{"usage":{"prompt_to`, nil, Broken},
		"a list of objects":                     {`[{"usage":{"prompt_tokens":3}}]`, want{usage.InputTokens: 3}, Measured},
		"text":                                  {`hello`, nil, Unreadable},
		"empty":                                 {``, nil, Empty},
		"something after the end":               {`{"usage":{"prompt_tokens":3,"completion_tokens":1}} x`, want{usage.InputTokens: 3, usage.OutputTokens: 1}, Measured},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for how, r := range map[string]io.Reader{"at once": strings.NewReader(c.body), "in halves": iotest.HalfReader(strings.NewReader(c.body))} {
				got, outcome := read(t, r, "")
				if outcome != c.outcome || cmp.Diff(c.want, got) != "" {
					t.Errorf("%s: %s, %v", how, outcome, cmp.Diff(c.want, got))
				}
			}
			for _, encoding := range []string{"gzip", "br", "zstd"} {
				got, outcome := read(t, iotest.OneByteReader(encoded(t, encoding, c.body)), encoding)
				if outcome != c.outcome || cmp.Diff(c.want, got) != "" {
					t.Errorf("%s: %s, %v", encoding, outcome, cmp.Diff(c.want, got))
				}
			}
		})
	}
}

func encoded(t *testing.T, encoding, body string) io.Reader {
	t.Helper()
	var b bytes.Buffer
	var z io.WriteCloser
	switch encoding {
	case "gzip":
		z = gzip.NewWriter(&b)
	case "br":
		z = brotli.NewWriter(&b)
	case "zstd":
		var err error
		if z, err = zstd.NewWriter(&b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(z, body); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestWhatCannotBeReadIsUnknown(t *testing.T) {
	t.Parallel()
	if got, outcome := read(t, strings.NewReader("\x00\x01"), "compress"); outcome != Encoded || got != nil {
		t.Errorf("an encoding that is not known here: %s %v", outcome, got)
	}
	if got, outcome := read(t, strings.NewReader("\x1f\x8bgzip"), "gzip"); outcome != Broken || got != nil {
		t.Errorf("bad gzip: %s %v", outcome, got)
	}
	if got, outcome := read(t, iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(`{"usage":{"prompt_tokens":3}}`))), ""); outcome != Broken || got != nil {
		t.Errorf("broken off: %s %v", outcome, got)
	}
}

// Whatever JSON object comes, cut into whatever pieces, the scanner finds what
// encoding/json finds.
func TestTheScannerAgreesWithAParser(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		var value func(depth int) any
		value = func(depth int) any {
			switch rapid.IntRange(0, 5-min(depth, 2)).Draw(r, "kind") {
			case 0:
				return rapid.String().Draw(r, "text")
			case 1:
				return rapid.Int64().Draw(r, "number")
			case 2:
				return rapid.Bool().Draw(r, "bool")
			case 3:
				return nil
			case 4:
				return []any{value(depth + 1), value(depth + 1)}
			default:
				return map[string]any{rapid.SampledFrom([]string{"usage", "a", "}"}).Draw(r, "name"): value(depth + 1)}
			}
		}
		doc := make(map[string]any)
		for _, k := range rapid.SliceOfN(rapid.SampledFrom([]string{"usage", "b", "\"", "usage2", ""}), 0, 4).Draw(r, "keys") {
			doc[k] = value(0)
		}
		data, err := json.MarshalIndent(doc, "", rapid.SampledFrom([]string{"", " "}).Draw(r, "indent"))
		if err != nil {
			r.Fatal(err)
		}
		s := NewScanner("usage", 1<<20)
		for rest := data; len(rest) > 0; {
			n := rapid.IntRange(1, len(rest)).Draw(r, "piece")
			_, _ = s.Write(rest[:n])
			rest = rest[n:]
		}
		got, ok := s.Value()
		want, there := doc["usage"]
		if ok != there || s.Absent() == there || !s.Ended() {
			r.Fatalf("%s: found %v, absent %v, ended %v", data, ok, s.Absent(), s.Ended())
		}
		if !ok {
			return
		}
		wantJSON, err := json.Marshal(want)
		if err != nil {
			r.Fatal(err)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, got); err != nil || compact.String() != string(wantJSON) {
			r.Fatalf("%s: got %s, want %s (%v)", data, got, wantJSON, err)
		}
	})
}

func FuzzScanner(f *testing.F) {
	f.Add([]byte(`{"usage":{"prompt_tokens":3}}`), 3)
	f.Add([]byte(`{"a":[}]`), 1)
	f.Fuzz(func(t *testing.T, data []byte, cut int) {
		s := NewScanner("usage", 1024)
		if cut < 0 || cut > len(data) {
			cut = 0
		}
		_, _ = s.Write(data[:cut])
		_, _ = s.Write(data[cut:])
		if v, ok := s.Value(); ok && len(v) > 1024 {
			t.Fatal("past the bound")
		}
	})
}

func BenchmarkScanner(b *testing.B) {
	body := []byte(`{"choices":[{"message":{"content":"` + strings.Repeat("lorem ipsum dolor ", 500) + `"}}],"usage":{"prompt_tokens":11,"completion_tokens":7}}`)
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		s := NewScanner("usage", MaxUsageObject)
		_, _ = s.Write(body)
	}
}
