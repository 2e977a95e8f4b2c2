package opening

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

const (
	// toldEvery is how often a long reading says how far it is.
	toldEvery = 5 * time.Second
	// maxBytes of an entry, about.
	maxBytes = 256 << 10
)

// Ledger is where what was used is counted, and told.
type Ledger struct {
	JS    jetstream.JetStream
	Shard uint32
	// Currency of the ledger's costs.
	Currency string
	// Author of the entries.
	Author string
	Log    zerolog.Logger
}

var errCounted = errors.New("everything is counted")

// Tell folds what the shard's ledger holds until everything is counted, appends it in
// entries of a bounded size, and returns the sequence of the last one. Errors are those
// of NATS, ctx's, and *quota.NewerError.
func (l *Ledger) Tell(ctx context.Context, c *Count) (uint64, error) {
	if err := l.read(ctx, c); err != nil {
		return 0, err
	}
	return l.append(ctx, c.Counted())
}

func (l *Ledger) read(ctx context.Context, c *Count) error {
	stream, err := l.JS.Stream(ctx, ledger.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	from, to, told := max(stream.CachedInfo().State.FirstSeq, 1), c.Last(), time.Now()
	decoder := fold.Decoder{Frame: ledger.Frame{CostsIn: l.Currency}}
	err = ledger.Read(ctx, l.JS, ledger.ReadOptions{Stream: ledger.Stream, From: from, Subjects: ledger.ShardSubjects(l.Shard)}, func(m ledger.Message) error {
		if time.Since(told) > toldEvery {
			told = time.Now()
			l.Log.Info().Uint64("at", m.Sequence).Uint64("of", to).Msg("counting what was used before new limits")
		}
		// What can't be decoded still lets time pass.
		e, _, _ := decoder.Decode(&m)
		if err := c.Apply(e); err != nil {
			return err
		}
		if c.Done() {
			return errCounted
		}
		return nil
	})
	switch {
	case errors.Is(err, errCounted):
		return nil
	case err == nil:
		return ctx.Err()
	}
	return err
}

func (l *Ledger) append(ctx context.Context, all []quota.Opening) (last uint64, err error) {
	for len(all) > 0 {
		body, size := &tollkeeperv1.Openings{}, 0
		for len(all) > 0 && len(body.GetOpenings()) < quota.MaxOpenings && size < maxBytes {
			x := &all[0]
			p := &tollkeeperv1.Opening{
				Account: x.Account, Meter: string(x.Meter), Filter: ledger.FilterToProto(&x.Filter), Window: string(x.Window),
				WindowStartUnixMicros: int64(x.WindowStart), Since: x.Since, Used: x.Used, Previous: x.Previous,
			}
			body.Openings, size, all = append(body.Openings, p), size+proto.Size(p), all[1:]
		}
		m, err := ledger.ControlMessage(l.Shard, &tollkeeperv1.ControlEntry{
			Id: ksuid.New().String(), Author: l.Author, CreatedAtUnixMicros: time.Now().UnixMicro(), Body: &tollkeeperv1.ControlEntry_Openings{Openings: body},
		})
		if err != nil {
			return last, err
		}
		ack, err := l.JS.PublishMsg(ctx, m)
		if err != nil {
			return last, fmt.Errorf("append what was used before new limits: %w", err)
		}
		last = ack.Sequence
	}
	return last, nil
}
