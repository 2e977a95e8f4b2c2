package tollkeeper

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// ApplyOptions of an apply.
type ApplyOptions struct {
	// File is the plans file, YAML or JSON.
	File string
	NATS natsconn.Options
	// Author stands in the ledger.
	Author string
	// Confirm is asked when something would change; applying goes on when it
	// returns true.
	Confirm func() bool
	Out     io.Writer
}

// Apply shows what a plans file would change and applies it. A file with a
// problem changes nothing; its error (*plans.Error) names file, line and reason.
func Apply(ctx context.Context, o ApplyOptions) error {
	data, err := os.ReadFile(o.File)
	if err != nil {
		return fmt.Errorf("read the plans file: %w", err)
	}
	doc, err := plans.Parse(o.File, data)
	if err != nil {
		return err
	}
	nc, err := natsconn.Connect(ctx, o.NATS)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("jetstream: %w", err)
	}
	applier := &plans.Applier{JS: js, NC: nc}
	diff, err := applier.Plan(ctx, doc)
	if err != nil {
		return err
	}
	if diff.Empty() {
		_, err := fmt.Fprintln(o.Out, "nothing would change: the file is what holds")
		return err
	}
	if _, err := fmt.Fprintln(o.Out, strings.TrimRight(diff.String(), "\n")); err != nil {
		return err
	}
	if !o.Confirm() {
		_, err := fmt.Fprintln(o.Out, "nothing was changed")
		return err
	}
	if diff, err = applier.Apply(ctx, doc, o.Author); err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.Out, "applied: version %s\n", diff.To)
	return err
}
