package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// Options of a bench.
type Options struct {
	Rounds   int
	Calls    int // of a throughput round
	Accounts int
	Shards   uint32
	// Crossings of a limit that are timed, idle and under load each.
	Crossings int
	Seed      uint64
	// EngineDir is where the ClickHouse engine is installed.
	EngineDir string
	Out       io.Writer
	Logger    zerolog.Logger
}

// System is what a bench runs against.
type System struct {
	NC      *nats.Conn
	JS      jetstream.JetStream
	History *history.History
	// Connect opens a connection of its own.
	Connect func(ctx context.Context, name string) (*nats.Conn, error)
	// Apply makes a plans file hold.
	Apply func(ctx context.Context, doc *plans.Document) error
	// Aggregator and Historian run until their context is done.
	Aggregator, Historian func(ctx context.Context) error
	// Stop ends the engines and removes their store.
	Stop func() error
}

const frameCalls = 1000

// Run measures and prints.
func Run(ctx context.Context, o Options) error {
	p := &lines{w: o.Out}
	p.printf("%d rounds a figure, interleaved, medians; %d CPUs, %s; %d accounts (zipf 1.1), %d shards, frames of %d calls\n",
		o.Rounds, runtime.NumCPU(), runtime.Version(), o.Accounts, o.Shards, frameCalls)
	w := newWorkload(o.Seed, o.Accounts, o.Shards)
	var counted float64
	for _, synced := range [...]bool{true, false} {
		rate, err := withSystem(ctx, o, synced, func(ctx context.Context, s *System) (float64, error) { return counting(ctx, o, s, w, synced, p) })
		if err != nil {
			return err
		}
		if synced {
			counted = rate
		}
	}
	if _, err := withSystem(ctx, o, true, func(ctx context.Context, s *System) (float64, error) { return keeping(ctx, o, s, w, p) }); err != nil {
		return err
	}
	if _, err := withSystem(ctx, o, true, func(ctx context.Context, s *System) (float64, error) { return deciding(ctx, o, s, w, counted, p) }); err != nil {
		return err
	}
	return p.err
}

func withSystem(ctx context.Context, o Options, synced bool, f func(context.Context, *System) (float64, error)) (v float64, err error) {
	s, err := start(ctx, o, synced)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.Stop()) }()
	return f(ctx, s)
}

// beside runs f while the services run, and ends them after it.
func beside(ctx context.Context, f func(context.Context) error, services ...func(context.Context) error) error {
	life, end := context.WithCancel(ctx)
	defer end()
	g, life := errgroup.WithContext(life)
	for _, s := range services {
		g.Go(func() error { return s(life) })
	}
	g.Go(func() error {
		defer end()
		return f(life)
	})
	return g.Wait()
}

// accountsDocument gives every account one unfiltered limit.
func accountsDocument(accounts []string, amount int64, window string) *plans.Document {
	doc := &plans.Document{Version: plans.FormatVersion, Plans: []plans.Plan{{ID: "bench", Limits: []plans.Limit{{ID: "calls", Meter: "calls", Window: window, Amount: amount, Tier: "eventual"}}}}}
	for _, a := range accounts {
		doc.Accounts = append(doc.Accounts, plans.Account{ID: a, Plan: "bench"})
	}
	return doc
}

// counting measures bare JetStream and publish → counted, in turn.
func counting(ctx context.Context, o Options, s *System, w *workload, synced bool, p *lines) (float64, error) {
	if err := s.Apply(ctx, accountsDocument(w.all(), 1<<50, "day")); err != nil {
		return 0, fmt.Errorf("give the accounts a limit: %w", err)
	}
	var bare, ours, ratio []float64
	err := beside(ctx, func(ctx context.Context) error {
		// The first round warms up and is not counted.
		for round := range o.Rounds + 1 {
			frames := w.frames(ksuid.New(), o.Calls/frameCalls, frameCalls)
			b, err := bareJetStream(ctx, s.JS, frames)
			if err != nil {
				return fmt.Errorf("bare JetStream: %w", err)
			}
			c, err := counted(ctx, s.NC, s.JS, o.Shards, frames)
			if err != nil {
				return fmt.Errorf("publish to counted: %w", err)
			}
			if round == 0 {
				bytes, calls := bytesOf(frames)
				how := "every frame on disk before it is acknowledged (the default)"
				if !synced {
					how = "frames forced to disk every 2 minutes (--nats-sync 2m)"
				}
				p.printf("\n%s; %.1f bytes a call on the wire\n", how, float64(bytes)/float64(calls))
				continue
			}
			bare, ours, ratio = append(bare, b), append(ours, c), append(ratio, c/b)
		}
		return nil
	}, s.Aggregator)
	if err != nil {
		return 0, err
	}
	return median(ours), table(o.Out, [][3]string{
		{"bare JetStream: publish, store, consume, decode", rate(median(bare)), ""},
		{"publish → counted, one limit an account", rate(median(ours)), fmt.Sprintf("%.2f of bare", median(ratio))},
	})
}

// keeping measures clickhouse-go's own insert and publish → durable, in turn.
func keeping(ctx context.Context, o Options, s *System, w *workload, p *lines) (float64, error) {
	var plain, ours, ratio []float64
	calls := min(o.Calls, 500_000)
	err := beside(ctx, func(ctx context.Context) error {
		if err := awaitTables(ctx, s.History); err != nil {
			return err
		}
		table, err := s.History.NewPlain(ctx)
		if err != nil {
			return err
		}
		for round := range o.Rounds + 1 {
			frames := w.frames(ksuid.New(), calls/frameCalls, frameCalls)
			a, err := plainInsert(ctx, table, frames, strconv.Itoa(round))
			if err != nil {
				return err
			}
			b, err := durable(ctx, s, frames)
			if err != nil {
				return fmt.Errorf("publish to durable: %w", err)
			}
			if round > 0 {
				plain, ours, ratio = append(plain, a), append(ours, b), append(ratio, b/a)
			}
		}
		return table.Close(ctx)
	}, s.Historian)
	if err != nil {
		return 0, err
	}
	p.printf("\nClickHouse, %d calls a round\n", calls)
	return median(ours), table(o.Out, [][3]string{
		{"clickhouse-go's own batch insert of the same rows (batches of 100,000)", rate(median(plain)), ""},
		{"publish → durable in ClickHouse, with rollups", rate(median(ours)), fmt.Sprintf("%.2f of plain", median(ratio))},
	})
}

// deciding measures admission, and crossing → 402 at another gateway, idle and
// under half of what can be counted.
func deciding(ctx context.Context, o Options, s *System, w *workload, countedRate float64, p *lines) (float64, error) {
	idle, loaded := make([]string, o.Crossings), make([]string, o.Crossings)
	for i := range o.Crossings {
		idle[i], loaded[i] = "idle-"+strconv.Itoa(i), "loaded-"+strconv.Itoa(i)
	}
	doc := accountsDocument(w.all(), 1<<50, "day")
	once := accountsDocument(append(append([]string(nil), idle...), loaded...), 1, "lifetime")
	once.Plans[0].ID = "once"
	for i := range once.Accounts {
		once.Accounts[i].Plan = "once"
	}
	doc.Plans, doc.Accounts = append(doc.Plans, once.Plans...), append(doc.Accounts, once.Accounts...)
	if err := s.Apply(ctx, doc); err != nil {
		return 0, fmt.Errorf("give the accounts a limit: %w", err)
	}
	return 0, beside(ctx, func(ctx context.Context) error {
		g, err := startGates(ctx, s.Connect, o.Logger)
		if err != nil {
			return err
		}
		return errors.Join(decide(ctx, o, s, w, g, idle, loaded, countedRate, p), g.end())
	}, s.Aggregator)
}

func decide(ctx context.Context, o Options, s *System, w *workload, g *gates, idle, loaded []string, countedRate float64, p *lines) error {
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := g.ready(wait, loaded[len(loaded)-1]); err != nil {
		return err
	}
	a := admission(g.second, w.all(), o.Rounds)
	quiet, err := g.crossing(ctx, idle, 5*time.Millisecond)
	if err != nil {
		return err
	}
	var busy []time.Duration
	var reached float64
	frames := w.frames(ksuid.New(), loadFrames, frameCalls)
	under := make(chan struct{})
	started := sync.OnceFunc(func() { close(under) })
	err = beside(ctx, func(ctx context.Context) error {
		select {
		case <-under:
		case <-ctx.Done():
			return ctx.Err()
		}
		var err error
		busy, err = g.crossing(ctx, loaded, 5*time.Millisecond)
		return err
	}, func(ctx context.Context) error { return load(ctx, s.JS, frames, countedRate/2, started, &reached) })
	if err != nil {
		return err
	}
	p.printf("\ngateways, %d accounts known\n", o.Accounts)
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1e3) }
	return table(o.Out, [][3]string{
		{"a bare concurrent map, an atomic word and the clock", fmt.Sprintf("%.0f ns", perCall(a.bareMap)), ""},
		{"admission, account by id", fmt.Sprintf("%.0f ns, %.2f of the bare map", perCall(a.byID), a.ratioOfBareID), fmt.Sprintf("%d allocations", a.byID.AllocsPerOp())},
		{"admission, account at hand", fmt.Sprintf("%.0f ns", perCall(a.atHand)), fmt.Sprintf("%d allocations", a.atHand.AllocsPerOp())},
		{"crossing call settled → 402 at another gateway, idle", "p50 " + ms(quantile(quiet, 0.5)), "p99 " + ms(quantile(quiet, 0.99))},
		{fmt.Sprintf("the same, beside %s published (aim: %s, half)", rate(reached), rate(countedRate/2)), "p50 " + ms(quantile(busy, 0.5)), "p99 " + ms(quantile(busy, 0.99))},
	})
}

func table(w io.Writer, rows [][3]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	t := &lines{w: tw}
	for _, r := range rows {
		t.printf("  %s\t%s\t%s\n", r[0], r[1], r[2])
	}
	return errors.Join(t.err, tw.Flush())
}

// lines keeps the first error of many prints.
type lines struct {
	w   io.Writer
	err error
}

func (l *lines) printf(format string, args ...any) {
	if l.err == nil {
		_, l.err = fmt.Fprintf(l.w, format, args...)
	}
}
