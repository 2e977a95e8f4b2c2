package console

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
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
	behind map[uint32]uncounted // by shard

	hub hub
}

func newState() *state {
	return &state{behind: map[uint32]uncounted{}, hub: hub{wake: make(chan struct{}, 1)}}
}

// uncounted is an entry that was seen and that no beacon has counted yet.
type uncounted struct {
	sequence uint64
	since    time.Time
}

// lag returns how long an entry of the shard is known to wait for being counted.
// It is not taken from the times of entries: those are as far apart as traffic
// is.
func (s *state) lag(shard uint32, last, counted uint64, now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last <= counted {
		delete(s.behind, shard)
		return 0
	}
	w, ok := s.behind[shard]
	if !ok || w.sequence <= counted {
		w = uncounted{last, now}
		s.behind[shard] = w
	}
	return now.Sub(w.since)
}

// watched is what is asked for regularly.
type watched struct {
	history    error // nil: ClickHouse answered
	historySet bool
	position   uint64    // of history in the ledger
	positionAt time.Time // when it last moved, or had nothing to do
	ledgerErr  error
	deadTotal  uint64
	peers      map[string]peerState
}

type peerState struct {
	ok     bool
	detail string
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
	w := watched{peers: map[string]peerState{}}
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
	for _, p := range c.o.Peers {
		w.peers[p.Name] = askPeer(ask, client, p.URL)
	}
	if ctx.Err() != nil {
		return
	}
	calls := c.tail.view(0, 0, 0, 0).calls
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	old := c.state.watch
	w.positionAt = old.positionAt
	if w.history == nil && (w.position != old.position || w.position >= calls || w.positionAt.IsZero()) {
		w.positionAt = time.Now()
	}
	c.state.watch = w
}

func askPeer(ctx context.Context, client *http.Client, url string) peerState {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return peerState{detail: "its address can't be used"}
	}
	res, err := client.Do(req)
	if err != nil {
		return peerState{detail: "it does not answer"}
	}
	defer func() { _ = res.Body.Close() }() // read or given up
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10))
	if res.StatusCode != http.StatusOK {
		return peerState{detail: fmt.Sprintf("it is not ready (%s)", res.Status)}
	}
	return peerState{ok: true, detail: "ready"}
}

// part is one line of the health.
type part struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Detail string `json:"detail"`
}

// shardHealth is how the counting of a shard is.
type shardHealth struct {
	Shard uint32 `json:"shard"`
	State string `json:"state"`
	// BeaconAge is -1 when none was ever heard.
	BeaconAge  float64 `json:"beacon_age_seconds"`
	Epoch      uint64  `json:"epoch"`
	Sequence   uint64  `json:"counted_sequence"`
	LastEntry  uint64  `json:"last_sequence"`
	LagSeconds float64 `json:"lag_seconds"`
}

type historianHealth struct {
	Known    bool   `json:"known"`
	Position uint64 `json:"position"`
	Ledger   uint64 `json:"ledger_sequence"`
	Behind   uint64 `json:"behind_entries"`
}

type health struct {
	State     string          `json:"state"`
	Parts     []part          `json:"parts"`
	Shards    []shardHealth   `json:"shards"`
	Historian historianHealth `json:"historian"`
	// Components are the parts of this process that say whether they are ready.
	Components []telemetry.ComponentStatus `json:"components"`
}

const (
	beaconStale = 3 * time.Second
	beaconLate  = time.Second
	// historyStuck is how long history may be behind without moving.
	historyStuck = 15 * time.Second
	gatewaySeen  = time.Minute
)

// health puts together what is known.
func (c *console) health(now time.Time) health {
	v := c.tail.view(micros(now), 0, 0, 0)
	c.state.mu.Lock()
	w := c.state.watch
	c.state.mu.Unlock()
	components := c.o.Readiness.Status().Components
	h := health{State: StateOK, Components: components}

	h.Shards = c.shardHealth(now, v)
	h.Parts = append(h.Parts, c.gatewayPart(now, v), aggregatorPart(h.Shards))
	if w.history == nil && w.historySet {
		h.Historian = historianHealth{Known: true, Position: w.position, Ledger: v.calls}
		if v.calls > w.position {
			h.Historian.Behind = v.calls - w.position
		}
	}
	h.Parts = append(h.Parts, historianPart(now, w, h.Historian), part{"alerter", StateUnknown, "nobody has said how it is"})
	nats := part{"nats", StateOK, "connected"}
	switch {
	case !c.nc.IsConnected():
		nats.State, nats.Detail = StateDown, "the connection is lost: reconnecting"
	case w.ledgerErr != nil:
		nats.State, nats.Detail = StateDown, "the ledger does not answer"
	case v.err != nil:
		nats.State, nats.Detail = StateWaiting, "reading the ledger was interrupted"
	}
	clickhouse := part{"clickhouse", StateOK, "answers"}
	switch {
	case !w.historySet:
		clickhouse.State, clickhouse.Detail = StateUnknown, "the console has no address of it"
	case w.history != nil:
		clickhouse.State, clickhouse.Detail = StateDown, "it does not answer: "+firstSentence(w.history.Error())
	}
	h.Parts = append(h.Parts, nats, clickhouse)
	for i := range h.Parts {
		p := &h.Parts[i]
		if peer, ok := w.peers[p.Name]; ok {
			p.hear(peer.ok, peer.detail)
		}
		for _, comp := range components {
			if speaksOf(comp.Name, p.Name) {
				detail := comp.Reason
				if comp.OK {
					detail = "ready"
				}
				p.hear(comp.OK, detail)
			}
		}
		switch {
		case p.State == StateDown:
			h.State = StateDown
		case p.State == StateWaiting && h.State == StateOK:
			h.State = StateWaiting
		}
	}
	return h
}

// speaksOf reports whether a component is the part or one of its: historian_nats
// of historian.
func speaksOf(component, part string) bool {
	rest, ok := strings.CutPrefix(component, part)
	return ok && (rest == "" || strings.ContainsAny(rest[:1], "._-/ "))
}

// hear takes into account what the part says of itself.
func (p *part) hear(ok bool, detail string) {
	switch {
	case !ok:
		p.State, p.Detail = StateDown, detail
	case p.State == StateUnknown:
		p.State, p.Detail = StateOK, detail
	}
}

func firstSentence(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

func (c *console) shardHealth(now time.Time, v view) []shardHealth {
	out := make([]shardHealth, c.shards)
	for i := range out {
		out[i] = shardHealth{Shard: uint32(i), State: StateDown, BeaconAge: -1}
		out[i].LastEntry = v.shards[uint32(i)]
	}
	for _, b := range c.state.beacons.All(now) {
		if int(b.Shard) >= len(out) {
			continue
		}
		s := &out[b.Shard]
		s.BeaconAge, s.Epoch, s.Sequence = b.Age.Seconds(), b.Epoch, b.Sequence
		switch {
		case b.Age > beaconStale:
		case b.Age > beaconLate:
			s.State = StateWaiting
		default:
			s.State = StateOK
		}
		s.LagSeconds = c.state.lag(b.Shard, v.shards[b.Shard], b.Sequence, now).Seconds()
	}
	return out
}

func aggregatorPart(shards []shardHealth) part {
	silent, late := 0, 0
	lag := 0.0
	for _, s := range shards {
		switch s.State {
		case StateDown:
			silent++
		case StateWaiting:
			late++
		}
		lag = max(lag, s.LagSeconds)
	}
	n := len(shards)
	switch {
	case silent == n:
		return part{"aggregator", StateDown, "no shard has an owner that can be heard"}
	case silent > 0:
		return part{"aggregator", StateDown, fmt.Sprintf("%d of %d shards have no owner that can be heard", silent, n)}
	case late > 0:
		return part{"aggregator", StateWaiting, fmt.Sprintf("%d of %d shards are late", late, n)}
	case lag > 5:
		return part{"aggregator", StateWaiting, fmt.Sprintf("counting is %.0f s behind", lag)}
	}
	return part{"aggregator", StateOK, fmt.Sprintf("%d shards counted", n)}
}

func (c *console) gatewayPart(now time.Time, v view) part {
	names := 0
	for _, g := range v.gateways {
		if now.Sub(g.SeenAt.Time()) < gatewaySeen {
			names++
		}
	}
	switch names {
	case 0:
		return part{"gateway", StateUnknown, "none has sent calls within a minute"}
	case 1:
		return part{"gateway", StateOK, "1 has sent calls within a minute"}
	}
	return part{"gateway", StateOK, fmt.Sprintf("%d have sent calls within a minute", names)}
}

func historianPart(now time.Time, w watched, h historianHealth) part {
	switch {
	case !w.historySet:
		return part{"historian", StateUnknown, "the console has no address of ClickHouse"}
	case !h.Known:
		return part{"historian", StateUnknown, "ClickHouse does not answer"}
	case h.Behind > 0 && now.Sub(w.positionAt) > historyStuck:
		return part{"historian", StateDown, fmt.Sprintf("%d entries behind, and it has not moved for %s", h.Behind, now.Sub(w.positionAt).Round(time.Second))}
	case h.Behind > 0:
		return part{"historian", StateOK, fmt.Sprintf("%d entries behind", h.Behind)}
	}
	return part{"historian", StateOK, "up to date"}
}
