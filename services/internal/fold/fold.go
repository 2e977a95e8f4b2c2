// Package fold makes entries of the core out of those of the ledger. Whoever
// folds the ledger goes through it, so that all of them come to the same state.
package fold

import (
	"fmt"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Decoder decodes one entry after the other and reuses its memory. The zero
// value is ready. Not safe for concurrent use.
type Decoder struct {
	// Frame is the entry's when it was one of calls, until the next Decode.
	Frame ledger.Frame
	// Control is the entry's when it was one of control or a closing, else nil.
	Control *tollkeeperv1.ControlEntry

	batch quota.Batch
}

// Decode returns what the core applies, until the next Decode, and the entry's
// kind (0: it stands on a subject that is none of the ledger's). With an error,
// which says why the entry can't be counted, the core's entry still lets time
// pass: it is to be applied all the same.
func (d *Decoder) Decode(m *ledger.Message) (quota.Entry, ledger.Kind, error) {
	e := quota.Entry{Sequence: m.Sequence, Time: usage.At(m.Time)}
	d.Control = nil
	kind, _, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		return e, 0, err
	}
	switch kind {
	case ledger.KindCalls:
		if err = ledger.DecodeCalls(&d.Frame, m.Subject, m.Header, m.Data); err == nil {
			batchOf(&d.batch, &d.Frame)
			e.Batch = &d.batch
		}
	case ledger.KindControl, ledger.KindClosing:
		if d.Control, err = ledger.DecodeAct(kind, m.Header, m.Data); err == nil {
			if d.Control.GetClockAdvance() != nil && !m.TestClock {
				err = &usage.InvalidError{Reason: usage.ReasonMisplaced, Message: "the entry advances a test clock, and this ledger was not born with one"}
				break
			}
			e.Control, err = controlOf(d.Control)
		}
	case ledger.KindLease:
		var l *tollkeeperv1.LeaseEntry
		if l, err = ledger.DecodeLease(m.Header, m.Data); err == nil {
			e.Asks = asksOf(l)
		}
	}
	return e, kind, err
}

// batchOf lets b look at the columns of a decoded frame; no event is copied.
func batchOf(b *quota.Batch, f *ledger.Frame) {
	b.Producer, b.Number = dedup.Producer(f.Producer), f.Number
	b.N, b.Time = f.N, f.Time.Values
	b.Account, b.Code = quota.Strings(f.Account), quota.Strings(f.Code)
	b.Model, b.Route, b.Method = quota.Strings(f.Model), quota.Strings(f.Route), quota.Strings(f.Method)
	b.Source, b.EventID = quota.Strings(f.Source), quota.Strings(f.EventID)
	b.Flags = quota.Ints(f.Flags)
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
		c.Closed, c.ClosedAt, c.Complete = &producer, body.ProducerClosed.GetLastNumber(), body.ProducerClosed.GetComplete()
		if leases := body.ProducerClosed.GetLeases(); leases != nil {
			c.Marks = &quota.LeaseMarks{}
			for _, m := range leases.GetMarks() {
				c.Marks.Marks = append(c.Marks.Marks, quota.LeaseMark{
					Account: m.GetAccount(), LimitID: m.GetLimit(), WindowStart: usage.Micros(m.GetWindowStartUnixMicros()), UsedAtMost: m.GetUsedAtMost(),
				})
			}
		}
	case *tollkeeperv1.ControlEntry_Correction:
		x := body.Correction
		c.Correction = &quota.Correction{
			Account: x.GetAccount(), Time: usage.Micros(x.GetTimeUnixMicros()), Model: x.GetModel(), Route: x.GetRoute(), Method: x.GetMethod(),
		}
		for _, q := range x.GetAdjustments() {
			c.Correction.Adjustments = append(c.Correction.Adjustments, usage.Quantity{Meter: usage.Meter(q.GetMeter()), Value: q.GetValue()})
		}
	case *tollkeeperv1.ControlEntry_CoreVersion:
		c.Core = &quota.Core{Version: body.CoreVersion.GetVersion(), Horizon: usage.Micros(body.CoreVersion.GetForeignHorizonMicros())}
	case *tollkeeperv1.ControlEntry_Openings:
		c.ID = "" // each is for one counter, once
		c.Openings = make([]quota.Opening, 0, len(body.Openings.GetOpenings()))
		for _, o := range body.Openings.GetOpenings() {
			c.Openings = append(c.Openings, quota.Opening{
				Account: o.GetAccount(), Meter: usage.Meter(o.GetMeter()), Filter: ledger.FilterFromProto(o.GetFilter()), Window: usage.WindowKind(o.GetWindow()),
				WindowStart: usage.Micros(o.GetWindowStartUnixMicros()), Since: o.GetSince(), Used: o.GetUsed(), Previous: o.GetPrevious(),
			})
		}
	case *tollkeeperv1.ControlEntry_Tick, *tollkeeperv1.ControlEntry_ClockAdvance:
		// A tick does nothing that a second one could double. An advance is the
		// entry's time already: the ledger's reader has read the clock.
		c.ID = ""
	default:
		return nil, &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: "the control entry is of a kind that this version does not know"}
	}
	return c, nil
}

// asksOf translates a lease entry. Its gateway's id has the right length.
func asksOf(e *tollkeeperv1.LeaseEntry) []quota.LeaseAsk {
	asks := make([]quota.LeaseAsk, 0, len(e.GetAsks()))
	for _, a := range e.GetAsks() {
		asks = append(asks, quota.LeaseAsk{
			Account: a.GetAccount(), LimitID: a.GetLimit(), WindowStart: usage.Micros(a.GetWindowStartUnixMicros()),
			Ask: lease.Ask{
				Gateway: lease.Gateway(e.GetGateway()), Seq: a.GetSeq(), Sent: lease.Micros(a.GetSentUnixMicros()), Seen: a.GetSeen(), Known: a.GetKnown(),
				Used: a.GetUsed(), Returned: a.GetReturned(), Over: a.GetOver(), Held: a.GetHeld(), Need: a.GetNeed(), Want: a.GetWant(),
				Renew: a.GetRenew(), Closing: a.GetClosing(),
			},
		})
	}
	return asks
}
