package aggregator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/anchor"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/letters"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

const (
	beaconEvery = 250 * time.Millisecond
	// tickEvery is how often time is let pass by an entry at most, and
	// leaseTickEvery if gateways wait for it (the core's patience is 400 ms).
	tickEvery      = time.Second
	leaseTickEvery = 50 * time.Millisecond
	// idleEntries of others are how many may follow a shard's last, and
	// idleTickEvery is how often its position is moved for that at most.
	idleEntries   = 1 << 20
	idleTickEvery = time.Minute
	// tickMargin is how long after its time a tick is appended: the stream's
	// clock is known only to about a network round trip.
	tickMargin = 5 * time.Millisecond
	// inputBuffer, queryBuffer bound what waits for a shard.
	inputBuffer = 64
	queryBuffer = 64
	// maxQueued decisions and maxDead dead letters are held while NATS does
	// not take them; then the shard reads no further.
	maxQueued = 100_000
	maxDead   = 64
	// ioTimeout and askTimeout bound what NATS may not answer at all, such as
	// while a stream has no leader: then it is asked again.
	ioTimeout  = 2 * time.Second
	askTimeout = time.Second
	// lookAt decisions of another's shard are kept before it is looked which of
	// them are published, every lookEvery at most; of more than maxBacklog none
	// is kept, and the shard is read from its snapshot if it becomes ours before
	// they are known to be published.
	lookAt     = 256
	lookEvery  = time.Second
	maxBacklog = 20_000
	// snapshotTimeout is longer: a snapshot may be hundreds of megabytes.
	snapshotTimeout = 2 * time.Minute
)

// owner counts one shard, while the shard is ours and, if it stands by, while it
// is another's: one goroutine owns the state, what waits for NATS is done by
// others, one of each kind at a time.
type owner struct {
	*service
	shard   uint32
	log     zerolog.Logger
	tenures chan *tenure
	tail    atomic.Bool   // it is to be folded though it is not ours
	nudge   chan struct{} // tail has changed
	intake  atomic.Pointer[intake]
	queries chan *nats.Msg
	results chan func() error // what a goroutine of ours brings back
	running int               // goroutines of ours

	state   *quota.Shard // nil: it is not folded
	decoder fold.Decoder
	dead    []letter // entries to be kept in the dead letters, by us or by the owner
	// unkept is the newest entry that belonged in dead and did not fit; a state
	// from before it will see it again.
	unkept      uint64
	lastControl uint64 // newest entry of the shard's control subject
	// newer, if set, says that the ledger goes on by rules that this program does not
	// know: it folds no more of the shard, and does not own it (again).
	newer   *quota.NewerError
	entries int // since the last snapshot

	// While it is not ours.
	backlog  publish.Backlog
	looking  bool // how far the owner is
	lookedAt time.Time
	warming  bool

	// While it is.
	tenure       *tenure
	ended        int  // tenures
	owns         bool // fenced: pub holds
	pub          publish.Publisher
	target       uint64 // what the ledger held of the shard at the start
	ready        bool   // the target is counted
	allowances   atomic.Int64
	open         atomic.Int64 // counters that lack what was used before them
	openings     openings
	leaseUnits   atomic.Pointer[map[usage.Meter]meter.LeaseUnits]
	sumAt        time.Time    // when leaseUnits are to be summed again
	lastBeacon   atomic.Int64 // Unix nanoseconds; of the begin before the first; 0: not ours
	publishing   bool
	retry        backoff
	retryAt      time.Time
	burying      bool
	ticking      bool // a control entry of ours is on its way
	lastTick     time.Time
	lastCore     time.Time // when the ledger was told of our rules
	snapshotting bool
	lastSnapshot time.Time
	snapshotSize int
	stopping     bool
	finalDone    bool

	wake *time.Timer
}

// letter is an entry that cannot be counted.
type letter struct {
	sequence uint64
	subject  string
	reason   string
	detail   string
	message  *nats.Msg // nil: it is to be read again
}

func newOwner(s *service, shard uint32) *owner {
	return &owner{
		decoder: fold.Decoder{Frame: ledger.Frame{CostsIn: s.currency}},
		service: s, shard: shard, log: s.log.With().Uint32("shard", shard).Logger(), tenures: make(chan *tenure), nudge: make(chan struct{}, 1),
		queries: make(chan *nats.Msg, queryBuffer), results: make(chan func() error, 8),
	}
}

// run counts until ctx is done.
func (o *owner) run(ctx context.Context) error {
	// What is still under way at the end is given up first, then waited for.
	defer o.settle()
	defer o.end()
	beat := time.NewTicker(beaconEvery)
	defer beat.Stop()
	o.wake = time.NewTimer(time.Hour)
	defer o.wake.Stop()
	for {
		o.start(ctx)
		if o.owns && o.stopping && o.idle() {
			o.end()
		}
		var in <-chan ledger.Message
		if from := o.intake.Load(); from != nil && o.state != nil {
			in = from.in
		}
		if o.stopping || o.owns && len(o.dead) >= maxDead {
			in = nil
		}
		if o.owns && o.pub.Queued() >= maxQueued {
			in = nil
		}
		tenures, queries := o.tenures, o.queries
		if o.tenure != nil && !o.owns {
			queries = nil // they wait
		}
		var lost, drain <-chan struct{}
		if t := o.tenure; t != nil {
			tenures, lost = nil, t.ctx.Done()
			if !o.stopping {
				drain = t.claim.Drain()
			}
		}
		select {
		case m := <-in:
			o.apply(m)
		case finish := <-o.results:
			o.running--
			if err := finish(); err != nil {
				o.failed(err)
			}
		case q := <-queries:
			if o.may() {
				o.answer(q)
			}
		case <-beat.C:
			o.beacon()
			if o.owns {
				o.sumLeases(time.Now())
			}
		case <-o.wake.C:
		case <-o.nudge:
		case t := <-tenures:
			o.begin(ctx, t)
		case <-drain:
			// Without the shard there is nothing to be handed over.
			if o.stopping = true; o.abandon || !o.owns {
				o.end()
			}
		case <-lost:
			if n := o.unpublished(); n > 0 {
				o.log.Warn().Int("decisions", n).Msg("the shard is not ours any more before everything was published: its next owner does it")
			}
			o.end()
		case <-ctx.Done():
			return nil
		}
	}
}

func (o *owner) unpublished() int {
	if o.owns {
		return o.pub.Queued()
	}
	return 0
}

// failed takes an error that ends a tenure, or more than that.
func (o *owner) failed(err error) {
	if errors.Is(err, ledger.ErrStale) {
		o.log.Warn().Err(err).Msg("another aggregator has taken the shard over")
	} else {
		select {
		case o.fatal <- err:
		default: // another was first
		}
	}
	o.end()
}

// begin makes the shard ours: with the state that is there, if no decision is
// missing that its owner did not publish.
func (o *owner) begin(ctx context.Context, t *tenure) {
	o.tenure = t
	if o.newer != nil {
		o.end()
		return
	}
	o.looking, o.warming = false, false
	var folded uint64
	if o.state != nil {
		folded = o.state.Sequence()
	}
	o.do(t.ctx, time.Hour, func(io context.Context) func() error {
		var at publish.Position
		var end anchor.Ending
		err := o.persist(io, fmt.Sprintf("take over shard %d", o.shard), func(once context.Context) (err error) {
			if at, err = o.stores.Fence(once, o.shard, t.claim.Token); err == nil {
				end, err = o.stores.Ends(once, o.shard, max(folded, anchor.SnapshotAt(at.Found.Snapshot)), at)
			}
			return err
		})
		return func() error {
			if err != nil {
				return o.giveUp(io, err)
			}
			if o.state != nil && o.unkept <= anchor.SnapshotAt(at.Found.Snapshot) {
				pub, ok := o.backlog.Resume(o.shard, at.Revision, at.Found, at.Newest, o.state.Sequence())
				if ok {
					o.adopt(at, end, pub)
					return nil
				}
			}
			o.reload(ctx, t, at, end)
			return nil
		}
	})
}

// giveUp ends a tenure that could not be begun in its time: as long as it lasts
// nobody else can try. An error that has another reason is returned.
func (o *owner) giveUp(io context.Context, err error) error {
	if err = ignoreEnd(io, err); err == nil {
		o.end()
	}
	return err
}

// unknown reports whether an error only says that a newer program has to go on, and
// leaves the shard to it.
func (o *owner) unknown(err error) bool {
	var newer *quota.NewerError
	if !errors.As(err, &newer) {
		return false
	}
	o.halt(newer)
	return true
}

// ignoreEnd drops an error that is only the end of the time for something.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

// reload begins from the snapshot: nothing was folded, or not all is known of it.
func (o *owner) reload(ctx context.Context, t *tenure, at publish.Position, end anchor.Ending) {
	o.cool()
	o.do(t.ctx, time.Hour, func(io context.Context) func() error {
		var w anchor.Warmed
		err := o.persist(io, fmt.Sprintf("load shard %d", o.shard), func(once context.Context) (err error) {
			w, err = o.stores.Warm(once, o.shard)
			return err
		})
		return func() error {
			if o.unknown(err) {
				return nil
			}
			if err != nil {
				return o.giveUp(io, err)
			}
			o.take(ctx, w)
			pub, _ := o.backlog.Resume(o.shard, at.Revision, at.Found, at.Newest, o.state.Sequence())
			o.adopt(at, end, pub)
			return nil
		}
	})
}

// cool lets the state go.
func (o *owner) cool() {
	o.state, o.backlog, o.dead, o.unkept, o.entries = nil, publish.Backlog{}, nil, 0, 0
	if from := o.intake.Swap(nil); from != nil {
		close(from.gone)
	}
}

// take folds on from a state that was loaded.
func (o *owner) take(ctx context.Context, w anchor.Warmed) {
	o.state, o.backlog = w.State, publish.Backlog{}
	from := newIntake(&reader{service: o.service, one: o})
	o.intake.Store(from)
	o.readApart(ctx, from, w.From)
	o.status.set(o.service, func(*status) {}) // loading may have said that it failed
}

// adopt begins to publish.
func (o *owner) adopt(at publish.Position, end anchor.Ending, pub publish.Publisher) {
	o.pub, o.owns, o.backlog = pub, true, publish.Backlog{}
	o.target, o.lastControl = end.Shard, max(o.lastControl, end.Control)
	now := time.Now()
	o.lastBeacon.Store(now.UnixNano())
	o.lastSnapshot = now
	// Shards that were taken over together are not all to be kept at once.
	o.entries = min(o.entries, o.o.SnapshotEntries/2)
	o.log.Info().Uint64("epoch", at.Found.Epoch).Uint64("from", o.state.Sequence()+1).Uint64("to", o.target).Int("decisions", o.pub.Queued()).
		Dur("took_ms", now.Sub(o.tenure.begun)).Msg("owns the shard")
	o.checkReady()
	select {
	case o.unswept <- anchor.Taking{Shard: o.shard, Epoch: at.Found.Epoch, Snapshot: at.Found.Snapshot}:
	default: // the next one sweeps
	}
}

// end gives the shard back, if it is ours. What was not published, the next
// owner publishes.
func (o *owner) end() {
	t := o.tenure
	if t == nil {
		return
	}
	if o.owns {
		o.backlog = o.pub.Resign()
		o.pub = publish.Publisher{}
	}
	if o.ready {
		o.status.set(o.service, func(s *status) { s.counted-- })
	}
	o.lastBeacon.Store(0)
	o.allowances.Store(0)
	o.open.Store(0)
	o.openings = openings{}
	o.leaseUnits.Store(nil)
	o.sumAt = time.Time{}
	o.tenure, o.owns, o.ready = nil, false, false
	o.ended++
	o.publishing, o.burying, o.ticking, o.snapshotting, o.stopping, o.finalDone = false, false, false, false, false, false
	o.retry.reset()
	o.retryAt = time.Time{}
	if o.newer != nil {
		o.cool()
		t.over <- fmt.Errorf("%w: %w", ownership.ErrUnfit, o.newer)
		return
	}
	t.over <- nil
}

// may says whether the shard is ours at this moment.
func (o *owner) may() bool { return o.owns && o.tenure.claim.Check() == nil }

// settle waits for the goroutines that this one started.
func (o *owner) settle() {
	for ; o.running > 0; o.running-- {
		<-o.results
	}
}

// idle reports whether an orderly end has nothing left to do. Who takes the shard
// over does not wait for a snapshot to be stored, unless the process would cut it
// off.
func (o *owner) idle() bool {
	busy := o.running
	if o.snapshotting && !o.ends() {
		busy--
	}
	if o.openings.counting {
		busy-- // the next owner begins again
	}
	return busy == 0 && o.pub.Queued() == 0 && len(o.dead) == 0 && !o.pub.Offered() && o.pub.Flight() == nil && (o.finalDone || o.entries == 0 || !o.last())
}

// last says whether the process ends and nobody takes the shard, who would have
// folded it already: then the next start is to find a snapshot.
func (o *owner) last() bool {
	return o.ends() && o.tenure.claim.Heir() == ""
}

// ends says whether the process is to end.
func (o *owner) ends() bool {
	select {
	case <-o.stop:
		return true
	default:
		return false
	}
}

// do runs work beside the owner; what it returns is then called by the owner,
// unless a tenure has begun or ended since.
func (o *owner) do(io context.Context, limit time.Duration, work func(ctx context.Context) func() error) {
	o.running++
	t, ended := o.tenure, o.ended
	go func() {
		ctx, cancel := context.WithTimeout(io, limit)
		defer cancel()
		var finish func() error
		if t == nil || t.claim.Check() == nil {
			finish = work(ctx)
		} else {
			finish = func() error { o.end(); return nil }
		}
		o.results <- func() error {
			// Standing by before a tenure and after it look the same.
			if o.tenure != t || o.ended != ended {
				return nil
			}
			return finish()
		}
	}()
}

// start begins whatever is due, and sets the clock for what will be.
func (o *owner) start(ctx context.Context) {
	now := time.Now()
	wake := time.Hour
	switch {
	case o.may():
		wake = o.serve(o.tenure.ctx, now)
	case o.tenure == nil:
		wake = o.standBy(ctx, now)
	}
	o.wake.Reset(wake)
}

// standBy keeps what is folded of another's shard within bounds.
func (o *owner) standBy(ctx context.Context, now time.Time) (wake time.Duration) {
	wake = time.Hour
	tail := o.tail.Load()
	switch {
	case o.newer != nil:
	case tail && o.state == nil && !o.warming:
		o.warming = true
		o.do(ctx, time.Hour, func(io context.Context) func() error {
			var w anchor.Warmed
			err := o.persist(io, fmt.Sprintf("load shard %d", o.shard), func(once context.Context) (err error) {
				w, err = o.stores.Warm(once, o.shard)
				return err
			})
			return func() error {
				o.warming = false
				if o.unknown(err) {
					return nil
				}
				if err == nil {
					o.take(ctx, w)
				}
				return ignoreEnd(io, err)
			}
		})
	case !tail && o.state != nil:
		o.cool()
	case o.state != nil && !o.looking && (o.backlog.Len() >= lookAt || o.unkept > 0 || len(o.dead) >= maxDead/4):
		if wait := o.lookedAt.Add(lookEvery).Sub(now); wait > 0 {
			return wait
		}
		o.looking, o.lookedAt = true, now
		o.do(ctx, ioTimeout, func(ask context.Context) func() error {
			at, err := o.stores.Position(ask, o.shard)
			return func() error {
				o.looking = false
				if err != nil {
					o.log.Debug().Err(err).Msg("how far the shard's owner is cannot be read")
					return nil
				}
				o.backlog.Saw(at)
				kept := anchor.SnapshotAt(at.Found.Snapshot)
				o.dead = slices.DeleteFunc(o.dead, func(l letter) bool { return l.sequence <= kept })
				if o.unkept <= kept {
					o.unkept = 0
				}
				return nil
			}
		})
	}
	return wake
}

// serve does what an owner does.
func (o *owner) serve(io context.Context, now time.Time) (wake time.Duration) {
	wake = time.Hour
	if !o.publishing {
		if wait := o.retryAt.Sub(now); wait > 0 {
			wake = min(wake, wait)
		} else if b := o.pub.Flight(); b != nil {
			o.publish(io, b)
		} else if b := o.pub.Next(); b != nil {
			o.publish(io, b)
		}
	}
	if !o.burying && len(o.dead) > 0 {
		if wait := o.retryAt.Sub(now); wait > 0 {
			wake = min(wake, wait)
		} else {
			o.bury(io, &o.dead[0])
		}
	}
	if o.ready && !o.stopping && !o.ticking && o.left(now) {
		o.lastTick = now
		o.tick(io)
	}
	if o.ready && !o.stopping && !o.ticking && o.rulesDiffer() {
		if wait := o.lastCore.Add(tickEvery).Sub(now); wait <= 0 {
			o.lastCore = now
			o.sayRules(io)
		} else {
			wake = min(wake, wait)
		}
	}
	if o.ready && !o.stopping && !o.ticking {
		if wait, due := o.tickIn(now); due && wait <= 0 {
			o.lastTick = now
			o.tick(io)
		} else if due {
			wake = min(wake, wait)
		}
	}
	if o.ready && !o.stopping {
		wake = min(wake, o.countOpenings(io, now))
	}
	// The state holds decisions that are not yet published; a dead letter must
	// be kept before a snapshot passes its entry.
	if !o.snapshotting && !o.pub.Offered() && o.entries > 0 && len(o.dead) == 0 {
		final := o.stopping && !o.finalDone && o.last()
		if final || (!o.stopping && (o.entries >= o.o.SnapshotEntries || now.Sub(o.lastSnapshot) >= o.o.SnapshotEvery)) {
			o.finalDone = final
			o.snapshot()
		}
	}
	return wake
}

// left reports whether the ledger has gone on for so long without this shard
// that its position, which is its last entry's, would be in the way of whoever
// removes what is counted: a tick moves it.
func (o *owner) left(now time.Time) bool {
	from := o.intake.Load()
	return o.head.Load() > o.state.Sequence()+o.o.idleEntries && (from == nil || len(from.in) == 0) && now.Sub(o.lastTick) >= idleTickEvery
}

// apply folds an entry of the ledger.
func (o *owner) apply(m ledger.Message) {
	if m.Sequence <= o.state.Sequence() {
		return
	}
	e, kind, err := o.decoder.Decode(&m)
	fx := o.state.Apply(e)
	if fx.Newer != nil {
		o.halt(fx.Newer)
		return
	}
	switch kind {
	case ledger.KindControl:
		o.lastControl = m.Sequence
		if o.owns {
			o.m.Controls.Inc()
		}
	case ledger.KindClosing:
		if o.owns {
			o.m.Controls.Inc()
		}
	case ledger.KindLease:
		if o.owns {
			o.m.Asks.Add(float64(len(e.Asks)))
		}
	}
	o.entries++
	if err == nil && fx.Invalid != nil {
		err = fx.Invalid
	}
	if err != nil {
		o.deadLetter(m, err)
	}
	if fx.Lost > 0 && o.owns {
		o.m.Skipped.Add(float64(fx.Lost))
		o.log.Error().Hex("producer", e.Control.Closed[:]).Uint64("last", e.Control.ClosedAt).Uint64("missing", fx.Lost).
			Msg("the last frames of a producer that has ended never came: calls are lost")
	}
	if !o.owns {
		if o.backlog.Add(fx.Decisions); o.backlog.Len() > maxBacklog {
			o.backlog.Drop()
		}
		return
	}
	o.observe(fx, e.Batch != nil)
	o.pub.Add(m.Sequence, fx.Decisions)
	o.answerAsks(fx.Answers)
	o.checkReady()
}

// halt leaves the shard to a newer program, from the entry on that asks for one. What
// was decided before is published first, as at a hand-over.
func (o *owner) halt(newer *quota.NewerError) {
	o.newer = newer
	o.log.Error().Err(newer).Msg("the shard is not folded any further by this program, which gives it up: run a newer version")
	o.status.set(o.service, func(s *status) { s.beyond, s.newer = s.beyond+1, newer })
	if from := o.intake.Swap(nil); from != nil {
		close(from.gone)
	}
	if o.stopping = o.owns; o.stopping {
		return
	}
	o.end()
	o.cool()
}

func (o *owner) observe(fx *quota.Effects, counted bool) {
	for i, n := range [...]int64{fx.Leases.Grants, fx.Leases.Recalls, fx.Leases.DeniedEarly, fx.Leases.DeniedFinal} {
		if n > 0 {
			o.m.LeaseEvents[i].Add(float64(n))
		}
	}
	o.allowances.Store(int64(o.state.Allowances()))
	if !counted {
		return
	}
	frame := &o.decoder.Frame
	switch fx.Frame {
	case dedup.Fresh:
		o.m.Frames.WithLabelValues("fresh").Inc()
	case dedup.Duplicate:
		o.m.Frames.WithLabelValues("duplicate").Inc()
		o.m.Events.WithLabelValues("duplicate").Add(float64(frame.N))
	case dedup.Gap:
		o.m.Frames.WithLabelValues("gap").Inc()
		o.m.Skipped.Add(float64(fx.Skipped))
		o.log.Error().Stringer("producer", frame.Producer).Uint64("number", frame.Number).Uint64("missing", fx.Skipped).
			Str("gateway", frame.Gateway).Msg("frames are missing before this one: calls may be lost")
	}
	o.m.Events.WithLabelValues("admitted").Add(float64(fx.Admitted))
	o.m.Events.WithLabelValues("refused").Add(float64(fx.Refused))
	if fx.Duplicates > 0 {
		o.m.Events.WithLabelValues("duplicate").Add(float64(fx.Duplicates))
	}
	o.m.Late.Add(float64(fx.Late))
	o.m.Future.Add(float64(fx.Future))
	if fx.Overflows > 0 {
		o.m.Overflows.Add(float64(fx.Overflows))
		o.log.Error().Uint64("sequence", o.state.Sequence()).Int("sums", fx.Overflows).Msg("sums reached the end of 64 bits and stay there")
	}
	if fx.Unplaced > 0 {
		o.m.Unplaced.Add(float64(fx.Unplaced))
	}
	if fx.Unmetered > 0 {
		o.m.Unmetered.Add(float64(fx.Unmetered))
	}
	if fx.NewAccounts > 0 {
		o.m.NewAccounts.Add(float64(fx.NewAccounts))
	}
	if o.ready {
		lag := max(time.Since(frame.SealedAt.Time()), 0)
		o.m.CountLatency.Observe(lag.Seconds())
		o.m.Slowest.Note(lag)
	}
}

func (o *owner) checkReady() {
	if !o.ready && o.state.Sequence() >= o.target {
		o.ready = true
		o.status.set(o.service, func(s *status) { s.counted++ })
		// What the owner before said last may have died with it.
		o.answerAsks(o.state.Resume())
		o.beacon()
	}
}

// publish stores a batch of decisions with the checkpoint.
func (o *owner) publish(io context.Context, b *publish.Batch) {
	o.publishing = true
	pub := o.pub // ours may have ended before it is asked
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		msgs, err := pub.Messages(b)
		if err != nil {
			return func() error { return fmt.Errorf("shard %d: %w", o.shard, err) }
		}
		sequence, err := o.send(ctx, b, msgs)
		if err == nil {
			at := time.Now()
			return func() error { o.stored(io, b, o.pub.Acked(sequence), at); return nil }
		}
		// Stored or not: the stream knows.
		ask, cancel := context.WithTimeout(io, ioTimeout)
		defer cancel()
		stands, askErr := o.stores.Position(ask, o.shard)
		return func() error {
			o.m.Batches.WithLabelValues("unclear").Inc()
			if askErr != nil {
				o.later(errors.Join(err, askErr))
				return nil
			}
			again, obsolete, err2 := o.pub.Failed(stands)
			switch {
			case err2 != nil:
				return err2
			case again:
				o.later(err)
				return nil
			}
			o.stored(io, b, obsolete, time.Now())
			return nil
		}
	})
}

// later lets the publishing pause after a failure.
func (o *owner) later(err error) {
	o.publishing = false
	wait := o.retry.next()
	o.retryAt = time.Now().Add(wait)
	o.log.Warn().Err(err).Dur("again_in_ms", wait).Msg("decisions could not be published")
}

// send returns the stream sequence of the last message.
func (o *owner) send(ctx context.Context, b *publish.Batch, msgs []*nats.Msg) (uint64, error) {
	if !b.Lone {
		return ledger.PublishBatch(ctx, o.nc, msgs)
	}
	ack, err := o.js.PublishMsg(ctx, msgs[0])
	if err != nil {
		return 0, fmt.Errorf("publish decision: %w", err)
	}
	return ack.Sequence, nil
}

func (o *owner) stored(io context.Context, b *publish.Batch, obsolete string, at time.Time) {
	o.publishing = false
	o.retry.reset()
	o.m.Batches.WithLabelValues("stored").Inc()
	for i := range b.Decisions {
		d := &b.Decisions[i]
		o.m.Decisions.WithLabelValues(d.Verdict.String()).Inc()
		// A trace that is replayed with its own times says nothing of latency.
		if lag := at.Sub(d.Cause.Time()); d.Cause != 0 && lag < time.Hour {
			o.m.DecisionLatency.Observe(max(lag.Seconds(), 0))
		}
	}
	if obsolete != "" {
		o.forget(io, obsolete)
	}
	o.beacon()
}

// deadLetter keeps an entry that cannot be counted, or where it stands as long
// as the shard is another's, who keeps it.
func (o *owner) deadLetter(m ledger.Message, cause error) {
	l := letter{sequence: m.Sequence, subject: m.Subject, reason: usage.ReasonMalformed, detail: cause.Error()}
	var invalid *usage.InvalidError
	if errors.As(cause, &invalid) {
		l.reason = invalid.Reason
	}
	if !o.owns {
		if len(o.dead) >= maxDead {
			o.dead, o.unkept = nil, m.Sequence
			return
		}
		o.dead = append(o.dead, l)
		return
	}
	o.m.DeadLetters.WithLabelValues(l.reason).Inc()
	o.log.Error().Err(cause).Str("reason", l.reason).Uint64("sequence", m.Sequence).Msg("an entry of the ledger cannot be counted: it is kept in the dead letters")
	l.message = o.write(&l, m.Header, m.Data)
	o.dead = append(o.dead, l)
}

// write makes the message that keeps an entry.
func (o *owner) write(l *letter, header nats.Header, data []byte) *nats.Msg {
	return letters.Message(o.shard, l.sequence, l.subject, l.reason, l.detail, header, data)
}

// read again an entry that is to be kept; nil when the ledger has it no more.
func (o *owner) reread(ctx context.Context, l *letter) (*nats.Msg, error) {
	stream, err := o.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	m, err := stream.GetMsg(ctx, l.sequence)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound) && stream.CachedInfo().State.FirstSeq > l.sequence:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("entry %d of the ledger: %w", l.sequence, err)
	}
	return o.write(l, m.Header, m.Data), nil
}

func (o *owner) bury(io context.Context, l *letter) {
	o.burying = true
	letter := *l
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		var err error
		m := letter.message
		if m == nil {
			m, err = o.reread(ctx, &letter)
		}
		if err == nil && m != nil {
			_, err = letters.Keep(ctx, o.js, m)
		}
		return func() error {
			o.burying = false
			if err == nil {
				o.dead = o.dead[1:]
				o.retry.reset()
				return nil
			}
			wait := o.retry.next()
			o.retryAt = time.Now().Add(wait)
			o.log.Warn().Err(err).Dur("again_in_ms", wait).Msg("a dead letter could not be kept")
			return nil
		}
	})
}

// errCodeWriteUnderWay is JetStream's code that the client has no name for.
const errCodeWriteUnderWay jetstream.ErrorCode = 10164

func refusedWith(err error, codes ...jetstream.ErrorCode) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && slices.Contains(codes, api.ErrorCode)
}

// tick lets the shard's time pass: somebody's period has ended and no call comes.
func (o *owner) tick(io context.Context) {
	o.appendControl(io, &tollkeeperv1.ControlEntry{
		Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: o.pub.Last().Epoch}},
	}, "a tick", o.m.Ticks.Inc)
}

// rules by which we want the shard to be folded from here on.
func (o *owner) rules() quota.Core {
	c := quota.Core{Version: quota.CoreVersion, Horizon: o.horizon()}
	if c.Horizon == 0 {
		c.Horizon = o.state.Core().Horizon
	}
	return c
}

// rulesDiffer reports whether the ledger does not say yet by which rules this
// program folds. Where a newer program has said so, this one folds nothing.
func (o *owner) rulesDiffer() bool {
	is, want := o.state.Core(), o.rules()
	return is.Version < want.Version || is.Version == want.Version && is.Horizon != want.Horizon
}

// sayRules lets the ledger say it, so that a replay needs to be told nothing.
func (o *owner) sayRules(io context.Context) {
	c := o.rules()
	o.appendControl(io, &tollkeeperv1.ControlEntry{
		Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: c.Version, ForeignHorizonMicros: int64(c.Horizon)}},
	}, "the version of the rules", func() {})
}

// appendControl appends an entry of ours to the shard, unless another control
// entry has come meanwhile: with that, time has passed too.
func (o *owner) appendControl(io context.Context, e *tollkeeperv1.ControlEntry, what string, stored func()) {
	e.Id, e.Author, e.CreatedAtUnixMicros = ksuid.New().String(), "aggregator", time.Now().UnixMicro()
	m, err := ledger.ControlMessage(o.shard, e)
	if err != nil {
		o.log.Error().Err(err).Msg(what + " could not be written")
		return
	}
	ledger.ExpectLast(m, o.lastControl)
	o.ticking = true
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		_, err := o.js.PublishMsg(ctx, m)
		return func() error {
			o.ticking = false
			switch {
			case err == nil:
				stored()
			case refusedWith(err, jetstream.JSErrCodeStreamWrongLastSequence, errCodeWriteUnderWay):
			default:
				o.log.Warn().Err(err).Msg(what + " could not be appended")
			}
			return nil
		}
	})
}

// beacon says how far the shard is. Before everything is counted that the
// ledger held at the start there is none: the gateways are not to take old
// verdicts for new.
func (o *owner) beacon() {
	if !o.ready || o.stopping || !o.may() {
		return
	}
	data, err := proto.Marshal(&tollkeeperv1.Beacon{
		Shard: o.shard, Epoch: o.pub.Last().Epoch, LedgerSequence: o.state.Sequence(), StreamTimeUnixMicros: int64(o.state.Now()),
		DecisionsSequence: o.pub.Written(), SentAtUnixMicros: time.Now().UnixMicro(),
	})
	if err == nil {
		err = o.nc.Publish(ledger.BeaconSubject(o.shard), data)
	}
	if err != nil {
		// While NATS is away there is nobody to hear it; the connection says so.
		o.log.Debug().Err(err).Msg("no beacon")
		return
	}
	o.lastBeacon.Store(time.Now().UnixNano())
}

// backoff grows from 50 ms to 2 s.
type backoff struct{ wait time.Duration }

func (b *backoff) next() time.Duration {
	b.wait = min(max(2*b.wait, 50*time.Millisecond), 2*time.Second)
	return b.wait
}

func (b *backoff) reset() { b.wait = 0 }
