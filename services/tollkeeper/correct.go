package tollkeeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/session"
)

// CorrectOptions of a correction.
type CorrectOptions struct {
	Act  corrections.Act
	NATS natsconn.Options
	// Wait is how long NATS may not answer; session.DefaultWait when 0.
	Wait time.Duration
	// Horizon of acts, as the aggregator has it; 0 means a day.
	Horizon time.Duration
	// JSON writes one object for machines.
	JSON bool
	Out  io.Writer
}

// Correct makes a correction and says what came of it. Refusals are of type
// *corrections.Error; nothing was changed then.
func Correct(ctx context.Context, o CorrectOptions) error {
	conn, err := session.Open(ctx, session.Options{NATS: o.NATS, Wait: o.Wait})
	if err != nil {
		return fmt.Errorf("nothing was corrected: %w", err)
	}
	defer conn.Close()
	s := &corrections.Submitter{JS: conn.JS, NC: conn.NC, Shards: conn.Geometry.Shards, Horizon: o.Horizon}
	r, err := s.Submit(conn.Context(), o.Act)
	var (
		refused *corrections.Error
		unclear *corrections.UnclearError
	)
	switch {
	case errors.As(err, &refused), err == nil:
	case errors.As(err, &unclear):
		unclear.Err = conn.Err(unclear.Err)
	default:
		err = fmt.Errorf("nothing was corrected: %w", conn.Err(err))
	}
	if err != nil {
		return err
	}
	if o.JSON {
		w := json.NewEncoder(o.Out)
		w.SetIndent("", "  ")
		if err := w.Encode(r); err != nil {
			return fmt.Errorf("write the correction: %w", err)
		}
		return nil
	}
	_, err = io.WriteString(o.Out, correctionText(&r, &o.Act))
	return err
}

func correctionText(r *corrections.Result, a *corrections.Act) string {
	var b strings.Builder
	what := make([]string, 0, len(a.Adjustments))
	for _, m := range slices.Sorted(maps.Keys(a.Adjustments)) {
		what = append(what, fmt.Sprintf("%s %+d", m, a.Adjustments[m]))
	}
	if r.Repeated {
		fmt.Fprintf(&b, "made before: nothing was changed now (%s of %s)\n", strings.Join(what, ", "), r.Account)
	} else {
		fmt.Fprintf(&b, "corrected: %s of %s\n", strings.Join(what, ", "), r.Account)
	}
	fmt.Fprintf(&b, "id %s, entry %d of the ledger (shard %d)\n", r.ID, r.Sequence, r.Shard)
	switch {
	case !r.Counted:
		b.WriteString("it stands in the ledger, and was not counted yet: look again when an aggregator runs\n")
	case r.Usage != nil:
		for _, l := range r.Usage.Limits {
			fmt.Fprintf(&b, "%s: %d of %d %s, %s\n", l.LimitID, l.Used, l.Amount, l.Meter, l.Verdict)
		}
	}
	return b.String()
}
