// Package explanation writes why a decision was made, for people and for
// machines: what `tollkeeper explain` prints.
package explanation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/session"
)

// MaxCalls bounds the calls of one explanation.
const MaxCalls = 100_000

// ErrNotSame says that replaying the ledger gave something else than was decided.
var ErrNotSame = errors.New("the replay does not give what was decided")

// Options of an explanation.
type Options struct {
	// ID of the decision or of the request, as in the decision_id and the request_id of
	// a refusal.
	ID   string
	NATS natsconn.Options
	// Wait is how long NATS may not answer; session.DefaultWait when 0.
	Wait time.Duration
	// Calls is how many of the calls that fed the counter are shown, newest first;
	// at most MaxCalls.
	Calls int
	// Horizon of foreign events, as the aggregator has it; 0 means a day.
	Horizon time.Duration
	// JSON writes one object for machines.
	JSON bool
	Out  io.Writer
	// Progress is told of what takes long; nil: nobody is.
	Progress io.Writer
}

// Print writes why a decision was made. It returns ErrNotSame, after
// everything is written, when replaying the ledger does not give the decision.
func Print(ctx context.Context, o Options) error {
	if o.Calls < 0 || o.Calls > MaxCalls {
		return fmt.Errorf("%d calls: 0 to %d can be shown", o.Calls, MaxCalls)
	}
	conn, err := session.Open(ctx, session.Options{NATS: o.NATS, Wait: o.Wait})
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Err(write(conn.Context(), conn.JS, o))
}

func write(ctx context.Context, js jetstream.JetStream, o Options) error {
	x := explain.New(explain.Options{JS: js, Horizon: o.Horizon})
	q := explain.Query{ID: o.ID, Limit: min(max(o.Calls, 1), explain.MaxPage)}
	if o.Progress != nil {
		q.Progress = func(p explain.Progress) {
			_, _ = fmt.Fprintf(o.Progress, "%s: %d of %d entries\n", p.Stage, p.Done, p.Total) // for people; its loss harms nothing
		}
	}
	e, err := x.Explain(ctx, q)
	if err != nil {
		return err
	}
	for len(e.Calls) < o.Calls && e.NextCursor != "" {
		q.Cursor, q.Limit = e.NextCursor, min(o.Calls-len(e.Calls), explain.MaxPage)
		next, err := x.Explain(ctx, q)
		if err != nil {
			return err
		}
		e.Calls, e.NextCursor = append(e.Calls, next.Calls...), next.NextCursor
	}
	e.Calls = e.Calls[:min(o.Calls, len(e.Calls))]
	if o.JSON {
		err = writeJSON(o.Out, e)
	} else {
		err = writeText(o.Out, e)
	}
	if err == nil && !e.Replay.Same {
		return ErrNotSame
	}
	return err
}

func writeJSON(out io.Writer, e *explain.Explanation) error {
	w := json.NewEncoder(out)
	w.SetIndent("", "  ")
	if err := w.Encode(e); err != nil {
		return fmt.Errorf("write the explanation: %w", err)
	}
	return nil
}

// writeText writes an explanation for people.
func writeText(out io.Writer, e *explain.Explanation) error {
	var b strings.Builder
	d, l := &e.Decision, &e.Limit
	fmt.Fprintf(&b, "%s  %s for %s", strings.ToUpper(d.Verdict), d.LimitID, d.Account)
	if d.Code != "" {
		fmt.Fprintf(&b, "  (%s)", d.Code)
	}
	fmt.Fprintf(&b, "\n%s\n\n", e.Reason.Text)
	fields := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	field := func(name, format string, args ...any) {
		// It writes to memory.
		_, _ = fmt.Fprintf(fields, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	if r := e.Request; r != nil {
		field("refused", "request %s of account %s at %s, answered %d (entry %d)", r.RequestID, r.Account, moment(r.Time), r.Status, r.Sequence)
	}
	field("decision", "%s, revision %d, decided at %s", d.ID, d.Revision, moment(d.DecidedAt))
	field("limit", "%d %s a %s%s, tier %s, of plans version %s", l.Amount, l.Meter, l.Window, filterText(l), l.Tier, l.PlanVersion)
	if l.WarnPercent > 0 {
		field("warns", "at %d (%d percent)", l.WarnAt, l.WarnPercent)
	}
	if d.PeriodEnd != 0 {
		field("window", "%s to %s", moment(d.PeriodStart), moment(d.PeriodEnd))
	} else {
		field("window", "the account's whole life")
	}
	field("counter", "%d before the entry, %d after it", e.Counter.Before, e.Counter.After)
	field("ledger", "stream %s, shard %d, entry %d of %s", e.Entry.Stream, e.Entry.Shard, e.Entry.Sequence, moment(e.Entry.StreamTime))
	field("entry", "%s", entryText(&e.Entry))
	if c := e.Crossing; c != nil {
		field("crossing call", "%s", callIdentity(c))
		field("", "of %s, added %d: %d", moment(c.Time), c.Adds, c.UsedAfter)
	}
	field("fed by", "%s", fedText(&e.Fed))
	if a := e.Allowance; a != nil {
		field("handed out", "%s", allowanceText(a))
	}
	from := "the ledger's beginning"
	if e.Replay.Snapshot != "" {
		from = "snapshot " + e.Replay.Snapshot
	}
	field("replay", "%d entries from %s, in %s", e.Replay.Entries, from, time.Duration(e.Replay.Took)*time.Microsecond)
	if err := fields.Flush(); err != nil {
		return fmt.Errorf("write the explanation: %w", err)
	}
	fmt.Fprintf(&b, "\n%s\n", e.Replay.Text)
	for _, x := range e.Replay.Differences {
		fmt.Fprintf(&b, "  %s: decided %s, replayed %s\n", x.Field, x.Published, x.Replayed)
	}
	if e.Allowance != nil && len(e.Allowance.Leases) > 0 {
		writeLeases(&b, e.Allowance)
	}
	if len(e.Calls) > 0 {
		writeCalls(&b, e)
	}
	if _, err := io.WriteString(out, printable(b.String())); err != nil {
		return fmt.Errorf("write the explanation: %w", err)
	}
	return nil
}

// ended says how a call ended, and whether what it added is an estimate.
func ended(c *explain.Call) string {
	if c.Estimated {
		return strings.TrimSpace(c.Ending + " (estimate)")
	}
	return c.Ending
}

func writeCalls(b *strings.Builder, e *explain.Explanation) {
	fmt.Fprintf(b, "\ncalls that fed the counter, newest first\n")
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "  entry\ttime\taccount\tadds\tused after\trequest\troute\tmodel\tended") // to memory
	for i := range e.Calls {
		c := &e.Calls[i]
		if c.Index < 0 {
			text, who := "(control entry)", ""
			if c.Act != nil {
				text, who = c.Act.What, "by "+c.Act.Author+" ("+c.Act.ID+")"
			}
			_, _ = fmt.Fprintf(w, "  %d\t%s\t%s\t%+d\t%d\t%s\t\t\t\n", c.Sequence, moment(c.StreamTime), text, c.Adds, c.UsedAfter, who)
			continue
		}
		_, _ = fmt.Fprintf(w, "  %d.%d\t%s\t%s\t%+d\t%d\t%s\t%s\t%s\t%s\n", c.Sequence, c.Index, moment(c.Time), c.Account, c.Adds, c.UsedAfter, identityOr(c.RequestID, c.EventID), strings.TrimSpace(c.Method+" "+c.Route), c.Model, ended(c))
	}
	_ = w.Flush() // to memory
	if e.NextCursor != "" {
		fmt.Fprintf(b, "  and more: --calls shows them\n")
	}
}

func writeLeases(b *strings.Builder, a *explain.Allowance) {
	fmt.Fprintf(b, "\nleases at that entry\n")
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "  gateway\tstate\tgranted\tused\treturned\toutstanding\treserved\tbeyond\texpires") // to memory
	for i := range a.Leases {
		l := &a.Leases[i]
		_, _ = fmt.Fprintf(w, "  %s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", l.Gateway, l.State, l.Granted, l.Used, l.Returned, l.Outstanding, l.Held, l.Over, moment(l.Expires))
	}
	_ = w.Flush() // to memory
}

func allowanceText(a *explain.Allowance) string {
	text := fmt.Sprintf("%d used for certain, %d outstanding with %d gateways", a.Settled, a.Outstanding, len(a.Leases))
	if len(a.Leases) == 1 {
		text = strings.TrimSuffix(text, "s")
	}
	for _, f := range [...]struct {
		n    int64
		what string
	}{{a.Dead, "of it with gateways that may not use it any more"}, {a.Exposure, "given up and handed out again"}, {a.Overdraft, "used beyond the amount"}, {int64(a.Waiting), "gateways waiting"}} {
		if f.n != 0 {
			text += fmt.Sprintf("; %d %s", f.n, f.what)
		}
	}
	return text
}

// printable is text without what a terminal would obey: ids, routes and models
// come from outside.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && unicode.IsControl(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

func identityOr(id, other string) string {
	if id != "" {
		return id
	}
	return other
}

func moment(m usage.Micros) string { return m.Time().Format("2006-01-02T15:04:05.000000Z") }

func filterText(l *explain.Limit) string {
	var parts []string
	for _, f := range []struct {
		name string
		list []string
	}{{"models", l.Models}, {"routes", l.Routes}, {"methods", l.Methods}} {
		if len(f.list) > 0 {
			parts = append(parts, f.name+" "+strings.Join(f.list, ", "))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return " for " + strings.Join(parts, "; ")
}

func entryText(e *explain.Entry) string {
	switch {
	case e.Kind == "calls" && e.Producer != "":
		return fmt.Sprintf("frame %d of producer %s at gateway %s, %d calls, sealed at %s", e.Frame, e.Producer, e.Gateway, e.Calls, moment(e.SealedAt))
	case e.Kind == "calls":
		return "an event of a foreign producer"
	case e.Kind == "control":
		return fmt.Sprintf("%s, by %s (%s) at %s", e.What, e.Author, e.ID, moment(e.CreatedAt))
	}
	return e.Kind
}

func callIdentity(c *explain.Call) string {
	id := fmt.Sprintf("index %d", c.Index)
	if c.Producer != "" {
		id += fmt.Sprintf(" of frame %d of producer %s", c.Frame, c.Producer)
	}
	if c.Source != "" {
		id += fmt.Sprintf(", event %s of %s", c.EventID, c.Source)
	}
	if c.RequestID != "" {
		id += ", request " + c.RequestID
	}
	return id + ", account " + c.Account
}

func fedText(f *trace.Fed) string {
	text := fmt.Sprintf("%d calls that added %d, since entry %d", f.Calls, f.Used, f.Since)
	if f.Carried != 0 {
		text += fmt.Sprintf("; %d of before the snapshot", f.Carried)
	}
	if f.Adjusted != 0 {
		text += fmt.Sprintf("; %+d by control entries", f.Adjusted)
	}
	if f.Reported != 0 {
		text += fmt.Sprintf("; %+d that gateways said they used of their leases", f.Reported)
	}
	if f.Unexplained != 0 {
		text += fmt.Sprintf("; %+d UNEXPLAINED", f.Unexplained)
	}
	return text
}
