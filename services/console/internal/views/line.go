package views

import (
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/limits"
)

// DecisionLine is a decision as the API tells it.
type DecisionLine struct {
	ID      string `json:"id"`
	Account string `json:"account"`
	LimitID string `json:"limit_id"`
	Meter   string `json:"meter"`
	// Verdict as it was decided, Effective as it holds now: what a period said
	// ends with it.
	Verdict     string       `json:"verdict"`
	Effective   string       `json:"effective_verdict"`
	Code        string       `json:"code,omitempty"`
	Revision    uint64       `json:"revision"`
	Shard       uint32       `json:"shard"`
	Used        int64        `json:"used"`
	Room        int64        `json:"room,omitempty"`
	Amount      int64        `json:"amount"`
	Window      string       `json:"window"`
	PeriodStart usage.Micros `json:"period_start_unix_micros"`
	PeriodEnd   usage.Micros `json:"period_end_unix_micros"`
	PlanVersion string       `json:"plan_version"`
	DecidedAt   usage.Micros `json:"decided_at_unix_micros"` // Used is as of then
	Cause       usage.Micros `json:"cause_unix_micros"`
	ActionURL   string       `json:"action_url,omitempty"`
	Sequence    uint64       `json:"sequence,omitempty"`
}

// LineOf tells a decision at a time.
func LineOf(d *usage.Decision, now usage.Micros) DecisionLine {
	return DecisionLine{
		ID: d.ID, Account: d.Account, LimitID: d.LimitID, Meter: string(d.Meter), Verdict: d.Verdict.String(), Effective: limits.Effective(d, now).String(),
		Code: string(d.Code), Revision: d.Revision, Shard: d.Shard, Used: d.Used, Room: d.Room, Amount: d.Amount, Window: string(d.Window),
		PeriodStart: d.PeriodStart, PeriodEnd: d.PeriodEnd, PlanVersion: d.PlanVersion, DecidedAt: d.DecidedAt, Cause: d.Cause, ActionURL: d.ActionURL,
	}
}
