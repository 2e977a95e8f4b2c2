package console

import (
	"crypto/sha256"
	"crypto/subtle"
	"mime"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// guard decides who may do what before a handler sees the request.
type guard struct {
	token    string
	loopback bool // only this machine can connect
	metrics  *metrics
}

func (g *guard) wrap(next http.Handler) http.Handler {
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
			p.write(rec)
		} else {
			next.ServeHTTP(rec, r)
		}
		if g.metrics != nil {
			g.metrics.observe(r, rec.status, time.Since(begin))
		}
	})
}

// refuse returns why a request is not let through.
func (g *guard) refuse(r *http.Request) (problem, bool) {
	if r.URL.Path == "/healthz" {
		return problem{}, false
	}
	// Without a token the address is all that protects: another site's name
	// that was made to point here must not reach us.
	if g.token == "" && !loopbackHost(r.Host) {
		return problem{Status: http.StatusForbidden, Code: codeForbidden, Detail: "the Host header names another machine: use the loopback address, or configure a token"}, true
	}
	reading := r.Method == http.MethodGet || r.Method == http.MethodHead
	if reading && (g.loopback || g.token == "") {
		return problem{}, false
	}
	if reading && !guarded(r.URL.Path) {
		return problem{}, false // the page itself holds no secret, and asks for the token
	}
	if !reading && crossSite(r) {
		return problem{Status: http.StatusForbidden, Code: codeForbidden, Detail: "the request comes from another site"}, true
	}
	if g.token != "" && !bearer(r, g.token) {
		return problem{Status: http.StatusUnauthorized, Code: codeUnauthed, Detail: "a bearer token is needed: send the header Authorization: Bearer TOKEN"}, true
	}
	return problem{}, false
}

func guarded(path string) bool {
	return strings.HasPrefix(path, "/v1/") || path == "/metrics" || path == "/readyz"
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

// mediaType returns the request's type without parameters.
func mediaType(r *http.Request) string {
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

// lateHandler is a handler that is replaced once NATS is there.
type lateHandler struct{ h atomic.Pointer[http.Handler] }

func (l *lateHandler) set(h http.Handler) { l.h.Store(&h) }

func (l *lateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	(*l.h.Load()).ServeHTTP(w, r)
}

// waitingHandler answers while NATS was not reached yet.
func waitingHandler(o Options) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", telemetry.NewHandler(telemetry.HandlerOptions{Gatherer: o.Registry, Readiness: o.Readiness}))
	mux.HandleFunc("/v1/", func(w http.ResponseWriter, _ *http.Request) {
		unavailable("the console has not reached NATS yet: /readyz says why").write(w)
	})
	page := pageHandler(o.Web)
	mux.Handle("GET /{$}", page)
	mux.Handle("GET /assets/", page)
	mux.Handle("GET /favicon.svg", page)
	return mux
}
