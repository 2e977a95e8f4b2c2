package explain

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
)

// fetchers read entries of a page at once.
const fetchers = 8

// replayed is an explanation without a page, and where its calls stand.
type replayed struct {
	explanation Explanation
	below       trace.Position // every indexed call stands before it
	rows        []trace.Row    // oldest first
	dropped     bool           // there are older ones
}

// before returns how many of the indexed calls stand before a position.
func (r *replayed) before(below trace.Position) int {
	return sort.Search(len(r.rows), func(i int) bool { return !r.rows[i].Less(below) })
}

// covers reports whether a page can be cut out of the index.
func (r *replayed) covers(below trace.Position, limit int) bool {
	return !r.below.Less(below) && (!r.dropped || r.before(below) > limit)
}

// page returns calls before a position, newest first.
func (r *replayed) page(below trace.Position, limit int) (rows []trace.Row, next string) {
	n := r.before(below)
	rows = make([]trace.Row, 0, min(limit, n))
	for i := n - 1; i >= 0 && len(rows) < limit; i-- {
		rows = append(rows, r.rows[i])
	}
	if n > limit || r.dropped && len(rows) > 0 {
		next = rows[len(rows)-1].String()
	}
	return rows, next
}

// replay finds a decision and replays its shard up to it.
func (x *Explainer) replay(ctx context.Context, id ksuid.KSUID, below trace.Position, p *progress) (*replayed, error) {
	begin := time.Now()
	d, err := x.find(ctx, id, p)
	if err != nil {
		return nil, err
	}
	stream, state, err := x.ledger(ctx)
	if err != nil {
		return nil, err
	}
	if err := present(ctx, stream, state, &d.Decision); err != nil {
		return nil, err
	}
	// All that fed the counter stands from here on.
	all := uint64(1)
	if start, end := trace.Window(&d.Decision); end != 0 {
		if all, err = sequenceAt(ctx, stream, state, start.Time()); err != nil {
			return nil, err
		}
	}
	b, err := x.base(ctx, d.Shard, all, d.Revision)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return nil, purged(&d.Decision, state.FirstSeq, usage.At(state.FirstTime))
	}
	t := trace.New(b.trace(&d.Decision, below))
	r := &replayed{below: below}
	e := &r.explanation
	e.Request = d.request
	e.Decision, e.Limit = decisionOf(&d.Decision), limitOf(&d.Decision)
	e.Replay = Replay{Published: d.published, Snapshot: b.snapshot, From: b.state.Sequence() + 1}
	from, to := e.Replay.From, d.Revision
	err = x.read(ctx, ledger.Stream, ledger.ShardSubjects(d.Shard), from, to, func(m *ledger.Message) error {
		p.at("replaying the ledger", m.Sequence-from, to-from+1)
		if err := t.Apply(m); err != nil {
			return err
		}
		if m.Sequence == to {
			describe(t, &d.Decision, e, m)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if b.state.Sequence() != to {
		return nil, fmt.Errorf("entry %d of shard %d could not be read: %w", to, d.Shard, ledger.ErrRewound)
	}
	judge(t, e, &d)
	e.Replay.Entries, e.Replay.Took = t.Entries, time.Since(begin).Microseconds()
	r.rows, r.dropped = t.Rows()
	return r, nil
}

// present makes sure that the entry which led to a decision is there.
func present(ctx context.Context, stream jetstream.Stream, state jetstream.StreamState, d *usage.Decision) error {
	if d.Revision < state.FirstSeq {
		return purged(d, state.FirstSeq, usage.At(state.FirstTime))
	}
	m, err := stream.GetMsg(ctx, d.Revision)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return fmt.Errorf("the decision names entry %d, which the ledger does not have: it ends at %d: %w", d.Revision, state.LastSeq, ledger.ErrRewound)
	case err != nil:
		return fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	if _, shard, err := ledger.ParseSubject(m.Subject); err != nil || shard != d.Shard {
		return fmt.Errorf("the decision names entry %d of shard %d, but that stands on %s: %w", d.Revision, d.Shard, m.Subject, ledger.ErrRewound)
	}
	return nil
}

// describe notes what the entry is that led to the decision.
func describe(t *trace.Trace, d *usage.Decision, e *Explanation, m *ledger.Message) {
	e.Counter = Counter{Before: t.Before, After: t.After}
	e.Allowance = allowanceOf(t.Allowance, t.Holdings)
	e.Entry = Entry{Stream: ledger.Stream, Shard: d.Shard, Sequence: m.Sequence, StreamTime: usage.At(m.Time)}
	kind, _, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		return
	}
	switch kind {
	case ledger.KindCalls:
		f := &t.Decoder.Frame
		e.Entry.Kind, e.Entry.Gateway, e.Entry.SealedAt, e.Entry.Calls = "calls", f.Gateway, f.SealedAt, f.N
		if f.Producer != ksuid.Nil {
			e.Entry.Producer, e.Entry.Frame = f.Producer.String(), f.Number
		}
	case ledger.KindControl, ledger.KindClosing:
		e.Entry.Kind = "control"
		if c := t.Decoder.Control; c != nil {
			e.Entry.ID, e.Entry.Author, e.Entry.CreatedAt, e.Entry.What = c.GetId(), c.GetAuthor(), usage.Micros(c.GetCreatedAtUnixMicros()), what(c)
		}
	case ledger.KindLease:
		e.Entry.Kind = "lease"
	}
	if t.Crossing != nil {
		c := callOf(&t.Decoder.Frame, *t.Crossing, e.Entry.StreamTime)
		e.Crossing = &c
	}
	e.Reason = reason(t, d, e)
}

// what says what a control entry does.
func what(c *tollkeeperv1.ControlEntry) string {
	switch body := c.GetBody().(type) {
	case *tollkeeperv1.ControlEntry_PlanSet:
		return "plans of version " + body.PlanSet.GetVersion()
	case *tollkeeperv1.ControlEntry_AccountSet:
		return fmt.Sprintf("%d accounts set", len(body.AccountSet.GetAccounts()))
	case *tollkeeperv1.ControlEntry_ProducerClosed:
		return "a producer closed"
	case *tollkeeperv1.ControlEntry_Tick:
		return "time passed"
	case *tollkeeperv1.ControlEntry_ClockAdvance:
		return "the test clock advanced to " + moment(usage.Micros(body.ClockAdvance.GetToUnixMicros()))
	case *tollkeeperv1.ControlEntry_Correction:
		return correctionText(body.Correction)
	case *tollkeeperv1.ControlEntry_Openings:
		return fmt.Sprintf("what %d new limits found used in the ledger", len(body.Openings.GetOpenings()))
	case *tollkeeperv1.ControlEntry_CoreVersion:
		return fmt.Sprintf("rules of version %d", body.CoreVersion.GetVersion())
	}
	return "of a kind that this version does not know"
}

// correctionText says what a correction changes, and why.
func correctionText(c *tollkeeperv1.Correction) string {
	var b strings.Builder
	fmt.Fprintf(&b, "usage of %s corrected:", c.GetAccount())
	for i, q := range c.GetAdjustments() {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, " %s %+d", q.GetMeter(), q.GetValue())
	}
	fmt.Fprintf(&b, " (%s", c.GetReason())
	if c.GetReference() != "" {
		fmt.Fprintf(&b, "; %s", c.GetReference())
	}
	return b.String() + ")"
}

// leaseReason says what of the allowance led to a decision.
func leaseReason(d *usage.Decision, e *Explanation) Reason {
	held, leases := int64(0), 0
	if e.Allowance != nil {
		held, leases = e.Allowance.Outstanding, len(e.Allowance.Leases)
	}
	of := fmt.Sprintf("%d of %d %s were used for certain, %d were held by %d gateways", d.Used, d.Amount, d.Meter, held, leases)
	if leases == 1 {
		of = strings.TrimSuffix(of, "s")
	}
	switch {
	case d.Verdict == usage.Deny && d.Room > 0:
		return Reason{ReasonLease, fmt.Sprintf("a gateway needed more than could be given, while %s; a call that needs less may pass: %s", of, d.Verdict)}
	case d.Verdict == usage.Deny:
		return Reason{ReasonLease, fmt.Sprintf("all was used: %s: %s", of, d.Verdict)}
	}
	return Reason{ReasonLease, fmt.Sprintf("%s: %s", of, d.Verdict)}
}

func reason(t *trace.Trace, d *usage.Decision, e *Explanation) Reason {
	of := fmt.Sprintf("%d of %d", t.After, d.Amount)
	switch {
	case d.Room > 0:
		return leaseReason(d, e)
	case e.Crossing != nil:
		return Reason{ReasonCall, fmt.Sprintf("a call brought %s from %d to %d, which reached %d: %s", d.Meter, e.Crossing.UsedAfter-e.Crossing.Adds, e.Crossing.UsedAfter, trace.Threshold(t.Decided), d.Verdict)}
	case t.PlanNew:
		return Reason{ReasonPlan, fmt.Sprintf("other plans took effect while %s stood at %s: %s", d.Meter, of, d.Verdict)}
	case e.Entry.Kind == "control" && t.Decoder.Control.GetAccountSet() != nil:
		return Reason{ReasonAccount, fmt.Sprintf("the accounts were changed while %s stood at %s: %s", d.Meter, of, d.Verdict)}
	case e.Entry.Kind == "control" && t.Decoder.Control.GetCorrection() != nil:
		return Reason{ReasonCorrection, fmt.Sprintf("a correction by %s brought %s from %d to %d of %d: %s. %s", e.Entry.Author, d.Meter, t.Before, t.After, d.Amount, d.Verdict, e.Entry.What)}
	case e.Entry.Kind == "control" && t.Decoder.Control.GetOpenings() != nil && t.After != t.Before:
		return Reason{ReasonOpening, fmt.Sprintf("what was used before the limit was there brought %s from %d to %s: %s", d.Meter, t.Before, of, d.Verdict)}
	case t.PeriodNew:
		return Reason{ReasonPeriod, fmt.Sprintf("a new %s began, with %s at %s: %s", d.Window, d.Meter, of, d.Verdict)}
	}
	if d.Tier.Leased() {
		return leaseReason(d, e)
	}
	return Reason{ReasonStanding, fmt.Sprintf("%s stood at %s before this entry already: %s", d.Meter, of, d.Verdict)}
}

// judge compares what was published with what the replay gave.
func judge(t *trace.Trace, e *Explanation, d *found) {
	e.Fed = t.Fed
	list := []Difference{}
	switch {
	case t.Decided == nil:
		list = append(list, Difference{"verdict", d.Verdict.String(), "no decision at this entry"})
	default:
		list = differences(&d.Decision, t.Decided)
	}
	if sum := t.Fed.Used + t.Fed.Carried + t.Fed.Adjusted + t.Fed.Reported + t.Fed.Unexplained; t.Fed.Unexplained != 0 || sum != d.Used {
		list = append(list, Difference{"calls", fmt.Sprint(d.Used), fmt.Sprint(sum - t.Fed.Unexplained)})
	}
	e.Replay.Differences = list
	e.Replay.Same = len(list) == 0
	switch {
	case e.Replay.Same && d.published:
		e.Replay.Text = "replayed: same verdict"
	case e.Replay.Same:
		e.Replay.Text = "replayed: the ledger makes this very decision; its published copy is not kept any more"
	default:
		e.Replay.Text = "REPLAYED: NOT THE SAME. The ledger, counted by this version, gives something else than was decided: another version counted by other rules, foreign events were remembered for another time (--foreign-horizon), or the ledger was changed"
	}
}

// calls fetches the calls of a page out of the ledger.
func (x *Explainer) calls(ctx context.Context, rows []trace.Row) ([]Call, error) {
	calls := make([]Call, len(rows))
	if len(rows) == 0 {
		return calls, nil
	}
	stream, _, err := x.ledger(ctx)
	if err != nil {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchers)
	for rest := calls; len(rows) > 0; {
		n := 1
		for n < len(rows) && rows[n].Sequence == rows[0].Sequence {
			n++
		}
		part, into := rows[:n], rest[:n]
		g.Go(func() error { return fetch(ctx, stream, part, into) })
		rows, rest = rows[n:], rest[n:]
	}
	return calls, g.Wait()
}

// fetch reads the calls of one entry.
func fetch(ctx context.Context, stream jetstream.Stream, rows []trace.Row, calls []Call) error {
	sequence := rows[0].Sequence
	m, err := stream.GetMsg(ctx, sequence)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return fmt.Errorf("entry %d: %w", sequence, ledger.ErrPurged)
	case err != nil:
		return fmt.Errorf("entry %d: %w", sequence, err)
	}
	var f ledger.Frame
	if rows[0].Index >= 0 {
		if err := ledger.DecodeCalls(&f, m.Subject, m.Header, m.Data); err != nil {
			return fmt.Errorf("entry %d: %w", sequence, err)
		}
	}
	var control *tollkeeperv1.ControlEntry
	if rows[0].Index < 0 {
		if control, err = ledger.DecodeControl(m.Header, m.Data); err != nil {
			return fmt.Errorf("entry %d: %w", sequence, err)
		}
	}
	for i, r := range rows {
		if int(r.Index) >= f.N && r.Index >= 0 {
			return fmt.Errorf("entry %d has no call %d: %w", sequence, r.Index, ledger.ErrRewound)
		}
		if calls[i] = callOf(&f, r, usage.At(m.Time)); r.Index < 0 {
			actOf(&calls[i], control)
		}
	}
	return nil
}

func callOf(f *ledger.Frame, r trace.Row, at usage.Micros) Call {
	out := Call{Sequence: r.Sequence, Index: int(r.Index), StreamTime: at, Adds: r.Adds, UsedAfter: r.After}
	if r.Index < 0 {
		return out
	}
	c := f.Call(int(r.Index))
	out.Time, out.Account, out.KeyID, out.RequestID = c.Time, c.Account, c.KeyID, c.RequestID
	out.Method, out.Route, out.Model, out.Region, out.Status = c.Method, c.Route, c.Model, c.Region, c.Status
	out.Ending, out.Estimated = c.Ending.String(), c.Flags&usage.Estimated != 0
	out.Source, out.EventID, out.Gateway = c.Source, c.EventID, f.Gateway
	if c.TraceID != [16]byte{} {
		out.TraceID = hex.EncodeToString(c.TraceID[:])
	}
	if f.Producer != ksuid.Nil {
		out.Producer, out.Frame = f.Producer.String(), f.Number
	}
	return out
}

// actOf says which control entry changed the counter.
func actOf(c *Call, e *tollkeeperv1.ControlEntry) {
	c.Act = &Act{ID: e.GetId(), Author: e.GetAuthor(), CreatedAt: usage.Micros(e.GetCreatedAtUnixMicros()), What: what(e)}
	if x := e.GetCorrection(); x != nil {
		c.Act.Reason, c.Act.Reference = x.GetReason(), x.GetReference()
		c.Time, c.Account, c.Method, c.Route, c.Model = usage.Micros(x.GetTimeUnixMicros()), x.GetAccount(), x.GetMethod(), x.GetRoute(), x.GetModel()
	}
}
