// Package front is what stands before the console's answers: who may ask, how
// an error is told, how the page is served, what is measured.
package front

import (
	"crypto/sha256"
	"crypto/subtle"
	"mime"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// Guard decides who may do what before a handler sees the request.
type Guard struct {
	// Token, if set, is the bearer token.
	Token string
	// Loopback says that only this machine can connect.
	Loopback bool
	// Metrics hears of every request; nil is allowed.
	Metrics *Metrics
}

// Wrap puts the guard before a handler.
func (g *Guard) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		begin := time.Now()
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		if p, ok := g.refuse(r); ok {
			if p.Status == http.StatusUnauthorized {
				h.Set("WWW-Authenticate", `Bearer realm="tollkeeper"`)
			}
			p.Write(rec)
		} else {
			next.ServeHTTP(rec, r)
		}
		if g.Metrics != nil {
			g.Metrics.Observe(r, rec.status, time.Since(begin))
		}
	})
}

// refuse returns why a request is not let through.
func (g *Guard) refuse(r *http.Request) (Problem, bool) {
	if r.URL.Path == "/healthz" {
		return Problem{}, false
	}
	// Without a token the address is all that protects: another site's name
	// that was made to point here must not reach us.
	if g.Token == "" && !loopbackHost(r.Host) {
		return Problem{Status: http.StatusForbidden, Code: CodeForbidden, Detail: "the Host header names another machine: use the loopback address, or configure a token"}, true
	}
	reading := r.Method == http.MethodGet || r.Method == http.MethodHead
	if reading && (g.Loopback || g.Token == "") {
		return Problem{}, false
	}
	if reading && !guarded(r.URL.Path) {
		return Problem{}, false // the page itself holds no secret, and asks for the token
	}
	if !reading && crossSite(r) {
		return Problem{Status: http.StatusForbidden, Code: CodeForbidden, Detail: "the request comes from another site"}, true
	}
	if g.Token != "" && !bearer(r, g.Token) {
		return Problem{Status: http.StatusUnauthorized, Code: CodeUnauthed, Detail: "a bearer token is needed: send the header Authorization: Bearer TOKEN"}, true
	}
	return Problem{}, false
}

func guarded(path string) bool {
	return strings.HasPrefix(path, "/v1/") || path == "/metrics" || path == "/readyz" || path == "/openapi.yaml"
}

func loopbackHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.Trim(hostport, "[]")
	}
	if strings.EqualFold(host, "localhost") || strings.HasSuffix(strings.ToLower(host), ".localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// crossSite reports whether a browser sent the request for another site.
func crossSite(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none":
	default:
		return true
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	_, host, ok := strings.Cut(origin, "://")
	return !ok || !strings.EqualFold(host, r.Host)
}

func bearer(r *http.Request, token string) bool {
	scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	// Hashes have one length, so the comparison does not tell the token's.
	want, got := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(given))
	return strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

// MediaType returns the request's type without parameters.
func MediaType(r *http.Request) string {
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

// recorder remembers the status.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// LateHandler is a handler that is replaced once NATS is there.
type LateHandler struct{ h atomic.Pointer[http.Handler] }

// Set replaces the handler; it is called before the first request, too.
func (l *LateHandler) Set(h http.Handler) { l.h.Store(&h) }

// ServeHTTP implements http.Handler.
func (l *LateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	(*l.h.Load()).ServeHTTP(w, r)
}
