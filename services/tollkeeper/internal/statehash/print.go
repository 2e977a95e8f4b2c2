package statehash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/session"
)

// ErrDiffers says that somebody came to another state than the ledger gives.
var ErrDiffers = errors.New("the ledger gives another state than was counted")

// Options of an audit.
type Options struct {
	NATS natsconn.Options
	// Wait is how long NATS may not answer; session.DefaultWait when 0.
	Wait time.Duration
	// Only these shards; none: all of them.
	Only []uint32
	// Horizon of foreign events before the ledger says one; 0 means a day.
	Horizon time.Duration
	// JSON writes one object for machines.
	JSON bool
	Out  io.Writer
	// Progress is told of what takes long; nil: nobody is.
	Progress io.Writer
}

// Report is the audit of a ledger.
type Report struct {
	Same   bool    `json:"same"`
	Shards []Shard `json:"shards"`
}

// Print audits and writes what it found. It returns ErrDiffers, after everything
// is written, when a state differs.
func Print(ctx context.Context, o Options) error {
	conn, err := session.Open(ctx, session.Options{NATS: o.NATS, Wait: o.Wait})
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Err(write(conn.Context(), conn, o))
}

func write(ctx context.Context, conn *session.Session, o Options) error {
	geometry := conn.Geometry
	only := o.Only
	if len(only) == 0 {
		for s := range geometry.Shards {
			only = append(only, s)
		}
	}
	a := &Auditor{JS: conn.JS, NC: conn.NC, Shards: geometry.Shards, Currency: geometry.Currency, Horizon: o.Horizon}
	if o.Progress != nil {
		a.Progress = progress(o.Progress, time.Now, geometry.Shards)
	}
	r := Report{Same: true, Shards: []Shard{}}
	// What is named twice is audited once.
	only = slices.Compact(slices.Sorted(slices.Values(only)))
	for _, s := range only {
		if s >= geometry.Shards {
			return fmt.Errorf("there is no shard %d: the ledger has %d, counted from 0", s, geometry.Shards)
		}
		one, err := a.Audit(ctx, s)
		if err != nil {
			return err
		}
		r.Same = r.Same && one.Same()
		r.Shards = append(r.Shards, one)
	}
	var err error
	if o.JSON {
		w := json.NewEncoder(o.Out)
		w.SetIndent("", "  ")
		err = w.Encode(r)
	} else {
		_, err = io.WriteString(o.Out, r.text())
	}
	switch {
	case err != nil:
		return fmt.Errorf("write the audit: %w", err)
	case !r.Same:
		return ErrDiffers
	}
	return nil
}

// Pauses before the first telling and between two.
const (
	firstTelling = 2 * time.Second
	nextTelling  = time.Second
)

// progress tells of what takes long; its loss harms nothing.
func progress(out io.Writer, now func() time.Time, shards uint32) func(shard uint32, done, total uint64) {
	begin, last, n := now(), time.Time{}, uint(0)
	return func(shard uint32, done, total uint64) {
		// The clock is not looked at for every entry.
		if n++; n%64 != 0 {
			return
		}
		if at := now(); at.Sub(begin) >= firstTelling && at.Sub(last) >= nextTelling {
			last = at
			_, _ = fmt.Fprintf(out, "shard %d of %d: %d of %d positions of the ledger\n", shard, shards, min(done, total), total)
		}
	}
}

// text is the report for people.
func (r *Report) text() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	line := func(cells ...any) {
		for i, c := range cells {
			if i > 0 {
				_, _ = fmt.Fprint(w, "\t") // it writes to memory
			}
			_, _ = fmt.Fprint(w, c)
		}
		_, _ = fmt.Fprintln(w)
	}
	line("shard", "position", "entries", "accounts", "time", "snapshot", "aggregator", "state hash")
	entries, took, compared, empty := uint64(0), int64(0), 0, 0
	for i := range r.Shards {
		s := &r.Shards[i]
		entries, took = entries+s.Entries, took+s.Took
		if s.Sequence == 0 && s.Same() {
			empty++
			continue
		}
		verdict := map[string]string{WithSnapshot: "-", WithAggregator: "-"}
		for _, c := range s.Compared {
			if !c.Unreadable {
				compared++
			}
			switch {
			case !c.Same && !c.Unreadable:
				verdict[c.With] = "DIFFERENT"
			case verdict[c.With] == "-" || verdict[c.With] == "unreadable":
				verdict[c.With] = map[bool]string{true: "unreadable", false: "same"}[c.Unreadable]
			}
		}
		line(s.Shard, s.Sequence, s.Entries, s.Accounts, (time.Duration(s.Took) * time.Microsecond).Round(time.Millisecond), verdict[WithSnapshot], verdict[WithAggregator], s.StateHash)
	}
	_ = w.Flush() // to memory
	if empty > 0 {
		fmt.Fprintf(&b, "%d shards without an entry are left out\n", empty)
	}
	fmt.Fprintf(&b, "%d entries folded in %s, %d states compared\n", entries, (time.Duration(took) * time.Microsecond).Round(time.Millisecond), compared)
	for i := range r.Shards {
		s := &r.Shards[i]
		if s.Snapshot != "" {
			fmt.Fprintf(&b, "shard %d: the ledger's beginning is gone, so this is from snapshot %s on\n", s.Shard, s.Snapshot)
		}
		for _, c := range s.Compared {
			if c.Unreadable {
				fmt.Fprintf(&b, "shard %d: snapshot %s at entry %d can't be read: %s\n", s.Shard, c.Name, c.Sequence, c.Difference)
			}
			if c.Same || c.Unreadable {
				continue
			}
			who := "the running aggregator"
			if c.With == WithSnapshot {
				who = "snapshot " + c.Name
			}
			fmt.Fprintf(&b, "\nSHARD %d IS DIFFERENT: at entry %d %s has the state %s, and the ledger gives %s.\n%s\n", s.Shard, c.Sequence, who, c.Hash, c.Replayed, c.Difference)
		}
	}
	switch {
	case !r.Same:
		b.WriteString("\nThe log is the truth: stop the aggregator that differs, delete its snapshots (bucket snapshots) and start it again, so that it counts the ledger anew. Keep the snapshot: it is the evidence.\n")
	case compared == 0:
		b.WriteString("nothing to compare with: no aggregator answers and no snapshot is kept\n")
	default:
		b.WriteString("the ledger gives the state that was counted\n")
	}
	return b.String()
}
