// Package aggregator counts the ledger: it folds the shards' entries in order
// (pkg/quota), publishes the decisions of those that it owns together with a
// checkpoint, and starts again from a snapshot and what came after it.
//
// Several aggregators share the shards (services/internal/ownership). Each folds
// also what it does not own, and keeps the decisions that are not known to be
// published, so that it goes on at once where an owner stops. Who may publish
// is not a matter of time: an owner begins by writing the checkpoint with the
// token of its claim, on condition of the checkpoint before, and all that it
// publishes is conditional on its own. The claim, which time ends, says who
// speaks beacons and answers and lets time pass; one that is stopped and wakes
// says under an old epoch what is true nevertheless.
package aggregator

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/anchor"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/letters"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Defaults of Options.
const (
	DefaultSnapshotEvery   = 30 * time.Second
	DefaultSnapshotEntries = 100_000
	DefaultStopTimeout     = 4 * time.Second
)

// Options of the aggregator.
type Options struct {
	// NATS is where the ledger is.
	NATS natsconn.Options
	// Logger hears what happens; never a secret.
	Logger zerolog.Logger
	// Registerer takes the metrics; nil means a registry of its own.
	Registerer *prometheus.Registry
	// Readiness takes the component "aggregator", which is ready when every
	// shard has counted what the ledger held at the start; nil means its own.
	Readiness *telemetry.Readiness
	// AdminListen serves /metrics, /healthz and /readyz; empty: nowhere.
	AdminListen string
	// AdminToken, if set, is the bearer token of the admin listener.
	AdminToken string
	// Shards, Currency of the costs and Replicas of a ledger that does not exist yet.
	Shards   uint32
	Currency string
	Replicas int
	// SnapshotEvery and SnapshotEntries: a snapshot is taken when either has
	// passed since the last; 0 means the defaults.
	SnapshotEvery   time.Duration
	SnapshotEntries int
	// Horizon is how long foreign events are remembered, in stream time; 0
	// means a day. It is fixed when a shard is first counted.
	Horizon time.Duration
	// Member is the name in the fleet that shares the shards: its own, and the
	// same at the next start, so that it is given the same shards. Empty: one
	// that is made up.
	Member string
	// Sole says that nobody else can be alive under that name (NATS is in this
	// very process): what an earlier start left behind is then taken at once.
	Sole bool
	// Standby is how many shards that others own are folded nevertheless, so
	// that they are taken over without reading anything: first those that this
	// member would be given. 0: all, with one reader for all of them; less
	// than 0: none. With a bound each shard gets a reader of its own.
	Standby int
	// StopTimeout bounds the last publishing and the last snapshots of a clean
	// stop; 0 means DefaultStopTimeout.
	StopTimeout time.Duration

	// ownReadiness is nobody else's to register as a metric.
	ownReadiness bool
	// idleEntries, tidyEvery and leftAfter, if set, stand in for constants in tests.
	idleEntries          uint64
	tidyEvery, leftAfter time.Duration
	// abandon makes the end of ctx a crash: nothing more is published or kept.
	abandon bool
	// timing of the fleet, in tests.
	timing fleet.Timing
}

// service is what the shards of a process share.
type service struct {
	o       Options
	abandon bool
	log     zerolog.Logger
	nc      *nats.Conn
	js      jetstream.JetStream
	objects jetstream.ObjectStore
	m       *meter.Metrics
	ready   *telemetry.Component
	stores  *anchor.Stores

	shards int
	// currency of all costs
	currency string
	owners   []*owner
	alive    context.Context // ends when no shard is counted any more
	stop     <-chan struct{} // closed when the process is to end
	fatal    chan error
	unswept  chan anchor.Taking
	strayed  chan struct{} // an entry of no shard was read
	g        *errgroup.Group
	status   status
	head     atomic.Uint64 // the newest entry that was read, of any shard
	ahead    atomic.Int64  // the stream's clock minus ours, nanoseconds
	still    atomic.Bool   // the ledger has a test clock: its time passes by entries alone
}

// Run shares the shards of the ledger with the other aggregators and counts until
// ctx is done; then it publishes what is left, hands its shards over, takes
// snapshots of those that nobody takes, and returns nil. While NATS is away it
// waits. A shard that the ledger says is to be folded by newer rules is left to a
// newer program: Run goes on with the others and says so. It returns an error wrapping ledger.ErrPurged when the ledger no longer
// holds what must be counted, ledger.ErrRewound when it has lost what was counted.
func Run(ctx context.Context, o Options) error {
	if o.Horizon < 0 {
		return fmt.Errorf("aggregator: the horizon of foreign events is %s: set --foreign-horizon to a positive time, or to 0 for a day", o.Horizon)
	}
	s := &service{o: withDefaults(o), abandon: o.abandon, log: o.Logger, stop: ctx.Done(), fatal: make(chan error, 1), unswept: make(chan anchor.Taking, 64), strayed: make(chan struct{}, 1)}
	var err error
	if s.m, err = meter.New(s.o.Registerer); err != nil {
		return fmt.Errorf("aggregator: %w", err)
	}
	defer s.m.Unregister(s.o.Registerer)
	if s.o.ownReadiness {
		if err := s.o.Registerer.Register(s.o.Readiness); err != nil {
			return fmt.Errorf("aggregator: %w", err)
		}
		defer s.o.Registerer.Unregister(s.o.Readiness)
	}
	s.ready = s.o.Readiness.Component("aggregator")
	s.ready.NotReady("starting")
	defer s.ready.NotReady("stopped")

	g, ctx := errgroup.WithContext(ctx)
	if s.o.AdminListen != "" {
		l, err := telemetry.Listen("admin-listen", s.o.AdminListen, s.o.AdminToken != "")
		if err != nil {
			return err
		}
		g.Go(func() error {
			return telemetry.Serve(ctx, telemetry.ServeOptions{
				Flag: "admin-listen", Listener: l, Token: s.o.AdminToken,
				Handler: telemetry.NewHandler(telemetry.HandlerOptions{Gatherer: s.o.Registerer, Readiness: s.o.Readiness}),
			})
		})
	}
	g.Go(func() error {
		if err := s.count(ctx); err != nil && !(ctx.Err() != nil && errors.Is(err, ctx.Err())) {
			return fmt.Errorf("aggregator: %w", err)
		}
		return nil
	})
	return g.Wait()
}

func withDefaults(o Options) Options {
	if o.Registerer == nil {
		o.Registerer = telemetry.NewRegistry()
	}
	if o.Readiness == nil {
		o.Readiness = telemetry.NewReadiness()
		o.ownReadiness = true
	}
	if o.idleEntries == 0 {
		o.idleEntries = idleEntries
	}
	if o.SnapshotEvery <= 0 {
		o.SnapshotEvery = DefaultSnapshotEvery
	}
	if o.SnapshotEntries <= 0 {
		o.SnapshotEntries = DefaultSnapshotEntries
	}
	if o.Member == "" {
		o.Member = ksuid.New().String()
	}
	if o.StopTimeout <= 0 {
		o.StopTimeout = DefaultStopTimeout
	}
	if o.NATS.Name == "" {
		o.NATS.Name = "tollkeeper-aggregator"
	}
	if o.NATS.Readiness == nil {
		o.NATS.Readiness = o.Readiness.Component("nats")
	}
	return o
}

func (s *service) horizon() usage.Micros { return usage.Micros(s.o.Horizon.Microseconds()) }

// count shares the shards until ctx is done. What they still have to tell NATS
// at the end outlives ctx.
func (s *service) count(ctx context.Context) error {
	nc, err := natsconn.Connect(ctx, s.o.NATS)
	if err != nil {
		return err
	}
	defer nc.Close()
	s.nc = nc
	if s.js, err = jetstream.New(nc); err != nil {
		return err
	}
	if err := s.persist(ctx, "open the ledger", func(ctx context.Context) error {
		g, err := ledger.Provision(ctx, s.js, ledger.ProvisionOptions{
			Shards: s.o.Shards, Currency: s.o.Currency, Replicas: s.o.Replicas, Notice: func(text string) { s.log.Warn().Msg(text) },
		})
		if err != nil {
			return err
		}
		if s.objects, err = s.js.ObjectStore(ctx, ledger.SnapshotsBucket); err != nil {
			return fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
		}
		s.shards, s.currency = int(g.Shards), g.Currency
		return s.readClock(ctx)
	}); err != nil {
		return err
	}
	s.stores = &anchor.Stores{
		NC: nc, JS: s.js, Objects: s.objects, Log: s.log, Owner: letters.Readable(s.o.Member) + "/" + ksuid.New().String(), Horizon: s.horizon(),
	}
	for shard := range s.shards {
		s.owners = append(s.owners, newOwner(s, uint32(shard)))
	}
	began := time.Now()
	from, err := s.warmAll(ctx)
	if err != nil {
		return err
	}
	s.log.Info().Int("shards", s.shards).Dur("took_ms", time.Since(began)).Msg("loaded the newest snapshots")
	s.status.set(s, func(t *status) { t.unowned = s.shards })
	byShard := &meter.Shards{Now: s.stand}
	if err := s.o.Registerer.Register(byShard); err != nil {
		return err
	}
	defer s.o.Registerer.Unregister(byShard)

	g, alive := errgroup.WithContext(context.WithoutCancel(ctx))
	alive, end := context.WithCancel(alive)
	defer end()
	s.g, s.alive = g, alive
	for _, o := range s.owners {
		g.Go(func() error { return o.run(alive) })
	}
	if s.o.Standby == 0 {
		// One consumer without a filter for all shards: measured, it is cheaper
		// for the server and for us than one a shard.
		all := &reader{service: s, all: true}
		for _, o := range s.owners {
			if o.newer == nil {
				o.intake.Store(newIntake(all))
			}
		}
		if from < unread {
			g.Go(func() error { return all.read(alive, from) })
		}
	}
	g.Go(func() error { return s.keepClock(alive) })
	// What is done once for all is done by the owner of the first shard.
	ours := func() bool { return s.owners[0].lastBeacon.Load() != 0 }
	g.Go(func() error {
		return anchor.Sweeper{Stores: s.stores, Taken: s.unswept, Ours: ours, Every: s.o.tidyEvery, After: s.o.leftAfter}.Run(alive)
	})
	strays := letters.Strays{JS: s.js, Shards: s.shards, Log: s.log, Kept: func() {
		s.m.Strays.Inc()
		s.m.DeadLetters.WithLabelValues(usage.ReasonWrongShard).Inc()
	}}
	g.Go(func() error { return strays.Run(alive, ours, s.strayed) })
	g.Go(func() error {
		select {
		case err := <-s.fatal:
			return err
		case <-alive.Done():
			return nil
		}
	})
	g.Go(func() error {
		defer end()
		member, leave := context.WithCancel(ctx)
		defer leave()
		defer context.AfterFunc(alive, leave)()
		return ownership.Run(member, ownership.Options{
			NC: nc, JS: s.js, Replicas: s.o.Replicas, Member: s.o.Member, Sole: s.o.Sole, Shards: uint32(s.shards), Timing: s.o.timing,
			OnAcquire: s.own, OnStandby: s.inherits, OnView: func(v ownership.View) {
				s.status.set(s, func(t *status) { t.held, t.unowned = v.Held, v.Unowned })
			},
			StopTimeout: s.o.StopTimeout, Logger: s.log, Registerer: s.o.Registerer,
		})
	})
	return g.Wait()
}

// status says when this member is ready: every shard has an owner, and those
// that are ours are counted up to what the ledger held when we took them.
type status struct {
	mu            sync.Mutex
	held, unowned int
	counted       int               // of those held
	beyond        int               // shards that a newer program has to fold
	newer         *quota.NewerError // of one of them
}

func (t *status) set(s *service, change func(*status)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(t)
	left := t.unowned + t.held - t.counted
	s.m.NotCaughtUp.Set(float64(left))
	s.m.Beyond.Set(float64(t.beyond))
	switch {
	case t.beyond > 0:
		s.ready.NotReady(fmt.Sprintf("%d shards are left to a newer program: %v", t.beyond, t.newer))
	case t.unowned > 0:
		s.ready.NotReady(fmt.Sprintf("%d shards have no owner", t.unowned))
	case left > 0:
		s.ready.NotReady(fmt.Sprintf("%d shards are catching up", left))
	default:
		s.ready.OK()
	}
}

// persist tries until it works, ctx is done or trying again cannot help.
func (s *service) persist(ctx context.Context, what string, try func(context.Context) error) error {
	var b backoff
	for {
		once, cancel := context.WithTimeout(ctx, 30*time.Second)
		err := try(once)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ledger.ErrPurged) || errors.Is(err, ledger.ErrRewound) || errors.Is(err, ledger.ErrStale) || errors.Is(err, anchor.ErrForGood) || errors.As(err, new(*quota.NewerError)) {
			return err
		}
		s.ready.NotReady(what + ": " + err.Error())
		wait := b.next()
		s.log.Warn().Err(err).Dur("again_in_ms", wait).Msg("could not " + what)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// streamTime is what the stream's clock shows when ours shows now.
func (s *service) streamTime(now time.Time) time.Time {
	return now.Add(time.Duration(s.ahead.Load()))
}

func (s *service) readClock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	before := time.Now()
	stream, err := s.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	s.still.Store(ledger.HasTestClock(stream))
	if at := stream.CachedInfo().TimeStamp; !at.IsZero() {
		s.ahead.Store(int64(at.Sub(before.Add(time.Since(before) / 2))))
	}
	return nil
}

// keepClock follows the stream's clock.
func (s *service) keepClock(ctx context.Context) error {
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		s.m.Slowest.Turn()
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		if err := s.readClock(ask); err != nil && ctx.Err() == nil {
			s.log.Debug().Err(err).Msg("the stream's clock could not be read")
		}
		cancel()
	}
}
