package explain

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sort"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// fetchers read entries of a page at once.
const fetchers = 8

// replayed is an explanation without a page, and where its calls stand.
type replayed struct {
	explanation Explanation
	below       position // every indexed call stands before it
	rows        []fedRow // oldest first
	dropped     bool     // there are older ones
}

// before returns how many of the indexed calls stand before a position.
func (r *replayed) before(below position) int {
	return sort.Search(len(r.rows), func(i int) bool { return !r.rows[i].less(below) })
}

// covers reports whether a page can be cut out of the index.
func (r *replayed) covers(below position, limit int) bool {
	return !r.below.less(below) && (!r.dropped || r.before(below) > limit)
}

// page returns calls before a position, newest first.
func (r *replayed) page(below position, limit int) (rows []fedRow, next string) {
	n := r.before(below)
	rows = make([]fedRow, 0, min(limit, n))
	for i := n - 1; i >= 0 && len(rows) < limit; i-- {
		rows = append(rows, r.rows[i])
	}
	if n > limit || r.dropped && len(rows) > 0 {
		next = rows[len(rows)-1].String()
	}
	return rows, next
}

// replay finds a decision and replays its shard up to it.
func (x *Explainer) replay(ctx context.Context, id ksuid.KSUID, below position, p *progress) (*replayed, error) {
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
	if d.PeriodEnd != 0 {
		if all, err = sequenceAt(ctx, stream, state, d.PeriodStart.Time()); err != nil {
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
	t := newTrace(b, &d.Decision, below)
	r := &replayed{below: below}
	e := &r.explanation
	e.Decision, e.Limit = decisionOf(&d.Decision), limitOf(&d.Decision)
	e.Replay = Replay{Published: d.published, Snapshot: b.snapshot, From: b.state.Sequence() + 1}
	from, to := e.Replay.From, d.Revision
	err = x.read(ctx, ledger.Stream, ledger.ShardSubjects(d.Shard), from, to, func(m *ledger.Message) error {
		p.at("replaying the ledger", m.Sequence-from, to-from+1)
		if err := t.apply(m); err != nil {
			return err
		}
		if m.Sequence == to {
			t.describe(e, m)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if b.state.Sequence() != to {
		return nil, fmt.Errorf("entry %d of shard %d could not be read: %w", to, d.Shard, ledger.ErrRewound)
	}
	t.judge(e, &d)
	e.Replay.Entries, e.Replay.Took = t.entries, time.Since(begin).Microseconds()
	r.rows, r.dropped = t.rows.all(), t.rows.dropped
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
func (t *trace) describe(e *Explanation, m *ledger.Message) {
	e.Counter = Counter{Before: t.before, After: t.used}
	e.Entry = Entry{Stream: ledger.Stream, Shard: t.target.Shard, Sequence: m.Sequence, StreamTime: usage.At(m.Time)}
	kind, _, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		return
	}
	switch kind {
	case ledger.KindCalls:
		f := &t.decoder.Frame
		e.Entry.Kind, e.Entry.Gateway, e.Entry.SealedAt, e.Entry.Calls = "calls", f.Gateway, f.SealedAt, f.N
		if f.Producer != ksuid.Nil {
			e.Entry.Producer, e.Entry.Frame = f.Producer.String(), f.Number
		}
	case ledger.KindControl:
		e.Entry.Kind = "control"
		if c := t.decoder.Control; c != nil {
			e.Entry.ID, e.Entry.Author, e.Entry.CreatedAt, e.Entry.What = c.GetId(), c.GetAuthor(), usage.Micros(c.GetCreatedAtUnixMicros()), what(c)
		}
	case ledger.KindLease:
		e.Entry.Kind = "lease"
	}
	if t.crossed != 0 {
		c := callOf(&t.decoder.Frame, fedRow{position{m.Sequence, t.crossing.index}, t.crossing.adds, t.crossed}, e.Entry.StreamTime)
		e.Crossing = &c
	}
	e.Reason = t.reason(e)
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
	}
	return "of a kind that this version does not know"
}

func (t *trace) reason(e *Explanation) Reason {
	d := t.target
	of := fmt.Sprintf("%d of %d", t.used, d.Amount)
	switch {
	case e.Crossing != nil:
		return Reason{ReasonCall, fmt.Sprintf("a call brought %s from %d to %d, which reached %d: %s", d.Meter, e.Crossing.UsedAfter-e.Crossing.Adds, e.Crossing.UsedAfter, threshold(t.decided), d.Verdict)}
	case t.planNew:
		return Reason{ReasonPlan, fmt.Sprintf("other plans took effect while %s stood at %s: %s", d.Meter, of, d.Verdict)}
	case e.Entry.Kind == "control" && t.decoder.Control.GetAccountSet() != nil:
		return Reason{ReasonAccount, fmt.Sprintf("the accounts were changed while %s stood at %s: %s", d.Meter, of, d.Verdict)}
	case t.periodNew:
		return Reason{ReasonPeriod, fmt.Sprintf("a new %s began, with %s at %s: %s", d.Window, d.Meter, of, d.Verdict)}
	}
	return Reason{ReasonStanding, fmt.Sprintf("%s stood at %s before this entry already: %s", d.Meter, of, d.Verdict)}
}

// judge compares what was published with what the replay gave.
func (t *trace) judge(e *Explanation, d *found) {
	e.Fed = t.fed
	list := []Difference{}
	switch {
	case t.decided == nil:
		list = append(list, Difference{"verdict", d.Verdict.String(), "no decision at this entry"})
	default:
		list = differences(&d.Decision, t.decided)
	}
	if sum := t.fed.Used + t.fed.Carried + t.fed.Adjusted + t.fed.Unexplained; t.fed.Unexplained != 0 || sum != d.Used {
		list = append(list, Difference{"calls", fmt.Sprint(d.Used), fmt.Sprint(sum - t.fed.Unexplained)})
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
func (x *Explainer) calls(ctx context.Context, rows []fedRow) ([]Call, error) {
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
		for n < len(rows) && rows[n].sequence == rows[0].sequence {
			n++
		}
		part, into := rows[:n], rest[:n]
		g.Go(func() error { return fetch(ctx, stream, part, into) })
		rows, rest = rows[n:], rest[n:]
	}
	return calls, g.Wait()
}

// fetch reads the calls of one entry.
func fetch(ctx context.Context, stream jetstream.Stream, rows []fedRow, calls []Call) error {
	sequence := rows[0].sequence
	m, err := stream.GetMsg(ctx, sequence)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return fmt.Errorf("entry %d: %w", sequence, ledger.ErrPurged)
	case err != nil:
		return fmt.Errorf("entry %d: %w", sequence, err)
	}
	var f ledger.Frame
	if rows[0].row >= 0 {
		if err := ledger.DecodeCalls(&f, m.Subject, m.Header, m.Data); err != nil {
			return fmt.Errorf("entry %d: %w", sequence, err)
		}
	}
	for i, r := range rows {
		if int(r.row) >= f.N && r.row >= 0 {
			return fmt.Errorf("entry %d has no call %d: %w", sequence, r.row, ledger.ErrRewound)
		}
		calls[i] = callOf(&f, r, usage.At(m.Time))
	}
	return nil
}

func callOf(f *ledger.Frame, r fedRow, at usage.Micros) Call {
	out := Call{Sequence: r.sequence, Index: int(r.row), StreamTime: at, Adds: r.adds, UsedAfter: r.after}
	if r.row < 0 {
		return out
	}
	c := f.Call(int(r.row))
	out.Time, out.Account, out.KeyID, out.RequestID = c.Time, c.Account, c.KeyID, c.RequestID
	out.Method, out.Route, out.Model, out.Region, out.Status = c.Method, c.Route, c.Model, c.Region, c.Status
	out.Source, out.EventID, out.Gateway = c.Source, c.EventID, f.Gateway
	if c.TraceID != [16]byte{} {
		out.TraceID = hex.EncodeToString(c.TraceID[:])
	}
	if f.Producer != ksuid.Nil {
		out.Producer, out.Frame = f.Producer.String(), f.Number
	}
	return out
}
