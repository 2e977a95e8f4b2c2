package front

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// LivePattern is the route of the live view, which never ends.
const LivePattern = "GET /v1/live"

// Metrics of the console.
type Metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	// Streams is how many clients follow the live view.
	Streams prometheus.Gauge
}

// NewMetrics registers them.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tollkeeper_console_requests_total", Help: "Requests to the console, by route and status.",
		}, []string{"route", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "tollkeeper_console_request_seconds", Help: "Duration of requests to the console, streams left out.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10},
		}, []string{"route"}),
		Streams: prometheus.NewGauge(prometheus.GaugeOpts{Name: "tollkeeper_console_live_streams", Help: "Clients that follow /v1/live."}),
	}
	for _, c := range []prometheus.Collector{m.requests, m.seconds, m.Streams} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("console: %w", err)
		}
	}
	return m, nil
}

// Observe counts a request under the pattern that matched, which is one of a few.
func (m *Metrics) Observe(r *http.Request, status int, took time.Duration) {
	route := r.Pattern
	if route == "" {
		route = "refused"
	}
	m.requests.WithLabelValues(route, strconv.Itoa(status)).Inc()
	if route != LivePattern {
		m.seconds.WithLabelValues(route).Observe(took.Seconds())
	}
}
