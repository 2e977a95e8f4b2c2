package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
)

type correctCmd struct {
	Account    string                 `required:"" help:"Whose own usage is corrected."`
	Meter      []string               `required:"" sep:"none" help:"Meter and what is added to it, signed, such as calls=-3; once for each meter." placeholder:"METER=±N"`
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
	natsWait   `embed:""`
	DataDir    string `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here."`
	commandLog `embed:""`
}

func (c *correctCmd) Run(ctx context.Context) error {
	log, err := c.Logger("correct")
	if err != nil {
		return err
	}
	act := corrections.Act{
		Author: c.Author, Account: c.Account, Time: c.Time, Model: c.Model, Route: c.Route, Method: c.Method,
		Reason: c.Reason, Reference: c.Reference,
	}
	if act.Adjustments, err = adjustments(c.Meter); err != nil {
		return err
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
	err = tollkeeper.Correct(ctx, tollkeeper.CorrectOptions{Act: act, NATS: c.NATS.Options(c.NATSURL, "correct", log), Wait: c.NATSWait, Horizon: c.Horizon, JSON: c.JSON, Out: os.Stdout})
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("not done within %s: %w", c.Timeout, err)
	}
	return err
}

// adjustments reads METER=±N. A meter that is named twice is refused: which of the two
// is meant, or their sum, nobody can say.
func adjustments(list []string) (map[usage.Meter]int64, error) {
	out := make(map[usage.Meter]int64, len(list))
	for _, s := range list {
		name, number, _ := strings.Cut(s, "=")
		n, err := strconv.ParseInt(number, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("--meter %q: write a meter and what is added to it, such as calls=-3", s)
		}
		if _, twice := out[usage.Meter(name)]; twice {
			return nil, fmt.Errorf("--meter %s is given twice: add up what is meant", name)
		}
		out[usage.Meter(name)] = n
	}
	return out, nil
}
