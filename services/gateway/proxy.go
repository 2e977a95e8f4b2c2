package gateway

import (
	"context"
	"errors"
	stdlog "log"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/apis"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/bounds"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/crossorigin"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/direct"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/headers"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/metering"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/models"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/once"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/paths"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/routes"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/target"
)

// Headers between clients, gateway and upstream. Clients can't set the first two:
// all that begins with X-Tollkeeper- is taken off what they send.
const (
	AccountHeader = "X-Tollkeeper-Account"
	KeyIDHeader   = "X-Tollkeeper-Key-Id"
	// EventTimeHeader is the event time of a replayed call, RFC 3339 with any
	// fraction of a second. It counts with Options.TrustEventTime only, and is
	// never sent on.
	EventTimeHeader = "Tollkeeper-Event-Time"
)

// proxy finds the route of a request and sends it there.
type proxy struct {
	routes     []*route // in the order in which they are tried
	transports map[time.Duration]*direct.Transport
	gate       *gate.Gate
	usage      *metering.Metrics
	meters     *prometheus.CounterVec
	buffer     bufferPool
	policy     *crossorigin.Policy // of what has no route
	bodies     *models.Room
	logger     zerolog.Logger
	told       atomic.Int64 // when a failing upstream was last logged, unix seconds
}

// close lets go of idle connections to upstreams.
func (p *proxy) close() {
	for _, t := range p.transports {
		t.CloseIdleConnections()
	}
}

type route struct {
	o       *RouteConfig
	host    string
	prefix  string
	handler http.Handler
	model   func(*http.Request) (string, error)
	unused  func(method, path, model string) usage.MeterSet
	policy  *crossorigin.Policy
}

type proxyOptions struct {
	config         *Config
	gate           *gate.Gate
	region         string
	trustEventTime bool
	logger         zerolog.Logger
	registerer     prometheus.Registerer
}

func newProxy(o proxyOptions) (*proxy, error) {
	p := &proxy{
		gate: o.gate, bodies: models.NewRoom(models.DefaultRoom), logger: o.logger, policy: o.config.Policy(nil),
	}
	p.meters = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tollkeeper_gateway_reported_readings_total", Help: "Readings that upstreams reported in meters_header, by whether they could be counted.",
	}, []string{"outcome"})
	var err error
	if p.usage, err = metering.NewMetrics(o.registerer); err != nil {
		return nil, err
	}
	if o.registerer != nil {
		if err := o.registerer.Register(p.meters); err != nil {
			return nil, err
		}
	}
	keyHeaders := o.config.KeyHeaders
	if len(keyHeaders) == 0 {
		keyHeaders = gate.DefaultKeyHeaders()
	}
	p.transports = make(map[time.Duration]*direct.Transport)
	for i := range o.config.Routes {
		c := &o.config.Routes[i]
		timeout := time.Duration(c.Timeout)
		if timeout == 0 {
			timeout = DefaultTimeout
		}
		if p.transports[timeout] == nil {
			p.transports[timeout] = newTransport(timeout)
		}
		m := gate.MiddlewareOptions{Route: c.Name, Region: o.region, Profile: c.Profile, Key: gate.KeyFromHeaders(keyHeaders...), Model: modelOf(&c.Model, p.bodies), Bound: boundOf(c, p.bodies), Lifetime: timeout, Voidable: true}
		unused := unusedOf(c)
		m.Unused = func(r *http.Request, model string) usage.MeterSet {
			if r.Header.Get("Upgrade") != "" {
				return 0 // what goes over it later is not known
			}
			return unused(r.Method, r.URL.Path, model)
		}
		if o.trustEventTime {
			m.Time = replayedTime
		}
		upstream, err := p.upstream(c, keyHeaders, p.transports[timeout])
		if err != nil {
			return nil, err
		}
		p.routes = append(p.routes, &route{
			o: c, host: strings.TrimSuffix(strings.ToLower(c.Host), "."), prefix: c.PathPrefix(), model: m.Model, unused: unused, policy: o.config.Policy(c),
			handler: o.gate.Middleware(m, upstream),
		})
	}
	slices.SortStableFunc(p.routes, func(a, b *route) int {
		switch {
		case (a.host != "") != (b.host != ""):
			return before(a.host != "")
		case len(a.prefix) != len(b.prefix):
			return len(b.prefix) - len(a.prefix)
		case (len(a.o.Methods) > 0) != (len(b.o.Methods) > 0):
			return before(len(a.o.Methods) > 0)
		}
		return 0
	})
	return p, nil
}

func before(yes bool) int {
	if yes {
		return -1
	}
	return 1
}

// sent notes that the upstream may have a call.
func sent(r *http.Request) { gate.ReportFrom(r.Context()).Sent() }

// newTransport sends a call to its upstream once, whichever way it takes.
func newTransport(timeout time.Duration) *direct.Transport {
	dial := (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	return direct.New(direct.Options{
		Dial: dial, HeaderTimeout: timeout, IdleTimeout: idleTimeout, MaxIdlePerHost: maxIdlePerHost,
		Sent: sent,
		Next: once.Transport{Sent: sent, Next: &http.Transport{
			DialContext:           dial,
			ForceAttemptHTTP2:     true,
			MaxIdleConns:          1024,
			MaxIdleConnsPerHost:   maxIdlePerHost,
			IdleConnTimeout:       idleTimeout,
			TLSHandshakeTimeout:   5 * time.Second,
			ExpectContinueTimeout: time.Second,
			ResponseHeaderTimeout: timeout,
			// What the client and the upstream agree on is not ours to change.
			DisableCompression: true,
		}},
	})
}

// Bounds of connections to upstreams that wait for the next call.
const (
	idleTimeout    = 90 * time.Second
	maxIdlePerHost = 256
)

// ServeHTTP implements http.Handler.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method, asked := r.Method, crossorigin.Asked(r)
	if asked != "" {
		method = asked // the route of what comes next
	}
	found, problem := p.route(r, method)
	policy := p.policy
	if found != nil {
		policy = found.policy
	}
	switch {
	case asked != "" && policy != nil:
		policy.Preflight(w, r)
		return
	case asked != "":
		found, problem = p.route(r, r.Method)
	}
	w = policy.Readable(w, r)
	f := refusal.Refusal{Code: refusal.NoRoute}
	switch {
	case problem != "":
		f = refusal.Refusal{Code: refusal.BadRequest, Detail: problem}
	case found != nil:
		found.handler.ServeHTTP(w, r)
		return
	}
	f.RequestID = gate.RequestID(r.Header.Get(gate.RequestIDHeader))
	p.answer(w, r, &f, refusal.Problem)
}

// route returns the route that a request has with a method, nil when there is none, or
// why there can't be one.
func (p *proxy) route(r *http.Request, method string) (*route, string) {
	t, problem := target.Of(r)
	if problem != "" {
		return nil, problem
	}
	if headers.OtherMethod(r.Header, r.Method) {
		return nil, otherMethod
	}
	found, problem := p.agreed(r.Host, &t, method)
	if found != nil && found.o.StripPrefix && strings.HasPrefix(paths.Stripped(t.Path, found.prefix, found.o.IgnoreCase), "//") {
		return nil, target.Ambiguous // without the prefix it would begin with two slashes
	}
	return found, problem
}

const otherMethod = "A header asks for another method than the request has: send the method itself."

// agreed finds the route that all readings of a target have.
func (p *proxy) agreed(host string, t *target.Target, method string) (*route, string) {
	found := p.find(host, t.Path, method)
	for _, other := range t.Others {
		if p.find(host, other, method) != found {
			return nil, target.Ambiguous
		}
	}
	return found, ""
}

// find returns the route of a request, nil when there is none.
func (p *proxy) find(host, path, method string) *route {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".") // the same host, written in full
	for _, r := range p.routes {
		if r.host != "" && r.host != host {
			continue
		}
		if _, below := paths.Cut(path, r.prefix, r.o.IgnoreCase); !below {
			continue
		}
		if len(r.o.Methods) > 0 && !slices.Contains(r.o.Methods, method) {
			continue
		}
		return r
	}
	return nil
}

func replayedTime(r *http.Request, now time.Time) time.Time {
	if at, err := time.Parse(time.RFC3339Nano, r.Header.Get(EventTimeHeader)); err == nil {
		return at
	}
	return now
}

// upstream is the reverse proxy of one route.
func (p *proxy) upstream(c *RouteConfig, keyHeaders []string, transport http.RoundTripper) (http.Handler, error) {
	upstream, err := url.Parse(c.Upstream)
	if err != nil {
		return nil, err
	}
	set := make(map[string]string, len(c.SetHeaders))
	for h, v := range c.SetHeaders {
		value, _ := routes.Expand(v)
		set[textproto.CanonicalMIMEHeaderKey(h)] = value
	}
	meter := p.metering(c)
	prefix, model := c.PathPrefix(), textproto.CanonicalMIMEHeaderKey(c.Model.Header)
	dropped, guarded := []string{EventTimeHeader}, append(slices.Sorted(maps.Keys(set)), model, gate.RequestIDHeader)
	if c.KeepKey {
		guarded = append(guarded, keyHeaders...)
	} else {
		dropped = append(dropped, keyHeaders...)
	}
	ours := headers.NewOurs(dropped, guarded)
	metersHeader := textproto.CanonicalMIMEHeaderKey(c.MetersHeader)
	rp := &httputil.ReverseProxy{
		Transport:  transport, // which sends a call once
		BufferPool: &p.buffer,
		ErrorLog:   stdlog.New(debugLog{p.logger}, "", 0),
		Rewrite: func(r *httputil.ProxyRequest) {
			if c.StripPrefix && prefix != "/" {
				r.Out.URL.Path = paths.Stripped(r.Out.URL.Path, prefix, c.IgnoreCase)
				if r.Out.URL.RawPath != "" {
					r.Out.URL.RawPath = paths.Stripped(r.Out.URL.RawPath, prefix, c.IgnoreCase)
				}
			}
			r.Out.URL.RawQuery = r.In.URL.RawQuery // as it came: no route depends on it
			r.SetURL(upstream)
			if c.KeepHost {
				r.Out.Host = r.In.Host
			}
			h := r.Out.Header
			ours.Drop(h)
			inmemory.Send(r.Out, r.In)
			ours.Trailers(r.Out, r.In)
			if headers.Switches(h) {
				h.Del("Upgrade")
				h.Del("Connection")
				h.Del("Http2-Settings")
			}
			for _, name := range [...]string{gate.RequestIDHeader, model} {
				// The client may have named it in Connection: the upstream gets the id
				// and the model that are recorded all the same.
				if values := r.In.Header[name]; values != nil && !strings.HasPrefix(name, headers.Prefix) {
					h[name] = values
				}
			}
			r.SetXForwarded()
			if account, keyID := gate.ReportFrom(r.In.Context()).Account(); account != "" {
				h.Set(AccountHeader, headers.Safe(account))
				h.Set(KeyIDHeader, headers.Safe(keyID))
			}
			if meter != nil {
				r.Out = meter.Request(r.Out)
			}
			for name, value := range set {
				h.Set(name, value)
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			// The client's answer carries the id that the event carries.
			if resp.StatusCode >= 500 && !c.Counts(routes.ServerErrors) {
				gate.ReportFrom(resp.Request.Context()).Uncounted()
			}
			resp.Header.Del(gate.RequestIDHeader)
			delete(resp.Trailer, gate.RequestIDHeader)
			delete(resp.Trailer, metersHeader)
			if c.MetersHeader != "" {
				p.readMeters(resp, c.MetersHeader)
			}
			if meter != nil {
				meter.Answer(resp)
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) { p.failed(w, r, err, c, meter) },
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rp.ServeHTTP(w, r)
		headers.DropTrailers(w.Header(), gate.RequestIDHeader, metersHeader)
	}), nil
}

// metering returns what finds out what a route's calls have used; nil: nothing does.
func (p *proxy) metering(c *RouteConfig) *metering.Route {
	if !c.ReadsUsage() {
		return nil
	}
	o := metering.Options{
		Name: c.Name, Provider: c.Profile == refusal.OpenAI || c.Profile == refusal.Anthropic, Ask: c.AsksUsage(), MaxBody: c.Model.MaxBody, Bodies: p.bodies, Metrics: p.usage,
		Settle: p.gate.Settle,
		Reserves: func(account, model, method string) bool {
			a, found := p.gate.AccountByID(account)
			return found == gate.Found && len(p.gate.Measured(a, gate.Request{Model: model, Route: c.Name, Method: method})) > 0
		},
		Unwilling: func() {
			p.seldom(zerolog.WarnLevel).Str("route", c.Name).Msg("the upstream refused to be asked for usage; the call failed; set ask_usage: false on the route")
		},
		Unsettled: func(err error) {
			p.seldom(zerolog.ErrorLevel).Err(err).Str("route", c.Name).Msg("the usage of a background response could not be recorded; it is counted when the response is asked for again")
		},
	}
	if o.MaxBody == 0 {
		o.MaxBody = DefaultMaxModelBody
	}
	return metering.New(o)
}

// readMeters takes the upstream's readings off an answer.
func (p *proxy) readMeters(resp *http.Response, header string) {
	values := resp.Header.Values(header)
	if len(values) == 0 {
		return
	}
	resp.Header.Del(header)
	report := gate.ReportFrom(resp.Request.Context())
	for _, field := range strings.Split(strings.Join(values, ","), ",") {
		name, number, _ := strings.Cut(strings.TrimSpace(field), "=")
		v, err := strconv.ParseInt(number, 10, 64)
		if err == nil {
			err = report.Set(usage.Meter(name), v)
		}
		if err != nil {
			p.meters.WithLabelValues("unusable").Inc()
			p.seldom(zerolog.WarnLevel).Err(err).Str("header", header).Msg("a reading of the upstream can't be counted and is left out")
			continue
		}
		p.meters.WithLabelValues("read").Inc()
	}
}

// failed answers for an upstream that did not.
func (p *proxy) failed(w http.ResponseWriter, r *http.Request, err error, c *RouteConfig, meter *metering.Route) {
	report := gate.ReportFrom(r.Context())
	gone := r.Context().Err() != nil && errors.Is(err, context.Canceled)
	sent := (*once.SentError)(nil)
	switch {
	case !errors.As(err, &sent):
		report.Unserved()
	case !gone && !c.Counts(routes.Unanswered):
		report.Unknown()
		report.Uncounted()
	default:
		report.Unknown()
	}
	if gone {
		// Nobody reads it; the status is for the event.
		if meter != nil && sent != nil {
			meter.Unanswered(r)
		}
		w.WriteHeader(gate.StatusClientGone)
		return
	}
	f := refusal.Refusal{Code: refusal.BadGateway, RequestID: r.Header.Get(gate.RequestIDHeader)}
	if timeout := (net.Error)(nil); errors.As(err, &timeout) && timeout.Timeout() {
		f.Code = refusal.GatewayTimeout
	}
	report.Ended(usage.UpstreamFailed)
	p.seldom(zerolog.WarnLevel).Err(err).Str("request_id", f.RequestID).Msg("an upstream did not answer")
	p.answer(w, r, &f, c.Profile)
}

// seldom is a log line, or where there was one in this second, none: a line a call
// would be too many. The event is nil then, which zerolog allows.
func (p *proxy) seldom(level zerolog.Level) *zerolog.Event {
	if now := time.Now().Unix(); p.told.Swap(now) == now {
		return nil
	}
	return p.logger.WithLevel(level)
}

func (p *proxy) answer(w http.ResponseWriter, r *http.Request, f *refusal.Refusal, profile refusal.Profile) {
	if err := f.Write(w, profile); err != nil && r.Context().Err() == nil {
		p.logger.Debug().Err(err).Str("request_id", f.RequestID).Msg("an answer could not be delivered")
	}
}

// modelOf returns what finds a request's model; nil when nothing has to.
func modelOf(c *ModelConfig, bodies *models.Room) func(*http.Request) (string, error) {
	switch {
	case c.Fixed != "":
		return func(*http.Request) (string, error) { return c.Fixed, nil }
	case c.Header != "":
		return func(r *http.Request) (string, error) {
			if values := r.Header.Values(c.Header); len(values) > 1 {
				return "", &refusal.Refusal{Code: refusal.BadRequest, Detail: "The header " + c.Header + " is there several times, so which model is meant can't be told."}
			}
			return r.Header.Get(c.Header), nil
		}
	case c.JSON != "":
		bound := c.MaxBody
		if bound == 0 {
			bound = DefaultMaxModelBody
		}
		return func(r *http.Request) (string, error) { return models.InBody(r, c.JSON, bound, bodies) }
	}
	return nil
}

// unusedOf says which meters a route's calls can't use, by what the upstream is asked for.
func unusedOf(c *RouteConfig) func(method, path, model string) usage.MeterSet {
	base := ""
	if u, err := url.Parse(c.Upstream); err == nil {
		base = strings.TrimSuffix(u.Path, "/")
	}
	provider := c.Profile == refusal.OpenAI || c.Profile == refusal.Anthropic
	return func(method, path, model string) usage.MeterSet {
		if c.StripPrefix && c.PathPrefix() != "/" {
			path = paths.Stripped(path, c.PathPrefix(), c.IgnoreCase)
		}
		o := apis.Of(method, base+path, provider)
		unused := o.UnusedBy(model)
		if c.MetersHeader != "" {
			unused &^= usage.SetOf(usage.Cost) // the upstream may have a price for anything
		}
		return unused
	}
}

// boundOf says what a route's calls can cost at most.
func boundOf(c *RouteConfig, bodies *models.Room) func(*http.Request, string, []usage.Meter) (usage.Quantities, error) {
	rules := &bounds.Rules{Bodies: bodies, Reserve: make(map[usage.Meter]int64, len(c.Reserve)), ClampMember: c.Clamp.Member, Clamp: c.Clamp.Tokens, InputOverhead: c.InputOverhead, MaxBody: c.Model.MaxBody}
	for m, units := range c.Reserve {
		rules.Reserve[usage.Meter(m)] = units
	}
	if rules.MaxBody == 0 {
		rules.MaxBody = DefaultMaxModelBody
	}
	return func(r *http.Request, _ string, meters []usage.Meter) (usage.Quantities, error) {
		return rules.Of(r, meters)
	}
}

// bufferPool keeps the proxy's copy buffers: 35 kB of garbage a call otherwise.
type bufferPool struct{ pool sync.Pool }

const copyBuffer = 32 << 10

// Get implements httputil.BufferPool.
func (b *bufferPool) Get() []byte {
	if p, ok := b.pool.Get().(*[copyBuffer]byte); ok {
		return p[:]
	}
	return make([]byte, copyBuffer)
}

// Put implements httputil.BufferPool.
func (b *bufferPool) Put(p []byte) {
	if cap(p) >= copyBuffer {
		b.pool.Put((*[copyBuffer]byte)(p[:copyBuffer]))
	}
}

// debugLog takes what ReverseProxy has to say about broken connections.
type debugLog struct{ logger zerolog.Logger }

func (l debugLog) Write(p []byte) (int, error) {
	l.logger.Debug().Msg(strings.TrimSpace(string(p)))
	return len(p), nil
}
