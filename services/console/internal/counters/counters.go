// Package counters asks the owners of shards for what they have counted.
package counters

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
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
)

// Parallel bounds the questions in flight.
const Parallel = 16

// timeout of one question.
const timeout = 2 * time.Second

// Client asks. Safe for concurrent use.
type Client struct {
	NC *nats.Conn
	// Shards of the ledger.
	Shards uint32
}

// Shard asks the owner of a shard for counters.
func (c *Client) Shard(ctx context.Context, shard uint32, q ledger.UsageRequest) (ledger.UsageReply, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	data, err := json.Marshal(q)
	if err != nil {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: %w", shard, err)
	}
	msg, err := c.NC.RequestWithContext(ctx, ledger.UsageSubject(shard), data)
	if errors.Is(err, nats.ErrNoResponders) {
		return ledger.UsageReply{}, fmt.Errorf("nobody owns shard %d: is an aggregator running?", shard)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return ledger.UsageReply{}, fmt.Errorf("shard %d has not answered within %s: ask again: %w", shard, timeout, err)
	}
	if err != nil {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: %w", shard, err)
	}
	// As NATS's own services write their errors.
	if why := msg.Header.Get(ledger.ErrorHeader); why != "" {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: %s", shard, why)
	}
	var reply ledger.UsageReply
	if err := json.Unmarshal(msg.Data, &reply); err != nil {
		return ledger.UsageReply{}, fmt.Errorf("ask shard %d: the answer is not JSON: %w", shard, err)
	}
	if to := msg.Header.Get(ledger.CountingHeader); to != "" {
		return ledger.UsageReply{}, fmt.Errorf("shard %d is still being counted after its aggregator changed, at entry %d of %s: ask again", shard, reply.Sequence, to)
	}
	return reply, nil
}

// ShardAnswer is how a shard answered.
type ShardAnswer struct {
	Shard       uint32       `json:"shard"`
	OK          bool         `json:"ok"`
	Error       string       `json:"error,omitempty"`
	Epoch       uint64       `json:"epoch"`
	Sequence    uint64       `json:"ledger_sequence"`
	StreamTime  usage.Micros `json:"stream_time_unix_micros"`
	PlanVersion string       `json:"plan_version"`
	StateHash   string       `json:"state_hash"`
	Accounts    int          `json:"account_count"`
	// Freshness of its counters.
	Freshness freshness.Freshness `json:"freshness"`
}

// Account is an account of a shard.
type Account struct {
	Shard uint32 `json:"shard"`
	ledger.AccountUsage
}

// Answer is the counters of all shards.
type Answer struct {
	// Complete says that every shard answered.
	Complete bool          `json:"complete"`
	Total    ledger.Totals `json:"total"`
	Accounts []Account     `json:"accounts"`
	Count    int           `json:"account_count"`
	Shards   []ShardAnswer `json:"shards"`
	// Freshness of the whole: that of its oldest shard.
	Freshness freshness.Freshness `json:"freshness"`
}

// All asks every shard, and sums.
func (c *Client) All(ctx context.Context, q ledger.UsageRequest) Answer {
	return c.Each(ctx, func(uint32) (ledger.UsageRequest, bool) { return q, true })
}

// Each asks each shard what ask says.
func (c *Client) Each(ctx context.Context, ask func(shard uint32) (ledger.UsageRequest, bool)) Answer {
	out := Answer{Complete: true, Shards: make([]ShardAnswer, c.Shards), Accounts: []Account{}, Total: ledger.Totals{Meters: map[usage.Meter]int64{}}}
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(Parallel)
	for s := range c.Shards {
		q, wanted := ask(s)
		if !wanted {
			q = ledger.UsageRequest{} // no accounts, only the totals
		}
		group.Go(func() error {
			reply, err := c.Shard(ctx, s, q)
			mu.Lock()
			defer mu.Unlock()
			a := ShardAnswer{Shard: s, OK: err == nil}
			if err != nil {
				a.Error = err.Error()
				out.Complete = false
			} else {
				a.Epoch, a.Sequence, a.StreamTime, a.PlanVersion, a.StateHash, a.Accounts = reply.Epoch, reply.Sequence, reply.StreamTime, reply.PlanVersion, reply.StateHash, reply.AccountCount
				out.Count += reply.AccountCount
				out.Total.Admitted += reply.Total.Admitted
				out.Total.Refused += reply.Total.Refused
				out.Total.Hash += reply.Total.Hash // modulo 2^64
				for m, v := range reply.Total.Meters {
					out.Total.Meters[m] += v
				}
				for _, u := range reply.Accounts {
					out.Accounts = append(out.Accounts, Account{s, Tidy(u)})
				}
			}
			out.Shards[s] = a
			return nil
		})
	}
	_ = group.Wait() // its functions return nil
	slices.SortFunc(out.Accounts, func(x, y Account) int {
		return cmp.Or(cmp.Compare(y.Totals.Admitted, x.Totals.Admitted), cmp.Compare(x.ID, y.ID))
	})
	return out
}

// Tidy gives empty lists where there may be none.
func Tidy(u ledger.AccountUsage) ledger.AccountUsage {
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
