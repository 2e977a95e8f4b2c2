package aggregator

import (
	"context"
	"errors"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/anchor"
)

// blockedAfter is how long the others wait for a shard that does not take its
// entries.
const blockedAfter = 500 * time.Millisecond

// intake is where a shard takes its entries from, in order: whoever begins at
// another position makes another one.
type intake struct {
	in   chan ledger.Message
	by   *reader
	gone chan struct{} // closed when nobody takes anything from it any more
}

func newIntake(by *reader) *intake {
	return &intake{in: make(chan ledger.Message, inputBuffer), by: by, gone: make(chan struct{})}
}

// reader reads all shards without a filter, or one.
type reader struct {
	*service
	all bool
	one *owner // if not all
}

// read hands over entries from a position on, until ctx is done or what one
// shard takes comes from elsewhere. A shard that holds the others up gets a
// reader of its own.
func (r *reader) read(ctx context.Context, from uint64) error {
	opts := ledger.ReadOptions{Stream: ledger.Stream, From: from, OnError: func(err error) {
		r.m.Interruptions.Inc()
		r.log.Warn().Err(err).Msg("reading the ledger was interrupted")
	}}
	if !r.all {
		opts.Subjects = ledger.ShardSubjects(r.one.shard)
	}
	blocked := time.NewTimer(blockedAfter)
	defer blocked.Stop()
	err := ledger.Read(ctx, r.js, opts, func(m ledger.Message) error {
		if r.all {
			r.m.Pending.Set(float64(m.Pending))
			r.head.Store(m.Sequence)
		}
		_, shard, err := ledger.ParseSubject(m.Subject)
		if err != nil || int(shard) >= r.shards {
			select {
			case r.strayed <- struct{}{}:
			default: // it is looked for already
			}
			return nil
		}
		o := r.owners[shard]
		to := o.intake.Load()
		if to == nil || to.by != r {
			return nil // it takes its entries elsewhere, or none
		}
		select {
		case to.in <- m:
			return nil
		default:
		}
		patience := blocked.C
		if !r.all {
			patience = nil // it holds nobody up
		}
		blocked.Reset(blockedAfter)
		select {
		case to.in <- m:
			return nil
		case <-to.gone:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-patience:
		}
		apart := &intake{in: to.in, by: &reader{service: r.service, one: o}, gone: to.gone}
		if o.intake.CompareAndSwap(to, apart) {
			o.log.Warn().Msg("the shard does not take its entries: it gets a reader of its own, so that the others need not wait")
			o.readApart(ctx, apart, m.Sequence)
		}
		return nil
	})
	if errors.Is(err, ledger.ErrRewound) {
		return anchor.Lost(err)
	}
	return err
}

// readApart lets a shard have a reader of its own, for as long as it takes from
// it.
func (o *owner) readApart(ctx context.Context, from *intake, sequence uint64) {
	o.m.Apart.Inc()
	ctx, cancel := context.WithCancel(ctx)
	o.g.Go(func() error {
		defer cancel()
		select {
		case <-from.gone:
		case <-ctx.Done():
		}
		return nil
	})
	o.g.Go(func() error {
		defer cancel()
		return from.by.read(ctx, sequence)
	})
}
