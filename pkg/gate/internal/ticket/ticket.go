// Package ticket is what an admitted call has taken of leases, and how that ends.
package ticket

import (
	"github.com/tollkeeper/tollkeeper/pkg/gate/wallet"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Ticket is what an admitted call has taken of leases. The zero Ticket is that of a
// call which no lease concerns. Its methods are for one goroutine at a time.
type Ticket struct {
	time usage.Micros
	hold *wallet.Hold
}

// New returns the ticket of a call that took units at a time of the ledger's; hold is nil
// where they are used for good.
func New(at usage.Micros, hold *wallet.Hold) Ticket { return Ticket{at, hold} }

// Leased reports whether units were taken from leases.
func (k *Ticket) Leased() bool { return k.time != 0 }

// Stamp makes the call's event say that its units came from leases: its time is
// then the ledger's when they were taken, so that the call is counted in the
// windows that they belong to.
func (k *Ticket) Stamp(c *usage.Call) {
	if k.time != 0 {
		c.Time = k.time
		c.Flags |= usage.FromLease
	}
}

// Settle gives back what of the reservation was not used. What q does not know is
// taken to be used whole, one call excepted. Further calls do nothing.
func (k *Ticket) Settle(q *usage.Quantities) { k.SettleKnown(q, false) }

// Void gives the whole reservation back: the call did not take place. It reports
// whether nothing of leases is used: where only calls are limited one call is spent,
// unless it was Voidable and not sent.
func (k *Ticket) Void() bool {
	if k.hold == nil {
		return !k.Leased()
	}
	voided := k.hold.Void()
	k.hold = nil
	return voided
}

// Sending says of the call of a Voidable ticket that it is on its way. Its methods are
// safe for concurrent use, also with those of the ticket. The zero Sending does nothing.
type Sending struct{ hold *wallet.Hold }

// Sending returns what is to hear of it when the call is sent. It is the zero Sending
// where the reservation is more than calls: what they cost is known at their end.
func (k *Ticket) Sending() Sending {
	if k.hold == nil || !k.hold.OfCalls() {
		return Sending{}
	}
	return Sending{k.hold}
}

// Sent says that somebody may serve the call from now on: it is spent.
func (s Sending) Sent() {
	if s.hold != nil {
		s.hold.Settle(nil)
	}
}

// Reserved is how much of a meter was reserved for the call; false: nothing was.
func (k *Ticket) Reserved(m usage.Meter) (int64, bool) {
	if k.hold == nil {
		return 0, false
	}
	parts := k.hold.Parts()
	for i := range parts {
		if parts[i].Limit.Meter == m {
			return parts[i].Units, true
		}
	}
	return 0, false
}

// SettleKnown is Settle; with nothing, what q does not know was not used.
func (k *Ticket) SettleKnown(q *usage.Quantities, nothing bool) {
	if k.hold == nil {
		return
	}
	parts := k.hold.Parts()
	actual := make([]int64, len(parts))
	for i := range parts {
		switch v, known := q.Get(parts[i].Limit.Meter); {
		case known:
			actual[i] = v
		case parts[i].Limit.Meter == usage.Calls:
			actual[i] = 1
		case !nothing:
			actual[i] = -1
		}
	}
	k.hold.Settle(actual)
	k.hold = nil
}
