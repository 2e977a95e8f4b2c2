package tollkeeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/applied"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/session"
)

// ApplyOptions of an apply.
type ApplyOptions struct {
	// File is the plans file, YAML or JSON.
	File string
	NATS natsconn.Options
	// Author stands in the ledger.
	Author string
	// DryRun only shows what would change.
	DryRun bool
	// Removals says what becomes of what holds and the file leaves out.
	Removals plans.Removals
	// Confirm is asked when something would change; its error says why nothing is
	// applied.
	Confirm func() error
	Out     io.Writer
	// Wait is how long NATS may not answer; session.DefaultWait when 0.
	Wait time.Duration
	// Stall is after how long without any progress it is given up; 0 is never.
	// Reading what holds may take as long; Confirm may take any time.
	Stall time.Duration
	// Progress is a terminal that shows how far it is when it takes long; nil
	// shows nothing.
	Progress io.Writer
}

// ErrNotConfirmed says that nothing was applied because a person did not want it.
var ErrNotConfirmed = errors.New("nothing was changed")

// Apply shows what a plans file would change and applies it. It returns nil only when the
// file holds, or for a dry run of what would be applied. A file with a
// problem changes nothing; its error (*plans.Error) names file, line and reason. After
// any other error but a *PartialError nothing was changed either, and the error says so.
func Apply(ctx context.Context, o ApplyOptions) error {
	data, err := os.ReadFile(o.File)
	if err != nil {
		return fmt.Errorf("read the plans file: %w", err)
	}
	doc, err := plans.Parse(o.File, data)
	if err != nil {
		return err
	}
	conn, err := session.Open(ctx, session.Options{NATS: o.NATS, Wait: o.Wait})
	if err != nil {
		return unchanged(err)
	}
	defer conn.Close()
	applier := &plans.Applier{JS: conn.JS, NC: conn.NC, Stall: o.Stall}
	conditions := plans.Conditions{Removals: o.Removals}
	diff, err := planToApply(conn.Context(), applier, doc, conditions, o.Stall)
	var removal *plans.RemovalError
	if err != nil && !errors.As(err, &removal) {
		return unchanged(conn.Err(err))
	}
	if diff.Empty() {
		_, err := fmt.Fprintln(o.Out, "nothing would change: the file holds")
		return err
	}
	if _, err := fmt.Fprintln(o.Out, strings.TrimRight(diff.String(), "\n")); err != nil {
		return err
	}
	if removal != nil {
		return fmt.Errorf("%s leaves out %s that hold now; nothing was changed: remove them with --remove, or keep them and apply the rest with --keep", o.File, removal.Totals.Removed())
	}
	if o.DryRun {
		return nil
	}
	if err := o.Confirm(); err != nil {
		return err
	}
	if o.Progress != nil {
		p := &applied.Progress{Out: o.Progress, Now: time.Now}
		defer p.End()
		applier.Progress = p.Show
	}
	if o.Stall > 0 {
		// One answer may take as long as all of it may make no progress.
		if applier.JS, err = jetstream.New(conn.NC, jetstream.WithDefaultTimeout(o.Stall)); err != nil {
			return unchanged(fmt.Errorf("jetstream: %w", err))
		}
	}
	begun := false
	applier.Began = func() { begun = true }
	// What was shown is what is applied, or nothing.
	conditions.Base = &diff.From
	if diff, err = applier.ApplyIf(conn.Context(), doc, o.Author, conditions); err != nil {
		if err = conn.Lost(err); begun {
			return &PartialError{Stall: o.Stall, Err: err}
		}
		return unchanged(err)
	}
	_, err = fmt.Fprintf(o.Out, "applied: version %s\n", diff.To)
	return err
}

// unchanged says of an error that nothing was changed; problems of the file say it
// themselves, since they name what to change in it.
func unchanged(err error) error {
	var problem *plans.Error
	var changed *plans.ChangedError
	if errors.As(err, &problem) || errors.As(err, &changed) {
		return err
	}
	return fmt.Errorf("nothing was changed: %w", err)
}

// PartialError says that an apply failed after it may have changed something.
type PartialError struct {
	Stall time.Duration
	Err   error
}

// Error says what to do.
func (e *PartialError) Error() string {
	var stalled *plans.StalledError
	if errors.As(e.Err, &stalled) || errors.Is(e.Err, context.DeadlineExceeded) {
		return fmt.Sprintf("no progress within %s (--timeout), and perhaps applied in part: apply it again, which completes what was begun; give it longer with --timeout if NATS is slow: %v", e.Stall, e.Err)
	}
	return fmt.Sprintf("perhaps applied in part: apply it again, which completes what was begun: %v", e.Err)
}

// Unwrap returns the cause.
func (e *PartialError) Unwrap() error { return e.Err }

// planToApply gives up after stall, by a cause instead of a deadline: each request to
// NATS keeps the session's, which is shorter.
func planToApply(ctx context.Context, applier *plans.Applier, doc *plans.Document, c plans.Conditions, stall time.Duration) (plans.Diff, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if stall > 0 {
		late := time.AfterFunc(stall, func() {
			cancel(fmt.Errorf("reading what holds took longer than %s: give it longer with --timeout", stall))
		})
		defer late.Stop()
	}
	diff, err := applier.PlanIf(ctx, doc, c)
	if err != nil && ctx.Err() != nil {
		return diff, context.Cause(ctx)
	}
	return diff, err
}
