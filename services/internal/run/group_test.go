package run

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// diary records what happened, in order. The group calls one component at a
// time, and run functions only write while the group waits for them.
type diary struct{ lines []string }

func (d *diary) note(s string) { d.lines = append(d.lines, s) }

func (d *diary) startStop(g *Group, name string) {
	g.Add(name,
		func(context.Context) error { d.note("start " + name); return nil },
		func(context.Context) error { d.note("stop " + name); return nil })
}

func (d *diary) running(g *Group, name string) {
	g.AddRun(name, func(ctx context.Context, ready func()) error {
		d.note("start " + name)
		ready()
		<-ctx.Done()
		d.note("stop " + name)
		return nil
	})
}

func TestStartsInOrderAndStopsInReverse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d diary
		g := NewGroup(Options{})
		d.startStop(g, "nats")
		d.running(g, "aggregator")
		d.startStop(g, "gateway")
		d.running(g, "console")

		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Fatalf("a clean stop returned %v", err)
		}
		want := []string{
			"start nats", "start aggregator", "start gateway", "start console",
			"stop console", "stop gateway", "stop aggregator", "stop nats",
		}
		if diff := cmp.Diff(want, d.lines); diff != "" {
			t.Error(diff)
		}
	})
}

func TestTheNextComponentWaitsForReadiness(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var secondStarted time.Duration
		begin := time.Now()
		g := NewGroup(Options{})
		g.AddRun("slow", func(ctx context.Context, ready func()) error {
			time.Sleep(3 * time.Second) // the bubble's clock
			ready()
			ready() // saying it twice is harmless
			<-ctx.Done()
			return ctx.Err()
		})
		ctx, cancel := context.WithCancel(t.Context())
		g.Add("second", func(context.Context) error {
			secondStarted = time.Since(begin)
			cancel()
			return nil
		}, nil)
		if err := g.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if secondStarted != 3*time.Second {
			t.Errorf("second started after %s, want 3s", secondStarted)
		}
	})
}

func TestAFailingStartStopsWhatWasStarted(t *testing.T) {
	t.Parallel()
	var d diary
	broken := errors.New("address in use")
	g := NewGroup(Options{})
	d.startStop(g, "nats")
	g.Add("gateway", func(context.Context) error { return broken },
		func(context.Context) error { d.note("stop gateway"); return nil })
	d.startStop(g, "console")

	err := g.Run(t.Context())
	if !errors.Is(err, broken) || err.Error() != "gateway: address in use" {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff([]string{"start nats", "stop nats"}, d.lines); diff != "" {
		t.Error(diff)
	}
}

func TestTheFirstFailureWhileRunningStopsAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d diary
		broken := errors.New("child process died")
		g := NewGroup(Options{})
		d.startStop(g, "nats")
		g.AddRun("clickhouse", func(ctx context.Context, ready func()) error {
			ready()
			time.Sleep(time.Second)
			return broken
		})
		d.running(g, "console")

		err := g.Run(t.Context())
		if !errors.Is(err, broken) || err.Error() != "clickhouse: child process died" {
			t.Errorf("got %v", err)
		}
		want := []string{"start nats", "start console", "stop console", "stop nats"}
		if diff := cmp.Diff(want, d.lines); diff != "" {
			t.Error(diff)
		}
	})
}

func TestAComponentThatEndsByItselfIsAFailure(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(context.Context, func()) error{
		"before it was ready": func(context.Context, func()) error { return nil },
		"after it was ready":  func(_ context.Context, ready func()) error { ready(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := NewGroup(Options{})
			g.AddRun("historian", run)
			if err := g.Run(t.Context()); !errors.Is(err, ErrEnded) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAFailureEndsTheStartThatWaitsForIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("disk full")
		g := NewGroup(Options{})
		g.AddRun("nats", func(ctx context.Context, ready func()) error {
			ready()
			time.Sleep(time.Second)
			return broken
		})
		g.Add("aggregator", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, nil)
		err := g.Run(t.Context())
		if err == nil || err.Error() != "nats: disk full" {
			t.Errorf("got %v", err)
		}
	})
}

func TestStoppingDuringTheStartIsClean(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d diary
		g := NewGroup(Options{})
		d.startStop(g, "nats")
		g.AddRun("never ready", func(ctx context.Context, _ func()) error {
			<-ctx.Done()
			d.note("stop never ready")
			return nil
		})
		d.startStop(g, "console")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("got %v", err)
		}
		if diff := cmp.Diff([]string{"start nats", "stop never ready", "stop nats"}, d.lines); diff != "" {
			t.Error(diff)
		}
	})
}

func TestWhatHangsIsNamedAndTheRestStillStops(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d diary
		release := make(chan struct{})
		defer close(release)
		g := NewGroup(Options{StopTimeout: 4 * time.Second})
		d.startStop(g, "nats")
		g.Add("deaf", nil, func(context.Context) error { <-release; return nil })
		g.AddRun("slow", func(ctx context.Context, ready func()) error {
			ready()
			<-ctx.Done()
			<-release
			return nil
		})
		d.startStop(g, "console")

		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		begin := time.Now()
		cancel()
		err := <-done
		if took := time.Since(begin); took > 4*time.Second {
			t.Errorf("stopping took %s", took)
		}
		var stuck *StuckError
		if !errors.As(err, &stuck) {
			t.Fatalf("got %v", err)
		}
		if diff := cmp.Diff([]string{"slow", "deaf"}, stuck.Components); diff != "" {
			t.Error(diff)
		}
		if want := "did not stop within 4s: slow, deaf"; err.Error() != want {
			t.Errorf("got %q, want %q", err, want)
		}
		want := []string{"start nats", "start console", "stop console", "stop nats"}
		if diff := cmp.Diff(want, d.lines); diff != "" {
			t.Error(diff)
		}
	})
}

func TestErrorsOfStoppingAreJoined(t *testing.T) {
	t.Parallel()
	flush := errors.New("flush failed")
	boom := errors.New("boom")
	g := NewGroup(Options{})
	g.Add("spool", nil, func(context.Context) error { return flush })
	g.Add("gateway", func(context.Context) error { return boom }, nil)
	err := g.Run(t.Context())
	if !errors.Is(err, flush) || !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if want := "gateway: boom\nstop spool: flush failed"; err.Error() != want {
		t.Errorf("got %q", err)
	}
	if strings.Count(err.Error(), "boom") != 1 {
		t.Errorf("a failure is told once: %v", err)
	}
}

func TestAnEmptyGroupWaitsForItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := NewGroup(Options{}).Run(ctx); err != nil {
		t.Fatal(err)
	}
}
