// Package columnar lays calls, their sums and the rows of the smaller tables out as
// the columns that ClickHouse takes, with the dictionaries that the ledger's frames
// brought. It does no I/O; the same rows give the same columns.
package columnar

import (
	"math"
	"time"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// LateGrace is how long after its end an event's minute stays open: an event
// that enters the ledger later than that is late. It is not configurable,
// because the flag must come out the same whenever the ledger is read again.
const LateGrace = usage.Micros(time.Minute / time.Microsecond)

const minuteMicros = usage.Micros(time.Minute / time.Microsecond)

// Entry says where in the ledger a frame stands.
type Entry struct {
	Sequence uint64
	// Time is the ledger's time, which never goes back: the highest seen up to
	// this entry.
	Time usage.Micros
}

// Block is a stretch of calls in columns, ready to be sent. It is filled frame
// by frame, copies what it keeps, and can be filled again after Reset. The same
// frames give the same block. Not safe for concurrent use.
type Block struct {
	rows         int
	bytes        int
	first, last  uint64 // sequence of the first and last row
	since, until usage.Micros

	sequence   proto.ColUInt64
	row        proto.ColUInt16
	streamTime proto.ColDateTime
	sealed     proto.ColDateTime // minute
	time       int64s
	late       proto.ColUInt8

	shard      proto.ColUInt16
	producer   words
	frame      proto.ColUInt64
	gateway    words
	account    words
	keyID      words
	requestID  texts
	traceID    proto.ColFixedStr
	spanID     proto.ColFixedStr
	traceFlags proto.ColUInt8
	method     words
	route      words
	model      words
	region     words
	status     proto.ColUInt16
	code       words
	decisionID words
	duration   int64s
	flags      proto.ColUInt32
	ending     proto.ColUInt8
	source     words
	eventID    texts
	price      words
	currency   words
	known      proto.ColUInt32
	meters     [usage.NumBuiltIn]int64s
	custom     readings

	hourly, minutely *rollup

	producerOf   ksuid.KSUID // of producerText
	producerText []byte
}

// int64s is a column of 64 bit that the server has as DateTime64, UInt64 or
// Int64: the bits are the same.
type int64s struct {
	proto.ColInt64
}

// NewBlock returns an empty block.
func NewBlock() *Block {
	b := &Block{hourly: newRollup(hourMicros), minutely: newRollup(minuteMicros)}
	b.traceID.Size, b.spanID.Size = 16, 8
	return b
}

// Reset empties the block and keeps its memory.
func (b *Block) Reset() {
	b.rows, b.bytes, b.first, b.last, b.since, b.until = 0, 0, 0, 0, 0, 0
	b.sequence, b.row, b.streamTime.Data, b.sealed.Data, b.late = b.sequence[:0], b.row[:0], b.streamTime.Data[:0], b.sealed.Data[:0], b.late[:0]
	b.shard, b.frame, b.traceFlags, b.status, b.flags, b.ending, b.known = b.shard[:0], b.frame[:0], b.traceFlags[:0], b.status[:0], b.flags[:0], b.ending[:0], b.known[:0]
	b.traceID.Buf, b.spanID.Buf = b.traceID.Buf[:0], b.spanID.Buf[:0]
	b.time.ColInt64, b.duration.ColInt64 = b.time.ColInt64[:0], b.duration.ColInt64[:0]
	for m := range b.meters {
		b.meters[m].ColInt64 = b.meters[m].ColInt64[:0]
	}
	for _, w := range []*words{&b.producer, &b.gateway, &b.account, &b.keyID, &b.method, &b.route, &b.model, &b.region, &b.code, &b.decisionID, &b.source, &b.price, &b.currency} {
		w.reset()
	}
	b.requestID.reset()
	b.eventID.reset()
	b.custom.reset()
	b.hourly.reset()
	b.minutely.reset()
}

// Rows returns how many calls the block holds.
func (b *Block) Rows() int { return b.rows }

// Since and Until return the ledger's time of the first and the last row.
func (b *Block) Since() usage.Micros { return b.since }

// Until returns the ledger's time of the last row.
func (b *Block) Until() usage.Micros { return b.until }

// First and Last return the ledger positions of the first and the last row.
func (b *Block) First() uint64 { return b.first }

// Last returns the ledger position of the last row.
func (b *Block) Last() uint64 { return b.last }

// AppendFrame adds the rows of a decoded frame that keep names in ascending
// order, or all of them when keep is nil. Entries come in the ledger's order,
// and all of a block are of one month of ledger time.
func (b *Block) AppendFrame(f *ledger.Frame, e Entry, keep []uint32) {
	n := f.N
	if keep != nil {
		n = len(keep)
	}
	if n == 0 {
		return
	}
	if b.rows == 0 {
		b.first, b.since = e.Sequence, e.Time
	}
	at := b.rows
	b.rows += n
	b.last, b.until = e.Sequence, e.Time

	b.sequence = fill(b.sequence, n, e.Sequence)
	b.streamTime.Data = fill(b.streamTime.Data, n, proto.DateTime(int64(e.Time)/1_000_000))
	b.sealed.Data = fill(b.sealed.Data, n, proto.DateTime(audit.FrameMinute(f.SealedAt, e.Time)*60))
	b.shard = fill(b.shard, n, uint16(f.Shard))
	b.frame = fill(b.frame, n, f.Number)
	b.row = grow(b.row, n)
	if keep == nil {
		for i := range n {
			b.row[at+i] = uint16(i)
		}
	} else {
		for i, row := range keep {
			b.row[at+i] = uint16(row)
		}
	}

	b.appendTimes(f, e, keep, at)
	if f.Producer != b.producerOf || b.producerText == nil {
		b.producerOf, b.producerText = f.Producer, []byte{}
		if f.Producer != ksuid.Nil {
			b.producerText = []byte(f.Producer.String())
		}
	}
	b.producer.appendSame(b.producerText, n)
	b.gateway.appendSame([]byte(f.Gateway), n)
	b.account.appendColumn(&f.Account, f.N, keep)
	b.keyID.appendColumn(&f.KeyID, f.N, keep)
	b.requestID.appendColumn(&f.RequestID, f.N, keep)
	b.traceID.Buf = appendFixed(b.traceID.Buf, &f.TraceID, 16, f.N, keep)
	b.spanID.Buf = appendFixed(b.spanID.Buf, &f.SpanID, 8, f.N, keep)
	b.traceFlags = narrow(b.traceFlags, &f.TraceFlags, n, keep)
	b.method.appendColumn(&f.Method, f.N, keep)
	b.route.appendColumn(&f.Route, f.N, keep)
	b.model.appendColumn(&f.Model, f.N, keep)
	b.region.appendColumn(&f.Region, f.N, keep)
	b.status = narrow(b.status, &f.Status, n, keep)
	b.code.appendColumn(&f.Code, f.N, keep)
	b.decisionID.appendColumn(&f.DecisionID, f.N, keep)
	b.duration.ColInt64 = narrow(b.duration.ColInt64, &f.Duration, n, keep)
	b.source.appendColumn(&f.Source, f.N, keep)
	b.eventID.appendColumn(&f.EventID, f.N, keep)
	b.price.appendColumn(&f.PriceVersion, f.N, keep)
	b.currency.appendColumn(&f.Currency, f.N, keep)
	b.known = fill(b.known, n, 0)
	for m := range f.Meters {
		b.appendMeter(m, &f.Meters[m], keep, at)
	}
	b.custom.appendColumns(f.Custom, f.N, keep)

	b.hourly.add(b, at, f.Custom, keep)
	b.minutely.add(b, at, f.Custom, keep)
}

// appendTimes adds the event times and what follows from them: whether a call
// is late, and whether its gateway's clock was ahead of the ledger.
func (b *Block) appendTimes(f *ledger.Frame, e Entry, keep []uint32, at int) {
	n := b.rows - at
	b.time.ColInt64 = narrow(b.time.ColInt64, &f.Time, n, keep)
	b.flags = narrow(b.flags, &f.Flags, n, keep)
	b.ending = narrow(b.ending, &f.Ending, n, keep)
	b.late = fill(b.late, n, 0)
	// Late is every event of a minute that ended before this one began.
	open := int64((e.Time - LateGrace) / minuteMicros * minuteMicros)
	for i, t := range b.time.ColInt64[at:] {
		switch {
		case t < open:
			b.late[at+i] = 1
		case t > int64(e.Time):
			b.flags[at+i] |= uint32(usage.FutureTime)
		}
	}
}

func (b *Block) appendMeter(m int, c *ledger.Ints, keep []uint32, at int) {
	n := b.rows - at
	col := &b.meters[m].ColInt64
	*col = narrow(*col, c, n, keep)
	if c.Absent() {
		return
	}
	bit := uint32(1) << m
	known := b.known[at:]
	if c.Known == nil {
		for i := range known {
			known[i] |= bit
		}
		return
	}
	out := (*col)[at:]
	for i := range known {
		row := i
		if keep != nil {
			row = int(keep[i])
		}
		if _, ok := c.Get(row); ok {
			known[i] |= bit
		} else {
			out[i] = 0 // a constant column has its value in every row
		}
	}
}

// fill appends n times v.
func fill[S ~[]T, T any](s S, n int, v T) S {
	at := len(s)
	s = S(grow([]T(s), n))
	out := s[at:]
	for i := range out {
		out[i] = v
	}
	return s
}

// narrow appends an integer column in the width of s; what does not fit becomes
// the largest that does. An absent column is zeros.
func narrow[S ~[]T, T uint8 | uint16 | uint32 | int64](s S, c *ledger.Ints, n int, keep []uint32) S {
	at := len(s)
	s = S(grow([]T(s), n))
	out := s[at:]
	if c.Absent() {
		clear(out)
		return s
	}
	top := int64(math.MaxInt64)
	if m := ^T(0); m > 0 {
		top = int64(m)
	}
	if keep == nil {
		for i, v := range c.Values[:n] {
			out[i] = T(min(v, top))
		}
		return s
	}
	for i, row := range keep {
		out[i] = T(min(c.Values[row], top))
	}
	return s
}

func appendFixed(s []byte, c *ledger.Fixed, width, n int, keep []uint32) []byte {
	rows := n
	if keep != nil {
		rows = len(keep)
	}
	switch {
	case c.Values == nil:
		at := len(s)
		s = grow(s, rows*width)
		clear(s[at:])
	case keep == nil:
		s = append(s, c.Values[:n*width]...)
	default:
		for _, row := range keep {
			s = append(s, c.At(int(row))...)
		}
	}
	return s
}

// bits is an int64s under the name that the server has for it.
type bits struct {
	*int64s
	as proto.ColumnType
}

func (b bits) Type() proto.ColumnType { return b.as }

// Hourly returns the sums by account and hour: how many, and their columns. The
// block can't be added to afterwards.
func (b *Block) Hourly() (rows int, columns func() proto.Input) {
	return len(b.hourly.sums), func() proto.Input { return b.hourly.input(b) }
}

// Minutely is Hourly by minute, of all accounts together.
func (b *Block) Minutely() (rows int, columns func() proto.Input) {
	return len(b.minutely.sums), func() proto.Input { return b.minutely.input(b) }
}

// Fingerprint returns what the block would send to all its tables, as bytes: two
// blocks with the same fingerprint are the same. The block can't be added to
// afterwards.
func (b *Block) Fingerprint() []byte {
	var out proto.Buffer
	for _, in := range []proto.Input{b.Calls(), b.hourly.input(b), b.minutely.input(b)} {
		for _, c := range in {
			out.PutString(c.Name)
			c.Data.EncodeColumn(&out)
		}
	}
	return out.Buf
}

// Calls returns the columns of the calls themselves.
func (b *Block) Calls() proto.Input {
	in := proto.Input{
		{Name: "account", Data: text{&b.account}},
		{Name: "time", Data: bits{&b.time, proto.ColumnTypeDateTime64.With("6", "'UTC'")}},
		{Name: "sequence", Data: b.sequence},
		{Name: "row", Data: b.row},
		{Name: "stream_time", Data: &b.streamTime},
		{Name: "shard", Data: b.shard},
		{Name: "producer", Data: low{&b.producer}},
		{Name: "frame", Data: b.frame},
		{Name: "gateway", Data: low{&b.gateway}},
		{Name: "key_id", Data: low{&b.keyID}},
		{Name: "request_id", Data: &b.requestID},
		{Name: "trace_id", Data: b.traceID},
		{Name: "span_id", Data: b.spanID},
		{Name: "trace_flags", Data: b.traceFlags},
		{Name: "method", Data: low{&b.method}},
		{Name: "route", Data: low{&b.route}},
		{Name: "model", Data: low{&b.model}},
		{Name: "region", Data: low{&b.region}},
		{Name: "status", Data: b.status},
		{Name: "code", Data: low{&b.code}},
		{Name: "decision_id", Data: text{&b.decisionID}},
		{Name: "duration_micros", Data: bits{&b.duration, proto.ColumnTypeUInt64}},
		{Name: "flags", Data: b.flags},
		{Name: "ending", Data: b.ending},
		{Name: "late", Data: b.late},
		{Name: "source", Data: low{&b.source}},
		{Name: "event_id", Data: &b.eventID},
		{Name: "price_version", Data: low{&b.price}},
		{Name: "currency", Data: low{&b.currency}},
		{Name: "known", Data: b.known},
	}
	for m, name := range usage.BuiltInMeters() {
		in = append(in, proto.InputColumn{Name: string(name), Data: &b.meters[m]})
	}
	return append(in, proto.InputColumn{Name: "custom", Data: &b.custom}, proto.InputColumn{Name: "frame_minute", Data: &b.sealed})
}
