package inmemory

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// writes counts what goes to an upstream in pieces.
type writes struct {
	net.Conn
	n *atomic.Int64
}

func (c writes) Write(p []byte) (int, error) {
	c.n.Add(1)
	return c.Conn.Write(p)
}

func TestABodyThatWasReadLeavesInOnePieceWithItsHeader(t *testing.T) {
	t.Parallel()
	var got atomic.Value
	up := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got.Store(string(body))
	}))
	t.Cleanup(up.Close)
	var pieces atomic.Int64
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		return writes{c, &pieces}, err
	}}
	t.Cleanup(transport.CloseIdleConnections)
	send := func(prepare func(out, in *http.Request)) {
		t.Helper()
		const text = `{"model":"m"}`
		in := httptest.NewRequest(http.MethodPost, up.URL, strings.NewReader(text))
		in.Body = New([]byte(text), in.Body)
		out := in.Clone(t.Context())
		out.RequestURI = ""
		out.Body = struct{ io.ReadCloser }{out.Body}
		prepare(out, in)
		resp, err := transport.RoundTrip(out)
		if err != nil {
			t.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
		if got.Load() != text {
			t.Errorf("the upstream has %q", got.Load())
		}
	}
	send(func(out, _ *http.Request) {})
	if pieces.Load() != 2 {
		t.Fatalf("without Send it leaves in %d pieces, which this test takes for two", pieces.Load())
	}
	pieces.Store(0)
	send(Send)
	if pieces.Load() != 1 {
		t.Errorf("it leaves in %d pieces", pieces.Load())
	}
}

func TestABodyOfWhichMoreIsToBeSaidStaysAsItIs(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*http.Request){
		"another length":  func(r *http.Request) { r.ContentLength++ },
		"unknown length":  func(r *http.Request) { r.ContentLength = -1 },
		"chunks":          func(r *http.Request) { r.TransferEncoding = []string{"chunked"} },
		"trailers":        func(r *http.Request) { r.Trailer = http.Header{"Checksum": nil} },
		"read in part":    func(r *http.Request) { _, _ = r.Body.(Body).ReadByte() },
		"not in memory":   func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("text")) },
		"nothing in it":   func(r *http.Request) { r.Body, r.ContentLength = New(nil, r.Body), 0 },
		"none in the end": func(r *http.Request) { r.Body = nil },
	} {
		in := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("text"))
		in.Body = New([]byte("text"), in.Body)
		change(in)
		out := in.Clone(t.Context())
		Send(out, in)
		if out.Body != in.Body {
			t.Errorf("%s: it is sent in another form", name)
		}
	}
}
