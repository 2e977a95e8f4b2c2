package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/explanation"
)

type explainCmd struct {
	ID         string                 `arg:"" name:"id" help:"The decision_id or the request_id of a refusal."`
	Calls      int                    `default:"20" help:"How many of the calls that fed the counter are shown, newest first."`
	JSON       bool                   `name:"json" help:"One JSON object instead of text."`
	Timeout    time.Duration          `default:"10m" help:"How long it may take."`
	Horizon    time.Duration          `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long the aggregator remembers events of foreign producers."`
	NATSURL    string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"NATS of the Tollkeeper; the one that runs in the data directory when empty."`
	NATS       config.NATSCredentials `embed:""`
	natsWait   `embed:""`
	DataDir    string `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here."`
	commandLog `embed:""`
}

func (c *explainCmd) Run(ctx context.Context) error {
	log, err := c.Logger("explain")
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
	err = explanation.Print(ctx, explanation.Options{
		ID: c.ID, NATS: c.NATS.Options(c.NATSURL, "explain", log), Wait: c.NATSWait, Calls: c.Calls, Horizon: c.Horizon, JSON: c.JSON, Out: os.Stdout, Progress: os.Stderr,
	})
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("not done within %s: give it longer with --timeout: %w", c.Timeout, err)
	}
	return err
}
