package ledger

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/bits"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Bounds of a frame. A writer seals at MaxFrameCalls or TargetFrameBytes,
// whichever comes first; a reader takes more, up to the decode bounds.
const (
	MaxFrameCalls    = 1000
	TargetFrameBytes = 32 << 10

	maxDecodeCalls = 4096
	maxDecodeBytes = 1 << 20
)

const frameMagic = "TKF1"

// Column ids of schemas/frame.md.
const (
	colTime         = 1
	colAccount      = 2
	colKeyID        = 3
	colRequestID    = 4
	colTraceID      = 5
	colSpanID       = 6
	colTraceFlags   = 7
	colMethod       = 8
	colRoute        = 9
	colModel        = 10
	colStatus       = 11
	colCode         = 12
	colDecisionID   = 13
	colDuration     = 14
	colFlags        = 15
	colSource       = 16
	colEventID      = 17
	colPriceVersion = 18
	colCurrency     = 19
	colRegion       = 20
	colMeter0       = 32 // + usage.BuiltIn
	colCustomMeter  = 64
)

const (
	encIntConst  = 1
	encIntOffset = 2
	encStrConst  = 3
	encStrDict   = 4
	encStrPlain  = 5
	encFixed     = 6
	encNullable  = 0x80
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Header identifies a frame: a producer numbers its frames per shard without
// a gap, so (Producer, Shard, Number) exists once, however often it is sent.
type Header struct {
	// Producer is ksuid.Nil for a foreign event, which is identified by its
	// source and id instead.
	Producer ksuid.KSUID
	Shard    uint32
	Number   uint64
	Gateway  string
	SealedAt usage.Micros
}

// Builder gathers calls and seals them into one columnar frame. The zero value
// is ready. Not safe for concurrent use.
type Builder struct {
	n      int
	bytes  int
	ints   [numIntColumns]intColumn
	strs   [numStrColumns]strColumn
	trace  fixedColumn
	span   fixedColumn
	custom []customColumn
	buf    []byte
}

type customColumn struct {
	meter usage.Meter
	col   intColumn
}

// Positions of the columns inside a Builder and a Frame; meters follow.
const (
	intTime = iota
	intStatus
	intDuration
	intFlags
	intTraceFlags
	intMeter0
	numIntColumns = intMeter0 + usage.NumBuiltIn
)

const (
	strAccount = iota
	strKeyID
	strRequestID
	strMethod
	strRoute
	strModel
	strCode
	strDecisionID
	strSource
	strEventID
	strPriceVersion
	strCurrency
	strRegion
	numStrColumns
)

// intColumnID and strColumnID give the wire's id of a position.
func intColumnID(pos int) uint64 {
	if pos >= intMeter0 {
		return uint64(colMeter0 + pos - intMeter0)
	}
	return [...]uint64{colTime, colStatus, colDuration, colFlags, colTraceFlags}[pos]
}

func strColumnID(pos int) uint64 {
	return [...]uint64{
		colAccount, colKeyID, colRequestID, colMethod, colRoute, colModel, colCode,
		colDecisionID, colSource, colEventID, colPriceVersion, colCurrency, colRegion,
	}[pos]
}

func intPosition(id uint64) (int, bool) {
	if id >= colMeter0 && id < colMeter0+usage.NumBuiltIn {
		return intMeter0 + int(id-colMeter0), true
	}
	for p := range intMeter0 {
		if intColumnID(p) == id {
			return p, true
		}
	}
	return 0, false
}

func strPosition(id uint64) (int, bool) {
	for p := range numStrColumns {
		if strColumnID(p) == id {
			return p, true
		}
	}
	return 0, false
}

// Len returns how many calls are gathered.
func (b *Builder) Len() int { return b.n }

// Size returns about how many bytes the frame will have.
func (b *Builder) Size() int { return b.bytes }

// Full reports whether the frame should be sealed before another call is added.
func (b *Builder) Full() bool { return b.n >= MaxFrameCalls || b.bytes >= TargetFrameBytes }

// Add gathers one call. The caller has validated it (usage.Call.Validate).
func (b *Builder) Add(c *usage.Call) {
	i := b.n
	b.n++
	size := b.ints[intTime].add(i, int64(c.Time))
	if c.Status != 0 {
		size += b.ints[intStatus].add(i, int64(c.Status))
	}
	if c.Duration != 0 {
		size += b.ints[intDuration].add(i, c.Duration)
	}
	if c.Flags != 0 {
		size += b.ints[intFlags].add(i, int64(c.Flags))
	}
	if c.TraceFlags != 0 {
		size += b.ints[intTraceFlags].add(i, int64(c.TraceFlags))
	}
	for m := range usage.BuiltIn(usage.NumBuiltIn) {
		if v, ok := c.Quantities.BuiltIn(m); ok {
			size += b.ints[intMeter0+int(m)].add(i, v)
		}
	}
	size += b.strs[strAccount].add(i, c.Account)
	size += b.strs[strKeyID].add(i, c.KeyID)
	size += b.strs[strRequestID].add(i, c.RequestID)
	size += b.strs[strMethod].add(i, c.Method)
	size += b.strs[strRoute].add(i, c.Route)
	size += b.strs[strModel].add(i, c.Model)
	size += b.strs[strCode].add(i, string(c.Code))
	size += b.strs[strDecisionID].add(i, c.DecisionID)
	size += b.strs[strSource].add(i, c.Source)
	size += b.strs[strEventID].add(i, c.EventID)
	size += b.strs[strPriceVersion].add(i, c.PriceVersion)
	size += b.strs[strCurrency].add(i, c.Currency)
	size += b.strs[strRegion].add(i, c.Region)
	if c.TraceID != ([16]byte{}) {
		size += b.trace.add(i, c.TraceID[:])
	}
	if c.SpanID != ([8]byte{}) {
		size += b.span.add(i, c.SpanID[:])
	}
	for _, q := range c.Quantities.Custom() {
		size += b.customColumn(q.Meter).add(i, q.Value)
	}
	b.bytes += size
}

func (b *Builder) customColumn(m usage.Meter) *intColumn {
	for i := range b.custom {
		if b.custom[i].meter == m {
			return &b.custom[i].col
		}
	}
	b.custom = append(b.custom, customColumn{meter: m})
	return &b.custom[len(b.custom)-1].col
}

// Seal returns the frame of the gathered calls and empties the builder. The
// returned bytes are the caller's. Sealing an empty builder is a programming
// error and panics.
func (b *Builder) Seal(h Header) []byte {
	if b.n == 0 {
		panic("ledger: sealing a frame without calls")
	}
	out := b.buf[:0]
	out = append(out, frameMagic...)
	out = append(out, h.Producer[:]...)
	out = binary.AppendUvarint(out, uint64(h.Shard))
	out = binary.AppendUvarint(out, h.Number)
	out = binary.AppendVarint(out, int64(h.SealedAt))
	out = appendString(out, h.Gateway)
	out = binary.AppendUvarint(out, uint64(b.n))
	for p := range b.ints {
		// An absent meter is unknown, every other absent integer is 0.
		out = b.ints[p].appendBlock(out, intColumnID(p), "", b.n, p >= intMeter0)
		b.ints[p].reset()
	}
	for p := range b.strs {
		out = b.strs[p].appendBlock(out, strColumnID(p), b.n)
		b.strs[p].reset()
	}
	out = b.trace.appendBlock(out, colTraceID, b.n)
	out = b.span.appendBlock(out, colSpanID, b.n)
	b.trace.reset()
	b.span.reset()
	for i := range b.custom {
		out = b.custom[i].col.appendBlock(out, colCustomMeter, string(b.custom[i].meter), b.n, true)
	}
	b.custom = b.custom[:0]
	out = binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli))
	b.buf = out
	b.n, b.bytes = 0, 0
	return append([]byte(nil), out...)
}

func appendString(out []byte, s string) []byte {
	out = binary.AppendUvarint(out, uint64(len(s)))
	return append(out, s...)
}

// appendBlock writes id, encoding, length and the payload that fill appends.
// The length is written after the payload and the payload moved up: payloads
// are small and it spares a second pass over the column.
func appendBlock(out []byte, id uint64, enc byte, payload []byte) []byte {
	out = binary.AppendUvarint(out, id)
	out = append(out, enc)
	out = binary.AppendUvarint(out, uint64(len(payload)))
	return append(out, payload...)
}

type intColumn struct {
	values   []int64
	rows     []uint32 // row of each value
	min, max int64
	scratch  []byte
}

func (c *intColumn) add(row int, v int64) int {
	if len(c.values) == 0 {
		c.min, c.max = v, v
	} else {
		c.min, c.max = min(c.min, v), max(c.max, v)
	}
	c.values = append(c.values, v)
	c.rows = append(c.rows, uint32(row))
	if c.min == c.max {
		return 0
	}
	return offsetWidth(uint64(c.max) - uint64(c.min))
}

func (c *intColumn) reset() { c.values, c.rows = c.values[:0], c.rows[:0] }

func offsetWidth(span uint64) int {
	switch n := bits.Len64(span); {
	case n <= 8:
		return 1
	case n <= 16:
		return 2
	case n <= 32:
		return 4
	default:
		return 8
	}
}

func (c *intColumn) appendBlock(out []byte, id uint64, name string, n int, nullable bool) []byte {
	if len(c.values) == 0 {
		return out
	}
	lo, hi := c.min, c.max
	if !nullable && len(c.values) < n {
		lo, hi = min(lo, 0), max(hi, 0)
	}
	p := c.scratch[:0]
	if name != "" {
		p = appendString(p, name)
	}
	enc := byte(encIntOffset)
	if lo == hi {
		enc = encIntConst
	}
	sparse := len(c.values) < n
	if sparse && nullable {
		p = appendBitmap(p, c.rows, n)
	}
	p = binary.AppendVarint(p, lo)
	if enc == encIntOffset {
		w := offsetWidth(uint64(hi) - uint64(lo))
		p = append(p, byte(w))
		at := len(p)
		rows := len(c.values)
		if sparse && !nullable {
			rows = n
		}
		p = append(p, make([]byte, rows*w)...)
		if sparse && !nullable {
			zero := uint64(0) - uint64(lo)
			for i := range n {
				putWidth(p[at+i*w:], w, zero)
			}
			for k, r := range c.rows {
				putWidth(p[at+int(r)*w:], w, uint64(c.values[k])-uint64(lo))
			}
		} else {
			for k, v := range c.values {
				putWidth(p[at+k*w:], w, uint64(v)-uint64(lo))
			}
		}
	}
	c.scratch = p
	if sparse && nullable {
		enc |= encNullable
	}
	return appendBlock(out, id, enc, p)
}

func putWidth(p []byte, w int, v uint64) {
	switch w {
	case 1:
		p[0] = byte(v)
	case 2:
		binary.LittleEndian.PutUint16(p, uint16(v))
	case 4:
		binary.LittleEndian.PutUint32(p, uint32(v))
	default:
		binary.LittleEndian.PutUint64(p, v)
	}
}

func appendBitmap(p []byte, rows []uint32, n int) []byte {
	at := len(p)
	p = append(p, make([]byte, (n+7)/8)...)
	for _, r := range rows {
		p[at+int(r>>3)] |= 1 << (r & 7)
	}
	return p
}

type strColumn struct {
	dict    []string
	ids     map[string]uint32
	index   []uint32
	bytes   int
	scratch []byte
}

func (c *strColumn) add(row int, s string) int {
	// Most columns repeat the value of the row before.
	if row > 0 && len(c.index) == row && c.dict[c.index[row-1]] == s {
		c.index = append(c.index, c.index[row-1])
		if len(c.dict) == 1 {
			return 0
		}
		return 2
	}
	if c.ids == nil {
		c.ids = make(map[string]uint32)
	}
	id, ok := c.ids[s]
	size := 2
	if !ok {
		id = uint32(len(c.dict))
		c.dict = append(c.dict, s)
		c.ids[s] = id
		c.bytes += len(s)
		size += len(s) + 1
	}
	c.index = append(c.index, id)
	return size
}

func (c *strColumn) reset() {
	clear(c.ids)
	clear(c.dict)
	c.dict, c.index, c.bytes = c.dict[:0], c.index[:0], 0
}

func (c *strColumn) appendBlock(out []byte, id uint64, n int) []byte {
	switch {
	case len(c.dict) == 0, len(c.dict) == 1 && c.dict[0] == "":
		return out
	case len(c.dict) == 1:
		c.scratch = appendString(c.scratch[:0], c.dict[0])
		return appendBlock(out, id, encStrConst, c.scratch)
	}
	p := c.scratch[:0]
	enc := byte(encStrDict)
	if len(c.dict) == n {
		// All different: the index would say nothing.
		enc = encStrPlain
		for _, s := range c.dict {
			p = appendString(p, s)
		}
	} else {
		p = binary.AppendUvarint(p, uint64(len(c.dict)))
		for _, s := range c.dict {
			p = appendString(p, s)
		}
		w := offsetWidth(uint64(len(c.dict) - 1))
		p = append(p, byte(w))
		at := len(p)
		p = append(p, make([]byte, n*w)...)
		for i, id := range c.index {
			putWidth(p[at+i*w:], w, uint64(id))
		}
	}
	c.scratch = p
	return appendBlock(out, id, enc, p)
}

type fixedColumn struct {
	rows    []uint32
	bytes   []byte
	scratch []byte
}

func (c *fixedColumn) add(row int, v []byte) int {
	c.rows = append(c.rows, uint32(row))
	c.bytes = append(c.bytes, v...)
	return len(v)
}

func (c *fixedColumn) reset() { c.rows, c.bytes = c.rows[:0], c.bytes[:0] }

func (c *fixedColumn) appendBlock(out []byte, id uint64, n int) []byte {
	if len(c.rows) == 0 {
		return out
	}
	p, enc := c.scratch[:0], byte(encFixed)
	if len(c.rows) < n {
		p, enc = appendBitmap(p, c.rows, n), enc|encNullable
	}
	p = append(p, c.bytes...)
	c.scratch = p
	return appendBlock(out, id, enc, p)
}

// Strings is a decoded string column: a dictionary and an index into it. The
// bytes point into the message and live as long as it does.
type Strings struct {
	Dict  [][]byte
	Index []uint32 // nil: every row is Dict[0], or "" when Dict is empty
}

// At returns the value of row i, nil when the column is absent.
func (s *Strings) At(i int) []byte {
	if s.Index == nil {
		if len(s.Dict) == 0 {
			return nil
		}
		return s.Dict[0]
	}
	return s.Dict[s.Index[i]]
}

// ID returns the dictionary position of row i; 0 for a constant or absent column.
func (s *Strings) ID(i int) int {
	if s.Index == nil {
		return 0
	}
	return int(s.Index[i])
}

// Absent reports whether every row is empty.
func (s *Strings) Absent() bool { return len(s.Dict) == 0 }

// Ints is a decoded integer column.
type Ints struct {
	// Values has one value a row, or is nil when the column is absent.
	Values []int64
	// Known is nil when every row has a value, else bit i%8 of byte i/8.
	Known []byte
}

// At returns the value of row i, 0 when it has none.
func (c *Ints) At(i int) int64 {
	if c.Values == nil {
		return 0
	}
	return c.Values[i]
}

// Get returns the value of row i and whether it has one.
func (c *Ints) Get(i int) (int64, bool) {
	if c.Values == nil || (c.Known != nil && c.Known[i>>3]&(1<<(i&7)) == 0) {
		return 0, false
	}
	return c.Values[i], true
}

// Absent reports whether no row has a value.
func (c *Ints) Absent() bool { return c.Values == nil }

// Fixed is a decoded column of fixed width.
type Fixed struct {
	Width  int
	Values []byte // one value a row; nil when the column is absent
}

// At returns the value of row i, nil when the column is absent; all zero when
// the row has none.
func (c *Fixed) At(i int) []byte {
	if c.Values == nil {
		return nil
	}
	return c.Values[i*c.Width : (i+1)*c.Width]
}

// CustomMeter is a decoded column of a user's own meter.
type CustomMeter struct {
	Meter usage.Meter
	Ints
}

// Frame is a decoded frame, column by column. Decode may be called again and
// again on the same Frame: it reuses its memory. String and byte values point
// into the decoded message. Not safe for concurrent use while decoding.
type Frame struct {
	Header
	N int

	Time, Status, Duration, Flags, TraceFlags Ints
	Meters                                    [usage.NumBuiltIn]Ints
	Account, KeyID, RequestID                 Strings
	Method, Route, Model, Region              Strings
	Code, DecisionID                          Strings
	Source, EventID                           Strings
	PriceVersion, Currency                    Strings
	TraceID, SpanID                           Fixed
	Custom                                    []CustomMeter

	arena arena
}

// arena keeps the memory of earlier decodings for the next.
type arena struct {
	ints  [][]int64
	intN  int
	idx   [][]uint32
	idxN  int
	dicts [][][]byte
	dictN int
}

func (a *arena) reset() { a.intN, a.idxN, a.dictN = 0, 0, 0 }

func (a *arena) int64s(n int) []int64 {
	if a.intN == len(a.ints) {
		a.ints = append(a.ints, nil)
	}
	if cap(a.ints[a.intN]) < n {
		a.ints[a.intN] = make([]int64, n)
	}
	a.intN++
	return a.ints[a.intN-1][:n]
}

func (a *arena) uint32s(n int) []uint32 {
	if a.idxN == len(a.idx) {
		a.idx = append(a.idx, nil)
	}
	if cap(a.idx[a.idxN]) < n {
		a.idx[a.idxN] = make([]uint32, n)
	}
	a.idxN++
	return a.idx[a.idxN-1][:n]
}

func (a *arena) dict(n int) [][]byte {
	if a.dictN == len(a.dicts) {
		a.dicts = append(a.dicts, nil)
	}
	if cap(a.dicts[a.dictN]) < n {
		a.dicts[a.dictN] = make([][]byte, n)
	}
	a.dictN++
	return a.dicts[a.dictN-1][:n]
}

func (f *Frame) intColumn(pos int) *Ints {
	switch pos {
	case intTime:
		return &f.Time
	case intStatus:
		return &f.Status
	case intDuration:
		return &f.Duration
	case intFlags:
		return &f.Flags
	case intTraceFlags:
		return &f.TraceFlags
	}
	return &f.Meters[pos-intMeter0]
}

func (f *Frame) strColumn(pos int) *Strings {
	return [...]*Strings{
		&f.Account, &f.KeyID, &f.RequestID, &f.Method, &f.Route, &f.Model, &f.Code,
		&f.DecisionID, &f.Source, &f.EventID, &f.PriceVersion, &f.Currency, &f.Region,
	}[pos]
}

func malformed(format string, args ...any) error {
	return &usage.InvalidError{Reason: usage.ReasonMalformed, Message: "frame: " + fmt.Sprintf(format, args...)}
}

// Decode reads a columnar frame. Its errors are *usage.InvalidError: the
// message can never be decoded and belongs in the dead-letter stream. After an
// error the frame's content is undefined.
func (f *Frame) Decode(data []byte) error {
	f.arena.reset()
	a := f.arena
	*f = Frame{arena: a, Custom: f.Custom[:0]}
	if len(data) > maxDecodeBytes {
		return &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("frame: %d bytes, at most %d are read", len(data), maxDecodeBytes)}
	}
	if len(data) < len(frameMagic)+20+4 || string(data[:len(frameMagic)]) != frameMagic {
		return &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: "frame: it does not begin with " + frameMagic}
	}
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return &usage.InvalidError{Reason: usage.ReasonChecksum, Message: "frame: its CRC-32C does not match its content"}
	}
	r := reader{b: body[len(frameMagic):]}
	copy(f.Producer[:], r.bytes(20))
	shard := r.uvarint()
	f.Number = r.uvarint()
	f.SealedAt = usage.Micros(r.varint())
	f.Gateway = string(r.lenBytes())
	n := r.uvarint()
	if r.bad || shard >= MaxShards {
		return malformed("its header is cut off or names shard %d", shard)
	}
	f.Shard = uint32(shard)
	if n == 0 || n > maxDecodeCalls {
		return malformed("it says it holds %d calls; 1 to %d are read", n, maxDecodeCalls)
	}
	f.N = int(n)
	for len(r.b) > 0 {
		id, enc := r.uvarint(), r.byte()
		payload := r.lenBytes()
		if r.bad {
			return malformed("a column is cut off")
		}
		if err := f.decodeColumn(id, enc, payload); err != nil {
			return err
		}
	}
	if f.Time.Values == nil || f.Account.Absent() {
		return malformed("it has no time or no account column")
	}
	return nil
}

func (f *Frame) decodeColumn(id uint64, enc byte, payload []byte) error {
	if pos, ok := intPosition(id); ok {
		col := f.intColumn(pos)
		if col.Values != nil {
			return malformed("column %d appears twice", id)
		}
		lowest, err := f.decodeInts(col, enc, payload)
		if err != nil {
			return err
		}
		if pos == intTime {
			if usage.Micros(lowest) < usage.OldestTimeMicros {
				return &usage.InvalidError{Reason: usage.ReasonAbsurdTime, Message: "frame: an event time is before the year 2000"}
			}
			if col.Known != nil {
				return malformed("a call has no time")
			}
		} else if lowest < 0 {
			return &usage.InvalidError{Reason: usage.ReasonNegativeCount, Message: fmt.Sprintf("frame: column %d has a negative value", id)}
		}
		return nil
	}
	if pos, ok := strPosition(id); ok {
		col := f.strColumn(pos)
		if col.Dict != nil {
			return malformed("column %d appears twice", id)
		}
		return f.decodeStrings(col, enc, payload)
	}
	switch id {
	case colTraceID:
		return f.decodeFixed(&f.TraceID, 16, enc, payload)
	case colSpanID:
		return f.decodeFixed(&f.SpanID, 8, enc, payload)
	case colCustomMeter:
		r := reader{b: payload}
		name := r.lenBytes()
		if r.bad || !usage.Meter(name).Valid() || len(f.Custom) >= usage.MaxCustomMeters*8 {
			return malformed("a custom meter has no valid name, or there are too many")
		}
		for i := range f.Custom {
			if string(f.Custom[i].Meter) == string(name) {
				return malformed("meter %q appears twice", name)
			}
		}
		f.Custom = append(f.Custom, CustomMeter{Meter: usage.Meter(name)})
		lowest, err := f.decodeInts(&f.Custom[len(f.Custom)-1].Ints, enc, r.b)
		if err == nil && lowest < 0 {
			return &usage.InvalidError{Reason: usage.ReasonNegativeCount, Message: fmt.Sprintf("frame: meter %s has a negative value", name)}
		}
		return err
	}
	return nil // a newer writer's column
}

// bitmap takes the presence bitmap off the payload and returns how many rows
// have a value.
func (f *Frame) bitmap(enc byte, r *reader) (known []byte, rows int, err error) {
	if enc&encNullable == 0 {
		return nil, f.N, nil
	}
	known = r.bytes((f.N + 7) / 8)
	if r.bad {
		return nil, 0, malformed("a column's bitmap is cut off")
	}
	for i, b := range known {
		if i == len(known)-1 && f.N%8 != 0 && b>>(f.N%8) != 0 {
			return nil, 0, malformed("a column's bitmap names rows that do not exist")
		}
		rows += bits.OnesCount8(b)
	}
	return known, rows, nil
}

func (f *Frame) decodeInts(col *Ints, enc byte, payload []byte) (lowest int64, err error) {
	r := reader{b: payload}
	known, rows, err := f.bitmap(enc, &r)
	if err != nil {
		return 0, err
	}
	base := r.varint()
	values := f.arena.int64s(f.N)
	w := 0
	switch enc &^ encNullable {
	case encIntConst:
		if r.bad || len(r.b) != 0 {
			return 0, malformed("a constant column has the wrong length")
		}
		for i := range values {
			values[i] = base
		}
		col.Values, col.Known = values, known
		return base, nil
	case encIntOffset:
		w = int(r.byte())
	default:
		return 0, malformed("encoding %d is not one of an integer column", enc)
	}
	if r.bad || (w != 1 && w != 2 && w != 4 && w != 8) || len(r.b) != rows*w {
		return 0, malformed("an integer column has the wrong length")
	}
	if known != nil {
		k := 0
		for i := range values {
			values[i] = 0
			if known[i>>3]&(1<<(i&7)) != 0 {
				values[i] = int64(uint64(base) + getWidth(r.b[k*w:], w))
				k++
			}
		}
	} else {
		b := r.b
		switch w {
		case 1:
			for i := range values {
				values[i] = base + int64(b[i])
			}
		case 2:
			for i := range values {
				values[i] = base + int64(binary.LittleEndian.Uint16(b[i*2:]))
			}
		case 4:
			for i := range values {
				values[i] = base + int64(binary.LittleEndian.Uint32(b[i*4:]))
			}
		default:
			for i := range values {
				values[i] = int64(uint64(base) + binary.LittleEndian.Uint64(b[i*8:]))
			}
		}
	}
	lowest = base
	// An 8-byte offset, or a base near the end of the range, can wrap.
	if w == 8 || base > 1<<62 {
		lowest = values[0]
		for _, v := range values {
			lowest = min(lowest, v)
		}
		lowest = min(lowest, base)
	}
	col.Values, col.Known = values, known
	return lowest, nil
}

func getWidth(p []byte, w int) uint64 {
	switch w {
	case 1:
		return uint64(p[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(p))
	case 4:
		return uint64(binary.LittleEndian.Uint32(p))
	default:
		return binary.LittleEndian.Uint64(p)
	}
}

func (f *Frame) decodeStrings(col *Strings, enc byte, payload []byte) error {
	r := reader{b: payload}
	switch enc {
	case encStrConst:
		col.Dict = f.arena.dict(1)
		col.Dict[0] = r.lenBytes()
	case encStrPlain:
		col.Dict, col.Index = f.arena.dict(f.N), f.arena.uint32s(f.N)
		for i := range col.Dict {
			col.Dict[i], col.Index[i] = r.lenBytes(), uint32(i)
		}
	case encStrDict:
		m := r.uvarint()
		if r.bad || m == 0 || m > uint64(f.N) {
			return malformed("a dictionary has %d entries for %d rows", m, f.N)
		}
		col.Dict = f.arena.dict(int(m))
		for i := range col.Dict {
			col.Dict[i] = r.lenBytes()
		}
		w := int(r.byte())
		if r.bad || (w != 1 && w != 2 && w != 4) || len(r.b) != f.N*w {
			return malformed("a string column has the wrong length")
		}
		col.Index = f.arena.uint32s(f.N)
		top := uint32(0)
		switch w {
		case 1:
			for i := range col.Index {
				v := uint32(r.b[i])
				col.Index[i], top = v, max(top, v)
			}
		case 2:
			for i := range col.Index {
				v := uint32(binary.LittleEndian.Uint16(r.b[i*2:]))
				col.Index[i], top = v, max(top, v)
			}
		default:
			for i := range col.Index {
				v := binary.LittleEndian.Uint32(r.b[i*4:])
				col.Index[i], top = v, max(top, v)
			}
		}
		if uint64(top) >= m {
			return malformed("a string column points outside of its dictionary")
		}
		r.b = nil
	default:
		return malformed("encoding %d is not one of a string column", enc)
	}
	if r.bad || len(r.b) != 0 {
		return malformed("a string column has the wrong length")
	}
	for _, d := range col.Dict {
		if len(d) > usage.MaxIDBytes {
			return &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("frame: a text of %d bytes, at most %d are read", len(d), usage.MaxIDBytes)}
		}
	}
	return nil
}

func (f *Frame) decodeFixed(col *Fixed, width int, enc byte, payload []byte) error {
	if enc&^encNullable != encFixed || col.Values != nil {
		return malformed("a fixed column has encoding %d or appears twice", enc)
	}
	r := reader{b: payload}
	known, rows, err := f.bitmap(enc, &r)
	if err != nil {
		return err
	}
	if len(r.b) != rows*width {
		return malformed("a fixed column has the wrong length")
	}
	col.Width = width
	if known == nil {
		col.Values = r.b
		return nil
	}
	col.Values = make([]byte, f.N*width)
	k := 0
	for i := range f.N {
		if known[i>>3]&(1<<(i&7)) != 0 {
			copy(col.Values[i*width:], r.b[k*width:(k+1)*width])
			k++
		}
	}
	return nil
}

// Call returns row i as a call; its strings are copies.
func (f *Frame) Call(i int) usage.Call {
	c := usage.Call{
		Time:         usage.Micros(f.Time.At(i)),
		Account:      string(f.Account.At(i)),
		KeyID:        string(f.KeyID.At(i)),
		RequestID:    string(f.RequestID.At(i)),
		Method:       string(f.Method.At(i)),
		Route:        string(f.Route.At(i)),
		Model:        string(f.Model.At(i)),
		Region:       string(f.Region.At(i)),
		Status:       uint16(f.Status.At(i)),
		Code:         usage.Code(f.Code.At(i)),
		DecisionID:   string(f.DecisionID.At(i)),
		Duration:     f.Duration.At(i),
		Flags:        usage.Flags(f.Flags.At(i)),
		TraceFlags:   byte(f.TraceFlags.At(i)),
		Source:       string(f.Source.At(i)),
		EventID:      string(f.EventID.At(i)),
		PriceVersion: string(f.PriceVersion.At(i)),
		Currency:     string(f.Currency.At(i)),
	}
	copy(c.TraceID[:], f.TraceID.At(i))
	copy(c.SpanID[:], f.SpanID.At(i))
	for m := range f.Meters {
		if v, ok := f.Meters[m].Get(i); ok {
			c.Quantities.SetBuiltIn(usage.BuiltIn(m), v)
		}
	}
	for k := range f.Custom {
		if v, ok := f.Custom[k].Get(i); ok {
			c.Quantities.Set(f.Custom[k].Meter, v)
		}
	}
	return c
}

// Admitted reports whether the call of row i was let through.
func (f *Frame) Admitted(i int) bool { return len(f.Code.At(i)) == 0 }

// reader takes values off a byte slice; after the first failure bad is set
// and everything it returns is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) bytes(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) lenBytes() []byte {
	n := r.uvarint()
	if n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return nil
	}
	return r.bytes(int(n))
}
