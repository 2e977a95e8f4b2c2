package aggregator

import (
	"fmt"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// batchOf lets b look at the columns of a decoded frame; no event is copied.
func batchOf(b *quota.Batch, f *ledger.Frame) {
	b.Producer, b.Number = dedup.Producer(f.Producer), f.Number
	b.N, b.Time = f.N, f.Time.Values
	b.Account, b.Code = quota.Strings(f.Account), quota.Strings(f.Code)
	b.Model, b.Route, b.Method = quota.Strings(f.Model), quota.Strings(f.Route), quota.Strings(f.Method)
	b.Source, b.EventID = quota.Strings(f.Source), quota.Strings(f.EventID)
	for m := range f.Meters {
		b.BuiltIns[m] = quota.Ints(f.Meters[m])
	}
	b.Custom = b.Custom[:0]
	for i := range f.Custom {
		b.Custom = append(b.Custom, quota.CustomMeter{Meter: f.Custom[i].Meter, Ints: quota.Ints(f.Custom[i].Ints)})
	}
}

// controlOf translates a control entry. Its errors are *usage.InvalidError.
func controlOf(e *tollkeeperv1.ControlEntry) (*quota.Control, error) {
	c := &quota.Control{ID: e.GetId()}
	switch body := e.GetBody().(type) {
	case *tollkeeperv1.ControlEntry_PlanSet:
		set := &quota.PlanSet{Version: body.PlanSet.GetVersion(), EffectiveAt: usage.Micros(body.PlanSet.GetEffectiveAtUnixMicros())}
		for _, p := range body.PlanSet.GetPlans() {
			set.Plans = append(set.Plans, ledger.PlanFromProto(p))
		}
		c.PlanSet = set
	case *tollkeeperv1.ControlEntry_AccountSet:
		for _, a := range body.AccountSet.GetAccounts() {
			c.Accounts = append(c.Accounts, ledger.AccountFromProto(a))
		}
	case *tollkeeperv1.ControlEntry_ProducerClosed:
		p, err := ksuid.FromBytes(body.ProducerClosed.GetProducer())
		if err != nil {
			return nil, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the closed producer is not a ksuid: %v", err)}
		}
		producer := dedup.Producer(p)
		c.Closed = &producer
	case *tollkeeperv1.ControlEntry_Tick:
		c.ID = "" // a tick does nothing that a second one could double
	default:
		return nil, &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: "the control entry is of a kind that this version does not know"}
	}
	return c, nil
}

func totalsOf(t quota.Totals) ledger.Totals {
	return ledger.Totals{Admitted: t.Admitted, Refused: t.Refused, Meters: t.Meters}
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
