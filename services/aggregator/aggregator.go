// Package aggregator counts the ledger: it owns shards, folds their entries in
// order (pkg/quota), publishes the decisions that follow together with a
// checkpoint, and starts again from a snapshot and what came after it.
package aggregator

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
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
	// Shards and Replicas of a ledger that does not exist yet.
	Shards   uint32
	Replicas int
	// SnapshotEvery and SnapshotEntries: a snapshot is taken when either has
	// passed since the last; 0 means the defaults.
	SnapshotEvery   time.Duration
	SnapshotEntries int
	// Horizon is how long foreign events are remembered, in stream time; 0
	// means a day. It is fixed when a shard is first counted.
	Horizon time.Duration
	// StopTimeout bounds the last publishing and the last snapshots of a clean
	// stop; 0 means DefaultStopTimeout.
	StopTimeout time.Duration

	// ownReadiness is nobody else's to register as a metric.
	ownReadiness bool
	// idleEntries, if set, stand in for the constant in tests.
	idleEntries uint64
	// abandon makes the end of ctx a crash: nothing more is published or kept.
	abandon bool
}

// service is what the shards of a process share.
type service struct {
	o       Options
	abandon bool
	log     zerolog.Logger
	nc      *nats.Conn
	js      jetstream.JetStream
	objects jetstream.ObjectStore
	m       *metrics
	ready   *telemetry.Component
	name    string // of this owner

	shards int
	behind atomic.Int64  // shards that are not ready
	head   atomic.Uint64 // the newest entry that was read, of any shard
	ahead  atomic.Int64  // the stream's clock minus ours, nanoseconds
}

// Run owns every shard of the ledger and counts until ctx is done; then it
// publishes what is left, takes snapshots and returns nil. While NATS is away it
// waits. It returns an error wrapping ledger.ErrStale when another aggregator
// has taken a shard, ledger.ErrPurged when the ledger no longer holds what must
// be counted, ledger.ErrRewound when it has lost what was counted.
func Run(ctx context.Context, o Options) error {
	s := &service{o: withDefaults(o), abandon: o.abandon, log: o.Logger, name: ksuid.New().String()}
	var err error
	if s.m, err = newMetrics(s.o.Registerer); err != nil {
		return fmt.Errorf("aggregator: %w", err)
	}
	defer s.m.unregister(s.o.Registerer)
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

// count runs the shards until ctx is done. What the shards still have to tell
// NATS at the end goes over io, which lasts longer.
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
	io, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()

	var owners []*owner
	if err := s.persist(ctx, "open the ledger", func(ctx context.Context) error {
		g, err := ledger.Provision(ctx, s.js, ledger.ProvisionOptions{
			Shards: s.o.Shards, Replicas: s.o.Replicas, Notice: func(text string) { s.log.Warn().Msg(text) },
		})
		if err != nil {
			return err
		}
		if s.objects, err = s.js.ObjectStore(ctx, ledger.SnapshotsBucket); err != nil {
			return fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
		}
		owners = make([]*owner, g.Shards)
		return s.readClock(ctx)
	}); err != nil {
		return err
	}
	if err := s.takeOver(ctx, owners); err != nil {
		return err
	}
	if err := s.sweep(ctx, owners); err != nil {
		s.log.Warn().Err(err).Msg("old snapshots could not be removed: the next start tries again")
	}
	s.behind.Store(int64(len(owners)))
	s.m.notCaughtUp.Set(float64(len(owners)))
	s.ready.NotReady(fmt.Sprintf("%d shards are catching up", len(owners)))

	s.shards = len(owners)
	owners[0].strays = make(chan ledger.Message, inputBuffer)
	age := beaconAge(owners)
	if err := s.o.Registerer.Register(age); err != nil {
		return err
	}
	defer s.o.Registerer.Unregister(age)
	for _, o := range owners {
		if err := s.listen(o); err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, o := range owners {
		g.Go(func() error { return o.run(ctx, io) })
	}
	// One consumer without a filter for all shards: measured, it is cheaper for
	// the server and for us than one a shard.
	from := owners[0].from
	for _, o := range owners {
		from = min(from, o.from)
	}
	g.Go(func() error { return s.read(ctx, g, owners, from) })
	g.Go(func() error { return s.keepClock(ctx) })
	return g.Wait()
}

// blockedAfter is how long the others wait for a shard that does not take its
// entries.
const blockedAfter = 500 * time.Millisecond

// read reads the entries of some shards, of all of them without a filter, and
// hands them over. A shard that holds the others up gets a reader of its own.
func (s *service) read(ctx context.Context, g *errgroup.Group, part []*owner, from uint64) error {
	opts := ledger.ReadOptions{Stream: ledger.Stream, From: from, OnError: func(err error) {
		s.m.interruptions.Inc()
		s.log.Warn().Err(err).Msg("reading the ledger was interrupted")
	}}
	byShard := make(map[uint32]*owner, len(part))
	apart := make(map[uint32]bool)
	all := len(part) == s.shards
	for _, o := range part {
		byShard[o.shard] = o
		if !all {
			opts.Subjects = append(opts.Subjects, ledger.ShardSubjects(o.shard)...)
		}
	}
	blocked := time.NewTimer(blockedAfter)
	defer blocked.Stop()
	return ledger.Read(ctx, s.js, opts, func(m ledger.Message) error {
		if all {
			s.m.pending.Set(float64(m.Pending))
			s.head.Store(m.Sequence)
		}
		_, shard, err := ledger.ParseSubject(m.Subject)
		o := byShard[shard]
		to := part[0].strays
		switch {
		case err == nil && apart[shard]:
			return nil
		case err == nil && o != nil:
			to = o.in
		default:
			o = nil
		}
		select {
		case to <- m:
			return nil
		default:
		}
		patience := blocked.C
		if o == nil || len(part) == 1 {
			patience = nil // there is nobody, or nothing, to be put apart
		}
		blocked.Reset(blockedAfter)
		select {
		case to <- m:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-patience:
		}
		o.log.Warn().Msg("the shard does not take its entries: it gets a reader of its own, so that the others need not wait")
		s.m.apart.Inc()
		apart[shard] = true
		g.Go(func() error { return s.read(ctx, g, []*owner{o}, m.Sequence) })
		return nil
	})
}

// beaconAge says how old the oldest of the shards' beacons is.
func beaconAge(owners []*owner) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tollkeeper_aggregator_beacon_age_seconds", Help: "How long ago the shard that has been silent for longest sent its last beacon.",
	}, func() float64 {
		now, age := time.Now().UnixNano(), int64(0)
		for _, o := range owners {
			age = max(age, now-o.lastBeacon.Load())
		}
		return time.Duration(age).Seconds()
	})
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
		if errors.Is(err, ledger.ErrPurged) || errors.Is(err, ledger.ErrRewound) || errors.Is(err, errForGood) {
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

var errForGood = errors.New("waiting does not help")

// takeOver makes this process the owner of every shard: nobody else's batch is
// taken from then on.
func (s *service) takeOver(ctx context.Context, owners []*owner) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range owners {
		g.Go(func() error {
			return s.persist(ctx, fmt.Sprintf("take over shard %d", i), func(ctx context.Context) error {
				o, err := s.open(ctx, uint32(i))
				owners[i] = o
				return err
			})
		})
	}
	return g.Wait()
}

// open fences the shard and loads its state.
func (s *service) open(ctx context.Context, shard uint32) (*owner, error) {
	o := &owner{
		service: s, shard: shard, log: s.log.With().Uint32("shard", shard).Logger(),
		in: make(chan ledger.Message, inputBuffer), queries: make(chan *nats.Msg, queryBuffer), results: make(chan func() error, 8),
	}
	before, err := s.readPosition(ctx, shard)
	if err != nil {
		return nil, err
	}
	next := before.Found
	next.Epoch, next.Owner = before.Found.Epoch+1, s.name
	m, err := next.Message(shard)
	if err != nil {
		return nil, err
	}
	ledger.ExpectLast(m, before.Revision)
	if _, err := ledger.PublishBatch(ctx, s.nc, []*nats.Msg{m}); err != nil && !errors.Is(err, ledger.ErrStale) {
		s.log.Debug().Err(err).Uint32("shard", shard).Msg("it is not clear whether the shard is taken over")
	}
	// Whatever the answer was: what stands there now is ours or not.
	// Nobody else publishes from there on, so the newest decision is too.
	at, err := s.readPosition(ctx, shard)
	switch {
	case err != nil:
		return nil, err
	case at.Found != next:
		return nil, fmt.Errorf("shard %d: it is at epoch %d of another owner", shard, at.Found.Epoch)
	}
	o.lastBeacon.Store(time.Now().UnixNano())
	o.pub = publish.New(shard, at.Revision, next, at.Newest)
	if o.state, err = s.load(ctx, shard, next.Snapshot); err != nil {
		if ctx.Err() != nil || errors.Is(err, errLags) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
		// The log is the truth; reading it from the beginning is slower, and
		// ends with ErrPurged where the beginning is gone.
		o.log.Error().Err(err).Msg("the snapshot cannot be used: the shard is counted anew from the ledger's beginning")
		if o.state, err = s.load(ctx, shard, ""); err != nil {
			return nil, err
		}
	}
	stream, err := s.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	// Decisions on entries that are gone would hide those on the entries that
	// take their numbers.
	if told, end := max(o.state.Sequence(), next.Sequence, at.Newest.Revision), stream.CachedInfo().State.LastSeq; told > end {
		return nil, fmt.Errorf("shard %d is counted up to entry %d, but the ledger ends at %d: restore the ledger, or delete the bucket %s and the snapshots to count what it holds anew: %w",
			shard, told, end, ledger.DecisionsBucket, ledger.ErrRewound)
	}
	if first := stream.CachedInfo().State.FirstSeq; o.state.Sequence() == 0 && first > 1 {
		return nil, fmt.Errorf("shard %d: the ledger begins at %d and there is no snapshot: %w", shard, first, ledger.ErrPurged)
	}
	for _, subject := range ledger.ShardSubjects(shard) {
		m, found, err := ledger.LastMessage(ctx, s.js, ledger.Stream, subject)
		if err != nil {
			return nil, err
		}
		if !found {
			continue
		}
		o.target = max(o.target, m.Sequence)
		if subject == ledger.ControlSubject(shard) {
			o.lastControl = m.Sequence
		}
	}
	o.from = o.state.Sequence() + 1
	if o.target <= o.state.Sequence() {
		// A shard at rest must not make the others' entries be read again.
		o.from = max(o.from, stream.CachedInfo().State.LastSeq+1)
	}
	o.log.Info().Uint64("epoch", next.Epoch).Uint64("from", o.from).Uint64("to", o.target).Msg("owns the shard")
	return o, nil
}

// readPosition returns how a shard stands in the decisions' stream.
func (s *service) readPosition(ctx context.Context, shard uint32) (publish.Position, error) {
	var at publish.Position
	const stream = "KV_" + ledger.DecisionsBucket
	m, ok, err := ledger.LastMessage(ctx, s.js, stream, publish.CheckpointSubject(shard))
	if err != nil {
		return at, fmt.Errorf("checkpoint of shard %d: %w", shard, err)
	}
	if ok {
		at.Revision = m.Sequence
		if at.Found, err = publish.ReadCheckpoint(shard, m.Header, m.Data); err != nil {
			return at, fmt.Errorf("%w: %w", errForGood, err)
		}
	}
	m, ok, err = ledger.LastMessage(ctx, s.js, stream, publish.DecisionsSubject(shard))
	switch {
	case err != nil:
		return at, fmt.Errorf("newest decision of shard %d: %w", shard, err)
	case !ok:
	case len(m.Data) == 0:
		// Somebody has deleted a key by hand. What was published after the
		// checkpoint is published again: the same, under the same ids.
		s.log.Warn().Uint32("shard", shard).Str("key", m.Subject).Msg("the newest decision was deleted by hand")
	default:
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			return at, fmt.Errorf("%w: newest decision of shard %d: %w", errForGood, shard, err)
		}
		at.Newest, at.NewestAt = publish.ToldBy(&d), m.Sequence
	}
	return at, nil
}

// listen lets a shard be asked as long as the connection is open.
func (s *service) listen(o *owner) error {
	_, err := s.nc.Subscribe(ledger.UsageSubject(o.shard), func(q *nats.Msg) {
		select {
		case o.queries <- q:
		default:
			s.m.refuse(q, "503", "too many questions at once: ask again")
		}
	})
	if err != nil {
		return fmt.Errorf("shard %d: subscribe: %w", o.shard, err)
	}
	return nil
}

func (s *service) caughtUp() {
	left := s.behind.Add(-1)
	s.m.notCaughtUp.Set(float64(left))
	if left == 0 {
		s.ready.OK()
		return
	}
	s.ready.NotReady(fmt.Sprintf("%d shards are catching up", left))
}

// streamTime is what the stream's clock shows when ours shows now.
func (s *service) streamTime(now time.Time) time.Time {
	return now.Add(time.Duration(s.ahead.Load()))
}

func (s *service) readClock(ctx context.Context) error {
	before := time.Now()
	stream, err := s.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
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
		s.m.slowest.turn()
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		if err := s.readClock(ask); err != nil && ctx.Err() == nil {
			s.log.Debug().Err(err).Msg("the stream's clock could not be read")
		}
		cancel()
	}
}
