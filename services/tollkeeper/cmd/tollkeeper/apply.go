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
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
)

type applyCmd struct {
	File       string                 `short:"f" required:"" type:"path" help:"Plans file, YAML or JSON."`
	DryRun     bool                   `help:"Only show what would change."`
	Yes        bool                   `short:"y" help:"Apply without asking."`
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
		File: c.File, NATS: c.NATS.Options(c.NATSURL, "apply", log), Author: c.Author, Out: os.Stdout, Confirm: c.confirm, Wait: c.NATSWait, Stall: c.Timeout,
	}
	if isatty.IsTerminal(os.Stderr.Fd()) {
		o.Progress = os.Stderr
	}
	return tollkeeper.Apply(ctx, o)
}

func (c *applyCmd) confirm() bool {
	switch {
	case c.DryRun:
		return false
	case c.Yes:
		return true
	case !isatty.IsTerminal(os.Stdin.Fd()):
		fmt.Println("say --yes to apply it: there is nobody here to ask")
		return false
	}
	fmt.Print("apply it? [y/N] ")
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	return err == nil && strings.EqualFold(strings.TrimSpace(line), "y")
}
