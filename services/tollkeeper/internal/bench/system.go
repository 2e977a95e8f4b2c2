package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/aggregator"
	"github.com/tollkeeper/tollkeeper/services/historian"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
)

// start starts engines on a fresh store; synced says whether every frame is forced to disk
// before it is acknowledged.
func start(ctx context.Context, o Options, synced bool) (_ *System, err error) {
	dir, err := os.MkdirTemp("", "tollkeeper-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a scratch directory: %w", err)
	}
	// What was started is stopped in reverse order.
	var stops []func() error
	stop := func() error {
		var err error
		for i := len(stops) - 1; i >= 0; i-- {
			err = errors.Join(err, stops[i]())
		}
		return errors.Join(err, os.RemoveAll(dir))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	engines := engine.Options{
		DataDir: dir, EngineDir: o.EngineDir, NATSListen: "127.0.0.1:0", ClickHouseListen: "127.0.0.1:0", ClickHouseHTTPListen: "127.0.0.1:0",
		Logger: o.Logger, Progress: o.Out,
	}
	if !synced {
		engines.NATSSync = 2 * time.Minute
	}
	bounded := func(f func(context.Context) error) func() error {
		return func() error {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), engine.StopTimeout)
			defer cancel()
			return f(ctx)
		}
	}
	natsd, err := engine.StartNATS(ctx, engines)
	if err != nil {
		return nil, err
	}
	stops = append(stops, bounded(natsd.Stop))
	clickhouse, err := engine.StartClickHouse(ctx, engines, nil)
	if err != nil {
		return nil, err
	}
	stops = append(stops, bounded(clickhouse.Stop))
	s := &System{
		Connect: func(ctx context.Context, name string) (*nats.Conn, error) {
			return natsconn.Connect(ctx, natsconn.Options{URL: natsd.ClientURL(), Name: name, Logger: o.Logger})
		},
		Stop: stop,
	}
	if s.NC, err = s.Connect(ctx, "bench"); err != nil {
		return nil, err
	}
	stops = append(stops, func() error { s.NC.Close(); return nil })
	if s.JS, err = jetstream.New(s.NC, jetstream.WithPublishAsyncMaxPending(1024)); err != nil {
		return nil, fmt.Errorf("jetstream: %w", err)
	}
	if _, err = ledger.Provision(ctx, s.JS, ledger.ProvisionOptions{Shards: o.Shards}); err != nil {
		return nil, err
	}
	ho := engine.History(clickhouse.Addr(), clickhouse.Credentials())
	ho.Logger = o.Logger
	if s.History, err = history.Open(ctx, ho); err != nil {
		return nil, err
	}
	stops = append(stops, s.History.Close)
	s.Apply = func(ctx context.Context, doc *plans.Document) error {
		_, err := (&plans.Applier{JS: s.JS, NC: s.NC}).Apply(ctx, doc, "bench")
		return err
	}
	s.Aggregator = func(ctx context.Context) error {
		return aggregator.Run(ctx, aggregator.Options{NATS: natsconn.Options{URL: natsd.ClientURL(), Logger: o.Logger}, Logger: o.Logger})
	}
	s.Historian = func(ctx context.Context) error {
		return historian.Run(ctx, historian.Options{NATS: natsconn.Options{URL: natsd.ClientURL(), Logger: o.Logger}, ClickHouse: ho, Logger: o.Logger, Registerer: telemetry.NewRegistry()})
	}
	return s, nil
}
