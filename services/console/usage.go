package console

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const (
	askParallel = 16
	askTimeout  = 2 * time.Second
)

// askShard asks the owner of a shard for counters.
func (c *console) askShard(ctx context.Context, shard uint32, q ledger.UsageRequest) (ledger.UsageReply, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	data, err := json.Marshal(q)
	if err != nil {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: %w", shard, err)
	}
	msg, err := c.nc.RequestWithContext(ctx, ledger.UsageSubject(shard), data)
	if errors.Is(err, nats.ErrNoResponders) {
		return ledger.UsageReply{}, fmt.Errorf("nobody owns shard %d: is an aggregator running?", shard)
	}
	if err != nil {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: %w", shard, err)
	}
	// As NATS's own services write their errors.
	if why := msg.Header.Get("Nats-Service-Error"); why != "" {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: %s", shard, why)
	}
	var reply ledger.UsageReply
	if err := json.Unmarshal(msg.Data, &reply); err != nil {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: the answer is not JSON: %w", shard, err)
	}
	return reply, nil
}

// shardAnswer is how a shard answered.
type shardAnswer struct {
	Shard       uint32       `json:"shard"`
	OK          bool         `json:"ok"`
	Error       string       `json:"error,omitempty"`
	Epoch       uint64       `json:"epoch"`
	Sequence    uint64       `json:"ledger_sequence"`
	StreamTime  usage.Micros `json:"stream_time_unix_micros"`
	PlanVersion string       `json:"plan_version"`
	StateHash   string       `json:"state_hash"`
	Accounts    int          `json:"account_count"`
}

// accountAnswer is an account of a shard.
type accountAnswer struct {
	Shard uint32 `json:"shard"`
	ledger.AccountUsage
}

// usageAnswer is the counters of all shards.
type usageAnswer struct {
	// Complete says that every shard answered.
	Complete bool            `json:"complete"`
	Total    ledger.Totals   `json:"total"`
	Accounts []accountAnswer `json:"accounts"`
	Count    int             `json:"account_count"`
	Shards   []shardAnswer   `json:"shards"`
}

// askAll asks every shard, and sums.
func (c *console) askAll(ctx context.Context, q ledger.UsageRequest) usageAnswer {
	return c.askShards(ctx, func(uint32) (ledger.UsageRequest, bool) { return q, true })
}

// askShards asks each shard what ask says.
func (c *console) askShards(ctx context.Context, ask func(shard uint32) (ledger.UsageRequest, bool)) usageAnswer {
	out := usageAnswer{Complete: true, Shards: make([]shardAnswer, c.shards), Accounts: []accountAnswer{}, Total: ledger.Totals{Meters: map[usage.Meter]int64{}}}
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(askParallel)
	for s := range c.shards {
		q, wanted := ask(s)
		if !wanted {
			q = ledger.UsageRequest{} // no accounts, only the totals
		}
		group.Go(func() error {
			reply, err := c.askShard(ctx, s, q)
			mu.Lock()
			defer mu.Unlock()
			a := shardAnswer{Shard: s, OK: err == nil}
			if err != nil {
				a.Error = err.Error()
				out.Complete = false
			} else {
				a.Epoch, a.Sequence, a.StreamTime, a.PlanVersion, a.StateHash, a.Accounts = reply.Epoch, reply.Sequence, reply.StreamTime, reply.PlanVersion, reply.StateHash, reply.AccountCount
				out.Count += reply.AccountCount
				out.Total.Admitted += reply.Total.Admitted
				out.Total.Refused += reply.Total.Refused
				for m, v := range reply.Total.Meters {
					out.Total.Meters[m] += v
				}
				for _, u := range reply.Accounts {
					out.Accounts = append(out.Accounts, accountAnswer{s, tidy(u)})
				}
			}
			out.Shards[s] = a
			return nil
		})
	}
	_ = group.Wait() // its functions return nil
	slices.SortFunc(out.Accounts, func(x, y accountAnswer) int {
		return cmp.Or(cmp.Compare(y.Totals.Admitted, x.Totals.Admitted), cmp.Compare(x.ID, y.ID))
	})
	return out
}

// tidy gives empty lists where there may be none.
func tidy(u ledger.AccountUsage) ledger.AccountUsage {
	if u.Limits == nil {
		u.Limits = []ledger.LimitUsage{}
	}
	for _, t := range []*ledger.Totals{&u.Own, &u.Totals} {
		if t.Meters == nil {
			t.Meters = map[usage.Meter]int64{}
		}
	}
	return u
}
