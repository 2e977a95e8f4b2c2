package historian

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	rows, blocks, retries *prometheus.CounterVec // by table
	seconds               *prometheus.HistogramVec
	lagSeconds            *prometheus.GaugeVec // by lane
	lagEntries, position  *prometheus.GaugeVec
	repeated              *prometheus.CounterVec // by kind
	gaps                  prometheus.Counter
	undecodable           *prometheus.CounterVec // by lane and reason
	purged                *prometheus.CounterVec // by lane
	snapshotBytes         prometheus.Gauge
	snapshotPosition      prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		rows:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_historian_rows_total", Help: "Rows that ClickHouse has acknowledged."}, []string{"table"}),
		blocks:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_historian_blocks_total", Help: "Blocks that ClickHouse has acknowledged."}, []string{"table"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_historian_insert_retries_total", Help: "Tries to insert a block that left it in doubt."}, []string{"table"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "tollkeeper_historian_insert_seconds", Help: "Time of an insert that was acknowledged.",
			Buckets: prometheus.ExponentialBuckets(0.002, 2, 13)}, []string{"table"}),
		lagSeconds: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tollkeeper_historian_lag_seconds", Help: "Age of the oldest entry that is not in the history yet, by the stream's time; 0 when there is none."}, []string{"lane"}),
		lagEntries: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tollkeeper_historian_lag_entries", Help: "Entries of the stream that are not in the history yet."}, []string{"lane"}),
		position:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tollkeeper_historian_durable_position", Help: "Stream sequence up to which everything is in the history."}, []string{"lane"}),
		repeated:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_historian_duplicates_total", Help: "Frames or foreign events that were seen before and left out."}, []string{"kind"}),
		gaps:       prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_historian_skipped_frames_total", Help: "Frame numbers that a producer skipped: calls that were sent and never came."}),
		undecodable: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_historian_undecodable_total",
			Help: "Entries left out because they cannot be decoded; the aggregator keeps those of the ledger in the dead-letter stream."}, []string{"lane", "reason"}),
		purged:           prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_historian_purged_total", Help: "Times that entries were gone from a stream before they were read."}, []string{"lane"}),
		snapshotBytes:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_historian_snapshot_bytes", Help: "Size of the newest snapshot of what has been seen."}),
		snapshotPosition: prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_historian_snapshot_position", Help: "Ledger sequence of the newest snapshot."}),
	}
	for _, c := range []prometheus.Collector{m.rows, m.blocks, m.retries, m.seconds, m.lagSeconds, m.lagEntries, m.position, m.repeated, m.gaps, m.undecodable, m.purged, m.snapshotBytes, m.snapshotPosition} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// lag is how far a lane's history is behind its stream.
func (m *metrics) lag(lane string, entries uint64, oldest time.Time, now time.Time) {
	m.lagEntries.WithLabelValues(lane).Set(float64(entries))
	seconds := 0.0
	if entries > 0 && !oldest.IsZero() {
		seconds = max(0, now.Sub(oldest).Seconds())
	}
	m.lagSeconds.WithLabelValues(lane).Set(seconds)
}
