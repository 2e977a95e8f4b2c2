package table

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// Allowance is a limit of the tiers exact and leased of one account. It stays the
// same while the table lives, whichever records name it.
type Allowance struct {
	purse atomic.Pointer[lease.Purse] // of the window that was current last; nil: none yet
	low   atomic.Bool                 // somebody was told that the purse runs low

	owner   *Account
	first   bool // of the owner's: the purse is with the owner, too
	limitID string
	shard   uint32

	// The writer's.
	seq   uint64 // of the record that told the limit
	limit *usage.Limit
}

// Account that the limit belongs to, not only that of the call.
func (l *Allowance) Account() string { return l.owner.id }

// LimitID is "<plan>/<limit>".
func (l *Allowance) LimitID() string { return l.limitID }

// Shard of the ledger that the account belongs to.
func (l *Allowance) Shard() uint32 { return l.shard }

// Use makes p the purse that calls are admitted from; nil: none. One goroutine at
// a time may call it.
func (l *Allowance) Use(p *lease.Purse) {
	l.purse.Store(p)
	if l.first {
		l.owner.purse.Store(p)
	}
}

// Purse returns the one in use, nil when there is none.
func (l *Allowance) Purse() *lease.Purse { return l.purse.Load() }

// TellLow reports whether it is the caller's to tell that the purse runs low: once
// until Told.
func (l *Allowance) TellLow() bool { return !l.low.Load() && l.low.CompareAndSwap(false, true) }

// Told lets TellLow be true again.
func (l *Allowance) Told() { l.low.Store(false) }

// Draw is a limit that an account's calls take units of.
type Draw struct {
	*Allowance
	// Limit as the account's record has it. It must not be changed.
	Limit *usage.Limit
	plain bool // no filter
}

// Concerns reports whether such a call counts towards the limit.
func (d *Draw) Concerns(req Request) bool {
	return (d.plain || d.Limit.Filter.Match(req.Model, req.Route, req.Method)) && !req.Unused.Has(d.Limit.Meter)
}

// Cited makes a decision's terms out of the limit, for the window of start; it has no
// id.
func (d *Draw) Cited(start usage.Micros) *usage.Decision {
	l := d.Limit
	out := &usage.Decision{
		Account: d.Account(), LimitID: d.limitID, Meter: l.Meter, Verdict: usage.Deny, Code: l.RefusalCode(), Shard: d.shard, Used: l.Amount, Amount: l.Amount,
		Window: l.Window, Filter: l.Filter, ActionURL: l.ActionURL, WarnPercent: l.WarnPercent, Tier: l.Tier,
	}
	if start != 0 {
		out.PeriodStart, out.PeriodEnd = window.Bounds(l.Window, start)
	}
	return out
}

// Units returns how many a call can need whose cost is bounded so; nil: it is one call.
// A verdict that does not allow it says that it is not bounded, or above the limit.
func (d *Draw) Units(bounds *usage.Quantities) (int64, Verdict) {
	l := d.Limit
	units, known := int64(0), false
	if bounds != nil {
		units, known = bounds.Get(l.Meter)
	}
	switch {
	case !known && l.Meter == usage.Calls:
		units = 1
	case !known:
		return 0, Verdict{Code: usage.CostExceedsLimit, Detail: fmt.Sprintf("How many %s this call can use is not bounded, and limit %s admits only calls that are: say the most it may use.", l.Meter, d.limitID)}
	case units > l.Amount && l.Amount > 0 && l.Meter != usage.Calls:
		return 0, Verdict{Code: usage.CostExceedsLimit, Decision: d.Cited(0), Requested: units, Detail: fmt.Sprintf(
			"This call may use up to %d %s, and limit %s is %d in all: ask for less.", units, l.Meter, d.limitID, l.Amount)}
	}
	return units, Verdict{Allowed: true}
}

// Denied is the refusal of a call that needs these units; decision is what it rests on
// if that is known, start the begin of its window.
func (d *Draw) Denied(decision *usage.Decision, start usage.Micros, units int64) Verdict {
	if decision == nil || decision.Verdict != usage.Deny || decision.PeriodStart != start {
		decision = d.Cited(start) // the answer came without its decision, which follows
	}
	code := decision.Code
	if code.Status() == 0 {
		code = d.Limit.RefusalCode()
	}
	return Verdict{Code: code, Decision: decision, Requested: units}
}

// draw returns the account's allowance and makes it when there is none.
func (t *Table) draw(l *LeasedLimit, shard uint32, seq uint64) Draw {
	owner := t.handle(l.Account)
	var found *Allowance
	for _, a := range owner.allowances {
		if a.limitID == l.LimitID {
			found = a
			break
		}
	}
	if found == nil {
		found = &Allowance{owner: owner, first: len(owner.allowances) == 0, limitID: l.LimitID, shard: shard}
		owner.allowances = append(owner.allowances, found)
	}
	if found.limit == nil || seq >= found.seq {
		// One copy for all the accounts below.
		if found.limit == nil || !same(found.limit, &l.Limit) {
			limit := l.Limit
			found.limit = &limit
		}
		found.seq = seq
	}
	return Draw{Allowance: found, Limit: found.limit, plain: found.limit.Filter.Empty()}
}

func same(a, b *usage.Limit) bool {
	return a.ID == b.ID && a.Meter == b.Meter && a.Window == b.Window && a.Amount == b.Amount && a.Tier == b.Tier && a.Code == b.Code &&
		a.ActionURL == b.ActionURL && a.WarnPercent == b.WarnPercent && a.Lease == b.Lease &&
		slices.Equal(a.Filter.Models, b.Filter.Models) && slices.Equal(a.Filter.Routes, b.Filter.Routes) && slices.Equal(a.Filter.Methods, b.Filter.Methods)
}

// Leased returns the limits of the path whose units are taken from leases; the
// caller must not change them.
func (a *Account) Leased() []Draw {
	if r := a.record.Load(); r != nil {
		return r.leased
	}
	return nil
}

// PassUnknown lets one call of an account through although there is no knowing, if
// the policy allows it one more.
func (t *Table) PassUnknown(a *Account) bool {
	r := a.record.Load()
	return r != nil && t.policy.Pass && r.pass(r.shard.episode.Load(), t.policy.MaxCalls)
}

// quickDraws is how many limits TakeOne looks at: what a stack holds.
const quickDraws = 8

// TakeOne takes one unit of every limit on calls that concerns the call, or none.
// It reports false when that can't be done here and now: a unit isn't there, a
// limit counts something else, or, unless that is cleared, something is held against
// an account of the path. now is the ledger's time.
func (t *Table) TakeOne(a *Account, req *Request, now lease.Micros, cleared bool) (taken, low bool) {
	// Mostly it is this account's, and then it need not wait for the record.
	p, r := a.purse.Load(), a.record.Load()
	if r == nil || r.measured {
		return false, false
	}
	if !cleared && (r.eventual && !r.shard.known.Load() || !r.clean(a)) {
		return false, false
	}
	if r.only != a {
		if r.only == nil {
			return r.takeEach(req, now)
		}
		p = r.only.purse.Load()
	}
	if p == nil || now < p.Start || r.filter != nil && !r.filter.Match(req.Model, req.Route, req.Method) {
		return false, false
	}
	return p.TakeOne(now)
}

func (r *record) takeEach(req *Request, now lease.Micros) (taken, low bool) {
	if len(r.leased) > quickDraws {
		return false, false
	}
	var parts [quickDraws]lease.Part
	n := 0
	for i := range r.leased {
		d := &r.leased[i]
		if !d.Concerns(*req) {
			continue
		}
		p := d.purse.Load()
		if p == nil || now < p.Start {
			return false, false
		}
		parts[n] = lease.Part{Purse: p, Amount: 1}
		n++
	}
	if n == 0 {
		return false, false
	}
	out, _ := lease.Take(parts[:n], now)
	return out.OK(), out == lease.AdmittedLow
}
