package console

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/counters"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/console/internal/limits"
	"github.com/tollkeeper/tollkeeper/services/console/internal/live"
	"github.com/tollkeeper/tollkeeper/services/console/internal/tail"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
)

const (
	liveEvery    = time.Second
	liveTop      = 10
	liveRefusals = 20
	liveAlerts   = 8
	liveLetters  = 5
	// liveRecent is how many seconds each message carries: calls arrive a little
	// after their second, and a client may miss a message.
	liveRecent = 10
	// topEvery is how often the accounts with the most calls ever are asked for
	// while too few are busy.
	topEvery = 10 * time.Second
	// writeTimeout of one message to a client.
	writeTimeout = 10 * time.Second
)

// topAccount is a line of the list of accounts.
type topAccount struct {
	ID     string `json:"id"`
	Parent string `json:"parent,omitempty"`
	Plan   string `json:"plan,omitempty"`
	// Recent calls: a minute halves their weight.
	Admitted int64  `json:"recent_admitted"`
	Refused  int64  `json:"recent_refused"`
	Status   string `json:"status"`
	// Verdict is the severest along its path, Limits are all of them.
	Verdict string     `json:"verdict"`
	Limits  []topLimit `json:"limits"`
	// Freshness of its limits: not current without an answer of its shard.
	Freshness freshness.Freshness `json:"freshness"`
}

// topLimit is a limit on an account's path.
type topLimit struct {
	// Account that carries it: the account itself or one above it.
	Account string `json:"account"`
	ledger.LimitUsage
}

type liveLag struct {
	// TailEntries that this view has not read yet, and SkippedEntries that it
	// never will: they are counted, only not shown.
	TailEntries    uint64  `json:"tail_entries"`
	SkippedEntries uint64  `json:"skipped_entries"`
	CountedSeconds float64 `json:"counted_seconds"`
	// CountedKnown: every shard's owner was heard of late.
	CountedKnown   bool   `json:"counted_known"`
	HistoryEntries uint64 `json:"history_entries"`
	HistoryKnown   bool   `json:"history_known"`
}

type liveDead struct {
	Total   uint64             `json:"total"`
	Reasons []reasonCount      `json:"by_reason"`
	Newest  []views.DeadLetter `json:"newest"`
}

type reasonCount = views.ReasonCount

type liveDecisions struct {
	Deny int `json:"deny"`
	Warn int `json:"warn"`
	All  int `json:"all"`
}

// liveMessage is one message of /v1/live.
type liveMessage struct {
	At       usage.Micros `json:"at_unix_micros"`
	Sequence uint64       `json:"ledger_sequence"`
	// Reset says that Seconds are all that there are, not the newest only.
	Reset     bool           `json:"reset"`
	Seconds   []live.Second  `json:"seconds"`
	Top       []topAccount   `json:"top"`
	Refusals  []live.Refusal `json:"refusals"`
	Alerts    []usage.Alert  `json:"alerts"`
	Dead      liveDead       `json:"dead_letters"`
	Decisions liveDecisions  `json:"decisions"`
	Lag       liveLag        `json:"lag"`
	Health    []health.Part  `json:"health"`
	State     string         `json:"state"`
	// Freshness by what it is of: calls (with refusals), decisions, counters, alerts,
	// dead_letters, health.
	Freshness map[string]freshness.Freshness `json:"freshness"`
}

// produce makes a message a second while somebody listens.
func (c *console) produce(ctx context.Context) error {
	tick := time.NewTicker(liveEvery)
	defer tick.Stop()
	var p producer
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-c.state.hub.Wake():
		}
		n := c.state.hub.Size()
		c.metrics.Streams.Set(float64(n))
		if n == 0 {
			continue
		}
		recent, reset, err := p.message(ctx, c)
		if err != nil {
			c.log.Error().Err(err).Msg("the live view can't be made")
			continue
		}
		c.state.hub.Publish(recent, reset)
	}
}

// producer remembers what is not asked for every second.
type producer struct {
	top   []string          // the accounts with the most calls ever
	known map[string]uint32 // their shards
	topAt time.Time
}

func (p *producer) message(ctx context.Context, c *console) (recent, reset []byte, err error) {
	now := time.Now()
	at := c.now()
	v := c.tail.View(at, live.Window, liveTop, liveRefusals)
	h := c.health(now)
	m := liveMessage{
		At: at, Sequence: v.Sequence, Reset: true, Seconds: v.Seconds, Refusals: v.Refusals,
		Alerts: c.state.alerts.Newest(liveAlerts), Health: h.Parts, State: h.State,
		Lag: liveLag{TailEntries: v.Pending, SkippedEntries: v.Skipped, HistoryEntries: h.Historian.Behind, HistoryKnown: h.Historian.Known},
	}
	m.Lag.CountedKnown = c.nc.IsConnected()
	counted := []freshness.Freshness{freshness.Now(now)}
	for i := range h.Shards {
		s, silent := &h.Shards[i], ""
		m.Lag.CountedSeconds = max(m.Lag.CountedSeconds, s.LagSeconds)
		if s.State == health.StateDown {
			m.Lag.CountedKnown, silent = false, fmt.Sprintf("the owner of shard %d is silent", s.Shard)
		}
		counted = append(counted, s.Fresh(silent, now))
	}
	m.Freshness = map[string]freshness.Freshness{
		"calls": c.fresh(&c.state.calls, now), "decisions": c.fresh(&c.state.decisions, now), "counters": freshness.Worst(counted...),
		"alerts": c.fresh(&c.state.alertsReader, now), "dead_letters": c.fresh(&c.state.deadReader, now), "health": h.Freshness,
	}
	m.Decisions.All, m.Decisions.Deny, m.Decisions.Warn = c.state.decisions.Counts(at)
	m.Dead.Newest, _, m.Dead.Reasons = c.state.dead.Newest(liveLetters)
	c.state.mu.Lock()
	m.Dead.Total = c.state.watch.deadTotal
	c.state.mu.Unlock()
	m.Top = p.accounts(ctx, c, v, at, h.Shards)
	if reset, err = json.Marshal(m); err != nil {
		return nil, nil, err
	}
	m.Reset, m.Seconds = false, m.Seconds[max(0, len(m.Seconds)-liveRecent):]
	recent, err = json.Marshal(m)
	return recent, reset, err
}

// accounts returns the busiest accounts with those above them, and how their
// limits stand.
func (p *producer) accounts(ctx context.Context, c *console, v tail.View, at usage.Micros, shards []health.Shard) []topAccount {
	ctx, cancel := context.WithTimeout(ctx, 800*time.Millisecond)
	defer cancel()
	var order []string
	shard, busy := map[string]uint32{}, map[string]live.Busy{}
	add := func(id string, s uint32) {
		if _, there := shard[id]; !there && len(order) < 2*liveTop {
			shard[id] = s
			order = append(order, id)
		}
	}
	b, _, err := c.book(ctx)
	for _, a := range v.Busiest {
		busy[a.Account] = a
		add(a.Account, a.Shard)
	}
	if err == nil {
		for _, a := range v.Busiest {
			for _, id := range b.index.Path(a.Account) {
				add(id, a.Shard)
				if id != a.Account { // what is above sums those below
					sum := busy[id]
					sum.Admitted += a.Admitted
					sum.Refused += a.Refused
					busy[id] = sum
				}
			}
		}
	}
	if len(order) < liveTop {
		if time.Since(p.topAt) > topEvery {
			p.askTop(ctx, c)
		}
		for _, id := range p.top {
			add(id, p.known[id])
		}
	}
	paths := map[string][]string{}
	byShard, asked := map[uint32][]string{}, map[string]bool{}
	for _, id := range order {
		paths[id] = []string{id}
		if b != nil {
			if path := b.index.Path(id); len(path) > 0 {
				paths[id] = path
			}
		}
		for _, step := range paths[id] { // a path has one shard
			if !asked[step] {
				asked[step] = true
				byShard[shard[id]] = append(byShard[shard[id]], step)
			}
		}
	}
	var mu sync.Mutex
	found, failed := map[string]ledger.AccountUsage{}, map[uint32]string{}
	group := errgroup.Group{}
	group.SetLimit(counters.Parallel)
	for s, ids := range byShard {
		group.Go(func() error {
			reply, err := c.counters.Shard(ctx, s, ledger.UsageRequest{Accounts: ids})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed[s] = err.Error()
				return nil
			}
			for i := range reply.Accounts {
				c.settle(&reply.Accounts[i], at)
				found[reply.Accounts[i].ID] = reply.Accounts[i]
			}
			return nil
		})
	}
	_ = group.Wait() // its functions return nil
	now := time.Now()
	out := make([]topAccount, 0, len(order))
	for _, id := range order {
		u := found[id]
		t := topAccount{ID: id, Parent: u.Parent, Plan: u.Plan, Admitted: busy[id].Admitted, Refused: busy[id].Refused, Status: statusUnnamed, Limits: []topLimit{}}
		worst := usage.Allow
		for _, step := range paths[id] {
			a, counted := found[step]
			for _, l := range a.Limits {
				t.Limits = append(t.Limits, topLimit{step, l})
			}
			if counted {
				worst = max(worst, limits.Worst(a.Limits))
			} else {
				worst = max(worst, c.state.decisions.Worst(step, at))
			}
		}
		if b != nil {
			l := c.line(b, id, at)
			t.Status, t.Parent, t.Plan = l.Status, l.Parent, l.Plan
		} else if u.Closed {
			t.Status = statusRemoved
		}
		if t.Status == statusRemoved {
			worst = usage.Deny
		}
		t.Verdict = worst.String()
		t.Freshness = freshness.Now(now)
		if int(shard[id]) < len(shards) {
			t.Freshness = shards[shard[id]].Fresh(failed[shard[id]], now)
		}
		out = append(out, t)
	}
	slices.SortStableFunc(out, func(x, y topAccount) int {
		return cmp.Compare(y.Admitted+y.Refused, x.Admitted+x.Refused)
	})
	return out[:min(len(out), liveTop)]
}

// askTop asks all shards for the accounts with the most calls ever.
func (p *producer) askTop(ctx context.Context, c *console) {
	p.topAt = time.Now()
	u := c.counters.All(ctx, ledger.UsageRequest{Top: liveTop})
	p.top, p.known = nil, map[string]uint32{}
	for i, a := range u.Accounts {
		if i == liveTop {
			break
		}
		p.top = append(p.top, a.ID)
		p.known[a.ID] = a.Shard
	}
}

// handleLive streams messages (server-sent events) until the client goes.
func (c *console) handleLive(w http.ResponseWriter, r *http.Request) {
	ch, ok := c.state.hub.Join(c.o.MaxStreams)
	if !ok {
		front.Problem{Status: http.StatusServiceUnavailable, Code: front.CodeTooMany, Detail: fmt.Sprintf("%d clients follow already: close one, or raise the bound", c.o.MaxStreams)}.Write(w)
		return
	}
	defer c.state.hub.Leave(ch)
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	var had uint64
	for {
		select {
		case <-r.Context().Done():
			return
		case <-c.done.Done():
			return
		case <-ch:
		}
		data, n := c.state.hub.Take(had)
		had = n
		// Not every writer can have a deadline; the connection's end ends
		// it as well.
		_ = control.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := fmt.Fprintf(w, "id: %d\nevent: live\ndata: %s\n\n", n, data); err != nil {
			return
		}
		if err := control.Flush(); err != nil {
			return
		}
	}
}
