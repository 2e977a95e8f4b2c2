package ledger

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger/cloudevent"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// CodecHeader names schema and codec of a ledger message.
const CodecHeader = "Tollkeeper-Codec"

// The codecs of ledger messages.
const (
	CodecColumnar   = "columnar.v1"
	CodecProtobuf   = "protobuf.v1"
	CodecCloudEvent = "cloudevents.v1+json"
	CodecControl    = "control.v1"
)

// FrameMessage returns the message that appends a sealed columnar frame.
func FrameMessage(shard uint32, frame []byte) *nats.Msg {
	return &nats.Msg{Subject: CallsSubject(shard), Header: nats.Header{CodecHeader: {CodecColumnar}}, Data: frame}
}

// DecodeCalls decodes a message of a calls subject into f, whatever its codec.
// Its errors are *usage.InvalidError. A foreign event has no producer; its
// shard is taken from the subject.
func DecodeCalls(f *Frame, subject string, header nats.Header, data []byte) error {
	f.reset()
	kind, shard, err := ParseSubject(subject)
	if err != nil || kind != KindCalls {
		return malformed("%q is not a subject of calls", subject)
	}
	switch codec := header.Get(CodecHeader); codec {
	case CodecColumnar:
		err = f.Decode(data)
	case CodecProtobuf:
		err = f.decodeProtobuf(data)
	case CodecCloudEvent:
		err = f.decodeCloudEvent(shard, data)
	default:
		return &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the message's %s is %q; known are %s, %s and %s", CodecHeader, codec, CodecColumnar, CodecProtobuf, CodecCloudEvent)}
	}
	if err != nil {
		return err
	}
	if f.Shard != shard {
		return &usage.InvalidError{Reason: usage.ReasonWrongShard, Message: fmt.Sprintf("the frame says shard %d but stands on %s", f.Shard, subject)}
	}
	if f.Producer != ksuid.Nil && f.Number == 0 {
		return malformed("a producer's frames are numbered from 1")
	}
	if f.Producer == ksuid.Nil {
		// Without a frame's identity each event must have its own, or all of
		// them would be taken for one.
		for i := range f.N {
			if len(f.Source.At(i)) == 0 || len(f.EventID.At(i)) == 0 {
				return malformed("call %d has neither a producer nor a source and event id", i)
			}
		}
	}
	return f.checkCosts()
}

// checkCosts refuses a frame that reports a cost in another currency than the
// ledger's: whoever reads the ledger adds costs up.
func (f *Frame) checkCosts() error {
	cost := &f.Meters[usage.CostIndex]
	if f.CostsIn == "" || cost.Values == nil {
		return nil
	}
	if d := f.Currency.Dict; f.Currency.Index == nil && len(d) == 1 && string(d[0]) == f.CostsIn {
		return nil
	}
	for i := range f.N {
		if _, known := cost.Get(i); !known {
			continue
		}
		if is := f.Currency.At(i); string(is) != f.CostsIn {
			e := usage.OtherCurrency(string(is), f.CostsIn)
			e.Message = fmt.Sprintf("frame: call %d: %s", i, e.Message)
			return e
		}
	}
	return nil
}

func (f *Frame) decodeProtobuf(data []byte) error {
	if len(data) > maxDecodeBytes {
		return oversized("%d bytes, at most %d are read", len(data), maxDecodeBytes)
	}
	if err := scanProtobuf(data); err != nil {
		return err
	}
	var m tollkeeperv1.Frame
	if err := proto.Unmarshal(data, &m); err != nil {
		return malformed("it is not a protobuf frame: %v", err)
	}
	h := Header{Shard: m.GetShard(), Number: m.GetNumber(), Gateway: m.GetGateway(), SealedAt: usage.Micros(m.GetSealedAtUnixMicros())}
	if p := m.GetProducer(); len(p) != 0 {
		var err error
		if h.Producer, err = ksuid.FromBytes(p); err != nil {
			return malformed("the producer is not a ksuid: %v", err)
		}
	}
	b := f.arena.builder()
	for i, pc := range m.GetCalls() {
		c, err := callFromProto(pc)
		if err == nil {
			// The future is the counter's to clamp: it knows the ledger's time.
			err = c.Validate(c.Time)
		}
		if err != nil {
			var invalid *usage.InvalidError
			if errors.As(err, &invalid) {
				return &usage.InvalidError{Reason: invalid.Reason, Message: fmt.Sprintf("frame: call %d: %s", i, invalid.Message)}
			}
			return err
		}
		b.Add(&c)
	}
	return f.decodeRows(b, h)
}

// decodeRows brings the gathered rows into columns. It goes through the bytes
// of a columnar frame, so that all forms of a call come out alike.
func (f *Frame) decodeRows(b *Builder, h Header) error {
	sealed := b.Seal(h)
	return f.decodeBody(sealed[:len(sealed)-4])
}

// Fields of tollkeeperv1.Frame and tollkeeperv1.Call that scanProtobuf needs.
const (
	protoFrameCalls     = 6
	protoFrameCRC       = 15
	protoCallQuantities = 21
)

// scanProtobuf checks the checksum and counts what a frame holds before it is
// unmarshalled: a message of empty calls, 2 bytes each, would grow by a
// hundred times.
func scanProtobuf(data []byte) error {
	sum, want := uint32(0), uint32(0)
	calls := 0
	for rest := data; len(rest) > 0; {
		num, typ, tagLen := protowire.ConsumeTag(rest)
		if tagLen < 0 {
			return malformed("it is not a protobuf frame: %v", protowire.ParseError(tagLen))
		}
		valueLen := protowire.ConsumeFieldValue(num, typ, rest[tagLen:])
		if valueLen < 0 {
			return malformed("it is not a protobuf frame: %v", protowire.ParseError(valueLen))
		}
		value := rest[tagLen : tagLen+valueLen]
		switch {
		case num == protoFrameCRC && typ == protowire.Fixed32Type:
			want, _ = protowire.ConsumeFixed32(value)
			rest = rest[tagLen+valueLen:]
			continue
		case num == protoFrameCalls && typ == protowire.BytesType:
			if calls++; calls > maxDecodeCalls {
				return malformed("it holds more than %d calls", maxDecodeCalls)
			}
			call, _ := protowire.ConsumeBytes(value)
			if err := scanCall(call); err != nil {
				return err
			}
		}
		sum = crc32.Update(sum, castagnoli, rest[:tagLen+valueLen])
		rest = rest[tagLen+valueLen:]
	}
	if sum != want {
		return &usage.InvalidError{Reason: usage.ReasonChecksum, Message: "frame: its CRC-32C does not match its content"}
	}
	if calls == 0 {
		return malformed("it holds no calls")
	}
	return nil
}

func scanCall(call []byte) error {
	quantities := 0
	for len(call) > 0 {
		num, _, n := protowire.ConsumeField(call)
		if n < 0 {
			return malformed("it is not a protobuf frame: %v", protowire.ParseError(n))
		}
		if num == protoCallQuantities {
			if quantities++; quantities > usage.NumBuiltIn+usage.MaxCustomMeters {
				return oversized("a call reports more than %d meters", usage.NumBuiltIn+usage.MaxCustomMeters)
			}
		}
		call = call[n:]
	}
	return nil
}

// MarshalProtobuf writes calls as a protobuf frame, the form for producers
// without a columnar writer.
func MarshalProtobuf(h Header, calls []usage.Call) ([]byte, error) {
	m := &tollkeeperv1.Frame{Producer: h.Producer[:], Shard: h.Shard, Number: h.Number, Gateway: h.Gateway, SealedAtUnixMicros: int64(h.SealedAt)}
	if h.Producer == ksuid.Nil {
		m.Producer = nil
	}
	for i := range calls {
		m.Calls = append(m.Calls, callToProto(&calls[i]))
	}
	plain, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("marshal frame: %w", err)
	}
	m.Crc32C = crc32.Checksum(plain, castagnoli)
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

func callFromProto(p *tollkeeperv1.Call) (usage.Call, error) {
	if p.GetTraceFlags() > math.MaxUint8 || p.GetStatus() > usage.MaxStatus {
		return usage.Call{}, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: "trace flags or status are out of their range"}
	}
	c := usage.Call{
		Time: usage.Micros(p.GetTimeUnixMicros()), Account: p.GetAccount(), KeyID: p.GetKeyId(), RequestID: p.GetRequestId(),
		TraceFlags: byte(p.GetTraceFlags()), Method: p.GetMethod(), Route: p.GetRoute(), Model: p.GetModel(), Region: p.GetRegion(),
		Status: uint16(p.GetStatus()), Code: usage.Code(p.GetCode()), DecisionID: p.GetDecisionId(), Duration: p.GetDurationMicros(),
		Flags: usage.Flags(p.GetFlags()), Ending: ending(uint64(p.GetEnding())), Source: p.GetSource(), EventID: p.GetEventId(), PriceVersion: p.GetPriceVersion(), Currency: p.GetCurrency(),
	}
	for _, id := range [...]struct {
		to   []byte
		from []byte
	}{{c.TraceID[:], p.GetTraceId()}, {c.SpanID[:], p.GetSpanId()}} {
		if len(id.from) != 0 && len(id.from) != len(id.to) {
			return usage.Call{}, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("a trace or span id has %d bytes, not %d", len(id.from), len(id.to))}
		}
		copy(id.to, id.from)
	}
	for _, q := range p.GetQuantities() {
		m := usage.Meter(q.GetMeter())
		if _, twice := c.Quantities.Get(m); twice {
			return usage.Call{}, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("meter %q is reported twice", m)}
		}
		c.Quantities.Set(m, q.GetValue())
	}
	return c, nil
}

func callToProto(c *usage.Call) *tollkeeperv1.Call {
	p := &tollkeeperv1.Call{
		TimeUnixMicros: int64(c.Time), Account: c.Account, KeyId: c.KeyID, RequestId: c.RequestID, TraceFlags: uint32(c.TraceFlags),
		Method: c.Method, Route: c.Route, Model: c.Model, Region: c.Region, Status: uint32(c.Status), Code: string(c.Code),
		DecisionId: c.DecisionID, DurationMicros: c.Duration, Flags: uint32(c.Flags), Ending: uint32(c.Ending), Source: c.Source, EventId: c.EventID,
		PriceVersion: c.PriceVersion, Currency: c.Currency,
	}
	if c.TraceID != ([16]byte{}) {
		p.TraceId = append([]byte(nil), c.TraceID[:]...)
	}
	if c.SpanID != ([8]byte{}) {
		p.SpanId = append([]byte(nil), c.SpanID[:]...)
	}
	for i, m := range usage.BuiltInMeters() {
		if v, ok := c.Quantities.BuiltIn(usage.BuiltIn(i)); ok {
			p.Quantities = append(p.Quantities, &tollkeeperv1.Quantity{Meter: string(m), Value: v})
		}
	}
	for _, q := range c.Quantities.Custom() {
		p.Quantities = append(p.Quantities, &tollkeeperv1.Quantity{Meter: string(q.Meter), Value: q.Value})
	}
	return p
}

// CloudEventType is the type attribute of a call as a CloudEvent.
const CloudEventType = cloudevent.Type

// CallOfEvent makes a call of a CloudEvent, for both doors: the gateway's, which knows
// when it arrived, and the stream's (arrived is 0), which takes none without a time. Its
// errors are *usage.InvalidError.
func CallOfEvent(e *cloudevent.Event, arrived usage.Micros) (usage.Call, error) {
	c, err := e.Call(arrived)
	if err != nil {
		return c, err
	}
	if arrived == 0 {
		arrived = c.Time // the future is clamped by the counter, which knows the ledger's time
	}
	onlyRest(&c)
	return c, c.Validate(arrived)
}

func (f *Frame) decodeCloudEvent(shard uint32, data []byte) error {
	e, err := cloudevent.Read(data)
	if err != nil {
		return err
	}
	c, err := CallOfEvent(&e, 0)
	if err != nil {
		return err
	}
	b := f.arena.builder()
	b.Add(&c)
	return f.decodeRows(b, Header{Shard: shard, SealedAt: c.Time})
}
