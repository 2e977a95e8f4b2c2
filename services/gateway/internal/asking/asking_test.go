package asking

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
)

func TestUsageIsAskedForAtOnePlaceAlone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		body, want string // want is empty: it stays as it is
		asks       bool
	}{
		{`{"stream":true}`, `{"stream":true,"stream_options":{"include_usage":true}}`, true},
		{"{ \"model\": \"m\",\n  \"stream\" : true\n}\n", "{ \"model\": \"m\",\n  \"stream\" : true,\"stream_options\":{\"include_usage\":true}\n}\n", true},
		{"\xef\xbb\xbf" + `{"stream":true}`, "\xef\xbb\xbf" + `{"stream":true,"stream_options":{"include_usage":true}}`, true},
		{`{"str\u0065am":true,"x":"é<"}`, `{"str\u0065am":true,"x":"é<","stream_options":{"include_usage":true}}`, true},
		{`{"stream":true,"stream_options":null,"x":1}`, `{"stream":true,"stream_options":{"include_usage":true},"x":1}`, true},
		{`{"stream_options":{},"stream":true}`, `{"stream_options":{"include_usage":true},"stream":true}`, true},
		{`{"stream":true,"stream_options": { "include_obfuscation": false } }`, `{"stream":true,"stream_options": {"include_usage":true, "include_obfuscation": false } }`, true},
		{`{"stream":true,"stream_options":{"include_usage":false,"a":[1]}}`, `{"stream":true,"stream_options":{"include_usage":true,"a":[1]}}`, true},
		{`{"stream":true,"stream_options":{"a":{},"include_usage": null}}`, `{"stream":true,"stream_options":{"a":{},"include_usage": true}}`, true},
		{`{"stream":true,"stre\u0061m_options":{"include\u005fusage":false}}`, `{"stream":true,"stre\u0061m_options":{"include\u005fusage":true}}`, true},
		// vLLM would tell usage in every chunk, where it is asked for it.
		{`{"stream":true,"stream_options":{"continuous_usage_stats":true}}`, `{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":false}}`, true},
		{`{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}`, ``, false},
		// The client asks itself.
		{`{"stream":true,"stream_options":{"include_usage":true}}`, ``, false},
		{`{"stream":true,"stream_options":{"include_usage":"true"}}`, ``, false},
		// What is there several times: all of them, and the last is what the client meant.
		{`{"stream":false,"stream":true}`, `{"stream":false,"stream":true,"stream_options":{"include_usage":true}}`, true},
		{`{"stream":true,"stream":false}`, `{"stream":true,"stream":false,"stream_options":{"include_usage":true}}`, true},
		{`{"stream":true,"stream_options":{"include_usage":true},"stream_options":{"include_usage":false}}`, `{"stream":true,"stream_options":{"include_usage":true},"stream_options":{"include_usage":true}}`, true},
		{`{"stream":true,"stream_options":null,"stream_options":{"include_usage":true}}`, `{"stream":true,"stream_options":{"include_usage":true},"stream_options":{"include_usage":true}}`, false},
		// As parsers read it that do not mind.
		{`{"Stream":true}`, `{"Stream":true,"stream_options":{"include_usage":true}}`, true},
		{`{"stream":1}`, `{"stream":1,"stream_options":{"include_usage":true}}`, true},
		{`{"stream":"True"}`, `{"stream":"True","stream_options":{"include_usage":true}}`, true},
		{`{"stream":true,"Stream_Options":{"include_usage":false}}`, `{"stream":true,"Stream_Options":{"include_usage":true},"stream_options":{"include_usage":true}}`, true},
		// Nothing to ask.
		{`{"stream":false}`, ``, false},
		{`{"stream":null}`, ``, false},
		{`{"messages":[{"content":"\"stream\":true"}]}`, ``, false},
		{`{"metadata":{"stream":true}}`, ``, false},
		{`{}`, ``, false},
		{``, ``, false},
		{`[{"stream":true}]`, ``, false},
		{`{"stream":true`, ``, false},
		{`{"stream":true} {"stream":true}`, ``, false},
		{`{"stream":true,"stream_options":"yes"}`, ``, false},
		{`stream=true`, ``, false},
	} {
		got, asks := Edit([]byte(c.body))
		if string(got) != c.want || asks != c.asks {
			t.Errorf("%s: %s, %v", c.body, got, asks)
		}
		if got != nil && !json.Valid([]byte(strings.TrimPrefix(string(got), "\xef\xbb\xbf"))) {
			t.Errorf("%s is no JSON", got)
		}
	}
}

// FuzzEdit: what is asked for is asked for, and nothing else changes.
func FuzzEdit(f *testing.F) {
	f.Add([]byte(`{"stream":true,"stream_options":{"a":1}}`))
	f.Add([]byte(`{"stream":true,"stream_options":null,"stream":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, _ := Edit(raw)
		if got == nil || !json.Valid(raw) {
			return
		}
		var before, after map[string]any
		if json.Unmarshal(raw, &before) != nil || json.Unmarshal(got, &after) != nil {
			t.Fatalf("%s became %s", raw, got)
		}
		if options, ok := after["stream_options"].(map[string]any); !ok || options["include_usage"] != true && options["include_usage"] == nil {
			t.Fatalf("%s became %s", raw, got)
		}
		delete(before, "stream_options")
		for name := range before {
			if _, there := after[name]; !there {
				t.Fatalf("%s became %s", raw, got)
			}
		}
	})
}

type room struct{ left int64 }

func (r *room) Take(_ context.Context, n int64) bool {
	r.left -= n
	return r.left >= 0
}

func TestABodyThatIsNotChangedArrivesAsItCame(t *testing.T) {
	t.Parallel()
	const streamed, asked = `{"stream":true}`, `{"stream":true,"stream_options":{"include_usage":true}}`
	large := `{"x":"` + strings.Repeat("y", 1<<18) + `","stream":true}`
	gone := errors.New("the client left")
	for _, c := range []struct {
		name    string
		body    io.Reader
		length  int64
		edit    func(*http.Request)
		max     int64
		room    int64
		want    string
		wantLen int64
		asks    bool
		err     error
	}{
		{"asked", strings.NewReader(streamed), int64(len(streamed)), nil, 1 << 20, 0, asked, int64(len(asked)), true, nil},
		{"in chunks", iotest.OneByteReader(strings.NewReader(streamed)), -1, nil, 1 << 20, 0, asked, int64(len(asked)), true, nil},
		{"with trailers", strings.NewReader(streamed), -1, func(r *http.Request) { r.Trailer = http.Header{"X": nil} }, 1 << 20, 0, asked, -1, true, nil},
		{"not a stream", strings.NewReader(`{"x":1}`), 7, nil, 1 << 20, 0, `{"x":1}`, 7, false, nil},
		{"as large as may be", strings.NewReader(streamed), int64(len(streamed)), nil, int64(len(streamed)), 0, asked, int64(len(asked)), true, nil},
		{"too large", strings.NewReader(streamed), int64(len(streamed)), nil, 10, 0, streamed, int64(len(streamed)), false, nil},
		{"too large, in chunks", strings.NewReader(streamed), -1, nil, 10, 0, streamed, -1, false, nil},
		{"large", strings.NewReader(large), int64(len(large)), nil, 1 << 20, 1 << 20, strings.TrimSuffix(large, "}") + `,"stream_options":{"include_usage":true}}`, int64(len(large) + len(asked) - len(streamed)), true, nil},
		{"no room", strings.NewReader(large), -1, nil, 1 << 20, 0, large, -1, false, nil},
		{"compressed", strings.NewReader(streamed), int64(len(streamed)), func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }, 1 << 20, 0, streamed, int64(len(streamed)), false, nil},
		{"broken off", io.MultiReader(strings.NewReader(streamed[:9]), iotest.ErrReader(gone)), 100, nil, 1 << 20, 0, streamed[:9], 100, false, gone},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/chat/completions", c.body)
		r.ContentLength = c.length
		r.Header.Set("Content-Digest", "sha-256=:x:")
		if c.edit != nil {
			c.edit(r)
		}
		asks := Of(r, c.max, &room{c.room})
		got, err := io.ReadAll(r.Body)
		if string(got) != c.want || asks != c.asks || r.ContentLength != c.wantLen || !errors.Is(err, c.err) {
			t.Errorf("%s: %.100q, %v, %d, %v", c.name, got, asks, r.ContentLength, err)
		}
		if r.Header.Get("Content-Digest") == "" != c.asks {
			t.Errorf("%s: the digest is of another body", c.name)
		}
	}
}
