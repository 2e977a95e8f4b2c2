package console

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sort"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// state is what the console knows of the others.
type state struct {
	decisions views.Decisions
	beacons   views.Beacons
	alerts    views.Alerts
	dead      views.DeadLetters

	mu     sync.Mutex
	watch  watched
	book   *book
	bookAt time.Time
	lag    health.Lag

	hub hub
}

func newState() *state {
	return &state{hub: hub{wake: make(chan struct{}, 1)}}
}

// watched is what is asked for regularly.
type watched struct {
	history    error // nil: ClickHouse answered
	historySet bool
	position   uint64    // of history in the ledger
	positionAt time.Time // when it last moved, or had nothing to do
	ledgerErr  error
	deadTotal  uint64
	peers      map[string]health.Peer
	audit      health.Audit
}

// book is the applied plans, indexed.
type book struct {
	applied plans.Applied
	index   plans.Index
	ids     []string // accounts in order
}

// bookAge is how old the plans may be before their revision is asked for.
const bookAge = time.Second

// book returns the plans that hold.
func (c *console) book(ctx context.Context) (*book, error) {
	s := c.state
	s.mu.Lock()
	b, at := s.book, s.bookAt
	s.mu.Unlock()
	if b != nil && time.Since(at) < bookAge {
		return b, nil
	}
	rev, err := c.applier.Revision(ctx)
	if err != nil {
		return nil, err
	}
	if b == nil || b.applied.Revision != rev {
		applied, err := c.applier.Current(ctx)
		if err != nil {
			return nil, err
		}
		b = &book{applied: applied, index: plans.NewIndex(applied.Document)}
		for i := range applied.Document.Accounts {
			b.ids = append(b.ids, applied.Document.Accounts[i].ID)
		}
		sort.Strings(b.ids)
	}
	s.mu.Lock()
	s.book, s.bookAt = b, time.Now()
	s.mu.Unlock()
	return b, nil
}

// correctable is the plans that hold, for corrections.
func (c *console) correctable(ctx context.Context) (*plans.Applied, plans.Index, error) {
	b, err := c.book(ctx)
	if err != nil {
		return nil, plans.Index{}, err
	}
	return &b.applied, b.index, nil
}

const (
	watchEvery   = 2 * time.Second
	watchTimeout = 2 * time.Second
)

// watchParts asks regularly for what nobody sends.
func (c *console) watchParts(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	client := &http.Client{Timeout: watchTimeout}
	defer client.CloseIdleConnections()
	for {
		c.watchOnce(ctx, client)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (c *console) watchOnce(ctx context.Context, client *http.Client) {
	ask, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	w := watched{peers: map[string]health.Peer{}}
	_, w.ledgerErr = c.js.Stream(ask, ledger.Stream)
	if s, err := c.js.Stream(ask, ledger.DeadLetterStream); err == nil {
		w.deadTotal = s.CachedInfo().State.Msgs
	}
	if h := c.o.History; h != nil {
		w.historySet = true
		if w.history = h.Ping(ask); w.history == nil {
			w.position, w.history = h.Position(ask)
		}
	}
	if a, err := c.audit.Read(ask, time.Now()); err == nil {
		w.audit = health.Audit{At: a.At, Open: a.Open}
	}
	for _, p := range c.o.Peers {
		w.peers[p.Name] = askPeer(ask, client, p.URL)
	}
	if ctx.Err() != nil {
		return
	}
	calls := c.tail.View(0, 0, 0, 0).Calls
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	old := c.state.watch
	w.positionAt = old.positionAt
	if w.history == nil && (w.position != old.position || w.position >= calls || w.positionAt.IsZero()) {
		w.positionAt = time.Now()
	}
	c.state.watch = w
}

func askPeer(ctx context.Context, client *http.Client, url string) health.Peer {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return health.Peer{Detail: "its address can't be used"}
	}
	res, err := client.Do(req)
	if err != nil {
		return health.Peer{Detail: "it does not answer"}
	}
	defer func() { _ = res.Body.Close() }() // read or given up
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
	if res.StatusCode != http.StatusOK {
		return health.Peer{Detail: fmt.Sprintf("it is not ready (%s)", res.Status)}
	}
	return health.Peer{OK: true, Detail: "ready"}
}

// health judges how everything is.
func (c *console) health(now time.Time) health.Health {
	v := c.tail.View(micros(now), 0, 0, 0)
	c.state.mu.Lock()
	w := c.state.watch
	c.state.mu.Unlock()
	return health.Judge(health.Seen{
		Now: now, Shards: c.shards, LastEntries: v.Shards, Beacons: c.state.beacons.All(now), Gateways: v.Gateways,
		Connected: c.nc.IsConnected(), LedgerErr: w.ledgerErr, TailErr: v.Err,
		HasHistory: w.historySet, HistoryErr: w.history, Position: w.position, PositionAt: w.positionAt, LastCalls: v.Calls,
		Peers: w.peers, Audit: w.audit, Components: c.o.Readiness.Status().Components,
	}, &c.state.lag)
}
