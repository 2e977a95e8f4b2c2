package aggregator

import (
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
)

func totalsOf(t quota.Totals) ledger.Totals {
	return ledger.Totals{Admitted: t.Admitted, Refused: t.Refused, Meters: t.Meters, Adjusted: t.Adjusted}
}

func usageOf(u *quota.AccountUse) ledger.AccountUsage {
	a := ledger.AccountUsage{ID: u.ID, Parent: u.Parent, Plan: u.Plan, Own: totalsOf(u.Own), Totals: totalsOf(u.All), Limits: make([]ledger.LimitUsage, 0, len(u.Limits))}
	for i := range u.Limits {
		l := &u.Limits[i]
		a.Limits = append(a.Limits, ledger.LimitUsage{
			LimitID: l.LimitID, Meter: l.Meter, Window: l.Window, Amount: l.Amount, Used: l.Used, Remaining: max(l.Amount-l.Used, 0),
			PeriodStart: l.PeriodStart, PeriodEnd: l.PeriodEnd, Verdict: l.Verdict.String(), DecisionID: l.DecisionID, Revision: l.Revision,
		})
	}
	return a
}
