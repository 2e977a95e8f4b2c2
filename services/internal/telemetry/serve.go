package telemetry

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// NewRegistry returns a registry with the Go runtime's, the process's and the
// build's own metrics.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
	)
	return r
}

// HandlerOptions configures NewHandler.
type HandlerOptions struct {
	Gatherer  prometheus.Gatherer // /metrics; nil leaves it out
	Readiness *Readiness          // /readyz; nil leaves it out
	// Pprof adds /debug/pprof/ for callers on this machine.
	Pprof bool
}

// NewHandler serves /metrics, /healthz (200 as long as the process can answer),
// /readyz and, if wanted, /debug/pprof/. It does not authenticate: see Serve.
func NewHandler(o HandlerOptions) http.Handler {
	return Routes(o).Handler("/healthz, /readyz and /metrics are what is served here")
}

// Routes are those of NewHandler, for a door that has others too.
func Routes(o HandlerOptions) problem.Routes {
	routes := problem.Routes{"GET /healthz": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		// An error here is the client's going away.
		_, _ = w.Write([]byte("ok\n"))
	})}
	if o.Readiness != nil {
		routes["GET /readyz"] = o.Readiness
	}
	if o.Gatherer != nil {
		routes["GET /metrics"] = promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{})
	}
	if o.Pprof {
		for path, h := range map[string]http.HandlerFunc{
			"/debug/pprof/":        pprof.Index,
			"/debug/pprof/cmdline": pprof.Cmdline,
			"/debug/pprof/profile": pprof.Profile,
			"/debug/pprof/symbol":  pprof.Symbol,
			"/debug/pprof/trace":   pprof.Trace,
		} {
			routes[path] = onlyFromLoopback(h)
		}
	}
	return routes
}

// onlyFromLoopback answers 403 to other machines: profiles show memory.
func onlyFromLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.RemoteAddr)
		if err != nil || !net.ParseIP(host).IsLoopback() {
			problem.Of(http.StatusForbidden, problem.CodeForbidden, "profiles are served to this machine only").Write(w)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// ServeOptions configures Serve.
type ServeOptions struct {
	// Flag is the name, without dashes, of the flag that Addr came from.
	Flag string
	// Addr is "host:port"; port 0 takes a free one. Ignored if Listener is set.
	Addr string
	// Listener, if set, is served instead of Addr and closed by Serve. It comes
	// from Listen, which has checked it.
	Listener net.Listener
	Handler  http.Handler
	// Token, if set, is the bearer token without which everything but /healthz
	// answers 401.
	Token string
	// Authenticates says that Handler checks credentials by itself, so that a
	// non-loopback address is allowed without Token.
	Authenticates bool
	// Ready, if set, is called with the address once the port is open.
	Ready func(net.Addr)
	// Grace is how long requests in flight may go on after ctx is done, before
	// their contexts are cancelled; 0 means one second. As long again later
	// their connections are closed.
	Grace time.Duration
}

// Serve serves HTTP until ctx is done and returns nil after a clean stop. An
// address that other machines can reach is refused unless Token or Authenticates
// is set; the error of a taken port names the flag (*ListenError).
func Serve(ctx context.Context, o ServeOptions) error {
	l := o.Listener
	if l == nil {
		var err error
		if l, err = Listen(o.Flag, o.Addr, o.Token != "" || o.Authenticates); err != nil {
			return err
		}
	}
	grace := o.Grace
	if grace <= 0 {
		grace = time.Second
	}
	handler := o.Handler
	if o.Token != "" {
		handler = RequireToken(o.Token, handler)
	}
	requests, cancelRequests := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelRequests()
	srv := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		// OPTIONS * is the handler's to answer, as everything else.
		DisableGeneralOptionsHandler: true,
		BaseContext:                  func(net.Listener) context.Context { return requests },
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	if o.Ready != nil {
		o.Ready(l.Addr())
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}

	// Answers in flight finish; streams, which would go on for ever, then see
	// their context end; what still hangs is cut off.
	timer := time.AfterFunc(grace, cancelRequests)
	defer timer.Stop()
	stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*grace)
	defer cancel()
	err := srv.Shutdown(stopCtx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = srv.Close()
	}
	if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	if err != nil {
		return fmt.Errorf("stop serving %s: %w", l.Addr(), err)
	}
	return nil
}

// RequireToken answers 401 to requests without "Authorization: Bearer TOKEN",
// except for /healthz, which tells nothing.
func RequireToken(token string, next http.Handler) http.Handler {
	// Hashes have one length, so the comparison does not tell the token's.
	want := sha256.Sum256([]byte(token))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
			got := sha256.Sum256([]byte(given))
			if !strings.EqualFold(scheme, "Bearer") || subtle.ConstantTimeCompare(want[:], got[:]) != 1 {
				w.Header().Set("WWW-Authenticate", `Bearer realm="tollkeeper"`)
				problem.Of(http.StatusUnauthorized, problem.CodeUnauthorized, "a bearer token is needed: send the header Authorization: Bearer TOKEN").Write(w)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}
