package gate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/ask"
	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/directory"
	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/gate/wallet"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Run keeps the table current and the outbox running until ctx is done; then it
// closes the outbox, within CloseTimeout, and returns nil. While NATS is away it
// tries again for ever. It returns an error only for what waiting does not mend.
func (g *Gate) Run(ctx context.Context) error {
	nc := g.o.Conn
	if nc == nil {
		var err error
		if nc, err = g.o.Connect(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("gate: %w", err)
		}
		defer nc.Close()
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("gate: %w", err)
	}
	shards, clock, ok := g.geometry(ctx, js)
	if !ok {
		return nil
	}
	out, err := g.o.OpenOutbox(nc, js, shards)
	if err != nil {
		return fmt.Errorf("gate: open the outbox: %w", err)
	}
	g.open(shards, clock)
	g.outbox.Store(&out)
	w, err := g.openWallet(nc, js, out, shards)
	if err != nil {
		return err
	}
	g.wallet.Store(w)
	return g.run(ctx, nc, js, out, w)
}

// geometry asks for the shards and the test clock (nil: there is none).
func (g *Gate) geometry(ctx context.Context, js jetstream.JetStream) (shards uint32, clock func() usage.Micros, ok bool) {
	shards, clock = g.o.Shards, g.o.TestClock
	ok = ask.Until(ctx, "the ledger's geometry", g.ready.Waiting, func(ctx context.Context) error {
		if shards == 0 {
			geo, err := ledger.ReadGeometry(ctx, js)
			if err != nil {
				return err
			}
			shards = geo.Shards
		}
		if clock != nil {
			return nil
		}
		at, err := ledger.ReadTestClock(ctx, js)
		if err == nil {
			g.beacon.Store(int64(at))
			clock = func() usage.Micros { return usage.Micros(g.beacon.Load()) }
		}
		if errors.Is(err, ledger.ErrRealClock) {
			return nil
		}
		return err
	})
	return shards, clock, ok
}

// open makes the table, of which nothing is known, and the directory in front of it.
func (g *Gate) open(shards uint32, clock func() usage.Micros) {
	t := table.New(shards, ledger.ShardOf, table.Policy{
		Pass: g.o.Unknown.Mode == PassUnknown, MaxCalls: g.o.Unknown.MaxCalls, StaleAfter: usage.Micros(g.o.StaleAfter.Microseconds()),
		TestClock: clock,
	})
	g.directory.Store(directory.New(t, &g.write))
	g.table.Store(t)
}

func (g *Gate) run(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, out Outbox, w *wallet.Wallet) error {
	// The outbox outlives the feeds: it has to get rid of what it holds.
	outCtx, stopOutbox := context.WithCancel(context.WithoutCancel(ctx))
	defer stopOutbox()
	feeds, stopFeeds := context.WithCancel(ctx)
	defer stopFeeds()

	outDone := make(chan error, 1)
	go func() { outDone <- out.Run(outCtx) }()
	// So does the wallet: its last words come before the outbox's.
	walletCtx, stopWallet := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWallet()
	walletDone := make(chan error, 1)
	go func() {
		err := w.Run(walletCtx)
		if err != nil {
			stopFeeds()
		}
		walletDone <- err
	}()

	accounts := ledger.NewMirror(nc, js, ledger.MirrorOptions{Bucket: ledger.DirectoryBucket, Progress: g.ready.Reading(ledger.DirectoryBucket)}, &directoryFeed{g})
	decisions := ledger.NewMirror(nc, js, ledger.MirrorOptions{Bucket: ledger.DecisionsBucket, Progress: g.ready.Reading(ledger.DecisionsBucket)}, &decisionsFeed{g})
	var wg sync.WaitGroup
	errs := make(chan error, 4)
	start := func(name string, f func(context.Context) error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := f(feeds); err != nil {
				errs <- fmt.Errorf("%s: %w", name, err)
				stopFeeds()
			}
		}()
	}
	start("directory", accounts.Run)
	start("decisions", decisions.Run)
	start("beacons", func(ctx context.Context) error { return g.hearBeacons(ctx, nc, decisions.Announce) })
	start("clock", g.tick)

	var failed error
	outEnded := false
	select {
	case <-feeds.Done():
	case err := <-outDone:
		outEnded = true
		if err == nil {
			err = errors.New("it ended by itself")
		}
		failed = fmt.Errorf("gate: outbox: %w", err)
	}
	stopFeeds()
	wg.Wait()
	select {
	case err := <-errs:
		failed = errors.Join(failed, fmt.Errorf("gate: %w", err))
	default:
	}

	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.o.CloseTimeout)
	defer cancel()
	select {
	case err := <-walletDone:
		failed = errors.Join(failed, fmt.Errorf("gate: %w", err))
	default:
		g.closeWallet(closing, w)
		stopWallet()
		if err := <-walletDone; err != nil {
			failed = errors.Join(failed, fmt.Errorf("gate: %w", err))
		}
	}
	if err := out.Close(closing); err != nil {
		failed = errors.Join(failed, fmt.Errorf("gate: close the outbox: %w", err))
	}
	stopOutbox()
	if !outEnded {
		// Close may have used up its time, and Run has nothing to do any more.
		last := time.NewTimer(g.o.CloseTimeout / 4)
		defer last.Stop()
		select {
		case err := <-outDone:
			if err != nil && !errors.Is(err, context.Canceled) {
				failed = errors.Join(failed, fmt.Errorf("gate: outbox: %w", err))
			}
		case <-last.C:
			failed = errors.Join(failed, errors.New("gate: the outbox did not stop in time"))
		}
	}
	return failed
}

// hearBeacons takes beacons until ctx is done.
func (g *Gate) hearBeacons(ctx context.Context, nc *nats.Conn, announce func(uint64)) error {
	sub, err := nc.Subscribe(ledger.AllBeacons, func(m *nats.Msg) {
		var b tollkeeperv1.Beacon
		if err := proto.Unmarshal(m.Data, &b); err != nil {
			g.metrics.undecodable("beacons")
			return
		}
		now := usage.At(g.now())
		g.write.Lock()
		fresh := g.table.Load().Hear(table.Beacon{Shard: b.GetShard(), Epoch: b.GetEpoch(), StreamTime: usage.Micros(b.GetStreamTimeUnixMicros()), SentAt: usage.Micros(b.GetSentAtUnixMicros())}, now)
		g.write.Unlock()
		if fresh {
			g.beacon.Store(max(g.beacon.Load(), b.GetStreamTimeUnixMicros()))
			announce(b.GetDecisionsSequence())
		}
	})
	if err != nil {
		return err
	}
	<-ctx.Done()
	// The connection may be gone, and with it the subscription.
	_ = sub.Unsubscribe()
	return nil
}

// tick lets what is not heard of grow stale, and tells readiness.
func (g *Gate) tick(ctx context.Context) error {
	t := time.NewTicker(max(min(g.o.StaleAfter/20, 100*time.Millisecond), time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			g.refresh()
		}
	}
}

func (g *Gate) refresh() {
	clock := g.now()
	now := usage.At(clock)
	g.write.Lock()
	t := g.table.Load()
	t.Tick(now)
	f := t.Freshness(now)
	g.write.Unlock()
	g.ready.Fresh(f, g.full.Told(clock))
}

// directoryFeed brings keys, accounts and plans.
type directoryFeed struct{ g *Gate }

func (f *directoryFeed) Reset(all []ledger.Change) {
	for key, err := range f.g.directory.Load().Reset(all) {
		f.g.skip(ledger.DirectoryBucket, key, err)
	}
	f.g.ready.Resync(ledger.DirectoryBucket)
	f.g.metrics.resyncs.WithLabelValues(ledger.DirectoryBucket).Inc()
	f.g.refresh()
}

func (f *directoryFeed) Apply(c ledger.Change) {
	if err := f.g.directory.Load().Apply(c); err != nil {
		f.g.skip(ledger.DirectoryBucket, c.Key, err)
	}
}

func (f *directoryFeed) Stale(reason error) {
	now := usage.At(f.g.now())
	f.g.write.Lock()
	f.g.table.Load().DirectoryStale(now)
	f.g.write.Unlock()
	f.g.stale(ledger.DirectoryBucket, reason)
}

// decisionsFeed brings decisions to the table.
type decisionsFeed struct{ g *Gate }

const checkpointPrefix = "checkpoint."

func (f *decisionsFeed) Reset(all []ledger.Change) {
	decisions := make([]table.Keyed, 0, len(all))
	for i := range all {
		c := &all[i]
		if strings.HasPrefix(c.Key, checkpointPrefix) {
			continue
		}
		d, err := ledger.UnmarshalDecision(c.Value)
		if err != nil {
			f.g.skip(ledger.DecisionsBucket, c.Key, err)
			continue
		}
		decisions = append(decisions, table.Keyed{Key: c.Key, Seq: c.Sequence, Decision: d})
	}
	f.g.write.Lock()
	f.g.table.Load().ResetDecisions(decisions)
	f.g.write.Unlock()
	f.g.ready.Resync(ledger.DecisionsBucket)
	f.g.metrics.resyncs.WithLabelValues(ledger.DecisionsBucket).Inc()
	f.g.refresh()
}

func (f *decisionsFeed) Apply(c ledger.Change) {
	if strings.HasPrefix(c.Key, checkpointPrefix) {
		return
	}
	if c.Value == nil {
		f.g.write.Lock()
		f.g.table.Load().Delete(c.Key, c.Sequence)
		f.g.write.Unlock()
		return
	}
	d, err := ledger.UnmarshalDecision(c.Value)
	if err != nil {
		f.g.skip(ledger.DecisionsBucket, c.Key, err)
		return
	}
	f.g.write.Lock()
	applied := f.g.table.Load().Apply(table.Keyed{Key: c.Key, Seq: c.Sequence, Decision: d})
	f.g.write.Unlock()
	if !applied {
		f.g.metrics.outdated.Inc()
		return
	}
	f.g.metrics.applied(d.Verdict)
	if d.Cause != 0 {
		f.g.metrics.latency(f.g.now().Sub(d.Cause.Time()))
	}
}

func (f *decisionsFeed) Stale(reason error) {
	now := usage.At(f.g.now())
	f.g.write.Lock()
	f.g.table.Load().DecisionsStale(now)
	f.g.write.Unlock()
	f.g.stale(ledger.DecisionsBucket, reason)
}

// skip tells of a record that can't be read. It stays as it was in the table.
func (g *Gate) skip(bucket, key string, err error) {
	g.metrics.undecodable(bucket)
	if g.logs.Allow(g.now()) {
		g.o.Logger.Error().Str("bucket", bucket).Str("key", key).Err(err).Msg("a record of the feed can't be read and is left out")
	}
}

func (g *Gate) stale(bucket string, reason error) {
	g.ready.Stale(bucket, reason)
	if g.logs.Allow(g.now()) {
		g.o.Logger.Warn().Str("bucket", bucket).Err(reason).Msg("the copy of a bucket may be behind: reading it again")
	}
}
