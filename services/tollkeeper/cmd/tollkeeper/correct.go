package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
)

type correctCmd struct {
	Account    string                 `required:"" help:"Whose own usage is corrected."`
	Meter      map[string]int64       `required:"" help:"Meter and what is added to it, signed, such as calls=-3; once for each meter." placeholder:"METER=±N"`
	Time       time.Time              `help:"When it was used, such as 2026-11-20T12:30:00Z: says which windows it belongs to. Now when empty."`
	Model      string                 `help:"Model of the usage, for limits with a filter."`
	Route      string                 `help:"Route of the usage, for limits with a filter."`
	Method     string                 `help:"Method of the usage, for limits with a filter."`
	Reason     string                 `required:"" help:"Why, for those who read it later."`
	Reference  string                 `help:"What is corrected: an event, a decision, an invoice."`
	ID         string                 `name:"id" help:"Identity of the act, a ksuid: the same one twice is one correction. A new one when empty."`
	Author     string                 `help:"Who does it; stands in the ledger. The user's name when empty."`
	JSON       bool                   `name:"json" help:"One JSON object instead of text."`
	Timeout    time.Duration          `default:"1m" help:"How long it may take."`
	Horizon    time.Duration          `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long the aggregator remembers acts and events of foreign producers."`
	NATSURL    string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"NATS of the Tollkeeper; the one that runs in the data directory when empty."`
	NATS       config.NATSCredentials `embed:""`
	DataDir    string                 `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here."`
	config.Log `embed:""`
}

func (c *correctCmd) Run(ctx context.Context) error {
	log, err := c.Logger("correct")
	if err != nil {
		return err
	}
	act := corrections.Act{
		Author: c.Author, Account: c.Account, Time: c.Time, Model: c.Model, Route: c.Route, Method: c.Method,
		Adjustments: make(map[usage.Meter]int64, len(c.Meter)), Reason: c.Reason, Reference: c.Reference,
	}
	for m, n := range c.Meter {
		act.Adjustments[usage.Meter(m)] = n
	}
	if c.ID != "" {
		if act.ID, err = ksuid.Parse(c.ID); err != nil {
			return fmt.Errorf("--id %q is not a ksuid, which has 27 letters and digits: leave it out for a new one", c.ID)
		}
	}
	if act.Author == "" {
		act.Author = "correct"
		if u, err := user.Current(); err == nil {
			act.Author = u.Username
		}
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
	err = tollkeeper.Correct(ctx, tollkeeper.CorrectOptions{Act: act, NATS: c.NATS.Options(c.NATSURL, "correct", log), Horizon: c.Horizon, JSON: c.JSON, Out: os.Stdout})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("not done within %s: %w", c.Timeout, err)
	}
	return err
}
