// Package console is the HTTP API and the page: what the accounts are, what they
// used, what holds, what happened, how everything is. It reads what the other
// services publish and changes nothing but the plans, and usage by corrections.
package console

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/console/internal/conservation"
	"github.com/tollkeeper/tollkeeper/services/console/internal/counters"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/console/internal/late"
	"github.com/tollkeeper/tollkeeper/services/console/internal/tail"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// DefaultListen is where the console listens.
const DefaultListen = "127.0.0.1:8402"

// DefaultMaxStreams bounds the clients of /v1/live.
const DefaultMaxStreams = 64

// Peer is another service, whose /readyz says how it is.
type Peer struct {
	// Name is one of the parts of /v1/health: gateway, aggregator, historian,
	// alerter, auditor.
	Name string
	// URL of its /readyz.
	URL string
}

// Options of a console.
type Options struct {
	// Listen is "host:port"; DefaultListen when empty. Flag is the name, without
	// dashes, of the flag it came from; console-listen when empty.
	Listen string
	Flag   string
	// Token, if set, is the bearer token that changing anything needs and,
	// where other machines can reach Listen, reading too. Without it only a
	// loopback address is possible.
	Token string

	// NATS says where NATS is.
	NATS natsconn.Options
	// Shards of a ledger that does not exist yet; 0 is the ledger's default.
	Shards uint32
	// Currency of the costs of such a ledger (ISO 4217); usage.DefaultCurrency when
	// empty.
	Currency string
	// Replicas of streams that do not exist yet.
	Replicas int

	// History answers what ClickHouse knows. When nil, ClickHouse is opened; when
	// that has no address either, there is no history.
	History    History
	ClickHouse history.Options
	// Peers are asked for their readiness.
	Peers []Peer
	// Web is the built page; nil: the one that is embedded.
	Web fs.FS

	Logger   zerolog.Logger
	Registry *prometheus.Registry // nil: one of its own
	// Readiness hears of the console's parts ("console"; "nats" and "clickhouse"
	// unless their Readiness is set), and is shown under /readyz and /v1/health; nil:
	// one of its own. In a process of several services they share it.
	Readiness *telemetry.Readiness
	// Horizon of foreign events, as the aggregator has it, for replays of the
	// ledger; 0 means a day.
	Horizon time.Duration
	// MaxStreams bounds the clients of /v1/live; DefaultMaxStreams when 0.
	MaxStreams int
	// Ready, if set, is called with the address once the port is open.
	Ready func(net.Addr)
}

type console struct {
	o         Options
	nc        *nats.Conn
	js        jetstream.JetStream
	shards    uint32
	counters  *counters.Client
	audit     *conservation.Source
	applier   *plans.Applier
	explainer *explain.Explainer
	corrector *corrections.Submitter
	tail      *tail.Tail
	state     *state
	metrics   *front.Metrics
	log       zerolog.Logger
	done      context.Context // ends the streams
}

// Run serves until ctx is done and returns nil after a clean stop. It waits for
// NATS with the port open and /readyz saying so.
func Run(ctx context.Context, o Options) error {
	if o.Listen == "" {
		o.Listen = DefaultListen
	}
	if o.Flag == "" {
		o.Flag = "console-listen"
	}
	if o.MaxStreams <= 0 {
		o.MaxStreams = DefaultMaxStreams
	}
	if o.Registry == nil {
		o.Registry = prometheus.NewRegistry()
	}
	if o.Readiness == nil {
		o.Readiness = telemetry.NewReadiness()
		if err := o.Registry.Register(o.Readiness); err != nil {
			return fmt.Errorf("console: %w", err)
		}
	}
	if o.Web == nil {
		web, err := embeddedPage()
		if err != nil {
			return err
		}
		o.Web = web
	}
	listener, err := telemetry.Listen(o.Flag, o.Listen, o.Token != "")
	if err != nil {
		return err
	}
	m, err := front.NewMetrics(o.Registry)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	ready := o.Readiness.Component("console")
	if o.NATS.Readiness == nil {
		o.NATS.Readiness = o.Readiness.Component("nats")
	}
	if o.NATS.Name == "" {
		o.NATS.Name = "tollkeeper-console"
	}

	group, ctx := errgroup.WithContext(ctx)
	if o.History == nil && len(o.ClickHouse.Addrs) > 0 {
		if o.ClickHouse.Readiness == nil {
			o.ClickHouse.Readiness = o.Readiness.Component("clickhouse")
		}
		opened := &late.History{}
		o.History = opened
		group.Go(func() error { return opened.Run(ctx, o.ClickHouse) })
	}
	gate := &front.LateHandler{}
	_, _, loopback, err := telemetry.CheckAddr(listener.Addr().String())
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	guard := &front.Guard{Token: o.Token, Loopback: loopback, Metrics: m}
	gate.Set(guard.Wrap(waitingHandler(o)))
	group.Go(func() error {
		return telemetry.Serve(ctx, telemetry.ServeOptions{Flag: o.Flag, Listener: listener, Handler: gate, Authenticates: true, Ready: o.Ready})
	})
	group.Go(func() error {
		ready.NotReady("waiting for NATS")
		nc, err := natsconn.Connect(ctx, o.NATS)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			return fmt.Errorf("console: %w", err)
		}
		geometry, err := provision(ctx, js, o, ready)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		c := &console{
			o: o, nc: nc, js: js, shards: geometry.Shards, metrics: m, log: o.Logger, done: ctx,
			counters: &counters.Client{NC: nc, Shards: geometry.Shards}, audit: &conservation.Source{JS: js, Log: o.Logger}, applier: &plans.Applier{JS: js, NC: nc},
			explainer: explain.New(explain.Options{JS: js, Horizon: o.Horizon}),
		}
		c.state = newState()
		c.audit.HistoryAway = c.historyAway
		c.corrector = &corrections.Submitter{JS: js, NC: nc, Shards: geometry.Shards, Plans: c.correctable, Horizon: o.Horizon}
		c.tail = tail.New(o.Logger)
		gate.Set(guard.Wrap(c.handler()))
		ready.OK()
		return c.run(ctx)
	})
	return group.Wait()
}

// provision makes what is missing and waits for JetStream, which may have no
// leader yet.
func provision(ctx context.Context, js jetstream.JetStream, o Options, ready *telemetry.Component) (ledger.Geometry, error) {
	pause := 100 * time.Millisecond
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		g, err := ledger.Provision(try, js, ledger.ProvisionOptions{Shards: o.Shards, Currency: o.Currency, Replicas: o.Replicas})
		cancel()
		if err == nil {
			return g, nil
		}
		ready.NotReady("waiting for the ledger's streams: " + err.Error())
		select {
		case <-ctx.Done():
			return ledger.Geometry{}, ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// run feeds the views until ctx is done.
func (c *console) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	sub, err := c.nc.Subscribe(ledger.AllBeacons, func(m *nats.Msg) {
		if err := c.state.beacons.Hear(m.Data, time.Now()); err != nil {
			c.log.Warn().Err(err).Msg("a beacon can't be read")
		}
	})
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }() // the connection may be gone, and with it the subscription
	mirror := ledger.NewMirror(c.nc, c.js, ledger.MirrorOptions{Bucket: ledger.DecisionsBucket}, &c.state.decisions)
	group.Go(func() error { return mirror.Run(ctx) })
	group.Go(func() error { return c.tail.Run(ctx, c.js) })
	group.Go(func() error {
		return c.follow(ctx, ledger.AlertsStream, alertsRead, &c.state.alertsAt, func(m ledger.Message) {
			if err := c.state.alerts.Hear(m.Data); err != nil {
				c.log.Warn().Err(err).Uint64("sequence", m.Sequence).Msg("an alert can't be read")
			}
		})
	})
	group.Go(func() error {
		return c.follow(ctx, ledger.DeadLetterStream, deadLettersRead, &c.state.deadAt, func(m ledger.Message) { c.state.dead.Hear(&m) })
	})
	group.Go(func() error { return c.produce(ctx) })
	group.Go(func() error { return c.watchParts(ctx) })
	group.Go(func() error {
		return c.applier.KeepFinished(ctx, time.Minute, func(err error) {
			c.log.Warn().Err(err).Msg("plans that were left half applied could not be completed yet")
		})
	})
	return group.Wait()
}

// How far back small streams are read at the start.
const (
	alertsRead      = 2000
	deadLettersRead = 10_000
)

// follow reads a stream from its newest entries on, for ever, and stores up to where.
func (c *console) follow(ctx context.Context, name string, back uint64, position *atomic.Uint64, hear func(ledger.Message)) error {
	var next uint64
	for ctx.Err() == nil {
		if err := c.startOf(ctx, name, back, &next); err == nil {
			err = ledger.Read(ctx, c.js, ledger.ReadOptions{Stream: name, From: next}, func(m ledger.Message) error {
				hear(m)
				next = m.Sequence + 1
				position.Store(m.Sequence)
				return nil
			})
			// The stream drops its oldest entries: those we did not get to are
			// gone, and the newest are what is shown.
			if err != nil && !errors.Is(err, ledger.ErrPurged) {
				return fmt.Errorf("read %s: %w", name, err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// startOf moves next to where reading can begin.
func (c *console) startOf(ctx context.Context, name string, back uint64, next *uint64) error {
	ask, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := c.js.Stream(ask, name)
	if err != nil {
		return fmt.Errorf("stream %s: %w", name, err)
	}
	at := s.CachedInfo().State
	from := at.FirstSeq
	if at.LastSeq >= back {
		from = max(from, at.LastSeq-back+1)
	}
	*next = max(*next, from)
	return nil
}
