package ledger

import (
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// ControlMessage returns the message that appends a control entry.
func ControlMessage(shard uint32, e *tollkeeperv1.ControlEntry) (*nats.Msg, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("marshal control entry: %w", err)
	}
	return &nats.Msg{Subject: ControlSubject(shard), Header: nats.Header{CodecHeader: {CodecControl}}, Data: data}, nil
}

// DecodeControl decodes a message of a control subject. Its errors are
// *usage.InvalidError.
func DecodeControl(header nats.Header, data []byte) (*tollkeeperv1.ControlEntry, error) {
	if codec := header.Get(CodecHeader); codec != CodecControl {
		return nil, &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the control entry's %s is %q, wanted is %s", CodecHeader, codec, CodecControl)}
	}
	var e tollkeeperv1.ControlEntry
	if err := proto.Unmarshal(data, &e); err != nil {
		return nil, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the control entry is not protobuf: %v", err)}
	}
	return &e, nil
}

// ClosingMessage returns the message that appends a closing entry: data is a
// control entry as DecodeClosing takes it.
func ClosingMessage(shard uint32, data []byte) *nats.Msg {
	return &nats.Msg{Subject: ClosingsSubject(shard), Header: nats.Header{CodecHeader: {CodecControl}}, Data: data}
}

// DecodeClosing decodes a message of a closings subject: a control entry that
// retires a producer, under the producer's name. Anything else there is refused,
// for whoever may close may do nothing else by it. Its errors are
// *usage.InvalidError.
//
// Control subjects take ProducerClosed too: ledgers from before there were closings
// hold it there and must be folded to the same, and who may write there may do
// more than that.
func DecodeClosing(header nats.Header, data []byte) (*tollkeeperv1.ControlEntry, error) {
	e, err := DecodeControl(header, data)
	if err != nil {
		return nil, err
	}
	closed := e.GetProducerClosed()
	if closed == nil {
		return nil, &usage.InvalidError{Reason: usage.ReasonMisplaced, Message: "a closings subject takes the end of a producer and nothing else: other control entries go to a control subject"}
	}
	p, err := ksuid.FromBytes(closed.GetProducer())
	if err != nil {
		return nil, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the closed producer is not a ksuid: %v", err)}
	}
	// An id counts once among all acts: with another's it would keep that one out.
	if e.GetId() != p.String() {
		return nil, &usage.InvalidError{Reason: usage.ReasonMisplaced, Message: fmt.Sprintf("the closing entry of producer %s has another id: it needs the producer's", p)}
	}
	if n := len(closed.GetLeases().GetMarks()); n > MaxLeaseMarks {
		return nil, &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("the closing entry speaks of %d leases: at most %d are folded", n, MaxLeaseMarks)}
	}
	return e, nil
}

// DecodeAct decodes a message of a control or a closings subject by its kind.
func DecodeAct(kind Kind, header nats.Header, data []byte) (*tollkeeperv1.ControlEntry, error) {
	if kind == KindClosing {
		return DecodeClosing(header, data)
	}
	return DecodeControl(header, data)
}

// LimitFromProto and LimitToProto convert between wire and words.
func LimitFromProto(p *tollkeeperv1.Limit) usage.Limit {
	return usage.Limit{
		ID: p.GetId(), Meter: usage.Meter(p.GetMeter()), Filter: FilterFromProto(p.GetFilter()), Window: usage.WindowKind(p.GetWindow()),
		Amount: p.GetAmount(), Tier: usage.Tier(p.GetTier()), WarnPercent: p.GetWarnPercent(), Code: usage.Code(p.GetCode()), ActionURL: p.GetActionUrl(),
		Lease: usage.LeaseTerms{
			Term: usage.Micros(p.GetLease().GetTermMicros()), Patience: usage.Micros(p.GetLease().GetPatienceMicros()),
			ReleaseAfter: usage.Micros(p.GetLease().GetReleaseAfterMicros()), MaxExposure: p.GetLease().GetMaxExposure(),
		},
	}
}

// LimitToProto is the inverse of LimitFromProto.
func LimitToProto(l *usage.Limit) *tollkeeperv1.Limit {
	p := &tollkeeperv1.Limit{
		Id: l.ID, Meter: string(l.Meter), Filter: FilterToProto(&l.Filter), Window: string(l.Window),
		Amount: l.Amount, Tier: string(l.Tier), WarnPercent: l.WarnPercent, Code: string(l.Code), ActionUrl: l.ActionURL,
	}
	if l.Lease != (usage.LeaseTerms{}) {
		p.Lease = &tollkeeperv1.LeaseTerms{
			TermMicros: int64(l.Lease.Term), PatienceMicros: int64(l.Lease.Patience),
			ReleaseAfterMicros: int64(l.Lease.ReleaseAfter), MaxExposure: l.Lease.MaxExposure,
		}
	}
	return p
}

// FilterFromProto converts a filter; nil matches everything.
func FilterFromProto(p *tollkeeperv1.Filter) usage.Filter {
	return usage.Filter{Models: p.GetModels(), Routes: p.GetRoutes(), Methods: p.GetMethods()}
}

// FilterToProto is the inverse of FilterFromProto; an empty filter is nil.
func FilterToProto(f *usage.Filter) *tollkeeperv1.Filter {
	if f.Empty() {
		return nil
	}
	return &tollkeeperv1.Filter{Models: f.Models, Routes: f.Routes, Methods: f.Methods}
}

// PlanFromProto converts a plan.
func PlanFromProto(p *tollkeeperv1.Plan) usage.Plan {
	plan := usage.Plan{ID: p.GetId()}
	for _, l := range p.GetLimits() {
		plan.Limits = append(plan.Limits, LimitFromProto(l))
	}
	return plan
}

// PlanToProto is the inverse of PlanFromProto.
func PlanToProto(p *usage.Plan) *tollkeeperv1.Plan {
	out := &tollkeeperv1.Plan{Id: p.ID}
	for i := range p.Limits {
		out.Limits = append(out.Limits, LimitToProto(&p.Limits[i]))
	}
	return out
}

// AccountFromProto converts an account.
func AccountFromProto(p *tollkeeperv1.Account) usage.Account {
	return usage.Account{ID: p.GetId(), Parent: p.GetParent(), Plan: p.GetPlan(), Closed: p.GetClosed()}
}

// AccountToProto is the inverse of AccountFromProto.
func AccountToProto(a *usage.Account) *tollkeeperv1.Account {
	return &tollkeeperv1.Account{Id: a.ID, Parent: a.Parent, Plan: a.Plan, Closed: a.Closed}
}

// MarshalDecision writes a decision as the value of its KV key.
func MarshalDecision(d *usage.Decision) ([]byte, error) {
	p := &tollkeeperv1.Decision{
		Id: d.ID, Account: d.Account, Limit: d.LimitID, Meter: string(d.Meter), Verdict: tollkeeperv1.Verdict(d.Verdict), Code: string(d.Code),
		Revision: d.Revision, Shard: d.Shard, Used: d.Used, Amount: d.Amount, Window: string(d.Window),
		PeriodStartUnixMicros: int64(d.PeriodStart), PeriodEndUnixMicros: int64(d.PeriodEnd), Filter: FilterToProto(&d.Filter),
		PlanVersion: d.PlanVersion, DecidedAtUnixMicros: int64(d.DecidedAt), CauseUnixMicros: int64(d.Cause), ActionUrl: d.ActionURL,
		WarnPercent: d.WarnPercent, Epoch: d.Epoch, Tier: string(d.Tier), Room: d.Room,
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("marshal decision: %w", err)
	}
	return data, nil
}

// UnmarshalDecision reads the value of a decision's KV key.
func UnmarshalDecision(data []byte) (usage.Decision, error) {
	var p tollkeeperv1.Decision
	if err := proto.Unmarshal(data, &p); err != nil {
		return usage.Decision{}, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the decision is not protobuf: %v", err)}
	}
	return usage.Decision{
		ID: p.GetId(), Account: p.GetAccount(), LimitID: p.GetLimit(), Meter: usage.Meter(p.GetMeter()), Verdict: usage.Verdict(p.GetVerdict()),
		Code: usage.Code(p.GetCode()), Revision: p.GetRevision(), Shard: p.GetShard(), Used: p.GetUsed(), Amount: p.GetAmount(),
		Window: usage.WindowKind(p.GetWindow()), PeriodStart: usage.Micros(p.GetPeriodStartUnixMicros()), PeriodEnd: usage.Micros(p.GetPeriodEndUnixMicros()),
		Filter: FilterFromProto(p.GetFilter()), PlanVersion: p.GetPlanVersion(), DecidedAt: usage.Micros(p.GetDecidedAtUnixMicros()),
		Cause: usage.Micros(p.GetCauseUnixMicros()), ActionURL: p.GetActionUrl(), WarnPercent: p.GetWarnPercent(), Epoch: p.GetEpoch(),
		Tier: usage.Tier(p.GetTier()), Room: p.GetRoom(),
	}, nil
}
