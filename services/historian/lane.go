package historian

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/blocks"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// part is what one table gets of a block (history.Part).
type part interface {
	Table() string
	Rows() int
	Insert(ctx context.Context, token string) error
	Present(ctx context.Context) (bool, error)
}

// gatherer turns a stream's entries into rows. It is used from one goroutine.
type gatherer interface {
	// weigh looks at an entry and changes nothing.
	weigh(m ledger.Message) blocks.Item
	// beyond says that the entry just weighed is, with all that follows it, of rules
	// that a newer program knows: it may not be taken. nil: it is not.
	beyond() *quota.NewerError
	// take folds the entry that was just weighed; without keep it leaves no rows.
	take(m ledger.Message, keep bool)
	// seal hands over what was taken since the last seal. release may be called
	// from another goroutine, once the parts are not needed any more.
	seal(ctx context.Context, s blocks.Span) (rows int, parts []part, release func(), err error)
	// snapshot returns the fold of everything up to the newest entry taken; nil
	// when there is nothing that a restart would have to know.
	snapshot(position uint64, stream string) []byte
	// restore begins with a snapshot's fold and returns its position.
	restore(data []byte, stream string) (position uint64, err error)
}

// tables is what a lane asks of ClickHouse besides its parts.
type tables interface {
	// TableID is a table's identity and whether it has rows.
	TableID(ctx context.Context, table string) (id string, empty bool, err error)
}

// ready hears whether a lane does its work. *telemetry.Component is one.
type ready interface {
	OK()
	NotReady(reason string)
}

// lane carries one stream into its tables: a reader, a builder of blocks and a
// committer, each in its own goroutine, at most one block being built, one
// waiting and one on its way.
//
// The protocol: a block's boundary is durable before the block is sent; the next
// boundary, or a done mark, says that it has arrived. After a crash the same
// entries between the same boundaries give the same rows under the same token,
// and whether they are there already is asked before they are sent again. While
// that is in doubt there is no next boundary.
type lane struct {
	name     string
	into     []string // tables; the first one's identity is the history's
	stream   string
	subjects []string
	limits   blocks.Limits
	// snapshotEvery is after how many blocks with rows the fold is stored.
	snapshotEvery int
	// grace is how long an insert in flight may go on after the lane is told to
	// stop, so that it need not be in doubt.
	grace time.Duration
	// purgeIsFine says that entries which are gone are no loss of truth.
	purgeIsFine bool

	js        jetstream.JetStream
	gather    gatherer
	journal   journal
	snapshots snapshots // nil: the lane has no fold
	tables    tables
	metrics   *metrics
	ready     ready
	log       zerolog.Logger

	streamID, tableID string

	newer atomic.Pointer[quota.NewerError] // the lane reads no further
	// leader, if set, is a lane that knows more of the ledger's rules: where it stops,
	// this one does.
	leader *lane

	mu       sync.Mutex
	progress progress
}

// progress is what the lag is made of.
type progress struct {
	read      uint64 // newest entry read
	pending   uint64 // entries behind it
	committed uint64
	oldest    []laneTime // of the blocks that are not committed, in order
}

type laneTime struct {
	to uint64 // 0: the block is open
	at time.Time
}

// sealed is a block on its way to the committer.
type sealed struct {
	blocks.Span
	at       usage.Micros // the stream's time of its last entry; 0: it was not seen
	rows     int
	parts    []part
	release  func()
	snapshot []byte
	redo     bool // its boundary stands already
	token    string
}

// run carries entries until ctx is done and returns nil, or what can't be mended
// by trying again.
func (l *lane) run(ctx context.Context) error {
	l.ready.NotReady("reading where the history stands")
	var (
		stands boundary
		start  uint64
	)
	err := l.retry(ctx, snapshotTimeout, "can't begin yet", func(ctx context.Context) (err error) {
		stands, start, err = l.begin(ctx)
		return err
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		var newer *quota.NewerError
		if errors.As(err, &newer) {
			l.halt(newer)
			<-ctx.Done()
			return nil
		}
		return fmt.Errorf("history of %s: %w", l.name, err)
	}
	l.mu.Lock()
	l.progress.committed, l.progress.read = stands.committed(), start
	l.mu.Unlock()
	l.metrics.position.WithLabelValues(l.name).Set(float64(stands.committed()))
	l.works()

	group, gctx := errgroup.WithContext(ctx)
	entries := make(chan ledger.Message, 64)
	full := make(chan sealed)
	group.Go(func() error { return l.readAll(gctx, start+1, entries) })
	group.Go(func() error { return l.build(gctx, stands, entries, full) })
	group.Go(func() error { return l.commitAll(gctx, full) })
	group.Go(func() error { return l.report(gctx) })
	if err := group.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("history of %s: %w", l.name, err)
	}
	return nil
}

// halt says that the lane goes no further: what it has is brought into the history,
// and the rest waits in the ledger for a newer program.
func (l *lane) halt(newer *quota.NewerError) {
	l.newer.Store(newer)
	l.works()
	l.log.Error().Err(newer).Str("lane", l.name).Msg("the history of this lane ends here until a newer version of the historian goes on: run one")
}

// works says that the lane does its work, as far as it may.
func (l *lane) works() {
	if newer := l.newer.Load(); newer != nil {
		l.ready.NotReady("the history is not written any further: " + newer.Error())
		return
	}
	l.ready.OK()
}

// begin finds out where the history stands, and from where the stream has to be
// read for that: from behind the snapshot's position.
func (l *lane) begin(ctx context.Context) (stands boundary, position uint64, err error) {
	whole := ctx // a snapshot may be large; the rest is not
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	stream, err := l.js.Stream(ctx, l.stream)
	if err != nil {
		return stands, 0, fmt.Errorf("stream %s: %w", l.stream, err)
	}
	info := stream.CachedInfo()
	l.streamID = strconv.FormatInt(info.Created.UnixNano(), 36)
	empty := true
	for i, table := range l.into {
		id, none, err := l.tables.TableID(ctx, table)
		if err != nil {
			return stands, 0, err
		}
		if i == 0 {
			l.tableID = id
		}
		empty = empty && none
	}
	stands, found, err := l.journal.load(ctx)
	switch {
	case err != nil:
		return stands, 0, err
	case !found && !empty:
		return stands, 0, &fatalError{fmt.Errorf("%s in ClickHouse have rows, but stream %s knows nothing of them: they are of another ledger; empty them to write this one's history, or point to the database that belongs to it", l.tableNames(), l.stream)}
	case !found:
		return boundary{From: 1, Done: true}, 0, nil
	case stands.Stream != l.streamID:
		return stands, 0, &fatalError{fmt.Errorf("the history was written from another stream %s than this one: empty %s in ClickHouse and delete key %s of bucket %s to write it anew, or bring back the stream", l.stream, l.tableNames(), l.name, ledger.HistorianBucket)}
	case stands.Table != l.tableID && !empty:
		return stands, 0, &fatalError{fmt.Errorf("%s in ClickHouse are other tables than the history was written to, and have rows: empty them to write the history anew from the ledger", l.tableNames())}
	case stands.Table != l.tableID:
		l.log.Warn().Str("lane", l.name).Uint64("position", stands.To).Msg("the tables were made anew: the history is written again from the beginning of the stream")
		return boundary{From: 1, Done: true}, 0, nil
	}
	if err := l.compare(ctx, stream, stands); err != nil {
		return stands, 0, err
	}
	if l.snapshots == nil {
		return stands, stands.committed(), nil
	}
	stored, err := l.snapshots.Load(whole)
	if err != nil {
		return stands, 0, err
	}
	for _, data := range stored {
		position, err := l.gather.restore(data, l.streamID)
		if err == nil && position <= stands.committed() {
			l.metrics.snapshotPosition.Set(float64(position))
			return stands, position, nil
		}
		var newer *quota.NewerError
		if errors.As(err, &newer) {
			return stands, 0, &fatalError{newer}
		}
		l.log.Warn().Err(err).Uint64("position", position).Msg("a snapshot can't be used: taking an older one or reading more of the ledger")
	}
	if _, err := l.gather.restore(nil, l.streamID); err != nil {
		return stands, 0, err
	}
	if info.State.FirstSeq > 1 && info.State.Msgs > 0 {
		return stands, 0, &fatalError{fmt.Errorf("no snapshot can be used and the ledger begins at %d: what was seen before is not known: %w", info.State.FirstSeq, ledger.ErrPurged)}
	}
	return stands, 0, nil
}

// compare errs when the stream has lost entries that the boundary speaks of: what
// has their numbers by now would be taken for written.
func (l *lane) compare(ctx context.Context, stream jetstream.Stream, stands boundary) error {
	// Asked after the boundary was read, which another may have moved on since
	// this lane began.
	info, err := stream.Info(ctx)
	if err != nil {
		return fmt.Errorf("stream %s: %w", l.stream, err)
	}
	if end := info.State.LastSeq; end < stands.To {
		return &fatalError{fmt.Errorf("stream %s ends at %d, its history at %d: %w: bring the stream back, or empty %s in ClickHouse and delete key %s of bucket %s to write the history anew from what the stream has",
			l.stream, end, stands.To, ledger.ErrRewound, l.tableNames(), l.name, ledger.HistorianBucket)}
	}
	if stands.At == 0 {
		return nil
	}
	m, err := stream.GetMsg(ctx, stands.To)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound): // purged since
		return nil
	case err != nil:
		return fmt.Errorf("stream %s: %w", l.stream, err)
	case usage.At(m.Time) != stands.At:
		return &fatalError{fmt.Errorf("entry %d of stream %s is of %s, the history has one of %s in its place: %w: bring the stream back, or empty %s in ClickHouse and delete key %s of bucket %s to write the history anew from what the stream has",
			stands.To, l.stream, m.Time.UTC().Format(time.RFC3339Nano), stands.At.Time().Format(time.RFC3339Nano), ledger.ErrRewound, l.tableNames(), l.name, ledger.HistorianBucket)}
	}
	return nil
}

func (l *lane) tableNames() string { return strings.Join(l.into, ", ") }

func (l *lane) readAll(ctx context.Context, from uint64, out chan<- ledger.Message) error {
	next := from
	for {
		err := ledger.Read(ctx, l.js, ledger.ReadOptions{Stream: l.stream, Subjects: l.subjects, From: next, OnError: func(err error) {
			l.log.Warn().Err(err).Str("lane", l.name).Msg("reading was interrupted")
		}}, func(m ledger.Message) error {
			select {
			case out <- m:
				next = m.Sequence + 1
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ledger.ErrRewound) {
			return fmt.Errorf("%w: start the historian again: it goes on where the stream still has what the history has, and says what to do where it has not", err)
		}
		if !errors.Is(err, ledger.ErrPurged) || !l.purgeIsFine {
			return err
		}
		// What is gone from a stream of copies is not coming back.
		l.metrics.purged.WithLabelValues(l.name).Inc()
		l.log.Error().Err(err).Str("lane", l.name).Msg("entries were gone before they were read: going on behind them")
		err = l.retry(ctx, tryTimeout, "can't read the stream", func(ctx context.Context) error {
			stream, err := l.js.Stream(ctx, l.stream)
			if err != nil {
				return fmt.Errorf("stream %s: %w", l.stream, err)
			}
			next = max(next, stream.CachedInfo().State.FirstSeq)
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// build folds entries and cuts them into blocks.
func (l *lane) build(ctx context.Context, stands boundary, in <-chan ledger.Message, out chan<- sealed) error {
	committed := stands.committed()
	plan := blocks.New(l.limits, committed+1)
	redo := sealed{}
	if !stands.Done {
		plan.Force(stands.To)
		redo = sealed{redo: true, token: stands.Token}
	}
	withRows := 0
	last, lastTime := uint64(0), usage.Micros(0)
	cut := func(s blocks.Span) error {
		b := redo
		redo = sealed{}
		b.Span = s
		if last == s.To {
			b.at = lastTime
		}
		if !b.redo {
			b.token = l.token(s)
		}
		var err error
		if b.rows, b.parts, b.release, err = l.gather.seal(ctx, s); err != nil {
			return err
		}
		if b.rows > 0 {
			if withRows++; l.snapshots != nil && withRows%l.snapshotEvery == 0 {
				b.snapshot = l.gather.snapshot(s.To, l.streamID)
			}
		}
		l.sealedAt(s.To)
		select {
		case out <- b:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case m := <-in:
			if m.Sequence <= last {
				continue
			}
			it := l.gather.weigh(m)
			newer := l.gather.beyond()
			if newer == nil && l.leader != nil {
				newer = l.leader.newer.Load()
			}
			if newer != nil {
				l.halt(newer)
				in = nil
				break
			}
			if m.Sequence <= committed {
				last, lastTime = m.Sequence, storedAt(m)
				l.gather.take(m, false)
				l.sawEntry(m, false)
				continue
			}
			if s, ok := plan.Before(it); ok {
				if err := cut(s); err != nil {
					return err
				}
			}
			last, lastTime = m.Sequence, storedAt(m)
			l.gather.take(m, true)
			l.sawEntry(m, true)
			plan.Add(it, time.Now())
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if s, ok := plan.Due(time.Now()); ok {
			if err := cut(s); err != nil {
				return err
			}
		}
		wake := time.Hour
		if at, ok := plan.Wake(); ok {
			wake = time.Until(at)
		}
		timer.Reset(wake)
	}
}

// token names a stretch of this very stream, whatever else wrote to the table
// before.
func (l *lane) token(s blocks.Span) string {
	return fmt.Sprintf("%s/%s/%d-%d", l.name, l.streamID, s.From, s.To)
}

// commitAll brings block after block into the history.
func (l *lane) commitAll(ctx context.Context, in <-chan sealed) error {
	// arrived is the newest block that is in the history and whose done mark is
	// not written. A block that was pending at the start is not one: it has to
	// be repeated first.
	var arrived *boundary
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(l.grace, cancel) })()
	for {
		var b sealed
		select {
		case b = <-in:
		default:
			// Nothing to do: say that the newest block is done.
			if arrived != nil {
				arrived.Done = true
				if err := l.save(ctx, *arrived); err != nil {
					return err
				}
				arrived = nil
			}
			select {
			case b = <-in:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		now := boundary{From: b.From, To: b.To, At: b.at, Rows: b.rows, Token: b.token, Stream: l.streamID, Table: l.tableID}
		if b.rows > 0 {
			if !b.redo {
				if err := l.save(ctx, now); err != nil {
					return err
				}
			}
			if err := l.commit(ctx, hard, b); err != nil {
				return err
			}
		}
		if b.release != nil {
			b.release()
		}
		arrived = &now
		l.committedUpTo(b.To)
		if b.snapshot != nil {
			// Without it a restart only has more to read again.
			bounded, cancel := context.WithTimeout(ctx, snapshotTimeout)
			err := l.snapshots.Save(bounded, b.snapshot)
			cancel()
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				l.log.Warn().Err(err).Msg("the snapshot of what has been seen was not stored")
				continue
			}
			l.metrics.snapshotBytes.Set(float64(len(b.snapshot)))
			l.metrics.snapshotPosition.Set(float64(b.To))
		}
	}
}

// save makes a boundary durable, however long that takes.
func (l *lane) save(ctx context.Context, b boundary) error {
	return l.retry(ctx, tryTimeout, "the block's boundary can't be written", func(ctx context.Context) error { return l.journal.save(ctx, b) })
}

// commit brings a block's parts into their tables, at once and independently of
// each other.
func (l *lane) commit(ctx, hard context.Context, b sealed) error {
	var group errgroup.Group
	for _, p := range b.parts {
		group.Go(func() error { return l.insert(ctx, hard, p, b.token, b.redo) })
	}
	return group.Wait()
}

// insertTimeout bounds one try of an insert.
const insertTimeout = time.Minute

// insert brings one part into its table exactly once. It tries for ever; doubt
// says that an earlier try may have succeeded.
func (l *lane) insert(ctx, hard context.Context, p part, token string, doubt bool) error {
	again := 0
	use := token
	for try := 0; ; try++ {
		done, err := l.tryInsert(hard, p, use, &doubt)
		var fatal *fatalError
		switch {
		case done:
			l.metrics.rows.WithLabelValues(p.Table()).Add(float64(p.Rows()))
			l.metrics.blocks.WithLabelValues(p.Table()).Inc()
			if try > 0 {
				l.works()
			}
			return nil
		case errors.As(err, &fatal):
			l.ready.NotReady(err.Error())
			return err
		case err == nil:
			// The server took the token for done and has no row of the block:
			// it was killed between noting the one and keeping the other.
			again++
			use = fmt.Sprintf("%s/%d", token, again)
			l.log.Warn().Str("table", p.Table()).Str("token", token).Msg("ClickHouse knows the block's token and has none of its rows: sending it under another")
		case ctx.Err() != nil:
			return ctx.Err() // told to stop; the next run finds out
		default:
			l.metrics.retries.WithLabelValues(p.Table()).Inc()
			l.ready.NotReady("ClickHouse has not confirmed a block of " + p.Table() + ": trying again")
			l.log.Warn().Err(err).Str("table", p.Table()).Str("token", token).Int("try", try+1).Msg("a block is in doubt")
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// tryInsert returns true when the part is in its table. It returns false without
// an error when the server said so and it is not.
func (l *lane) tryInsert(ctx context.Context, p part, token string, doubt *bool) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, insertTimeout)
	defer cancel()
	if *doubt {
		if there, err := present(ctx, p); there || err != nil {
			return there, err
		}
	}
	begin := time.Now()
	if err := p.Insert(ctx, token); err != nil {
		*doubt = true
		return false, err
	}
	l.metrics.seconds.WithLabelValues(p.Table()).Observe(time.Since(begin).Seconds())
	if !*doubt {
		return true, nil
	}
	return present(ctx, p)
}

func present(ctx context.Context, p part) (bool, error) {
	there, err := p.Present(ctx)
	if errors.Is(err, history.ErrTorn) {
		return false, &fatalError{err}
	}
	return there, err
}

const (
	// tryTimeout bounds one try of something small.
	tryTimeout = 10 * time.Second
	// snapshotTimeout bounds what carries a snapshot, which may be large.
	snapshotTimeout = time.Minute
)

// retry calls do until it succeeds, fails for good, or ctx is done; within bounds
// one try.
func (l *lane) retry(ctx context.Context, within time.Duration, what string, do func(context.Context) error) error {
	for try := 0; ; try++ {
		bounded, cancel := context.WithTimeout(ctx, within)
		err := do(bounded)
		cancel()
		var fatal *fatalError
		switch {
		case err == nil:
			if try > 0 {
				l.works()
			}
			return nil
		case errors.As(err, &fatal):
			l.ready.NotReady(err.Error())
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
		l.ready.NotReady(what + ": " + err.Error())
		l.log.Warn().Err(err).Str("lane", l.name).Int("try", try+1).Msg(what)
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// pause waits before the next try: 50 ms at first, 2 s at last.
func pause(ctx context.Context, try int) error {
	d := 2 * time.Second
	if try < 6 {
		d = min(d, 50*time.Millisecond<<try)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *lane) sawEntry(m ledger.Message, keep bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.progress
	p.read, p.pending = m.Sequence, m.Pending
	if n := len(p.oldest); keep && (n == 0 || p.oldest[n-1].to != 0) {
		p.oldest = append(p.oldest, laneTime{at: storedAt(m).Time()})
	}
}

func (l *lane) sealedAt(to uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.progress.oldest); n > 0 {
		l.progress.oldest[n-1].to = to
	}
}

func (l *lane) committedUpTo(to uint64) {
	l.mu.Lock()
	p := &l.progress
	p.committed = max(p.committed, to)
	for len(p.oldest) > 0 && p.oldest[0].to != 0 && p.oldest[0].to <= to {
		p.oldest = p.oldest[1:]
	}
	l.mu.Unlock()
	l.metrics.position.WithLabelValues(l.name).Set(float64(to))
	l.reportLag()
}

func (l *lane) reportLag() {
	l.mu.Lock()
	p := l.progress
	oldest := time.Time{}
	if len(p.oldest) > 0 {
		oldest = p.oldest[0].at
	}
	l.mu.Unlock()
	entries := p.pending
	if p.read > p.committed {
		entries += p.read - p.committed
	}
	l.metrics.lag(l.name, entries, oldest, time.Now())
}

// report keeps the lag current while nothing moves.
func (l *lane) report(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.reportLag()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// storedAt is the server's time of a message, also where the ledger has a test clock.
func storedAt(m ledger.Message) usage.Micros {
	if !m.TestClock {
		return usage.At(m.Time)
	}
	return usage.At(m.StoredAt)
}

func streamTime(m ledger.Message) usage.Micros { return usage.At(m.Time) }
