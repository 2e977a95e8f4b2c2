// Package headers keeps apart what only the gateway may say to an upstream from what
// its clients say, in headers and in trailers.
package headers

import (
	"io"
	"net/http"
	"net/textproto"
	"strings"
)

// Prefix is that of headers that only the gateway sets.
const Prefix = "X-Tollkeeper-"

// Ours are the names of a route that only the gateway may say.
type Ours struct {
	dropped map[string]bool // also in their plain spelling
	guarded map[string]bool // in every other spelling, and in trailers
}

// NewOurs returns the names of a route. A client's header of dropped is taken off; one of
// guarded stays as it is, but neither a second one in another spelling nor a trailer.
func NewOurs(dropped, guarded []string) *Ours {
	o := &Ours{dropped: make(map[string]bool), guarded: make(map[string]bool)}
	for _, name := range rewriting {
		o.dropped[name] = true
	}
	for _, name := range dropped {
		o.dropped[dashed(name)] = true
	}
	for _, name := range guarded {
		if name != "" {
			o.guarded[dashed(name)] = true
		}
	}
	return o
}

// rewriting are headers by which proxies tell frameworks another path, host or method
// than that of the request: a client must not choose a route and ask for another.
var rewriting = []string{"Forwarded", "X-Original-Url", "X-Original-Uri", "X-Original-Path", "X-Original-Host", "X-Original-Method", "X-Rewrite-Url"}

// overrides name another method than the request has.
var overrides = []string{"X-Http-Method-Override", "X-Http-Method", "X-Method-Override"}

// OtherMethod reports whether a request of that method asks for another one.
func OtherMethod(h http.Header, method string) bool {
	for _, name := range overrides {
		for _, value := range h[name] {
			if !strings.EqualFold(strings.TrimSpace(value), method) {
				return true
			}
		}
	}
	return false
}

// Drop takes off a client's request what only the gateway may say, in every spelling
// that upstreams take for the same.
func (o *Ours) Drop(h http.Header) {
	for name := range h {
		if o.in(name) {
			delete(h, name)
		}
	}
}

func (o *Ours) in(name string) bool {
	if !odd(name) {
		return o.dropped[name] || strings.HasPrefix(name, Prefix) || strings.HasPrefix(name, "X-Forwarded-")
	}
	name = dashed(name)
	return o.dropped[name] || o.guarded[name] || strings.HasPrefix(name, Prefix) || strings.HasPrefix(name, "X-Forwarded-") || overriding(name)
}

func overriding(name string) bool {
	for _, o := range overrides {
		if name == o {
			return true
		}
	}
	return false
}

// odd reports that a name has something in it that CGI and its heirs, which know letters,
// digits and one sign, make the same of as of a dash.
func odd(name string) bool {
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-':
		default:
			return true
		}
	}
	return false
}

func dashed(name string) string {
	return textproto.CanonicalMIMEHeaderKey(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, name))
}

// unfit are headers that no trailer may change when the request has been read by them:
// its frame, its way, its credentials, its content (RFC 9110, 6.5.1).
var unfit = map[string]bool{
	"Authorization": true, "Proxy-Authorization": true, "Cookie": true, "Host": true, "Connection": true, "Proxy-Connection": true, "Keep-Alive": true,
	"Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true, "Expect": true, "Max-Forwards": true, "Cache-Control": true, "Range": true,
	"Accept-Encoding": true, "X-Request-Id": true, "Traceparent": true, "Tracestate": true, "Idempotency-Key": true,
}

// trailing reports whether a client may send a trailer of that name.
func (o *Ours) trailing(name string) bool {
	plain := dashed(name)
	return !o.in(name) && !o.guarded[plain] && !unfit[plain] && !overriding(plain) && !strings.HasPrefix(plain, "Content-") && !strings.HasPrefix(plain, "If-")
}

// Trailers sends those of a client's trailers on that a client may send. Those that
// come after the body must have been announced before it. out is a copy of in.
func (o *Ours) Trailers(out, in *http.Request) {
	if len(in.Trailer) == 0 {
		return
	}
	kept := make(http.Header, len(in.Trailer))
	for name, values := range in.Trailer {
		if o.trailing(name) {
			kept[name] = values
		}
	}
	if out.Trailer = kept; len(kept) == 0 {
		out.Trailer = nil
		return
	}
	if out.Body != nil {
		out.Body = &trailed{out.Body, kept, in}
	}
}

// trailed fills trailers in when the body is at its end, before the transport looks.
type trailed struct {
	io.ReadCloser
	out http.Header
	in  *http.Request
}

func (t *trailed) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	if err == io.EOF {
		for name := range t.out {
			t.out[name] = t.in.Trailer[name]
		}
	}
	return n, err
}

// DropTrailers takes trailers off an answer that ends, where they say what a header has
// said already.
func DropTrailers(h http.Header, names ...string) {
	for _, name := range names {
		if name != "" {
			delete(h, http.TrailerPrefix+name)
		}
	}
}

// Switches reports whether a request asks to go on in another version of HTTP: what
// follows would be calls that nobody sees.
func Switches(h http.Header) bool {
	for _, value := range h["Upgrade"] {
		for protocol := range strings.SplitSeq(strings.ToLower(value), ",") {
			protocol, _, _ = strings.Cut(strings.TrimSpace(protocol), "/")
			if protocol == "h2c" || protocol == "h2" || protocol == "h3" || protocol == "http" || protocol == "tls" {
				return true
			}
		}
	}
	return false
}

// Safe makes a text fit for a header: an account's id may be anything.
func Safe(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return -1
		}
		return r
	}, s)
}
