package planfile

import (
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
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
