package usage

import "fmt"

// Code is the machine code of a refusal.
type Code string

// The codes and what they answer. 402 is for what money fixes now, 429 only
// for limits declared as rates, 403 for what neither fixes, 503 for what the
// gateway cannot know (law 5).
const (
	QuotaExceeded       Code = "QUOTA_EXCEEDED"
	SpendCapReached     Code = "SPEND_CAP_REACHED"
	CreditsDepleted     Code = "CREDITS_DEPLETED"
	CreditsInsufficient Code = "CREDITS_INSUFFICIENT"
	SubscriptionExpired Code = "SUBSCRIPTION_EXPIRED"
	TrialEnded          Code = "TRIAL_ENDED"
	PaymentFailed       Code = "PAYMENT_FAILED"
	PlanRequired        Code = "PLAN_REQUIRED"
	RateLimited         Code = "RATE_LIMITED"
	CostExceedsLimit    Code = "COST_EXCEEDS_LIMIT"
	BillingStateUnknown Code = "BILLING_STATE_UNKNOWN"
)

// Status returns the HTTP status that the code answers; 0 for a code that is
// not ours.
func (c Code) Status() int {
	switch c {
	case QuotaExceeded, SpendCapReached, CreditsDepleted, CreditsInsufficient, SubscriptionExpired, TrialEnded, PaymentFailed, PlanRequired:
		return 402
	case RateLimited:
		return 429
	case CostExceedsLimit:
		return 403
	case BillingStateUnknown:
		return 503
	}
	return 0
}

// Verdict of a decision.
type Verdict uint8

// The verdicts, in order of severity.
const (
	Allow Verdict = iota + 1
	Warn
	Deny
)

func (v Verdict) String() string {
	switch v {
	case Allow:
		return "allow"
	case Warn:
		return "warn"
	case Deny:
		return "deny"
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// Tier says how strictly a limit is enforced.
type Tier string

// The tiers.
const (
	// TierEventual decides after counting: the overshoot is at most
	// rate x decision latency, and both are exported as metrics.
	TierEventual Tier = "eventual"
	// TierExact admits from leases: never a call beyond the amount.
	TierExact Tier = "exact"
	// TierLeased admits from leases, and hands out again what a silent gateway
	// held: at most the limit's MaxExposure beyond the amount.
	TierLeased Tier = "leased"
)

// Leased reports whether calls are admitted from leases.
func (t Tier) Leased() bool { return t == TierExact || t == TierLeased }

// LeaseTerms are the rules by which gateways share an allowance; spans are in
// microseconds of the ledger's clock, and 0 is the default.
type LeaseTerms struct {
	// Term is how long a lease may be used after it was granted or renewed.
	Term Micros
	// Patience is how long a gateway may take to answer a recall before others
	// are denied without waiting for it.
	Patience Micros
	// ReleaseAfter is after how long a silence what a lease held is handed out
	// again, MaxExposure how many units may be given up so at any time. Both are
	// of the tier leased only.
	ReleaseAfter Micros
	MaxExposure  int64
}

// Defaults of LeaseTerms.
const (
	DefaultLeaseTerm     = Micros(5_000_000)
	DefaultLeasePatience = Micros(400_000)
)

// MaxLeaseSpan bounds each span of LeaseTerms.
const MaxLeaseSpan = Micros(24 * 3600 * 1_000_000)

// WindowKind names a limit's window.
type WindowKind string

// The windows: calendar windows in UTC, and the account's whole life.
const (
	Minute   WindowKind = "minute"
	Hour     WindowKind = "hour"
	Day      WindowKind = "day"
	Week     WindowKind = "week" // from Monday
	Month    WindowKind = "month"
	Lifetime WindowKind = "lifetime"
)

// Filter restricts a limit to some calls; an empty list matches every call.
type Filter struct {
	Models, Routes, Methods []string
}

// Empty reports whether the filter matches every call.
func (f *Filter) Empty() bool {
	return len(f.Models) == 0 && len(f.Routes) == 0 && len(f.Methods) == 0
}

// Match reports whether a call of this model, route and method is meant. It
// does not allocate.
func (f *Filter) Match(model, route, method string) bool {
	return oneOf(f.Models, model) && oneOf(f.Routes, route) && oneOf(f.Methods, method)
}

func oneOf(list []string, s string) bool {
	if len(list) == 0 {
		return true
	}
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

// Limit is meter x filter x window x amount x tier x what happens at the
// threshold.
type Limit struct {
	// ID is unique within its plan.
	ID     string
	Meter  Meter
	Filter Filter
	Window WindowKind
	// Amount that may be used in a window; the call that reaches it is the
	// last one admitted.
	Amount int64
	Tier   Tier
	// WarnPercent of the amount from which the verdict is Warn; 0 is never.
	WarnPercent uint32
	// Code of the refusal; QuotaExceeded when empty.
	Code Code
	// ActionURL is where a person can mend it.
	ActionURL string
	// Lease is of the tiers exact and leased only.
	Lease LeaseTerms
}

// RefusalCode returns the limit's code or the default.
func (l *Limit) RefusalCode() Code {
	if l.Code == "" {
		return QuotaExceeded
	}
	return l.Code
}

// Plan is a named set of limits.
type Plan struct {
	ID     string
	Limits []Limit
}

// Account is who pays. Accounts nest: the tightest limit on the path wins.
type Account struct {
	ID string
	// Parent is empty for a root; the root of an account never changes.
	Parent string
	// Plan is empty for an account without limits of its own.
	Plan   string
	Closed bool
}

// Decision is the verdict for an account and one of its limits.
type Decision struct {
	// ID is a ksuid in text form, the same whenever the log is read again.
	ID      string
	Account string
	// LimitID is "<plan>/<limit>".
	LimitID string
	Meter   Meter
	Verdict Verdict
	// Code of the refusal, empty unless Verdict is Deny.
	Code Code
	// Revision is the ledger sequence that led to it; a newer one always wins.
	Revision uint64
	Shard    uint32
	Used     int64
	Amount   int64
	Window   WindowKind
	// PeriodStart and PeriodEnd bound the window [start, end). A Deny ends by itself at
	// PeriodEnd. Both are 0 for lifetime, and where the end of the window changes
	// nothing because the amount is 0.
	PeriodStart, PeriodEnd Micros
	Filter                 Filter
	PlanVersion            string
	// DecidedAt is the stream time of the entry that led to it.
	DecidedAt Micros
	// Cause is the event time of the call that crossed the threshold; 0 when
	// no call did.
	Cause       Micros
	ActionURL   string
	WarnPercent uint32
	Epoch       uint64
	// Tier of the limit; empty is eventual.
	Tier Tier
	// Room is how many units could still be had although Verdict is Deny: one
	// call's need was refused, and a smaller one may pass. A gateway refuses by
	// itself only where it is 0. Tiers exact and leased only.
	Room int64
}
