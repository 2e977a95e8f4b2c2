package aggregator

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// metrics of all shards of the process together: the label sets do not grow
// with shards or accounts.
type metrics struct {
	events          *prometheus.CounterVec // outcome
	frames          *prometheus.CounterVec // outcome
	skipped         prometheus.Counter
	late, future    prometheus.Counter
	overflows       prometheus.Counter
	controls        prometheus.Counter
	leases          prometheus.Counter
	ticks           prometheus.Counter
	deadLetters     *prometheus.CounterVec // reason
	decisions       *prometheus.CounterVec // verdict
	batches         *prometheus.CounterVec // result
	interruptions   prometheus.Counter
	decisionLatency prometheus.Histogram
	countLatency    prometheus.Histogram
	snapshotSeconds prometheus.Histogram
	snapshotBytes   prometheus.Gauge
	snapshots       *prometheus.CounterVec // result
	queries         *prometheus.CounterVec // result
	pending         prometheus.Gauge
	notCaughtUp     prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
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
	m := &metrics{
		events:          vec("events_total", "Calls by what became of them: admitted and refused are counted, duplicate was counted before.", "outcome"),
		frames:          vec("frames_total", "Frames by verdict on their number: fresh, duplicate, gap.", "outcome"),
		skipped:         counter("skipped_frames_total", "Frame numbers that a producer has used and that never came."),
		late:            counter("late_events_total", "Calls older than the previous window of a limit they belong to."),
		future:          counter("future_events_total", "Calls ahead of the ledger's time, counted at its time."),
		overflows:       counter("overflows_total", "Sums that reached the end of 64 bits and stay there."),
		controls:        counter("control_entries_total", "Control entries folded."),
		leases:          counter("ignored_lease_entries_total", "Lease entries, which this version does not know."),
		ticks:           counter("ticks_total", "Entries appended so that time passes without traffic."),
		deadLetters:     vec("dead_letters_total", "Ledger entries that could not be counted, by reason.", "reason"),
		decisions:       vec("decisions_total", "Decisions published, by verdict.", "verdict"),
		batches:         vec("decision_batches_total", "Batches of decisions by result: stored, unclear.", "result"),
		interruptions:   counter("read_interruptions_total", "Times that reading the ledger was interrupted and began again where it was."),
		decisionLatency: histogram("decision_latency_seconds", "From the time of the call that crossed a threshold to its decision being stored.", 0.0005, 18),
		countLatency:    histogram("count_latency_seconds", "From the sealing of a frame at its gateway to its calls being counted, once caught up.", 0.0001, 20),
		snapshotSeconds: histogram("snapshot_seconds", "From the begin of writing a snapshot to its object being stored.", 0.001, 14),
		snapshotBytes:   gauge("snapshot_bytes", "Size of the newest snapshot."),
		snapshots:       vec("snapshots_total", "Snapshots by result: stored, failed.", "result"),
		queries:         vec("queries_total", "Usage queries by result: answered, refused.", "result"),
		pending:         gauge("pending_entries", "Entries of the ledger that are not read yet."),
		notCaughtUp:     gauge("shards_catching_up", "Shards that have not yet counted what the ledger held at the start."),
	}
	for _, v := range []string{"admitted", "refused", "duplicate"} {
		m.events.WithLabelValues(v)
	}
	for _, v := range []string{"fresh", "duplicate", "gap"} {
		m.frames.WithLabelValues(v)
	}
	for v := usage.Allow; v <= usage.Deny; v++ {
		m.decisions.WithLabelValues(v.String())
	}
	for _, c := range []prometheus.Collector{
		m.events, m.frames, m.skipped, m.late, m.future, m.overflows, m.controls, m.leases, m.ticks, m.deadLetters, m.decisions,
		m.batches, m.interruptions, m.decisionLatency, m.countLatency, m.snapshotSeconds, m.snapshotBytes, m.snapshots, m.queries,
		m.pending, m.notCaughtUp,
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
