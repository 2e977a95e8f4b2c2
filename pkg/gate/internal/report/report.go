// Package report holds what a handler says of a call, and works out what the call is
// recorded with.
package report

import (
	"fmt"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/ticket"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Report lets a handler behind Middleware say what a call has used. Its methods
// do nothing on nil. It is for the handler's goroutine, until it returns.
type Report struct {
	quantities usage.Quantities
	estimates  [usage.NumBuiltIn]int64
	estimated  uint8 // built-in meters that have one, a bit each
	unknown    bool
	uncounted  bool
	unserved   bool
	sending    ticket.Sending
	ending     usage.Ending
	account    string
	keyID      string
}

// Sent says that somebody may serve the call from now on, whatever becomes of it. Unlike
// the other methods it may be called from any goroutine.
func (r *Report) Sent() {
	if r != nil {
		r.sending.Sent()
	}
}

// Unserved says that the call reached nobody: it is recorded and uses nothing. What it
// took of leases goes back, unless it was Sent.
func (r *Report) Unserved() {
	if r != nil {
		r.unserved = true
	}
}

// Uncounted says that the call is not to be counted, although somebody may have served
// it: it is recorded and uses nothing. One whose units were taken from leases is counted
// all the same, for no more is to be admitted than there is.
func (r *Report) Uncounted() {
	if r != nil {
		r.uncounted = true
	}
}

// Unknown says that nobody knows what the call has used, whatever is answered and
// however much is set: an upstream that was too late may have done all of it. Of what
// was reserved for the call nothing is given back.
func (r *Report) Unknown() {
	if r != nil {
		r.unknown = true
	}
}

// Estimate says what a built-in meter is to be taken for where a limit counts it and
// nothing tells how much was used, or less: the call is then marked as estimated. Of
// what was reserved for the call the whole reservation is the estimate. A meter that no
// limit counts stays unknown. Negative estimates, and those of other meters, are none.
func (r *Report) Estimate(m usage.Meter, v int64) {
	i, builtIn := m.Index()
	if r == nil || !builtIn || v < 0 {
		return
	}
	r.estimates[i] = max(r.estimates[i], min(v, usage.MaxQuantity))
	r.estimated |= 1 << i
}

// Ended says how the call ended, for who knows better than the middleware, which goes by
// whether the answer was written to its end.
func (r *Report) Ended(e usage.Ending) {
	if r != nil {
		r.ending = e
	}
}

// Set stores the reading of a meter. What is not set is unknown, and so is what
// can't be counted: then the error is an *usage.InvalidError, and the rest of the
// call is metered nevertheless.
func (r *Report) Set(m usage.Meter, v int64) error {
	if r == nil {
		return nil
	}
	own := r.quantities.Custom()
	_, builtIn := m.Index()
	_, known := r.quantities.Get(m)
	switch {
	case !m.Valid():
		return &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("%q cannot name a meter", m)}
	case v < 0:
		return &usage.InvalidError{Reason: usage.ReasonNegativeCount, Message: fmt.Sprintf("%s is %d: counts are not negative", m, v)}
	case v > usage.MaxQuantity:
		return &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("%s is %d, at most %d is allowed in one call", m, v, usage.MaxQuantity)}
	case !builtIn && !known && len(own) >= usage.MaxCustomMeters:
		return &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("a call has at most %d meters of its own", usage.MaxCustomMeters)}
	}
	r.quantities.Set(m, v)
	return nil
}

// Account that pays and the public id of its key, empty on nil.
func (r *Report) Account() (id, keyID string) {
	if r == nil {
		return "", ""
	}
	return r.account, r.keyID
}

// New returns the report of a call of an account and key.
func New(account, keyID string, sending ticket.Sending) *Report {
	return &Report{account: account, keyID: keyID, sending: sending}
}

// Free reports what was said of a call that uses nothing.
func Free(r *Report) (unserved, uncounted bool) { return r.unserved, r.uncounted }

// Readings are what was set.
func Readings(r *Report) usage.Quantities { return r.quantities }

// Ending is what was said of how the call ended; else what was seen.
func Ending(r *Report, seen usage.Ending) usage.Ending {
	if r.ending != usage.EndingUnknown {
		return r.ending
	}
	return seen
}

// Settle fills the call in with estimates, and returns what was measured: what of a
// reservation is not known there was used whole, unless nothing was used. failed: the
// answer tells of a failure. counts says which meters limits count, reserved how much of
// one was reserved for the call.
func Settle(r *Report, c *usage.Call, failed bool, counts func(usage.BuiltIn) bool, reserved func(usage.Meter) (int64, bool)) (measured usage.Quantities, nothing bool) {
	switch {
	case r.unknown:
	case failed && c.Quantities.Len() <= 1: // its bytes
		return c.Quantities, true
	default:
		measured = c.Quantities
	}
	for i, m := range usage.BuiltInMeters() {
		i := usage.BuiltIn(i)
		_, known := measured.BuiltIn(i)
		units, has := reserved(m)
		switch {
		case i == usage.CallsIndex:
			continue
		case has && !known: // as the lease has it
		case r.estimated&(1<<i) != 0 && counts(i):
			units = r.estimates[i]
		default:
			continue
		}
		if had, told := c.Quantities.BuiltIn(i); !told || had < units {
			c.Quantities.SetBuiltIn(i, units)
			c.Flags |= usage.Estimated
		}
	}
	return measured, false
}
