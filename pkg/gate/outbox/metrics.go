package outbox

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Stats is what an outbox has done and holds. Calls unless said otherwise.
type Stats struct {
	Added   int64 // taken by Add
	Acked   int64 // of this producer, acknowledged by the ledger
	Waiting int64 // of this producer, in memory or in the spool
	// Sent sums the calls of this producer that are acknowledged or spooled,
	// each once: the "gateway sent" point of the conservation check.
	Sent Totals

	Spooled int64 // of this producer, written to the spool, also if sent since
	// Recovered sums what this outbox has sent of earlier producers' spools;
	// each of them counted it as Sent itself.
	Recovered       Totals
	RecoveredFrames int64
	// KnownFrames of earlier producers' spools were not sent again: they were known to
	// be acknowledged.
	KnownFrames int64
	// TornSegments: segments of the spool whose end a crash had cut.
	TornSegments int64
	// Damaged stretches of the spool, and files of marks, that are not what was written:
	// calls that were answered as safe may be lost, and leases stay spent.
	Damaged, DamagedMarks int64
	// UnmarkedEnds: closing entries of killed producers that could not say what was
	// used of leases; it stays spent until the windows end.
	UnmarkedEnds int64

	Dropped  int64 // policy Drop
	Refused  int64 // Add returned ErrFull
	Invalid  int64 // Add returned an *usage.InvalidError
	Rejected int64 // in frames that the ledger can never take

	Frames, Resent, RejectedFrames int64 // acknowledged; sent more than once; given up
	Bytes                          int64 // of acknowledged frames
	InFlight                       int64 // frames sent and not acknowledged
	MemoryBytes                    int64 // taken of Options.MemoryBytes
	SpoolBytes                     int64 // files of this and earlier producers
	SpoolFailing, Full             bool  // alarms
	// OldestUnsent is the age of the oldest call that is not acknowledged.
	OldestUnsent time.Duration
	Connected    bool
}

// counts are the sender's own.
type counts struct {
	acked, frames, resent, bytes, rejected, rejectedFrames int64
	spooled, recoveredFrames, knownFrames, torn, unmarked  int64
	damaged, damagedMarks                                  int64
	sent, recovered                                        Totals
	inflight                                               int64
	oldest                                                 usage.Micros
	connected                                              bool
}

func (s *sender) count(f func(*counts)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// Stats returns what the outbox has done and holds.
func (o *Outbox) Stats() Stats {
	o.s.mu.Lock()
	c := o.s.stats
	c.sent, c.recovered = c.sent.Clone(), c.recovered.Clone()
	o.s.mu.Unlock()
	st := Stats{
		Acked: c.acked, Sent: c.sent, Dropped: o.dropped.Load(), Refused: o.refused.Load(), Invalid: o.invalid.Load(), Rejected: c.rejected,
		Frames: c.frames, Resent: c.resent, RejectedFrames: c.rejectedFrames, Bytes: c.bytes,
		Spooled: c.spooled, Recovered: c.recovered, RecoveredFrames: c.recoveredFrames, KnownFrames: c.knownFrames, TornSegments: c.torn, UnmarkedEnds: c.unmarked,
		Damaged: c.damaged, DamagedMarks: c.damagedMarks,
		InFlight: c.inflight, MemoryBytes: o.budget.Used(), Connected: c.connected, SpoolFailing: o.spoolFails.Load(), Full: o.full.Load(),
	}
	if d := o.s.disk; d != nil {
		st.MemoryBytes += d.budget.Used()
		st.SpoolBytes = d.store.Bytes()
	}
	for i := range o.gathers {
		g := &o.gathers[i]
		g.mu.Lock()
		st.Added += int64(g.added)
		g.mu.Unlock()
	}
	st.Waiting = st.Added - st.Acked - st.Rejected
	if c.oldest > 0 {
		st.OldestUnsent = max(0, time.Duration(int64(o.now()-c.oldest))*time.Microsecond)
	}
	return st
}

// metrics is the collector of an outbox.
type metrics struct {
	o       *Outbox
	reg     prometheus.Registerer
	latency prometheus.Histogram
	calls   *prometheus.Desc
	frames  *prometheus.Desc
	damages *prometheus.Desc
	gauges  []gauge
}

type gauge struct {
	desc  *prometheus.Desc
	value func(*Stats) float64
}

func newMetrics(o *Outbox, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		o: o, reg: reg,
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tollkeeper_outbox_ack_latency_seconds", Help: "From sending a frame to its acknowledgement.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 13),
		}),
		calls:   prometheus.NewDesc("tollkeeper_outbox_calls_total", "Calls by what became of them.", []string{"outcome"}, nil),
		frames:  prometheus.NewDesc("tollkeeper_outbox_frames_total", "Frames by what became of them.", []string{"outcome"}, nil),
		damages: prometheus.NewDesc("tollkeeper_outbox_damages_total", "Damage met in the spool, in its segments (answered calls may be lost) or marks (leases stay spent until the windows end): alarm.", []string{"file"}, nil),
	}
	add := func(name, help string, value func(*Stats) float64) {
		m.gauges = append(m.gauges, gauge{prometheus.NewDesc("tollkeeper_outbox_"+name, help, nil, nil), value})
	}
	add("inflight", "Frames sent and not acknowledged.", func(s *Stats) float64 { return float64(s.InFlight) })
	add("memory_bytes", "Memory taken by calls and frames.", func(s *Stats) float64 { return float64(s.MemoryBytes) })
	add("oldest_unsent_seconds", "Age of the oldest call that is not acknowledged.", func(s *Stats) float64 { return s.OldestUnsent.Seconds() })
	add("waiting_calls", "Calls that are not acknowledged, in memory or in the spool.", func(s *Stats) float64 { return float64(s.Waiting) })
	add("spool_bytes", "Size of the spool on disk, earlier producers' included.", func(s *Stats) float64 { return float64(s.SpoolBytes) })
	add("spool_failing", "1 while the spool is full or can't be written: alarm.", func(s *Stats) float64 { return flag(s.SpoolFailing) })
	add("full", "1 while calls wait, are refused or dropped for want of room: alarm.", func(s *Stats) float64 { return flag(s.Full) })
	add("unmarked_ends", "Closing entries of killed gateways that could not say what was used of leases: it stays spent until the windows end.", func(s *Stats) float64 { return float64(s.UnmarkedEnds) })
	add("connected", "1 while NATS is connected.", func(s *Stats) float64 { return flag(s.Connected) })
	if reg != nil {
		if err := reg.Register(m); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m *metrics) unregister() {
	if m.reg != nil {
		m.reg.Unregister(m)
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	st := m.o.Stats()
	for outcome, n := range map[string]int64{
		"added": st.Added, "acked": st.Acked, "spooled": st.Spooled, "recovered": st.Recovered.Admitted + st.Recovered.Refused, "dropped": st.Dropped, "refused": st.Refused, "invalid": st.Invalid, "rejected": st.Rejected,
	} {
		ch <- prometheus.MustNewConstMetric(m.calls, prometheus.CounterValue, float64(n), outcome)
	}
	for outcome, n := range map[string]int64{"acked": st.Frames, "resent": st.Resent, "recovered": st.RecoveredFrames, "known": st.KnownFrames, "rejected": st.RejectedFrames} {
		ch <- prometheus.MustNewConstMetric(m.frames, prometheus.CounterValue, float64(n), outcome)
	}
	ch <- prometheus.MustNewConstMetric(m.damages, prometheus.CounterValue, float64(st.Damaged), "segment")
	ch <- prometheus.MustNewConstMetric(m.damages, prometheus.CounterValue, float64(st.DamagedMarks), "marks")
	for _, g := range m.gauges {
		ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, g.value(&st))
	}
	m.latency.Collect(ch)
}

// trouble logs a lasting problem once when it begins or changes and once when
// it is over.
type trouble struct {
	log   zerolog.Logger
	last  string
	on    bool
	grave bool          // an error for a person, not only a warning
	hold  time.Duration // for how long it must be gone before that is told
	since time.Time     // told
	seen  time.Time     // last heard of
}

// steady is for how long a problem that comes and goes must be gone.
const steady = 2 * time.Second

func (t *trouble) is(now time.Time, what string) {
	t.seen = now
	if !t.on || what != t.last {
		t.last, t.on, t.since = what, true, now
		level := zerolog.WarnLevel
		if t.grave {
			level = zerolog.ErrorLevel
		}
		t.log.WithLevel(level).Msg(what)
	}
}

func (t *trouble) over(now time.Time, what string) {
	if !t.on || now.Sub(t.seen) < t.hold {
		return
	}
	t.on = false
	t.log.Info().Dur("after", now.Sub(t.since)).Msg(what)
}
