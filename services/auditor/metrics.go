package auditor

import (
	"maps"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/services/auditor/internal/findings"
)

// metrics are what the newest status says.
type metrics struct {
	mu     sync.Mutex
	s      *Status
	totals map[[2]string]int64
	shown  []*findings.Finding // of them with account and minute

	checkedCells, checkedMinutes int64
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tollkeeper_audit_"+name, help, labels, nil)
}

var (
	descOpen     = desc("findings_open", "Findings that hold now: two points that do not agree about an account and minute.", "pair", "kind")
	descTotal    = desc("findings_total", "Findings since the auditor started.", "pair", "kind")
	descFinding  = desc("finding", "1 for each of the few newest findings that hold now; the others are only counted.", "pair", "kind", "account", "minute")
	descDropped  = desc("findings_dropped_total", "Findings beyond those that are kept.")
	descLag      = desc("lag_seconds", "Age of the oldest that was not compared.", "pair")
	descUp       = desc("comparing", "1 if the pair is being compared, 0 if one of its points can't be asked.", "pair")
	descPending  = desc("ledger_pending_entries", "Entries of the ledger that the auditor has not read.")
	descPosition = desc("ledger_position", "Newest ledger entry that the auditor has read.")
	descCalls    = desc("calls_total", "Calls that the auditor has counted in the ledger.")
	descMinutes  = desc("checked_minutes_total", "Minutes of stretches that were compared with the history.")
	descCells    = desc("checked_cells_total", "Accounts and minutes that were compared with claims or with the history.")
	descAccounts = desc("checked_accounts_total", "Accounts that were compared with the counters.")
	descClaimed  = desc("claimed_calls_total", "Calls that were held against their gateway's claim.")
	descNoClaim  = desc("unclaimed_calls_total", "Calls that nobody has claimed: their gateway was killed before it could, or claims nothing.")
	descLate     = desc("late_claims_total", "Claims that could not be compared: their frames were given up as unclaimed, or a part of them is lost.")
	descBad      = desc("undecodable_total", "Ledger entries that nobody can read.")
	descDouble   = desc("duplicates_total", "Frames and foreign events that stand in the ledger again and count once.")
	descWaiting  = desc("waiting_cells", "Accounts and minutes that wait: frames for their claim, claims for their frames.", "for")
	descKnown    = desc("accounts", "Accounts whose lifetime is held against the counters.")
	descBeyond   = desc("untold_calls_total", "Calls of accounts beyond those whose lifetime is kept.")
)

// Describe implements prometheus.Collector.
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descOpen, descTotal, descFinding, descDropped, descLag, descUp, descPending, descPosition, descCalls, descMinutes, descCells,
		descAccounts, descClaimed, descNoClaim, descLate, descBad, descDouble, descWaiting, descKnown, descBeyond} {
		out <- d
	}
}

func (m *metrics) checked(cells, minutes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.checkedCells += int64(cells)
	m.checkedMinutes += int64(minutes)
}

func (m *metrics) sums() (minutes, cells int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.checkedMinutes, m.checkedCells
}

// shownSeries bounds the findings that have a series of their own.
const shownSeries = 10

func (m *metrics) set(s *Status, book *findings.Book) {
	var shown []*findings.Finding
	for _, f := range s.Findings[:min(len(s.Findings), shownSeries)] {
		if f.Open() {
			shown = append(shown, f.Clone())
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.s, m.totals, m.shown = s, maps.Clone(book.Total), shown
}

var pairsAndKinds = func() (out [][2]string) {
	for _, pair := range []string{"gateway-ledger", "ledger-counters", "ledger-history"} {
		for _, kind := range []string{"gap", "double", "sum"} {
			out = append(out, [2]string{pair, kind})
		}
	}
	return out
}()

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.s
	if s == nil {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v int64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	for _, pk := range pairsAndKinds {
		gauge(descOpen, float64(s.open[pk]), pk[0], pk[1])
		counter(descTotal, m.totals[pk], pk[0], pk[1])
	}
	for _, f := range m.shown {
		gauge(descFinding, 1, string(f.Pair), string(f.Kind), strings.ToValidUTF8(f.Account, "?"), f.MinuteText)
	}
	for _, p := range s.Points {
		gauge(descLag, p.LagSeconds, string(p.Pair))
		up := 0.0
		if p.OK {
			up = 1
		}
		gauge(descUp, up, string(p.Pair))
	}
	counter(descDropped, s.Dropped)
	gauge(descPending, float64(s.Pending))
	gauge(descPosition, float64(s.Position))
	counter(descCalls, s.Calls)
	counter(descMinutes, s.CheckedMinutes)
	counter(descCells, s.CheckedCells)
	counter(descAccounts, s.CheckedAccounts)
	counter(descClaimed, s.Claimed)
	counter(descNoClaim, s.Unclaimed)
	counter(descLate, s.LateClaims)
	counter(descBad, s.Undecodable)
	counter(descDouble, s.Duplicates)
	gauge(descWaiting, float64(s.books.Held), "claim")
	gauge(descWaiting, float64(s.books.Waiting), "frame")
	gauge(descKnown, float64(s.books.Accounts))
	counter(descBeyond, s.books.Beyond)
}
