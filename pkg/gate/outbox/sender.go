package outbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/bound"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/spool"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/wire"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// sender is the one goroutine that owns the lanes: it takes what was gathered,
// publishes, hears the acknowledgements and decides what goes to disk. Its
// methods are called by whoever holds Outbox.turn, unless they say otherwise.
type sender struct {
	b     *Outbox
	wire  *wire.Wire
	slots []*slot // of this producer, by shard
	disk  *disk   // nil: there is no spool

	pressed   chan struct{}
	connected bool
	skew      usage.Micros // of the wall clock against ours
	trouble   trouble
	fullness  trouble
	frame     ledger.Frame

	mu    sync.Mutex // of stats
	stats counts
}

// slot is a lane with its surroundings.
type slot struct {
	id     uint64 // in acknowledgement subjects
	lane   *lane.Lane
	g      *gather // nil for an earlier producer
	src    *source // nil: there is no spool
	spare  []*chunk
	budget *bound.Budget
	claims lane.Claims // of an earlier producer's frames
	// unnoted: more is acknowledged than is noted beside the spool.
	unnoted bool
}

func newSender(b *Outbox) (*sender, error) {
	s := &sender{b: b, pressed: make(chan struct{}, 1), trouble: trouble{log: b.o.Logger}, fullness: trouble{log: b.o.Logger, hold: steady}}
	for shard := range b.o.Shards {
		s.slots = append(s.slots, &slot{id: uint64(shard), lane: lane.New(b.producer, shard, b.o.Gateway), g: &b.gathers[shard], budget: &b.budget})
		if b.o.Claims != nil {
			s.slots[shard].lane.Claim(b.o.Claims(b.producer, shard, false))
		}
	}
	var err error
	if b.o.SpoolDir != "" {
		if s.disk, err = newDisk(s); err != nil {
			return nil, err
		}
		for _, sl := range s.slots {
			sl.src = s.disk.own
		}
	}
	if s.wire, err = wire.Open(b.o.NATS); err != nil {
		return nil, errors.Join(fmt.Errorf("open outbox: %w", err), s.disk.release())
	}
	return s, nil
}

func (s *sender) release() error {
	s.wire.Close()
	if err := s.disk.release(); err != nil {
		return fmt.Errorf("close outbox: %w", err)
	}
	return nil
}

// press asks the sender to relieve memory. Safe for concurrent use.
func (s *sender) press() {
	select {
	case s.pressed <- struct{}{}:
	default:
	}
}

// How often the sender looks at its timers, busy and idle.
const (
	busyTick = 10 * time.Millisecond
	idleTick = 250 * time.Millisecond
)

// loop works until ctx is done or finished says so.
func (s *sender) loop(ctx context.Context, finished func() bool) {
	timer := time.NewTimer(busyTick)
	defer timer.Stop()
	var results <-chan *job
	if s.disk != nil {
		s.disk.begin()
		defer s.disk.end()
		results = s.disk.results
	}
	s.tick()
	for ctx.Err() == nil && !finished() {
		if s.disk != nil {
			s.disk.work()
		}
		select {
		case <-ctx.Done():
		case shard := <-s.b.ready:
			s.woken(s.slots[shard])
		case m := <-s.wire.Acks:
			s.reply(m)
		case f := <-s.wire.Failed:
			s.notSent(f)
		case c := <-s.wire.State:
			s.connection(c.Connected)
		case j := <-results:
			s.disk.handle(j)
		case <-s.pressed:
		case <-timer.C:
			s.tick()
			if s.idle() {
				timer.Reset(idleTick)
			} else {
				timer.Reset(busyTick)
			}
		}
	}
}

func (s *sender) idle() bool {
	for _, sl := range s.slots {
		if !sl.lane.Empty() {
			return false
		}
	}
	return s.disk == nil || s.disk.drain == nil && s.disk.budget.Used() == 0
}

// everySlot calls f for the lanes of this producer and of the earlier one that
// is being sent.
func (s *sender) everySlot(f func(*slot)) {
	for _, sl := range s.slots {
		f(sl)
	}
	if s.disk == nil || s.disk.drain == nil {
		return
	}
	for _, sl := range s.disk.drain.slots {
		if sl != nil {
			f(sl)
		}
	}
}

// woken does what a word in ready asks for. Only here may the next one be sent:
// there is never more than one of a shard in it, whoever else takes its calls.
func (s *sender) woken(sl *slot) {
	sl.g.mu.Lock()
	sl.g.queued = false
	sl.g.mu.Unlock()
	s.take(sl)
	s.pump(sl)
}

// take moves what was gathered into the lane.
func (s *sender) take(sl *slot) {
	g := sl.g
	if g == nil {
		return
	}
	g.mu.Lock()
	chunks, first, reserved, charged := g.chunks, g.first, g.reserved, g.charged
	g.chunks, g.waiting = sl.spare[:0], 0
	g.charged, g.reserved = 0, 0
	// Calls that come now gather: settle says when there is nothing before them.
	g.busy = true
	g.mu.Unlock()
	freed := reserved - charged
	for _, ch := range chunks {
		for i := range ch.calls[:ch.n] {
			freed += sl.lane.Add(&ch.calls[i], lane.Charge(&ch.calls[i]), first)
		}
		clear(ch.calls[:ch.n]) // lets go of their texts
		ch.n = 0
		s.b.chunks.Put(ch)
	}
	clear(chunks)
	sl.spare = chunks
	sl.budget.Give(freed)
}

// pump sends what the lane wants to send, and lets calls go straight to the
// sender when nothing is before them.
func (s *sender) pump(sl *slot) {
	if s.connected {
		f, freed := sl.lane.Publish(s.b.now())
		sl.budget.Give(freed)
		if f != nil {
			s.publish(sl, f)
		}
	}
	s.settle(sl)
}

func (s *sender) settle(sl *slot) {
	if sl.g == nil || !sl.lane.Empty() {
		return
	}
	sl.g.mu.Lock()
	sl.g.busy = false
	again := sl.g.waiting > 0 && !sl.g.queued
	sl.g.mu.Unlock()
	if again {
		s.take(sl)
		s.pump(sl)
	}
}

func (s *sender) publish(sl *slot, f *lane.Frame) {
	if f.Sends > 1 {
		s.count(func(c *counts) { c.resent++ })
	}
	if err := s.wire.Send(wire.Message(sl.lane.Shard(), f.Closing, f.Data), sl.id, f.Number); err != nil {
		s.failed(sl, f.Number, err)
	}
}

// notSent handles a message that did not leave.
func (s *sender) notSent(f wire.Failure) {
	switch sl := s.slot(f.Slot); {
	case sl == nil:
	case errors.Is(f.Err, wire.ErrTooLarge):
		s.reject(sl, f.Number, f.Err)
	default:
		s.failed(sl, f.Number, f.Err)
	}
}

func (s *sender) failed(sl *slot, number uint64, err error) {
	sl.lane.Failed(number, s.b.now(), rand.Float64())
	s.healthy(false)
	s.trouble.is(s.b.o.Now(), "the ledger does not take frames: "+err.Error()+"; trying again")
}

// reply handles an acknowledgement or a refusal.
func (s *sender) reply(m *nats.Msg) {
	slot, number, err := s.wire.Parse(m)
	switch sl := s.slot(slot); {
	case sl == nil: // of a lane that is done with
	case err == nil:
		s.acked(sl, number)
	case errors.Is(err, wire.ErrTooLarge):
		s.reject(sl, number, err)
	default:
		s.failed(sl, number, err)
	}
}

func (s *sender) slot(id uint64) *slot {
	if id < uint64(len(s.slots)) {
		return s.slots[id]
	}
	if s.disk == nil || s.disk.drain == nil {
		return nil
	}
	d := s.disk.drain
	if id < d.base || id-d.base >= uint64(len(d.slots)) {
		return nil
	}
	return d.slots[id-d.base]
}

func (s *sender) acked(sl *slot, number uint64) {
	now := s.b.now()
	f := sl.lane.Acked(number)
	if f == nil {
		return // acknowledged before
	}
	s.healthy(true)
	s.trouble.over(s.b.o.Now(), "the ledger takes frames again")
	s.b.metrics.latency.Observe(float64(now-f.SentAt) / 1e6)
	s.count(func(c *counts) {
		c.frames++
		c.bytes += int64(len(f.Data))
		switch {
		case sl.g != nil:
			c.acked += int64(f.Calls)
			if !f.Counted {
				c.sent.Plus(&f.Totals)
			}
		case !f.Closing:
			c.recoveredFrames++
			c.recovered.Plus(s.totalsOf(f))
		}
	})
	s.done(sl, f)
}

// totalsOf sums a frame of an earlier producer.
func (s *sender) totalsOf(f *lane.Frame) *lane.Totals {
	var t lane.Totals
	if err := s.frame.Decode(f.Data); err != nil {
		// The record's CRC was right, so that is how it was written; readers
		// of the ledger will dead-letter it and say so.
		t.Admitted = int64(f.Calls)
		return &t
	}
	for i := range s.frame.N {
		c := s.frame.Call(i)
		t.Add(&c)
	}
	return &t
}

func (s *sender) healthy(yes bool) {
	if s.b.healthy.Load() != yes {
		s.b.healthy.Store(yes)
	}
}

// done lets go of a frame that needs no more work and goes on.
func (s *sender) done(sl *slot, f *lane.Frame) {
	switch {
	case f.Loaded:
		s.disk.budget.Give(int64(len(f.Data)))
	case !f.Closing:
		sl.budget.Give(int64(len(f.Data)))
	}
	if sl.src != nil {
		sl.src.acked(sl, f)
	}
	s.advance(sl)
	if !sl.lane.Waiting() {
		s.take(sl)
	}
	s.pump(sl)
}

func (s *sender) advance(sl *slot) {
	if sl.g == nil {
		return
	}
	_, safe, acked := sl.lane.Calls()
	sl.g.marks.Advance(safe, acked)
}

// reject gives up a frame that the ledger can never take. Frames are bounded
// far below JetStream's default, so this needs a server that allows less.
func (s *sender) reject(sl *slot, number uint64, err error) {
	f := sl.lane.Rejected(number)
	if f == nil {
		return
	}
	s.count(func(c *counts) {
		c.rejectedFrames++
		c.rejected += int64(f.Calls)
	})
	if sl.g != nil {
		s.b.lossy.Store(true)
	} else {
		sl.src.lossy = true
	}
	where := "nowhere: there is no spool directory"
	if s.disk != nil {
		where = "nowhere"
		kept, keepErr := s.disk.store.Keep(sl.producer(s.b), &spool.Record{Shard: sl.lane.Shard(), Number: f.Number, Data: f.Data})
		if err = errors.Join(err, keepErr); keepErr == nil {
			where = kept
		}
	}
	s.b.o.Logger.Error().Err(err).Str("kept", where).Uint32("shard", sl.lane.Shard()).Uint64("frame", f.Number).Uint32("calls", f.Calls).Int("bytes", len(f.Data)).
		Msg("the ledger can never take this frame: its calls are not counted; raise max_payload of the server and max_msg_size of the stream to 1 MiB")
	s.done(sl, f)
}

// tick does what time brings: lost acknowledgements, retries.
func (s *sender) tick() {
	now := s.b.now()
	if skew := usage.Micros(s.b.coarse.Load()) - now; skew != s.skew {
		s.skew = skew
		for _, sl := range s.slots {
			sl.lane.Skew(skew)
		}
	}
	timeout := usage.Micros(s.b.o.AckTimeout.Microseconds())
	inflight, oldest := int64(0), usage.Micros(0)
	s.everySlot(func(sl *slot) {
		if number, at, ok := sl.lane.Inflight(); ok && now-at > timeout {
			s.failed(sl, number, fmt.Errorf("no acknowledgement within %s", s.b.o.AckTimeout))
		}
		if sl.g != nil && (!s.connected || sl.lane.Failing()) {
			s.take(sl) // so that it can be spooled
		}
		if !sl.lane.Empty() {
			s.pump(sl)
		} else {
			s.settle(sl)
		}
		if _, _, ok := sl.lane.Inflight(); ok {
			inflight++
		}
		if at := sl.lane.Oldest(); at > 0 && (oldest == 0 || at < oldest) {
			oldest = at
		}
	})
	s.count(func(c *counts) { c.inflight, c.oldest, c.connected = inflight, oldest, s.connected })
	if s.b.full.Load() && !s.b.budget.Pressed() {
		s.b.full.Store(false)
	}
	if full := s.b.full.Load(); full {
		s.fullness.is(s.b.o.Now(), "the outbox is full: "+[...]string{
			Block: "calls wait", Refuse: "calls are refused", Drop: "calls pass WITHOUT being metered",
		}[s.b.o.OnFull])
	} else {
		s.fullness.over(s.b.o.Now(), "the outbox has room again")
	}
}

// connection takes note that the connection broke or came back, or both. What
// was on its way then is sent again at once when it is back: its
// acknowledgement may have been lost with it.
func (s *sender) connection(connected bool) {
	s.connected = connected
	if connected && s.drained() {
		s.healthy(true) // as far as anybody can know before the next frame
	}
	if !connected {
		s.healthy(false)
		s.trouble.is(s.b.o.Now(), "NATS is away: calls gather in memory and in the spool, if there is one")
	}
	s.everySlot(func(sl *slot) {
		sl.lane.Lost()
		s.pump(sl)
	})
}

// finish brings everything to safety before the end (Close).
func (s *sender) finish(ctx context.Context) error {
	s.loop(ctx, func() bool { return s.drained() || s.disk != nil && !s.connected && s.safe() && s.disk.gone() == nil })
	if s.drained() {
		return s.retire(ctx)
	}
	var err error
	if s.disk != nil {
		err = s.disk.secure(s.b.o.Now())
		s.disk.noteRest()
	}
	for _, sl := range s.slots {
		s.take(sl) // what nobody took is lost as well
	}
	lost, kept := uint64(0), uint64(0)
	for _, sl := range s.slots {
		added, safe, acked := sl.lane.Calls()
		lost += added - safe
		kept += safe - acked
	}
	if kept > 0 && s.disk != nil {
		gone := s.disk.gone()
		if lost == 0 { // else it is of those
			gone = errors.Join(gone, err)
		}
		if gone != nil {
			return fmt.Errorf("close outbox: up to %d calls were in the spool and are not any more, %d were neither sent nor spooled: restore the spool directory and start again: %w", kept, lost, gone)
		}
		s.b.o.Logger.Info().Uint64("calls", kept).Msg("calls stay in the spool: the next gateway on it will send them")
	}
	if lost == 0 {
		s.markWhole()
	}
	if lost > 0 {
		return fmt.Errorf("close outbox: %d calls could neither be sent nor spooled and are lost: %w", lost, errors.Join(context.Cause(ctx), err))
	}
	return nil
}

// markWhole notes that this is an end in order, although the ledger does not hear of
// it: the next Open says so.
func (s *sender) markWhole() {
	if s.disk == nil || !s.b.whole() {
		return
	}
	if err := s.disk.own.log.MarkWhole(); err != nil {
		s.b.o.Logger.Warn().Err(err).Msg("the spool could not note that it is whole: what leases held stays spent until their windows end")
	}
}

// retire ends a producer whose frames are all acknowledged. Where it can't, the
// next Open does.
func (s *sender) retire(ctx context.Context) error {
	var left []marks.Mark
	marked := false
	if s.disk != nil {
		left, marked = s.disk.marks.All()
		if err := s.disk.marks.Close(); err != nil {
			return fmt.Errorf("close outbox: %w", err)
		}
		if err := s.disk.own.log.InPlace(); err != nil {
			// Whoever restores it sends it again: readers must know it then.
			s.b.o.Logger.Warn().Err(err).Msg("everything was sent, but the spool is gone: the producer can't be retired, and readers will remember it")
			return nil
		}
		// First, so that nobody sends again what the ledger may have forgotten.
		if err := s.disk.own.log.Remove(s.disk.own.log.Active() + 1); err != nil {
			return fmt.Errorf("close outbox: %w", err)
		}
	}
	for _, sl := range s.slots {
		var leases *tollkeeperv1.LeaseMarks
		n := ofShard(left, sl.lane.Shard())
		if marked {
			// Most leases have had their last word; of what calls hold that did not end
			// this is the last.
			leases = s.marksOf(s.b.producer, left[:n])
		}
		left = left[n:]
		if last := sl.lane.Last(); last > 0 || n > 0 {
			sl.lane.Retire(closing(s.b.producer, last, s.b.whole() && (leases != nil || !marked), leases, s.b.o.Now()))
		}
	}
	s.loop(ctx, func() bool { return s.drained() || !s.connected })
	if !s.drained() {
		s.markWhole()
		s.b.o.Logger.Warn().Msg("everything was sent, but the closing entries could not be: readers will remember this producer")
		return nil
	}
	if s.disk != nil {
		if err := s.disk.own.log.Destroy(); err != nil {
			return fmt.Errorf("close outbox: %w", err)
		}
	}
	return nil
}

func (s *sender) safe() bool {
	for _, sl := range s.slots {
		if !sl.lane.Safe() || gathered(sl.g) > 0 {
			return false
		}
	}
	return true
}

func (s *sender) drained() bool {
	for _, sl := range s.slots {
		if !sl.lane.Empty() || gathered(sl.g) > 0 {
			return false
		}
	}
	return true
}

func gathered(g *gather) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting
}

// producer returns whose frames the lane sends.
func (sl *slot) producer(b *Outbox) ksuid.KSUID {
	if sl.g == nil {
		return sl.src.log.Identity().Producer
	}
	return b.producer
}

// maxMarksBytes bounds a closing entry.
const maxMarksBytes = 512 << 10

// ofShard is how many of the marks, which are in the order of shards, are of the first.
func ofShard(all []marks.Mark, shard uint32) int {
	n := 0
	for n < len(all) && all[n].Shard == shard {
		n++
	}
	return n
}

// marksOf puts the marks of a shard into words of the ledger; nil: they are too many.
func (s *sender) marksOf(producer ksuid.KSUID, all []marks.Mark) *tollkeeperv1.LeaseMarks {
	size := 0
	leases := &tollkeeperv1.LeaseMarks{}
	for i := range all {
		m := &all[i]
		size += len(m.Account) + len(m.Limit) + 32
		leases.Marks = append(leases.Marks, &tollkeeperv1.LeaseMark{
			Account: m.Account, Limit: m.Limit, WindowStartUnixMicros: int64(m.Start), UsedAtMost: m.UsedAtMost,
		})
	}
	if len(all) > ledger.MaxLeaseMarks || size > maxMarksBytes {
		s.b.o.Logger.Error().Stringer("producer", producer).Uint32("shard", all[0].Shard).Int("leases", len(all)).
			Msg("a producer leaves more leases than a closing entry can speak of: what it held and did not give back stays spent until the windows end")
		return nil
	}
	return leases
}

// closing is the entry that retires a producer on a shard.
// complete says that every call the producer let through is in the ledger; leases, if
// they are not nil, how much of its leases in the shard it can have used.
func closing(producer ksuid.KSUID, last uint64, complete bool, leases *tollkeeperv1.LeaseMarks, now time.Time) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(&tollkeeperv1.ControlEntry{
		Id: producer.String(), Author: "gateway", CreatedAtUnixMicros: now.UnixMicro(),
		Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: producer.Bytes(), LastNumber: last, Complete: complete, Leases: leases}},
	})
	if err != nil {
		panic(err) // it has no text that could be invalid UTF-8, the only cause
	}
	return data
}
