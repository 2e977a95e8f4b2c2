// Package auditor holds four points against each other, all the time: what
// gateways say they have sent, what the ledger has, what the counters have, and
// what ClickHouse has; by account and minute, count, sums and an order-independent
// hash. A gap or a double is a finding, with its minute and account.
package auditor

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
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/books"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Options of an auditor. One is at work on a ledger; a second one finds the same
// and is only of more work.
type Options struct {
	// NATS is where the ledger is.
	NATS natsconn.Options
	// ClickHouse is where the history is; without addresses it is not audited.
	ClickHouse history.Options
	// Provision says how the streams are to be made when there are none yet.
	Provision ledger.ProvisionOptions

	Logger zerolog.Logger
	// Registerer gets the metrics; also what AdminListen serves. Needed.
	Registerer *prometheus.Registry
	// AdminListen serves /metrics, /healthz and /readyz; empty: nothing.
	// AdminToken, if set, must be shown there.
	AdminListen, AdminToken string
	// Readiness, if set, hears how the auditor does.
	Readiness *telemetry.Readiness

	// Horizon of foreign events' de-duplication; a day when 0. Like the
	// aggregator's.
	Horizon time.Duration
	// Every is how often a stretch of the ledger is compared with the history
	// and with the counters; 10 s when 0.
	Every time.Duration
	// Again is after how long a stretch is compared with the history once more:
	// what came or went since is found; 10 min when 0.
	Again time.Duration
	// Overdue is how long a claimed frame may be on its way before it is a gap;
	// 10 min when 0. Unclaimed is how long a frame waits for its claim; 2 min
	// when 0.
	Overdue, Unclaimed time.Duration
	// Keep is for how long a finding that nothing heals stays open; 7 days when 0.
	Keep time.Duration
	// SaveEvery is how often the books are stored; a minute when 0.
	SaveEvery time.Duration
	// Cells bounds the accounts and minutes that are told apart at once, Accounts
	// those whose lifetime is held against the counters; 500,000 and 1,000,000
	// when 0.
	Cells, Accounts int
}

func (o *Options) check() error {
	if o.Registerer == nil {
		return errors.New("auditor: no registry for metrics is given")
	}
	for _, d := range []*time.Duration{&o.Horizon, &o.Every, &o.Again, &o.Overdue, &o.Unclaimed, &o.Keep, &o.SaveEvery} {
		if *d < 0 {
			return errors.New("auditor: intervals must not be negative")
		}
	}
	for _, d := range []struct {
		d     *time.Duration
		value time.Duration
	}{
		{&o.Every, 10 * time.Second}, {&o.Again, 10 * time.Minute}, {&o.Keep, 7 * 24 * time.Hour}, {&o.SaveEvery, time.Minute},
	} {
		if *d.d == 0 {
			*d.d = d.value
		}
	}
	if o.Cells <= 0 {
		o.Cells = 500_000
	}
	if o.Readiness == nil {
		o.Readiness = telemetry.NewReadiness()
	}
	return nil
}

func (o *Options) books() books.Options {
	return books.Options{Horizon: usage.Micros(o.Horizon.Microseconds()), Cells: o.Cells, Accounts: o.Accounts, Unclaimed: o.Unclaimed, Overdue: o.Overdue}
}

// Run audits until ctx is done and returns nil then. While NATS or ClickHouse is
// away it waits and says so on /readyz. What it knew when it stopped is known to
// the next run. It returns an error for wrong options and refused credentials.
func Run(ctx context.Context, o Options) error {
	if err := o.check(); err != nil {
		return err
	}
	m := &metrics{}
	if err := o.Registerer.Register(m); err != nil {
		return fmt.Errorf("auditor: metrics: %w", err)
	}
	defer o.Registerer.Unregister(m)
	ready := o.Readiness.Component("auditor")
	group, ctx := errgroup.WithContext(ctx)
	if o.AdminListen != "" {
		group.Go(func() error {
			return telemetry.Serve(ctx, telemetry.ServeOptions{Flag: "admin-listen", Addr: o.AdminListen, Token: o.AdminToken,
				Handler: telemetry.NewHandler(telemetry.HandlerOptions{Gatherer: o.Registerer, Readiness: o.Readiness})})
		})
	}
	group.Go(func() error { return work(ctx, o, m, ready) })
	return group.Wait()
}

func work(ctx context.Context, o Options, m *metrics, ready *telemetry.Component) error {
	if o.NATS.Readiness == nil {
		o.NATS.Readiness = o.Readiness.Component("auditor_nats")
	}
	if o.NATS.Name == "" {
		o.NATS.Name = "auditor"
	}
	nc, err := natsconn.Connect(ctx, o.NATS)
	if err != nil {
		return stopped(ctx, err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("auditor: %w", err)
	}
	a := &auditor{o: o, nc: nc, js: js, metrics: m, ready: ready, log: o.Logger, store: newStore(js)}
	for {
		err := a.session(ctx)
		switch {
		case ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)):
			return nil
		case errors.Is(err, ledger.ErrPurged), errors.Is(err, ledger.ErrRewound):
			// What the books have is not in the ledger any more, or the other way
			// round. They are begun anew from what there is: where the others know
			// more, that is found.
			a.anew = true
			a.log.Error().Err(err).Msg("the ledger is not what the books are of: they are begun anew")
		default:
			return fmt.Errorf("auditor: %w", err)
		}
	}
}

// session audits until something ends it.
func (a *auditor) session(ctx context.Context) error {
	a.entries, a.claims, a.pending = make(chan ledger.Message, 256), make(chan ledger.Message, 64), map[uint32]answer{}
	a.ends, a.ledgerEar, a.claimsEar = make(chan ends), ear{}, ear{}
	a.checker, a.busy, a.committed = nil, false, 0
	if err := a.retry(ctx, "can't begin yet", a.begin); err != nil {
		return err
	}
	if a.newer != nil {
		a.halt(a.newer)
	} else {
		a.ready.OK()
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.readLedger(ctx, a.books.Position+1) })
	group.Go(func() error { return a.readClaims(ctx, a.books.ClaimsPosition+1) })
	group.Go(func() error { return a.watch(ctx) })
	if len(a.o.ClickHouse.Addrs) > 0 {
		a.checker = newChecker(a.o, a.js)
		group.Go(func() error { return a.checker.run(ctx) })
	}
	group.Go(func() error { return a.loop(ctx) })
	return group.Wait()
}

// stopped turns what a stop interrupted into a clean end.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("auditor: %w", err)
}

// retry calls do until it succeeds or ctx is done.
func (a *auditor) retry(ctx context.Context, what string, do func(context.Context) error) error {
	for try := 0; ; try++ {
		bounded, cancel := context.WithTimeout(ctx, time.Minute)
		err := do(bounded)
		cancel()
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		a.ready.NotReady(what + ": " + err.Error())
		if try == 0 {
			a.log.Warn().Err(err).Msg(what + ": trying again")
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// pause waits before the next try: 50 ms at first, 2 s at last.
func pause(ctx context.Context, try int) error {
	d := 2 * time.Second
	if try < 6 {
		d = min(d, 50*time.Millisecond<<try)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begin restores what was stored.
func (a *auditor) begin(ctx context.Context) error {
	geometry, err := ledger.Provision(ctx, a.js, a.o.Provision)
	if err != nil {
		return err
	}
	a.frame.CostsIn = geometry.Currency
	stream, err := a.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	a.ledgerID = stream.CachedInfo().Created.UTC().Format(time.RFC3339Nano)
	stored, err := a.store.books.Load(ctx)
	if err != nil {
		return err
	}
	a.books, a.rounds, a.newer = books.New(a.o.books()), nil, nil
	if a.anew {
		stored = nil
	}
	for _, data := range stored {
		b, rounds, err := books.Unmarshal(a.o.books(), a.ledgerID, data)
		if errors.As(err, &a.newer) {
			break
		}
		if err != nil {
			a.log.Warn().Err(err).Msg("stored books are left aside")
			continue
		}
		a.books = b
		for _, r := range rounds {
			a.rounds = append(a.rounds, &round{Round: r})
		}
		break
	}
	if a.findings, err = a.store.findings(ctx); err != nil {
		return err
	}
	for _, f := range a.findings.List() {
		for i := range f.Parts {
			if f.Open() && f.Pair == books.GatewayLedger {
				a.books.Told(f.Parts[i].Origin)
			}
		}
	}
	return nil
}

func (a *auditor) readLedger(ctx context.Context, from uint64) error {
	err := ledger.Read(ctx, a.js, ledger.ReadOptions{Stream: ledger.Stream, From: from, OnError: func(err error) {
		a.log.Warn().Err(err).Msg("reading the ledger was interrupted")
	}}, func(m ledger.Message) error { return hand(ctx, a.entries, m) })
	return errors.Join(err, ctx.Err())
}

func hand(ctx context.Context, to chan<- ledger.Message, m ledger.Message) error {
	select {
	case to <- m:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readClaims reads what gateways claim. The stream forgets its oldest messages:
// what they said is unclaimed then.
func (a *auditor) readClaims(ctx context.Context, from uint64) error {
	next := from
	for {
		err := ledger.Read(ctx, a.js, ledger.ReadOptions{Stream: ledger.AuditStream, From: next}, func(m ledger.Message) error {
			next = m.Sequence + 1
			return hand(ctx, a.claims, m)
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.log.Warn().Err(err).Msg("claims are gone that were not read: what they said is unclaimed")
		err = a.retry(ctx, "the claims can't be read", func(ctx context.Context) error {
			stream, err := a.js.Stream(ctx, ledger.AuditStream)
			if err != nil {
				return fmt.Errorf("stream %s: %w", ledger.AuditStream, err)
			}
			s := stream.CachedInfo().State
			// Made anew it begins at 1 again.
			if next = max(next, s.FirstSeq); next > s.LastSeq+1 {
				next = s.FirstSeq
			}
			return nil
		})
		if err != nil {
			return err
		}
		a.ready.OK()
	}
}

// ask asks the owner of a shard for totals.
func ask(ctx context.Context, nc *nats.Conn, shard uint32, accounts []string) (*ledger.UsageReply, error) {
	return askUsage(ctx, nc, shard, ledger.UsageRequest{Accounts: accounts, TotalsOnly: true})
}
