package inmemory

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// closer notes that it was closed.
type closer struct{ closed bool }

func (c *closer) Close() error {
	c.closed = true
	return nil
}

func TestABodyThatWasReadIsSentAsItIsInMemoryAndStaysTheClients(t *testing.T) {
	t.Parallel()
	was := &closer{}
	in := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("text"))
	in.Body = New([]byte("text"), was)
	out := in.Clone(t.Context())
	out.Body = struct{ io.ReadCloser }{in.Body} // as a reverse proxy wraps it
	Send(out, in)
	body, ok := out.Body.(Body)
	if !ok {
		t.Fatalf("it is sent as a %T", out.Body)
	}
	text, err := io.ReadAll(body)
	if err != nil || string(text) != "text" {
		t.Errorf("%q, %v", text, err)
	}
	if err := body.Close(); err != nil || was.closed {
		t.Errorf("the transport closes what is the client's: %v, %v", was.closed, err)
	}
	if err := in.Body.Close(); err != nil || !was.closed {
		t.Errorf("the request's body does not close as the one it was: %v, %v", was.closed, err)
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
