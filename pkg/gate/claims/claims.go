// Package claims lets a gateway say what it has sent on another way than the
// frames': which calls, by account and minute, are in which frames. The
// conservation audit compares that with what the ledger has (pkg/audit).
package claims

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Defaults of Options.
const (
	DefaultEvery = 5 * time.Second
	DefaultCells = 20_000
	DefaultGrace = time.Second
)

// Options of an outbox with claims.
type Options struct {
	// JetStream takes the claims.
	JetStream jetstream.JetStream
	// Every is how often claims are sent; DefaultEvery when 0. A killed gateway
	// leaves what it sealed since unclaimed.
	Every time.Duration
	// Cells bounds the accounts and minutes that are told apart in what waits to
	// be sent of a shard; DefaultCells when 0. Beyond them accounts are summed up.
	Cells int
	// Grace is how long Close tries to send the last claims beyond the context
	// that it is given; DefaultGrace when 0.
	Grace time.Duration
}

// Outbox is an outbox whose frames are claimed. Its methods are safe for
// concurrent use.
type Outbox struct {
	*outbox.Outbox
	o   Options
	log zerolog.Logger

	mu        sync.Mutex
	producers map[ksuid.KSUID]*producer
	order     []*producer

	sending sync.Mutex // one at a time sends
	last    trouble
	sent    prometheus.Counter
	failed  prometheus.Counter
	r       prometheus.Registerer
}

// producer is our own, or an earlier one whose spool is sent.
type producer struct {
	id      ksuid.KSUID
	number  uint64 // of its next message
	lanes   []*claimed
	waiting [][]byte // encoded, not acknowledged; the first has number - len(waiting)
}

// claimed is the lane of a shard. Add is called by the outbox's one goroutine
// and needs no lock; Seal and Take do.
type claimed struct {
	mu sync.Mutex
	*audit.Lane
}

// Seal is audit.Lane's.
func (c *claimed) Seal(at usage.Micros) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Lane.Seal(at)
}

func (c *claimed) take() []audit.Claim {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Lane.Take()
}

// Open opens an outbox whose frames are claimed; its Options.Claims is set.
func Open(box outbox.Options, o Options) (*Outbox, error) {
	if o.JetStream == nil {
		return nil, errors.New("claims: Options.JetStream is missing")
	}
	if o.Every <= 0 {
		o.Every = DefaultEvery
	}
	if o.Cells <= 0 {
		o.Cells = DefaultCells
	}
	if o.Grace <= 0 {
		o.Grace = DefaultGrace
	}
	b := &Outbox{
		o: o, log: box.Logger, producers: map[ksuid.KSUID]*producer{}, r: box.Registerer,
		sent:   prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_claims_sent_total", Help: "Messages in which the gateway claimed what it had sealed, for the conservation audit."}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_claims_failed_total", Help: "Tries to send a message of claims that failed; they are tried again."}),
	}
	if b.r != nil {
		for _, c := range []prometheus.Collector{b.sent, b.failed} {
			if err := b.r.Register(c); err != nil {
				b.unregister()
				return nil, fmt.Errorf("claims: metrics: %w", err)
			}
		}
	}
	box.Claims = b.lane
	var err error
	if b.Outbox, err = outbox.Open(box); err != nil {
		b.unregister()
		return nil, err
	}
	return b, nil
}

func (b *Outbox) unregister() {
	if b.r != nil {
		b.r.Unregister(b.sent)
		b.r.Unregister(b.failed)
	}
}

func (b *Outbox) lane(id ksuid.KSUID, shard uint32, again bool) lane.Claims {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.producers[id]
	if p == nil {
		p = &producer{id: id, number: 1}
		b.producers[id] = p
		b.order = append(b.order, p)
	}
	l := &claimed{}
	if again {
		l.Lane = audit.NewLaneAgain(id.String(), shard, b.o.Cells)
	} else {
		l.Lane = audit.NewLane(id.String(), shard, b.o.Cells)
	}
	p.lanes = append(p.lanes, l)
	return l
}

// Run is the outbox's; beside it claims are sent.
func (b *Outbox) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		tick := time.NewTicker(b.o.Every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := b.Send(ctx); err != nil && ctx.Err() == nil {
					b.last.say(b.log, err)
				} else if err == nil {
					b.last.over()
				}
			}
		}
	})
	return b.Outbox.Run(ctx)
}

// trouble is told once.
type trouble struct {
	mu   sync.Mutex
	said bool
}

func (t *trouble) say(log zerolog.Logger, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.said {
		t.said = true
		log.Warn().Err(err).Msg("what was sent can't be claimed yet: the conservation audit waits for it")
	}
}

func (t *trouble) over() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.said = false
}

// Send sends what was sealed so far. What can't be sent is kept and goes first
// the next time; meanwhile claims grow together within their bounds.
func (b *Outbox) Send(ctx context.Context) error {
	b.sending.Lock()
	defer b.sending.Unlock()
	b.mu.Lock()
	producers := append([]*producer(nil), b.order...)
	b.mu.Unlock()
	for _, p := range producers {
		if err := b.send(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func (b *Outbox) send(ctx context.Context, p *producer) error {
	if len(p.waiting) == 0 {
		b.mu.Lock()
		lanes := append([]*claimed(nil), p.lanes...)
		b.mu.Unlock()
		var claims []audit.Claim
		for _, l := range lanes {
			claims = append(claims, l.take()...)
		}
		p.waiting = audit.Encode(dedup.Producer(p.id), p.number, claims)
		p.number += uint64(len(p.waiting))
	}
	for len(p.waiting) > 0 {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		// The reader knows a repetition by its content; the message's id only
		// spares the stream most of them.
		_, err := b.o.JetStream.PublishMsg(try, &nats.Msg{
			Subject: ledger.ClaimSubject(p.id.String()), Data: p.waiting[0],
			Header: nats.Header{jetstream.MsgIDHeader: {b.Producer().String() + "/" + p.id.String() + "/" + strconv.FormatUint(p.number-uint64(len(p.waiting)), 10)}},
		})
		cancel()
		if err != nil {
			b.failed.Inc()
			return fmt.Errorf("claim what was sent: %w", err)
		}
		b.sent.Inc()
		p.waiting = p.waiting[1:]
	}
	return nil
}

// Close closes the outbox and sends the last claims. That these could not be
// sent is no error: what they would have said is unclaimed.
func (b *Outbox) Close(ctx context.Context) error {
	err := b.Outbox.Close(ctx)
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.o.Grace)
	defer cancel()
	if serr := b.Send(end); serr != nil {
		b.last.say(b.log, serr)
	}
	b.unregister()
	return err
}
