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
	chatDone       = "data: [DONE]\n\n"
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

// stream reads a stream to its end, or to where it breaks off.
func stream(t interface{ Fatal(...any) }, r io.Reader, drops bool) (passed string, got map[usage.Meter]int64, outcome Outcome) {
	heard := 0
	s := NewStream(io.NopCloser(r), drops, func(readings []Reading, o Outcome) {
		outcome = o
		heard++
		for _, q := range readings {
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
		"not data":               {"date: {\"usage\":{\"prompt_tokens\":3}}\n\n: data: {\"usage\":{\"prompt_tokens\":3}}\n\n", nil, None},
		"inside something else":  {"data: {\"delta\":{\"usage\":{\"prompt_tokens\":3}}}\n\n", nil, None},
		"not counts":             {"data: {\"usage\":{\"prompt_tokens\":\"3\",\"completion_tokens\":4}}\n\n", want{usage.OutputTokens: 4}, Malformed},
		"no object":              {"data: {\"usage\":7}\n\n", nil, Malformed},
		"huge":                   {"data: {\"usage\":{\"x\":\"" + strings.Repeat("a", MaxUsageObject) + "\"}}\n\n", nil, TooLarge},
		"empty":                  {"", nil, None},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, end := range []string{"\n", "\r\n", "\r"} {
				body := strings.ReplaceAll(c.body, "\n", end)
				for how, r := range map[string]io.Reader{"at once": strings.NewReader(body), "byte by byte": iotest.OneByteReader(strings.NewReader(body))} {
					passed, got, outcome := stream(t, r, false)
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
		passed, got, outcome := stream(t, io.MultiReader(strings.NewReader(body), iotest.ErrReader(iotest.ErrTimeout)), true)
		if outcome != Broken || cmp.Diff(want, got) != "" || passed != body {
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
		{running + chatUsage, Broken},
		{running + chatDone, Broken},
		{running + "data:[DONE]\r\n\r\n", Broken},
		{running + ": ping\n\n" + chatDone + ": ping\n\n", Broken},
		{running + "data: [DONE] or not\n\n", Partial},
		{plain, Broken},
		{messageStream, Broken},
		{responseStream, Broken},
	} {
		for _, drops := range []bool{false, true} {
			_, got, outcome := stream(t, io.MultiReader(iotest.OneByteReader(strings.NewReader(c.body)), iotest.ErrReader(iotest.ErrTimeout)), drops)
			if outcome != c.outcome || got == nil && c.outcome == Partial {
				t.Errorf("%q: %s, %v", c.body, outcome, got)
			}
		}
	}
}

func TestUsageThatTheClientDidNotAskForIsNotPassedOn(t *testing.T) {
	t.Parallel()
	azure := "data: {\"choices\":[],\"prompt_filter_results\":[],\"usage\":null}\n\n"
	last := "data: {\"choices\":[{\"delta\":{}}],\"usage\":{\"prompt_tokens\":1}}\n\n"
	large := "data: {\"choices\":[],\"x\":\"" + strings.Repeat("a", 2*maxHeld) + "\",\"usage\":{\"prompt_tokens\":1}}\n\n"
	for body, want := range map[string]string{
		chatStream:                     strings.Replace(chatStream, chatUsage, "", 1),
		azure + chatStream:             azure + strings.Replace(chatStream, chatUsage, "", 1),
		last:                           last,
		large + chatUsage:              large,
		chatUsage:                      "",
		strings.TrimSpace(chatUsage):   "",
		"data: {\"choices\":[],\"usag": "data: {\"choices\":[],\"usag",
		messageStream:                  messageStream,
		responseStream:                 responseStream,
	} {
		for _, end := range []string{"\n", "\r\n", "\r"} {
			body, want := strings.ReplaceAll(body, "\n", end), strings.ReplaceAll(want, "\n", end)
			for how, r := range map[string]io.Reader{"at once": strings.NewReader(body), "with its end": iotest.DataErrReader(strings.NewReader(body)), "halves": iotest.HalfReader(strings.NewReader(body))} {
				if got, _, _ := stream(t, r, true); got != want {
					t.Errorf("%s, %q: %q became %q", how, end, body, got)
				}
			}
		}
	}
}

func TestWhatAnAnswerIsSaysHowItIsRead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		contentType, encoding, body string
		outcome                     Outcome // empty: it is not looked at
	}{
		{"text/event-stream; charset=utf-8", "", chatStream, Measured},
		{"text/event-stream", "identity", chatStream, Measured},
		{"text/event-stream", "gzip", "\x1f\x8b", Encoded},
		{"application/json", "", `{"usage":{"prompt_tokens":1}}`, Measured},
		{"text/plain", "", chatStream, ""},
		{"", "", chatStream, ""},
	} {
		var outcome Outcome
		r := NewReader(io.NopCloser(strings.NewReader(c.body)), c.contentType, c.encoding, false, func(_ []Reading, o Outcome) { outcome = o })
		if r != nil {
			if got, err := io.ReadAll(r); err != nil || string(got) != c.body {
				t.Errorf("%q, %v", got, err)
			}
		}
		if outcome != c.outcome || (r == nil) != (c.outcome == "") {
			t.Errorf("%s, %s: %q", c.contentType, c.encoding, outcome)
		}
	}
}

// An event that is whole is passed on before anything else comes.
func TestAStreamIsNotHeldUp(t *testing.T) {
	t.Parallel()
	for _, drops := range []bool{false, true} {
		r, w := io.Pipe()
		s := NewStream(r, drops, nil)
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
		passed, got, outcome := stream(r, strings.NewReader(body), drops)
		var pieces []io.Reader
		for rest := body; rest != ""; {
			n := rapid.IntRange(1, min(len(rest), 200)).Draw(r, "piece")
			pieces = append(pieces, strings.NewReader(rest[:n]))
			rest = rest[n:]
		}
		cut, gotCut, outcomeCut := stream(r, io.MultiReader(pieces...), drops)
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
		passed, got, outcome := stream(t, pieces, false)
		if passed != string(body) {
			t.Fatalf("%q became %q", body, passed)
		}
		_, gotDropping, outcomeDropping := stream(t, strings.NewReader(string(body)), true)
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
		if _, err := io.Copy(io.Discard, NewStream(io.NopCloser(strings.NewReader(body)), true, nil)); err != nil {
			b.Fatal(err)
		}
	}
}
