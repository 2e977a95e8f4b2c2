package ledger

import (
	"strconv"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// UsageSubject is where the owner of a shard answers a UsageRequest (JSON)
// with a UsageReply (JSON). No responder means that nobody owns the shard.
func UsageSubject(shard uint32) string {
	return "query.usage." + strconv.FormatUint(uint64(shard), 10)
}

// Headers of an answer to a UsageRequest. Those of an error are as NATS's own services
// write them; there is no UsageReply then. CountingHeader says up to which entry the
// shard is still being counted after it was taken over: until then calls, and
// accounts, are missing that were counted before.
const (
	ErrorHeader     = "Nats-Service-Error"
	ErrorCodeHeader = "Nats-Service-Error-Code"
	CountingHeader  = "Tollkeeper-Counting-To"
)

// MaxUsageAccounts bounds the accounts of one reply.
const MaxUsageAccounts = 1000

// UsageRequest asks for counters as they stand now.
type UsageRequest struct {
	// Accounts by id; when empty, the Top accounts by admitted calls.
	Accounts []string `json:"accounts,omitempty"`
	// Top is how many accounts are wanted when Accounts is empty; at most MaxUsageAccounts.
	Top int `json:"top,omitempty"`
	// TotalsOnly leaves out how limits stand, and the state's hash.
	TotalsOnly bool `json:"totals_only,omitempty"`
}

// UsageReply holds the counters of some accounts of a shard.
type UsageReply struct {
	Shard uint32 `json:"shard"`
	Epoch uint64 `json:"epoch"`
	// Sequence is the newest ledger entry that is counted, at StreamTime.
	Sequence    uint64         `json:"sequence"`
	StreamTime  usage.Micros   `json:"stream_time_unix_micros"`
	PlanVersion string         `json:"plan_version"`
	StateHash   string         `json:"state_hash,omitempty"`
	Accounts    []AccountUsage `json:"accounts"`
	// Total sums every account of the shard, each call once (at the account
	// that paid), whatever the request asked for.
	Total Totals `json:"total"`
	// AccountCount is how many accounts the shard has.
	AccountCount int `json:"account_count"`
}

// Totals are lifetime sums.
type Totals struct {
	Admitted int64 `json:"admitted_calls"`
	Refused  int64 `json:"refused_calls"`
	// Meters: sums of what was reported, by meter; a meter nobody reported is absent.
	Meters map[usage.Meter]int64 `json:"meters"`
	// Adjusted is what of Meters stems from corrections; that of calls is beside
	// Admitted, which is not corrected.
	Adjusted map[usage.Meter]int64 `json:"adjusted,omitempty"`
	Hash     uint64                `json:"hash,string,omitempty"` // of the calls themselves (pkg/audit); not in AccountUsage.Totals
}

// AccountUsage is what an account has used.
type AccountUsage struct {
	ID     string `json:"id"`
	Parent string `json:"parent,omitempty"`
	Plan   string `json:"plan,omitempty"`
	// Closed: plans named the account, and do not any more. Its keys are refused.
	Closed bool `json:"closed,omitempty"`
	// Own sums the calls of this very account; Totals those of its children too.
	Own    Totals       `json:"own"`
	Totals Totals       `json:"totals"`
	Limits []LimitUsage `json:"limits"`
}

// LimitUsage is how a limit of an account stands: Used is the same number as in a
// decision of this moment, and Remaining is 0 where every call is denied.
type LimitUsage struct {
	LimitID string           `json:"limit_id"` // "<plan>/<limit>"
	Meter   usage.Meter      `json:"meter"`
	Window  usage.WindowKind `json:"window"`
	Amount  int64            `json:"amount"`
	// Used is what was counted; in the tiers exact and leased, once a gateway has
	// asked, what is spent for certain, which is ahead of the counter while frames
	// are on their way.
	Used int64 `json:"used"`
	// Remaining may yet be used, by units that gateways hold or that can be handed
	// to them; not below 0. Dead units are neither used nor remaining.
	Remaining int64 `json:"remaining"`
	// Room is how many units a smaller call could still get although Verdict is
	// deny; 0: every call that needs the meter is refused.
	Room        int64        `json:"room,omitempty"`
	PeriodStart usage.Micros `json:"period_start_unix_micros"`
	PeriodEnd   usage.Micros `json:"period_end_unix_micros"` // 0: lifetime
	Verdict     string       `json:"verdict"`
	DecisionID  string       `json:"decision_id,omitempty"`
	Revision    uint64       `json:"revision,omitempty"`
	Tier        usage.Tier   `json:"tier"`
	// Lease is how the allowance of the present window is shared; nil in the tier
	// eventual, and while no gateway has asked for any of it.
	Lease *LeaseUsage `json:"lease,omitempty"`
}

// LeaseUsage is how an allowance of the tiers exact and leased stands. What
// gateways have said they used and what was counted are told about the same
// calls: Settled is the higher of both. All but counts are units of the limit's
// meter.
type LeaseUsage struct {
	Settled int64 `json:"settled"`
	// Outstanding was handed out and is neither used, as far as is known, nor
	// given back; Dead is the part of it in leases that have ended without their
	// gateway's word: spent, unless it speaks or is ended.
	Outstanding int64 `json:"outstanding"`
	Dead        int64 `json:"dead"`
	// Free can be handed out.
	Free int64 `json:"free"`
	// Exposure was handed out again although a silent gateway may have used it;
	// Overdraft was spent beyond the amount.
	Exposure  int64 `json:"exposure"`
	Overdraft int64 `json:"overdraft"`
	// Gateways hold a lease or may have used one; Waiting of them wait for units.
	Gateways int `json:"gateways"`
	Waiting  int `json:"waiting"`
	// Times since the window's first ask: DeniedEarly while what others held would
	// have sufficed.
	Grants      int64 `json:"grants"`
	Recalls     int64 `json:"recalls"`
	DeniedEarly int64 `json:"denied_early"`
	DeniedFinal int64 `json:"denied_final"`
}

// DeadLetterSubject is where an entry of the ledger that cannot be counted is
// kept: one message a ledger sequence, so that a second try is rejected.
func DeadLetterSubject(shard uint32, sequence uint64) string {
	return "deadletter.ledger." + strconv.FormatUint(uint64(shard), 10) + "." + strconv.FormatUint(sequence, 10)
}

// DeadLetterIntake is where what a gateway refused at its events endpoint is
// kept; id is a ksuid.
func DeadLetterIntake(id string) string { return "deadletter.intake." + id }

// Headers of a dead letter.
const (
	ReasonHeader = "Tollkeeper-Reason" // machine code: usage.Reason…
	DetailHeader = "Tollkeeper-Detail" // for people
	OriginHeader = "Tollkeeper-Origin" // subject and sequence, or the gateway's name
)
