package console

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/console/internal/hub"
	"github.com/tollkeeper/tollkeeper/services/console/internal/ledgerclock"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// state is what the console knows of the others.
type state struct {
	decisions views.Decisions
	beacons   views.Beacons
	alerts    views.Alerts
	dead      views.DeadLetters

	// clock is the ledger's.
	clock ledgerclock.Clock
	// Readers of the streams, and up to where those of two are.
	calls, alertsReader, deadReader freshness.Reader
	alertsAt, deadAt                atomic.Uint64

	mu     sync.Mutex
	watch  watched
	book   *book
	bookAt time.Time // when it was last known to be what holds
	tryAt  time.Time // when that was last asked for
	lag    health.Lag

	hub *hub.Hub
}

func newState() *state {
	return &state{hub: hub.New()}
}

// watched is what is asked for regularly.
type watched struct {
	at         time.Time
	natsAt     time.Time // when the ledger's stream answered last
	history    error     // nil: ClickHouse answered
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

const (
	// bookAge is how old the plans may be before their revision is asked for.
	bookAge = time.Second
	// bookPatience is how long an answer waits for them when older ones are there.
	bookPatience = time.Second
)

// book returns the plans that hold. While they can't be read it returns those that were
// read last, with their age; with none of these it fails.
func (c *console) book(ctx context.Context) (*book, freshness.Freshness, error) {
	s := c.state
	now := time.Now()
	s.mu.Lock()
	b, at, tried := s.book, s.bookAt, s.tryAt
	if b != nil && now.Sub(tried) >= bookAge {
		s.tryAt = now // others get what is there meanwhile
	}
	s.mu.Unlock()
	switch {
	case b != nil && now.Sub(at) < bookAge:
		return b, freshness.Now(now), nil
	case b != nil && now.Sub(tried) < bookAge:
		if now.Sub(at) < bookAge+bookPatience+watchEvery {
			return b, freshness.Now(now), nil // it is being asked for
		}
		return b, freshness.Since(at, now, "the plans can't be read"), nil
	case b != nil:
		short, cancel := context.WithTimeout(ctx, bookPatience)
		defer cancel()
		fresh, err := c.readBook(short, b)
		if err != nil {
			return b, freshness.Since(at, now, "the plans can't be read: "+health.FirstSentence(err.Error())), nil
		}
		return fresh, freshness.Now(now), nil
	}
	b, err := c.readBook(ctx, nil)
	return b, freshness.Now(now), err
}

// readBook reads the plans, unless old has their revision.
func (c *console) readBook(ctx context.Context, old *book) (*book, error) {
	b := old
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
	s := c.state
	s.mu.Lock()
	s.book, s.bookAt, s.tryAt = b, time.Now(), time.Now()
	s.mu.Unlock()
	return b, nil
}

// appliedNow is the plans that hold, and how current that is.
func (c *console) appliedNow(ctx context.Context) (plans.Applied, freshness.Freshness, error) {
	b, f, err := c.book(ctx)
	if err != nil {
		return plans.Applied{}, f, err
	}
	return b.applied, f, nil
}

// plansChanged lets the next answer read them.
func (c *console) plansChanged() {
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	c.state.bookAt, c.state.tryAt = time.Time{}, time.Time{}
}

// correctable is the plans that hold, for corrections.
func (c *console) correctable(ctx context.Context) (*plans.Applied, plans.Index, error) {
	b, err := c.readBook(ctx, nil) // not one of before: usage would be corrected by it
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
	w.ledgerErr = c.look(ask, ledger.Stream, &c.state.calls, func() uint64 { return c.tail.View(0, 0, 0, 0).Sequence }, nil)
	_ = c.look(ask, ledger.AlertsStream, &c.state.alertsReader, c.state.alertsAt.Load, nil)          // its reader knows
	_ = c.look(ask, ledger.DeadLetterStream, &c.state.deadReader, c.state.deadAt.Load, &w.deadTotal) // likewise
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
	w.at, w.natsAt = time.Now(), old.natsAt
	if w.ledgerErr == nil {
		w.natsAt = w.at
	}
	if w.deadTotal == 0 && w.ledgerErr != nil {
		w.deadTotal = old.deadTotal // what is not known now is told with its age
	}
	w.positionAt = old.positionAt
	if w.history == nil && (w.position != old.position || w.position >= calls || w.positionAt.IsZero()) {
		w.positionAt = time.Now()
	}
	c.state.watch = w
}

// look asks for a stream's newest entry and holds its reader against it.
func (c *console) look(ctx context.Context, stream string, r *freshness.Reader, position func() uint64, messages *uint64) error {
	asked := time.Now()
	s, err := c.js.Stream(ctx, stream)
	if err != nil {
		r.Look(0, 0, fmt.Errorf("the stream %s does not answer", stream), time.Now())
		return err
	}
	info := s.CachedInfo()
	c.state.clock.Note(asked, time.Now(), info.TimeStamp)
	if messages != nil {
		*messages = info.State.Msgs
	}
	r.Look(info.State.LastSeq, position(), nil, time.Now())
	return nil
}

// now is the ledger's time, by which periods end.
func (c *console) now() usage.Micros { return usage.At(c.state.clock.At(time.Now())) }

// fresh is how current a copy is that NATS feeds.
func (c *console) fresh(f interface {
	At(time.Time) freshness.Freshness
}, now time.Time) freshness.Freshness {
	if c.nc.IsConnected() {
		return f.At(now)
	}
	c.state.mu.Lock()
	at := c.state.watch.natsAt
	c.state.mu.Unlock()
	return freshness.Worst(f.At(now), freshness.Since(at, now, "the connection to NATS is lost"))
}

// historyAway says why ClickHouse does not answer; empty: it does, as far as is known.
func (c *console) historyAway() string {
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	if w := &c.state.watch; w.historySet && w.history != nil {
		return health.FirstSentence(w.history.Error())
	}
	return ""
}

// historyFreshness is how current an answer out of ClickHouse is that has just come.
func (c *console) historyFreshness(now time.Time) freshness.Freshness {
	ledgerRead := c.fresh(&c.state.calls, now)
	calls := c.tail.View(0, 0, 0, 0).Calls
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	w := &c.state.watch
	switch {
	case w.history != nil:
		// It answers again, or about something else: how far it is was asked in vain.
		return freshness.Since(w.positionAt, now, "how far the history is can't be found out: "+health.FirstSentence(w.history.Error()))
	case !ledgerRead.Current:
		ledgerRead.Reason = "how far the history is behind the ledger is not known: " + ledgerRead.Reason
		return ledgerRead
	}
	return freshness.Behind(w.position, calls, w.positionAt, now)
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
	v := c.tail.View(usage.At(now), 0, 0, 0)
	c.state.mu.Lock()
	w := c.state.watch
	c.state.mu.Unlock()
	return health.Judge(health.Seen{
		Now: now, LookedAt: w.at, Shards: c.shards, LastEntries: v.Shards, Beacons: c.state.beacons.All(now), Gateways: v.Gateways,
		Connected: c.nc.IsConnected(), LedgerErr: w.ledgerErr, TailErr: v.Err,
		HasHistory: w.historySet, HistoryErr: w.history, Position: w.position, PositionAt: w.positionAt, LastCalls: v.Calls,
		Peers: w.peers, Audit: w.audit, Components: c.o.Readiness.Status().Components,
	}, &c.state.lag)
}
