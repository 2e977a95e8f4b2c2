// Package reply puts what the core says into the words in which it is told: usage
// to who asks for it, leases to gateways.
package reply

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Usage answers a usage query (ledger.UsageRequest) from the state as it stands,
// under its owner's epoch; an error says what is wrong with the query.
func Usage(state *quota.Shard, epoch uint64, query []byte) ([]byte, error) {
	var r ledger.UsageRequest
	if len(query) > 0 {
		if err := json.Unmarshal(query, &r); err != nil {
			return nil, fmt.Errorf("the usage request is not JSON: %w", err)
		}
	}
	if len(r.Accounts) > ledger.MaxUsageAccounts || r.Top > ledger.MaxUsageAccounts || r.Top < 0 {
		return nil, fmt.Errorf("at most %d accounts are answered at once", ledger.MaxUsageAccounts)
	}
	reply := ledger.UsageReply{
		Shard: state.Number(), Epoch: epoch, Sequence: state.Sequence(), StreamTime: state.Now(), PlanVersion: state.PlanVersion(),
		Total: totalsOf(state.Total()), AccountCount: state.Accounts(), Accounts: []ledger.AccountUsage{},
	}
	if !r.TotalsOnly {
		hash := state.Hash()
		reply.StateHash = hex.EncodeToString(hash[:])
	}
	for _, id := range r.Accounts {
		if u, ok := state.Account(id); ok {
			if r.TotalsOnly {
				u.Limits = nil
			}
			reply.Accounts = append(reply.Accounts, usageOf(&u))
		}
	}
	if len(r.Accounts) == 0 {
		top := state.Top(r.Top)
		for i := range top {
			reply.Accounts = append(reply.Accounts, usageOf(&top[i]))
		}
	}
	return json.Marshal(reply)
}

func totalsOf(t quota.Totals) ledger.Totals {
	return ledger.Totals{Admitted: t.Admitted, Refused: t.Refused, Meters: t.Meters, Adjusted: t.Adjusted, Hash: t.Hash}
}

func usageOf(u *quota.AccountUse) ledger.AccountUsage {
	a := ledger.AccountUsage{ID: u.ID, Parent: u.Parent, Plan: u.Plan, Closed: u.Closed, Own: totalsOf(u.Own), Totals: totalsOf(u.All), Limits: make([]ledger.LimitUsage, 0, len(u.Limits))}
	for i := range u.Limits {
		a.Limits = append(a.Limits, limitOf(&u.Limits[i]))
	}
	return a
}

// limitOf says of a limit what a decision of this moment says: a counter alone lags
// behind what gateways have reported of their leases, and "used 0, deny" was read.
func limitOf(l *quota.LimitUse) ledger.LimitUsage {
	used, remaining := l.Used, l.Amount-l.Used
	if s := l.Lease; s != nil {
		used = s.Settled
		// An amount that was lowered, or overdrawn, leaves less than what is out.
		remaining = min(free(s)+s.Outstanding-s.Dead, l.Amount-used)
	}
	return ledger.LimitUsage{
		LimitID: l.LimitID, Meter: l.Meter, Window: l.Window, Amount: l.Amount, Used: used, Remaining: max(remaining, 0), Room: l.Room,
		PeriodStart: l.PeriodStart, PeriodEnd: l.PeriodEnd, Verdict: l.Verdict.String(), DecisionID: l.DecisionID, Revision: l.Revision,
		Tier: cmp.Or(l.Tier, usage.TierEventual), Lease: leaseOf(l.Lease),
	}
}

// free can be handed out.
func free(s *lease.State) int64 { return max(s.Amount-s.Settled-s.Outstanding, 0) }

func leaseOf(s *lease.State) *ledger.LeaseUsage {
	if s == nil {
		return nil
	}
	return &ledger.LeaseUsage{
		Settled: s.Settled, Outstanding: s.Outstanding, Dead: s.Dead, Free: free(s), Exposure: s.Exposure, Overdraft: s.Overdraft,
		Gateways: s.Leases, Waiting: s.Waits,
		Grants: s.Counts.Grants, Recalls: s.Counts.Recalls, DeniedEarly: s.Counts.DeniedEarly, DeniedFinal: s.Counts.DeniedFinal,
	}
}
