package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"text/tabwriter"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"
)

// Options of a bench. The engines and services are made by the caller, who
// alone may know them.
type Options struct {
	Rounds   int
	Calls    int // of a throughput round
	Accounts int
	Shards   uint32
	Seed     uint64
	// System starts engines and services on a fresh store; synced says whether
	// every frame is forced to disk before it is acknowledged.
	System func(ctx context.Context, synced bool) (*System, error)
	Out    io.Writer
	Logger zerolog.Logger
}

// System is what a bench runs against.
type System struct {
	NC *nats.Conn
	JS jetstream.JetStream
	// Limit gives every account one unfiltered limit that nobody reaches.
	Limit func(ctx context.Context, accounts []string) error
	// Aggregator counts until its context is done.
	Aggregator func(ctx context.Context) error
	// Stop ends the engines and removes their store.
	Stop func() error
}

const frameCalls = 1000

// Run measures and prints.
func Run(ctx context.Context, o Options) error {
	p := &lines{w: o.Out}
	p.printf("%d rounds a figure, interleaved, medians; %d CPUs, Go %s; %d accounts (zipf 1.1), %d shards, frames of %d calls\n\n",
		o.Rounds, runtime.NumCPU(), runtime.Version(), o.Accounts, o.Shards, frameCalls)
	for _, synced := range [...]bool{true, false} {
		if err := throughput(ctx, o, synced, p); err != nil {
			return err
		}
	}
	return p.err
}

func throughput(ctx context.Context, o Options, synced bool, p *lines) (err error) {
	sys, err := o.System(ctx, synced)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sys.Stop()) }()
	w := newWorkload(o.Seed, o.Accounts, o.Shards)
	if err := sys.Limit(ctx, w.all()); err != nil {
		return fmt.Errorf("give the accounts a limit: %w", err)
	}
	run, stop := context.WithCancel(ctx)
	defer stop()
	g, run := errgroup.WithContext(run)
	g.Go(func() error { return sys.Aggregator(run) })
	var bare, ours, ratio []float64
	g.Go(func() error {
		defer stop()
		// One round to warm up, not counted.
		for round := range o.Rounds + 1 {
			frames := w.frames(ksuid.New(), o.Calls/frameCalls, frameCalls)
			b, err := bareJetStream(run, sys.JS, frames)
			if err != nil {
				return fmt.Errorf("bare JetStream: %w", err)
			}
			c, err := counted(run, sys.NC, sys.JS, o.Shards, frames)
			if err != nil {
				return fmt.Errorf("publish to counted: %w", err)
			}
			if round == 0 {
				bytes, calls := bytesOf(frames)
				p.printf("sync before ack: %v; %.1f bytes a call on the wire\n", synced, float64(bytes)/float64(calls))
				continue
			}
			bare, ours, ratio = append(bare, b), append(ours, c), append(ratio, c/b)
		}
		return nil
	})
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	if len(ours) == 0 {
		return ctx.Err()
	}
	tw := tabwriter.NewWriter(o.Out, 0, 0, 2, ' ', 0)
	t := &lines{w: tw}
	t.printf("  bare JetStream: publish, store, consume, decode\t%s\n", rate(median(bare)))
	t.printf("  publish → counted\t%s\tratio %.2f\n", rate(median(ours)), median(ratio))
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
