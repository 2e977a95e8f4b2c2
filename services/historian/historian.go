// Package historian brings the ledger into ClickHouse: calls, decisions, control
// entries and alerts, each row exactly once, whatever is killed in between.
package historian

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/blocks"
	"github.com/tollkeeper/tollkeeper/services/internal/folds"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Options of a historian. One may be at work on a ledger; a second one stops
// with an error as soon as both have written.
type Options struct {
	// NATS is where the ledger is.
	NATS natsconn.Options
	// ClickHouse is where the history is. Its Logger and Readiness are set by Run
	// when they are not.
	ClickHouse history.Options
	// Provision says how the streams are to be made when there are none yet.
	Provision ledger.ProvisionOptions

	Logger zerolog.Logger
	// Registerer gets the metrics; also what AdminListen serves. Needed.
	Registerer *prometheus.Registry
	// AdminListen serves /metrics, /healthz and /readyz; empty: nothing.
	AdminListen string
	// AdminToken, if set, must be shown there; needed when other machines can
	// reach it.
	AdminToken string
	// Readiness, if set, hears how the historian does.
	Readiness *telemetry.Readiness

	// Horizon of foreign events' de-duplication; a day when 0. Like the
	// aggregator's. A ledger that was begun with one goes on with it.
	Horizon time.Duration
	// MaxRows of a block: 100,000 when 0. More is a little faster and takes more
	// memory: some 300 bytes a row, twice.
	MaxRows int
	// MaxAge is how long a call may wait for its block when nothing more comes:
	// a second when 0. Every block is three inserts, about 60 ms of a core.
	MaxAge time.Duration
	// SnapshotEvery is after how many blocks of calls the fold of the ledger is
	// stored: 64 when 0. A restart reads that many again.
	SnapshotEvery int
}

const (
	defaultMaxRows       = 100_000
	maxMaxRows           = 1_000_000 // the server would split a larger block
	defaultMaxAge        = time.Second
	defaultSnapshotEvery = 64
	// maxBlockBytes bounds a block by the size of its frames.
	maxBlockBytes = 64 << 20
	// maxBlockEntries bounds it by their number.
	maxBlockEntries = 50_000
	// maxStall is how long a block may stay open in any case.
	maxStall = 10 * time.Second
	// nearEntries is how near the stream's end the reader is when a block's age
	// begins to count: before, it fills by itself.
	nearEntries = 64
	// insertGrace is how long an insert may go on after the order to stop.
	insertGrace = 2 * time.Second
)

func (o *Options) check() error {
	switch {
	case o.Registerer == nil:
		return errors.New("historian: no registry for metrics is given")
	case o.MaxRows < 0 || o.MaxRows > maxMaxRows:
		return fmt.Errorf("historian: blocks of %d rows: choose 1 to %d", o.MaxRows, maxMaxRows)
	case o.MaxAge < 0 || o.MaxAge > maxStall:
		return fmt.Errorf("historian: a block's age of %s: choose up to %s", o.MaxAge, maxStall)
	case o.Horizon < 0 || o.SnapshotEvery < 0:
		return errors.New("historian: horizon and snapshot interval must not be negative")
	}
	if o.MaxRows == 0 {
		o.MaxRows = defaultMaxRows
	}
	if o.MaxAge == 0 {
		o.MaxAge = defaultMaxAge
	}
	if o.SnapshotEvery == 0 {
		o.SnapshotEvery = defaultSnapshotEvery
	}
	if o.Readiness == nil {
		o.Readiness = telemetry.NewReadiness()
	}
	return nil
}

// Run is a historian until ctx is done; it returns nil then. While NATS or
// ClickHouse is away it waits and says so on /readyz. What it was doing when it
// stopped is done by the next run. It returns an error for wrong options, refused
// credentials, tables of another version or another ledger, and when a second
// historian is at work.
func Run(ctx context.Context, o Options) error { return run(ctx, o, seams{}) }

// seams are where tests come between the historian and what it writes to.
type seams struct {
	part    func(part) part
	journal func(lane string, j journal) journal
	grace   time.Duration // of an insert in flight; insertGrace when 0, none when negative
}

func run(ctx context.Context, o Options, s seams) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return fmt.Errorf("historian: metrics: %w", err)
	}
	// Every lane is known to /readyz before it is served: without components it
	// says that all is well.
	components := map[string]ready{}
	for _, lane := range []string{"calls", "control", "decisions", "alerts"} {
		components[lane] = o.Readiness.Component("historian_" + lane)
	}
	group, ctx := errgroup.WithContext(ctx)
	if o.AdminListen != "" {
		group.Go(func() error {
			return telemetry.Serve(ctx, telemetry.ServeOptions{Flag: "admin-listen", Addr: o.AdminListen, Token: o.AdminToken,
				Handler: telemetry.NewHandler(telemetry.HandlerOptions{Gatherer: o.Registerer, Readiness: o.Readiness})})
		})
	}
	group.Go(func() error { return work(ctx, o, s, m, components) })
	return group.Wait()
}

func work(ctx context.Context, o Options, s seams, m *metrics, components map[string]ready) (err error) {
	if o.NATS.Readiness == nil {
		o.NATS.Readiness = o.Readiness.Component("historian_nats")
	}
	if o.NATS.Name == "" {
		o.NATS.Name = "historian"
	}
	o.ClickHouse.Logger = o.Logger
	if o.ClickHouse.Readiness == nil {
		o.ClickHouse.Readiness = o.Readiness.Component("historian_clickhouse")
	}
	nc, err := natsconn.Connect(ctx, o.NATS)
	if err != nil {
		return stopped(ctx, err)
	}
	defer nc.Close()
	js, geometry, err := provision(ctx, nc, o)
	if err != nil {
		return stopped(ctx, err)
	}
	h, err := history.Open(ctx, o.ClickHouse)
	if err != nil {
		return stopped(ctx, err)
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	if err := h.Migrate(ctx); err != nil {
		return stopped(ctx, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return watch(ctx, h) })
	for _, l := range lanes(o, s, m, js, h, components, geometry) {
		group.Go(func() error { return l.run(ctx) })
	}
	return group.Wait()
}

// watchEvery is how often ClickHouse is asked whether it is there: without calls
// nobody else would find out.
const watchEvery = 2 * time.Second

// watch asks until ctx is done; the answers go to /readyz and the log.
func watch(ctx context.Context, h *history.History) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			_ = h.Ping(ctx) // has told readiness
		case <-ctx.Done():
			return nil
		}
	}
}

// stopped turns what a stop interrupted into a clean end.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func provision(ctx context.Context, nc *nats.Conn, o Options) (jetstream.JetStream, ledger.Geometry, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, ledger.Geometry{}, fmt.Errorf("JetStream: %w", err)
	}
	for try := 0; ; try++ {
		bounded, cancel := context.WithTimeout(ctx, 10*time.Second)
		geometry, err := ledger.Provision(bounded, js, o.Provision)
		cancel()
		if err == nil {
			return js, geometry, nil
		}
		o.Logger.Warn().Err(err).Msg("the ledger's streams can't be made or found yet: trying again")
		if perr := pause(ctx, try); perr != nil {
			return nil, ledger.Geometry{}, perr
		}
	}
}

func lanes(o Options, s seams, m *metrics, js jetstream.JetStream, h *history.History, components map[string]ready, geometry ledger.Geometry) []*lane {
	wrap := func(parts []history.Part) []part {
		out := make([]part, len(parts))
		for i := range parts {
			out[i] = &parts[i]
			if s.part != nil {
				out[i] = s.part(out[i])
			}
		}
		return out
	}
	grace := insertGrace
	if s.grace != 0 {
		grace = max(s.grace, 0)
	}
	base := func(name, stream string, into []string, subjects ...string) *lane {
		l := &lane{
			name: name, into: into, stream: stream, subjects: subjects,
			limits: blocks.Limits{Rows: o.MaxRows, Bytes: maxBlockBytes, Entries: maxBlockEntries, Age: o.MaxAge, Stall: maxStall},
			grace:  grace, js: js, journal: &kvJournal{js: js, key: name}, tables: h,
			metrics: m, ready: components[name], log: o.Logger,
		}
		if s.journal != nil {
			l.journal = s.journal(name, l.journal)
		}
		return l
	}

	all := base("calls", ledger.Stream, []string{"calls", "usage_hourly", "traffic_minute"})
	all.gather = newCalls(usage.Micros(o.Horizon.Microseconds()), geometry.Currency, func(b *history.Block) []part { return wrap(h.Parts(b)) }, m, o.Logger)
	all.snapshots, all.snapshotEvery = &folds.Store{JS: js, Bucket: ledger.SnapshotsBucket, Name: "historian/calls"}, o.SnapshotEvery

	control := base("control", ledger.Stream, []string{"control", "corrections"}, ledger.AllControl, ledger.AllClosings)
	control.gather = &pump[act]{lane: "control", read: readControl, metrics: m, log: o.Logger,
		parts: func(acts []act, s blocks.Span) []part {
			rows, corrections := actRows(acts)
			return wrap(append(h.ControlParts(rows, s.From, s.To), h.CorrectionParts(corrections, s.From, s.To)...))
		}}

	control.leader = all // which a newer program's snapshot may have told

	decisions := base("decisions", "KV_"+ledger.DecisionsBucket, []string{"decisions"})
	decisions.gather = &pump[history.DecisionRow]{lane: "decisions", read: readDecision, metrics: m, log: o.Logger,
		parts: func(rows []history.DecisionRow, s blocks.Span) []part {
			return wrap(h.DecisionParts(rows, s.From, s.To))
		}}
	decisions.purgeIsFine = true

	alerts := base("alerts", ledger.AlertsStream, []string{"alerts"})
	alerts.gather = &pump[history.AlertRow]{lane: "alerts", read: readAlert, metrics: m, log: o.Logger,
		parts: func(rows []history.AlertRow, s blocks.Span) []part { return wrap(h.AlertParts(rows, s.From, s.To)) }}
	alerts.purgeIsFine = true
	return []*lane{all, control, decisions, alerts}
}
