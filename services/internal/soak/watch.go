package soak

import (
	"context"
	"encoding/json"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// watch notes when a shard's owner was seen to have counted more, for how long
// counting stood still.
type watch struct {
	nc    *nats.Conn
	shard uint32
	every time.Duration

	mu      sync.Mutex
	at      []time.Time
	epochs  []epochSeen
	lastSeq uint64
}

type epochSeen struct {
	epoch uint64
	at    time.Time
}

// startWatch asks over a connection of its own until ctx is done; done is closed
// then.
func (w *world) startWatch(ctx context.Context, shard uint32) (*watch, <-chan struct{}, error) {
	nc, err := natsconn.Connect(ctx, w.fleet.NATSOptions())
	if err != nil {
		return nil, nil, err
	}
	x := &watch{nc: nc, shard: shard, every: 10 * time.Millisecond}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer nc.Close()
		for pause(ctx, x.every) == nil {
			x.ask(ctx)
		}
	}()
	return x, done, nil
}

func (x *watch) ask(ctx context.Context) {
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
	if n := len(x.epochs); n == 0 || x.epochs[n-1].epoch < reply.Epoch {
		x.epochs = append(x.epochs, epochSeen{reply.Epoch, now})
	}
	if reply.Sequence > x.lastSeq {
		x.lastSeq = reply.Sequence
		x.at = append(x.at, now)
	}
}

// silence is the longest time without progress that ended after a moment, and
// lasts still.
func (x *watch) silence(after time.Time) time.Duration {
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

// epoch is the newest owner's, and when it was first heard.
func (x *watch) epoch() (uint64, time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if n := len(x.epochs); n > 0 {
		return x.epochs[n-1].epoch, x.epochs[n-1].at
	}
	return 0, time.Time{}
}

// shardOf is an account's shard.
func (w *world) shardOf(account int) uint32 {
	return ledger.ShardOf(w.accounts[account].ID, w.shards)
}

// counted waits until the shard has counted an entry that came after a moment.
func (x *watch) counted(ctx context.Context, after time.Time) error {
	for {
		x.mu.Lock()
		n := len(x.at)
		ok := n > 0 && x.at[n-1].After(after)
		x.mu.Unlock()
		if ok {
			return nil
		}
		if err := pause(ctx, x.every); err != nil {
			return err
		}
	}
}
