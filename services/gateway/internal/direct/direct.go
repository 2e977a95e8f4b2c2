// Package direct sends calls to HTTP/1.1 upstreams on the goroutine that has them.
//
// http.Transport hands a call to a goroutine that writes and to one that reads, which
// costs about as much as the rest of a proxied call. Most calls need none of it: their
// body is in memory or there is none, so that there is nothing to read while something is
// written. Here those are written and read in turn, as Request.Write writes and by
// net/http's own ReadResponse; all others go to http.Transport.
package direct

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"time"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/once"
)

// Bounds of a Transport.
const (
	// maxBody is what an upstream that reads nothing can still be sent, as a rule: the
	// buffers of both ends. Larger bodies are for http.Transport, which reads an answer
	// that comes before they are through.
	maxBody = 32 << 10
	// maxHeader bounds an answer's header, those before it (1xx) included, as
	// http.Transport does.
	maxHeader = 10 << 20
	// past is a deadline that is over.
	past = 1
)

// Transport sends a call at most once: what comes of a connection that breaks is an error,
// a *once.SentError unless the upstream can't have had the call. It may be used by
// several goroutines at once; the body of an answer is for one.
type Transport struct {
	next    http.RoundTripper
	sent    func(*http.Request)
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	timeout time.Duration
	idle    pool
}

// Options of a Transport.
type Options struct {
	// Next takes the calls that are not sent here.
	Next http.RoundTripper
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Sent, if set, is called once the upstream may have a call that is sent here, before
	// RoundTrip returns.
	Sent func(*http.Request)
	// HeaderTimeout is how long an upstream may take until an answer's header is whole.
	HeaderTimeout time.Duration
	// IdleTimeout is how long a connection waits for the next call, MaxIdlePerHost how
	// many of a host do.
	IdleTimeout    time.Duration
	MaxIdlePerHost int
}

// New returns a transport.
func New(o Options) *Transport {
	return &Transport{next: o.Next, sent: o.Sent, dial: o.Dial, timeout: o.HeaderTimeout, idle: pool{timeout: o.IdleTimeout, limit: o.MaxIdlePerHost}}
}

// CloseIdleConnections closes the connections that wait, here and in Next.
func (t *Transport) CloseIdleConnections() {
	t.idle.close()
	if next, ok := t.next.(interface{ CloseIdleConnections() }); ok {
		next.CloseIdleConnections()
	}
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	addr, ok := simple(r)
	body, _ := r.Body.(inmemory.Body)
	if body.Reader != nil {
		r.Body = io.NopCloser(body.Reader) // as net/http sees that it is in memory
	}
	if !ok {
		return t.next.RoundTrip(r)
	}
	for {
		if r.Context().Err() != nil {
			return nil, context.Cause(r.Context())
		}
		c, reused := t.idle.take(addr)
		if !reused {
			conn, err := t.dial(r.Context(), "tcp", addr)
			if err != nil {
				return nil, err
			}
			c = newConnection(conn, addr)
		}
		resp, err := t.call(c, r, body)
		switch {
		case err == nil:
			return resp, nil
		case r.Context().Err() != nil:
			err = context.Cause(r.Context())
		case reused && !c.wire.wrote && rewind(body):
			continue // it was closed at this moment, and has not taken a byte of the call
		}
		if c.wire.wrote {
			err = once.MayBeServed(err)
		}
		return nil, err
	}
}

func rewind(body inmemory.Body) bool {
	if body.Reader == nil {
		return true
	}
	_, err := body.Seek(0, io.SeekStart)
	return err == nil
}

// simple reports whether a call is sent here, and where to.
func simple(r *http.Request) (addr string, ok bool) {
	if r.URL.Scheme != "http" || r.Method == http.MethodConnect || r.Close || len(r.TransferEncoding) > 0 || len(r.Trailer) > 0 {
		return "", false
	}
	if r.Header["Expect"] != nil || r.Header["Upgrade"] != nil {
		return "", false
	}
	switch body, inMemory := r.Body.(inmemory.Body); {
	case r.Body == nil || r.Body == http.NoBody:
		if r.ContentLength != 0 {
			return "", false
		}
	case !inMemory || r.ContentLength != int64(body.Len()) || r.ContentLength > maxBody:
		return "", false
	}
	host := r.URL.Hostname()
	for i := range len(host) {
		if host[i] >= 0x80 {
			return "", false // is to be translated first
		}
	}
	switch port := r.URL.Port(); {
	case host == "":
		return "", false
	case port == "":
		return net.JoinHostPort(host, "80"), true
	case host == r.URL.Host[:len(r.URL.Host)-len(port)-1]:
		return r.URL.Host, true
	default:
		return net.JoinHostPort(host, port), true
	}
}

// call sends a call over a connection. After an error the connection is closed.
func (t *Transport) call(c *connection, r *http.Request, content inmemory.Body) (_ *http.Response, err error) {
	ctx := r.Context()
	c.wire.wrote = false
	stop := func() bool { return true }
	defer func() {
		if err != nil {
			stop()
			_ = c.conn.Close() // the error says what matters
		}
	}()
	if err := c.conn.SetDeadline(time.Now().Add(t.timeout)); err != nil {
		return nil, err
	}
	stop = context.AfterFunc(ctx, c.abort) // whose deadline must be the last one
	err = write(c.w, r, content)
	if err == nil {
		err = c.w.Flush()
	}
	if c.wire.wrote && t.sent != nil {
		t.sent(r)
	}
	if err != nil && !c.wire.wrote {
		return nil, err
	}
	// An upstream may refuse a call and close the connection before it has all of it.
	cut := err
	resp, err := c.answer(r)
	if err != nil {
		return nil, errors.Join(cut, err)
	}
	if !c.has(resp) {
		if err := c.conn.SetDeadline(time.Time{}); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err // and the deadline that says so may have been taken back
	}
	b := &body{t: t, c: c, ctx: ctx, stop: stop, from: resp.Body, last: resp.Close || cut != nil}
	if resp.Body == http.NoBody {
		b.end(true)
		return resp, nil
	}
	resp.Body = b
	return resp, nil
}

// connection is one to an upstream. It is of one call at a time.
type connection struct {
	conn  net.Conn
	addr  string
	wire  *wire
	r     *bufio.Reader
	w     *bufio.Writer
	probe *probe
	since time.Time // when it began to be idle
}

func newConnection(conn net.Conn, addr string) *connection {
	c := &connection{conn: conn, addr: addr, wire: &wire{conn: conn, left: -1}, probe: newProbe(conn)}
	c.r, c.w = bufio.NewReader(c.wire), bufio.NewWriter(c.wire)
	return c
}

// abort ends whatever waits for the connection.
func (c *connection) abort() {
	_ = c.conn.SetDeadline(time.Unix(past, 0)) // a connection that is closed waits for nothing
}

// answer reads an answer's header, and hands on those before it (1xx).
func (c *connection) answer(r *http.Request) (*http.Response, error) {
	c.wire.left = maxHeader
	defer func() { c.wire.left = -1 }()
	for {
		resp, err := http.ReadResponse(c.r, r)
		if err != nil {
			return nil, err
		}
		switch {
		case resp.StatusCode == http.StatusSwitchingProtocols:
			return nil, errors.New("the upstream switches protocols without being asked to")
		case resp.StatusCode >= 100 && resp.StatusCode < 200:
			if trace := httptrace.ContextClientTrace(r.Context()); trace != nil && trace.Got1xxResponse != nil {
				if err := trace.Got1xxResponse(resp.StatusCode, textproto.MIMEHeader(resp.Header)); err != nil {
					return nil, err
				}
			}
		default:
			return resp, nil
		}
	}
}

// has reports whether all of an answer's body is here, so that nothing waits for the
// connection before its next call.
func (c *connection) has(resp *http.Response) bool {
	return resp.Body == http.NoBody || resp.ContentLength >= 0 && resp.ContentLength <= int64(c.r.Buffered())
}

// wire counts and bounds what goes over a connection.
type wire struct {
	conn  net.Conn
	left  int64 // bytes that may still be read; negative: any number
	wrote bool  // of this call
}

// Read implements io.Reader.
func (w *wire) Read(p []byte) (int, error) {
	if w.left < 0 {
		return w.conn.Read(p)
	}
	if w.left == 0 {
		return 0, fmt.Errorf("the header of the upstream's answer is larger than %d bytes", maxHeader)
	}
	n, err := w.conn.Read(p[:min(int64(len(p)), w.left)])
	w.left -= int64(n)
	return n, err
}

// Write implements io.Writer.
func (w *wire) Write(p []byte) (int, error) {
	n, err := w.conn.Write(p)
	w.wrote = w.wrote || n > 0
	return n, err
}

// body is an answer's. When it has been read to its end its connection is free.
type body struct {
	t     *Transport
	c     *connection
	ctx   context.Context
	stop  func() bool
	from  io.ReadCloser
	last  bool // nothing follows on the connection
	ended bool
	err   error
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.ended {
		return 0, b.err
	}
	n, err := b.from.Read(p)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		b.err = io.EOF
		b.end(true)
	default:
		if cause := context.Cause(b.ctx); cause != nil {
			err = cause
		}
		b.err = err
		b.end(false)
	}
	return n, err
}

// Close implements io.Closer. What was not read goes with the connection.
func (b *body) Close() error {
	if !b.ended {
		b.err = http.ErrBodyReadAfterClose
		b.end(false)
	}
	return nil
}

// end keeps the connection if the next answer can only begin where this one has ended.
func (b *body) end(whole bool) {
	b.ended = true
	if !b.stop() || !whole || b.last || b.c.r.Buffered() > 0 {
		_ = b.c.conn.Close() // nothing is lost with it
		return
	}
	b.t.idle.put(b.c)
}
