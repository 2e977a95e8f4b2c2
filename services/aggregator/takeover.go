package aggregator

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
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
			s.m.refuse(q, "503", "too many questions at once: ask again")
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

// warmAll loads the state of every shard and returns the first entry that one of
// them needs.
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
			return s.persist(ctx, fmt.Sprintf("load shard %d", i), func(ctx context.Context) error {
				w, err := s.warm(ctx, o.shard)
				if err != nil {
					return err
				}
				o.state, o.backlog, first[i] = w.state, publish.Backlog{}, w.from
				o.backlog.Saw(w.at)
				return nil
			})
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

// warmed is a state of which every decision is published, and where to read on.
type warmed struct {
	state *quota.Shard
	at    publish.Position
	from  uint64
}

// warm loads a shard's state.
func (s *service) warm(ctx context.Context, shard uint32) (w warmed, err error) {
	for {
		if w.at, err = s.readPosition(ctx, shard); err != nil {
			return w, err
		}
		w.state, err = s.load(ctx, shard, w.at.Found.Snapshot)
		if err == nil {
			break
		}
		if ctx.Err() != nil || errors.Is(err, errLags) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, context.DeadlineExceeded) {
			return w, err
		}
		// Its owner may have removed it, for a newer one.
		if at, askErr := s.readPosition(ctx, shard); askErr != nil {
			return w, askErr
		} else if at.Found.Snapshot != w.at.Found.Snapshot {
			continue
		}
		// The log is the truth; reading it from the beginning is slower, and
		// ends with ErrPurged where the beginning is gone.
		s.log.Error().Err(err).Uint32("shard", shard).Msg("the snapshot cannot be used: the shard is counted anew from the ledger's beginning")
		if w.state, err = s.load(ctx, shard, ""); err != nil {
			return w, err
		}
		break
	}
	end, err := s.ends(ctx, shard, w.state.Sequence(), w.at)
	if err != nil {
		return w, err
	}
	w.from = w.state.Sequence() + 1
	if end.shard <= w.state.Sequence() {
		// A shard at rest must not make the others' entries be read again.
		w.from = max(w.from, end.stream+1)
	}
	return w, nil
}

// ending is how far the ledger goes.
type ending struct {
	stream, shard, control uint64
}

// ends returns how far the ledger goes, if it holds what a shard with such a
// state and such decisions needs.
func (s *service) ends(ctx context.Context, shard uint32, folded uint64, at publish.Position) (e ending, err error) {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	stream, err := s.js.Stream(ask, ledger.Stream)
	if err != nil {
		return e, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	// Decisions on entries that are gone would hide those on the entries that
	// take their numbers.
	e.stream = stream.CachedInfo().State.LastSeq
	if told := max(folded, at.Found.Sequence, at.Newest.Revision); told > e.stream {
		return e, fmt.Errorf("shard %d is counted up to entry %d, but the ledger ends at %d: restore the ledger, or delete the bucket %s and the snapshots to count what it holds anew: %w",
			shard, told, e.stream, ledger.DecisionsBucket, ledger.ErrRewound)
	}
	if first := stream.CachedInfo().State.FirstSeq; folded == 0 && first > 1 {
		return e, fmt.Errorf("shard %d: the ledger begins at %d and there is no snapshot: %w", shard, first, ledger.ErrPurged)
	}
	for _, subject := range ledger.ShardSubjects(shard) {
		m, found, err := s.last(ctx, ledger.Stream, subject)
		if err != nil {
			return e, err
		}
		if !found {
			continue
		}
		e.shard = max(e.shard, m.Sequence)
		if subject == ledger.ControlSubject(shard) {
			e.control = m.Sequence
		}
	}
	return e, nil
}

// fence makes a claim the shard's owner: nobody else's batch is taken from then
// on, and what was published before is what it returns.
func (s *service) fence(ctx context.Context, shard uint32, token uint64) (publish.Position, error) {
	before, err := s.readPosition(ctx, shard)
	if err != nil {
		return publish.Position{}, err
	}
	next := before.Found
	next.Epoch, next.Owner = token, s.name
	switch {
	case before.Found == next:
		return before, nil // an earlier try
	case before.Found.Epoch >= token:
		return publish.Position{}, fmt.Errorf("shard %d is at epoch %d, this claim is %d: %w", shard, before.Found.Epoch, token, ledger.ErrStale)
	}
	m, err := next.Message(shard)
	if err != nil {
		return publish.Position{}, err
	}
	ledger.ExpectLast(m, before.Revision)
	send, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if _, err := ledger.PublishBatch(send, s.nc, []*nats.Msg{m}); err != nil && !errors.Is(err, ledger.ErrStale) {
		s.log.Debug().Err(err).Uint32("shard", shard).Msg("it is not clear whether the shard is taken over")
	}
	// Whatever the answer was: what stands there now is ours or not.
	// Nobody else publishes from there on, so the newest decision is too.
	at, err := s.readPosition(ctx, shard)
	if err == nil && at.Found != next {
		err = fmt.Errorf("shard %d: its checkpoint has moved to epoch %d meanwhile", shard, at.Found.Epoch)
	}
	return at, err
}

// last asks the leader of a stream for the newest message on a subject.
func (s *service) last(ctx context.Context, stream, subject string) (ledger.Message, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return ledger.LastMessage(ctx, s.js, stream, subject)
}

// readPosition returns how a shard stands in the decisions' stream.
func (s *service) readPosition(ctx context.Context, shard uint32) (publish.Position, error) {
	var at publish.Position
	const stream = "KV_" + ledger.DecisionsBucket
	m, ok, err := s.last(ctx, stream, publish.CheckpointSubject(shard))
	if err != nil {
		return at, fmt.Errorf("checkpoint of shard %d: %w", shard, err)
	}
	if ok {
		at.Revision = m.Sequence
		if at.Found, err = publish.ReadCheckpoint(shard, m.Header, m.Data); err != nil {
			return at, fmt.Errorf("%w: %w", errForGood, err)
		}
	}
	m, ok, err = s.last(ctx, stream, publish.DecisionsSubject(shard))
	switch {
	case err != nil:
		return at, fmt.Errorf("newest decision of shard %d: %w", shard, err)
	case !ok:
	case len(m.Data) == 0:
		// Somebody has deleted a key by hand. What was published after the
		// checkpoint is published again: the same, under the same ids.
		s.log.Warn().Uint32("shard", shard).Str("key", m.Subject).Msg("the newest decision was deleted by hand")
	default:
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			return at, fmt.Errorf("%w: newest decision of shard %d: %w", errForGood, shard, err)
		}
		at.Newest, at.NewestAt = publish.ToldBy(&d), m.Sequence
	}
	return at, nil
}

// snapshotAt is the position that a snapshot's name tells, 0 without one.
func snapshotAt(name string) uint64 {
	_, rest, _ := strings.Cut(name, "/")
	at, _, _ := strings.Cut(rest, "-")
	n, err := strconv.ParseUint(at, 10, 64)
	if err != nil {
		return 0 // of another version: it is behind everything
	}
	return n
}
