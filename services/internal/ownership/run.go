package ownership

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership/fleet"
)

// DefaultStopTimeout bounds the hand-over of a clean stop.
const DefaultStopTimeout = 4 * time.Second

// Options of a member.
type Options struct {
	// NC and JS are where the bucket is; they must not close before Run ends.
	NC *nats.Conn
	JS jetstream.JetStream
	// Bucket is the KV bucket that the fleet meets in; empty: DefaultBucket.
	// Replicas, of a bucket that does not exist yet; 0 means 1.
	Bucket   string
	Replicas int
	// Member is this member's name: its own in the fleet and the same after a
	// restart, so that it is given the same shards.
	Member string
	// Sole says that nobody else can be alive under this name, because the
	// name or NATS itself is in the hands of one process. What its last start
	// left behind is then taken at once instead of after a TTL.
	Sole bool
	// Shards are numbered from 0; the same number at all members.
	Shards uint32
	Timing fleet.Timing

	// OnAcquire owns a shard from its call to its return, in a goroutine of
	// its own; for one shard there is one at a time. It ends
	//  - when ctx is cancelled, which happens the moment that the ownership
	//    can no longer be proved: act no more and return;
	//  - when c.Drain is closed: stop applying, store what is owed (ctx goes
	//    on meanwhile, for Timing.Drain at most), then return; the shard is
	//    released when it has;
	//  - by itself, if the shard cannot be had here: others get it, and this
	//    member tries again after a pause of a second that doubles up to a
	//    minute; or never, where the error wraps ErrUnfit. The error is logged.
	// c.Check is to be asked before each act. A shard whose callback ignores
	// the end of ctx is owned by nobody else before this process ends.
	OnAcquire func(ctx context.Context, c *Claim) error
	// OnStandby, if set, is told which shards would come to this member if
	// their owners died, in order, each time that they change. It must not
	// block.
	OnStandby func(shards []uint32)

	// OnView, if set, is told what this member sees each time that it changes;
	// the first time when it has read who owns what. It must not block.
	OnView func(View)

	// StopTimeout bounds the hand-over of a clean stop; 0 means
	// DefaultStopTimeout.
	StopTimeout time.Duration
	// Logger hears who owns what and why.
	Logger zerolog.Logger
	// Registerer takes the metrics; nil: nowhere.
	Registerer prometheus.Registerer

	hang func() // tests hang the loop in it
}

// View is what a member sees: shards that it holds, and shards that nobody owns.
type View struct{ Held, Unowned int }

const (
	inputBuffer = 256
	feedBuffer  = 4096
	// maxWrites bounds the claims and releases that are on their way at once;
	// renewals do not wait for them.
	maxWrites   = 32
	readTimeout = time.Second
)

// Run is a member of the fleet until ctx is done; then it hands its shards over
// and returns nil when all callbacks have returned. While NATS is away it owns
// nothing and waits. It returns an error only for options that cannot work or a
// bucket that was made otherwise.
func Run(ctx context.Context, o Options) error {
	o.Timing = o.Timing.WithDefaults()
	if o.Bucket == "" {
		o.Bucket = DefaultBucket
	}
	if o.StopTimeout <= 0 {
		o.StopTimeout = DefaultStopTimeout
	}
	if err := o.check(); err != nil {
		return fmt.Errorf("ownership: %w", err)
	}
	r := &runner{
		o: o, bucket: &bucket{nc: o.NC, js: o.JS, name: o.Bucket, replicas: o.Replicas},
		view: View{Held: -1}, inputs: make(chan input, inputBuffer), feed: make(chan *nats.Msg, feedBuffer), over: make(chan struct{}), writes: make(chan struct{}, maxWrites),
	}
	var err error
	if r.metrics, err = newMetrics(o.Registerer); err != nil {
		return fmt.Errorf("ownership: %w", err)
	}
	defer r.metrics.unregister(o.Registerer)
	switch err := r.open(ctx); {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return fmt.Errorf("ownership: %w", err)
	}
	sub, err := o.NC.ChanSubscribe(r.bucket.feed(), r.feed)
	if err != nil {
		return fmt.Errorf("ownership: subscribe %s: %w", r.bucket.feed(), err)
	}
	defer func() { _ = sub.Unsubscribe() }() // a closed connection has none
	r.run(ctx)
	return nil
}

func (o *Options) check() error {
	switch {
	case o.NC == nil || o.JS == nil:
		return errors.New("a connection to NATS is needed")
	case o.OnAcquire == nil:
		return errors.New("somebody must own what is acquired: OnAcquire is nil")
	case o.Member == "" || len(o.Member) > 128:
		return fmt.Errorf("the member's name is %q: give one of up to 128 bytes, its own in the fleet", o.Member)
	case o.Shards == 0 || o.Shards > ledger.MaxShards:
		return fmt.Errorf("%d shards: give 1 to %d", o.Shards, ledger.MaxShards)
	}
	return o.Timing.Check()
}

// input changes the machine.
type input func(now time.Duration, fx *fleet.Effects)

// runner carries out what the machine decides. One goroutine runs the machine;
// all that may wait is done beside it.
type runner struct {
	o       Options
	bucket  *bucket
	metrics *metrics
	proof   *proof
	inputs  chan input
	feed    chan *nats.Msg
	over    chan struct{} // closed when nobody takes inputs any more
	writes  chan struct{}
	running int // callbacks
	view    View
	// How often in a row the bucket could not be written and read.
	unwritten, unread atomic.Int64
}

// open makes the bucket, however long it takes until NATS is there.
func (r *runner) open(ctx context.Context) error {
	wait := 50 * time.Millisecond
	for {
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := r.bucket.open(once)
		cancel()
		if err == nil || errors.Is(err, errUnfit) || ctx.Err() != nil {
			return err
		}
		r.o.Logger.Warn().Err(err).Dur("again_in_ms", wait).Msg("the ownership bucket cannot be opened")
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, time.Second)
	}
}

func (r *runner) run(ctx context.Context) {
	// Callbacks and writes outlive ctx: the hand-over needs them.
	io, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer close(r.over)
	r.proof = newProof(steady)
	defer r.proof.stop()
	m := fleet.New(steady(), fleet.Config{
		Member: r.o.Member, Shards: int(r.o.Shards), Timing: r.o.Timing, Sole: r.o.Sole, NewID: func() string { return ksuid.New().String() },
	})
	wake := time.NewTimer(0)
	defer wake.Stop()
	done := ctx.Done()
	var stop <-chan time.Time
	late := false
	for {
		var in input
		select {
		case in = <-r.inputs:
		case msg := <-r.feed:
			if e, ok := r.bucket.entry(msg); ok {
				in = func(now time.Duration, fx *fleet.Effects) { m.Saw(now, e, fx) }
			}
		case <-wake.C:
		case <-done:
			done = nil
			limit := time.NewTimer(r.o.StopTimeout)
			defer limit.Stop()
			stop = limit.C
			in = func(now time.Duration, _ *fleet.Effects) { m.Leave(now) }
		case <-stop:
			stop, late = nil, true
			r.o.Logger.Warn().Int("shards", r.running).Msg("the hand-over takes too long: what is left is given up")
			in = m.Cut
		}
		if r.o.hang != nil {
			r.o.hang()
		}
		var fx fleet.Effects
		now := steady()
		if in != nil {
			in(now, &fx)
		}
		m.Step(now, &fx)
		r.proof.set(m.Until())
		r.carryOut(io, m, &fx)
		// A session that cannot be ended orderly ends by its TTL.
		if m.Done() || m.Leaving() && r.running == 0 && (late || !r.o.NC.IsConnected()) {
			return
		}
		wake.Reset(max(m.Next(now)-steady(), 0))
	}
}

func (r *runner) carryOut(io context.Context, m *fleet.Machine, fx *fleet.Effects) {
	for _, shard := range fx.Revoke {
		if c := r.proof.get(shard); c != nil {
			c.cancel(ErrLost)
		}
	}
	for _, h := range fx.Drain {
		if c := r.proof.get(h.Shard); c != nil {
			c.heir = h.To
			close(c.drain)
			r.o.Logger.Info().Uint32("shard", h.Shard).Uint64("token", c.Token).Str("to", h.To).Msg("hands the shard over")
		}
	}
	for _, t := range fx.Acquire {
		r.acquire(io, m, t)
	}
	if fx.Poll {
		go r.read(io, m)
	}
	for _, w := range fx.Writes {
		go r.write(io, m, w)
	}
	if fx.StandbyChanged {
		r.metrics.standby.Set(float64(len(fx.Standby)))
		if r.o.OnStandby != nil {
			r.o.OnStandby(append([]uint32(nil), fx.Standby...))
		}
	}
	for _, n := range fx.Notes {
		r.tell(n)
	}
	if m.Synced() {
		if v := (View{Held: m.Held(), Unowned: m.Unowned()}); v != r.view {
			r.view = v
			if r.o.OnView != nil {
				r.o.OnView(v)
			}
		}
	}
	r.metrics.members.Set(float64(m.Members()))
	r.metrics.held.Set(float64(r.running))
}

// give hands an input to the loop.
func (r *runner) give(in input) {
	select {
	case r.inputs <- in:
	case <-r.over:
	}
}

func (r *runner) acquire(io context.Context, m *fleet.Machine, t fleet.Tenure) {
	c := r.proof.claim(io, t)
	r.running++
	r.metrics.acquired.Inc()
	r.o.Logger.Info().Uint32("shard", t.Shard).Uint64("token", t.Token).Msg("owns the shard")
	go func() {
		err := r.o.OnAcquire(c.ctx, c)
		cut := c.ctx.Err() != nil
		r.give(func(now time.Duration, fx *fleet.Effects) {
			r.proof.remove(t.Shard)
			r.running--
			r.metrics.released.Inc()
			if err != nil && !cut {
				r.o.Logger.Error().Err(err).Uint32("shard", t.Shard).Msg("the shard was given up")
			}
			m.Returned(now, t.Shard, true, cut, fx)
			if errors.Is(err, ErrUnfit) {
				m.Refuse(now, t.Shard)
			}
		})
	}()
}

func (r *runner) write(io context.Context, m *fleet.Machine, w fleet.Write) {
	if w.Kind != fleet.WriteSession {
		r.writes <- struct{}{}
		defer func() { <-r.writes }()
	}
	ctx, cancel := context.WithTimeout(io, r.o.Timing.Request())
	defer cancel()
	start := steady()
	revision, result, err := r.bucket.put(ctx, w)
	took := steady() - start
	r.metrics.writes.WithLabelValues(result.String()).Inc()
	switch {
	case err != nil:
		r.trouble(&r.unwritten).Err(err).Msg("it is not clear whether a key of the ownership bucket was stored: without its session a member owns nothing")
	case w.Kind == fleet.WriteSession:
		r.unwritten.Store(0)
		r.metrics.renewal.Observe(took.Seconds())
	}
	r.give(func(now time.Duration, fx *fleet.Effects) { m.Wrote(now, w.ID, revision, result, fx) })
}

func (r *runner) read(io context.Context, m *fleet.Machine) {
	ctx, cancel := context.WithTimeout(io, readTimeout)
	defer cancel()
	asked := steady()
	all, err := r.bucket.read(ctx)
	if err != nil && io.Err() == nil {
		r.metrics.readErrors.Inc()
		r.trouble(&r.unread).Err(err).Msg("the ownership bucket cannot be read: no shard is taken until it can; may the user of NATS do so?")
		// It may be gone: then it is made again.
		if open := r.bucket.open(ctx); open != nil {
			r.o.Logger.Debug().Err(open).Msg("the ownership bucket cannot be opened")
		}
	}
	if err == nil {
		r.unread.Store(0)
	}
	r.give(func(now time.Duration, fx *fleet.Effects) { m.Read(now, asked, all, err == nil, fx) })
}

// trouble tells of what goes on failing at its begin, and of every hundredth time.
func (r *runner) trouble(times *atomic.Int64) *zerolog.Event {
	if n := times.Add(1); n == 3 || n%100 == 0 { // one or two are an election's
		return r.o.Logger.Warn().Int64("times", n)
	}
	return r.o.Logger.Debug()
}

func (r *runner) tell(n fleet.Note) {
	log := r.o.Logger.With().Str("member", r.o.Member).Logger()
	switch n.Kind {
	case fleet.NoteLapsed:
		r.metrics.lapses.Inc()
		log.Warn().Dur("late_ms", n.Took).Msg("the session could not be renewed in time: nothing is owned until it is")
	case fleet.NoteLost:
		r.metrics.lost.Inc()
		log.Warn().Msg("another member has ended our session: what was owned is not ours any more")
	case fleet.NoteFenced:
		r.metrics.fenced.Inc()
		log.Warn().Str("gone", n.Member).Dur("silent_ms", n.Took).Msg("a member was not heard of, or is an earlier run of this one: its shards are free")
	case fleet.NoteStuck:
		log.Error().Uint32("shard", n.Shard).Msg("a shard's callback does not return though its context is cancelled: nobody can own the shard before this process ends")
	case fleet.NoteDouble:
		log.Error().Msg("another live member has our name: give each its own, else shards are not shared evenly")
	case fleet.NoteFailed:
		r.metrics.failed.Inc()
	}
}
