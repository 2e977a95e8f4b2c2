package alerter

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/alert"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// metrics of the alerter. Rules are labels: they are configured.
type metrics struct {
	episodes       *prometheus.GaugeVec
	transitions    *prometheus.CounterVec
	lag, heartbeat prometheus.Gauge
	accounts       *prometheus.GaugeVec
	sampling, held *prometheus.GaugeVec
	frames         *prometheus.CounterVec
	late           prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tollkeeper_alerter_" + name, Help: help}, labels)
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_alerter_" + name, Help: help}, labels)
	}
	m := &metrics{
		episodes:    gauges("open_episodes", "Episodes that are firing.", "rule", "scope"),
		transitions: counters("transitions_total", "Transitions that this alerter made durable.", "rule", "transition"),
		lag:         prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_alerter_lag_seconds", Help: "How far the evaluation is behind the clock."}),
		heartbeat: prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_alerter_heartbeat_timestamp_seconds",
			Help: "When the rules were last evaluated up to the end of the ledger: alarm when it stands still (dead-man's switch)."}),
		accounts: gauges("accounts", "Accounts in the window by state: active, refused (began to be), still_refused; and tracked, which are remembered.", "rule", "state"),
		sampling: gauges("sampling", "1 if every account is remembered, else one in so many is.", "rule"),
		held:     gauges("resolve_held", "1 if a resolve is held back because the pipeline is behind.", "rule"),
		frames:   counters("frames_total", "Frames of calls read: counted, duplicate, undecodable.", "outcome"),
		late:     prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_alerter_late_calls_total", Help: "Calls that came too late for every rule's window."}),
	}
	for _, c := range []prometheus.Collector{
		m.episodes, m.transitions,
		m.lag, m.heartbeat, m.accounts, m.sampling, m.held, m.frames, m.late,
	} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) open(rule, scope string, firing bool) {
	v := 0.0
	if firing {
		v = 1
	}
	m.episodes.WithLabelValues(rule, scope).Set(v)
}

func (m *metrics) transition(a *usage.Alert) {
	m.transitions.WithLabelValues(a.Rule, string(a.Transition)).Inc()
}

func (m *metrics) detector(rule string, s alert.Stats) {
	for state, n := range map[string]int{"active": s.Active, "refused": s.Refused, "still_refused": s.StillRefused, "tracked": s.Tracked} {
		m.accounts.WithLabelValues(rule, state).Set(float64(n))
	}
	m.sampling.WithLabelValues(rule).Set(float64(s.Sampling))
	held := 0.0
	if s.Held {
		held = 1
	}
	m.held.WithLabelValues(rule).Set(held)
}
