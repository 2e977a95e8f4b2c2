package planfile

import (
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// PlanSet is the ledger entry that makes the plans of a document hold.
func PlanSet(doc *Document) *tollkeeperv1.PlanSet {
	set := &tollkeeperv1.PlanSet{Version: PlansVersion(doc)}
	c := (&Document{Plans: doc.Plans}).Canonical()
	for i := range c.Plans {
		p := c.Plans[i].Usage()
		set.Plans = append(set.Plans, ledger.PlanToProto(&p))
	}
	return set
}

func accountLimit(account string, p *Plan, l *Limit) *tollkeeperv1.AccountLimit {
	u := l.Usage()
	return &tollkeeperv1.AccountLimit{Account: account, Plan: p.ID, Limit: ledger.LimitToProto(&u)}
}

// AccountRecord is what gateways know of an account.
func AccountRecord(x Index, id string) *tollkeeperv1.AccountRecord {
	r := &tollkeeperv1.AccountRecord{Id: id, Path: x.Path(id), Plan: x.accounts[id].Plan}
	for _, step := range r.Path {
		p, ok := x.plans[x.accounts[step].Plan]
		if !ok {
			continue
		}
		for k := range p.Limits {
			r.Limits = append(r.Limits, accountLimit(step, p, &p.Limits[k]))
		}
	}
	r.Tier = string(strictest(r.Limits))
	return r
}

// strictest returns the strictest tier among limits, empty when there are none.
func strictest(limits []*tollkeeperv1.AccountLimit) usage.Tier {
	var tier usage.Tier
	for _, l := range limits {
		switch t := usage.Tier(l.GetLimit().GetTier()); {
		case t == usage.TierExact:
			return t
		case t == usage.TierLeased || tier == "":
			tier = t
		}
	}
	return tier
}
