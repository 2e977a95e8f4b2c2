// Package crossorigin lets pages of other origins call a route: it answers their
// browsers' preflights, and makes all answers readable to them, refusals too.
package crossorigin

import (
	"net/http"
	"time"

	"github.com/rs/cors"
)

// Options of a policy.
type Options struct {
	// Origins that may call, as in https://app.example.com; one * stands for all, or
	// for a part of a name.
	Origins []string
	// Credentials lets browsers send cookies and certificates.
	Credentials bool
	// Headers that requests may have; all when empty.
	Headers []string
	// Expose are headers of answers that pages may read, besides those of refusals.
	Expose []string
	// MaxAge is how long a preflight holds; not said when 0.
	MaxAge time.Duration
	// Methods besides the usual ones.
	Methods []string
}

// exposed are what a page needs to understand a refusal, and to ask about it.
var exposed = []string{
	"X-Request-Id", "Request-Id", "X-Tollkeeper-Decision-Id", "Retry-After", "RateLimit", "RateLimit-Policy", "Link", "X-Should-Retry", "WWW-Authenticate",
}

var methods = []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions}

// Policy of a route. Its methods are safe for concurrent use, and do nothing on nil.
type Policy struct{ rules *cors.Cors }

// New returns a policy; nil without origins.
func New(o Options) *Policy {
	if len(o.Origins) == 0 {
		return nil
	}
	headers := o.Headers
	if len(headers) == 0 {
		headers = []string{"*"}
	}
	return &Policy{cors.New(cors.Options{
		AllowedOrigins: o.Origins, AllowCredentials: o.Credentials, AllowedHeaders: headers, AllowedMethods: append(append([]string{}, methods...), o.Methods...),
		ExposedHeaders: append(append([]string{}, exposed...), o.Expose...), MaxAge: int(o.MaxAge / time.Second),
	})}
}

// Asked returns the method that a browser's preflight is about, empty when r is none.
func Asked(r *http.Request) string {
	if r.Method != http.MethodOptions || r.Header.Get("Origin") == "" {
		return ""
	}
	return r.Header.Get("Access-Control-Request-Method")
}

// Preflight answers one.
func (p *Policy) Preflight(w http.ResponseWriter, r *http.Request) { p.rules.HandlerFunc(w, r) }

// Readable returns a writer whose answer the page that made r may read, if the policy
// has its origin, and says so in the place of whatever the upstream says of that.
func (p *Policy) Readable(w http.ResponseWriter, r *http.Request) http.ResponseWriter {
	if p == nil {
		return w
	}
	said := scratch{}
	p.rules.HandlerFunc(said, r)
	return &writer{ResponseWriter: w, says: http.Header(said)}
}

// scratch takes the headers that the rules would set, and nothing else.
type scratch http.Header

func (s scratch) Header() http.Header         { return http.Header(s) }
func (s scratch) Write(p []byte) (int, error) { return len(p), nil }
func (s scratch) WriteHeader(int)             {}

// writer sets headers last: what is before the answer, an early hint and what the
// upstream says, has no part in them.
type writer struct {
	http.ResponseWriter
	says http.Header
	done bool
}

// Unwrap is for http.ResponseController.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *writer) WriteHeader(status int) {
	if !w.done && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.done = true
		h := w.Header()
		for _, name := range [...]string{"Access-Control-Allow-Origin", "Access-Control-Allow-Credentials", "Access-Control-Expose-Headers"} {
			delete(h, name)
		}
		for name, values := range w.says {
			for _, v := range values {
				h.Add(name, v)
			}
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements io.Writer.
func (w *writer) Write(p []byte) (int, error) {
	if !w.done {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(p)
}
