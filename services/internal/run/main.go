package run

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/tollkeeper/tollkeeper/services/internal/heapfloor"
)

// ExitError is an error that chooses the exit code of its process.
type ExitError struct {
	Code int
	Err  error
}

// Error is the wrapped error's sentence.
func (e *ExitError) Error() string { return e.Err.Error() }

// Unwrap returns the wrapped error.
func (e *ExitError) Unwrap() error { return e.Err }

// Main runs fn and ends the process. The first SIGINT, SIGTERM or SIGHUP (the terminal
// was closed) cancels fn's context; a second one ends the process at once with 128 + the signal's number.
// Exit codes: 0 when fn returned nil (or the cancellation it was asked for), the
// code of an ExitError, else 1. Small heaps are collected by heapfloor's rule. An error is printed on stderr as one sentence
// (joined errors: one a line).
func Main(fn func(ctx context.Context) error) {
	heapfloor.Set(heapfloor.DefaultBytes)
	// Two places: the second signal must not be lost while the first is handled.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, endings(signal.Ignored)...)
	os.Exit(exec(filepath.Base(os.Args[0]), os.Stderr, signals, fn))
}

// endings are the signals that end a process in order: SIGHUP unless whoever started it
// had it ignore that, as nohup does. SIGINT is one also where it is ignored: shells start
// what a script puts into the background so, and scripts end it by SIGINT all the same.
func endings(ignored func(os.Signal) bool) []os.Signal {
	all := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !ignored(syscall.SIGHUP) {
		all = append(all, syscall.SIGHUP)
	}
	return all
}

// exec is Main without the process around it.
func exec(name string, stderr io.Writer, signals <-chan os.Signal, fn func(ctx context.Context) error) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()

	for asked := false; ; {
		select {
		case err := <-done:
			if err == nil || asked && errors.Is(err, context.Canceled) && !isJoined(err) {
				return 0
			}
			say(stderr, name, err.Error())
			var exit *ExitError
			if errors.As(err, &exit) {
				return exit.Code
			}
			return 1
		case sig := <-signals:
			if asked {
				say(stderr, name, fmt.Sprintf("%s again: ended without stopping in order", sig))
				if n, ok := sig.(syscall.Signal); ok {
					return 128 + int(n)
				}
				return 1
			}
			asked = true
			cancel()
		}
	}
}

// isJoined tells errors.Join's results, of which only a part may be the
// cancellation, from a plain one.
func isJoined(err error) bool {
	_, ok := err.(interface{ Unwrap() []error })
	return ok
}

func say(w io.Writer, name, sentence string) {
	// There is nowhere left to report a failing stderr to.
	_, _ = fmt.Fprintf(w, "%s: %s\n", name, strings.ReplaceAll(sentence, "\n", "\n"+name+": "))
}
