package ledger

import (
	"context"
	"fmt"
	"strconv"
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
	// Reset replaces the whole copy by the newest value of every key.
	Reset(all []Change)
	// Apply brings one change, in stream order, after a Reset.
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
}

// Mirror keeps a local copy of a bucket current: all keys first, then the
// republished changes from a plain subscription, checked by their contiguous
// stream sequence. On a gap, a reconnection or an announcement of something it
// has not seen it reads everything anew. A plain KV watch is not enough: it
// was silent for up to 17 s after failovers.
type Mirror struct {
	nc *nats.Conn
	js jetstream.JetStream
	o  MirrorOptions
	h  MirrorHandler

	mu        sync.Mutex
	announced uint64
	kick      chan struct{}
}

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
	backoff := 50 * time.Millisecond
	for ctx.Err() == nil {
		started := time.Now()
		err := m.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		m.h.Stale(err)
		if time.Since(started) > 5*time.Second {
			backoff = 50 * time.Millisecond
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
	disconnects := m.nc.Stats().Reconnects
	at, err := m.readAll(ctx)
	if err != nil {
		return err
	}
	check := time.NewTicker(m.o.Check)
	defer check.Stop()
	grace := time.NewTimer(time.Hour)
	defer grace.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case msg := <-feed:
			seq, err := strconv.ParseUint(msg.Header.Get("Nats-Sequence"), 10, 64)
			if err != nil {
				return fmt.Errorf("a republished message without a sequence on %s", msg.Subject)
			}
			if seq <= at {
				continue
			}
			if seq != at+1 {
				return fmt.Errorf("bucket %s: changes %d to %d did not arrive", m.o.Bucket, at+1, seq-1)
			}
			at = seq
			m.h.Apply(m.change(msg.Header.Get("Nats-Subject"), msg.Header, msg.Data, seq))
		case <-m.kick:
			grace.Reset(announceGrace)
		case <-grace.C:
			m.mu.Lock()
			announced := m.announced
			m.mu.Unlock()
			if announced > at && len(feed) == 0 {
				return fmt.Errorf("bucket %s: change %d was announced, only %d arrived", m.o.Bucket, announced, at)
			}
		case <-check.C:
			if m.nc.Stats().Reconnects != disconnects {
				return fmt.Errorf("bucket %s: the connection was lost meanwhile", m.o.Bucket)
			}
			last, err := m.lastSequence(ctx)
			if err != nil {
				return err
			}
			if last > at && len(feed) == 0 {
				return fmt.Errorf("bucket %s: it is at %d, only %d arrived", m.o.Bucket, last, at)
			}
		}
	}
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
	key := subject
	if p := "$KV." + m.o.Bucket + "."; len(subject) > len(p) && subject[:len(p)] == p {
		key = subject[len(p):]
	}
	switch h.Get("KV-Operation") {
	case "DEL", "PURGE":
		data = nil
	default:
		if data == nil {
			data = []byte{}
		}
	}
	return Change{Key: key, Value: data, Sequence: seq}
}

// readAll reads the newest value of every key, hands them over and returns the
// stream sequence up to which they are current.
func (m *Mirror) readAll(ctx context.Context) (uint64, error) {
	setup, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	s, err := m.js.Stream(setup, "KV_"+m.o.Bucket)
	if err != nil {
		return 0, fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
	}
	last := s.CachedInfo().State.LastSeq
	all, err := m.readLatest(setup, s)
	if err != nil {
		return 0, err
	}
	// What was written while it was read may be there for one key and not for
	// another: the feed brings it again, in order, from the first sequence on.
	m.h.Reset(all)
	return last, nil
}

func (m *Mirror) readLatest(ctx context.Context, s jetstream.Stream) ([]Change, error) {
	cons, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{"$KV." + m.o.Bucket + ".>"},
		DeliverPolicy:  jetstream.DeliverLastPerSubjectPolicy,
	})
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
	}
	pending := cons.CachedInfo().NumPending
	all := make([]Change, 0, pending)
	if pending == 0 {
		return all, nil
	}
	it, err := cons.Messages(jetstream.PullMaxBytes(16<<20), jetstream.PullExpiry(4*time.Second), jetstream.PullHeartbeat(time.Second))
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
	}
	defer it.Stop()
	for {
		msg, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return nil, fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
		}
		meta, err := msg.Metadata()
		if err != nil {
			return nil, fmt.Errorf("bucket %s: %w", m.o.Bucket, err)
		}
		if c := m.change(msg.Subject(), msg.Headers(), msg.Data(), meta.Sequence.Stream); c.Value != nil {
			all = append(all, c)
		}
		if meta.NumPending == 0 {
			return all, nil
		}
	}
}
