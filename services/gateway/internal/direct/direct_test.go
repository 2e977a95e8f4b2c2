package direct

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/once"
)

// upstream is a server that speaks whatever a test has it say.
type upstream struct {
	url   string
	calls atomic.Int64
	conns atomic.Int64
}

// serve answers every request with the bytes that say returns, and closes the connection
// where that is asked for.
func serve(t *testing.T, say func(r *http.Request, body string) (answer string, close bool)) *upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{url: "http://" + l.Addr().String()}
	var all sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			u.conns.Add(1)
			all.Go(func() {
				defer func() { _ = conn.Close() }()
				stop := context.AfterFunc(t.Context(), func() { _ = conn.Close() })
				defer stop()
				br := bufio.NewReader(conn)
				for {
					r, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					body, err := io.ReadAll(r.Body)
					if err != nil {
						t.Errorf("the upstream can't read the body: %v", err)
					}
					u.calls.Add(1)
					answer, end := say(r, string(body))
					if _, err := io.WriteString(conn, answer); err != nil || end {
						return
					}
				}
			})
		}
	})
	return u
}

// elsewhere counts the calls that are not sent directly.
type elsewhere struct{ n atomic.Int64 }

func (e *elsewhere) RoundTrip(r *http.Request) (*http.Response, error) {
	e.n.Add(1)
	return nil, errors.New("elsewhere")
}

func newTransport(t *testing.T, timeout time.Duration) (*Transport, *elsewhere) {
	t.Helper()
	e := &elsewhere{}
	d := New(Options{Next: e, Dial: (&net.Dialer{}).DialContext, HeaderTimeout: timeout, IdleTimeout: time.Minute, MaxIdlePerHost: 4})
	t.Cleanup(d.CloseIdleConnections)
	return d, e
}

func request(t *testing.T, method, url, body string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("User-Agent", "")
	if body != "" {
		r.Body, r.ContentLength = inmemory.New([]byte(body), io.NopCloser(nil)), int64(len(body))
	}
	return r
}

// ask sends a call and reads its answer whole.
func ask(t *testing.T, d *Transport, r *http.Request) (*http.Response, string, error) {
	t.Helper()
	resp, err := d.RoundTrip(r)
	if err != nil {
		return nil, "", err
	}
	text, err := io.ReadAll(resp.Body)
	if cerr := resp.Body.Close(); cerr != nil {
		t.Errorf("close: %v", cerr)
	}
	return resp, string(text), err
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

func TestCallsFollowOneAnotherOnOneConnection(t *testing.T) {
	t.Parallel()
	var heads []string
	u := serve(t, func(r *http.Request, body string) (string, bool) {
		heads = append(heads, fmt.Sprintf("%s %s %d %v %q", r.Method, r.URL, r.ContentLength, r.TransferEncoding, body))
		switch r.Method {
		case http.MethodHead:
			return "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", false
		case http.MethodDelete:
			return "HTTP/1.1 204 No Content\r\n\r\n", false
		case http.MethodPut:
			return "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", false
		case http.MethodPatch:
			return "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Checksum\r\n\r\n2\r\nok\r\n0\r\nChecksum: c1\r\n\r\n", false
		}
		return ok, false
	})
	d, other := newTransport(t, time.Minute)
	for _, c := range []struct{ method, body, want string }{
		{http.MethodGet, "", "ok"},
		{http.MethodPost, `{"a":1}`, "ok"},
		{http.MethodHead, "", ""},
		{http.MethodPost, "", "ok"},
		{http.MethodDelete, "", ""},
		{http.MethodPut, "text", ""},
		{http.MethodPatch, "text", "ok"},
		{http.MethodGet, "", "ok"},
		{http.MethodPost, strings.Repeat("x", maxBody), "ok"},
	} {
		resp, text, err := ask(t, d, request(t, c.method, u.url+"/p?q", c.body))
		if err != nil || text != c.want {
			t.Fatalf("%s: %q, %v", c.method, text, err)
		}
		if c.method == http.MethodPatch && resp.Trailer.Get("Checksum") != "c1" {
			t.Errorf("the trailer is %v", resp.Trailer)
		}
	}
	if n := u.conns.Load(); n != 1 || other.n.Load() != 0 {
		t.Errorf("%d connections, %d calls elsewhere", n, other.n.Load())
	}
	for i, want := range []string{`GET /p?q 0 [] ""`, `POST /p?q 7 [] "{\"a\":1}"`, `HEAD /p?q 0 [] ""`, `POST /p?q 0 [] ""`} {
		if heads[i] != want {
			t.Errorf("the upstream has %s, not %s", heads[i], want)
		}
	}
}

// Whatever is not both simple and whole is for http.Transport.
func TestCallsThatNeedMoreAreSentElsewhere(t *testing.T) {
	t.Parallel()
	d, other := newTransport(t, time.Minute)
	n := int64(0)
	for name, change := range map[string]func(*http.Request){
		"TLS":                  func(r *http.Request) { r.URL.Scheme = "https" },
		"CONNECT":              func(r *http.Request) { r.Method = http.MethodConnect },
		"an upgrade":           func(r *http.Request) { r.Header.Set("Upgrade", "websocket") },
		"Expect":               func(r *http.Request) { r.Header.Set("Expect", "100-continue") },
		"a body under way":     func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader("text")) },
		"an unknown length":    func(r *http.Request) { r.ContentLength = -1 },
		"another length":       func(r *http.Request) { r.ContentLength = 3 },
		"no body but a length": func(r *http.Request) { r.Body = nil },
		"chunks":               func(r *http.Request) { r.TransferEncoding = []string{"chunked"} },
		"trailers":             func(r *http.Request) { r.Trailer = http.Header{"Checksum": nil} },
		"a last call":          func(r *http.Request) { r.Close = true },
		"a name to translate":  func(r *http.Request) { r.URL.Host = "bücher.example" },
		"no host":              func(r *http.Request) { r.URL.Host = "" },
		"a large body": func(r *http.Request) {
			r.Body, r.ContentLength = inmemory.New(make([]byte, maxBody+1), io.NopCloser(nil)), maxBody+1
		},
	} {
		r := request(t, http.MethodPost, "http://127.0.0.1:1", "text")
		change(r)
		if _, err := d.RoundTrip(r); err == nil || err.Error() != "elsewhere" {
			t.Errorf("%s: %v", name, err)
		}
		if n++; other.n.Load() != n {
			t.Errorf("%s is sent directly", name)
			n = other.n.Load()
		}
		if _, still := r.Body.(inmemory.Body); still {
			t.Errorf("%s: http.Transport can't see that the body is in memory", name)
		}
	}
}

// An answer must end where the upstream says; else the next call would have the rest of
// it for its answer.
func TestNoAnswerIsTakenForThatOfAnotherCall(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"bytes follow":            ok + "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother",
		"bytes follow no body":    "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother",
		"a body that must not be": "HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother",
		"it says that it closes":  "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
		"HTTP/1.0":                "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
	} {
		u := serve(t, func(r *http.Request, _ string) (string, bool) {
			if r.URL.Path == "/first" {
				return answer, false
			}
			return ok, false
		})
		d, _ := newTransport(t, time.Minute)
		if _, text, err := ask(t, d, request(t, http.MethodGet, u.url+"/first", "")); err != nil || text != "ok" && text != "" {
			t.Errorf("%s: first %q, %v", name, text, err)
		}
		if _, text, err := ask(t, d, request(t, http.MethodGet, u.url, "")); err != nil || text != "ok" {
			t.Errorf("%s: then %q, %v", name, text, err)
		}
		if n := u.conns.Load(); n != 2 {
			t.Errorf("%s: %d connections", name, n)
		}
	}
}

func TestAnswersThatMakeNoSenseAreErrors(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"no HTTP":               "220 ready\r\n\r\n",
		"two lengths":           "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
		"a negative length":     "HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
		"an unknown encoding":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
		"half a header":         "HTTP/1.1 200 OK\r\nContent-Le",
		"half a body":           "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
		"half a chunk":          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nok",
		"a bad chunk":           "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nok\r\n0\r\n\r\n",
		"chunks without an end": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
		"another protocol":      "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
		"nothing":               "",
	} {
		u := serve(t, func(*http.Request, string) (string, bool) { return answer, true })
		d, _ := newTransport(t, time.Minute)
		resp, text, err := ask(t, d, request(t, http.MethodPost, u.url, "text"))
		if err == nil {
			t.Errorf("%s is taken for %q", name, text)
		}
		if sent := (*once.SentError)(nil); resp == nil && !errors.As(err, &sent) {
			t.Errorf("%s: %v says that the upstream can't have had the call", name, err)
		}
		if n := u.calls.Load(); n != 1 {
			t.Errorf("%s: the upstream had the call %d times", name, n)
		}
	}
}

func TestAHeaderWithoutAnEndIsAnError(t *testing.T) {
	t.Parallel()
	u := serve(t, func(*http.Request, string) (string, bool) {
		return "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxHeader), true
	})
	d, _ := newTransport(t, time.Minute)
	if _, err := d.RoundTrip(request(t, http.MethodGet, u.url, "")); err == nil || !strings.Contains(err.Error(), "header") {
		t.Errorf("it is %v", err)
	}
}

// An answer that ends with its connection is whole, and the connection is not kept.
func TestAnAnswerMayEndWithItsConnection(t *testing.T) {
	t.Parallel()
	u := serve(t, func(*http.Request, string) (string, bool) { return "HTTP/1.1 200 OK\r\n\r\nall of it", true })
	d, _ := newTransport(t, time.Minute)
	for range 2 {
		if resp, text, err := ask(t, d, request(t, http.MethodGet, u.url, "")); err != nil || text != "all of it" || resp.ContentLength != -1 {
			t.Errorf("%q, %v", text, err)
		}
	}
}

func TestInformationBeforeTheAnswerIsHandedOn(t *testing.T) {
	t.Parallel()
	u := serve(t, func(*http.Request, string) (string, bool) {
		return "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + ok, false
	})
	d, _ := newTransport(t, time.Minute)
	var got []string
	r := request(t, http.MethodGet, u.url, "")
	r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		got = append(got, fmt.Sprint(code, h.Get("Link")))
		return nil
	}}))
	if _, text, err := ask(t, d, r); err != nil || text != "ok" {
		t.Errorf("%q, %v", text, err)
	}
	if fmt.Sprint(got) != "[103</a.css> 102]" {
		t.Errorf("handed on: %v", got)
	}
}

// A connection that the upstream has closed, or on which it speaks unasked, is no place
// for a call; a call that is lost with one is not sent again.
func TestACallIsSentOnceOverConnectionsThatBreak(t *testing.T) {
	t.Parallel()
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		u := serve(t, func(r *http.Request, _ string) (string, bool) {
			switch r.URL.Path {
			case "/leaves":
				return ok, true
			case "/served":
				return "", true
			}
			return ok, false
		})
		d, _ := newTransport(t, time.Minute)
		body := map[string]string{http.MethodPost: "text"}[method]
		for range 20 {
			if _, _, err := ask(t, d, request(t, method, u.url+"/leaves", body)); err != nil {
				// The end of the connection and the call have met: it may be served.
				if sent := (*once.SentError)(nil); !errors.As(err, &sent) {
					t.Errorf("%s: %v", method, err)
				}
			}
		}
		if _, _, err := ask(t, d, request(t, method, u.url, body)); err != nil {
			if sent := (*once.SentError)(nil); !errors.As(err, &sent) {
				t.Errorf("%s: %v", method, err)
			}
			if _, _, err = ask(t, d, request(t, method, u.url, body)); err != nil {
				t.Fatal(err)
			}
		}
		before := u.calls.Load()
		_, _, err := ask(t, d, request(t, method, u.url+"/served", body))
		if sent := (*once.SentError)(nil); !errors.As(err, &sent) || u.calls.Load() != before+1 {
			t.Errorf("%s: the upstream had the call %d times: %v", method, u.calls.Load()-before, err)
		}
	}
}

func TestAnUpstreamThatIsNotThereHasHadNothing(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	d, _ := newTransport(t, time.Minute)
	d.sent = func(*http.Request) { t.Error("it is said to have had the call") }
	_, err = d.RoundTrip(request(t, http.MethodPost, "http://"+addr, "text"))
	if sent := (*once.SentError)(nil); err == nil || errors.As(err, &sent) {
		t.Errorf("it is %v", err)
	}
}

func TestAnUpstreamThatIsTooLateIsATimeout(t *testing.T) {
	t.Parallel()
	held := make(chan struct{})
	u := serve(t, func(*http.Request, string) (string, bool) { <-held; return ok, false })
	t.Cleanup(func() { close(held) })
	d, _ := newTransport(t, 20*time.Millisecond)
	had := 0
	d.sent = func(*http.Request) { had++ }
	_, err := d.RoundTrip(request(t, http.MethodPost, u.url, "text"))
	if had != 1 {
		t.Errorf("the upstream is said to have had the call %d times", had)
	}
	var late net.Error
	if sent := (*once.SentError)(nil); !errors.As(err, &late) || !late.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &sent) {
		t.Errorf("it is %v", err)
	}
}

// The time is that of the header: a stream may take longer.
func TestAnAnswerMayTakeLongerThanItsHeader(t *testing.T) {
	t.Parallel()
	up, down := net.Pipe()
	d := New(Options{Dial: func(context.Context, string, string) (net.Conn, error) { return down, nil }, HeaderTimeout: time.Second, IdleTimeout: time.Minute, MaxIdlePerHost: 1})
	t.Cleanup(d.CloseIdleConnections)
	later := make(chan struct{})
	go func() {
		if _, err := http.ReadRequest(bufio.NewReader(up)); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(up, ok[:len(ok)-2]) // an error shows at the other end
		<-later
		_, _ = io.WriteString(up, "ok") // likewise
	}()
	resp, err := d.RoundTrip(request(t, http.MethodGet, "http://pipe", ""))
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(1100*time.Millisecond, func() { close(later) })
	text, err := io.ReadAll(resp.Body)
	if err != nil || string(text) != "ok" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestAClientThatLeavesEndsItsCall(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"before the answer", "in the body"} {
		ctx, leave := context.WithCancel(t.Context())
		held := make(chan struct{})
		u := serve(t, func(r *http.Request, _ string) (string, bool) {
			if r.URL.Path != "/held" {
				return ok, false
			}
			if at == "before the answer" {
				leave()
				<-held
			}
			return "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", false
		})
		d, _ := newTransport(t, time.Minute)
		r := request(t, http.MethodGet, u.url+"/held", "").WithContext(ctx)
		resp, err := d.RoundTrip(r)
		if resp != nil {
			if _, err := io.ReadFull(resp.Body, make([]byte, 2)); err != nil {
				t.Fatal(err)
			}
			leave()
			_, err = io.ReadAll(resp.Body)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: the body ends with %v", at, err)
			}
			if err := resp.Body.Close(); err != nil {
				t.Error(err)
			}
		} else if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", at, err)
		}
		close(held)
		if _, text, err := ask(t, d, request(t, http.MethodGet, u.url, "")); err != nil || text != "ok" || u.conns.Load() != 2 {
			t.Errorf("%s: then %q, %v, %d connections", at, text, err, u.conns.Load())
		}
	}
}

func TestAnAnswerThatIsNotReadGoesWithItsConnection(t *testing.T) {
	t.Parallel()
	u := serve(t, func(r *http.Request, _ string) (string, bool) {
		if r.URL.Path == "/long" {
			return "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nHTTP/1.1 ", false
		}
		return ok, false
	})
	d, _ := newTransport(t, time.Minute)
	resp, err := d.RoundTrip(request(t, http.MethodGet, u.url+"/long", ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, http.ErrBodyReadAfterClose) {
		t.Errorf("after Close: %v", err)
	}
	if _, text, err := ask(t, d, request(t, http.MethodGet, u.url, "")); err != nil || text != "ok" || u.conns.Load() != 2 {
		t.Errorf("then %q, %v, %d connections", text, err, u.conns.Load())
	}
}

// pieces counts what is written to a connection at once.
type pieces struct {
	net.Conn
	n *atomic.Int64
}

func (p pieces) Write(b []byte) (int, error) {
	p.n.Add(1)
	return p.Conn.Write(b)
}

func TestHeaderAndBodyLeaveInOnePiece(t *testing.T) {
	t.Parallel()
	u := serve(t, func(*http.Request, string) (string, bool) { return ok, false })
	var n atomic.Int64
	d := New(Options{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		return pieces{c, &n}, err
	}, HeaderTimeout: time.Minute, IdleTimeout: time.Minute, MaxIdlePerHost: 1})
	t.Cleanup(d.CloseIdleConnections)
	if _, _, err := ask(t, d, request(t, http.MethodPost, u.url, string(bytes.Repeat([]byte("x"), 2000)))); err != nil || n.Load() != 1 {
		t.Errorf("%d pieces, %v", n.Load(), err)
	}
}

func TestManyCallersShareConnectionsWithoutMixingAnswers(t *testing.T) {
	t.Parallel()
	u := serve(t, func(r *http.Request, body string) (string, bool) {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body), strings.HasSuffix(body, "7")
	})
	d, _ := newTransport(t, time.Minute)
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for k := range 50 {
				want := fmt.Sprintf("call %d of %d", k, i)
				_, text, err := ask(t, d, request(t, http.MethodPost, u.url, want))
				if sent := (*once.SentError)(nil); err != nil && !errors.As(err, &sent) || err == nil && text != want {
					t.Errorf("%q: %q, %v", want, text, err)
				}
			}
		})
	}
	all.Wait()
}
