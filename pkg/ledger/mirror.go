package ledger

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Change is one key of a mirrored bucket.
type Change struct {
	// Key without the bucket's prefix.
	Key string
	// Value is nil when the key was deleted.
	Value    []byte
	Sequence uint64
}

// MirrorHandler keeps the copy. Its methods are called from one goroutine.
type MirrorHandler interface {
	// Reset replaces the whole copy by the newest value of every key, in the
	// order of their sequences; keys that were deleted are not among them.
	Reset(all []Change)
	// Apply brings one change, in stream order, after a Reset; never one that
	// is older than what the copy has of its key.
	Apply(c Change)
	// Stale says that the copy may be behind until the next Reset, and why.
	Stale(reason error)
}

// MirrorOptions say what to mirror.
type MirrorOptions struct {
	// Bucket is DecisionsBucket or DirectoryBucket: a bucket with republished changes.
	Bucket string
	// Check is how often the mirror asks the stream whether it has missed
	// something; 5 s when 0. Announce makes it sooner.
	Check time.Duration
	// Progress hears, in the goroutine of the handler, how many of how many messages
	// are read while everything is; nil: nobody does.
	Progress func(read, of uint64)
}

// Mirror keeps a local copy of a bucket current: all keys first, then the
// republished changes from a plain subscription, checked by their contiguous
// stream sequence. On a gap, a lost connection or an announcement of something
// it has not seen it reads everything anew. A plain KV watch is not enough: it
// was silent for up to 17 s after failovers.
type Mirror struct {
	nc *nats.Conn
	js jetstream.JetStream
	o  MirrorOptions
	h  MirrorHandler

	mu        sync.Mutex
	announced uint64
	kick      chan struct{}
	reading   *reading // what a session that ended had read; nil: nothing
}

// reading is a bucket that is being read: all that its stream has up to a sequence.
// It outlives a link that breaks, or is too slow for so much in one go, but not the
// server that it was read from: one that starts after a power cut, or from a backup,
// may give the same sequences to other messages.
type reading struct {
	server   string
	made     time.Time // when the stream was made
	at, read uint64
	keys     map[string]Change // also those that were deleted
}

// stall is how long a reading may go without a message; progressEvery how many
// messages there are from one word of progress to the next.
const (
	stall         = 30 * time.Second
	progressEvery = 100
)

// NewMirror returns a mirror; Run starts it.
func NewMirror(nc *nats.Conn, js jetstream.JetStream, o MirrorOptions, h MirrorHandler) *Mirror {
	if o.Check <= 0 {
		o.Check = 5 * time.Second
	}
	return &Mirror{nc: nc, js: js, o: o, h: h, kick: make(chan struct{}, 1)}
}

// announceGrace is how long a change may be on its way after it was announced.
const announceGrace = 200 * time.Millisecond

// Announce says that the bucket's stream has reached a sequence (a beacon does
// so): when the mirror has not got there soon after, it reads everything anew.
// Safe for concurrent use.
func (m *Mirror) Announce(sequence uint64) {
	m.mu.Lock()
	newer := sequence > m.announced
	if newer {
		m.announced = sequence
	}
	m.mu.Unlock()
	if newer {
		select {
		case m.kick <- struct{}{}:
		default:
		}
	}
}

// Run mirrors until ctx is done, then returns nil. While NATS is away it says
// Stale and tries again.
func (m *Mirror) Run(ctx context.Context) error {
	backoff := minBackoff
	for ctx.Err() == nil {
		started := time.Now()
		err := m.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		m.h.Stale(err)
		if time.Since(started) > 5*time.Second {
			backoff = minBackoff
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(backoff*2, time.Second)
	}
	return nil
}

// feedBuffer bounds the changes that wait while everything is read.
const feedBuffer = 64 << 10

func (m *Mirror) session(ctx context.Context) error {
	prefix := "feed." + m.o.Bucket + "."
	feed := make(chan *nats.Msg, feedBuffer)
	sub, err := m.nc.ChanSubscribe(prefix+">", feed)
	if err != nil {
		return fmt.Errorf("subscribe %s: %w", prefix+">", err)
	}
	defer func() { _ = sub.Unsubscribe() }() // the connection may be gone, and with it the subscription
	// The subscription must be at the server before the reading begins.
	flush, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := m.nc.FlushWithContext(flush); err != nil {
		return fmt.Errorf("subscribe %s: %w", prefix+">", err)
	}
	// From here on a lost connection means lost changes.
	ctx, stop := untilStatus(ctx, m.nc, nats.DISCONNECTED, nats.RECONNECTING, nats.CONNECTED, nats.CLOSED)
	defer stop()
	f := &mirrorFeed{m: m, changes: feed}
	if err := f.readAll(ctx); err != nil {
		return cause(ctx, err)
	}
	return cause(ctx, f.follow(ctx))
}

// cause returns why ctx ended, if it did, else err.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// mirrorFeed is one session's way from all keys on through the changes.
type mirrorFeed struct {
	m       *Mirror
	changes chan *nats.Msg
	// at is the stream's sequence up to which the copy is current.
	at uint64
	// target is a sequence that must be reached before grace ends; 0: none.
	target uint64
	grace  *time.Timer
}

func (f *mirrorFeed) follow(ctx context.Context) error {
	m := f.m
	check := time.NewTicker(m.o.Check)
	defer check.Stop()
	f.grace = time.NewTimer(time.Hour)
	defer f.grace.Stop()
	// Asked in a goroutine of its own: changes must not wait for the answer.
	answer := make(chan lastAnswer, 1)
	asking := false
	ask, cancel := context.WithCancel(ctx) // each question has a bound of its own
	defer func() {
		cancel()
		if asking {
			<-answer
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case msg := <-f.changes:
			c, next, err := f.take(msg)
			if err != nil {
				return err
			}
			if next {
				m.h.Apply(c)
			}
		case <-m.kick:
			m.mu.Lock()
			announced := m.announced
			m.mu.Unlock()
			f.expect(announced)
		case <-f.grace.C:
			if err := f.judge(); err != nil {
				return err
			}
		case <-check.C:
			if !asking {
				asking = true
				go func() {
					seq, err := m.lastSequence(ask)
					answer <- lastAnswer{seq, err}
				}()
			}
		case a := <-answer:
			asking = false
			if a.err != nil {
				return a.err
			}
			f.expect(a.seq)
		}
	}
}

type lastAnswer struct {
	seq uint64
	err error
}

// expect notes that the stream has reached a sequence. What is expected
// already is not put off: announcements can come more often than grace ends.
func (f *mirrorFeed) expect(seq uint64) {
	if seq > f.at && f.target == 0 {
		f.target = seq
		f.grace.Reset(announceGrace)
	}
}

func (f *mirrorFeed) judge() error {
	target := f.target
	f.target = 0
	f.m.mu.Lock()
	announced := f.m.announced
	f.m.mu.Unlock()
	switch {
	case f.at >= target:
		f.expect(announced)
	case len(f.changes) > 0:
		f.expect(target) // on its way through this process
	default:
		return fmt.Errorf("bucket %s: change %d was announced, only %d arrived", f.m.o.Bucket, target, f.at)
	}
	return nil
}

// take takes note of a change and reports whether it is the next one; one that
// the copy has already is not.
func (f *mirrorFeed) take(msg *nats.Msg) (c Change, next bool, err error) {
	seq, err := strconv.ParseUint(msg.Header.Get("Nats-Sequence"), 10, 64)
	switch {
	case err != nil:
		return c, false, fmt.Errorf("bucket %s: a republished message without a sequence on %s", f.m.o.Bucket, msg.Subject)
	case seq <= f.at:
		return c, false, nil
	case seq != f.at+1:
		return c, false, fmt.Errorf("bucket %s: changes %d to %d did not arrive", f.m.o.Bucket, f.at+1, seq-1)
	}
	f.at = seq
	return f.m.change(msg.Header.Get("Nats-Subject"), msg.Header, msg.Data, seq), true, nil
}

func (m *Mirror) lastSequence(ctx context.Context) (uint64, error) {
	ask, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s, err := m.js.Stream(ask, "KV_"+m.o.Bucket)
	if err != nil {
		return 0, fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
	}
	return s.CachedInfo().State.LastSeq, nil
}

func (m *Mirror) change(subject string, h nats.Header, data []byte, seq uint64) Change {
	key := strings.TrimPrefix(subject, "$KV."+m.o.Bucket+".")
	switch op := h.Get("KV-Operation"); {
	case op == "DEL", op == "PURGE", h.Get("Nats-Marker-Reason") != "":
		data = nil
	case data == nil:
		data = []byte{}
	}
	return Change{Key: key, Value: data, Sequence: seq}
}

// readAll hands over the newest value of every key as of some sequence of the
// stream: what it reads, and what the feed brought while it was reading. The
// reading alone is not enough: a key that is written meanwhile may be in it
// with neither its old nor its new value.
func (f *mirrorFeed) readAll(ctx context.Context) error {
	m := f.m
	finding, cancel := context.WithTimeout(ctx, stall)
	defer cancel()
	s, err := findStream(finding, m.js, "KV_"+m.o.Bucket)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
	}
	info, server := s.CachedInfo(), m.nc.ConnectedServerId()
	f.at = info.State.LastSeq
	if r := m.reading; r == nil || r.server != server || !r.made.Equal(info.Created) || r.at > f.at {
		m.reading = &reading{server: server, made: info.Created, keys: make(map[string]Change)}
	}
	if err := f.readUpTo(ctx, s, f.at); err != nil {
		return err
	}
	end, err := m.lastSequence(ctx)
	if err != nil {
		return err
	}
	for f.at < end {
		select {
		case msg := <-f.changes:
			c, next, err := f.take(msg)
			if err != nil {
				return err
			}
			if next {
				m.reading.keys[c.Key] = c
			}
		case <-time.After(2 * time.Second):
			return fmt.Errorf("bucket %s: it is at %d, only %d arrived", m.o.Bucket, end, f.at)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	all := make([]Change, 0, len(m.reading.keys))
	for _, c := range m.reading.keys {
		if c.Value != nil {
			all = append(all, c)
		}
	}
	m.reading = nil
	slices.SortFunc(all, func(a, b Change) int { return cmp.Compare(a.Sequence, b.Sequence) })
	m.h.Reset(all)
	return nil
}

// readUpTo reads the newest value of every key that was not written after a
// sequence of the stream, from where a session before has come to.
func (f *mirrorFeed) readUpTo(ctx context.Context, s jetstream.Stream, end uint64) error {
	m, r := f.m, f.m.reading
	from := jetstream.ConsumerConfig{FilterSubject: "$KV." + m.o.Bucket + ".>", DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy}
	if r.at > 0 {
		from.DeliverPolicy, from.OptStartSeq = jetstream.DeliverByStartSequencePolicy, r.at+1
	}
	opening, cancel := context.WithTimeout(ctx, stall)
	defer cancel()
	in, err := openIterator(opening, m.js, s, from)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
	}
	defer in.close()
	of := r.read + in.pending
	for left := in.pending; left > 0 && r.at < end; {
		wait, cancel := context.WithTimeout(ctx, stall)
		msg, err := in.next(wait)
		cancel()
		if err != nil {
			return fmt.Errorf("bucket %s: %d of %d messages are read: %w", m.o.Bucket, r.read, of, err)
		}
		if msg.Sequence <= end {
			c := m.change(msg.Subject, msg.Header, msg.Data, msg.Sequence)
			r.keys[c.Key] = c
		}
		left = msg.Pending
		r.at, r.read = msg.Sequence, r.read+1
		if m.o.Progress != nil && (r.read%progressEvery == 0 || left == 0) {
			m.o.Progress(r.read, max(of, r.read))
		}
	}
	r.at = end
	return nil
}
