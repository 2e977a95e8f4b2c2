package ledger

import (
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// MaxAsks is how many asks one lease entry may carry.
const MaxAsks = 256

// MaxLeaseMarks is how many marks of leases a closing entry may carry.
const MaxLeaseMarks = 4096

// CodecLease is the codec of lease entries.
const CodecLease = "lease.v1"

// AnswersSubject is where the owners of shards answer a gateway's asks (core
// NATS, not stored); gateway is the producer of its frames.
func AnswersSubject(gateway ksuid.KSUID) string { return "answers." + gateway.String() }

// LeaseMessage returns the message that appends a lease entry.
func LeaseMessage(shard uint32, e *tollkeeperv1.LeaseEntry) (*nats.Msg, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("marshal lease entry: %w", err)
	}
	return &nats.Msg{Subject: LeasesSubject(shard), Header: nats.Header{CodecHeader: {CodecLease}}, Data: data}, nil
}

// DecodeLease decodes a message of a leases subject. Its errors are
// *usage.InvalidError.
func DecodeLease(header nats.Header, data []byte) (*tollkeeperv1.LeaseEntry, error) {
	if codec := header.Get(CodecHeader); codec != CodecLease {
		return nil, &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the lease entry's %s is %q, wanted is %s", CodecHeader, codec, CodecLease)}
	}
	var e tollkeeperv1.LeaseEntry
	if err := proto.Unmarshal(data, &e); err != nil {
		return nil, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the lease entry is not protobuf: %v", err)}
	}
	if _, err := ksuid.FromBytes(e.GetGateway()); err != nil {
		return nil, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the lease entry's gateway is not a ksuid: %v", err)}
	}
	if n := len(e.GetAsks()); n == 0 || n > MaxAsks {
		return nil, &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("the lease entry has %d asks: 1 to %d are folded", n, MaxAsks)}
	}
	return &e, nil
}
