// Package watch looks at a shard all the time, to tell for how long nobody counted.
package watch

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// Shard notes when a shard's owner was seen to have counted more, for how long
// counting stood still.
type Shard struct {
	nc    *nats.Conn
	shard uint32

	mu      sync.Mutex
	at      []time.Time
	lastSeq uint64
}

// Start asks over a connection of its own until ctx is done; done is closed then.
func Start(ctx context.Context, o natsconn.Options, shard uint32) (x *Shard, done <-chan struct{}, err error) {
	nc, err := natsconn.Connect(ctx, o)
	if err != nil {
		return nil, nil, err
	}
	x = &Shard{nc: nc, shard: shard}
	over := make(chan struct{})
	go func() {
		defer close(over)
		defer nc.Close()
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				x.ask(ctx)
			}
		}
	}()
	return x, over, nil
}

// every is how often it asks.
const every = 10 * time.Millisecond

func (x *Shard) ask(ctx context.Context) {
	ask, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	msg, err := x.nc.RequestWithContext(ask, ledger.UsageSubject(x.shard), []byte(`{"accounts":["-"]}`))
	if err != nil {
		return // nobody owns the shard now, or NATS is away
	}
	var reply ledger.UsageReply
	if json.Unmarshal(msg.Data, &reply) != nil || reply.Sequence == 0 {
		return
	}
	now := time.Now()
	x.mu.Lock()
	defer x.mu.Unlock()
	if reply.Sequence > x.lastSeq {
		x.lastSeq = reply.Sequence
		x.at = append(x.at, now)
	}
}

// Silence is the longest time without progress that ended after a moment, and
// lasts still.
func (x *Shard) Silence(after time.Time) time.Duration {
	x.mu.Lock()
	defer x.mu.Unlock()
	longest := time.Duration(0)
	if n := len(x.at); n > 0 {
		longest = time.Since(x.at[n-1])
	}
	for i := len(x.at) - 1; i > 0 && x.at[i].After(after); i-- {
		longest = max(longest, x.at[i].Sub(x.at[i-1]))
	}
	return longest
}

// Counted waits until the shard has counted an entry that came after a moment.
func (x *Shard) Counted(ctx context.Context, after time.Time) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		x.mu.Lock()
		n := len(x.at)
		ok := n > 0 && x.at[n-1].After(after)
		x.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nothing is counted: %w", ctx.Err())
		case <-tick.C:
		}
	}
}
