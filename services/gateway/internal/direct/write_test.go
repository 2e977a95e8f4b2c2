package direct

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
)

// seen is what a server makes of the bytes of a request, and of what follows it.
func seen(raw []byte) (string, http.Header) {
	br := bufio.NewReader(bytes.NewReader(raw))
	r, err := http.ReadRequest(br)
	if err != nil {
		return "no request: " + err.Error(), nil
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return "no body: " + err.Error(), nil
	}
	rest, err := io.ReadAll(br)
	if err != nil {
		return err.Error(), nil
	}
	return fmt.Sprintf("%s %s %s %d %v %q rest %q", r.Method, r.RequestURI, r.Host, r.ContentLength, r.TransferEncoding, body, rest), r.Header
}

// Whatever a client can put into a request, the upstream sees in it what net/http would
// have it see, and not one request more.
func TestARequestIsWrittenAsNetHTTPWritesIt(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"a", "", " a ", "a\r\nX: b", "a\nb", "a\r\n\r\nGET / HTTP/1.1\r\n\r\n", "\x00", "chunked", "7", "ü"}))
		name := rapid.OneOf(rapid.SampledFrom([]string{"X", "User-Agent", "Host", "Content-Length", "Transfer-Encoding", "Trailer", "Connection", "Accept", "x y", "X:", "", "Ünder", "A\r\nB"}), rapid.String())
		r := &http.Request{
			Method: rapid.SampledFrom([]string{"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "QUERY", "G ET", "GET\r\n"}).Draw(t, "method"),
			URL: &url.URL{
				Scheme: "http", Host: rapid.SampledFrom([]string{"a", "a.b:80", "127.0.0.1:1", "[::1]:80", "[fe80::1%25en0]:80"}).Draw(t, "to"),
				Path: "/" + text.Draw(t, "path"), RawQuery: text.Draw(t, "query"),
			},
			Host:   rapid.SampledFrom([]string{"", "b", "b:81", "B.c", "[::1]", "a b", "a/b", "a\r\nX: y", "bücher", "a_b"}).Draw(t, "host"),
			Header: http.Header{"User-Agent": {""}},
		}
		for range rapid.IntRange(0, 4).Draw(t, "headers") {
			r.Header[name.Draw(t, "name")] = rapid.SliceOfN(text, 0, 2).Draw(t, "values")
		}
		content := rapid.SampledFrom([]string{"", "x", `{"model":"m"}`, "GET / HTTP/1.1\r\n\r\n", strings.Repeat("x", 9000)}).Draw(t, "body")
		make := func() (*http.Request, inmemory.Body) {
			again := r.Clone(t.Context())
			if content == "" {
				return again, inmemory.Body{}
			}
			body := inmemory.New([]byte(content), io.NopCloser(nil))
			again.Body, again.ContentLength = io.NopCloser(body.Reader), int64(len(content))
			return again, body
		}
		var want, got bytes.Buffer
		wanted, _ := make()
		werr := wanted.Write(&want)
		asked, body := make()
		w := bufio.NewWriter(&got)
		gerr := write(w, asked, body)
		if gerr == nil {
			gerr = w.Flush()
		}
		if (werr != nil) != (gerr != nil) {
			t.Fatalf("%v, net/http: %v", gerr, werr)
		}
		if werr != nil {
			return
		}
		wantText, wantHeader := seen(want.Bytes())
		gotText, gotHeader := seen(got.Bytes())
		if diff := cmp.Diff(wantText, gotText); diff != "" {
			t.Fatalf("another request (-net/http +ours):\n%s", diff)
		}
		if diff := cmp.Diff(wantHeader, gotHeader); diff != "" {
			t.Fatalf("another header (-net/http +ours):\n%s", diff)
		}
	})
}

func TestWritingARequestCostsNoMoreThanItsTarget(t *testing.T) {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://127.0.0.1:1/v1/chat/completions", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"User-Agent": {"a"}, "Accept": {"*/*"}, "Content-Type": {"application/json"}, "X-Forwarded-For": {"127.0.0.1"}}
	body := inmemory.New([]byte(`{"model":"m"}`), io.NopCloser(nil))
	r.ContentLength = int64(body.Len())
	w := bufio.NewWriter(io.Discard)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		if err := write(w, r, body); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}
