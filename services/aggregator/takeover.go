package aggregator

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

// tenure is a shard in our hands, from a claim to what ends it.
type tenure struct {
	ctx   context.Context
	claim *ownership.Claim
	begun time.Time
	over  chan error // gets one
}

// own is the ownership's callback: it lets the shard's goroutine have the claim.
func (s *service) own(ctx context.Context, c *ownership.Claim) error {
	o := s.owners[c.Shard]
	questions, err := s.nc.Subscribe(ledger.UsageSubject(c.Shard), func(q *nats.Msg) {
		select {
		case o.queries <- q:
		default:
			refuse(s.m, q, "503", "too many questions at once: ask again")
		}
	})
	if err != nil {
		return fmt.Errorf("shard %d: subscribe: %w", c.Shard, err)
	}
	defer func() { _ = questions.Unsubscribe() }() // a closed connection has none
	// Who sees that we are ready may ask.
	flush, cancel := context.WithTimeout(ctx, askTimeout)
	if err := s.nc.FlushWithContext(flush); err != nil {
		o.log.Debug().Err(err).Msg("it is not clear whether the shard can be asked yet")
	}
	cancel()
	t := &tenure{ctx: ctx, claim: c, begun: time.Now(), over: make(chan error, 1)}
	select {
	case o.tenures <- t:
		return <-t.over
	case <-s.alive.Done():
		return nil
	}
}

// inherits is told which shards would be ours if their owners died.
func (s *service) inherits(shards []uint32) {
	if s.o.Standby <= 0 {
		return
	}
	tail := make([]bool, s.shards)
	for _, shard := range shards[:min(len(shards), s.o.Standby)] {
		tail[shard] = true
	}
	for i, o := range s.owners {
		if o.tail.Swap(tail[i]) != tail[i] {
			select {
			case o.nudge <- struct{}{}:
			default: // it will look anyway
			}
		}
	}
}

// unread is after every entry.
const unread = math.MaxUint64

// warmAll loads the state of every shard and returns the first entry that one of
// them needs; unread: none may be folded.
func (s *service) warmAll(ctx context.Context) (from uint64, err error) {
	if s.o.Standby != 0 {
		return 0, nil
	}
	first := make([]uint64, len(s.owners))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i, o := range s.owners {
		o.tail.Store(true)
		g.Go(func() error {
			err := s.persist(ctx, fmt.Sprintf("load shard %d", i), func(ctx context.Context) error {
				w, err := s.stores.Warm(ctx, o.shard)
				if err != nil {
					return err
				}
				o.state, o.backlog, first[i] = w.State, publish.Backlog{}, w.From
				o.backlog.Saw(w.At)
				return nil
			})
			if o.unknown(err) {
				first[i] = unread
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	from = first[0]
	for _, f := range first {
		from = min(from, f)
	}
	return from, nil
}
