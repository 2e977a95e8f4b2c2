// Package testclock advances the time of a ledger that was born with a test clock
// (ledger.ProvisionOptions.TestClock). Such a clock stands still between two
// advances, so that a person, a test or a replay lives through a year in a minute.
package testclock

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Clock is the time of one ledger. Its methods are safe for concurrent use.
type Clock struct {
	js     jetstream.JetStream
	shards uint32
	mu     sync.Mutex // of one advance at a time
	now    atomic.Int64
}

// Open returns the test clock of a ledger; ledger.ErrRealClock when it has none.
func Open(ctx context.Context, js jetstream.JetStream) (*Clock, error) {
	g, err := ledger.ReadGeometry(ctx, js)
	if err != nil {
		return nil, err
	}
	at, err := ledger.ReadTestClock(ctx, js)
	if err != nil {
		return nil, err
	}
	c := &Clock{js: js, shards: g.Shards}
	c.now.Store(int64(at))
	return c, nil
}

// Now is where the clock stands: what the last advance that is in the ledger says.
func (c *Clock) Now() usage.Micros { return usage.Micros(c.now.Load()) }

// Advance takes every shard's time forward. When it returns nil the ledger holds
// the entries, and entries after them have the new time. To advance to where the
// clock stands changes nothing; back it does not go. After another error some
// shards may be ahead: advancing again brings the others there.
func (c *Clock) Advance(ctx context.Context, to usage.Micros) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch now := c.Now(); {
	case to < now:
		return fmt.Errorf("the test clock stands at %s: it does not go back to %s", now.Time().Format(time.RFC3339Nano), to.Time().Format(time.RFC3339Nano))
	case to == now:
		return nil
	}
	id := ksuid.New().String()
	acks := make([]jetstream.PubAckFuture, 0, c.shards)
	for shard := range c.shards {
		m, err := ledger.ControlMessage(shard, &tollkeeperv1.ControlEntry{
			Id: id, Author: "test clock", CreatedAtUnixMicros: time.Now().UnixMicro(),
			Body: &tollkeeperv1.ControlEntry_ClockAdvance{ClockAdvance: &tollkeeperv1.ClockAdvance{ToUnixMicros: int64(to)}},
		})
		if err != nil {
			return err
		}
		m.Header.Set(nats.MsgIdHdr, id+"."+strconv.FormatUint(uint64(shard), 10))
		ack, err := c.js.PublishMsgAsync(m)
		if err != nil {
			return fmt.Errorf("advance the clock of shard %d: %w", shard, err)
		}
		acks = append(acks, ack)
	}
	for shard, ack := range acks {
		select {
		case <-ack.Ok():
		case err := <-ack.Err():
			return fmt.Errorf("advance the clock of shard %d: %w", shard, err)
		case <-ctx.Done():
			return fmt.Errorf("advance the clock of shard %d: %w", shard, ctx.Err())
		}
	}
	c.now.Store(int64(to))
	return nil
}
