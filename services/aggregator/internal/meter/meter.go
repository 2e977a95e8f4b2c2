// Package meter is what an aggregator tells Prometheus of what it does.
package meter

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Metrics of all shards of the process together: their label sets do not grow
// with shards or accounts. Those that do with shards are not among them.
type Metrics struct {
	Events          *prometheus.CounterVec // outcome
	Frames          *prometheus.CounterVec // outcome
	Skipped         prometheus.Counter
	Strays          prometheus.Counter
	Apart           prometheus.Counter
	NewAccounts     prometheus.Counter
	Unplaced        prometheus.Counter
	Unmetered       prometheus.Counter
	Late, Future    prometheus.Counter
	Overflows       prometheus.Counter
	Controls        prometheus.Counter
	Asks            prometheus.Counter
	Answers         prometheus.Counter
	Leases          *prometheus.CounterVec // event
	LeaseEvents     [4]prometheus.Counter
	Ticks           prometheus.Counter
	DeadLetters     *prometheus.CounterVec // reason
	Decisions       *prometheus.CounterVec // verdict
	Batches         *prometheus.CounterVec // result
	Interruptions   prometheus.Counter
	DecisionLatency prometheus.Histogram
	CountLatency    prometheus.Histogram
	SnapshotSeconds prometheus.Histogram
	SnapshotBytes   prometheus.Gauge
	Snapshots       *prometheus.CounterVec // result
	Queries         *prometheus.CounterVec // result
	Pending         prometheus.Gauge
	NotCaughtUp     prometheus.Gauge
	Beyond          prometheus.Gauge
	Slowest         Slowest
	all             []prometheus.Collector
}

// Slowest is the longest of the durations noted in this and the last period.
type Slowest struct{ now, before atomic.Int64 }

// Note takes a duration. Safe for concurrent use.
func (s *Slowest) Note(d time.Duration) {
	for {
		old := s.now.Load()
		if int64(d) <= old || s.now.CompareAndSwap(old, int64(d)) {
			return
		}
	}
}

// Turn begins a new period.
func (s *Slowest) Turn() { s.before.Store(s.now.Swap(0)) }

func (s *Slowest) seconds() float64 {
	return time.Duration(max(s.now.Load(), s.before.Load())).Seconds()
}

// New registers them.
func New(r prometheus.Registerer) (*Metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_aggregator_" + name, Help: help})
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_aggregator_" + name, Help: help}, []string{label})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_aggregator_" + name, Help: help})
	}
	histogram := func(name, help string, first float64, n int) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: "tollkeeper_aggregator_" + name, Help: help, Buckets: prometheus.ExponentialBuckets(first, 2, n)})
	}
	m := &Metrics{
		Events:          vec("events_total", "Calls by what became of them: admitted and refused are counted, duplicate was counted before.", "outcome"),
		Frames:          vec("frames_total", "Frames by verdict on their number: fresh, duplicate, gap.", "outcome"),
		Skipped:         counter("skipped_frames_total", "Frame numbers that a producer has used and that never came."),
		Strays:          counter("stray_entries_total", "Entries on subjects of no shard of this ledger: they are kept in the dead letters."),
		Apart:           counter("readers_apart_total", "Times that a shard got a reader of its own because it did not take its entries in time."),
		NewAccounts:     counter("new_accounts_total", "Accounts of calls that nothing had named before."),
		Unplaced:        counter("unplaced_events_total", "Calls of unknown accounts beyond the bound of a shard, counted together at the account (overflow)."),
		Unmetered:       counter("unmetered_readings_total", "Readings of meters beyond the bound of a shard, which are in no sum; their calls are counted."),
		Late:            counter("late_events_total", "Calls older than the previous window of a limit they belong to."),
		Future:          counter("future_events_total", "Calls ahead of the ledger's time, counted at its time."),
		Overflows:       counter("overflows_total", "Sums that reached the end of 64 bits and stay there."),
		Controls:        counter("control_entries_total", "Control entries folded."),
		Asks:            counter("lease_asks_total", "What gateways have said about allowances that they share."),
		Answers:         counter("lease_answers_total", "Answers about shared allowances that were sent to gateways."),
		Leases:          vec("leases_total", "What happened to shared allowances: grant, recall, denied_early (it may yet come back), denied_final.", "event"),
		Ticks:           counter("ticks_total", "Entries appended so that time passes without traffic."),
		DeadLetters:     vec("dead_letters_total", "Ledger entries that could not be counted, by reason.", "reason"),
		Decisions:       vec("decisions_total", "Decisions published, by verdict.", "verdict"),
		Batches:         vec("decision_batches_total", "Batches of decisions by result: stored, unclear.", "result"),
		Interruptions:   counter("read_interruptions_total", "Times that reading the ledger was interrupted and began again where it was."),
		DecisionLatency: histogram("decision_latency_seconds", "From the time of the call that crossed a threshold to its decision being stored.", 0.0001, 20),
		CountLatency:    histogram("count_latency_seconds", "From the sealing of a frame at its gateway to its calls being counted, once caught up.", 0.0001, 20),
		SnapshotSeconds: histogram("snapshot_seconds", "From the begin of writing a snapshot to its object being stored.", 0.001, 14),
		SnapshotBytes:   gauge("snapshot_bytes", "Size of the newest snapshot."),
		Snapshots:       vec("snapshots_total", "Snapshots by result: stored, failed.", "result"),
		Queries:         vec("queries_total", "Usage queries by result: answered, refused.", "result"),
		Pending:         gauge("pending_entries", "Entries of the ledger that are not read yet."),
		NotCaughtUp:     gauge("shards_catching_up", "Shards without any owner, and those of this member that are not counted up to what the ledger held when they became its."),
	}
	m.Beyond = gauge("shards_beyond_rules", "Shards whose ledger is to be folded by newer rules than this program knows: it leaves them to a newer version, which is to be run.")
	for _, v := range []string{"admitted", "refused", "duplicate"} {
		m.Events.WithLabelValues(v)
	}
	for _, v := range []string{"fresh", "duplicate", "gap"} {
		m.Frames.WithLabelValues(v)
	}
	for v := usage.Allow; v <= usage.Deny; v++ {
		m.Decisions.WithLabelValues(v.String())
	}
	for i, event := range []string{"grant", "recall", "denied_early", "denied_final"} {
		m.LeaseEvents[i] = m.Leases.WithLabelValues(event)
	}
	longest := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tollkeeper_aggregator_count_latency_max_seconds", Help: "The longest count latency of the last 15 to 30 s.",
	}, m.Slowest.seconds)
	m.all = []prometheus.Collector{
		m.Events, m.Frames, m.Skipped, m.Strays, m.Apart, m.NewAccounts, m.Unplaced, m.Unmetered, m.Late, m.Future, m.Overflows, m.Controls, m.Asks, m.Answers, m.Leases, m.Ticks, m.DeadLetters, m.Decisions,
		m.Batches, m.Interruptions, m.DecisionLatency, m.CountLatency, m.SnapshotSeconds, m.SnapshotBytes, m.Snapshots, m.Queries,
		m.Pending, m.NotCaughtUp, m.Beyond, longest,
	}
	for i, c := range m.all {
		if err := r.Register(c); err != nil {
			m.all = m.all[:i]
			m.Unregister(r)
			return nil, err
		}
	}
	return m, nil
}

// Unregister makes room for the metrics of another run in the same process.
func (m *Metrics) Unregister(r prometheus.Registerer) {
	for _, c := range m.all {
		r.Unregister(c)
	}
}
