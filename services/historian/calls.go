package historian

import (
	"context"
	"errors"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/blocks"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/seen"
)

// calls gathers the ledger's calls.
type calls struct {
	fold    *seen.Fold
	horizon usage.Micros
	parts   func(*history.Block) []part
	metrics *metrics
	log     zerolog.Logger

	pool  chan *history.Block
	block *history.Block

	// Of the entry that was weighed:
	kind    ledger.Kind
	shard   uint32
	frame   ledger.Frame
	err     error
	control *tollkeeperv1.ControlEntry // nil: it is none, or can't be decoded
	newer   *quota.NewerError
	scratch []uint32
}

func newCalls(horizon usage.Micros, currency string, parts func(*history.Block) []part, m *metrics, log zerolog.Logger) *calls {
	c := &calls{fold: seen.New(horizon), horizon: horizon, parts: parts, metrics: m, log: log, pool: make(chan *history.Block, 2)}
	c.frame.CostsIn = currency
	c.pool <- history.NewBlock()
	c.block = history.NewBlock()
	return c
}

func (c *calls) weigh(m ledger.Message) blocks.Item {
	it := blocks.Item{Sequence: m.Sequence, Time: max(c.fold.High(), streamTime(m)), Near: m.Pending <= nearEntries}
	c.control, c.newer = nil, nil
	if c.kind, c.shard, c.err = ledger.ParseSubject(m.Subject); c.err == nil && (c.kind == ledger.KindControl || c.kind == ledger.KindClosing) {
		// The control lane counts the ones that can't be decoded.
		if e, err := ledger.DecodeAct(c.kind, m.Header, m.Data); err == nil {
			c.control, c.newer = e, seen.Beyond(c.shard, m.Sequence, e)
		}
	}
	if c.err != nil || c.kind != ledger.KindCalls {
		return it
	}
	if c.err = ledger.DecodeCalls(&c.frame, m.Subject, m.Header, m.Data); c.err == nil {
		it.Rows, it.Bytes = c.frame.N, len(m.Data)
	}
	return it
}

func (c *calls) take(m ledger.Message, keep bool) {
	if c.kind == 0 {
		c.undecodable(m, c.err, keep)
		return
	}
	shard := c.fold.Pass(c.shard, streamTime(m))
	switch {
	case c.kind == ledger.KindControl || c.kind == ledger.KindClosing:
		if c.control != nil {
			shard.Control(c.control)
		}
		return
	case c.kind != ledger.KindCalls:
		return
	case c.err != nil:
		c.undecodable(m, c.err, keep)
		return
	}
	f := shard.Calls(&c.frame, c.scratch)
	if f.Keep != nil {
		c.scratch = f.Keep
	}
	if !keep {
		return
	}
	switch f.Verdict {
	case dedup.Duplicate:
		c.metrics.repeated.WithLabelValues("frame").Inc()
		return
	case dedup.Gap:
		c.metrics.gaps.Add(float64(f.Skipped))
		c.log.Error().Str("producer", c.frame.Producer.String()).Uint32("shard", c.shard).Uint64("number", c.frame.Number).Uint64("skipped", f.Skipped).Msg("a producer skipped frames: calls were sent that never came")
	case dedup.Fresh:
	}
	if f.Invalid {
		c.undecodable(m, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: "a call names no account"}, keep)
		return
	}
	c.metrics.repeated.WithLabelValues("event").Add(float64(f.Foreign))
	c.block.AppendFrame(&c.frame, history.Entry{Sequence: m.Sequence, Time: c.fold.High()}, f.Keep)
}

func (c *calls) beyond() *quota.NewerError { return c.newer }

// undecodable leaves an entry out. The aggregator does the same, and keeps it in
// the dead-letter stream.
func (c *calls) undecodable(m ledger.Message, err error, keep bool) {
	if !keep {
		return
	}
	c.metrics.undecodable.WithLabelValues("calls", reason(err)).Inc()
	c.log.Debug().Err(err).Uint64("sequence", m.Sequence).Msg("an entry can't be decoded and is left out")
}

// reason is the machine code of why an entry can't be decoded.
func reason(err error) string {
	var invalid *usage.InvalidError
	if errors.As(err, &invalid) {
		return invalid.Reason
	}
	return usage.ReasonMalformed
}

func (c *calls) seal(ctx context.Context, _ blocks.Span) (int, []part, func(), error) {
	full := c.block
	if full.Rows() == 0 {
		return 0, nil, nil, nil
	}
	select {
	case c.block = <-c.pool:
	case <-ctx.Done():
		return 0, nil, nil, ctx.Err()
	}
	return full.Rows(), c.parts(full), func() {
		full.Reset()
		c.pool <- full
	}, nil
}

func (c *calls) snapshot(position uint64, stream string) []byte {
	return c.fold.Marshal(position, stream)
}

func (c *calls) restore(data []byte, stream string) (uint64, error) {
	if data == nil {
		c.fold = seen.New(c.horizon)
		return 0, nil
	}
	f, position, id, err := seen.Unmarshal(data)
	switch {
	case err != nil:
		return 0, err
	case id != stream:
		return 0, errors.New("the snapshot is of another ledger")
	}
	c.fold = f
	return position, nil
}
