package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/mattn/go-isatty"

	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
)

type applyCmd struct {
	File       string                 `short:"f" required:"" type:"path" help:"Plans file, YAML or JSON."`
	DryRun     bool                   `help:"Only show what would change; fails if it would be refused."`
	Yes        bool                   `short:"y" help:"Apply without asking."`
	Remove     bool                   `xor:"left-out" help:"Remove accounts, keys, plans and limits that hold and that the file leaves out."`
	Keep       bool                   `xor:"left-out" help:"Keep them. Without --remove or --keep a file that leaves out any changes nothing."`
	Author     string                 `help:"Who does it; stands in the ledger. The user's name when empty."`
	Timeout    time.Duration          `default:"1m" help:"How long it may go on without any progress; all of it may take longer."`
	NATSURL    string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"NATS of the Tollkeeper; the one that runs in the data directory when empty."`
	NATS       config.NATSCredentials `embed:""`
	natsWait   `embed:""`
	DataDir    string `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here."`
	commandLog `embed:""`
}

func (c *applyCmd) Run(ctx context.Context) error {
	log, err := c.Logger("apply")
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
	if c.Author == "" {
		c.Author = "apply"
		if u, err := user.Current(); err == nil {
			c.Author = u.Username
		}
	}
	o := tollkeeper.ApplyOptions{
		File: c.File, NATS: c.NATS.Options(c.NATSURL, "apply", log), Author: c.Author, Out: os.Stdout, DryRun: c.DryRun, Confirm: c.confirm, Wait: c.NATSWait, Stall: c.Timeout,
	}
	switch {
	case c.Remove:
		o.Removals = plans.Remove
	case c.Keep:
		o.Removals = plans.Keep
	}
	if isatty.IsTerminal(os.Stderr.Fd()) {
		o.Progress = os.Stderr
	}
	return tollkeeper.Apply(ctx, o)
}

func (c *applyCmd) confirm() error {
	switch {
	case c.Yes:
		return nil
	case !isatty.IsTerminal(os.Stdin.Fd()):
		return fmt.Errorf("%w: there is no terminal to ask; say --yes to apply it", tollkeeper.ErrNotConfirmed)
	}
	fmt.Print("apply it? [y/N] ")
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil || !strings.EqualFold(strings.TrimSpace(line), "y") {
		return fmt.Errorf("%w: it was not confirmed", tollkeeper.ErrNotConfirmed)
	}
	return nil
}
