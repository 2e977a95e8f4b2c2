package corrections

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

const (
	// appendTries bounds how often an act waits for a place among what others
	// append to its shard.
	appendTries = 100
	// clockSlack is by how much this machine's clock may differ from the ledger's.
	clockSlack = time.Minute
	// askTimeout bounds one question to whoever counts, askEvery is between two.
	askTimeout = 2 * time.Second
	askEvery   = 20 * time.Millisecond
	// defaultWait is how long a submission waits to see itself counted.
	defaultWait = 5 * time.Second
)

// Submitter puts acts into the ledger. Safe for concurrent use.
type Submitter struct {
	JS jetstream.JetStream
	NC *nats.Conn
	// Shards of the ledger.
	Shards uint32
	// Plans returns what holds, with its index. When nil they are read each time.
	Plans func(ctx context.Context) (*plans.Applied, plans.Index, error)
	// Horizon of control acts, as the aggregator has it; 0 means a day.
	Horizon time.Duration
	// Wait is how long Submit waits for its entry to be counted: 5 s when 0, not at
	// all when negative.
	Wait time.Duration
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Result is an act that stands in the ledger.
type Result struct {
	ID string `json:"id"`
	// Repeated: it stood there already, and nothing was changed now.
	Repeated bool   `json:"repeated"`
	Account  string `json:"account"`
	Root     string `json:"root"`
	Shard    uint32 `json:"shard"`
	Sequence uint64 `json:"ledger_sequence"`
	// At is the ledger's time of the entry; 0: it could not be asked for.
	At usage.Micros `json:"stream_time_unix_micros"`
	// Counted: whoever counts has counted it; Usage is how the account stands since.
	Counted bool                 `json:"counted"`
	Usage   *ledger.AccountUsage `json:"usage,omitempty"`
}

// Submit makes a correction, once: an act with the id of one that stands in the
// ledger already is answered as repeated. An act without an id gets a new one, one
// without a time is of now. Refusals are of type *Error; those that wrap
// ErrCounting say that the counters could not be asked, so that nothing was
// changed. After any other error it may or may not have been made: submitting it
// again under the same id, which the error names, makes it once.
func (s *Submitter) Submit(ctx context.Context, a Act) (Result, error) {
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	timed, fresh := !a.Time.IsZero(), a.ID == ksuid.Nil
	if !timed {
		a.Time = now()
	}
	if fresh {
		id, err := ksuid.NewRandomWithTime(now())
		if err != nil {
			return Result{}, fmt.Errorf("make an id: %w", err)
		}
		a.ID = id
	}
	horizon := s.Horizon
	if horizon <= 0 {
		horizon = time.Duration(dedup.DefaultHorizon) * time.Microsecond
	}
	if err := a.Check(now(), horizon); err != nil {
		return Result{}, err
	}
	applied, index, err := s.plans(ctx)
	if err != nil {
		return Result{}, fmt.Errorf("find the account %q: %w", a.Account, err)
	}
	root, named := applied.Root(index, a.Account)
	out := Result{ID: a.ID.String(), Account: a.Account, Root: root, Shard: ledger.ShardOf(root, s.Shards)}
	l := log{js: s.JS, shard: out.Shard}
	if fresh {
		err = l.skip(ctx)
	} else {
		err = l.read(ctx, a.ID, a.ID.Time().Add(-clockSlack))
	}
	if err != nil {
		return Result{}, err
	}
	for try := 1; l.found == nil; try++ {
		// By counters that know every act before: of two that would take off the
		// same usage one does not fit.
		if err := s.fits(ctx, &a, &l, named, applied.Document); err != nil {
			return Result{}, err
		}
		stored, err := l.append(ctx, a.entry(now()))
		if err == nil && stored {
			break
		}
		if err == nil && try == appendTries {
			err = fmt.Errorf("%d times somebody else was quicker to append to shard %d", try, out.Shard)
		}
		if err == nil {
			err = l.read(ctx, a.ID, a.ID.Time().Add(-clockSlack))
		}
		if err != nil {
			return Result{}, &UnclearError{ID: a.ID, Err: err}
		}
	}
	if l.found != nil {
		if !a.same(l.found, timed) {
			return Result{}, refused(CodeConflict, "id", "the id %s stands for another act, at entry %d of the ledger: use a new one", a.ID, l.sequence)
		}
		out.Repeated = true
	}
	out.Sequence = l.sequence
	if !l.at.IsZero() {
		out.At = usage.At(l.at)
	}
	s.awaitCounted(ctx, &out)
	return out, nil
}

// UnclearError says that a correction may or may not have been made.
type UnclearError struct {
	ID  ksuid.KSUID
	Err error
}

// Error says what to do.
func (e *UnclearError) Error() string {
	return fmt.Sprintf("the correction %s may or may not have been made: submit it again with this id: %v", e.ID, e.Err)
}

// Unwrap returns the cause.
func (e *UnclearError) Unwrap() error { return e.Err }

func (s *Submitter) plans(ctx context.Context) (*plans.Applied, plans.Index, error) {
	if s.Plans != nil {
		return s.Plans(ctx)
	}
	a, err := (&plans.Applier{JS: s.JS, NC: s.NC}).Current(ctx)
	if err != nil {
		return nil, plans.Index{}, err
	}
	return &a, plans.NewIndex(a.Document), nil
}

// fits reports whether the account and its use allow of the act, behind all that
// was looked at.
func (s *Submitter) fits(ctx context.Context, a *Act, l *log, named bool, doc *plans.Document) error {
	u, err := s.counted(ctx, l.shard, a.Account, l.last)
	if err != nil {
		return fmt.Errorf("whether account %q has used what is corrected can't be said: %w", a.Account, err)
	}
	if u.account == nil {
		if !named {
			return refused(CodeUnknownAccount, "account", "neither the plans nor a call name the account %q: correct its name", a.Account)
		}
		u.account = &ledger.AccountUsage{}
	}
	for m, n := range a.Adjustments {
		used, reported := u.account.Own.Meters[m]
		if m == usage.Calls {
			// A call that does not say how many it stands for is one.
			used, reported = used+u.account.Own.Admitted+u.account.Own.Adjusted[m], true
		}
		if _, builtIn := m.Index(); !reported && !builtIn && !names(doc, m) {
			return refused(CodeUnknownMeter, "adjustments", "no call of account %q has reported and no plan names the meter %q: correct its name", a.Account, m)
		}
		if n < 0 && -n > used {
			return refused(CodeTooLarge, "adjustments", "%d %s are to be taken off, but account %q has used %d itself: a correction can't take off more", -n, m, a.Account, used)
		}
		if n > 0 && used > math.MaxInt64-n {
			return refused(CodeTooLarge, "adjustments", "%d %s are to be added to %d: that is more than can be counted", n, m, used)
		}
	}
	return nil
}

// names reports whether a plan has a limit on the meter.
func names(doc *plans.Document, m usage.Meter) bool {
	for i := range doc.Plans {
		for k := range doc.Plans[i].Limits {
			if doc.Plans[i].Limits[k].Meter == string(m) {
				return true
			}
		}
	}
	return false
}

// standing is what whoever counts says.
type standing struct {
	sequence uint64
	account  *ledger.AccountUsage // nil: it was never heard of
}

// counted asks how an account stands when everything up to an entry is counted.
func (s *Submitter) counted(ctx context.Context, shard uint32, account string, upTo uint64) (standing, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		u, err := s.ask(ctx, shard, account)
		if err != nil || u.sequence >= upTo {
			return u, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return standing{}, fmt.Errorf("%w: shard %d is counted up to entry %d, and %d stands: try again", ErrCounting, shard, u.sequence, upTo)
		}
	}
}

// ask asks the owner of a shard how an account stands.
func (s *Submitter) ask(ctx context.Context, shard uint32, account string) (standing, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	data, err := json.Marshal(ledger.UsageRequest{Accounts: []string{account}})
	if err != nil {
		return standing{}, fmt.Errorf("ask shard %d: %w", shard, err)
	}
	m, err := s.NC.RequestWithContext(ctx, ledger.UsageSubject(shard), data)
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return standing{}, fmt.Errorf("%w: nobody owns shard %d: is an aggregator running?", ErrCounting, shard)
	case err != nil:
		return standing{}, fmt.Errorf("%w: shard %d: %w", ErrCounting, shard, err)
	}
	// As NATS's own services write their errors.
	if why := m.Header.Get(ledger.ErrorHeader); why != "" {
		return standing{}, fmt.Errorf("%w: shard %d: %s", ErrCounting, shard, why)
	}
	var r ledger.UsageReply
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return standing{}, fmt.Errorf("%w: shard %d: the answer is not JSON: %w", ErrCounting, shard, err)
	}
	out := standing{sequence: r.Sequence}
	for i := range r.Accounts {
		if r.Accounts[i].ID == account {
			out.account = &r.Accounts[i]
		}
	}
	return out, nil
}

// awaitCounted waits, within bounds, until the entry is counted. The act stands
// in the ledger, whatever comes of it.
func (s *Submitter) awaitCounted(ctx context.Context, out *Result) {
	wait := s.Wait
	if wait == 0 {
		wait = defaultWait
	}
	if wait < 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		u, err := s.ask(ctx, out.Shard, out.Account)
		if err == nil && u.sequence >= out.Sequence {
			if u.account != nil && u.account.Limits == nil {
				u.account.Limits = []ledger.LimitUsage{}
			}
			out.Counted, out.Usage = true, u.account
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// log is the control subject of a shard: how far it was looked at, and where an
// act stands in it.
type log struct {
	js    jetstream.JetStream
	shard uint32

	last     uint64 // newest entry that was looked at
	found    *tollkeeperv1.ControlEntry
	sequence uint64
	at       time.Time
}

// skip goes to the end without looking: nobody else knows a new id.
func (l *log) skip(ctx context.Context) error {
	m, found, err := ledger.LastMessage(ctx, l.js, ledger.Stream, ledger.ControlSubject(l.shard))
	if err == nil && found {
		l.last = m.Sequence
	}
	return err
}

// read looks for an id among the entries since a time, or behind those it has
// looked at, up to the newest.
func (l *log) read(ctx context.Context, id ksuid.KSUID, since time.Time) error {
	subject := ledger.ControlSubject(l.shard)
	end, found, err := ledger.LastMessage(ctx, l.js, ledger.Stream, subject)
	if err != nil || !found || end.Sequence <= l.last {
		return err
	}
	begin := l.last
	l.last = end.Sequence
	if begin == 0 && end.Time.Before(since) {
		return nil
	}
	o := jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}, DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &since}
	if begin > 0 {
		o = jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: begin + 1}
	}
	consumer, err := l.js.OrderedConsumer(ctx, ledger.Stream, o)
	if err != nil {
		return fmt.Errorf("read %s: %w", subject, err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("read %s: %w", subject, err)
	}
	defer messages.Stop()
	for text := id.String(); ; {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("read %s: %w", subject, err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("read %s: %w", subject, err)
		}
		// What can't be decoded is nobody's act.
		if e, err := ledger.DecodeControl(m.Headers(), m.Data()); err == nil && e.GetId() == text {
			l.found, l.sequence, l.at = e, meta.Sequence.Stream, meta.Timestamp
			return nil
		}
		if meta.Sequence.Stream >= end.Sequence {
			return nil
		}
	}
}

// append puts the act behind everything that was looked at; false: something else
// stands there by now, a tick, or this very act.
func (l *log) append(ctx context.Context, e *tollkeeperv1.ControlEntry) (stored bool, err error) {
	m, err := ledger.ControlMessage(l.shard, e)
	if err != nil {
		return false, err
	}
	ledger.ExpectLast(m, l.last)
	ack, err := l.js.PublishMsg(ctx, m)
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == errCodeWriteUnderWay):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("append to %s: %w", m.Subject, err)
	}
	l.sequence = ack.Sequence
	// It stands, whatever comes of asking when.
	if at, found, err := ledger.LastMessage(ctx, l.js, ledger.Stream, m.Subject); err == nil && found && at.Sequence == ack.Sequence {
		l.at = at.Time
	}
	return true, nil
}

// errCodeWriteUnderWay is JetStream's code for a conditional write while another
// to the same subject is on its way, which the client has no name for.
const errCodeWriteUnderWay jetstream.ErrorCode = 10164
