package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/proxied"
)

type benchCmd struct {
	Rounds    int           `default:"5" help:"Rounds a figure; the median is printed."`
	Calls     int           `default:"2000000" help:"Calls of a throughput round."`
	Accounts  int           `default:"100000" help:"Accounts, drawn from a zipf distribution."`
	Crossings int           `default:"200" help:"Crossings of a limit that are timed, idle and under load each."`
	Shards    uint32        `help:"Shards; 0 is the default for one machine."`
	Seed      uint64        `default:"402" help:"Seed of the calls."`
	Callers   int           `default:"32" help:"Callers at once of the proxied calls."`
	Load      time.Duration `default:"3s" help:"How long each proxy is loaded with each kind of call in a round."`
	Import    int           `default:"100000" help:"Accounts that are imported for the part size, at least 2."`
	Kills     int           `default:"3" help:"How often everything is killed and started again with them."`
	Replay    int           `default:"200000" help:"Rows of the trace that is replayed for the part replay, at least 1."`
	Only      []string      `enum:"pipeline,size,replay,proxied" help:"Parts to measure: pipeline, size, replay, proxied; all when empty."`
	EngineDir string        `name:"engine-dir" env:"TOLLKEEPER_ENGINE_DIR" type:"path" help:"Where the ClickHouse engine is installed; the user's cache when empty."`
	LogLevel  string        `name:"log-level" env:"TOLLKEEPER_LOG_LEVEL" default:"warn" help:"trace, debug, info, warn or error."`
	LogFormat string        `name:"log-format" env:"TOLLKEEPER_LOG_FORMAT" default:"auto" help:"auto, console or json."`
}

func (c *benchCmd) Run(ctx context.Context) error {
	log, err := config.Log{LogLevel: c.LogLevel, LogFormat: c.LogFormat}.Logger("bench")
	if err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	return tollkeeper.Bench(ctx, tollkeeper.BenchOptions{
		Rounds: c.Rounds, Calls: c.Calls, Accounts: c.Accounts, Crossings: c.Crossings, Shards: c.Shards, Seed: c.Seed,
		Program: program, Callers: c.Callers, Load: c.Load, Import: max(c.Import, 2), Kills: c.Kills, Replay: max(c.Replay, 1), Parts: c.Only, EngineDir: c.EngineDir, Logger: log, Out: os.Stdout,
	})
}

type benchPartCmd struct {
	Part     string `arg:"" enum:"upstream,bare" help:"upstream or bare."`
	Upstream string `arg:"" optional:"" help:"What the bare proxy sends calls to."`
}

func (c *benchPartCmd) Run(ctx context.Context) error {
	return proxied.Part(ctx, c.Part, c.Upstream)
}
