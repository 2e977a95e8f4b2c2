package tollkeeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/aggregator"
	"github.com/tollkeeper/tollkeeper/services/historian"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/bench"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/proxied"
)

// BenchOptions of a bench.
type BenchOptions struct {
	Rounds, Calls, Accounts, Crossings int
	Shards                             uint32
	Seed                               uint64
	EngineDir                          string
	// Program is this program's file: what is measured in processes of its own is it.
	Program string
	// Callers at once of the proxied calls, and how long each proxy is loaded with
	// each kind of call in a round.
	Callers int
	Load    time.Duration
	// Parts to measure; all when empty.
	Parts  []string
	Logger zerolog.Logger
	Out    io.Writer
}

// The parts of a bench.
const (
	BenchPipeline = "pipeline" // publish, count, keep, decide, admit
	BenchProxied  = "proxied"  // calls through the gateway
)

// Bench measures the pipeline beside the raw limits of what it stands on, on
// engines of its own in a scratch directory.
func Bench(ctx context.Context, o BenchOptions) error {
	if o.Shards == 0 {
		o.Shards = ledger.DefaultLocalShards
	}
	wanted := func(part string) bool { return len(o.Parts) == 0 || slices.Contains(o.Parts, part) }
	if wanted(BenchPipeline) {
		if err := bench.Run(ctx, bench.Options{
			Rounds: o.Rounds, Calls: o.Calls, Accounts: o.Accounts, Shards: o.Shards, Crossings: o.Crossings, Seed: o.Seed, Logger: o.Logger, Out: o.Out,
			System: func(ctx context.Context, synced bool) (*bench.System, error) { return benchSystem(ctx, o, synced) },
		}); err != nil {
			return err
		}
	}
	if !wanted(BenchProxied) {
		return nil
	}
	return proxied.Run(ctx, proxied.Options{
		Rounds: o.Rounds, Each: o.Load, Callers: o.Callers, Program: o.Program, EngineDir: o.EngineDir, Out: o.Out,
		Running: func(dir string) (string, string, bool, error) {
			a, ok, err := Running(dir)
			return a.Gateway, a.GatewayAdmin, ok, err
		},
	})
}

// BenchPart serves a part of the bench that has a process of its own; see
// proxied.Part.
func BenchPart(ctx context.Context, name, upstream string) error {
	return proxied.Part(ctx, name, upstream)
}

func benchSystem(ctx context.Context, o BenchOptions, synced bool) (_ *bench.System, err error) {
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
	s := &bench.System{
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
	ho := engineHistory(clickhouse.Addr(), clickhouse.Credentials())
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
