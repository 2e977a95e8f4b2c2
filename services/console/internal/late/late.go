// Package late is a history that is opened while the console serves already:
// ClickHouse may come long after.
package late

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// History is empty until Run has opened it. Its methods may be called concurrently.
type History struct {
	h atomic.Pointer[history.History]
}

var errNotOpen = errors.New("ClickHouse was not reached yet")

// Run opens the history and closes it when ctx is done.
func (l *History) Run(ctx context.Context, o history.Options) error {
	h, err := history.Open(ctx, o)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	l.h.Store(h)
	<-ctx.Done()
	return h.Close()
}

// Ping asks whether ClickHouse answers.
func (l *History) Ping(ctx context.Context) error {
	if h := l.h.Load(); h != nil {
		return h.Ping(ctx)
	}
	return errNotOpen
}

// Calls is history.Calls.
func (l *History) Calls(ctx context.Context, q history.CallsQuery) ([]history.CallsPoint, error) {
	if h := l.h.Load(); h != nil {
		return h.Calls(ctx, q)
	}
	return nil, errNotOpen
}

// Decisions is history.Decisions.
func (l *History) Decisions(ctx context.Context, q history.DecisionsQuery) ([]history.PastDecision, error) {
	if h := l.h.Load(); h != nil {
		return h.Decisions(ctx, q)
	}
	return nil, errNotOpen
}

// Corrections is history.Corrections.
func (l *History) Corrections(ctx context.Context, q history.CorrectionsQuery) ([]history.PastCorrection, error) {
	if h := l.h.Load(); h != nil {
		return h.Corrections(ctx, q)
	}
	return nil, errNotOpen
}

// Position is history.Position.
func (l *History) Position(ctx context.Context) (uint64, error) {
	if h := l.h.Load(); h != nil {
		return h.Position(ctx)
	}
	return 0, errNotOpen
}
