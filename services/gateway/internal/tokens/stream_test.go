package tokens

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Streams in the forms that the providers document.
const (
	chatStream = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}

data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"data: {\"usage\":{\"prompt_tokens\":9}}\n\n"},"finish_reason":null}],"usage":null}

data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}

` + chatUsage + chatDone
	chatUsage = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":3}}}

`
	chatDone = "data: [DONE]\n\n"
	// asked is in every chunk only because usage was asked for.
	asked          = `,"usage":null`
	responseStream = `event: response.created
data: {"type":"response.created","response":{"id":"resp_1","output":[],"usage":null}}

event: response.output_text.delta
data: {"type":"response.output_text.delta","item_id":"msg_1","delta":"Hi"}

event: response.completed
data: {"type":"response.completed","response":{"id":"resp_1","output":[{"content":[{"text":"usage"}]}],"usage":{"input_tokens":37,"input_tokens_details":{"cached_tokens":0},"output_tokens":11,"output_tokens_details":{"reasoning_tokens":2},"total_tokens":48},"user":null}}

`
	messageBegin = `event: message_start
data: {"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 25, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 1000, "output_tokens": 1}}}

event: content_block_start
data: {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}}

`
	messageStream = messageBegin + `event: message_delta
data: {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence":null}, "usage": {"output_tokens": 15}}

event: message_stop
data: {"type": "message_stop"}

`
)

// readStream reads a stream to its end, or to where it breaks off.
func readStream(t interface{ Fatal(...any) }, body io.Reader, drops bool) (passed string, got map[usage.Meter]int64, outcome Outcome) {
	heard := 0
	s := NewReader(io.NopCloser(body), Options{Stream: true, Drops: drops, Length: -1}, func(r *Result) {
		outcome = r.Outcome
		heard++
		for _, q := range r.Readings {
			if got == nil {
				got = make(map[usage.Meter]int64)
			}
			got[q.Meter] = q.Value
		}
	})
	b, err := io.ReadAll(s)
	if err != nil && !errors.Is(err, iotest.ErrTimeout) {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil || heard != 1 {
		t.Fatal(err, heard)
	}
	return string(b), got, outcome
}

func TestUsageOfAStream(t *testing.T) {
	t.Parallel()
	type want = map[usage.Meter]int64
	chat := want{usage.InputTokens: 11, usage.OutputTokens: 7, usage.CachedInputTokens: 4, usage.ReasoningTokens: 3}
	for name, c := range map[string]struct {
		body    string
		want    want
		outcome Outcome
	}{
		"chat completion":           {chatStream, chat, Measured},
		"not asked for":             {strings.Replace(chatStream, chatUsage, "", 1), nil, None},
		"no empty line at the end":  {strings.TrimSuffix(strings.TrimSuffix(chatStream, chatDone), "\n\n"), chat, Measured},
		"running totals":            {"data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1}}\n\ndata: {\"choices\":[{}],\"usage\":{\"completion_tokens\":9}}\n\n", want{usage.InputTokens: 5, usage.OutputTokens: 9}, Measured},
		"response":                  {responseStream, want{usage.InputTokens: 37, usage.OutputTokens: 11, usage.CachedInputTokens: 0, usage.ReasoningTokens: 2}, Measured},
		"response, incomplete":      {strings.ReplaceAll(responseStream, "response.completed", "response.incomplete"), want{usage.InputTokens: 37, usage.OutputTokens: 11, usage.CachedInputTokens: 0, usage.ReasoningTokens: 2}, Measured},
		"message":                   {messageStream, want{usage.InputTokens: 1125, usage.OutputTokens: 15, usage.CachedInputTokens: 1000}, Measured},
		"message, input told again": {strings.Replace(messageStream, `{"output_tokens": 15}`, `{"input_tokens":30,"cache_creation_input_tokens":null,"output_tokens":15}`, 1), want{usage.InputTokens: 1130, usage.OutputTokens: 15, usage.CachedInputTokens: 1000}, Measured},
		// The 1 at its beginning is not what it cost.
		"message without an end": {messageBegin, want{usage.InputTokens: 1125, usage.CachedInputTokens: 1000}, Measured},
		"over several lines":     {": hello\nid: 3\ndata: {\"usage\":\ndata:{\"prompt_tokens\":3}\ndata: }\n\n", want{usage.InputTokens: 3}, Measured},
		"not data":               {"date: {\"usage\":{\"prompt_tokens\":3}}\n\n: data: {\"usage\":{\"prompt_tokens\":3}}\n\n", nil, Unreadable},
		"inside something else":  {"data: {\"delta\":{\"x\":{\"usage\":{\"prompt_tokens\":3}}}}\n\n", nil, None},
		"not counts":             {"data: {\"usage\":{\"prompt_tokens\":\"3\",\"completion_tokens\":4}}\n\n", want{usage.OutputTokens: 4}, Malformed},
		"no object":              {"data: {\"usage\":7}\n\n", nil, Malformed},
		"huge":                   {"data: {\"usage\":{\"x\":\"" + strings.Repeat("a", MaxUsageObject) + "\"}}\n\n", nil, TooLarge},
		"empty":                  {"", nil, Empty},
		"a comment":              {": ping\n\n", nil, Unreadable},
		"Groq": {"data: {\"choices\":[{\"delta\":{}}],\"x_groq\":{\"id\":\"req_1\",\"usage\":{\"queue_time\":0.1,\"prompt_tokens\":5,\"completion_tokens\":9,\"total_tokens\":14}}}\n\n" + chatDone,
			want{usage.InputTokens: 5, usage.OutputTokens: 9}, Measured},
		"Gemini": {"data: {\"candidates\":[{}],\"usageMetadata\":{\"promptTokenCount\":5,\"candidatesTokenCount\":2,\"thoughtsTokenCount\":10,\"totalTokenCount\":17}}\n\n" +
			"data: {\"candidates\":[{}],\"usageMetadata\":{\"promptTokenCount\":5,\"candidatesTokenCount\":4,\"thoughtsTokenCount\":10,\"totalTokenCount\":19}}\n\n",
			want{usage.InputTokens: 5, usage.OutputTokens: 14, usage.ReasoningTokens: 10}, Measured},
		"Cohere": {"event: message-end\ndata: {\"type\":\"message-end\",\"delta\":{\"finish_reason\":\"COMPLETE\",\"usage\":{\"billed_units\":{\"input_tokens\":3,\"output_tokens\":24},\"tokens\":{\"input_tokens\":65,\"output_tokens\":26}}}}\n\n",
			want{usage.InputTokens: 65, usage.OutputTokens: 26}, Measured},
		// What has been counted does not become less.
		"input that falls to 0":         {strings.Replace(messageStream, `{"output_tokens": 15}`, `{"input_tokens":0,"cache_read_input_tokens":0,"output_tokens":15}`, 1), want{usage.InputTokens: 1125, usage.OutputTokens: 15, usage.CachedInputTokens: 1000}, Measured},
		"output that falls to 0":        {messageBegin[:strings.Index(messageBegin, `"output_tokens": 1`)] + `"output_tokens": 25}}}` + "\n\nevent: message_delta\ndata: {\"usage\": {\"output_tokens\": 0}}\n\n", want{usage.InputTokens: 1125, usage.OutputTokens: 25, usage.CachedInputTokens: 1000}, Measured},
		"running totals that fall":      {"data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":9,\"completion_tokens_details\":{\"reasoning_tokens\":3}}}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":0,\"completion_tokens\":0,\"completion_tokens_details\":{\"reasoning_tokens\":0}}}\n\n", want{usage.InputTokens: 5, usage.OutputTokens: 9, usage.ReasoningTokens: 3}, Measured},
		"a response that falls to 0":    {responseStream + `data: {"response":{"usage":{"input_tokens":0,"output_tokens":0}}}` + "\n\n", want{usage.InputTokens: 37, usage.OutputTokens: 11, usage.CachedInputTokens: 0, usage.ReasoningTokens: 2}, Measured},
		"a response, then a bare usage": {responseStream + `data: {"usage":{"prompt_tokens":1,"completion_tokens":0}}` + "\n\n", want{usage.InputTokens: 37, usage.OutputTokens: 11, usage.CachedInputTokens: 0, usage.ReasoningTokens: 2}, Measured},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, end := range []string{"\n", "\r\n", "\r"} {
				body := strings.ReplaceAll(c.body, "\n", end)
				for how, r := range map[string]io.Reader{"at once": strings.NewReader(body), "byte by byte": iotest.OneByteReader(strings.NewReader(body))} {
					passed, got, outcome := readStream(t, r, false)
					if outcome != c.outcome || cmp.Diff(c.want, got) != "" || passed != body {
						t.Errorf("%s, %q: %s, %v", how, end, outcome, cmp.Diff(c.want, got))
					}
				}
			}
		})
	}
}

func TestAStreamThatBreaksOffHasUsedWhatItToldUntilThen(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]map[usage.Meter]int64{
		messageBegin: {usage.InputTokens: 1125, usage.CachedInputTokens: 1000},
		chatStream[:strings.Index(chatStream, chatUsage)]: nil,
	} {
		passed, got, outcome := readStream(t, io.MultiReader(strings.NewReader(body), iotest.ErrReader(iotest.ErrTimeout)), true)
		if outcome != Broken || cmp.Diff(want, got) != "" || passed != strings.ReplaceAll(body, asked, "") {
			t.Errorf("%s, %v, %q", outcome, got, passed)
		}
	}
}

// Where every piece of an answer tells what was used so far, the client that hangs up may
// have made the upstream use more than the last one that came by says.
func TestAStreamThatBreaksOffAmongRunningTotalsIsPartial(t *testing.T) {
	t.Parallel()
	const (
		running = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1}}\n\n"
		plain   = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n"
	)
	for _, c := range []struct {
		body    string
		outcome Outcome
	}{
		{running, Partial},
		{running + plain, Partial},
		{running + "data: {\"choices\":[{\"delta\":{\"content\":\"[DO", Partial},
		{running + chatUsage + running, Partial},
		{running + chatUsage, Measured},
		{running + chatDone, Measured},
		{running + "data:[DONE]\r\n\r\n", Measured},
		{running + ": ping\n\n" + chatDone + ": ping\n\n", Measured},
		{running + "data: [DONE] or not\n\n", Partial},
		{plain, Broken},
		{messageBegin, Broken},
		{messageStream, Measured},
		{responseStream, Measured},
	} {
		for _, drops := range []bool{false, true} {
			_, got, outcome := readStream(t, io.MultiReader(iotest.OneByteReader(strings.NewReader(c.body)), iotest.ErrReader(iotest.ErrTimeout)), drops)
			if outcome != c.outcome || got == nil && c.outcome == Partial {
				t.Errorf("%q: %s, %v", c.body, outcome, got)
			}
		}
	}
}

func TestUsageThatTheClientDidNotAskForIsNotPassedOn(t *testing.T) {
	t.Parallel()
	plain := strings.ReplaceAll(strings.Replace(chatStream, chatUsage, "", 1), asked, "")
	azure := "data: {\"choices\":[],\"prompt_filter_results\":[]}\n\n"
	last := "data: {\"choices\":[{\"delta\":{}}],\"usage\":{\"prompt_tokens\":1}}\n\n"
	large := "data: {\"choices\":[],\"x\":\"" + strings.Repeat("a", 2*maxHeld) + "\",\"usage\":{\"prompt_tokens\":1}}\n\n"
	for body, want := range map[string]string{
		chatStream: plain,
		strings.Replace(azure, "]}", `],"usage":null}`, 1) + chatStream: azure + plain,
		last:                           last,
		large + chatUsage:              large,
		chatUsage:                      "",
		strings.TrimSpace(chatUsage):   "",
		"data: {\"choices\":[],\"usag": "data: {\"choices\":[],\"usag",
		messageStream:                  messageStream,
		responseStream:                 responseStream,
		// As Python's json writes it, and wherever it stands.
		"data: {\"a\": 1, \"usage\": null}\n\n":                        "data: {\"a\": 1}\n\n",
		"data: {\"a\": 1, \"usage\": null, \"b\": [2]}\n\n":            "data: {\"a\": 1, \"b\": [2]}\n\n",
		"data: {\"usage\": null, \"b\": {\"c\": 2}}\n\n":               "data: {\"b\": {\"c\": 2}}\n\n",
		"data:{\"usage\":null}\n\n":                                    "data:{}\n\n",
		"id: 7\ndata: {\"a\":\"usage\",\"usage\":null}\n\n":            "id: 7\ndata: {\"a\":\"usage\"}\n\n",
		"data: {\"a\":{\"usage\":null}}\n\n":                           "data: {\"a\":{\"usage\":null}}\n\n",
		"data: {\"choices\":null,\"usage\":{\"prompt_tokens\":1}}\n\n": "",
		`{"error":{"message":"no"},"usage":null}`:                      `{"error":{"message":"no"},"usage":null}`,
	} {
		for _, end := range []string{"\n", "\r\n", "\r"} {
			body, want := strings.ReplaceAll(body, "\n", end), strings.ReplaceAll(want, "\n", end)
			for how, r := range map[string]io.Reader{"at once": strings.NewReader(body), "with its end": iotest.DataErrReader(strings.NewReader(body)), "halves": iotest.HalfReader(strings.NewReader(body)), "bytes": iotest.OneByteReader(strings.NewReader(body))} {
				if len(body) > maxHeld && how == "bytes" {
					continue
				}
				if got, _, _ := readStream(t, r, true); got != want {
					t.Errorf("%s, %q: %q became %q", how, end, body, got)
				}
			}
		}
	}
}

func TestTheFirstByteSaysWhatAnAnswerIs(t *testing.T) {
	t.Parallel()
	const ollama = `{"model":"m","message":{"role":"assistant","content":"Hi"},"done":false}` + "\n" + `{"model":"m","done":true,"done_reason":"stop","prompt_eval_count":11,"eval_count":7}` + "\n"
	measured := map[usage.Meter]int64{usage.InputTokens: 11, usage.OutputTokens: 7}
	chat := map[usage.Meter]int64{usage.InputTokens: 11, usage.OutputTokens: 7, usage.CachedInputTokens: 4, usage.ReasoningTokens: 3}
	for _, c := range []struct {
		body    string
		want    map[usage.Meter]int64
		outcome Outcome
	}{
		{chatStream, chat, Measured},
		{": comment\n\n" + chatStream, chat, Measured},
		{"\xef\xbb\xbf: comment\n\n" + chatStream, chat, Measured},
		{"event: x\n" + chatStream, chat, Measured},
		{"\r\n" + chatStream, chat, Measured},
		{ollama, measured, Measured},
		{strings.TrimSpace(ollama), measured, Measured},
		{`{"choices":[]}` + "\n" + `{"usage":{"prompt_tokens":11,"completion_tokens":7}}`, measured, Measured},
		{`[{"usageMetadata":{"promptTokenCount":11,"candidatesTokenCount":2,"totalTokenCount":13}},` + "\n" + `{"usageMetadata":{"promptTokenCount":11,"candidatesTokenCount":7,"totalTokenCount":18}}]`, measured, Measured},
		{"\xef\xbb\xbf" + `{"usage":{"prompt_tokens":11,"completion_tokens":7}}`, measured, Measured},
		{" \n{\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7}}\r\n", measured, Measured},
		{"<html>", nil, Unreadable},
		{"hello", nil, Unreadable},
		{"\"usage\"", nil, Unreadable},
		{"[1,2]", nil, Broken},
		{"[]", nil, None},
		{"", nil, Empty},
		{"\x00\x01", nil, Unreadable},
	} {
		for how, r := range map[string]io.Reader{"at once": strings.NewReader(c.body), "byte by byte": iotest.OneByteReader(strings.NewReader(c.body))} {
			got, outcome := read(t, r, "")
			if outcome != c.outcome || cmp.Diff(c.want, got) != "" {
				t.Errorf("%q, %s: %s, %v", c.body, how, outcome, cmp.Diff(c.want, got))
			}
		}
	}
	// What it is called does not matter.
	if passed, got, outcome := readStream(t, strings.NewReader(ollama), true); passed != ollama || outcome != Measured || cmp.Diff(measured, got) != "" {
		t.Errorf("NDJSON that is called a stream: %q, %s %v", passed, outcome, got)
	}
}

// An estimate is not less than what passed: a token is a byte of text at least.
func TestWhatPassedBoundsWhatWasNotMeasured(t *testing.T) {
	t.Parallel()
	chunk := func(text string) string {
		return `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":"` + text + `"},"finish_reason":null}],"obfuscation":"xxxxxxx"}` + "\n\n"
	}
	for _, c := range []struct {
		name, body string
		most       int64
		outcome    Outcome
		complete   bool
	}{
		{"words", chunk("Hello") + chunk(" you"), 9, Broken, false},
		{"nothing visible", chunk("") + chunk(""), 2, Broken, false},
		{"an event that broke off", chunk("Hello") + chunk("you")[:len(chunk("you"))-30], 8, Broken, false},
		{"the last word came", chunk("Hello") + chatDone, 5, None, true},
		{"usage came", chunk("Hello") + chatUsage, 0, Measured, true},
		{"usage came, and more", strings.Replace(chatUsage, `"choices":[]`, `"choices":[{}]`, 1) + chunk("you"), 3, Partial, false},
		{"a message", messageBegin, 8, Broken, false}, // Hello, and three events without text
		{"JSON", `{"choices":[{"message":{"role":"assistant","content":"Hello \"you\""}}`, 13, Broken, false},
		{"lines", `{"message":{"content":"Hello"}}` + "\n" + `{"message":{"content":" y`, 7, Broken, false},
		{"bytes", "\x00\x01\x02", 3, Broken, false},
		{"nothing", "", 0, Broken, false},
	} {
		var got Result
		r := NewReader(io.NopCloser(io.MultiReader(strings.NewReader(c.body), iotest.ErrReader(iotest.ErrTimeout))), Options{Length: -1}, func(r *Result) { got = *r })
		if _, err := io.ReadAll(r); !errors.Is(err, iotest.ErrTimeout) {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil || got.Outcome != c.outcome || got.Passed != c.most || got.Complete != c.complete {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
	// The upstream had all of it, whatever the client took.
	var got Result
	r := NewReader(io.NopCloser(strings.NewReader(`{"choices":[{"message":{"content":"Hello`)), Options{Length: 1000}, func(r *Result) { got = *r })
	if _, err := io.ReadAll(r); err != nil || got.Passed < 900 {
		t.Errorf("%+v, %v", got, err)
	}
}

// An event that is whole is passed on before anything else comes.
func TestAStreamIsNotHeldUp(t *testing.T) {
	t.Parallel()
	for _, drops := range []bool{false, true} {
		r, w := io.Pipe()
		s := NewReader(r, Options{Stream: true, Drops: drops, Length: -1}, nil)
		go func() {
			for event := range strings.SplitAfterSeq(messageStream, "\n\n") {
				_, _ = io.WriteString(w, event)
			}
		}()
		for event := range strings.SplitAfterSeq(messageStream, "\n\n") {
			if event == "" {
				continue
			}
			got := make([]byte, len(event))
			if _, err := io.ReadFull(s, got); err != nil || string(got) != event {
				t.Fatalf("%q, %v", got, err)
			}
		}
		_ = s.Close()
	}
}

// Wherever a stream is cut into pieces, the same is passed on and the same is read.
func TestPiecesDoNotMatter(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		parts := rapid.SliceOfN(rapid.SampledFrom([]string{chatStream, chatUsage, chatDone, responseStream, messageStream, ": ping\n\n", "\n", "\r\n\r\n", "data:", "data: {\"choices\":[", "]}\n"}), 0, 5).Draw(r, "parts")
		body := strings.Join(parts, "")
		if rapid.Bool().Draw(r, "crlf") {
			body = strings.ReplaceAll(body, "\n", "\r\n")
		}
		drops := rapid.Bool().Draw(r, "drops")
		passed, got, outcome := readStream(r, strings.NewReader(body), drops)
		var pieces []io.Reader
		for rest := body; rest != ""; {
			n := rapid.IntRange(1, min(len(rest), 200)).Draw(r, "piece")
			pieces = append(pieces, strings.NewReader(rest[:n]))
			rest = rest[n:]
		}
		cut, gotCut, outcomeCut := readStream(r, io.MultiReader(pieces...), drops)
		if cut != passed || outcome != outcomeCut || cmp.Diff(got, gotCut) != "" {
			r.Fatalf("%q\n%q: %s %v\n%q: %s %v", body, passed, outcome, got, cut, outcomeCut, gotCut)
		}
		if !drops && cut != body {
			r.Fatalf("%q became %q", body, cut)
		}
	})
}

func FuzzStream(f *testing.F) {
	for _, body := range []string{chatStream, responseStream, messageStream, "data: {\"usage\":{\"prompt_tokens\":3}}\r\r\n", "data:\n\ndata"} {
		f.Add([]byte(body), 3)
	}
	f.Fuzz(func(t *testing.T, body []byte, cut int) {
		if cut < 0 || cut > len(body) {
			cut = 0
		}
		pieces := io.MultiReader(strings.NewReader(string(body[:cut])), strings.NewReader(string(body[cut:])))
		passed, got, outcome := readStream(t, pieces, false)
		if passed != string(body) {
			t.Fatalf("%q became %q", body, passed)
		}
		_, gotDropping, outcomeDropping := readStream(t, strings.NewReader(string(body)), true)
		if outcome != outcomeDropping || cmp.Diff(got, gotDropping) != "" {
			t.Fatalf("%s %v, and at once %s %v", outcome, got, outcomeDropping, gotDropping)
		}
	})
}

func BenchmarkStream(b *testing.B) {
	body := strings.Repeat(strings.SplitAfter(chatStream, "\n\n")[1], 100) + chatUsage
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := io.Copy(io.Discard, NewReader(io.NopCloser(strings.NewReader(body)), Options{Stream: true, Drops: true, Length: -1}, nil)); err != nil {
			b.Fatal(err)
		}
	}
}
