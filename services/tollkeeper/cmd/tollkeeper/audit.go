package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/statehash"
)

type auditCmd struct {
	Shard      []uint32               `help:"Only this shard; may be given several times. All of them when absent."`
	JSON       bool                   `name:"json" help:"One JSON object instead of text."`
	Timeout    time.Duration          `default:"1h" help:"How long it may take."`
	Horizon    time.Duration          `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long the aggregator remembered events of foreign producers before the ledger began to say so itself."`
	NATSURL    string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"NATS of the Tollkeeper; the one that runs in the data directory when empty."`
	NATS       config.NATSCredentials `embed:""`
	natsWait   `embed:""`
	DataDir    string `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here."`
	commandLog `embed:""`
}

func (c *auditCmd) Run(ctx context.Context) error {
	log, err := c.Logger("audit")
	if err != nil {
		return err
	}
	if c.NATSURL == "" {
		a, ok, err := tollkeeper.Running(c.DataDir)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("no Tollkeeper runs in %s: start one (tollkeeper up), or name its NATS with --nats-url", c.DataDir)
		}
		c.NATSURL = a.NATS
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	err = statehash.Print(ctx, statehash.Options{
		NATS: c.NATS.Options(c.NATSURL, "audit", log), Wait: c.NATSWait, Only: c.Shard, Horizon: c.Horizon, JSON: c.JSON, Out: os.Stdout, Progress: os.Stderr,
	})
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("not done within %s: give it longer with --timeout: %w", c.Timeout, err)
	}
	return err
}
