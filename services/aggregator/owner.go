package aggregator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
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
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

const (
	beaconEvery = 250 * time.Millisecond
	tickEvery   = time.Second
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
	ioTimeout = 5 * time.Second
	// snapshotTimeout is longer: a snapshot may be hundreds of megabytes.
	snapshotTimeout = 2 * time.Minute
)

// owner counts one shard: one goroutine owns the state, what waits for NATS is
// done by others, one of each kind at a time.
type owner struct {
	*service
	shard  uint32
	log    zerolog.Logger
	state  *quota.Shard
	pub    publish.Publisher
	from   uint64 // the first entry to read
	target uint64 // what the ledger held of the shard at the start
	ready  bool   // the target is counted

	in      chan ledger.Message
	strays  chan ledger.Message // entries of no shard, which this one buries; nil: another does
	queries chan *nats.Msg
	results chan func() error // what a goroutine of ours brings back
	running int               // goroutines of ours

	decoder     fold.Decoder
	lastControl uint64 // newest entry of the shard's control subject

	lastBeacon   atomic.Int64 // Unix nanoseconds; of the begin before the first
	publishing   bool
	retry        backoff
	retryAt      time.Time
	dead         []*nats.Msg
	burying      bool
	ticking      bool
	lastTick     time.Time
	snapshotting bool
	lastSnapshot time.Time
	snapshotSize int
	entries      int // since the last snapshot
	stopping     bool
	finalDone    bool

	wake *time.Timer
}

// run counts until ctx is done, then stops cleanly; io outlives ctx.
func (o *owner) run(ctx, io context.Context) error {
	// What is still under way at the end is given up first, then waited for.
	defer o.settle()
	io, giveUp := context.WithCancel(io)
	defer giveUp()
	beat := time.NewTicker(beaconEvery)
	defer beat.Stop()
	o.wake = time.NewTimer(time.Hour)
	defer o.wake.Stop()
	o.lastSnapshot = time.Now()
	o.checkReady()
	done := ctx.Done()
	var stop <-chan time.Time
	for {
		o.start(io)
		if o.stopping && o.idle() {
			return nil
		}
		in, strays := o.in, o.strays
		if o.stopping || len(o.dead) >= maxDead {
			in, strays = nil, nil
		}
		if o.pub.Queued() >= maxQueued {
			in = nil
		}
		select {
		case m := <-in:
			o.apply(m)
		case m := <-strays:
			o.m.strays.Inc()
			o.deadLetter(m, &usage.InvalidError{Reason: usage.ReasonWrongShard, Message: fmt.Sprintf("%q is a subject of no shard: the ledger has %d", m.Subject, o.shards)})
		case finish := <-o.results:
			o.running--
			if err := finish(); err != nil {
				return err
			}
		case q := <-o.queries:
			o.answer(q)
		case <-beat.C:
			o.beacon()
		case <-o.wake.C:
		case <-done:
			if o.abandon {
				return nil
			}
			o.stopping, done = true, nil
			limit := time.NewTimer(o.o.StopTimeout)
			defer limit.Stop()
			stop = limit.C
		case <-stop:
			o.log.Warn().Int("decisions", o.pub.Queued()).Msg("stopped before everything was published: the next start does it")
			return nil
		}
	}
}

// settle waits for the goroutines that this one started.
func (o *owner) settle() {
	for ; o.running > 0; o.running-- {
		<-o.results
	}
}

// idle reports whether a clean stop has nothing left to do.
func (o *owner) idle() bool {
	return o.running == 0 && o.pub.Queued() == 0 && len(o.dead) == 0 && !o.pub.Offered() && o.pub.Flight() == nil && (o.finalDone || o.entries == 0)
}

// do runs work beside the owner; what it returns is then called by the owner.
func (o *owner) do(io context.Context, limit time.Duration, work func(ctx context.Context) func() error) {
	o.running++
	go func() {
		ctx, cancel := context.WithTimeout(io, limit)
		defer cancel()
		o.results <- work(ctx)
	}()
}

// start begins whatever is due, and sets the clock for what will be.
func (o *owner) start(io context.Context) {
	now := time.Now()
	wake := time.Hour
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
			o.bury(io, o.dead[0])
		}
	}
	if o.ready && !o.stopping && !o.ticking && o.left(now) {
		o.lastTick = now
		o.tick(io)
	}
	if due, ok := o.state.NextTimer(); ok && o.ready && !o.stopping && !o.ticking {
		wait := max(due.Time().Sub(o.streamTime(now))+tickMargin, o.lastTick.Add(tickEvery).Sub(now))
		if wait <= 0 {
			o.lastTick = now
			o.tick(io)
		} else {
			wake = min(wake, wait)
		}
	}
	// The state holds decisions that are not yet published; a dead letter must
	// be kept before a snapshot passes its entry.
	if !o.snapshotting && !o.pub.Offered() && o.entries > 0 && len(o.dead) == 0 {
		final := o.stopping && !o.finalDone
		if final || (!o.stopping && (o.entries >= o.o.SnapshotEntries || now.Sub(o.lastSnapshot) >= o.o.SnapshotEvery)) {
			o.finalDone = final
			o.snapshot(io)
		}
	}
	o.wake.Reset(wake)
}

// left reports whether the ledger has gone on for so long without this shard
// that its position, which is its last entry's, would be in the way of whoever
// removes what is counted: a tick moves it.
func (o *owner) left(now time.Time) bool {
	return o.head.Load() > o.state.Sequence()+o.o.idleEntries && len(o.in) == 0 && now.Sub(o.lastTick) >= idleTickEvery
}

// apply folds an entry of the ledger.
func (o *owner) apply(m ledger.Message) {
	if m.Sequence <= o.state.Sequence() {
		return
	}
	e, kind, err := o.decoder.Decode(&m)
	switch kind {
	case ledger.KindControl:
		o.lastControl = m.Sequence
		o.m.controls.Inc()
	case ledger.KindLease:
		o.m.leases.Inc()
	}
	fx := o.state.Apply(e)
	o.entries++
	if err == nil && fx.Invalid != nil {
		err = fx.Invalid
	}
	if err != nil {
		o.deadLetter(m, err)
	}
	if fx.Lost > 0 {
		o.m.skipped.Add(float64(fx.Lost))
		o.log.Error().Hex("producer", e.Control.Closed[:]).Uint64("last", e.Control.ClosedAt).Uint64("missing", fx.Lost).
			Msg("the last frames of a producer that has ended never came: calls are lost")
	}
	o.observe(fx, e.Batch != nil)
	o.pub.Add(m.Sequence, fx.Decisions)
	o.checkReady()
}

func (o *owner) observe(fx *quota.Effects, counted bool) {
	if !counted {
		return
	}
	frame := &o.decoder.Frame
	switch fx.Frame {
	case dedup.Fresh:
		o.m.frames.WithLabelValues("fresh").Inc()
	case dedup.Duplicate:
		o.m.frames.WithLabelValues("duplicate").Inc()
		o.m.events.WithLabelValues("duplicate").Add(float64(frame.N))
	case dedup.Gap:
		o.m.frames.WithLabelValues("gap").Inc()
		o.m.skipped.Add(float64(fx.Skipped))
		o.log.Error().Stringer("producer", frame.Producer).Uint64("number", frame.Number).Uint64("missing", fx.Skipped).
			Str("gateway", frame.Gateway).Msg("frames are missing before this one: calls may be lost")
	}
	o.m.events.WithLabelValues("admitted").Add(float64(fx.Admitted))
	o.m.events.WithLabelValues("refused").Add(float64(fx.Refused))
	if fx.Duplicates > 0 {
		o.m.events.WithLabelValues("duplicate").Add(float64(fx.Duplicates))
	}
	o.m.late.Add(float64(fx.Late))
	o.m.future.Add(float64(fx.Future))
	if fx.Overflows > 0 {
		o.m.overflows.Add(float64(fx.Overflows))
		o.log.Error().Uint64("sequence", o.state.Sequence()).Int("sums", fx.Overflows).Msg("sums reached the end of 64 bits and stay there")
	}
	if fx.Unplaced > 0 {
		o.m.unplaced.Add(float64(fx.Unplaced))
	}
	if fx.Unmetered > 0 {
		o.m.unmetered.Add(float64(fx.Unmetered))
	}
	if fx.NewAccounts > 0 {
		o.m.newAccounts.Add(float64(fx.NewAccounts))
	}
	if o.ready {
		lag := max(time.Since(frame.SealedAt.Time()), 0)
		o.m.countLatency.Observe(lag.Seconds())
		o.m.slowest.note(lag)
	}
}

func (o *owner) checkReady() {
	if !o.ready && o.state.Sequence() >= o.target {
		o.ready = true
		o.caughtUp()
	}
}

// publish stores a batch of decisions with the checkpoint.
func (o *owner) publish(io context.Context, b *publish.Batch) {
	o.publishing = true
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		msgs, err := o.pub.Messages(b)
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
		stands, askErr := o.readPosition(ask, o.shard)
		return func() error {
			o.m.batches.WithLabelValues("unclear").Inc()
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
	o.m.batches.WithLabelValues("stored").Inc()
	for i := range b.Decisions {
		d := &b.Decisions[i]
		o.m.decisions.WithLabelValues(d.Verdict.String()).Inc()
		// A trace that is replayed with its own times says nothing of latency.
		if lag := at.Sub(d.Cause.Time()); d.Cause != 0 && lag < time.Hour {
			o.m.decisionLatency.Observe(max(lag.Seconds(), 0))
		}
	}
	if obsolete != "" {
		o.forget(io, obsolete)
	}
	o.beacon()
}

// deadLetter keeps an entry that cannot be counted.
func (o *owner) deadLetter(m ledger.Message, cause error) {
	reason := usage.ReasonMalformed
	var invalid *usage.InvalidError
	if errors.As(cause, &invalid) {
		reason = invalid.Reason
	}
	o.m.deadLetters.WithLabelValues(reason).Inc()
	o.log.Error().Err(cause).Str("reason", reason).Uint64("sequence", m.Sequence).Msg("an entry of the ledger cannot be counted: it is kept in the dead letters")
	origin := m.Subject + " " + strconv.FormatUint(m.Sequence, 10)
	d := &nats.Msg{Subject: ledger.DeadLetterSubject(o.shard, m.Sequence), Data: m.Data, Header: nats.Header{
		ledger.ReasonHeader: {reason}, ledger.DetailHeader: {readable(cause.Error())}, ledger.OriginHeader: {origin},
	}}
	if codec := m.Header.Get(ledger.CodecHeader); codec != "" {
		d.Header.Set(ledger.CodecHeader, codec)
	}
	// One message an entry: a replay finds it there already.
	ledger.ExpectLast(d, 0)
	o.dead = append(o.dead, d)
}

// readable is text that can stand in a header.
func readable(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	return strings.ToValidUTF8(text[:min(len(text), 512)], "")
}

func (o *owner) bury(io context.Context, m *nats.Msg) {
	o.burying = true
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		_, err := o.js.PublishMsg(ctx, m)
		return func() error {
			o.burying = false
			if err == nil || refusedWith(err, jetstream.JSErrCodeStreamWrongLastSequence) {
				o.dead = o.dead[1:]
				o.retry.reset()
				return nil
			}
			if (errors.Is(err, nats.ErrMaxPayload) || refusedWith(err, errCodeTooLarge)) && len(m.Data) > 0 {
				// With its headers it is larger than NATS takes. The whole
				// stands in the ledger, where the origin says.
				m.Header.Set(truncatedHeader, strconv.Itoa(len(m.Data)))
				m.Data = m.Data[:len(m.Data)/2]
				return nil
			}
			wait := o.retry.next()
			o.retryAt = time.Now().Add(wait)
			o.log.Warn().Err(err).Dur("again_in_ms", wait).Msg("a dead letter could not be kept")
			return nil
		}
	})
}

// truncatedHeader says how many bytes a dead letter had that is kept in part.
const truncatedHeader = "Tollkeeper-Truncated"

// JetStream's codes that the client has no names for.
const (
	errCodeTooLarge      jetstream.ErrorCode = 10054
	errCodeWriteUnderWay jetstream.ErrorCode = 10164
)

func refusedWith(err error, codes ...jetstream.ErrorCode) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && slices.Contains(codes, api.ErrorCode)
}

// tick lets the shard's time pass: somebody's period has ended and no call comes.
func (o *owner) tick(io context.Context) {
	m, err := ledger.ControlMessage(o.shard, &tollkeeperv1.ControlEntry{
		Id: ksuid.New().String(), Author: "aggregator", CreatedAtUnixMicros: time.Now().UnixMicro(),
		Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: o.pub.Last().Epoch}},
	})
	if err != nil {
		o.log.Error().Err(err).Msg("a tick could not be written")
		return
	}
	// When another control entry has come meanwhile, time has passed with it.
	ledger.ExpectLast(m, o.lastControl)
	o.ticking = true
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		_, err := o.js.PublishMsg(ctx, m)
		return func() error {
			o.ticking = false
			switch {
			case err == nil:
				o.m.ticks.Inc()
			case refusedWith(err, jetstream.JSErrCodeStreamWrongLastSequence, errCodeWriteUnderWay):
			default:
				o.log.Warn().Err(err).Msg("a tick could not be appended")
			}
			return nil
		}
	})
}

// beacon says how far the shard is. Before everything is counted that the
// ledger held at the start there is none: the gateways are not to take old
// verdicts for new.
func (o *owner) beacon() {
	if !o.ready || o.stopping {
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
