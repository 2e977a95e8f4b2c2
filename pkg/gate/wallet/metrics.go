package wallet

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// otherMeter labels what users call their own meters: those are not bounded.
const otherMeter = "other"

func meterLabel(m usage.Meter) int {
	if i, ok := m.Index(); ok {
		return int(i)
	}
	return int(usage.NumBuiltIn)
}

type metrics struct {
	asks, lost, answers, grants, above, undecodable prometheus.Counter
	marks, unnoted                                  prometheus.Counter
	waits                                           prometheus.Histogram
	takes                                           *prometheus.CounterVec
	byStanding                                      [Closed + 1]prometheus.Counter
	refusals                                        *prometheus.CounterVec
	bounds                                          [Reservations + 1]prometheus.Counter
	outstanding, held                               [usage.NumBuiltIn + 1]atomic.Int64

	registerer prometheus.Registerer
	registered []prometheus.Collector
}

func newMetrics(w *Wallet, r prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_gate_lease_" + name, Help: help})
	}
	m := &metrics{
		asks:        counter("asks_total", "Asks that are in the ledger."),
		lost:        counter("lost_asks_total", "Asks that did not get into the ledger, as far as is known; they are said again."),
		answers:     counter("answers_total", "Answers of shards' owners."),
		grants:      counter("grants_total", "Answers that brought units."),
		above:       counter("above_reservation_units_total", "Units that calls cost beyond their reservations."),
		undecodable: counter("undecodable_total", "Answers, and decisions in them, that could not be read."),
		marks:       counter("marks_total", "Marks of how much of leases can have been used that were noted."),
		unnoted:     counter("unnoted_marks_total", "Marks that could not be noted: their units are not used until they are."),
		waits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tollkeeper_gate_lease_wait_seconds", Help: "How long calls waited for units that had to be fetched.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
		}),
		takes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tollkeeper_gate_lease_takes_total", Help: "Calls that could not be admitted from what was at hand, by what became of them; denied_early: others held what was left.",
		}, []string{"standing"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tollkeeper_gate_lease_bound_refusals_total", Help: "Calls refused because one of the gateway's bounds for leases is reached.",
		}, []string{"bound"}),
		registerer: r,
	}
	for b, name := range [...]string{Unbounded: "window_unknown", Purses: "purses", Waiting: "waiting_calls", Reservations: "reservations"} {
		m.bounds[b] = m.refusals.WithLabelValues(name)
	}
	for s, name := range [...]string{Taken: "taken", Denied: "denied", DeniedEarly: "denied_early", NoAnswer: "no_answer", Turning: "window_turning", Busy: "busy", Closed: "closed"} {
		m.byStanding[s] = m.takes.WithLabelValues(name)
	}
	if r == nil {
		return m, nil
	}
	gauge := func(name, help string, labels prometheus.Labels, f func() int64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tollkeeper_gate_lease_" + name, Help: help, ConstLabels: labels}, func() float64 { return float64(f()) })
	}
	all := []prometheus.Collector{
		m.asks, m.lost, m.answers, m.grants, m.above, m.undecodable, m.marks, m.unnoted, m.waits, m.takes, m.refusals,
		gauge("purses", "Open purses.", nil, w.purses.Load),
		gauge("purses_bound", "How many purses may be open.", nil, func() int64 { return int64(w.o.MaxPurses) }),
		gauge("shelved_purses", "Purses that nobody needs now, of windows that are not over.", nil, w.shelved.Load),
		gauge("shelved_purses_bound", "How many purses may be shelved; beyond, they stay open.", nil, func() int64 { return int64(w.o.MaxShelved) }),
		gauge("waiting_calls", "Calls that wait for units.", nil, w.waiting.Load),
		gauge("open_reservations", "Reservations that are not settled.", nil, func() int64 { return int64(w.holds.Counts().Open) }),
		gauge("expired_reservations", "Reservations that passed their deadline and are not settled: they stay held.", nil, func() int64 { return int64(w.holds.Counts().Expired) }),
	}
	for i := range m.outstanding {
		name := otherMeter
		if i < int(usage.NumBuiltIn) {
			name = string(usage.BuiltInMeters()[i])
		}
		labels := prometheus.Labels{"meter": name}
		all = append(all,
			gauge("outstanding_units", "Units of leases that are neither reported as used nor given back, by the newest asks.", labels, m.outstanding[i].Load),
			gauge("held_units", "Units reserved for calls under way, by the newest asks.", labels, m.held[i].Load))
	}
	for _, c := range all {
		if err := r.Register(c); err != nil {
			m.unregister()
			return nil, err
		}
		m.registered = append(m.registered, c)
	}
	return m, nil
}

// unregister: a gate that runs again has another wallet.
func (m *metrics) unregister() {
	for _, c := range m.registered {
		m.registerer.Unregister(c)
	}
	m.registered = nil
}

func (m *metrics) standing(s Standing) { m.byStanding[s].Inc() }

// sent replaces what an older ask of a purse said by what a newer one says.
func (m *metrics) sent(meter int, old, now *lease.Ask) {
	out := func(a *lease.Ask) int64 { return a.Known - a.Used - a.Returned }
	m.outstanding[meter].Add(out(now) - out(old))
	m.held[meter].Add(now.Held - old.Held)
}
