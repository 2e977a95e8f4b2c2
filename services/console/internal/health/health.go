// Package health judges how every part is from what was seen of it.
package health

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/live"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// States of a part.
const (
	StateOK      = "ok"
	StateWaiting = "waiting" // it is there, and behind or quiet
	StateDown    = "down"
	StateUnknown = "unknown" // nobody has said
)

// Part is one line of the health.
type Part struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Detail string `json:"detail"`
}

// Shard is how the counting of a shard is.
type Shard struct {
	Shard uint32 `json:"shard"`
	State string `json:"state"`
	// BeaconAge is -1 when none was ever heard.
	BeaconAge  float64 `json:"beacon_age_seconds"`
	Epoch      uint64  `json:"epoch"`
	Sequence   uint64  `json:"counted_sequence"`
	LastEntry  uint64  `json:"last_sequence"`
	LagSeconds float64 `json:"lag_seconds"`
}

// Historian is how far history is.
type Historian struct {
	Known    bool   `json:"known"`
	Position uint64 `json:"position"`
	Ledger   uint64 `json:"ledger_sequence"`
	Behind   uint64 `json:"behind_entries"`
}

// Health is how everything is.
type Health struct {
	State     string    `json:"state"`
	Parts     []Part    `json:"parts"`
	Shards    []Shard   `json:"shards"`
	Historian Historian `json:"historian"`
	// Components are the parts of this process that say whether they are ready.
	Components []telemetry.ComponentStatus `json:"components"`
	// Freshness of what parts and ClickHouse were asked for.
	Freshness freshness.Freshness `json:"freshness"`
}

const (
	beaconStale = 3 * time.Second
	beaconLate  = time.Second
	// historyStuck is how long history may be behind without moving.
	historyStuck = 15 * time.Second
	gatewaySeen  = time.Minute
	// auditStale is long for one that says every second how far it is.
	auditStale = 15 * time.Second
	// lookedStale is several rounds of questions.
	lookedStale = 10 * time.Second
)

// Peer is what another service says of itself.
type Peer struct {
	OK     bool
	Detail string
}

// Audit is what the auditor said last: when (0: never, or it can't be read), and how many
// findings hold.
type Audit struct {
	At   usage.Micros
	Open int
}

// Seen is what is known at a time.
type Seen struct {
	Now time.Time
	// LookedAt is when parts, ClickHouse and the auditor were asked last; zero: never.
	LookedAt time.Time
	// Shards of the ledger; LastEntries of those that had any.
	Shards      uint32
	LastEntries map[uint32]uint64
	Beacons     []views.Beacon
	Gateways    []live.Gateway
	// Connected to NATS; LedgerErr of asking for the ledger, TailErr of reading it.
	Connected          bool
	LedgerErr, TailErr error
	// HasHistory says that there is an address of ClickHouse; HistoryErr why it
	// does not answer.
	HasHistory bool
	HistoryErr error
	// Position of history, when it last moved or had nothing to do, and the
	// newest entry with calls.
	Position   uint64
	PositionAt time.Time
	LastCalls  uint64
	Peers      map[string]Peer
	Audit      Audit
	Components []telemetry.ComponentStatus
}

// Judge puts together what is known.
func Judge(w Seen, lag *Lag) Health {
	now := w.Now
	h := Health{State: StateOK, Components: w.Components, Freshness: freshness.Now(now)}
	switch age := now.Sub(w.LookedAt); {
	case w.LookedAt.IsZero():
		h.Freshness = freshness.Since(w.LookedAt, now, "the parts were not asked yet")
	case age > lookedStale:
		h.Freshness = freshness.Since(w.LookedAt, now, "the parts were asked "+age.Round(time.Second).String()+" ago")
	}
	h.Shards = shardsOf(w, lag)
	h.Parts = append(h.Parts, gatewayPart(now, w.Gateways), aggregatorPart(h.Shards))
	if w.HistoryErr == nil && w.HasHistory {
		h.Historian = Historian{Known: true, Position: w.Position, Ledger: w.LastCalls}
		if w.LastCalls > w.Position {
			h.Historian.Behind = w.LastCalls - w.Position
		}
	}
	h.Parts = append(h.Parts, historianPart(now, w, h.Historian), Part{"alerter", StateUnknown, "nobody has said how it is"}, auditorPart(now, w.Audit))
	nats := Part{"nats", StateOK, "connected"}
	switch {
	case !w.Connected:
		nats.State, nats.Detail = StateDown, "the connection is lost: reconnecting"
	case w.LedgerErr != nil:
		nats.State, nats.Detail = StateDown, "the ledger does not answer"
	case w.TailErr != nil:
		nats.State, nats.Detail = StateWaiting, "reading the ledger was interrupted"
	}
	clickhouse := Part{"clickhouse", StateOK, "answers"}
	switch {
	case !w.HasHistory:
		clickhouse.State, clickhouse.Detail = StateUnknown, "the console has no address of it"
	case w.HistoryErr != nil:
		clickhouse.State, clickhouse.Detail = StateDown, "it does not answer: "+FirstSentence(w.HistoryErr.Error())
	}
	h.Parts = append(h.Parts, nats, clickhouse)
	for i := range h.Parts {
		p := &h.Parts[i]
		if peer, ok := w.Peers[p.Name]; ok {
			p.hear(peer.OK, peer.Detail)
		}
		for _, comp := range w.Components {
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
func (p *Part) hear(ok bool, detail string) {
	switch {
	case !ok:
		p.State, p.Detail = StateDown, detail
	case p.State == StateUnknown:
		p.State, p.Detail = StateOK, detail
	}
}

// FirstSentence cuts an error's text to what fits a line.
func FirstSentence(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

func shardsOf(w Seen, lag *Lag) []Shard {
	out := make([]Shard, w.Shards)
	for i := range out {
		out[i] = Shard{Shard: uint32(i), State: StateDown, BeaconAge: -1}
		out[i].LastEntry = w.LastEntries[uint32(i)]
	}
	for _, b := range w.Beacons {
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
		s.LagSeconds = lag.Of(b.Shard, w.LastEntries[b.Shard], b.Sequence, w.Now).Seconds()
	}
	return out
}

// countedLate is from when on counters are behind: beacons come several times a second.
const countedLate = 2.0

// Fresh is how current the counters of a shard are that has answered, or failed to, with
// an error.
func (s *Shard) Fresh(failed string, now time.Time) freshness.Freshness {
	switch {
	case failed != "":
		return freshness.Since(time.Time{}, now, failed)
	case s.LagSeconds > countedLate:
		return freshness.Since(now.Add(-time.Duration(s.LagSeconds*float64(time.Second))), now,
			fmt.Sprintf("shard %d is counted up to entry %d of %d", s.Shard, s.Sequence, s.LastEntry))
	}
	return freshness.Now(now)
}

func aggregatorPart(shards []Shard) Part {
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
		return Part{"aggregator", StateDown, "no shard has an owner that can be heard"}
	case silent > 0:
		return Part{"aggregator", StateDown, fmt.Sprintf("%d of %d shards have no owner that can be heard", silent, n)}
	case late > 0:
		return Part{"aggregator", StateWaiting, fmt.Sprintf("%d of %d shards are late", late, n)}
	case lag > 5:
		return Part{"aggregator", StateWaiting, fmt.Sprintf("counting is %.0f s behind", lag)}
	}
	return Part{"aggregator", StateOK, fmt.Sprintf("%d shards counted", n)}
}

// auditorPart is whether it does its work; what it has found is no fault of its own.
func auditorPart(now time.Time, a Audit) Part {
	age := now.Sub(a.At.Time()).Round(time.Second)
	switch {
	case a.At == 0:
		return Part{"auditor", StateUnknown, "nothing was heard of it"}
	case age > auditStale:
		return Part{"auditor", StateDown, "it has said nothing for " + age.String()}
	case a.Open == 1:
		return Part{"auditor", StateOK, "at work; 1 finding holds, see Conservation"}
	case a.Open > 1:
		return Part{"auditor", StateOK, fmt.Sprintf("at work; %d findings hold, see Conservation", a.Open)}
	}
	return Part{"auditor", StateOK, "at work; no finding holds"}
}

func gatewayPart(now time.Time, gateways []live.Gateway) Part {
	names := 0
	for _, g := range gateways {
		if now.Sub(g.SeenAt.Time()) < gatewaySeen {
			names++
		}
	}
	switch names {
	case 0:
		return Part{"gateway", StateUnknown, "none has sent calls within a minute"}
	case 1:
		return Part{"gateway", StateOK, "1 has sent calls within a minute"}
	}
	return Part{"gateway", StateOK, fmt.Sprintf("%d have sent calls within a minute", names)}
}

func historianPart(now time.Time, w Seen, h Historian) Part {
	switch {
	case !w.HasHistory:
		return Part{"historian", StateUnknown, "the console has no address of ClickHouse"}
	case !h.Known:
		return Part{"historian", StateUnknown, "ClickHouse does not answer"}
	case h.Behind > 0 && now.Sub(w.PositionAt) > historyStuck:
		return Part{"historian", StateDown, fmt.Sprintf("%d entries behind, and it has not moved for %s", h.Behind, now.Sub(w.PositionAt).Round(time.Second))}
	case h.Behind > 0:
		return Part{"historian", StateOK, fmt.Sprintf("%d entries behind", h.Behind)}
	}
	return Part{"historian", StateOK, "up to date"}
}

// Lag remembers entries that wait for being counted. The zero value is ready. Safe
// for concurrent use.
type Lag struct {
	mu     sync.Mutex
	behind map[uint32]uncounted // by shard
}

// uncounted is an entry that was seen and that no beacon has counted yet.
type uncounted struct {
	sequence uint64
	since    time.Time
}

// Of returns how long an entry of the shard is known to wait for being counted.
// It is not taken from the times of entries: those are as far apart as traffic
// is.
func (s *Lag) Of(shard uint32, last, counted uint64, now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last <= counted {
		delete(s.behind, shard)
		return 0
	}
	if s.behind == nil {
		s.behind = map[uint32]uncounted{}
	}
	w, ok := s.behind[shard]
	if !ok || w.sequence <= counted {
		w = uncounted{last, now}
		s.behind[shard] = w
	}
	return now.Sub(w.since)
}
