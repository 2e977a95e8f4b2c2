package outbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/lane"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// sender is the one goroutine that owns the lanes: it takes what was gathered,
// publishes, hears the acknowledgements and decides what goes to disk. Its
// methods are called by whoever holds Outbox.turn, unless they say otherwise.
type sender struct {
	b      *Outbox
	nc     *nats.Conn
	sub    *nats.Subscription
	prefix string
	acks   chan *nats.Msg
	status chan nats.Status
	slots  []*slot // of this producer, by shard

	pressed    chan struct{}
	connected  bool
	reconnects uint64
	trouble    trouble

	mu    sync.Mutex // of stats
	stats counts
}

// slot is a lane with its surroundings.
type slot struct {
	id     uint64 // in acknowledgement subjects
	lane   *lane.Lane
	g      *gather // nil for an earlier producer
	spare  []usage.Call
	budget *budget
}

// ackBuffer is far more than the frames in flight, which are one a lane; what
// does not fit is sent again.
const ackBuffer = 8192

// maxSpare bounds the memory that a shard's two call buffers keep.
const maxSpare = 4 * ledger.MaxFrameCalls

func newSender(b *Outbox) (*sender, error) {
	s := &sender{b: b, nc: b.o.NATS, acks: make(chan *nats.Msg, ackBuffer), pressed: make(chan struct{}, 1)}
	s.trouble.log = b.o.Logger
	for shard := range b.o.Shards {
		s.slots = append(s.slots, &slot{id: uint64(shard), lane: lane.New(b.producer, shard, b.o.Gateway), g: &b.gathers[shard], budget: &b.budget})
	}
	inbox := s.nc.NewInbox()
	s.prefix = inbox + "."
	var err error
	if s.sub, err = s.nc.ChanSubscribe(inbox+".*.*", s.acks); err != nil {
		return nil, fmt.Errorf("open outbox: subscribe to acknowledgements: %w", err)
	}
	s.status = s.nc.StatusChanged()
	return s, nil
}

func (s *sender) release() error {
	s.nc.RemoveStatusListener(s.status)
	if err := s.sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
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
	s.tick()
	for ctx.Err() == nil && !finished() {
		select {
		case <-ctx.Done():
		case shard := <-s.b.ready:
			s.take(s.slots[shard])
			s.pump(s.slots[shard])
		case m := <-s.acks:
			s.reply(m)
		case _, ok := <-s.status:
			if !ok {
				s.status = nil
			}
			s.checkConnection()
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
	return true
}

// take moves what was gathered into the lane.
func (s *sender) take(sl *slot) {
	g := sl.g
	if g == nil {
		return
	}
	g.mu.Lock()
	calls, first, reserved, charged := g.calls, g.first, g.reserved, g.charged
	g.calls = sl.spare[:0]
	g.charged, g.reserved = 0, 0
	g.queued = false
	// Calls that come now gather: settle says when there is nothing before them.
	g.busy = true
	g.mu.Unlock()
	freed := reserved - charged
	for i := range calls {
		freed += sl.lane.Add(&calls[i], lane.Charge(&calls[i]), first)
	}
	clear(calls) // lets go of their texts
	if cap(calls) > maxSpare {
		calls = nil
	}
	sl.spare = calls
	sl.budget.give(freed)
}

// pump sends what the lane wants to send, and lets calls go straight to the
// sender when nothing is before them.
func (s *sender) pump(sl *slot) {
	if s.connected {
		f, freed := sl.lane.Publish(s.b.now())
		sl.budget.give(freed)
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
	again := len(sl.g.calls) > 0 && !sl.g.queued
	sl.g.mu.Unlock()
	if again {
		s.take(sl)
		s.pump(sl)
	}
}

func (s *sender) publish(sl *slot, f *lane.Frame) {
	var m *nats.Msg
	if f.Closing {
		m = &nats.Msg{Subject: ledger.ControlSubject(sl.lane.Shard()), Header: nats.Header{ledger.CodecHeader: {ledger.CodecControl}}, Data: f.Data}
	} else {
		m = ledger.FrameMessage(sl.lane.Shard(), f.Data)
	}
	m.Reply = s.prefix + strconv.FormatUint(sl.id, 10) + "." + strconv.FormatUint(f.Number, 10)
	if f.Sends > 1 {
		s.count(func(c *counts) { c.resent++ })
	}
	err := s.nc.PublishMsg(m)
	switch {
	case err == nil:
	case errors.Is(err, nats.ErrMaxPayload):
		s.reject(sl, f.Number, err)
	default:
		s.failed(sl, f.Number, err)
	}
}

func (s *sender) failed(sl *slot, number uint64, err error) {
	sl.lane.Failed(number, s.b.now(), rand.Float64())
	s.trouble.is(s.b.o.Now(), "the ledger does not take frames: "+err.Error()+"; trying again")
}

// errCodeTooLarge is JetStream's "message size exceeds maximum allowed": the
// one answer that no retry can change.
const errCodeTooLarge = 10054

// reply handles an acknowledgement or a refusal.
func (s *sender) reply(m *nats.Msg) {
	id, number, ok := strings.Cut(strings.TrimPrefix(m.Subject, s.prefix), ".")
	i, err1 := strconv.ParseUint(id, 10, 64)
	n, err2 := strconv.ParseUint(number, 10, 64)
	sl := s.slot(i)
	if !ok || err1 != nil || err2 != nil || sl == nil {
		return // of a lane that is done with
	}
	var ack struct {
		Stream string           `json:"stream"`
		Seq    uint64           `json:"seq"`
		Error  *ledger.APIError `json:"error"`
	}
	switch err := json.Unmarshal(m.Data, &ack); {
	case len(m.Data) == 0 && m.Header.Get("Status") == "503":
		s.failed(sl, n, errors.New("no stream or no leader for "+ledger.CallsSubject(sl.lane.Shard())))
	case err != nil:
		s.failed(sl, n, fmt.Errorf("the acknowledgement can't be read: %w", err))
	case ack.Error != nil && ack.Error.ErrCode == errCodeTooLarge:
		s.reject(sl, n, ack.Error)
	case ack.Error != nil:
		s.failed(sl, n, ack.Error)
	case ack.Stream != ledger.Stream || ack.Seq == 0:
		s.failed(sl, n, fmt.Errorf("it was stored in stream %q, which is not %s", ack.Stream, ledger.Stream))
	default:
		s.acked(sl, n)
	}
}

func (s *sender) slot(id uint64) *slot {
	if id < uint64(len(s.slots)) {
		return s.slots[id]
	}
	return nil
}

func (s *sender) acked(sl *slot, number uint64) {
	now := s.b.now()
	f := sl.lane.Acked(number)
	if f == nil {
		return // acknowledged before
	}
	s.trouble.over(s.b.o.Now())
	s.b.metrics.latency.Observe(float64(now-f.SentAt) / 1e6)
	s.count(func(c *counts) {
		c.frames++
		c.bytes += int64(len(f.Data))
		c.acked += int64(f.Calls)
		if !f.Counted {
			c.sent.Plus(&f.Totals)
		}
	})
	s.done(sl, f)
}

// done lets go of a frame that needs no more work and goes on.
func (s *sender) done(sl *slot, f *lane.Frame) {
	sl.budget.give(int64(len(f.Data)))
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
	sl.g.marks.advance(safe, acked)
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
	s.b.o.Logger.Error().Err(err).Uint32("shard", sl.lane.Shard()).Uint64("frame", f.Number).Uint32("calls", f.Calls).Int("bytes", len(f.Data)).
		Msg("the ledger can never take this frame: its calls are not counted; raise max_payload of the server and max_msg_size of the stream to 1 MiB")
	s.done(sl, f)
}

// tick does what time brings: lost acknowledgements, retries, changes of the
// connection that nobody told.
func (s *sender) tick() {
	s.checkConnection()
	now := s.b.now()
	timeout := usage.Micros(s.b.o.AckTimeout.Microseconds())
	for _, sl := range s.slots {
		if number, at, ok := sl.lane.Inflight(); ok && now-at > timeout {
			s.failed(sl, number, fmt.Errorf("no acknowledgement within %s", s.b.o.AckTimeout))
		}
		if !sl.lane.Empty() {
			s.pump(sl)
		}
	}
}

// checkConnection looks whether the connection broke or came back. What was on
// its way when it broke is sent again at once when it is back: its
// acknowledgement may have been lost with it.
func (s *sender) checkConnection() {
	connected, reconnects := s.nc.IsConnected(), s.nc.Stats().Reconnects
	if connected == s.connected && reconnects == s.reconnects {
		return
	}
	s.connected, s.reconnects = connected, reconnects
	for _, sl := range s.slots {
		sl.lane.Lost()
		s.pump(sl)
	}
}

// finish brings everything to safety before the end (Close).
func (s *sender) finish(ctx context.Context) error {
	s.loop(ctx, s.drained)
	if s.drained() {
		used := 0
		for _, sl := range s.slots {
			if sl.lane.Last() == 0 {
				continue
			}
			used++
			data, err := closing(s.b.producer, sl.lane.Last(), s.b.o.Now())
			if err != nil {
				return err
			}
			sl.lane.Retire(data)
			s.pump(sl)
		}
		s.loop(ctx, s.drained)
	}
	lost := uint64(0)
	for _, sl := range s.slots {
		added, safe, _ := sl.lane.Calls()
		lost += added - safe
	}
	if lost > 0 {
		return fmt.Errorf("close outbox: %d calls could not be sent and are lost: %w", lost, context.Cause(ctx))
	}
	return nil
}

func (s *sender) drained() bool {
	for _, sl := range s.slots {
		if !sl.lane.Empty() {
			return false
		}
		sl.g.mu.Lock()
		n := len(sl.g.calls)
		sl.g.mu.Unlock()
		if n > 0 {
			return false
		}
	}
	return true
}

// closing is the entry that retires a producer on a shard.
func closing(producer ksuid.KSUID, last uint64, now time.Time) ([]byte, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(&tollkeeperv1.ControlEntry{
		Id: producer.String(), Author: "gateway", CreatedAtUnixMicros: now.UnixMicro(),
		Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: producer.Bytes(), LastNumber: last}},
	})
	if err != nil {
		return nil, fmt.Errorf("closing entry: %w", err)
	}
	return data, nil
}
