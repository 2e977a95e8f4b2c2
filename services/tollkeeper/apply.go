package tollkeeper

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/schollz/progressbar/v3"

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
	// Stall is after how long without any progress it is given up; 0 is never.
	// Connecting and reading what holds may each take as long; Confirm may take
	// any time.
	Stall time.Duration
	// Progress is a terminal that shows how far it is when it takes long; nil
	// shows nothing.
	Progress io.Writer
}

// progressAfter is from when on a person wants to see that it gets on.
const progressAfter = 2 * time.Second

// applyProgress draws a bar when applying takes long.
type applyProgress struct {
	out   io.Writer
	now   func() time.Time
	begun time.Time
	bar   *progressbar.ProgressBar
}

// show is called with how much is done; total is 0 when that is not known.
func (p *applyProgress) show(done, total int) {
	now := p.now()
	if p.begun.IsZero() {
		p.begun = now
	}
	if total == 0 || now.Sub(p.begun) < progressAfter {
		return
	}
	if p.bar == nil {
		p.bar = progressbar.NewOptions(total, progressbar.OptionSetWriter(p.out), progressbar.OptionSetDescription("entries and records"),
			progressbar.OptionShowCount(), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	p.bar.ChangeMax(total)
	_ = p.bar.Set(done) // for people; its loss harms nothing
}

// end takes the bar away.
func (p *applyProgress) end() {
	if p.bar != nil {
		_ = p.bar.Clear() // as above
	}
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
	nc, js, err := connectToApply(ctx, o)
	if err != nil {
		return err
	}
	defer nc.Close()
	applier := &plans.Applier{JS: js, NC: nc, Stall: o.Stall}
	diff, err := planToApply(ctx, applier, doc, o.Stall)
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
	if o.Progress != nil {
		p := &applyProgress{out: o.Progress, now: time.Now}
		defer p.end()
		applier.Progress = p.show
	}
	if diff, err = applier.Apply(ctx, doc, o.Author); err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.Out, "applied: version %s\n", diff.To)
	return err
}

// bounded is ctx for one step that must be done within d; 0 is no bound.
func bounded(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

func connectToApply(ctx context.Context, o ApplyOptions) (*nats.Conn, jetstream.JetStream, error) {
	ctx, cancel := bounded(ctx, o.Stall)
	defer cancel()
	nc, err := natsconn.Connect(ctx, o.NATS)
	if err != nil {
		return nil, nil, err
	}
	var opts []jetstream.JetStreamOpt
	if o.Stall > 0 {
		// One answer may take as long as all of it may make no progress.
		opts = append(opts, jetstream.WithDefaultTimeout(o.Stall))
	}
	js, err := jetstream.New(nc, opts...)
	if err != nil {
		nc.Close()
		return nil, nil, fmt.Errorf("jetstream: %w", err)
	}
	return nc, js, nil
}

func planToApply(ctx context.Context, applier *plans.Applier, doc *plans.Document, stall time.Duration) (plans.Diff, error) {
	ctx, cancel := bounded(ctx, stall)
	defer cancel()
	return applier.Plan(ctx, doc)
}
