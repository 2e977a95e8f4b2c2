package ownership

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	held, members, standby prometheus.Gauge
	acquired, released     prometheus.Counter
	lapses, lost, fenced   prometheus.Counter
	failed                 prometheus.Counter
	writes                 *prometheus.CounterVec
	readErrors             prometheus.Counter
	renewal                prometheus.Histogram
	all                    []prometheus.Collector
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_ownership_" + name, Help: help})
		m.all = append(m.all, g)
		return g
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_ownership_" + name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	m.held = gauge("shards", "Shards that this member owns.")
	m.standby = gauge("standby_shards", "Shards that this member would own next.")
	m.members = gauge("members", "Members that shards are shared among, as this one sees it.")
	m.acquired = counter("acquired_total", "Shards that this member came to own.")
	m.released = counter("released_total", "Shards whose callback has ended.")
	m.lapses = counter("lapses_total", "Times that this member could not prove its session in time and stopped to act.")
	m.lost = counter("sessions_lost_total", "Sessions of this member that another ended.")
	m.fenced = counter("sessions_fenced_total", "Sessions of others that this member ended.")
	m.failed = counter("failures_total", "Shards that their callback gave up by itself.")
	m.readErrors = counter("read_errors_total", "Readings of the bucket that failed.")
	m.writes = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_ownership_writes_total", Help: "Conditional writes, by what became of them."}, []string{"outcome"})
	m.renewal = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "tollkeeper_ownership_renewal_seconds", Help: "How long renewals of the session took.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12),
	})
	m.all = append(m.all, m.writes, m.renewal)
	if r == nil {
		return m, nil
	}
	for i, c := range m.all {
		if err := r.Register(c); err != nil {
			for _, c := range m.all[:i] {
				r.Unregister(c)
			}
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.all {
		r.Unregister(c)
	}
}
