package auditor

import (
	"errors"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/books"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/findings"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// Status is how far the audit is, as it stands under ledger.AuditStatusKey (JSON).
type Status struct {
	At       usage.Micros `json:"at_unix_micros"`
	Position uint64       `json:"ledger_position"`
	// Pending entries of the ledger are not read yet.
	Pending uint64       `json:"ledger_pending"`
	Time    usage.Micros `json:"ledger_time_unix_micros"`

	Calls       int64 `json:"calls"`
	Duplicates  int64 `json:"duplicates"`
	Undecodable int64 `json:"undecodable"`
	Unclaimed   int64 `json:"unclaimed_calls"`
	Claimed     int64 `json:"claimed_calls"`
	LateClaims  int64 `json:"late_claims"`
	// Whole: the ledger was read from its beginning; without it counters can't be
	// compared.
	Whole bool `json:"whole"`

	CheckedMinutes  int64 `json:"checked_minutes"`
	CheckedCells    int64 `json:"checked_cells"`
	CheckedAccounts int64 `json:"checked_accounts"`

	Points   []Point             `json:"points"`
	Open     int                 `json:"open"`
	Dropped  int64               `json:"dropped"`
	Findings []*findings.Finding `json:"findings"` // open ones first; not all

	books books.Stats
	open  map[[2]string]int
}

// Point is how a comparison stands.
type Point struct {
	Pair books.Pair `json:"pair"`
	// OK: it is being compared, whatever it finds.
	OK bool `json:"ok"`
	// LagSeconds is how old the oldest is that was not compared.
	LagSeconds float64 `json:"lag_seconds"`
	// At is when the second point answered last; 0: it has not yet.
	At     usage.Micros `json:"at_unix_micros"`
	Detail string       `json:"detail"`
	Open   int          `json:"open"`
}

// shownFindings bounds those in the status.
const shownFindings = 50

func (a *auditor) status(now time.Time) *Status {
	b := a.books.Stats()
	s := &Status{
		At: usage.At(now), Position: a.books.Position, Pending: a.behind, Time: a.books.High(), Whole: a.books.Whole || a.books.Position == 0,
		Calls: b.Calls, Duplicates: b.Duplicates, Undecodable: b.Undecodable, Unclaimed: b.Unclaimed, Claimed: b.Claimed, LateClaims: b.LateClaims,
		CheckedAccounts: b.CheckedAccounts, Dropped: a.findings.Dropped, books: b, open: map[[2]string]int{},
	}
	s.CheckedMinutes, s.CheckedCells = a.metrics.sums()
	s.CheckedCells += b.CheckedCells
	byPair := map[books.Pair]int{}
	s.Findings = a.findings.List()
	for _, f := range s.Findings {
		if f.Open() {
			s.Open++
			byPair[f.Pair]++
			s.open[[2]string{string(f.Pair), string(f.Kind)}]++
		}
	}
	s.Findings = s.Findings[:min(len(s.Findings), shownFindings)]
	age := func(t time.Time) float64 {
		if t.IsZero() {
			return 0
		}
		return max(now.Sub(t).Seconds(), 0)
	}
	gateway := Point{Pair: books.GatewayLedger, OK: true, At: usage.At(now), LagSeconds: age(b.OldestWaiting), Detail: "claims are compared as their frames arrive"}
	if b.Waiting > 0 {
		gateway.Detail = "some claimed frames are not in the ledger yet"
	}
	counters := Point{Pair: books.LedgerCounters, OK: true, At: atOrNone(a.compared), LagSeconds: age(a.compared), Detail: "counters are compared at their own position"}
	switch {
	case !s.Whole:
		counters.OK, counters.Detail = false, "the ledger's beginning is gone: lifetimes can't be compared"
	case a.unanswered > 0:
		counters.OK, counters.Detail = false, "some shards have no owner that answers, or one that is behind"
	}
	kept := historyPoint(now, a.checker != nil, a.historyErr, a.historyAt)
	for _, r := range a.rounds {
		if r.checked.IsZero() {
			kept.LagSeconds = age(r.cut)
			break
		}
	}
	for _, p := range []Point{gateway, counters, kept} {
		if a.newer != nil {
			p.OK, p.Detail = false, a.newer.Error()
		}
		p.Open = byPair[p.Pair]
		s.Points = append(s.Points, p)
	}
	return s
}

// historyPatience is after how long ClickHouse is missed: a comparison takes a part of
// it, and it is asked every second.
const historyPatience = 15 * time.Second

// historyPoint is how the comparison with ClickHouse stands, which has an address or
// not, failed last with err, and answered last at heard.
func historyPoint(now time.Time, addressed bool, err error, heard time.Time) Point {
	p := Point{Pair: books.LedgerHistory, At: atOrNone(heard), Detail: "stretches are compared as they arrive, and once more later"}
	silent := now.Sub(heard)
	switch {
	case !addressed:
		p.Detail = "no address of ClickHouse is given"
	case errors.Is(err, history.ErrNotMigrated):
		p.Detail = err.Error() + ": the historian makes them when it starts"
	case err != nil:
		p.Detail = "ClickHouse does not answer: nothing is compared with it"
	case heard.IsZero():
		p.Detail = "ClickHouse has not answered yet"
	case silent > historyPatience:
		p.Detail = "ClickHouse has not answered for " + silent.Round(time.Second).String()
	default:
		p.OK = true
	}
	return p
}

func atOrNone(t time.Time) usage.Micros {
	if t.IsZero() {
		return 0
	}
	return usage.At(t)
}
