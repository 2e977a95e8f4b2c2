// Package once sends a call to its upstream at most once.
package once

import (
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

// Error is what the transport said.
func (e *SentError) Error() string { return e.err.Error() }

// Unwrap returns what the transport said.
func (e *SentError) Unwrap() error { return e.err }

// RoundTrip sends a call. An error is a *SentError unless it is certain that the
// upstream can't have served it.
func (t Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	var written, connected atomic.Bool
	asked := r
	r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
		WroteHeaders: func() {
			written.Store(true)
			if t.Sent != nil {
				t.Sent(asked)
			}
		},
	}))
	if (r.Body == nil || r.Body == http.NoBody) && repeats(r) {
		// A body that can't be had a second time; that it is empty is found out
		// before anything is sent, so that none is announced (but an empty one where
		// the method has one as a rule).
		r.Body, r.GetBody = struct{ io.ReadCloser }{http.NoBody}, nil
	}
	resp, err := t.Next.RoundTrip(r)
	// Who does not wait any more does not know what is being written on a connection.
	if err != nil && (written.Load() || connected.Load() && r.Context().Err() != nil) {
		err = &SentError{err}
	}
	return resp, err
}

// repeats reports what http.Transport takes for idempotent.
func repeats(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return r.Header["Idempotency-Key"] != nil || r.Header["X-Idempotency-Key"] != nil
}
