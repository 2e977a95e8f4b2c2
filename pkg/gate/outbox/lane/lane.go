// Package lane is the pure core of the outbox: one lane is the way of one
// producer's calls on one shard, from gathered to acknowledged. Facts go in
// with the time, what to do next comes out: no goroutine, clock or I/O.
//
// A lane's frames are numbered 1, 2, 3 … and leave in that order, one at a
// time. They stand in three stretches, oldest first:
//
//	queue: in memory, may leave
//	hole:  only the spool has them, to be loaded back
//	tail:  in memory, behind the hole, on their way to the spool
//
// Without a hole there is no tail. Not safe for concurrent use.
package lane

import (
	"maps"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Totals are sums over calls. A refused call feeds no meter.
type Totals struct {
	Admitted, Refused int64
	// Meters in the order of usage.BuiltInMeters: sums of what was reported.
	Meters [usage.NumBuiltIn]int64
	// Custom sums the user's own meters; nil when none was reported. At most
	// MaxCustom names are summed, so that a client can't fill memory with names.
	Custom map[usage.Meter]int64
}

// MaxCustom bounds the own meters of Totals.
const MaxCustom = 256

func (t *Totals) custom(m usage.Meter, v int64) {
	if t.Custom == nil {
		t.Custom = make(map[usage.Meter]int64)
	}
	if _, known := t.Custom[m]; known || len(t.Custom) < MaxCustom {
		t.Custom[m] += v
	}
}

// Add counts a call.
func (t *Totals) Add(c *usage.Call) {
	if !c.Admitted() {
		t.Refused++
		return
	}
	t.Admitted++
	for i := range usage.BuiltIn(usage.NumBuiltIn) {
		if v, ok := c.Quantities.BuiltIn(i); ok {
			t.Meters[i] += v
		} else if i == usage.CallsIndex {
			t.Meters[i]++
		}
	}
	for _, q := range c.Quantities.Custom() {
		t.custom(q.Meter, q.Value)
	}
}

// Plus adds other sums.
func (t *Totals) Plus(o *Totals) {
	t.Admitted += o.Admitted
	t.Refused += o.Refused
	for i := range t.Meters {
		t.Meters[i] += o.Meters[i]
	}
	for m, v := range o.Custom {
		t.custom(m, v)
	}
}

// Clone returns a copy that shares nothing.
func (t *Totals) Clone() Totals {
	c := *t
	c.Custom = maps.Clone(t.Custom)
	return c
}

// Position is where the spool has a frame; the zero value is nowhere.
type Position struct {
	Segment uint64 // from 1
	Offset  int64
}

// Frame is a sealed frame on its way.
type Frame struct {
	Number uint64
	Data   []byte
	// Calls in the frame; LastCall is the lane's count of calls up to its end.
	Calls    uint32
	LastCall uint64
	Totals   Totals
	// At is when the oldest of its calls was added.
	At usage.Micros
	// Position is set while the spool has it.
	Position Position
	// Counted: its totals are among the sent ones already.
	Counted bool
	// Loaded: it was read back from the spool.
	Loaded bool
	// Closing: not a frame but the entry that retires the producer.
	Closing bool
	// SentAt is when it was last sent.
	SentAt usage.Micros
	// Sends is how often it was sent.
	Sends int
}

// Claims hears which calls go into which frame, before they are one.
type Claims interface {
	// Add takes note of a call that goes into the frame with the number.
	Add(number uint64, c *usage.Call)
	// Seal takes note that the frame of the newest call is sealed.
	Seal(sealedAt usage.Micros)
}

// Lane is described at the package.
type Lane struct {
	claims Claims // nil: nobody wants to know

	producer ksuid.KSUID
	shard    uint32
	gateway  string
	// earlier: the frames of a producer that is no more; its spool is all hole
	// until Retire.
	earlier bool

	builder ledger.Builder
	skew    usage.Micros
	charge  int64
	totals  Totals
	first   usage.Micros

	calls     uint64 // added
	sealed    uint64 // number of the newest frame
	acked     uint64 // number of the newest frame that is done with
	known     uint64 // number of the newest frame that was acknowledged
	handed    uint64 // number of the newest frame handed to the spool
	safeCalls uint64 // calls up to here are acknowledged or spooled
	doneCalls uint64 // calls up to here are acknowledged

	queue, tail []*Frame
	hole        uint64

	inflight bool
	retryAt  usage.Micros
	failures int
}

// New returns the lane of a producer that begins now.
func New(producer ksuid.KSUID, shard uint32, gateway string) *Lane {
	return &Lane{producer: producer, shard: shard, gateway: gateway}
}

// Earlier returns the lane of a producer that is no more: its frames are
// loaded from the spool it left.
func Earlier(producer ksuid.KSUID, shard uint32) *Lane {
	return &Lane{producer: producer, shard: shard, earlier: true}
}

// Claim tells c of every call from now on; before the first.
func (l *Lane) Claim(c Claims) { l.claims = c }

// Shard returns the lane's shard.
func (l *Lane) Shard() uint32 { return l.shard }

// Skew says what the wall clock is ahead of the time that the lane is told; only
// the frames' sealing time is by the wall clock.
func (l *Lane) Skew(ahead usage.Micros) { l.skew = ahead }

// Add gathers a call that takes charge bytes, which must bound its share of a
// frame from above (see Charge). It returns the bytes that are free again
// because the frame before was full and has been sealed.
func (l *Lane) Add(c *usage.Call, charge int64, now usage.Micros) (freed int64) {
	if l.builder.Full() {
		freed = l.Seal(now)
	}
	if l.builder.Len() == 0 {
		l.first = now
	}
	l.builder.Add(c)
	if l.claims != nil {
		l.claims.Add(l.sealed+1, c)
	}
	l.totals.Add(c)
	l.charge += charge
	l.calls++
	return freed
}

// Seal makes a frame of what is gathered, if anything is, and returns the bytes
// that are free again.
func (l *Lane) Seal(now usage.Micros) (freed int64) {
	n := l.builder.Len()
	if n == 0 {
		return 0
	}
	l.sealed++
	f := &Frame{Number: l.sealed, Calls: uint32(n), LastCall: l.calls, Totals: l.totals, At: l.first}
	f.Data = l.builder.Seal(ledger.Header{Producer: l.producer, Shard: l.shard, Number: l.sealed, Gateway: l.gateway, SealedAt: now + l.skew})
	if l.claims != nil {
		l.claims.Seal(now + l.skew)
	}
	freed = l.charge - int64(len(f.Data))
	l.charge, l.totals = 0, Totals{}
	if l.hole > 0 {
		l.tail = append(l.tail, f)
	} else {
		l.queue = append(l.queue, f)
	}
	return freed
}

// Publish returns the frame that must leave now, nil when none may: one is
// unacknowledged, the next try's time has not come, or there is nothing. What
// is gathered is sealed when nothing stands before it (freed as of Seal).
func (l *Lane) Publish(now usage.Micros) (f *Frame, freed int64) {
	if l.inflight || now < l.retryAt {
		return nil, 0
	}
	if len(l.queue) == 0 && l.hole == 0 {
		freed = l.Seal(now)
	}
	if len(l.queue) == 0 {
		return nil, freed
	}
	f = l.queue[0]
	l.inflight = true
	f.SentAt = now
	f.Sends++
	return f, freed
}

// Acked takes note of an acknowledgement and returns the frame, nil when it was
// acknowledged before.
func (l *Lane) Acked(number uint64) *Frame {
	f := l.Rejected(number)
	if f != nil && !f.Closing {
		l.known = number
	}
	return f
}

// Rejected takes note that the ledger can never take this frame; the lane goes
// on behind it.
func (l *Lane) Rejected(number uint64) *Frame {
	if len(l.queue) == 0 || l.queue[0].Number != number || l.queue[0].Sends == 0 {
		return nil
	}
	f := l.pop()
	l.failures, l.retryAt = 0, 0
	return f
}

func (l *Lane) pop() *Frame {
	f := l.queue[0]
	l.queue[0] = nil
	l.queue = l.queue[1:]
	l.inflight = false
	l.acked = f.Number
	l.handed = max(l.handed, f.Number)
	if !f.Closing {
		l.doneCalls = f.LastCall
		l.safeCalls = max(l.safeCalls, f.LastCall)
	}
	return f
}

// The pause after a failure doubles from first to last; up to half of it is
// taken off by chance, so that shards and gateways do not come back in step.
const (
	firstPause = usage.Micros(20_000)
	lastPause  = usage.Micros(2_000_000)
)

// Failed takes note that a send failed or that nobody knows: the same bytes
// leave again after a pause. jitter is a random number in [0, 1).
func (l *Lane) Failed(number uint64, now usage.Micros, jitter float64) {
	if !l.inflight || l.queue[0].Number != number {
		return
	}
	l.inflight = false
	pause := lastPause
	if l.failures < 7 { // 20 ms << 7 is past the last pause
		pause = min(firstPause<<l.failures, lastPause)
	}
	l.failures++
	l.retryAt = now + pause - usage.Micros(jitter*float64(pause)/2)
}

// Lost takes note that the connection broke: whatever was on its way is sent
// again as soon as there is a connection.
func (l *Lane) Lost() {
	if l.inflight {
		l.inflight = false
		l.failures = max(l.failures, 1)
	}
	l.retryAt = 0
}

// Inflight returns the number of the unacknowledged frame and when it was sent.
func (l *Lane) Inflight() (number uint64, sentAt usage.Micros, ok bool) {
	if !l.inflight {
		return 0, 0, false
	}
	return l.queue[0].Number, l.queue[0].SentAt, true
}

// Failing reports whether the newest send failed.
func (l *Lane) Failing() bool { return l.failures > 0 }

// Holed reports whether some frames are only in the spool, so that newer ones
// must go there too.
func (l *Lane) Holed() bool { return l.hole > 0 }

// Handout appends to out the frames that are to be appended to the spool next,
// in order: those that were not handed out before, up to the first that
// reaches limit bytes.
func (l *Lane) Handout(out []*Frame, limit int64) []*Frame {
	if l.earlier {
		return out
	}
	for _, part := range [...][]*Frame{l.queue, l.tail} {
		for _, f := range part {
			if limit <= 0 {
				return out
			}
			if f.Number > l.handed && !f.Closing {
				l.handed = f.Number
				limit -= int64(len(f.Data))
				out = append(out, f)
			}
		}
	}
	return out
}

// Spooled takes note that a frame is durable at a position; reports in order.
// It returns the frame, nil when it was acknowledged in the meantime, and the
// bytes that are free again because the frame stands behind others that only
// the spool has.
func (l *Lane) Spooled(number uint64, at Position) (f *Frame, freed int64) {
	for _, f := range l.queue {
		if f.Number == number {
			f.Position = at
			l.safeCalls = max(l.safeCalls, f.LastCall)
			return f, 0
		}
	}
	if len(l.tail) == 0 || l.tail[0].Number != number {
		return nil, 0
	}
	f = l.tail[0]
	f.Position = at
	l.safeCalls = max(l.safeCalls, f.LastCall)
	l.tail[0] = nil
	l.tail = l.tail[1:]
	l.hole++
	return f, int64(len(f.Data))
}

// Unspooled takes note that a frame and all that were handed out after it could
// not be written: they will be handed out again.
func (l *Lane) Unspooled(number uint64) {
	l.handed = max(min(l.handed, number-1), l.acked)
}

// Doubt takes note that the spool's files can't be found any more: what memory has is
// handed out again, and not evicted before. each is called with the segments of those
// frames. Where only the spool has some in between nothing changes.
func (l *Lane) Doubt(each func(segment uint64)) {
	if l.hole > 0 {
		return
	}
	l.handed = l.acked
	for _, f := range l.queue {
		if f.Position != (Position{}) {
			each(f.Position.Segment)
			f.Position = Position{}
		}
	}
}

// Evict lets go of spooled frames beyond the oldest keep ones, but of none that
// was read back already, and returns the freed bytes and where the first of
// them stands in the spool.
func (l *Lane) Evict(keep int) (freed int64, first Position) {
	if l.hole > 0 || l.earlier {
		return 0, first
	}
	keep = max(keep, 1) // the first may be on its way
	for i := len(l.queue) - 1; i >= keep; i-- {
		if l.queue[i].Loaded {
			keep = i + 1
			break
		}
	}
	k := keep
	for k < len(l.queue) && l.queue[k].Position != (Position{}) {
		if k == keep {
			first = l.queue[k].Position
		}
		freed += int64(len(l.queue[k].Data))
		k++
	}
	if k <= keep {
		return 0, first
	}
	l.hole = uint64(k - keep)
	l.tail = append(l.tail, l.queue[k:]...)
	clear(l.queue[keep:])
	l.queue = l.queue[:keep]
	return freed, first
}

// Wants reports whether a frame read from the spool is the one to load next.
// One that it does not want is in memory or acknowledged.
func (l *Lane) Wants(number uint64) bool {
	if l.earlier {
		return number > l.sealed
	}
	return l.hole > 0 && number == l.newest()+1
}

// FirstMissing returns the number of the first frame that only the spool has;
// only meaningful while Holed.
func (l *Lane) FirstMissing() uint64 { return l.newest() + 1 }

func (l *Lane) newest() uint64 {
	if n := len(l.queue); n > 0 {
		return l.queue[n-1].Number
	}
	return l.acked
}

// Loaded takes a frame that it wants; number, data, calls, position, totals and
// time are set.
func (l *Lane) Loaded(f *Frame) {
	f.Loaded = true
	if l.earlier {
		l.sealed = f.Number
		l.calls += uint64(f.Calls)
		f.LastCall = l.calls
		l.queue = append(l.queue, f)
		return
	}
	last := l.doneCalls
	if n := len(l.queue); n > 0 {
		last = l.queue[n-1].LastCall
	}
	f.LastCall = last + uint64(f.Calls)
	l.queue = append(l.queue, f)
	if l.hole--; l.hole == 0 {
		l.queue = append(l.queue, l.tail...)
		l.tail = nil
	}
}

// Passed takes note that a frame that it wants, of an earlier producer, is known to be
// acknowledged and need not be loaded.
func (l *Lane) Passed(number uint64) { l.sealed, l.acked, l.known = number, number, number }

// Retire puts the entry that retires the producer behind everything.
func (l *Lane) Retire(data []byte) {
	l.earlier = false
	l.queue = append(l.queue, &Frame{Number: l.sealed + 1, Data: data, Closing: true})
	l.sealed++
}

// Known returns the number of the newest frame that was acknowledged; 0 when there was
// none. All before it are done with.
func (l *Lane) Known() uint64 { return l.known }

// Last returns the number of the newest frame; 0 when there was none.
func (l *Lane) Last() uint64 { return l.sealed }

// Empty reports whether nothing is gathered, waiting, on its way or only in
// the spool.
func (l *Lane) Empty() bool {
	return l.builder.Len() == 0 && len(l.queue) == 0 && l.hole == 0 && len(l.tail) == 0
}

// Safe reports whether everything that was added is acknowledged or spooled.
func (l *Lane) Safe() bool { return l.safeCalls == l.calls }

// Calls returns how many calls were added, are acknowledged or spooled, and
// are acknowledged; each an upper end of the same order.
func (l *Lane) Calls() (added, safe, acked uint64) { return l.calls, l.safeCalls, l.doneCalls }

// Gathered returns how many calls are in no frame yet.
func (l *Lane) Gathered() int { return l.builder.Len() }

// Oldest returns when the oldest call in memory was added, 0 when there is none.
func (l *Lane) Oldest() usage.Micros {
	switch {
	case len(l.queue) > 0:
		return l.queue[0].At
	case len(l.tail) > 0:
		return l.tail[0].At
	case l.builder.Len() > 0:
		return l.first
	}
	return 0
}

// GatheredSince returns when the oldest call that is in no frame was added, 0
// when there is none.
func (l *Lane) GatheredSince() usage.Micros {
	if l.builder.Len() == 0 {
		return 0
	}
	return l.first
}

// Waiting reports whether frames are sealed that are not acknowledged.
func (l *Lane) Waiting() bool { return len(l.queue) > 0 || l.hole > 0 || len(l.tail) > 0 }
