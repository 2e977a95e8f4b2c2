package tokens

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"
)

// A megabyte costs milliseconds, whatever is in it. Looked through again from each byte
// that matters, it would cost ten seconds and more.
func TestReadingCostsInProportionToWhatIsRead(t *testing.T) {
	t.Parallel()
	const size, bound = 1 << 20, 2 * time.Second
	in := func(piece string) string { return strings.Repeat(piece, size/len(piece)) }
	for name, body := range map[string]string{
		"escapes":             `{"a":"` + in(`\n`) + `"}`,
		"escapes without end": `{"a":"` + in(`\u4e2d`),
		"quotation marks":     `{"a":"` + in(`\"`) + `"}`,
		"a long name":         `{"` + in(`\n`) + `":1}`,
		"lists":               `{"a":` + in(`[`),
		"lone returns":        "data: 1\r" + in("\r"),
		"data after returns":  in("data: 1\r"),
		"empty lines":         in("\n"),
		"documents":           in("{}\n"),
	} {
		began := time.Now()
		scanner := NewScanner("model", 64)
		_, _ = scanner.Write([]byte(body)) // never fails
		if took := time.Since(began); took > bound {
			t.Errorf("%s: the scanner took %v", name, took)
		}
		for _, drops := range []bool{false, true} {
			began = time.Now()
			r := NewReader(io.NopCloser(strings.NewReader(body)), Options{Stream: true, Length: -1, Drops: drops}, func(*Result) {})
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 2*size)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if took := time.Since(began); took > bound {
				t.Errorf("%s: the reader took %v", name, took)
			}
		}
	}
}

// chunked is a stream without end that comes an event at a time.
type chunked struct{ event []byte }

// Read implements io.Reader.
func (c *chunked) Read(p []byte) (int, error) { return copy(p, c.event), nil }

// Close implements io.Closer.
func (c *chunked) Close() error { return nil }

const (
	openAIChunk    = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1767225600,"model":"model-1","system_fingerprint":"fp_1","choices":[{"index":0,"delta":{"content":" counted"},"logprobs":null,"finish_reason":null}],"usage":null}` + "\n\n"
	anthropicChunk = "event: content_block_delta\n" + `data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" \u00fcber\n"}}` + "\n\n"
	responsesChunk = "event: response.output_text.delta\n" + `data: {"type":"response.output_text.delta","item_id":"msg_1","output_index":0,"content_index":0,"delta":" counted","sequence_number":7}` + "\n\n"
	geminiChunk    = `data: {"candidates":[{"content":{"parts":[{"text":" counted"}],"role":"model"}}],"usageMetadata":{"promptTokenCount":8,"candidatesTokenCount":4,"totalTokenCount":12},"modelVersion":"model-1"}` + "\r\n\r\n"
)

func chunks() map[string]string {
	return map[string]string{"OpenAI": openAIChunk, "Anthropic": anthropicChunk, "Responses": responsesChunk, "Gemini": geminiChunk}
}

// A stream has many chunks: none of them is garbage.
func TestAChunkOfAStreamCostsNoAllocation(t *testing.T) {
	buffer := make([]byte, 4<<10)
	for name, event := range chunks() {
		for _, drops := range []bool{false, true} {
			r := NewReader(&chunked{[]byte(event)}, Options{Stream: true, Length: -1, Drops: drops}, func(*Result) {})
			pass := func() {
				if n, err := r.Read(buffer); err != nil || n == 0 || drops && bytes.Contains(buffer[:n], []byte(asked)) {
					t.Fatalf("%s: %q, %v", name, buffer[:n], err)
				}
			}
			pass() // which makes room for all others
			if n := testing.AllocsPerRun(200, pass); n > 0 {
				t.Errorf("%s, taking usage off %v: %v allocations a chunk", name, drops, n)
			}
		}
	}
}

func BenchmarkChunk(b *testing.B) {
	buffer := make([]byte, 4<<10)
	for name, event := range chunks() {
		b.Run(name, func(b *testing.B) {
			r := NewReader(&chunked{[]byte(event)}, Options{Stream: true, Length: -1, Drops: true}, func(*Result) {})
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.Read(buffer); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
