// Package run starts the parts of a process in order, stops them in reverse,
// and turns signals and errors into the process's exit code.
package run

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// DefaultStopTimeout is the time that stopping a whole Group may take.
const DefaultStopTimeout = 5 * time.Second

// ErrEnded is what a component added with AddRun fails with when its function
// returns nil although nobody asked it to stop. A finite job that is done waits
// for its context.
var ErrEnded = errors.New("ended by itself")

// Options configures a Group. The zero value is usable.
type Options struct {
	// StopTimeout bounds stopping all components together; 0 means
	// DefaultStopTimeout.
	StopTimeout time.Duration
	// Logger hears of every start and stop.
	Logger zerolog.Logger
	// Started hears of every component that was started, in order; nil: nobody does.
	Started func(name string)
}

// Group is a list of named components that are started in the order in which
// they were added and stopped in reverse. Add everything first, then call Run
// once; a Group is not for concurrent use.
type Group struct {
	o     Options
	parts []part
}

// part is a component reduced to its two ends. start returns once the component
// is ready; failed may deliver one error later.
type part struct {
	name  string
	start func(ctx context.Context, failed func(error)) error
	stop  func(ctx context.Context) error
}

// NewGroup returns an empty group.
func NewGroup(o Options) *Group {
	if o.StopTimeout <= 0 {
		o.StopTimeout = DefaultStopTimeout
	}
	return &Group{o: o}
}

// Add adds a component with two ends. start returns when the component is ready
// for the ones after it; its context is cancelled when the group is told to stop
// meanwhile, but must not be kept for afterwards. stop returns when the component
// is stopped and should give up when its context ends. Either may be nil. stop is
// only called if start returned nil.
func (g *Group) Add(name string, start, stop func(context.Context) error) {
	g.parts = append(g.parts, part{
		name: name,
		start: func(ctx context.Context, _ func(error)) error {
			if start == nil {
				return nil
			}
			return start(ctx)
		},
		stop: func(ctx context.Context) error {
			if stop == nil {
				return nil
			}
			return stop(ctx)
		},
	})
}

// AddRun adds a component that is one blocking function. It calls ready as soon
// as the components after it may start (further calls do nothing), and returns
// when its context is done, which happens at its turn in the reverse order.
// Returning an error, or nil without having been asked, stops the whole group.
func (g *Group) AddRun(name string, run func(ctx context.Context, ready func()) error) {
	var (
		cancel context.CancelFunc
		done   chan struct{}
		result error // what run returned; read after done
	)
	stop := func(ctx context.Context) error {
		cancel()
		select {
		case <-done:
			if errors.Is(result, context.Canceled) {
				return nil
			}
			return result
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	start := func(ctx context.Context, failed func(error)) error {
		// The group's context must not reach run: it would end every
		// component at once instead of in reverse order.
		var own context.Context
		own, cancel = context.WithCancel(context.WithoutCancel(ctx))
		done = make(chan struct{})
		readyc := make(chan struct{})
		var once sync.Once
		go func() {
			defer close(done)
			err := run(own, func() { once.Do(func() { close(readyc) }) })
			if own.Err() == nil {
				if err == nil {
					err = ErrEnded
				}
				failed(err)
				// The failure is reported as the group's cause; telling
				// it again as an error of stopping would double it.
				return
			}
			result = err
		}()
		select {
		case <-readyc:
			return nil
		case <-done:
			// failed has the error; the group looks there first.
			return errFailed
		case <-ctx.Done():
			// Told to stop before being ready: the component counts as
			// started, so that it is stopped like the others.
			return nil
		}
	}
	g.parts = append(g.parts, part{name: name, start: start, stop: stop})
}

// errFailed says that the error was already delivered through failed.
var errFailed = errors.New("failed")

// Run starts the components in order, waits until ctx is done or a component
// fails, and stops what was started in reverse order within the stop timeout. A
// component that does not stop in time is left behind and named in the error; the
// ones below it are stopped nevertheless. Run returns nil after a clean stop
// that ctx asked for, else the first failure joined with the errors of stopping.
func (g *Group) Run(ctx context.Context) error {
	startCtx, stopStarting := context.WithCancel(ctx)
	defer stopStarting()

	var (
		mu    sync.Mutex
		first error
	)
	broken := make(chan struct{})
	fail := func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		if first == nil {
			first = fmt.Errorf("%s: %w", name, err)
			close(broken)
			// A failure of a started component also ends the start of
			// the next one, which may be waiting for exactly that.
			stopStarting()
		}
	}

	started := 0
	for _, p := range g.parts {
		if startCtx.Err() != nil {
			break
		}
		begin := time.Now()
		err := p.start(startCtx, func(err error) { fail(p.name, err) })
		if err != nil {
			if !errors.Is(err, errFailed) && (startCtx.Err() == nil || !errors.Is(err, startCtx.Err())) {
				fail(p.name, err)
			}
			break
		}
		started++
		g.o.Logger.Debug().Str("component", p.name).Dur("took_ms", time.Since(begin)).Msg("started")
		if g.o.Started != nil {
			g.o.Started(p.name)
		}
	}
	if started == len(g.parts) {
		select {
		case <-ctx.Done():
		case <-broken:
		}
	}

	stopErr := g.stop(context.WithoutCancel(ctx), g.parts[:started])
	mu.Lock()
	defer mu.Unlock()
	return errors.Join(first, stopErr)
}

// stop stops parts in reverse order. Each may use what is left of the time except
// a share kept back for every part below it, so that one that hangs can't take
// the last chance of the ones that still have something to put on disk.
func (g *Group) stop(ctx context.Context, parts []part) error {
	if len(parts) == 0 {
		return nil
	}
	end := time.Now().Add(g.o.StopTimeout)
	share := g.o.StopTimeout / time.Duration(4*len(parts))
	var (
		errs  []error
		stuck []string
	)
	for i := len(parts) - 1; i >= 0; i-- {
		p := parts[i]
		begin := time.Now()
		partCtx, cancel := context.WithDeadline(ctx, end.Add(-share*time.Duration(i)))
		done := make(chan error, 1)
		go func() { done <- p.stop(partCtx) }()
		select {
		case err := <-done:
			switch {
			case err == nil:
				g.o.Logger.Debug().Str("component", p.name).Dur("took_ms", time.Since(begin)).Msg("stopped")
			case partCtx.Err() != nil && errors.Is(err, partCtx.Err()):
				stuck = append(stuck, p.name)
			default:
				errs = append(errs, fmt.Errorf("stop %s: %w", p.name, err))
			}
		case <-partCtx.Done():
			stuck = append(stuck, p.name)
		}
		cancel()
	}
	if len(stuck) > 0 {
		errs = append(errs, &StuckError{Components: stuck, After: g.o.StopTimeout})
	}
	return errors.Join(errs...)
}

// StuckError names the components that had not stopped when their time was over.
type StuckError struct {
	Components []string      // in the order in which they were told to stop
	After      time.Duration // the whole group's stop timeout
}

// Error is a sentence that names the components.
func (e *StuckError) Error() string {
	return fmt.Sprintf("did not stop within %s: %s", e.After, strings.Join(e.Components, ", "))
}
