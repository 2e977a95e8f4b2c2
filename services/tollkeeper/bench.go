package tollkeeper

import (
	"context"
	"io"
	"slices"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/bench"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/proxied"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replayed"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/sized"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
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
	// Import is how many accounts are imported, Kills how often everything is killed then.
	Import, Kills int
	// Replay is how many rows are replayed.
	Replay int
	// Parts to measure; all when empty.
	Parts  []string
	Logger zerolog.Logger
	Out    io.Writer
}

// The parts of a bench.
const (
	BenchPipeline = "pipeline" // publish, count, keep, decide, admit
	BenchProxied  = "proxied"  // calls through the gateway
	BenchSize     = "size"     // import, memory and restart with many accounts
	BenchReplay   = "replay"   // rows of a trace through everything
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
			Rounds: o.Rounds, Calls: o.Calls, Accounts: o.Accounts, Shards: o.Shards, Crossings: o.Crossings, Seed: o.Seed, EngineDir: o.EngineDir, Logger: o.Logger, Out: o.Out,
		}); err != nil {
			return err
		}
	}
	if wanted(BenchSize) {
		if err := sized.Run(ctx, sized.Options{Accounts: o.Import, Kills: o.Kills, Program: o.Program, EngineDir: o.EngineDir, Out: o.Out}); err != nil {
			return err
		}
	}
	if wanted(BenchReplay) {
		if err := replayed.Run(ctx, replayed.Options{Rows: o.Replay, Seed: o.Seed, Out: o.Out, Replay: func(ctx context.Context, rows []trace.Row) (*replay.Report, error) {
			return ReplayInto(ctx, ReplayTarget{Isolated: true, EngineDir: o.EngineDir, Out: io.Discard, Logger: o.Logger}, ReplayOptions{Rows: rows})
		}}); err != nil {
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
