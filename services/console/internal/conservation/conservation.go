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
	// Open findings, all of them; Findings are some, open ones first.
	Open     int       `json:"open"`
	Findings []Finding `json:"findings"`
}

// Point is how two points are compared.
type Point struct {
	Pair       string  `json:"pair"`
	OK         bool    `json:"ok"`
	LagSeconds float64 `json:"lag_seconds"`
	Detail     string  `json:"detail"`
	Open       int     `json:"open"`
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
)

// Source reads what the auditor says. It is safe for concurrent use.
type Source struct {
	JS  jetstream.JetStream
	Log zerolog.Logger

	mu   sync.Mutex
	last Answer
	at   time.Time
}

// Read returns how the audit stands.
func (s *Source) Read(ctx context.Context, now time.Time) (Answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.at.IsZero() && now.Sub(s.at) < askEvery {
		return Judge(s.last, now), nil
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
	return Judge(a, now), nil
}

// Judge says in a word and a sentence how it stands.
func Judge(a Answer, now time.Time) Answer {
	if a.Points == nil {
		a.Points = []Point{}
	}
	if a.Findings == nil {
		a.Findings = []Finding{}
	}
	age := now.Sub(a.At.Time())
	switch {
	case a.At == 0:
		a.State, a.Detail = "unknown", "no auditor has said anything yet: start one"
	case a.Open > 0:
		a.State, a.Detail = "down", strconv.Itoa(a.Open)+" findings hold: calls are missing, doubled or changed between two points"
		if a.Open == 1 {
			a.Detail = "1 finding holds: calls are missing, doubled or changed between two points"
		}
	case age > silence:
		a.State, a.Detail = "waiting", "the auditor has said nothing for "+age.Round(time.Second).String()
	default:
		a.State, a.Detail = "ok", "all points agree"
		for _, p := range a.Points {
			if !p.OK {
				a.State, a.Detail = "waiting", p.Detail
			}
		}
	}
	return a
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
