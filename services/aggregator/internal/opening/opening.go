// Package opening counts out of the ledger what accounts had used of limits before the
// limits were there (quota.Opening). It is a pure fold: the shard's entries from the
// ledger's beginning on go in, in order, and what was used comes out.
package opening

import (
	"fmt"
	"math"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// planID is of the one plan that every account has here.
const planID = "all"

// ahead is how many entries of its own the fold begins with.
const ahead = 2

// Count folds the entries. Not safe for concurrent use.
type Count struct {
	state   *quota.Shard
	open    []quota.Opening // what is still to be counted, by Since
	limits  []int           // of open: which limit of the plan it is
	counted []quota.Opening
	target  map[string]bool
}

// New returns the count of what is open, in the order in which it began; of more limits
// than a plan may have, those that began first. Nothing is open: nil.
func New(shard uint32, horizon usage.Micros, open []quota.Opening) *Count {
	if len(open) == 0 {
		return nil
	}
	c := &Count{state: quota.New(quota.Options{Shard: shard, Horizon: horizon}), target: map[string]bool{}}
	// The same calls are counted once for all accounts that they are open for.
	numbers := map[string]int{}
	plan := usage.Plan{ID: planID}
	for i := range open {
		o := &open[i]
		key := fmt.Sprintf("%q %q %q %q %q", o.Meter, o.Window, o.Filter.Models, o.Filter.Routes, o.Filter.Methods)
		n, known := numbers[key]
		if !known {
			if n = len(plan.Limits); n == quota.MaxPlanLimits {
				continue
			}
			numbers[key] = n
			plan.Limits = append(plan.Limits, usage.Limit{ID: fmt.Sprint(n), Meter: o.Meter, Filter: o.Filter, Window: o.Window, Amount: math.MaxInt64})
		}
		c.open, c.limits = append(c.open, *o), append(c.limits, n)
		c.target[o.Account] = true
	}
	c.state.Apply(quota.Entry{Sequence: 1, Control: &quota.Control{PlanSet: &quota.PlanSet{Version: planID, Plans: []usage.Plan{plan}}}})
	c.state.Apply(quota.Entry{Sequence: ahead, Control: c.accounts(nil)})
	return c
}

// accounts gives the accounts that are counted the plan: those that the ledger sets, or,
// of nil, all.
func (c *Count) accounts(set []usage.Account) *quota.Control {
	out := &quota.Control{}
	if set == nil {
		for id := range c.target {
			out.Accounts = append(out.Accounts, usage.Account{ID: id, Plan: planID})
		}
		slices.SortFunc(out.Accounts, func(a, b usage.Account) int {
			if a.ID < b.ID {
				return -1
			}
			return 1
		})
		return out
	}
	for _, a := range set {
		a.Closed, a.Plan = false, ""
		if c.target[a.ID] {
			a.Plan = planID
		}
		out.Accounts = append(out.Accounts, a)
	}
	return out
}

// Last is the last entry that is needed.
func (c *Count) Last() uint64 { return c.open[len(c.open)-1].Since }

// Done says whether everything is counted.
func (c *Count) Done() bool { return len(c.open) == 0 }

// Counted returns what was counted.
func (c *Count) Counted() []quota.Opening { return c.counted }

// Apply folds the next entry of the shard. What began with it is counted before. A
// *quota.NewerError says that only a newer program can go on.
func (c *Count) Apply(e quota.Entry) error {
	for len(c.open) > 0 && e.Sequence >= c.open[0].Since {
		c.take()
	}
	in := quota.Entry{Sequence: e.Sequence + ahead, Time: e.Time, Batch: e.Batch}
	if x := e.Control; x != nil {
		switch {
		case x.PlanSet != nil, x.Openings != nil:
			// Only time passes.
		case x.Closed != nil:
			in.Control = &quota.Control{ID: x.ID, Closed: x.Closed, ClosedAt: x.ClosedAt}
		case x.Accounts != nil:
			in.Control = c.accounts(x.Accounts)
			in.Control.ID = x.ID
		default:
			in.Control = x
		}
	}
	if fx := c.state.Apply(in); fx.Newer != nil {
		return fx.Newer
	}
	return nil
}

// take notes what was used until now of the first that is open.
func (c *Count) take() {
	o, n := c.open[0], c.limits[0]
	c.open, c.limits = c.open[1:], c.limits[1:]
	if u, ok := c.state.Account(o.Account); ok && n < len(u.Limits) {
		l := &u.Limits[n]
		switch {
		case l.PeriodStart == o.WindowStart:
			o.Used, o.Previous = l.Used, l.Previous
		case l.PeriodEnd == o.WindowStart && l.PeriodEnd != 0:
			o.Previous = l.Used // the window began with this entry
		}
	}
	c.counted = append(c.counted, o)
}
