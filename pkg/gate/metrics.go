package gate

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

type metrics struct {
	refusals      *prometheus.CounterVec
	calls         *prometheus.CounterVec
	unknownPassed prometheus.Counter
	unsettled     prometheus.Counter
	outdated      prometheus.Counter
	decisions     *prometheus.CounterVec
	undecoded     *prometheus.CounterVec
	resyncs       *prometheus.CounterVec
	latencies     prometheus.Histogram
	implausible   prometheus.Counter
	maxLatency    atomic.Int64 // nanoseconds
	byCode        map[usage.Code]prometheus.Counter
	outcomes      map[outcome]prometheus.Counter
}

// maxPlausibleLatency: a replay keeps the time stamps of its trace as event
// times, and then the age of a decision's cause is not a latency.
const maxPlausibleLatency = time.Hour

// outcome of a call as the middleware saw it.
type outcome string

const (
	admitted        outcome = "admitted"
	refusedOutcome  outcome = "refused"
	unauthenticated outcome = "unauthenticated"
	unreadable      outcome = "unreadable"
	unmetered       outcome = "outbox_full"
)

func newMetrics(r prometheus.Registerer, g *Gate) (*metrics, error) {
	m := &metrics{
		refusals:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_gate_refusals_total", Help: "Calls that were refused admission, by code."}, []string{"code"}),
		calls:         prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_gate_calls_total", Help: "Calls that the middleware answered, by outcome."}, []string{"outcome"}),
		unknownPassed: prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_gate_unknown_passed_total", Help: "Calls that were let through under the policy for unknown verdicts."}),
		unsettled:     prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_gate_unsettled_total", Help: "Finished calls that the outbox did not take: they are not metered."}),
		outdated:      prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_gate_outdated_decisions_total", Help: "Decisions that came after a newer revision and were ignored."}),
		decisions:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_gate_decisions_total", Help: "Decisions that changed the table, by verdict."}, []string{"verdict"}),
		undecoded:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_gate_undecodable_total", Help: "Records of the feeds that could not be read."}, []string{"feed"}),
		resyncs:       prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tollkeeper_gate_resyncs_total", Help: "Times a bucket was read as a whole."}, []string{"bucket"}),
		latencies: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tollkeeper_gate_decision_latency_seconds", Help: "From the beginning of the call that crossed a threshold to the decision's arrival here.",
			Buckets: []float64{.0005, .001, .002, .003, .005, .0075, .01, .015, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60},
		}),
		implausible: prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_gate_decision_latency_skipped_total", Help: "Decisions whose cause lies in the future or over an hour back (a replay's own times)."}),
		byCode:      make(map[usage.Code]prometheus.Counter),
		outcomes:    make(map[outcome]prometheus.Counter),
	}
	for _, c := range []usage.Code{
		usage.QuotaExceeded, usage.SpendCapReached, usage.CreditsDepleted, usage.CreditsInsufficient, usage.SubscriptionExpired,
		usage.TrialEnded, usage.PaymentFailed, usage.PlanRequired, usage.RateLimited, usage.CostExceedsLimit, usage.BillingStateUnknown,
	} {
		m.byCode[c] = m.refusals.WithLabelValues(string(c))
	}
	for _, o := range []outcome{admitted, refusedOutcome, unauthenticated, unreadable, unmetered} {
		m.outcomes[o] = m.calls.WithLabelValues(string(o))
	}
	if r == nil {
		return m, nil
	}
	size := func(f func(accounts, keys int, held table.Size) float64) func() float64 {
		return func() float64 {
			d, t := g.directory.Load(), g.table.Load()
			if d == nil || t == nil {
				return 0
			}
			accounts, keys := d.Size()
			return f(accounts, keys, t.Size())
		}
	}
	for _, c := range []prometheus.Collector{
		m.refusals, m.calls, m.unknownPassed, m.unsettled, m.outdated, m.decisions, m.undecoded, m.resyncs, m.latencies, m.implausible,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tollkeeper_gate_decision_latency_max_seconds", Help: "The longest decision latency since the start."},
			func() float64 { return time.Duration(m.maxLatency.Load()).Seconds() }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tollkeeper_gate_accounts", Help: "Accounts in the local directory."}, size(func(accounts, _ int, _ table.Size) float64 { return float64(accounts) })),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tollkeeper_gate_keys", Help: "API keys in the local directory."}, size(func(_, keys int, _ table.Size) float64 { return float64(keys) })),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tollkeeper_gate_exceptional_accounts", Help: "Accounts with a deny or a warning against them."}, size(func(_, _ int, held table.Size) float64 { return float64(held.Exceptional) })),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tollkeeper_gate_accounts_at_hand", Help: "Accounts of the local directory that were asked for since the start."}, size(func(_, _ int, held table.Size) float64 { return float64(held.Accounts) })),
	} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) refused(c usage.Code) {
	if n, ok := m.byCode[c]; ok {
		n.Inc()
		return
	}
	m.refusals.WithLabelValues("other").Inc()
}

func (m *metrics) undecodable(feed string) { m.undecoded.WithLabelValues(feed).Inc() }

func (m *metrics) applied(v usage.Verdict) {
	switch v {
	case usage.Allow, usage.Warn, usage.Deny:
		m.decisions.WithLabelValues(v.String()).Inc()
	default:
		m.decisions.WithLabelValues("other").Inc()
	}
}

func (m *metrics) latency(d time.Duration) {
	if d < 0 || d > maxPlausibleLatency {
		m.implausible.Inc()
		return
	}
	m.latencies.Observe(d.Seconds())
	for {
		old := m.maxLatency.Load()
		if int64(d) <= old || m.maxLatency.CompareAndSwap(old, int64(d)) {
			return
		}
	}
}
