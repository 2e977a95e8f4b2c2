package direct

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/once"
)

// scripted is a connection whose upstream answers with the same bytes, once it has
// something of the request, and leaves.
type scripted struct {
	net.Conn
	answer *bytes.Reader
	takes  int // writes; the next one fails
	asked  chan struct{}
	once   sync.Once
}

func newScripted(answer []byte, takes int) *scripted {
	return &scripted{answer: bytes.NewReader(answer), takes: takes, asked: make(chan struct{})}
}

func (s *scripted) Write(p []byte) (int, error) {
	if s.takes--; s.takes < 0 {
		return 0, syscall.EPIPE
	}
	s.once.Do(func() { close(s.asked) })
	return len(p), nil
}

func (s *scripted) Read(p []byte) (int, error) { <-s.asked; return s.answer.Read(p) }

func (s *scripted) Close() error                     { s.once.Do(func() { close(s.asked) }); return nil }
func (s *scripted) SetDeadline(time.Time) error      { return nil }
func (s *scripted) SetReadDeadline(time.Time) error  { return nil }
func (s *scripted) SetWriteDeadline(time.Time) error { return nil }
func (s *scripted) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *scripted) RemoteAddr() net.Addr             { return &net.TCPAddr{} }

func over(conn net.Conn) *Transport {
	return New(Options{Dial: func(context.Context, string, string) (net.Conn, error) { return conn, nil }, HeaderTimeout: time.Minute, IdleTimeout: time.Minute, MaxIdlePerHost: 1})
}

// An upstream that refuses a call before it has read it says why; then it closes the
// connection, and what is still written fails.
func TestAnAnswerThatComesBeforeTheCallIsThroughIsRead(t *testing.T) {
	t.Parallel()
	refuses := "HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\n\r\ntoo large"
	for takes, want := range []string{"", refuses} {
		d := over(newScripted([]byte(refuses), takes))
		resp, text, err := ask(t, d, request(t, http.MethodPost, "http://a", strings.Repeat("x", maxBody)))
		sent := (*once.SentError)(nil)
		switch {
		case want == "" && (err == nil || errors.As(err, &sent)):
			t.Errorf("an upstream that took nothing: %q, %v", text, err)
		case want != "" && (err != nil || resp.StatusCode != http.StatusRequestEntityTooLarge || text != "too large"):
			t.Errorf("an upstream that took the beginning: %q, %v", text, err)
		}
		if n := len(d.idle.idle["a:80"]); n != 0 {
			t.Error("the connection is kept, and the upstream waits for the rest of the call")
		}
	}
	// Without an answer it says how writing failed.
	d := over(newScripted(nil, 1))
	_, _, err := ask(t, d, request(t, http.MethodPost, "http://a", strings.Repeat("x", maxBody)))
	if sent := (*once.SentError)(nil); !errors.As(err, &sent) || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("without an answer: %v", err)
	}
}

func TestACallWhoseClientHasLeftIsNotSent(t *testing.T) {
	t.Parallel()
	ctx, leave := context.WithCancelCause(t.Context())
	left := errors.New("left")
	leave(left)
	d := New(Options{Dial: func(context.Context, string, string) (net.Conn, error) {
		t.Error("there is a connection for it")
		return nil, net.ErrClosed
	}})
	_, err := d.RoundTrip(request(t, http.MethodGet, "http://a", "").WithContext(ctx))
	if sent := (*once.SentError)(nil); !errors.Is(err, left) || errors.As(err, &sent) {
		t.Errorf("it is %v", err)
	}
}

// leaving has its client leave while a deadline is set, and lets all that this ends go
// first.
type leaving struct {
	net.Conn
	leave func()
}

func (l *leaving) SetDeadline(at time.Time) error {
	if leave := l.leave; leave != nil {
		l.leave = nil
		leave()
		synctest.Wait()
	}
	return l.Conn.SetDeadline(at)
}

// The end of a call is the last deadline of its connection, whenever its client leaves.
func TestAClientThatLeavesAtTheBeginningEndsItsCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		up, down := net.Pipe()
		defer func() { _ = up.Close() }()
		go func() { _, _ = io.Copy(io.Discard, up) }() // it never answers
		ctx, leave := context.WithCancel(t.Context())
		began := time.Now()
		_, err := over(&leaving{down, leave}).RoundTrip(request(t, http.MethodGet, "http://a", "").WithContext(ctx))
		if took := time.Since(began); !errors.Is(err, context.Canceled) || took > 0 {
			t.Errorf("it ends after %v with %v", took, err)
		}
	})
}

// What has come with its header is read without a look at the clock, and the deadline of
// that header is none of the next call's.
func TestAConnectionOutlivesTheDeadlineOfItsLastAnswer(t *testing.T) {
	t.Parallel()
	u := serve(t, func(*http.Request, string) (string, bool) { return ok, false })
	d, _ := newTransport(t, time.Minute)
	for i := range 2 {
		if _, text, err := ask(t, d, request(t, http.MethodGet, u.url, "")); err != nil || text != "ok" {
			t.Fatalf("%q, %v", text, err)
		}
		for _, idle := range d.idle.idle {
			if len(idle) != 1 {
				t.Fatalf("%d connections after call %d", len(idle), i)
			}
			if err := idle[0].conn.SetDeadline(time.Unix(past, 0)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := u.conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// met is what a transport makes of an answer.
func met(t *testing.T, next http.RoundTripper, method string) string {
	t.Helper()
	var hints strings.Builder
	r, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		fmt.Fprintln(&hints, code, h)
		return nil
	}}), method, "http://a/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if method == http.MethodPost {
		r.Body, r.ContentLength = inmemory.New([]byte("text"), io.NopCloser(nil)), 4
	}
	resp, err := next.RoundTrip(r)
	if err != nil {
		return "no answer"
	}
	defer func() {
		if err := resp.Body.Close(); err != nil {
			t.Error(err)
		}
	}()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return "no answer" // here nobody asks for that
	}
	text, err := io.ReadAll(resp.Body)
	return fmt.Sprintln(hints.String(), resp.Status, resp.Proto, resp.ContentLength, resp.TransferEncoding, resp.Header, fmt.Sprintf("%q", text), err != nil, resp.Trailer)
}

// Whatever bytes an upstream answers with, they are the answer that http.Transport sees
// in them, and a connection on which more has come is not kept.
func FuzzAnswersAreThoseThatNetHTTPReads(f *testing.F) {
	for _, answer := range []string{
		ok, ok + ok, "HTTP/1.1 204 No Content\r\n\r\n" + ok, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n2;x=y\r\nok\r\n0\r\nA: b\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ok,
		"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\n\r\nok", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok", "HTTP/1.1 200 OK\r\n A: b\r\n\r\n", "HTTP/1.1 200\n\nok",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\nok\n0\n\n", "HTTP/2.0 200 OK\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\nA: b\x00\r\n\r\n",
	} {
		for method := range byte(3) {
			f.Add([]byte(answer), method)
		}
	}
	f.Fuzz(func(t *testing.T, answer []byte, method byte) {
		asks := [...]string{http.MethodGet, http.MethodHead, http.MethodPost}[method%3]
		theirs := &http.Transport{DisableCompression: true, MaxResponseHeaderBytes: maxHeader, DialContext: func(context.Context, string, string) (net.Conn, error) { return newScripted(answer, 1<<10), nil }}
		defer theirs.CloseIdleConnections()
		d := over(newScripted(answer, 1<<10))
		defer d.CloseIdleConnections()
		if diff := cmp.Diff(met(t, theirs, asks), met(t, d, asks)); diff != "" {
			t.Errorf("%s: another answer (-net/http +ours):\n%s", asks, diff)
		}
		for _, c := range d.idle.idle["a:80"] {
			if c.r.Buffered() > 0 {
				t.Error("the next call would have the rest of this answer for its own")
			}
		}
	})
}
