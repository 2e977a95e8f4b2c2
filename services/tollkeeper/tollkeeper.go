// Package tollkeeper is all of Tollkeeper in one process: the services, and
// NATS and ClickHouse embedded unless they are given by address.
package tollkeeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/aggregator"
	"github.com/tollkeeper/tollkeeper/services/alerter"
	"github.com/tollkeeper/tollkeeper/services/auditor"
	"github.com/tollkeeper/tollkeeper/services/console"
	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/historian"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/banner"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/demo"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/phases"
)

// Options of a whole Tollkeeper.
type Options struct {
	// Engines that are embedded where NATS or ClickHouse has no address.
	Engines engine.Options
	// NATS outside, when it has a URL.
	NATS natsconn.Options
	// ClickHouse outside, when it has addresses.
	ClickHouse history.Options
	// Shards of a ledger that does not exist yet; 0 is the ledger's default.
	Shards uint32
	// TestClock gives a ledger that does not exist yet a test clock, which stands at
	// this time until somebody advances it (pkg/testclock). Zero: its time is now.
	TestClock time.Time
	// Currency of the costs of a ledger that does not exist yet (ISO 4217);
	// usage.DefaultCurrency when empty.
	Currency string

	// APIListen is the console and API; empty: there is none.
	APIListen string
	// APIToken is needed beyond loopback.
	APIToken string
	// Gateway, when it is wanted. Its NATS, Logger, Registerer and Readiness are
	// filled in.
	Gateway *gateway.Options
	// Alerter's rules and receivers; the rest is filled in.
	Alerter alerter.Options
	// Auditor's intervals; the rest is filled in.
	Auditor auditor.Options

	// Plans is a plans file to apply at the start; empty applies none, except
	// that the demo applies its own to a ledger without any.
	Plans string
	// Demo sends seeded traffic through the gateway to a demo upstream.
	Demo     bool
	DemoSeed uint64

	Logger zerolog.Logger
	// Out hears, for people, where everything is once it runs.
	Out io.Writer
	// Ready is called once everything is up; may be nil.
	Ready func(Addresses)
}

// Addresses of what runs.
type Addresses struct {
	// NATS is a URL, NATSAddr its host:port when it is embedded.
	NATS, NATSAddr             string
	ClickHouse, ClickHouseHTTP string
	API, Gateway, GatewayAdmin string
	// ClickHouseOptions connect as the services do.
	ClickHouseOptions history.Options `json:"-"`
}

// stack is what the components of a Run share.
type stack struct {
	o         Options
	banner    banner.Banner
	shards    uint32
	registry  *prometheus.Registry
	readiness *telemetry.Readiness
	addr      Addresses
	natsURL   natsconn.Options
	natsd     *embednats.Server
	// engine is awaited before the addresses of ClickHouse are read.
	engine   *engine.Beside
	phases   *phases.Phases
	upstream string
}

// Run runs everything until ctx is done, then stops it in reverse order within
// five seconds.
func Run(ctx context.Context, o Options) error {
	if o.Out == nil {
		o.Out = io.Discard
	}
	s := &stack{o: o, banner: banner.Banner{Out: o.Out}, registry: telemetry.NewRegistry(), readiness: telemetry.NewReadiness(), natsURL: o.NATS, engine: engine.NewBeside(), phases: phases.Begin()}
	if err := s.registry.Register(s.readiness); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	if err := os.MkdirAll(o.Engines.DataDir, 0o700); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	g := run.NewGroup(run.Options{Logger: o.Logger, Started: s.started})
	if o.NATS.URL == "" {
		g.Add("nats", s.startNATS, func(ctx context.Context) error { return s.natsd.Stop(ctx) })
	}
	s.addr.NATS = natsconn.Redact(o.NATS.URL)
	if len(o.ClickHouse.Addrs) == 0 {
		g.AddRun("clickhouse", s.clickhouse)
	} else {
		s.engine.Elsewhere()
		s.addr.ClickHouse, s.addr.ClickHouseOptions = o.ClickHouse.Addrs[0], o.ClickHouse
	}
	g.Add("ledger", s.provision, nil)
	g.AddRun("aggregator", s.aggregator)
	g.AddRun("historian", s.historian)
	g.AddRun("alerter", s.alerter)
	g.AddRun("auditor", s.auditor)
	g.Add("plans", s.applyPlans, nil)
	if o.Gateway != nil {
		if o.Demo {
			g.AddRun("demo upstream", s.demoUpstream)
		}
		g.AddRun("gateway", s.gateway)
	}
	if o.APIListen != "" {
		g.AddRun("console", s.console)
	}
	if o.Demo && o.Gateway != nil {
		g.AddRun("demo traffic", func(ctx context.Context, ready func()) error {
			ready()
			return demo.Run(ctx, demo.Options{URL: "http://" + s.addr.Gateway, Seed: o.DemoSeed, Logger: s.logger("demo")})
		})
	}
	g.Add("announce", s.announce, func(context.Context) error { return removeAddresses(o.Engines.DataDir) })
	return g.Run(ctx)
}

func (s *stack) logger(component string) zerolog.Logger {
	return s.o.Logger.With().Str("component", component).Logger()
}

// nats returns how a service connects.
func (s *stack) nats(name string) natsconn.Options {
	o := s.brief(name)
	o.Readiness = s.readiness.Component(name + "_nats")
	return o
}

// brief returns how to connect for something that is soon done: that its
// connection ends says nothing about readiness.
func (s *stack) brief(name string) natsconn.Options {
	o := s.natsURL
	o.Name = "tollkeeper " + name
	o.Logger = s.logger(name)
	return o
}

func (s *stack) startNATS(ctx context.Context) error {
	var err error
	s.o.Engines.Logger = s.o.Logger
	if s.natsd, err = engine.StartNATS(ctx, s.o.Engines); err != nil {
		return err
	}
	s.natsURL.URL, s.natsURL.User, s.natsURL.Password = s.natsd.ClientURL(), s.o.Engines.NATSUser, s.o.Engines.NATSPassword
	s.addr.NATS, s.addr.NATSAddr = s.natsURL.URL, s.natsd.Addr().String()
	return nil
}

func (s *stack) clickhouse(ctx context.Context, ready func()) error {
	began, component := time.Now(), s.readiness.Component("clickhouse_engine")
	ready()
	return s.engine.Run(ctx, s.o.Engines, component, func(server *embedclickhouse.Server) {
		s.addr.ClickHouse, s.addr.ClickHouseHTTP = server.Addr(), server.HTTPAddr()
		s.addr.ClickHouseOptions = engine.History(server.Addr(), server.Credentials())
		s.phases.Beside("clickhouse", time.Since(began))
	})
}

func (s *stack) aggregator(ctx context.Context, ready func()) error {
	ready()
	return aggregator.Run(ctx, aggregator.Options{
		NATS: s.nats("aggregator"), Logger: s.logger("aggregator"), Registerer: s.registry, Readiness: s.readiness, Shards: s.o.Shards,
		// NATS in this process dies with us: nobody of our name is left.
		Member: "tollkeeper-up", Sole: s.natsd != nil,
	})
}

func (s *stack) historian(ctx context.Context, ready func()) error {
	ready()
	nats := s.nats("historian") // not ready meanwhile
	if err := s.engine.Await(ctx); err != nil {
		return err
	}
	return historian.Run(ctx, historian.Options{
		NATS: nats, ClickHouse: s.addr.ClickHouseOptions, Provision: ledger.ProvisionOptions{Shards: s.o.Shards},
		Logger: s.logger("historian"), Registerer: s.registry, Readiness: s.readiness,
	})
}

func (s *stack) alerter(ctx context.Context, ready func()) error {
	ready()
	o := s.o.Alerter
	o.NATS, o.Logger, o.Registerer, o.Readiness, o.AdminListen = s.nats("alerter"), s.logger("alerter"), s.registry, s.readiness, ""
	return alerter.Run(ctx, o)
}

func (s *stack) auditor(ctx context.Context, ready func()) error {
	ready()
	o := s.o.Auditor
	o.NATS = s.nats("auditor") // not ready meanwhile
	if err := s.engine.Await(ctx); err != nil {
		return err
	}
	o.ClickHouse, o.Provision = s.addr.ClickHouseOptions, ledger.ProvisionOptions{Shards: s.o.Shards}
	o.Logger, o.Registerer, o.Readiness, o.AdminListen = s.logger("auditor"), s.registry, s.readiness, ""
	return auditor.Run(ctx, o)
}

// provision makes the streams before the services look for them.
func (s *stack) provision(ctx context.Context) error {
	nc, err := natsconn.Connect(ctx, s.brief("provision"))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("jetstream: %w", err)
	}
	geometry, err := ledger.Provision(ctx, js, ledger.ProvisionOptions{TestClock: s.o.TestClock, Shards: s.o.Shards, Currency: s.o.Currency, Notice: func(text string) { s.o.Logger.Warn().Msg(text) }})
	s.shards = geometry.Shards
	return err
}

// applyPlans applies the plans file, or the demo's to a ledger without plans.
func (s *stack) applyPlans(ctx context.Context) (err error) {
	name, data := s.o.Plans, demo.Plans
	switch {
	case name != "":
		if data, err = os.ReadFile(name); err != nil {
			return fmt.Errorf("read the plans file: %w", err)
		}
	case !s.o.Demo:
		return nil
	}
	doc, err := plans.Parse(name, data)
	if err != nil {
		return err
	}
	nc, err := natsconn.Connect(ctx, s.brief("plans"))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("jetstream: %w", err)
	}
	applier := &plans.Applier{JS: js, NC: nc}
	if name == "" {
		now, err := applier.Current(ctx)
		if err != nil {
			return err
		}
		if now.Revision != 0 {
			if now.Unfinished == "" {
				return nil
			}
			// Somebody was killed half way through applying: what stands now,
			// applied again, first completes it.
			repair, cancel := context.WithTimeout(ctx, plans.DefaultTakeover+5*time.Second) // another's act is left alone before
			defer cancel()
			_, err := applier.Change(repair, "up", func(now *plans.Document) *plans.Document { return now })
			if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
				s.o.Logger.Warn().Err(err).Msg("plans were applied in part, and still are: apply them again")
				return nil
			}
			return err
		}
	}
	// What was added since the file was written is kept: a restart cuts nobody off.
	diff, kept, err := applier.ApplyKeeping(ctx, doc, "up")
	if err != nil {
		return err
	}
	if !diff.Empty() {
		s.o.Logger.Info().Str("plans", name).Int("plans_changed", len(diff.Plans)).Int("accounts_changed", len(diff.Accounts)).Msg("plans applied")
	}
	if kept != "" {
		s.o.Logger.Warn().Str("plans", name).Str("kept", kept).Msg("the plans file leaves out what holds; it was kept; remove it with tollkeeper apply --remove")
	}
	return nil
}

func (s *stack) demoUpstream(ctx context.Context, ready func()) error {
	return modelserver.Run(ctx, modelserver.Options{Delay: 5 * time.Millisecond}, func(url string) { s.upstream = url; ready() })
}

func (s *stack) gateway(ctx context.Context, ready func()) error {
	o := *s.o.Gateway
	o.NATS, o.Logger, o.Registerer, o.Readiness, o.ReadinessPrefix = s.nats("gateway"), s.logger("gateway"), s.registry, s.readiness, "gateway_"
	o.Shards = 0
	if len(o.Config.Routes) == 0 && s.upstream != "" {
		o.Config = gateway.SingleUpstream("chat", s.upstream, refusal.Problem)
	}
	if o.SpoolDir == "" {
		o.SpoolDir = filepath.Join(s.o.Engines.DataDir, "spool")
	}
	if o.Name == "" {
		o.Name = "gateway"
	}
	o.Ready = func(proxy, admin net.Addr) {
		s.addr.Gateway = proxy.String()
		if admin != nil {
			s.addr.GatewayAdmin = admin.String()
		}
		ready()
	}
	return gateway.Run(ctx, o)
}

func (s *stack) console(ctx context.Context, ready func()) error {
	nats := s.nats("console") // not ready meanwhile
	if err := s.engine.Await(ctx); err != nil {
		return err
	}
	return console.Run(ctx, console.Options{
		Listen: s.o.APIListen, Flag: "api-listen", Token: s.o.APIToken, NATS: nats, Shards: s.o.Shards,
		ClickHouse: s.addr.ClickHouseOptions, Logger: s.logger("console"), Registry: s.registry, Readiness: s.readiness,
		Ready: func(a net.Addr) { s.addr.API = a.String(); ready() },
	})
}

// started writes the line of a part that is up when it was started; the engine and the
// services are awaited.
func (s *stack) started(name string) {
	s.phases.Ended(name)
	switch name {
	case "nats":
		s.banner.Part("NATS", "up", s.addr.NATS)
	case "ledger":
		s.banner.Part("ledger", "up", fmt.Sprintf("%d shards", s.shards))
	}
}

// announce says where everything is, after all parts are ready or have had their time.
func (s *stack) announce(ctx context.Context) error {
	if err := s.engine.Await(ctx); err != nil {
		return err
	}
	s.phases.Tell(s.o.Logger)
	embedded := len(s.o.ClickHouse.Addrs) == 0
	if embedded {
		s.banner.Part("ClickHouse", "up", s.addr.ClickHouse)
	}
	if s.natsd != nil && embedded {
		if err := writeAddresses(s.o.Engines.DataDir, s.addr); err != nil {
			return err
		}
	}
	if s.o.Ready != nil {
		s.o.Ready(s.addr)
	}
	if s.o.Out == io.Discard {
		return nil // there is nobody to wait for
	}
	services := []banner.Service{
		{Name: "aggregator"}, {Name: "historian"}, {Name: "alerter"}, {Name: "auditor"},
		{Name: "gateway", Where: banner.Web(s.addr.Gateway)}, {Name: "console", Where: banner.Web(s.addr.API)},
	}
	if s.o.Gateway == nil {
		services[4].None = banner.NoGateway
	}
	if s.o.APIListen == "" {
		services[5].None = "--api-listen is empty"
	}
	s.banner.Services(ctx, s.readiness, services)
	if ctx.Err() == nil {
		s.banner.Up(banner.Summary{
			API: s.addr.API, Gateway: s.addr.Gateway, GatewayAdmin: s.addr.GatewayAdmin, NATS: s.addr.NATS, ClickHouse: s.addr.ClickHouse,
			ClickHouseHTTP: s.addr.ClickHouseHTTP, DataDir: s.o.Engines.DataDir, Demo: s.upstream != "" && len(s.o.Gateway.Config.Routes) == 0,
		})
	}
	return nil
}
