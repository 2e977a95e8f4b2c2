package aggregator

import (
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// metrics of all shards of the process together: their label sets do not grow
// with shards or accounts. Those that do with shards are shardCollector's.
type metrics struct {
	events          *prometheus.CounterVec // outcome
	frames          *prometheus.CounterVec // outcome
	skipped         prometheus.Counter
	strays          prometheus.Counter
	apart           prometheus.Counter
	newAccounts     prometheus.Counter
	unplaced        prometheus.Counter
	unmetered       prometheus.Counter
	late, future    prometheus.Counter
	overflows       prometheus.Counter
	controls        prometheus.Counter
	asks            prometheus.Counter
	answers         prometheus.Counter
	leases          *prometheus.CounterVec // event
	leaseEvents     [4]prometheus.Counter
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
	slowest         slowest
	all             []prometheus.Collector
}

// slowest is the longest of the durations noted in this and the last period.
type slowest struct{ now, before atomic.Int64 }

func (s *slowest) note(d time.Duration) {
	for {
		old := s.now.Load()
		if int64(d) <= old || s.now.CompareAndSwap(old, int64(d)) {
			return
		}
	}
}

// turn begins a new period.
func (s *slowest) turn() { s.before.Store(s.now.Swap(0)) }

func (s *slowest) seconds() float64 {
	return time.Duration(max(s.now.Load(), s.before.Load())).Seconds()
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
		strays:          counter("stray_entries_total", "Entries on subjects of no shard of this ledger: they are kept in the dead letters."),
		apart:           counter("readers_apart_total", "Times that a shard got a reader of its own because it did not take its entries in time."),
		newAccounts:     counter("new_accounts_total", "Accounts of calls that nothing had named before."),
		unplaced:        counter("unplaced_events_total", "Calls of unknown accounts beyond the bound of a shard, counted together at the account (overflow)."),
		unmetered:       counter("unmetered_readings_total", "Readings of meters beyond the bound of a shard, which are in no sum; their calls are counted."),
		late:            counter("late_events_total", "Calls older than the previous window of a limit they belong to."),
		future:          counter("future_events_total", "Calls ahead of the ledger's time, counted at its time."),
		overflows:       counter("overflows_total", "Sums that reached the end of 64 bits and stay there."),
		controls:        counter("control_entries_total", "Control entries folded."),
		asks:            counter("lease_asks_total", "What gateways have said about allowances that they share."),
		answers:         counter("lease_answers_total", "Answers about shared allowances that were sent to gateways."),
		leases:          vec("leases_total", "What happened to shared allowances: grant, recall, denied_early (it may yet come back), denied_final.", "event"),
		ticks:           counter("ticks_total", "Entries appended so that time passes without traffic."),
		deadLetters:     vec("dead_letters_total", "Ledger entries that could not be counted, by reason.", "reason"),
		decisions:       vec("decisions_total", "Decisions published, by verdict.", "verdict"),
		batches:         vec("decision_batches_total", "Batches of decisions by result: stored, unclear.", "result"),
		interruptions:   counter("read_interruptions_total", "Times that reading the ledger was interrupted and began again where it was."),
		decisionLatency: histogram("decision_latency_seconds", "From the time of the call that crossed a threshold to its decision being stored.", 0.0001, 20),
		countLatency:    histogram("count_latency_seconds", "From the sealing of a frame at its gateway to its calls being counted, once caught up.", 0.0001, 20),
		snapshotSeconds: histogram("snapshot_seconds", "From the begin of writing a snapshot to its object being stored.", 0.001, 14),
		snapshotBytes:   gauge("snapshot_bytes", "Size of the newest snapshot."),
		snapshots:       vec("snapshots_total", "Snapshots by result: stored, failed.", "result"),
		queries:         vec("queries_total", "Usage queries by result: answered, refused.", "result"),
		pending:         gauge("pending_entries", "Entries of the ledger that are not read yet."),
		notCaughtUp:     gauge("shards_catching_up", "Shards without any owner, and those of this member that are not counted up to what the ledger held when they became its."),
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
	for i, event := range []string{"grant", "recall", "denied_early", "denied_final"} {
		m.leaseEvents[i] = m.leases.WithLabelValues(event)
	}
	longest := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tollkeeper_aggregator_count_latency_max_seconds", Help: "The longest count latency of the last 15 to 30 s.",
	}, m.slowest.seconds)
	m.all = []prometheus.Collector{
		m.events, m.frames, m.skipped, m.strays, m.apart, m.newAccounts, m.unplaced, m.unmetered, m.late, m.future, m.overflows, m.controls, m.asks, m.answers, m.leases, m.ticks, m.deadLetters, m.decisions,
		m.batches, m.interruptions, m.decisionLatency, m.countLatency, m.snapshotSeconds, m.snapshotBytes, m.snapshots, m.queries,
		m.pending, m.notCaughtUp, longest,
	}
	for i, c := range m.all {
		if err := r.Register(c); err != nil {
			m.all = m.all[:i]
			m.unregister(r)
			return nil, err
		}
	}
	return m, nil
}

// unregister makes room for the metrics of another run in the same process.
func (m *metrics) unregister(r prometheus.Registerer) {
	for _, c := range m.all {
		r.Unregister(c)
	}
}

// shardCollector tells of the shards as they are when it is asked.
type shardCollector struct{ owners []*owner }

var (
	beaconAgeDesc  = prometheus.NewDesc("tollkeeper_aggregator_beacon_age_seconds", "How long ago the owned shard that has been silent for longest sent its last beacon.", nil, nil)
	ownedDesc      = prometheus.NewDesc("tollkeeper_aggregator_shard_owned", "1 for the shards that this member owns and has fenced, 0 for those that it stands by for.", []string{"shard"}, nil)
	allowancesDesc = prometheus.NewDesc("tollkeeper_aggregator_shared_allowances", "Allowances (account, limit, window) of owned shards that gateways hold leases of.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *shardCollector) Describe(to chan<- *prometheus.Desc) {
	to <- beaconAgeDesc
	to <- ownedDesc
	to <- allowancesDesc
}

// Collect implements prometheus.Collector.
func (c *shardCollector) Collect(to chan<- prometheus.Metric) {
	now, age, allowances := time.Now().UnixNano(), int64(0), int64(0)
	for _, o := range c.owners {
		owned := 0.0
		if last := o.lastBeacon.Load(); last != 0 {
			owned, age = 1, max(age, now-last)
		}
		allowances += o.allowances.Load()
		to <- prometheus.MustNewConstMetric(ownedDesc, prometheus.GaugeValue, owned, strconv.FormatUint(uint64(o.shard), 10))
	}
	to <- prometheus.MustNewConstMetric(beaconAgeDesc, prometheus.GaugeValue, time.Duration(age).Seconds())
	to <- prometheus.MustNewConstMetric(allowancesDesc, prometheus.GaugeValue, float64(allowances))
}
