// Package gateway is a reverse proxy that admits calls by the decisions of the
// aggregators, answers 402 for what is used up, and records every call. Its admin
// listener takes events of gateways that are not ours, and answers proxies that
// only ask.
package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/claims"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inflight"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/intake"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Defaults of Options.
const (
	DefaultListen      = "127.0.0.1:8080"
	DefaultAdminListen = "127.0.0.1:8081"
)

// Options configure Run. Config is needed.
type Options struct {
	// NATS says where the ledger is; it may be away at the start and at any time.
	NATS natsconn.Options
	// Shards of the ledger; 0 asks it.
	Shards uint32
	// Currency of the ledger's costs (ISO 4217) while the ledger cannot be asked;
	// usage.DefaultCurrency when empty.
	Currency string
	// Config has the routes.
	Config Config

	// Listen is the proxy's address; empty means DefaultListen. It may be any: an
	// API key is asked for by the proxy itself.
	Listen string
	// ListenFlag and AdminFlag name the flags of the two addresses, without
	// dashes, in errors.
	ListenFlag, AdminFlag string
	// AdminListen serves /v1/events, /v1/admit, /v1/sent, /metrics, /healthz and
	// /readyz; empty means that there is no such listener. An address that other
	// machines can reach needs AdminToken.
	AdminListen string
	// AdminToken, if set, is the bearer token for all of it but /healthz and
	// /v1/admit, which asks for an API key.
	AdminToken string

	// Name of this gateway in frames and dead letters; the host's name when empty.
	Name string
	// Region goes into events.
	Region string
	// Unknown is the policy for calls whose verdict can't be known.
	Unknown gate.Unknown
	// Leases are for the limits of the tiers exact and leased; its Name is this Name.
	Leases gate.Leases
	// StaleAfter is how long beacons may be missing; 3 s when 0.
	StaleAfter time.Duration
	// TrustEventTime lets clients say when a call took place (EventTimeHeader):
	// for replays only.
	TrustEventTime bool
	// TestClock is where the test clock of the ledger stands, for a process that
	// advances it; see gate.Options.
	TestClock func() usage.Micros

	// SpoolDir is where calls wait while the ledger is away; empty: in memory only.
	SpoolDir string
	// SpoolBytes and MemoryBytes bound them; 0 means the outbox's defaults.
	SpoolBytes, MemoryBytes int64
	// SpoolBeforeAnswer ends an answer only when the call's event is on disk or
	// in the ledger, and breaks it off when that fails.
	SpoolBeforeAnswer bool
	// OnFull is what happens to calls when memory and spool are full.
	OnFull outbox.FullPolicy
	// Linger is how long calls gather for the spool; 0 means the outbox's default.
	Linger time.Duration

	// MaxEventsBody in bytes and MaxEventsBatch bound one POST of events; 0 means
	// the defaults (8 MiB, 5000).
	MaxEventsBody  int64
	MaxEventsBatch int

	Logger zerolog.Logger
	// Registerer takes the metrics and serves them; a registry of its own when nil.
	Registerer *prometheus.Registry
	// Readiness, when given, hears of the components nats, directory, decisions
	// and outbox, under Prefix; else there is one for /readyz alone.
	Readiness *telemetry.Readiness
	// ReadinessPrefix stands before the components' names, for processes in which
	// there are several services.
	ReadinessPrefix string

	// Ready, if set, is called once both ports are open; admin is nil without
	// AdminListen.
	Ready func(proxy, admin net.Addr)
	// StopTimeout bounds stopping; 5 s when 0.
	StopTimeout time.Duration
}

// Run serves until ctx is done: then it takes no more calls, finishes those in
// flight, and sends or spools their events, within StopTimeout.
func Run(ctx context.Context, o Options) error {
	s, err := newService(o)
	if err != nil {
		return err
	}
	return s.run(ctx)
}

type service struct {
	o         Options
	readiness *telemetry.Readiness
	gate      *gate.Gate
	outbox    atomic.Pointer[outbox.Outbox]
	letters   *intake.DeadLetters
	proxy     *proxy
	admin     http.Handler
	slow      atomic.Int64 // when an unmetered refusal was last logged, unix seconds
	inFlight  inflight.Calls
}

func newService(o Options) (*service, error) {
	if err := o.Config.Validate(); err != nil {
		return nil, err
	}
	if o.Listen == "" {
		o.Listen = DefaultListen
	}
	if o.ListenFlag == "" {
		o.ListenFlag = "gateway-listen"
	}
	if o.AdminFlag == "" {
		o.AdminFlag = "gateway-admin-listen"
	}
	if o.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("the gateway's name: %w", err)
		}
		o.Name = name
	}
	if len(o.Region) > usage.MaxNameBytes {
		return nil, fmt.Errorf("the region's name is %d bytes long, at most %d are allowed", len(o.Region), usage.MaxNameBytes)
	}
	// Now, and not when NATS is reached at last.
	if err := o.outbox().Check(); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	if o.StopTimeout <= 0 {
		o.StopTimeout = run.DefaultStopTimeout
	}
	if o.Registerer == nil {
		o.Registerer = telemetry.NewRegistry()
	}
	if o.NATS.Name == "" {
		o.NATS.Name = "tollkeeper gateway " + o.Name
	}
	s := &service{o: o, readiness: o.Readiness}
	if s.readiness == nil {
		s.readiness = telemetry.NewReadiness()
		if err := o.Registerer.Register(s.readiness); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
	}
	part := func(name string) *telemetry.Component { return s.readiness.Component(o.ReadinessPrefix + name) }
	s.o.NATS.Readiness = part("nats")
	s.o.NATS.Logger = o.Logger

	var err error
	if s.letters, err = intake.NewDeadLetters(o.Name, o.Logger, o.Registerer); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	s.o.Leases.Name = o.Name
	s.gate, err = gate.New(gate.Options{
		Connect:    func(ctx context.Context) (*nats.Conn, error) { return natsconn.Connect(ctx, s.o.NATS) },
		Shards:     o.Shards,
		OpenOutbox: s.openOutbox,
		Unknown:    o.Unknown, Leases: s.o.Leases, StaleAfter: o.StaleAfter, AbortUnsettled: o.SpoolBeforeAnswer, CloseTimeout: o.StopTimeout * 3 / 10, TestClock: o.TestClock,
		Logger: o.Logger, Registerer: o.Registerer,
		DirectoryReadiness: part("directory"), DecisionsReadiness: part("decisions"), OutboxReadiness: part("outbox"),
	})
	if err != nil {
		return nil, err
	}
	s.proxy, err = newProxy(proxyOptions{
		config: &s.o.Config, gate: s.gate, region: o.Region, trustEventTime: o.TrustEventTime, logger: o.Logger, registerer: o.Registerer,
	})
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	if o.AdminListen != "" {
		if s.admin, err = s.adminHandler(); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
	}
	return s, nil
}

func (o *Options) outbox() outbox.Options {
	return outbox.Options{
		Gateway: o.Name, SpoolDir: o.SpoolDir, MemoryBytes: o.MemoryBytes, SpoolBytes: o.SpoolBytes,
		OnFull: o.OnFull, SpoolBeforeAnswer: o.SpoolBeforeAnswer, Linger: o.Linger, Logger: o.Logger, Registerer: o.Registerer,
		TestClock: o.TestClock,
	}
}

// geometryTimeout bounds how long a start waits for the ledger's currency.
const geometryTimeout = 2 * time.Second

// currency of the ledger's costs. A gateway that is told how many shards there are
// starts without NATS: then it is the configured one.
func (s *service) currency(nc *nats.Conn, js jetstream.JetStream) string {
	if !nc.IsConnected() {
		return s.o.Currency
	}
	ctx, cancel := context.WithTimeout(context.Background(), geometryTimeout)
	defer cancel()
	geometry, err := ledger.ReadGeometry(ctx, js)
	if err != nil {
		s.o.Logger.Warn().Err(err).Str("currency", cmp.Or(s.o.Currency, usage.DefaultCurrency)).
			Msg("cannot read the ledger's currency; only costs in this one are taken; restart the gateway if the ledger has another")
		return s.o.Currency
	}
	return geometry.Currency
}

func (s *service) openOutbox(nc *nats.Conn, js jetstream.JetStream, shards uint32) (gate.Outbox, error) {
	options := s.o.outbox()
	options.NATS, options.Shards, options.Currency = nc, shards, s.currency(nc, js)
	o, err := claims.Open(options, claims.Options{JetStream: js})
	if err != nil {
		return nil, err
	}
	s.outbox.Store(o.Outbox)
	s.letters.Attach(js)
	return o, nil
}

func (s *service) run(ctx context.Context) error {
	// Ports first: a taken one is found out before anything is started.
	listener, err := telemetry.Listen(s.o.ListenFlag, s.o.Listen, true)
	if err != nil {
		return err
	}
	var adminListener net.Listener
	if s.admin != nil {
		if adminListener, err = telemetry.Listen(s.o.AdminFlag, s.o.AdminListen, s.o.AdminToken != ""); err != nil {
			return errors.Join(err, listener.Close())
		}
	}
	g := run.NewGroup(run.Options{StopTimeout: s.o.StopTimeout, Logger: s.o.Logger})
	g.AddRun("gate", func(ctx context.Context, ready func()) error {
		ready() // it waits for NATS as long as it takes; calls are answered meanwhile
		return s.gate.Run(ctx)
	})
	g.AddRun("dead letters", func(ctx context.Context, ready func()) error {
		ready()
		return s.letters.Run(ctx, s.o.StopTimeout/10)
	})
	g.AddRun("listeners", func(ctx context.Context, ready func()) error {
		return s.serve(ctx, listener, adminListener, ready)
	})
	return g.Run(ctx)
}

// serve serves both listeners; they stop at the same time. At the end it takes two
// fifths of StopTimeout at most and a tenth for what is left in flight, the dead
// letters take a tenth, and the outbox three tenths, if it has to, before it spools.
func (s *service) serve(ctx context.Context, listener, adminListener net.Listener, ready func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	grace := s.o.StopTimeout / 5
	errs := make(chan error, 2)
	n := 1
	go func() {
		errs <- telemetry.Serve(ctx, telemetry.ServeOptions{Flag: s.o.ListenFlag, Listener: listener, Handler: s.inFlight.Count(s.proxy), Authenticates: true, Grace: grace})
	}()
	var adminAddr net.Addr
	if adminListener != nil {
		n++
		adminAddr = adminListener.Addr()
		go func() {
			errs <- telemetry.Serve(ctx, telemetry.ServeOptions{Flag: s.o.AdminFlag, Listener: adminListener, Handler: s.inFlight.Count(s.admin), Authenticates: true, Grace: grace})
		}()
	}
	s.o.Logger.Info().Stringer("proxy", listener.Addr()).Msg("the gateway serves")
	if s.o.SpoolDir == "" {
		s.o.Logger.Warn().Msg("there is no spool directory: calls that NATS has not taken are lost when the gateway ends")
	}
	if s.o.TrustEventTime {
		s.o.Logger.Warn().Msg("clients may say when their calls took place (" + EventTimeHeader + "): for replays only")
	}
	if s.o.Ready != nil {
		s.o.Ready(listener.Addr(), adminAddr)
	}
	ready()
	var all error
	for range n {
		if err := <-errs; err != nil {
			all = errors.Join(all, err)
			cancel()
		}
	}
	// Their contexts are done by now; what they have to record must be with the
	// outbox before that is closed.
	if n := s.inFlight.Wait(grace / 2); n > 0 {
		s.o.Logger.Warn().Int("calls", n).Msg("calls did not end in time: they may not be recorded")
	}
	s.proxy.close()
	return all
}

func (s *service) adminHandler() (http.Handler, error) {
	parallel := 1
	if s.o.SpoolBeforeAnswer {
		parallel = 64 // so that they share the disk's flushes
	}
	events, err := intake.NewHandler(intake.HandlerOptions{
		Gate: s.gate, DeadLetters: s.letters, MaxBody: s.o.MaxEventsBody, MaxBatch: s.o.MaxEventsBatch, Parallel: parallel,
		Logger: s.o.Logger, Registerer: s.o.Registerer,
	})
	if err != nil {
		return nil, err
	}
	keyHeaders := s.o.Config.KeyHeaders
	if len(keyHeaders) == 0 {
		keyHeaders = gate.DefaultKeyHeaders()
	}
	h := adminRoutes(events, s.sent, telemetry.Routes(telemetry.HandlerOptions{Gatherer: s.o.Registerer, Readiness: s.readiness})).Handler("/openapi.yaml lists what there is")
	if s.o.AdminToken != "" {
		h = telemetry.RequireToken(s.o.AdminToken, h)
	}
	asks, err := newAsks(s.o.Registerer)
	if err != nil {
		return nil, err
	}
	// Callers forward the client's Authorization here: the API key is what is
	// asked for. Some ask with the client's method, and below this path with the
	// client's, which no ServeMux may tidy up.
	asked := &admit{
		gate: s.gate, proxy: s.proxy, key: gate.KeyFromHeaders(keyHeaders...), region: usage.CleanText(s.o.Region), record: s.record,
		now: func() usage.Micros { return usage.At(time.Now()) }, asks: asks,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == admitPath || strings.HasPrefix(r.URL.Path, admitPath+"/") {
			asked.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	}), nil
}

// adminRoutes are those of /openapi.yaml, but for admitPath.
func adminRoutes(events http.Handler, sent http.HandlerFunc, others problem.Routes) problem.Routes {
	routes := problem.Routes{"POST /v1/events": events, "GET /v1/sent": sent, "GET /openapi.yaml": openapi.Handler(openapi.Gateway)}
	routes.Add(others)
	return routes
}

// record settles a call of /v1/admit: a refusal, or one that was taken from leases.
func (s *service) record(r *http.Request, shard uint32, c *usage.Call) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 5*time.Second)
	defer cancel()
	err := s.gate.SettleShard(ctx, shard, c)
	if err != nil {
		if now := time.Now().Unix(); s.slow.Swap(now) != now {
			s.o.Logger.Error().Err(err).Str("account", c.Account).Msg("a call of " + admitPath + " could not be recorded")
		}
	}
	return err
}

// Sent is the answer of GET /v1/sent: what this process has sent since its start,
// the first of the four points of the conservation check.
type Sent struct {
	Gateway  string `json:"gateway"`
	Producer string `json:"producer"`
	// Added were taken by the outbox; Acked of them are in the ledger. Invalid,
	// Dropped, Refused and Rejected were not sent.
	Added    int64 `json:"added"`
	Acked    int64 `json:"acked"`
	Invalid  int64 `json:"invalid"`
	Dropped  int64 `json:"dropped"`
	Refused  int64 `json:"refused"`
	Rejected int64 `json:"rejected"`
	// Sent sums those that are acknowledged or spooled, each once.
	Sent      ledger.Totals `json:"sent"`
	Connected bool          `json:"connected"`
}

func (s *service) sent(w http.ResponseWriter, _ *http.Request) {
	reply := Sent{Gateway: s.o.Name}
	if o := s.outbox.Load(); o != nil {
		st := o.Stats()
		reply.Producer = o.Producer().String()
		reply.Added, reply.Acked, reply.Connected = st.Added, st.Acked, st.Connected
		reply.Sent = ledger.Totals{Admitted: st.Sent.Admitted, Refused: st.Sent.Refused, Meters: make(map[usage.Meter]int64, usage.NumBuiltIn)}
		for i, m := range usage.BuiltInMeters() {
			reply.Sent.Meters[m] = st.Sent.Meters[i]
		}
		maps.Copy(reply.Sent.Meters, st.Sent.Custom)
		reply.Invalid, reply.Dropped, reply.Refused, reply.Rejected = st.Invalid, st.Dropped, st.Refused, st.Rejected
	}
	data, err := json.Marshal(reply)
	if err != nil {
		problem.Of(http.StatusInternalServerError, problem.CodeInternal, "what was sent can't be written as JSON").Write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	// An error here is the client's going away.
	_, _ = w.Write(append(data, '\n'))
}
