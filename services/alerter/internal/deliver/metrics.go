package deliver

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics of deliveries; receivers are labels: they are configured.
type Metrics struct {
	deliveries, refreshes *prometheus.CounterVec
	took, latency         *prometheus.HistogramVec
	undelivered, disabled *prometheus.GaugeVec
}

// NewMetrics registers the metrics of deliveries.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	gauges := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tollkeeper_alerter_" + name, Help: help}, []string{"receiver"})
	}
	counters := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_alerter_" + name, Help: help}, []string{"receiver", "outcome"})
	}
	histograms := func(name, help string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "tollkeeper_alerter_" + name, Help: help,
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800},
		}, []string{"receiver"})
	}
	m := &Metrics{
		deliveries:  counters("deliveries_total", "Attempts to deliver a transition, by outcome; \"delivered\" is a 2xx."),
		refreshes:   counters("refreshes_total", "Repetitions of the active alerts to an Alertmanager."),
		took:        histograms("delivery_seconds", "How long a receiver took to answer."),
		latency:     histograms("transition_delivered_seconds", "From a transition, by the ledger's time, to the receiver's 2xx."),
		undelivered: gauges("undelivered_transitions", "Transitions that wait for a receiver, as of its last delivery."),
		disabled:    gauges("receiver_disabled", "1 if the receiver answered 410 and is told of nothing any more."),
	}
	for _, c := range []prometheus.Collector{m.deliveries, m.refreshes, m.took, m.latency, m.undelivered, m.disabled} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
