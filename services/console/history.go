package console

import (
	"context"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Group is by what a series of history is split.
type Group string

// The groups.
const (
	ByCode    Group = "code"
	ByAccount Group = "account"
	ByModel   Group = "model"
)

// CallsQuery asks for calls in [From, To), in steps counted from From.
type CallsQuery struct {
	From, To time.Time
	Step     time.Duration
	Group    Group
	// Account restricts it to one account when not empty.
	Account string
	// Top is how many groups are told apart; the others are one named "".
	Top int
}

// CallsPoint is a step of a group.
type CallsPoint struct {
	// Step counts from 0.
	Step int
	// Name of the group: code (empty: admitted), account or model.
	Name string
	// Other says that it is the sum of the groups that are not told apart.
	Other                     bool
	Admitted, Refused         int64
	InputTokens, OutputTokens int64
}

// DecisionsQuery asks for decisions, newest first.
type DecisionsQuery struct {
	Account string // empty: of all
	Verdict string // allow, warn, deny; empty: any
	// Before is the sequence in the decisions' stream before which to begin; 0:
	// at the newest.
	Before uint64
	Limit  int
}

// PastDecision is a revision of a decision.
type PastDecision struct {
	// Sequence in the decisions' stream.
	Sequence uint64
	usage.Decision
}

// History is what the console asks ClickHouse; services/internal/history answers.
// Its methods may be called concurrently and end with their context.
type History interface {
	// Ping says whether it can be asked now.
	Ping(ctx context.Context) error
	// Calls returns the points that are not empty, in any order.
	Calls(ctx context.Context, q CallsQuery) ([]CallsPoint, error)
	// Decisions returns at most q.Limit decisions, newest first.
	Decisions(ctx context.Context, q DecisionsQuery) ([]PastDecision, error)
	// Position returns the newest ledger entry that is in history; 0 for none.
	Position(ctx context.Context) (uint64, error)
}
