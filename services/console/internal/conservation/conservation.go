// Package conservation answers how the conservation audit stands: what gateways
// sent, the ledger, the counters and ClickHouse, held against each other by the
// auditor.
package conservation

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
)

// Answer is how the audit stands.
type Answer struct {
	// State: ok, waiting (it does not compare everything just now), down (two
	// points do not agree), unknown (no auditor has said anything).
	State  string       `json:"state"`
	Detail string       `json:"detail"`
	At     usage.Micros `json:"at_unix_micros"`

	Position        uint64 `json:"ledger_position"`
	Pending         uint64 `json:"ledger_pending"`
	Calls           int64  `json:"calls"`
	Claimed         int64  `json:"claimed_calls"`
	Unclaimed       int64  `json:"unclaimed_calls"`
	CheckedMinutes  int64  `json:"checked_minutes"`
	CheckedCells    int64  `json:"checked_cells"`
	CheckedAccounts int64  `json:"checked_accounts"`

	Points []Point `json:"points"`
	// Freshness: current while the auditor compares everything.
	Freshness freshness.Freshness `json:"freshness"`
	// Open findings, all of them; Findings are some, open ones first.
	Open     int       `json:"open"`
	Findings []Finding `json:"findings"`
}

// Point is how two points are compared.
type Point struct {
	Pair string `json:"pair"`
	// State: ok, waiting (it is not compared just now), down (findings hold).
	State string `json:"state"`
	// OK: it is being compared, whatever is found.
	OK         bool         `json:"ok"`
	LagSeconds float64      `json:"lag_seconds"`
	At         usage.Micros `json:"at_unix_micros"`
	Detail     string       `json:"detail"`
	Open       int          `json:"open"`
}

// Finding is that two points do not agree about an account and minute.
type Finding struct {
	ID         string       `json:"id"`
	Pair       string       `json:"pair"`
	Kind       string       `json:"kind"`
	Minute     int64        `json:"minute_unix"`
	MinuteText string       `json:"minute"`
	Account    string       `json:"account"`
	Others     bool         `json:"others,omitempty"`
	Text       string       `json:"text"`
	Parts      []Part       `json:"parts"`
	FirstSeen  usage.Micros `json:"first_seen_unix_micros"`
	LastSeen   usage.Micros `json:"last_seen_unix_micros"`
	ResolvedAt usage.Micros `json:"resolved_at_unix_micros,omitempty"`
}

// Part is a stretch in which they differ: ledger positions, or frames of a
// producer.
type Part struct {
	Origin string `json:"origin"`
	From   uint64 `json:"from"`
	To     uint64 `json:"to"`
	Want   Tally  `json:"want"`
	Got    Tally  `json:"got"`
}

// Tally is a sum of calls.
type Tally struct {
	Count   int64   `json:"count"`
	Refused int64   `json:"refused"`
	Sums    []int64 `json:"sums"`
	Hash    string  `json:"hash"`
}

// Bounds of an answer: the auditor says no more, and is asked no more often.
const (
	MaxFindings = 50
	askEvery    = time.Second
	askTimeout  = 2 * time.Second
	// silence is after how long an auditor that says nothing is missed.
	silence = 15 * time.Second
	// maxLag is how old the oldest that was not compared may be while all is well: a
	// stretch is cut every ten seconds, and compared when its block is in ClickHouse.
	maxLag = 45 * time.Second
)

// historyPair is the comparison with ClickHouse.
const historyPair = "ledger-history"

// Source reads what the auditor says. It is safe for concurrent use.
type Source struct {
	JS  jetstream.JetStream
	Log zerolog.Logger
	// HistoryAway says why ClickHouse does not answer the console itself, which may
	// know before the auditor does; empty: it answers. Nil is allowed.
	HistoryAway func() string

	mu   sync.Mutex
	last Answer
	at   time.Time
}

// Read returns how the audit stands.
func (s *Source) Read(ctx context.Context, now time.Time) (Answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.at.IsZero() && now.Sub(s.at) < askEvery {
		return Judge(s.last, now, s.historyAway()), nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var a Answer
	kv, err := s.JS.KeyValue(ctx, ledger.AuditBucket)
	if err == nil {
		var e jetstream.KeyValueEntry
		if e, err = kv.Get(ctx, ledger.AuditStatusKey); err == nil {
			err = json.Unmarshal(e.Value(), &a)
		}
	}
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound), errors.Is(err, jetstream.ErrBucketNotFound):
		a = Answer{}
	case err != nil:
		return a, err
	}
	s.last, s.at = a, now
	return Judge(a, now, s.historyAway()), nil
}

func (s *Source) historyAway() string {
	if s.HistoryAway == nil {
		return ""
	}
	return s.HistoryAway()
}

// Judge says in a word and a sentence how it stands. It is green only for what is
// compared now: not beside a ClickHouse that does not answer (historyAway says why), nor
// with a pair that lags, nor on the word of an auditor that is silent.
func Judge(a Answer, now time.Time, historyAway string) Answer {
	a.Points = append([]Point{}, a.Points...)
	if a.Findings == nil {
		a.Findings = []Finding{}
	}
	age := now.Sub(a.At.Time())
	silent := a.At != 0 && age > silence
	waiting := ""
	for i := range a.Points {
		p := &a.Points[i]
		switch {
		case silent:
			p.OK, p.Detail = false, "the auditor has said nothing for "+age.Round(time.Second).String()
		case p.Pair == historyPair && historyAway != "":
			p.OK, p.Detail = false, "ClickHouse does not answer: "+historyAway
		case p.OK && p.LagSeconds > maxLag.Seconds():
			p.OK, p.Detail = false, "the oldest calls that were not compared are "+time.Duration(p.LagSeconds*float64(time.Second)).Round(time.Second).String()+" old"
		}
		p.State = "ok"
		switch {
		case p.Open > 0:
			p.State = "down"
		case !p.OK:
			p.State = "waiting"
		}
		if !p.OK && waiting == "" {
			waiting = p.Detail
		}
	}
	switch {
	case a.At == 0:
		a.State, a.Detail = "unknown", "no auditor has said anything yet: start one"
		a.Freshness = freshness.Since(time.Time{}, now, a.Detail)
		return a
	case silent:
		waiting = "the auditor has said nothing for " + age.Round(time.Second).String()
	case len(a.Points) == 0:
		waiting = "the auditor has not compared anything yet"
	}
	switch {
	case a.Open > 0:
		a.State, a.Detail = "down", strconv.Itoa(a.Open)+" findings hold: calls are missing, doubled or changed between two points"
		if a.Open == 1 {
			a.Detail = "1 finding holds: calls are missing, doubled or changed between two points"
		}
		if waiting != "" {
			a.Detail += "; " + waiting
		}
	case waiting != "":
		a.State, a.Detail = "waiting", waiting
	default:
		a.State, a.Detail = "ok", "all points agree"
	}
	a.Freshness = freshness.Now(now)
	if waiting != "" {
		a.Freshness = freshness.Since(comparedAt(&a), now, waiting)
	}
	return a
}

// comparedAt is up to when everything was compared.
func comparedAt(a *Answer) time.Time {
	at := a.At
	for i := range a.Points {
		if p := &a.Points[i]; !p.OK && p.At < at {
			at = p.At
		}
	}
	if at == 0 {
		return time.Time{}
	}
	return at.Time()
}

// Handler answers GET /v1/audit; ?limit bounds the findings, ?open=true leaves
// out resolved ones.
func (s *Source) Handler(w http.ResponseWriter, r *http.Request) {
	n := MaxFindings
	if text := r.URL.Query().Get("limit"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 1 || n > MaxFindings {
			front.BadRequest("limit must be a whole number from 1 to " + strconv.Itoa(MaxFindings)).Write(w)
			return
		}
	}
	only := r.URL.Query().Get("open")
	if only != "" && only != "true" && only != "false" {
		front.BadRequest("open is true or false").Write(w)
		return
	}
	a, err := s.Read(r.Context(), time.Now())
	if err != nil {
		s.Log.Debug().Err(err).Msg("the audit's status")
		front.Unavailable("what the auditor says can't be read: NATS does not answer").Write(w)
		return
	}
	shown := make([]Finding, 0, min(n, len(a.Findings)))
	for _, f := range a.Findings {
		if len(shown) < n && (only != "true" || f.ResolvedAt == 0) {
			if f.Parts == nil {
				f.Parts = []Part{}
			}
			shown = append(shown, f)
		}
	}
	a.Findings = shown
	front.WriteJSON(w, a)
}
