package plans

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/internal/records"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"
)

// ErrConflict says that somebody else has applied other plans meanwhile.
var ErrConflict = errors.New("somebody else has applied plans meanwhile: look at what holds now, and apply again")

// BusyError says that other plans are being applied right now.
type BusyError struct {
	Author string
	Since  time.Duration
	Wait   time.Duration
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("%s began to apply other plans %s ago and has not finished: apply again in %s, when it is finished or, if it died, will be completed first",
		e.Author, e.Since.Round(time.Second), e.Wait.Round(time.Second)+time.Second)
}

// DefaultTakeover is after how long another's unfinished act is completed.
const DefaultTakeover = 10 * time.Second

// Applier makes a document what the services enforce. An act is: the intent in
// the config bucket, control entries in the ledger, records in the directory,
// the document in the config bucket. It may die between any two of its steps:
// the next Apply, of the same or of another document, completes it first, under
// the same identities. Its methods may be called concurrently, in this process
// and others: of those with different documents all but one fail, with *BusyError
// or ErrConflict; those with the same document do it together, and all end well.
type Applier struct {
	JS jetstream.JetStream
	NC *nats.Conn
	// EffectiveAt is the stream time from which the plans hold, microseconds;
	// 0 is at once.
	EffectiveAt usage.Micros
	// Takeover is how old another's unfinished act must be before it is
	// completed; DefaultTakeover when 0.
	Takeover time.Duration
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// Stall is after how long without any progress an Apply fails with
	// *StalledError; 0 is never: ctx alone ends it.
	Stall time.Duration
	// Progress hears, in the goroutine that applies, how many of the entries and
	// records of an act are acknowledged; total is 0 when that is not known: it
	// reads, or another who does the same act gets on. It may be nil.
	Progress func(done, total int)
	// Began hears, at least once, that what comes next may change what holds, of this
	// act or of another that has to be completed first; it may be nil. Where it heard
	// nothing, an Apply that failed has changed nothing.
	Began func()

	// step is called between the steps of an act; tests let it fail.
	step func(name string) error
	// renewal is how often a claim is renewed; claimRenewal when 0.
	renewal time.Duration
}

// Applied is the document that holds.
type Applied struct {
	// Document is canonical: in order of ids, defaults written out. It is
	// empty, not nil, when nothing was ever applied.
	Document *Document
	// Version is empty when nothing was ever applied.
	Version      string
	PlansVersion string
	// ActID is the act's ksuid, Author who did it.
	ActID, Author string
	AppliedAt     usage.Micros
	// Revision of the config bucket's key; 0 when nothing was ever applied.
	Revision uint64
	// Unfinished is the version that another Apply has begun; empty when none.
	Unfinished string

	closed map[string]string
}

// Root returns the root of an account, which says where its usage is counted, and
// whether it is or was named by plans; x indexes the document. An account that only
// calls name is its own root.
func (a *Applied) Root(x Index, id string) (root string, named bool) {
	if _, open := x.Account(id); open {
		return x.Root(id), true
	}
	if root, ok := a.closed[id]; ok {
		return root, true
	}
	return id, false
}

// Current returns what holds.
func (a *Applier) Current(ctx context.Context) (Applied, error) {
	s, err := openStore(ctx, a.JS)
	if err != nil {
		return Applied{}, err
	}
	return a.current(ctx, s)
}

func (a *Applier) current(ctx context.Context, s *store) (Applied, error) {
	m, rev, _, doc, err := s.read(ctx, appliedKey)
	if err != nil {
		return Applied{}, err
	}
	out := Applied{Document: doc.Document, Revision: rev, closed: doc.Closed}
	if m != nil {
		out.Version, out.PlansVersion, out.ActID, out.Author, out.AppliedAt = m.Version, m.PlansVersion, m.Act.ID, m.Act.Author, m.AppliedAt
	}
	p, _, _, err := s.manifest(ctx, pendingKey)
	if err != nil {
		return Applied{}, err
	}
	if p != nil && p.Act.ID != out.ActID {
		out.Unfinished = p.Version
	}
	return out, nil
}

// Plan checks a document and returns what applying it would change: from what
// holds or, when another act was left unfinished, from what that one would make
// hold. Problems of the document are of type *Error.
func (a *Applier) Plan(ctx context.Context, doc *Document) (Diff, error) {
	now, err := a.before(ctx, doc)
	if err != nil {
		return Diff{}, err
	}
	if err := planfile.CheckMove(now.Document, now.closed, doc); err != nil {
		return Diff{}, err
	}
	return compareApplied(now, doc), nil
}

// before is what holds when doc comes to be applied.
func (a *Applier) before(ctx context.Context, doc *Document) (Applied, error) {
	if err := Check(doc); err != nil {
		return Applied{}, err
	}
	s, err := openStore(ctx, a.JS)
	if err != nil {
		return Applied{}, err
	}
	now, err := a.current(ctx, s)
	if err != nil {
		return Applied{}, err
	}
	if now.Unfinished != "" && now.Unfinished != Version(doc) {
		// Some of it may hold already, and it would be completed first.
		m, rev, _, pending, err := s.read(ctx, pendingKey)
		if err != nil {
			return Applied{}, err
		}
		if m != nil {
			now.Document, now.closed, now.Revision, now.Version, now.Author = pending.Document, pending.Closed, rev, m.Version, m.Act.Author
		}
	}
	return now, nil
}

func compareApplied(now Applied, doc *Document) Diff {
	if now.Revision == 0 {
		return Compare(nil, doc)
	}
	return Compare(now.Document, doc)
}

// Apply makes doc what holds and returns what changed. When it returns nil
// everything is acknowledged by NATS. Problems of the document are of type
// *Error, and then nothing is changed; after any other error some of it may be
// done: applying again completes it.
func (a *Applier) Apply(ctx context.Context, doc *Document, author string) (Diff, error) {
	watched, ctx, end := a.watched(ctx)
	diff, err := watched.apply(ctx, doc, author, Conditions{Removals: Remove})
	return diff, end(err)
}

func (a *Applier) apply(ctx context.Context, doc *Document, author string, c Conditions) (Diff, error) {
	if err := Check(doc); err != nil {
		return Diff{}, err
	}
	geometry, err := ledger.ReadGeometry(ctx, a.JS)
	if err != nil {
		return Diff{}, err
	}
	s, err := openStore(ctx, a.JS)
	if err != nil {
		return Diff{}, err
	}
	if err := a.finishOther(ctx, s, geometry, Version(doc)); err != nil {
		return Diff{}, err
	}
	now, err := a.current(ctx, s)
	if err != nil {
		return Diff{}, err
	}
	if doc, err = c.decide(now, doc); err != nil {
		return Diff{}, err
	}
	return a.replace(ctx, s, geometry, now, doc, author)
}

// replace makes given hold in place of now.
func (a *Applier) replace(ctx context.Context, s *store, g ledger.Geometry, now Applied, given *Document, author string) (Diff, error) {
	// given, because problems are told by its place in the file.
	if err := planfile.CheckMove(now.Document, now.closed, given); err != nil {
		return Diff{}, err
	}
	doc := given.Canonical()
	diff := compareApplied(now, doc)
	if diff.Empty() && now.Revision != 0 && now.Unfinished == "" {
		return diff, nil
	}
	id, ours, err := a.begin(ctx, s, now, doc, author)
	if err != nil {
		return Diff{}, err
	}
	return diff, a.finishAct(ctx, s, g, id, ours)
}

// Change makes what change returns for the document that holds hold in its place.
// What others apply meanwhile is kept: change is called again, with theirs, and
// must not alter its argument. While another act is under way it waits, until ctx
// is done. Errors are those of Apply, without ErrConflict and *BusyError.
func (a *Applier) Change(ctx context.Context, author string, change func(now *Document) *Document) (Diff, error) {
	geometry, err := ledger.ReadGeometry(ctx, a.JS)
	if err != nil {
		return Diff{}, err
	}
	s, err := openStore(ctx, a.JS)
	if err != nil {
		return Diff{}, err
	}
	for {
		diff, err := a.changeOnce(ctx, s, geometry, author, change)
		var busy *BusyError
		if !errors.Is(err, ErrConflict) && !errors.As(err, &busy) {
			return diff, err
		}
		timer := time.NewTimer(changePause + time.Duration(rand.Int64N(int64(changePause))))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return Diff{}, errors.Join(ctx.Err(), err)
		}
	}
}

// changePause is how long a change at least waits for others to be through.
const changePause = 50 * time.Millisecond

func (a *Applier) changeOnce(ctx context.Context, s *store, g ledger.Geometry, author string, change func(*Document) *Document) (Diff, error) {
	// Whatever is under way is another's: no document of ours is known yet.
	if err := a.finishOther(ctx, s, g, ""); err != nil {
		return Diff{}, err
	}
	now, err := a.current(ctx, s)
	if err != nil {
		return Diff{}, err
	}
	doc := change(now.Document)
	if err := Check(doc); err != nil {
		return Diff{}, err
	}
	return a.replace(ctx, s, g, now, doc, author)
}

// Finish completes what an act that died has left half done, or does nothing:
// when none is unfinished, or while whoever began it may still be at it (Takeover).
// Apply and Change do so by themselves; it is for when nobody applies anything.
func (a *Applier) Finish(ctx context.Context) error {
	geometry, err := ledger.ReadGeometry(ctx, a.JS)
	if err != nil {
		return err
	}
	s, err := openStore(ctx, a.JS)
	if err != nil {
		return err
	}
	err = a.finishOther(ctx, s, geometry, "")
	var busy *BusyError
	if errors.As(err, &busy) || errors.Is(err, ErrConflict) {
		return nil // somebody is at it
	}
	return err
}

// finishStall is how long completing plans that were left half applied may make
// no progress.
const finishStall = 5 * time.Minute

// KeepFinished calls Finish at once and then regularly until ctx is done, so that
// the gateways' directory does not stay behind the ledger until somebody happens to
// apply something. failed is told of what went wrong; the next time may do.
func (a *Applier) KeepFinished(ctx context.Context, every time.Duration, failed func(error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		bounded := *a
		bounded.Stall = finishStall
		watched, live, end := bounded.watched(ctx)
		err := end(watched.Finish(live))
		if err != nil && ctx.Err() == nil {
			failed(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// finishOther completes or refuses to wait for another's act with another
// document.
func (a *Applier) finishOther(ctx context.Context, s *store, g ledger.Geometry, version string) error {
	pending, _, since, err := s.manifest(ctx, pendingKey)
	if err != nil || pending == nil || pending.Version == version {
		return err
	}
	applied, _, _, err := s.manifest(ctx, appliedKey)
	if err != nil {
		return err
	}
	if applied == nil || applied.Act.ID != pending.Act.ID {
		takeover := a.Takeover
		if takeover <= 0 {
			takeover = DefaultTakeover
		}
		if age := a.now().Sub(since); age < takeover {
			return &BusyError{Author: pending.Act.Author, Since: max(age, 0), Wait: takeover - age}
		}
	}
	if err := a.finishAct(ctx, s, g, pending.Act.ID, true); err != nil && !errors.Is(err, errStale) {
		return err
	}
	return nil
}

// errStale says that the pending act built on what does not hold any more, and
// was removed.
var errStale = fmt.Errorf("%w", ErrConflict)

// begin writes down what is going to be done, unless that has been done, and
// returns the id of the act and whether we have begun it.
func (a *Applier) begin(ctx context.Context, s *store, now Applied, doc *Document, author string) (id string, ours bool, err error) {
	pending, rev, _, err := s.manifest(ctx, pendingKey)
	if err != nil {
		return "", false, err
	}
	version := Version(doc)
	if pending != nil && pending.Act.ID != now.ActID {
		if pending.Version == version {
			return pending.Act.ID, false, nil // begun before, by us or another
		}
		return "", false, ErrConflict
	}
	at := micros(a.now())
	m := &manifest{
		Version: version, PlansVersion: PlansVersion(doc), Base: now.Revision,
		Act: act{ID: actID(now.Revision, now.Version, version, at), Author: author, CreatedAt: int64(at), EffectiveAt: int64(a.EffectiveAt)},
	}
	if m.DocumentID, m.Chunks, err = s.save(ctx, stored{doc, closedAfter(now, doc)}); err != nil {
		return "", false, err
	}
	if err := a.at("document"); err != nil {
		return "", false, err
	}
	a.began()
	if _, err := s.put(ctx, pendingKey, m, rev); err != nil {
		if err := errors.Join(err, s.discard(ctx, m.DocumentID)); !errors.Is(err, ErrConflict) {
			return "", false, err
		}
		id, err := s.begunMeanwhile(ctx, m)
		return id, false, err
	}
	return m.Act.ID, true, a.at("intent")
}

func (a *Applier) began() {
	if a.Began != nil {
		a.Began()
	}
}

// closedAfter returns the roots of all accounts that were removed so far.
func closedAfter(now Applied, doc *Document) map[string]string {
	old, next := NewIndex(now.Document), NewIndex(doc)
	closed := make(map[string]string, len(now.closed))
	for id, root := range now.closed {
		if _, open := next.Account(id); !open {
			closed[id] = root
		}
	}
	for i := range now.Document.Accounts {
		id := now.Document.Accounts[i].ID
		if _, open := next.Account(id); !open {
			closed[id] = old.Root(id)
		}
	}
	return closed
}

// complete does what the pending manifest says, if that is the act with this id.
func (a *Applier) complete(ctx context.Context, s *store, g ledger.Geometry, id string) error {
	pending, rev, _, next, err := s.read(ctx, pendingKey)
	if err != nil {
		return err
	}
	if pending == nil || pending.Act.ID != id {
		return ErrConflict // another has completed it and removed it
	}
	applied, appliedRev, _, before, err := s.read(ctx, appliedKey)
	if err != nil {
		return err
	}
	if applied == nil || applied.Act.ID != pending.Act.ID {
		if appliedRev != pending.Base {
			// It was written down after another act had replaced what it
			// builds on, and nothing of it was done: none is begun while
			// another is unfinished.
			if err := s.abandon(ctx, pending, rev); err != nil {
				return err
			}
			return errStale
		}
		a.began()
		c := &claim{a: a, store: s, m: pending, rev: rev}
		if err := a.perform(ctx, c, entries(pending.Act, before.Document, next.Document, g.Shards), before.Document, next.Document); err != nil {
			return err
		}
		rev = c.rev
		done := *pending
		done.AppliedAt = micros(a.now())
		if _, err := s.put(ctx, appliedKey, &done, appliedRev); err != nil {
			return err
		}
		if err := a.at("applied"); err != nil {
			return err
		}
		if applied != nil {
			if err := s.discard(ctx, applied.DocumentID); err != nil {
				return err
			}
		}
		if err := s.discardOrphans(ctx, a.now(), pending.DocumentID); err != nil {
			return err
		}
	}
	err = s.kv.Delete(ctx, pendingKey, jetstream.LastRevision(rev))
	if err != nil && !records.WrongSequence(err) { // another has removed it
		return fmt.Errorf("remove %s: %w", pendingKey, err)
	}
	return a.at("done")
}

func (a *Applier) perform(ctx context.Context, c *claim, all []shardEntry, before, next *Document) error {
	if err := c.renew(ctx); err != nil {
		return err
	}
	// What the records are now is read before anything is written, and before the
	// claim is renewed once more: if we are overtaken, ours don't fit those
	// revisions any more.
	w := &records.Writer{JS: a.JS, Renew: c.renew, Advance: c.advance, Step: a.at, Conflict: ErrConflict}
	changes, err := w.Changes(ctx, before, next)
	if err != nil {
		return err
	}
	if err := c.renew(ctx); err != nil {
		return err
	}
	c.total = len(all) + len(changes)
	if err := a.append(ctx, c, all); err != nil {
		return err
	}
	return w.Write(ctx, changes)
}

// appendTries bounds how often an entry waits for a place among the owner's ticks.
const appendTries = 100

// append appends control entries. Each stands directly behind the last entry of
// its subject that was there when the intent was still ours, so that one who was
// paused and overtaken can't append behind those who came after.
func (a *Applier) append(ctx context.Context, c *claim, all []shardEntry) error {
	stream, err := a.JS.Stream(ctx, ledger.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	last, known := uint64(0), false
	for i, e := range all {
		if i > 0 && e.shard != all[i-1].shard {
			known = false
		}
		for try := 1; ; try++ {
			if !known {
				if last, err = lastOf(ctx, stream, ledger.ControlSubject(e.shard)); err != nil {
					return err
				}
				if err := a.at("place"); err != nil {
					return err
				}
				if err := c.renew(ctx); err != nil {
					return err
				}
			}
			msg, err := ledger.ControlMessage(e.shard, e.entry)
			if err != nil {
				return err
			}
			if err := a.at("entry"); err != nil {
				return err
			}
			ledger.ExpectLast(msg, last)
			ack, err := a.JS.PublishMsg(ctx, msg)
			if records.WrongSequence(err) && try < appendTries {
				known = false
				continue
			}
			if err != nil {
				return fmt.Errorf("append the plans to shard %d: %w", e.shard, err)
			}
			last, known = ack.Sequence, true
			if err := c.advance(ctx, 1); err != nil {
				return err
			}
			break
		}
	}
	return a.at("entries")
}

func lastOf(ctx context.Context, stream jetstream.Stream, subject string) (uint64, error) {
	m, err := stream.GetLastMsgForSubject(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the last entry of %s: %w", subject, err)
	}
	return m.Sequence, nil
}

func (a *Applier) now() time.Time {
	if a.Now != nil {
		return a.Now()
	}
	return time.Now()
}

func (a *Applier) at(step string) error {
	if a.step == nil {
		return nil
	}
	return a.step(step)
}

// Revision returns the revision of what holds, without reading it; 0 when nothing
// was ever applied.
func (a *Applier) Revision(ctx context.Context) (uint64, error) {
	s, err := openStore(ctx, a.JS)
	if err != nil {
		return 0, err
	}
	_, rev, _, err := s.manifest(ctx, appliedKey)
	return rev, err
}
