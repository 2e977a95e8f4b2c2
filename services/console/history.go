package console

import (
	"context"

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
