package run

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestExitCodes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		signals []os.Signal
		fn      func(context.Context) error
		code    int
		says    string
	}{
		"nil is 0": {fn: func(context.Context) error { return nil }},
		"an error is 1 and a sentence": {
			fn:   func(context.Context) error { return errors.New("plans.yaml:7: unknown meter") },
			code: 1, says: "tollkeeper: plans.yaml:7: unknown meter\n",
		},
		"joined errors are lines": {
			fn:   func(context.Context) error { return errors.Join(errors.New("one"), errors.New("two")) },
			code: 1, says: "tollkeeper: one\ntollkeeper: two\n",
		},
		"an error may choose its code": {
			fn: func(context.Context) error {
				return fmt.Errorf("apply: %w", &ExitError{Code: 2, Err: errors.New("no such flag")})
			},
			code: 2, says: "tollkeeper: apply: no such flag\n",
		},
		"a signal cancels": {
			signals: []os.Signal{syscall.SIGTERM},
			fn:      func(ctx context.Context) error { <-ctx.Done(); return nil },
		},
		"so does a closed terminal": {
			signals: []os.Signal{syscall.SIGHUP},
			fn:      func(ctx context.Context) error { <-ctx.Done(); return nil },
		},
		"the cancellation that was asked for is no error": {
			signals: []os.Signal{syscall.SIGINT},
			fn:      func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("replay: %w", ctx.Err()) },
		},
		"a cancellation nobody asked for is one": {
			fn:   func(context.Context) error { return context.Canceled },
			code: 1, says: "tollkeeper: context canceled\n",
		},
		"an error after a signal is told": {
			signals: []os.Signal{syscall.SIGINT},
			fn:      func(ctx context.Context) error { <-ctx.Done(); return &StuckError{Components: []string{"nats"}} },
			code:    1, says: "tollkeeper: did not stop within 0s: nats\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			signals := make(chan os.Signal, 2)
			for _, s := range c.signals {
				signals <- s
			}
			var out bytes.Buffer
			if code := exec("tollkeeper", &out, signals, c.fn); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if out.String() != c.says {
				t.Errorf("said %q, want %q", out.String(), c.says)
			}
		})
	}
}

// A terminal that is closed ends a program in order too, unless it was to outlive it.
func TestAClosedTerminalEndsAProgramUnlessItWasToOutliveIt(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ignored os.Signal
		want    []os.Signal
	}{
		"in a terminal":             {nil, []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}},
		"under nohup":               {syscall.SIGHUP, []os.Signal{syscall.SIGINT, syscall.SIGTERM}},
		"in a script's background":  {syscall.SIGINT, []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}},
		"where SIGTERM was ignored": {syscall.SIGTERM, []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}},
	} {
		if got := endings(func(s os.Signal) bool { return s == c.ignored }); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestASecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	signals := make(chan os.Signal, 2)
	signals <- syscall.SIGINT
	signals <- syscall.SIGINT
	release := make(chan struct{})
	defer close(release)
	var out bytes.Buffer
	code := exec("tollkeeper", &out, signals, func(context.Context) error { <-release; return nil })
	if code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	if !strings.Contains(out.String(), "interrupt again") {
		t.Errorf("said %q", out.String())
	}
}
