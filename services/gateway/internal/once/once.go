// Package once sends a call to its upstream at most once.
package once

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
)

// Transport keeps another from sending a call again when a connection that was idle
// breaks before the answer, as http.Transport does with what has no body and is
// idempotent: the upstream may have served the first, and one call was admitted. What
// comes of it is an error, and whether to try again is the client's decision. It may
// be used by several goroutines at once.
type Transport struct {
	Next http.RoundTripper
	// Sent, if set, is called when the upstream may have the call, perhaps more than
	// once and from any goroutine, also after RoundTrip has returned. It must not block.
	Sent func(*http.Request)
}

// SentError is of a call that the upstream may have, and may have served.
type SentError struct{ err error }

// MayBeServed returns err as that of a call that the upstream may have had.
func MayBeServed(err error) error { return &SentError{err} }

// Error is what the transport said.
func (e *SentError) Error() string { return e.err.Error() }

// Unwrap returns what the transport said.
func (e *SentError) Unwrap() error { return e.err }

// RoundTrip sends a call. An error is a *SentError unless it is certain that the
// upstream can't have served it. A httptrace.ClientTrace of the request's context must be
// the request's own, as httputil.ReverseProxy's is: it is made use of.
func (t Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	var written, connected atomic.Bool
	asked := r
	r = notes(r, func() { connected.Store(true) }, func() {
		written.Store(true)
		if t.Sent != nil {
			t.Sent(asked)
		}
	})
	if (r.Body == nil || r.Body == http.NoBody) && repeats(r) {
		r.Body, r.GetBody = io.NopCloser(bytes.NewReader(nil)), nil // none that can be had a second time
		if lacksBody(r.Method) {
			// Else http.Transport starts a goroutine and a timer to find out whether there
			// is a body, so as not to announce one.
			r.TransferEncoding = identity
		}
	}
	resp, err := t.Next.RoundTrip(r)
	// Who does not wait any more does not know what is being written on a connection.
	if err != nil && (written.Load() || connected.Load() && r.Context().Err() != nil) {
		err = MayBeServed(err)
	}
	return resp, err
}

// identity is what net/http takes for no framing of its own.
var identity = []string{"identity"}

// notes has r call connected when there is a connection for it, and written when its
// header is written. Two traces of one request are joined by reflection, which costs more
// than the rest of RoundTrip: so it is done by hand.
func notes(r *http.Request, connected, written func()) *http.Request {
	trace := httptrace.ContextClientTrace(r.Context())
	if trace == nil {
		trace = &httptrace.ClientTrace{}
		r = r.WithContext(httptrace.WithClientTrace(r.Context(), trace))
	}
	got, wrote := trace.GotConn, trace.WroteHeaders
	trace.GotConn = func(info httptrace.GotConnInfo) {
		connected()
		if got != nil {
			got(info)
		}
	}
	trace.WroteHeaders = func() {
		written()
		if wrote != nil {
			wrote()
		}
	}
	return r
}

// lacksBody reports methods whose requests have no body as a rule, and announce none.
func lacksBody(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodDelete, "PROPFIND", "SEARCH":
		return true
	}
	return false
}

// CloseIdleConnections closes those of Next.
func (t Transport) CloseIdleConnections() {
	if next, ok := t.Next.(interface{ CloseIdleConnections() }); ok {
		next.CloseIdleConnections()
	}
}

// repeats reports what http.Transport takes for idempotent.
func repeats(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return r.Header["Idempotency-Key"] != nil || r.Header["X-Idempotency-Key"] != nil
}
