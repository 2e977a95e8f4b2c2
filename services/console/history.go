package console

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// History is what the console asks ClickHouse; *history.History answers. Its
// methods may be called concurrently and end with their context.
type History interface {
	// Ping says whether it can be asked now.
	Ping(ctx context.Context) error
	// Calls returns the points that are not empty, in any order.
	Calls(ctx context.Context, q history.CallsQuery) ([]history.CallsPoint, error)
	// Decisions returns at most q.Limit decisions, newest first.
	Decisions(ctx context.Context, q history.DecisionsQuery) ([]history.PastDecision, error)
	// Corrections returns at most q.Limit corrections, newest first.
	Corrections(ctx context.Context, q history.CorrectionsQuery) ([]history.PastCorrection, error)
	// Position returns the newest ledger entry with calls that is in history; 0
	// for none.
	Position(ctx context.Context) (uint64, error)
}

// lateHistory is a history that is opened while the console serves already:
// ClickHouse may come long after.
type lateHistory struct {
	h atomic.Pointer[history.History]
}

var errNotOpen = errors.New("ClickHouse was not reached yet")

// run opens the history and closes it when ctx is done.
func (l *lateHistory) run(ctx context.Context, o history.Options) error {
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

func (l *lateHistory) Ping(ctx context.Context) error {
	if h := l.h.Load(); h != nil {
		return h.Ping(ctx)
	}
	return errNotOpen
}

func (l *lateHistory) Calls(ctx context.Context, q history.CallsQuery) ([]history.CallsPoint, error) {
	if h := l.h.Load(); h != nil {
		return h.Calls(ctx, q)
	}
	return nil, errNotOpen
}

func (l *lateHistory) Decisions(ctx context.Context, q history.DecisionsQuery) ([]history.PastDecision, error) {
	if h := l.h.Load(); h != nil {
		return h.Decisions(ctx, q)
	}
	return nil, errNotOpen
}

func (l *lateHistory) Corrections(ctx context.Context, q history.CorrectionsQuery) ([]history.PastCorrection, error) {
	if h := l.h.Load(); h != nil {
		return h.Corrections(ctx, q)
	}
	return nil, errNotOpen
}

func (l *lateHistory) Position(ctx context.Context) (uint64, error) {
	if h := l.h.Load(); h != nil {
		return h.Position(ctx)
	}
	return 0, errNotOpen
}
