// Package outbox brings the calls of a gateway to the ledger: it gathers them
// by shard into frames, numbers the frames, keeps exactly one unacknowledged
// frame per shard, and sends it again under the same identity until the ledger
// has it. While the ledger can't be reached frames go to a spool on disk, in
// order, and a spool that a killed process left is sent by the next one, but for what
// is known to be acknowledged. So are the
// marks beside it, of how much of its leases the process can have used (package marks).
package outbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/bound"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// FullPolicy is what happens to a call when memory, and the spool if there is
// one, are full.
type FullPolicy int

const (
	// Block: Add waits for room until its context is done.
	Block FullPolicy = iota
	// Refuse: Add returns ErrFull.
	Refuse
	// Drop: the call is not metered; counted and alarmed, Add returns nil.
	Drop
)

// Defaults of Options.
const (
	DefaultMemoryBytes = 64 << 20
	DefaultSpoolBytes  = 4 << 30
	DefaultLinger      = 10 * time.Millisecond
	DefaultAckTimeout  = 5 * time.Second

	// MinMemoryBytes is enough for a frame of every kind.
	MinMemoryBytes = 4 << 20
	// MinSpoolBytes likewise.
	MinSpoolBytes = 4 << 20
)

// Options of an outbox.
type Options struct {
	// NATS may be disconnected, and may disconnect at any time. It is not
	// closed by the outbox, and must outlive it.
	NATS *nats.Conn
	// Shards of the ledger (ledger.Geometry).
	Shards uint32
	// Currency of the ledger's costs (ledger.Geometry); usage.DefaultCurrency when
	// empty. A call that cost something in another is invalid.
	Currency string
	// Gateway is a name for people, at most 64 bytes; every frame carries it.
	Gateway string
	// SpoolDir is where the spool is; one outbox at a time can have it. Empty:
	// there is only memory. While it, or this producer's directory in it, is not where
	// it was the spool fails; the latter is made anew.
	SpoolDir string
	// MemoryBytes bounds calls and frames in memory, over all shards; a quarter
	// of it is kept for what is read back from the spool. Empty buffers, at
	// most some 100 KiB a shard, come on top. At least MinMemoryBytes;
	// DefaultMemoryBytes when 0.
	MemoryBytes int64
	// SpoolBytes bounds the files on disk, those of earlier producers included;
	// DefaultSpoolBytes when 0. Frames that the ledger can never take are kept aside,
	// up to a quarter as much, until somebody takes them away.
	SpoolBytes int64
	// OnFull is Block by default.
	OnFull FullPolicy
	// SpoolBeforeAnswer: Add returns when the call is on disk (fsync, many
	// calls at once) or acknowledged by the ledger, whichever is first. It
	// needs SpoolDir.
	SpoolBeforeAnswer bool
	// Linger bounds how long calls gather for the spool while the ledger can't
	// be reached; DefaultLinger when 0. While it can be reached nothing waits
	// for time: a frame leaves as soon as the one before it is acknowledged.
	Linger time.Duration
	// AckTimeout is after how long an acknowledgement counts as lost and the
	// frame is sent again; DefaultAckTimeout when 0.
	AckTimeout time.Duration
	Logger     zerolog.Logger
	// Registerer takes the metrics until Close; nil: none.
	Registerer prometheus.Registerer
	// Claims, if set, returns who hears which calls go into the frames of a
	// producer and shard; calls come from one goroutine. For an earlier producer
	// (again) it hears what was read back from its spool.
	Claims func(producer ksuid.KSUID, shard uint32, again bool) lane.Claims
	// Now is the wall clock; time.Now when nil.
	Now func() time.Time
	// TestClock is where the test clock of the ledger stands; nil: it has none. A
	// call must not be further ahead of the later of both clocks than usage.MaxFuture.
	TestClock func() usage.Micros
}

var (
	// ErrFull says that there is no room for the call (policy Refuse).
	ErrFull = errors.New("the outbox is full: the ledger can't be reached for too long, or its stream is full")
	// ErrClosed says that the outbox takes no calls any more.
	ErrClosed = errors.New("the outbox is closed")
	// ErrNotSafe says that a call was taken but is neither on disk nor
	// acknowledged yet; it may still be counted.
	ErrNotSafe = errors.New("the call is not on disk yet; it may still be counted")
	// ErrSpooled says that everything is on disk but not in the ledger yet.
	ErrSpooled = errors.New("everything is in the spool, not all of it in the ledger yet")
	// ErrSpoolInUse says that another outbox has the spool directory.
	ErrSpoolInUse = errors.New("the spool directory is in use by another gateway")
)

// Totals are sums over calls. A refused call feeds no meter; an admitted one
// adds 1 to calls unless it reports another number.
type Totals = lane.Totals

// Outbox is described at the package. Its methods are safe for concurrent use.
type Outbox struct {
	o        Options
	producer ksuid.KSUID
	budget   bound.Budget
	gathers  []gather
	chunks   sync.Pool // of *chunk, empty
	start    time.Time
	coarse   atomic.Int64 // microseconds, a recent reading of the wall clock
	ready    chan uint32  // shards whose gathered calls the sender should take; each at most once
	s        *sender
	metrics  *metrics

	stop    chan struct{} // closed by Close: Run returns
	stopped sync.Once
	turn    chan struct{} // holds one token: whoever has it is the sender
	closed  atomic.Bool

	invalid, dropped, refused atomic.Int64
	// lossy: a call that was answered may be neither in the ledger nor in the spool.
	lossy      atomic.Bool
	full       atomic.Bool // for want of room; until memory is half free
	spoolFails atomic.Bool
	healthy    atomic.Bool // the ledger took the newest frame
}

// gather is where Add puts calls and the sender takes them from.
type gather struct {
	mu       sync.Mutex
	chunks   []*chunk
	waiting  int    // calls in chunks
	added    uint64 // calls ever
	charged  int64  // of calls
	reserved int64  // of the budget, at least charged
	first    usage.Micros
	busy     bool // a frame is on its way or waiting: calls gather behind it
	queued   bool // there is a word in ready that the sender has not heard
	closed   bool
	marks    bound.Watermarks

	_ [64]byte // keep neighbours' locks apart
}

// chunk is a piece of a gather: pieces need no copying when many calls wait.
type chunk struct {
	n     int
	calls [chunkCalls]usage.Call
}

const chunkCalls = 128

// put takes a copy of a call; g is locked.
func (o *Outbox) put(g *gather, c *usage.Call) {
	k := len(g.chunks)
	if k == 0 || g.chunks[k-1].n == chunkCalls {
		fresh, ok := o.chunks.Get().(*chunk)
		if !ok {
			fresh = new(chunk)
		}
		g.chunks = append(g.chunks, fresh)
		k++
	}
	last := g.chunks[k-1]
	last.calls[last.n] = *c
	if len(c.Quantities.Custom()) > 0 {
		last.calls[last.n].Quantities = copyOf(&c.Quantities)
	}
	last.n++
	g.waiting++
}

// reserveChunk is how much of the budget a shard takes at once.
const reserveChunk = 16 << 10

// Open makes an outbox with a new producer. It does not need NATS to be there.
// With a spool directory it locks it (ErrSpoolInUse), and Run will send what
// earlier producers left in it. That its disk is full is no error, because sending
// makes room: until there is some, Add does what Options.OnFull says where it needs it.
func Open(o Options) (*Outbox, error) {
	if o.NATS == nil {
		return nil, errors.New("outbox: Options.NATS is missing")
	}
	if o.Shards == 0 || o.Shards > ledger.MaxShards {
		return nil, fmt.Errorf("outbox: %d shards: 1 to %d are possible", o.Shards, ledger.MaxShards)
	}
	if err := o.withDefaults(); err != nil {
		return nil, err
	}
	producer, err := ksuid.NewRandomWithTime(o.Now())
	if err != nil {
		return nil, fmt.Errorf("open outbox: %w", err)
	}
	b := &Outbox{
		o: o, producer: producer, gathers: make([]gather, o.Shards), ready: make(chan uint32, o.Shards),
		start: o.Now(), stop: make(chan struct{}), turn: make(chan struct{}, 1),
	}
	b.budget.Limit = o.MemoryBytes - o.MemoryBytes/4
	b.coarse.Store(b.start.UnixMicro())
	b.turn <- struct{}{}
	if b.s, err = newSender(b); err != nil {
		return nil, err
	}
	if b.metrics, err = newMetrics(b, o.Registerer); err != nil {
		return nil, errors.Join(err, b.s.release())
	}
	return b, nil
}

// Check says what Open would have against the options besides NATS and Shards,
// which may come much later.
func (o Options) Check() error { return o.withDefaults() }

func (o *Options) withDefaults() error {
	if len(o.Gateway) > lane.MaxGateway {
		return fmt.Errorf("outbox: the gateway's name is %d bytes long, at most %d are allowed", len(o.Gateway), lane.MaxGateway)
	}
	if o.SpoolBeforeAnswer && o.SpoolDir == "" {
		return errors.New("outbox: spooling before the answer needs a spool directory: give one")
	}
	if o.OnFull < Block || o.OnFull > Drop {
		return fmt.Errorf("outbox: there is no policy %d for a full outbox", o.OnFull)
	}
	if o.Currency == "" {
		o.Currency = usage.DefaultCurrency
	}
	if !usage.ValidCurrency(o.Currency) {
		return fmt.Errorf("outbox: %q is no currency: use its ISO 4217 code, three capital letters such as USD", o.Currency)
	}
	if o.MemoryBytes == 0 {
		o.MemoryBytes = DefaultMemoryBytes
	}
	if o.MemoryBytes < MinMemoryBytes {
		return fmt.Errorf("outbox: %d bytes of memory are too few, give at least %d", o.MemoryBytes, MinMemoryBytes)
	}
	if o.SpoolBytes == 0 {
		o.SpoolBytes = DefaultSpoolBytes
	}
	if o.SpoolBytes < MinSpoolBytes {
		return fmt.Errorf("outbox: %d bytes of spool are too few, give at least %d", o.SpoolBytes, MinSpoolBytes)
	}
	if o.Linger < 0 || o.AckTimeout < 0 {
		return errors.New("outbox: bounds and times must not be negative")
	}
	if o.Linger == 0 {
		o.Linger = DefaultLinger
	}
	if o.AckTimeout == 0 {
		o.AckTimeout = DefaultAckTimeout
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return nil
}

// Producer returns the identity of this outbox's frames, new at each Open.
func (o *Outbox) Producer() ksuid.KSUID { return o.producer }

// Marks returns where it is to be noted how much of its leases this producer can have
// used, before it uses it: should it be killed, the next outbox in the directory tells
// the ledger, and what is beyond comes back. A lease that is not noted counts as
// unused, so who uses leases without noting it must not call this. nil: there is no
// spool directory.
func (o *Outbox) Marks() *marks.Journal {
	if o.s.disk == nil {
		return nil
	}
	j := o.s.disk.marks
	if err := j.Write(0, nil); err != nil {
		o.o.Logger.Warn().Err(err).Msg("the journal of what leases can have been used could not be begun: trying again when it is needed")
	}
	return j
}

// whole: every call that Add was asked to take is, or will be, in the ledger.
func (o *Outbox) whole() bool {
	return !o.lossy.Load() && o.invalid.Load() == 0 && o.dropped.Load() == 0 && o.refused.Load() == 0
}

// Add takes a call of a shard. It keeps no reference to c. An invalid call is
// an *usage.InvalidError and is not taken: it would spoil its whole frame. A
// full outbox does what Options.OnFull says. With SpoolBeforeAnswer it returns
// when the call is safe; when ctx is done before, the error is ErrNotSafe.
func (o *Outbox) Add(ctx context.Context, shard uint32, c *usage.Call) error {
	if int(shard) >= len(o.gathers) {
		return fmt.Errorf("outbox: there is no shard %d, the ledger has %d", shard, len(o.gathers))
	}
	now := usage.Micros(o.coarse.Load())
	if c.Time > now+usage.Micros(time.Minute.Microseconds()) {
		o.now() // the coarse clock may have slept
		now = usage.Micros(o.coarse.Load())
	}
	if o.o.TestClock != nil {
		now = max(now, o.o.TestClock())
	}
	err := c.Validate(now)
	if err == nil {
		err = c.CostIn(o.o.Currency)
	}
	if err != nil {
		o.invalid.Add(1)
		return err
	}
	if o.o.SpoolBeforeAnswer && o.o.OnFull != Block && o.spoolFails.Load() && !o.healthy.Load() {
		// Neither disk nor ledger can make it safe.
		return o.turnAway()
	}
	need := lane.Charge(c)
	g := &o.gathers[shard]
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		o.lossy.Store(true)
		return ErrClosed
	}
	if g.charged+need > g.reserved && !o.reserve(g, need) {
		if err, taken := o.noRoom(ctx, g, need); !taken {
			return err
		}
	}
	if g.waiting == 0 {
		g.first = o.now()
	}
	o.put(g, c)
	g.charged += need
	g.added++
	mine := g.added
	wake := !g.queued && (!g.busy || g.waiting >= ledger.MaxFrameCalls || o.o.SpoolBeforeAnswer)
	g.queued = g.queued || wake
	g.mu.Unlock()
	if wake {
		o.ready <- shard // never blocks: one place per shard
	}
	if o.o.SpoolBeforeAnswer {
		if err := g.marks.WaitSafe(ctx, mine); err != nil {
			return fmt.Errorf("%w: %w", ErrNotSafe, err)
		}
	}
	return nil
}

// copyOf gives the readings of a user's own meters memory of their own.
func copyOf(q *usage.Quantities) usage.Quantities {
	var out usage.Quantities
	for i := range usage.BuiltIn(usage.NumBuiltIn) {
		if v, ok := q.BuiltIn(i); ok {
			out.SetBuiltIn(i, v)
		}
	}
	for _, own := range q.Custom() {
		out.Set(own.Meter, own.Value)
	}
	return out
}

// reserve gives the shard room for need more bytes; g is locked.
func (o *Outbox) reserve(g *gather, need int64) bool {
	if chunk := max(need, reserveChunk); o.budget.Take(chunk) {
		g.reserved += chunk
	} else if o.budget.Take(need) {
		g.reserved += need
	} else {
		return false
	}
	if o.budget.Pressed() {
		o.s.press()
	}
	return true
}

// noRoom does what the policy says. It is called and returns taken with g
// locked, or returns not taken with g unlocked.
func (o *Outbox) noRoom(ctx context.Context, g *gather, need int64) (err error, taken bool) {
	for {
		// What waits for more company gives its room back when it is sealed.
		wake := !g.queued && g.waiting > 0
		g.queued = g.queued || wake
		g.mu.Unlock()
		if wake {
			o.ready <- o.shardOf(g)
		}
		o.s.press()
		if o.o.OnFull != Block {
			return o.turnAway(), false
		}
		o.full.Store(true)
		if err := o.budget.Wait(ctx, need); err != nil {
			o.refused.Add(1)
			return fmt.Errorf("%w: %w", ErrFull, err), false
		}
		g.mu.Lock()
		if g.closed {
			g.mu.Unlock()
			o.lossy.Store(true)
			return ErrClosed, false
		}
		if g.charged+need <= g.reserved || o.reserve(g, need) {
			return nil, true
		}
	}
}

// turnAway does what Refuse and Drop say.
func (o *Outbox) turnAway() error {
	o.full.Store(true)
	if o.o.OnFull == Drop {
		o.dropped.Add(1)
		return nil
	}
	o.refused.Add(1)
	return ErrFull
}

func (o *Outbox) shardOf(g *gather) uint32 {
	for i := range o.gathers {
		if g == &o.gathers[i] {
			return uint32(i)
		}
	}
	panic("outbox: a gather that is not ours")
}

// now is the time since Open, added to the wall clock then: unlike that it never
// steps back, so that no pause lasts for an hour.
func (o *Outbox) now() usage.Micros {
	now := o.o.Now()
	o.coarse.Store(now.UnixMicro())
	return usage.At(o.start) + usage.Micros(now.Sub(o.start).Microseconds())
}

// Flush waits until every call that was added before is acknowledged by the
// ledger. When ctx is done before, the error says so and is ErrSpooled if all
// of it is safe on disk. Somebody must be in Run.
func (o *Outbox) Flush(ctx context.Context) error {
	targets := make([]uint64, len(o.gathers))
	for i := range o.gathers {
		o.gathers[i].mu.Lock()
		targets[i] = o.gathers[i].added
		o.gathers[i].mu.Unlock()
	}
	for i := range o.gathers {
		if err := o.gathers[i].marks.WaitAcked(ctx, targets[i]); err == nil {
			continue
		} else if !o.safe(targets) {
			return fmt.Errorf("flush: %w", err)
		} else {
			return fmt.Errorf("flush: %w: %w", ErrSpooled, err)
		}
	}
	return nil
}

func (o *Outbox) safe(targets []uint64) bool {
	for i := range o.gathers {
		if safe, _ := o.gathers[i].marks.Get(); safe < targets[i] {
			return false
		}
	}
	return true
}

// Run sends until ctx is done or Close is called and returns nil. Only one Run
// at a time does the work, another one waits for its turn.
func (o *Outbox) Run(ctx context.Context) error {
	select {
	case <-o.turn:
	case <-ctx.Done():
		return nil
	case <-o.stop:
		return nil
	}
	defer func() { o.turn <- struct{}{} }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-o.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	o.s.loop(ctx, func() bool { return false })
	return nil
}

// Close takes no more calls and brings those it has to safety: sent while the
// ledger takes them and ctx lasts, else spooled. Where everything could be sent
// the producer is retired with a closing entry on each shard it used; where not
// the next Open sends it. It is complete when no call that Add was asked to take
// is missing from the ledger; so whoever closes must have ended all calls before. A
// producer that was killed is never complete. The error says how many calls are lost: none with a
// spool directory that can be written.
func (o *Outbox) Close(ctx context.Context) error {
	if !o.closed.CompareAndSwap(false, true) {
		return nil
	}
	for i := range o.gathers {
		o.gathers[i].mu.Lock()
		o.gathers[i].closed = true
		o.gathers[i].mu.Unlock()
	}
	close(o.stop)
	o.budget.Wake() // who waits for room shall see that it is closed
	<-o.turn
	err := o.s.finish(ctx)
	o.metrics.unregister()
	return errors.Join(err, o.s.release())
}
