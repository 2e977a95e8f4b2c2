package ledger

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"math/bits"
	"unicode/utf8"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Bounds of a frame. A writer seals at MaxFrameCalls or TargetFrameBytes,
// whichever comes first; a reader takes more, up to the decode bounds. The
// bytes are such that the calls decide, with request and trace ids too: what a
// frame costs the ledger is its sync, not its bytes (schemas/frame.md).
const (
	MaxFrameCalls    = 1000
	TargetFrameBytes = 96 << 10

	maxDecodeCalls   = 4096
	maxDecodeBytes   = 1 << 20
	maxCustomColumns = 8 * usage.MaxCustomMeters
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
	colEnding       = 21
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

// Positions of the columns inside a Builder and a Frame; meters follow.
const (
	intTime = iota
	intStatus
	intDuration
	intFlags
	intTraceFlags
	intEnding
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

// Wire ids by position, and positions + 1 by wire id.
var (
	intIDs = [intMeter0]uint64{colTime, colStatus, colDuration, colFlags, colTraceFlags, colEnding}
	strIDs = [numStrColumns]uint64{
		colAccount, colKeyID, colRequestID, colMethod, colRoute, colModel, colCode,
		colDecisionID, colSource, colEventID, colPriceVersion, colCurrency, colRegion,
	}
	intPositions = [colMeter0]uint8{
		colTime: intTime + 1, colStatus: intStatus + 1, colDuration: intDuration + 1, colFlags: intFlags + 1, colTraceFlags: intTraceFlags + 1, colEnding: intEnding + 1,
	}
	strPositions = [colMeter0]uint8{
		colAccount: strAccount + 1, colKeyID: strKeyID + 1, colRequestID: strRequestID + 1, colMethod: strMethod + 1,
		colRoute: strRoute + 1, colModel: strModel + 1, colCode: strCode + 1, colDecisionID: strDecisionID + 1, colSource: strSource + 1,
		colEventID: strEventID + 1, colPriceVersion: strPriceVersion + 1, colCurrency: strCurrency + 1, colRegion: strRegion + 1,
	}
)

func intColumnID(pos int) uint64 {
	if pos >= intMeter0 {
		return uint64(colMeter0 + pos - intMeter0)
	}
	return intIDs[pos]
}

func strColumnID(pos int) uint64 { return strIDs[pos] }

func intPosition(id uint64) (int, bool) {
	switch {
	case id < colMeter0:
		return int(intPositions[id]) - 1, intPositions[id] != 0
	case id < colMeter0+usage.NumBuiltIn:
		return intMeter0 + int(id-colMeter0), true
	}
	return 0, false
}

func strPosition(id uint64) (int, bool) {
	if id < colMeter0 {
		return int(strPositions[id]) - 1, strPositions[id] != 0
	}
	return 0, false
}

// intBounds are the values that a column's rows may have: what usage.Call can
// hold and usage.Call.Validate lets through.
func intBounds(pos int) (lo, hi int64) {
	switch pos {
	case intTime:
		return int64(usage.OldestTimeMicros), int64(usage.NewestTimeMicros)
	case intStatus:
		return 0, usage.MaxStatus
	case intFlags:
		return 0, math.MaxUint32
	case intTraceFlags, intEnding:
		return 0, math.MaxUint8
	}
	return 0, usage.MaxQuantity
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
	Ending                                    Ints
	Meters                                    [usage.NumBuiltIn]Ints
	Account, KeyID, RequestID                 Strings
	Method, Route, Model, Region              Strings
	Code, DecisionID                          Strings
	Source, EventID                           Strings
	PriceVersion, Currency                    Strings
	TraceID, SpanID                           Fixed
	Custom                                    []CustomMeter

	// CostsIn is the ledger's currency (Geometry.Currency), for DecodeCalls, which
	// refuses a frame with a cost in another; empty: whatever it is is decoded. It is
	// kept from one decoding to the next.
	CostsIn string

	arena arena
}

// arena keeps the memory of earlier decodings for the next.
type arena struct {
	ints   [][]int64
	intN   int
	idx    [][]uint32
	idxN   int
	dicts  [][][]byte
	dictN  int
	fixed  [2][]byte // of sparse trace and span ids
	rows   *Builder  // of the row-wise forms
	gwName string    // of the frame before: it is mostly the same again
}

func (a *arena) reset() {
	for i := range a.dicts[:a.dictN] {
		// They point into a message, which must not be kept alive.
		clear(a.dicts[i])
	}
	a.intN, a.idxN, a.dictN = 0, 0, 0
}

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
	a.dicts[a.dictN] = a.dicts[a.dictN][:n]
	a.dictN++
	return a.dicts[a.dictN-1]
}

// fixedBytes returns n zeroed bytes.
func (a *arena) fixedBytes(slot, n int) []byte {
	if cap(a.fixed[slot]) < n {
		a.fixed[slot] = make([]byte, n)
	}
	b := a.fixed[slot][:n]
	clear(b)
	return b
}

// builder returns an empty builder for the row-wise forms.
func (a *arena) builder() *Builder {
	if a.rows == nil || a.rows.Len() > 0 {
		// The frame before was given up half way.
		a.rows = new(Builder)
	}
	return a.rows
}

// gateway returns the name as a string, which is mostly that of the frame before.
func (a *arena) gateway(name []byte) string {
	if a.gwName != string(name) {
		a.gwName = string(name)
	}
	return a.gwName
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
	case intEnding:
		return &f.Ending
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

func oversized(format string, args ...any) error {
	return &usage.InvalidError{Reason: usage.ReasonOversized, Message: "frame: " + fmt.Sprintf(format, args...)}
}

// Decode reads a columnar frame. Its errors are *usage.InvalidError: the
// message can never be decoded and belongs in the dead-letter stream. After an
// error the frame's content is undefined. What it accepts has, in every row,
// what usage.Call.Validate wants of a call.
func (f *Frame) Decode(data []byte) error {
	f.reset()
	if len(data) > maxDecodeBytes {
		return oversized("%d bytes, at most %d are read", len(data), maxDecodeBytes)
	}
	if len(data) < len(frameMagic)+20+4 || string(data[:len(frameMagic)]) != frameMagic {
		return &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: "frame: it does not begin with " + frameMagic}
	}
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return &usage.InvalidError{Reason: usage.ReasonChecksum, Message: "frame: its CRC-32C does not match its content"}
	}
	return f.decodeBody(body)
}

// reset empties the frame and keeps its memory.
func (f *Frame) reset() {
	f.arena.reset()
	*f = Frame{arena: f.arena, Custom: f.Custom[:0], CostsIn: f.CostsIn}
}

// decodeBody is Decode of a reset frame, without the checks of size and checksum.
func (f *Frame) decodeBody(body []byte) error {
	r := reader{b: body[len(frameMagic):]}
	copy(f.Producer[:], r.bytes(20))
	shard := r.uvarint()
	f.Number = r.uvarint()
	f.SealedAt = usage.Micros(r.varint())
	gateway := r.lenBytes()
	n := r.uvarint()
	if r.bad || shard >= MaxShards {
		return malformed("its header is cut off or names shard %d", shard)
	}
	if f.SealedAt != 0 && (f.SealedAt < usage.OldestTimeMicros || f.SealedAt > usage.NewestTimeMicros) {
		return &usage.InvalidError{Reason: usage.ReasonAbsurdTime, Message: "frame: it says it was sealed before the year 2000 or after 2199"}
	}
	if err := checkText(gateway); err != nil {
		return err
	}
	f.Gateway = f.arena.gateway(gateway)
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
	if f.Time.Values == nil || f.Time.Known != nil {
		return malformed("a call has no time")
	}
	if f.Account.Absent() {
		return malformed("a call names no account")
	}
	for _, account := range f.Account.Dict {
		if len(account) == 0 {
			return malformed("a call names no account")
		}
	}
	if !f.Source.Absent() {
		for i := range f.N {
			if len(f.Source.At(i)) > 0 && len(f.EventID.At(i)) == 0 {
				return malformed("call %d has a source and no event id: all of that source would be one event", i)
			}
		}
	}
	if len(f.Custom) > usage.MaxCustomMeters {
		return f.checkCustom()
	}
	return nil
}

// checkCustom looks for a call with too many meters of the user's own.
func (f *Frame) checkCustom() error {
	for i := range f.N {
		count := 0
		for k := range f.Custom {
			if _, known := f.Custom[k].Get(i); known {
				count++
			}
		}
		if count > usage.MaxCustomMeters {
			return oversized("call %d reports %d own meters, at most %d are allowed", i, count, usage.MaxCustomMeters)
		}
	}
	return nil
}

func (f *Frame) decodeColumn(id uint64, enc byte, payload []byte) error {
	if pos, ok := intPosition(id); ok {
		col := f.intColumn(pos)
		if col.Values != nil {
			return malformed("column %d appears twice", id)
		}
		lo, hi := intBounds(pos)
		return f.decodeInts(col, id, lo, hi, enc, payload)
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
		return f.decodeFixed(&f.TraceID, 0, 16, enc, payload)
	case colSpanID:
		return f.decodeFixed(&f.SpanID, 1, 8, enc, payload)
	case colCustomMeter:
		return f.decodeCustom(enc, payload)
	}
	return nil // a newer writer's column
}

func (f *Frame) decodeCustom(enc byte, payload []byte) error {
	r := reader{b: payload}
	name := r.lenBytes()
	if r.bad || len(f.Custom) == maxCustomColumns {
		return malformed("an own meter has no name, or there are more than %d", maxCustomColumns)
	}
	for i := range f.Custom {
		if string(f.Custom[i].Meter) == string(name) {
			return malformed("meter %q appears twice", name)
		}
	}
	// The frame before mostly had the same meters in the same order.
	k := len(f.Custom)
	var meter usage.Meter
	if k < cap(f.Custom) {
		meter = f.Custom[:k+1][k].Meter
	}
	if meter == "" || string(meter) != string(name) {
		meter = usage.Meter(name)
		if _, builtIn := meter.Index(); builtIn || !meter.Valid() {
			return malformed("%q cannot name an own meter", name)
		}
	}
	f.Custom = append(f.Custom, CustomMeter{Meter: meter})
	return f.decodeInts(&f.Custom[k].Ints, colCustomMeter, 0, usage.MaxQuantity, enc, r.b)
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

func (f *Frame) decodeInts(col *Ints, id uint64, lo, hi int64, enc byte, payload []byte) error {
	r := reader{b: payload}
	known, rows, err := f.bitmap(enc, &r)
	if err != nil {
		return err
	}
	base := r.varint()
	values := f.arena.int64s(f.N)
	col.Values, col.Known = values, known
	w := 0
	switch enc &^ encNullable {
	case encIntConst:
		if r.bad || len(r.b) != 0 {
			return malformed("column %d has the wrong length", id)
		}
	case encIntOffset:
		w = int(r.byte())
		if r.bad || (w != 1 && w != 2 && w != 4 && w != 8) || len(r.b) != rows*w {
			return malformed("column %d has the wrong length", id)
		}
	default:
		return malformed("encoding %d is not one of an integer column", enc)
	}
	// The values are made with wrapping sums: a base that is within the bounds
	// itself and cannot leave them need not be looked at row by row.
	inside := base >= lo && base <= hi && (w == 0 || w < 8 && hi-base >= 1<<(8*w)-1)
	if known != nil {
		clear(values)
		k := 0
		for i := range values {
			if known[i>>3]&(1<<(i&7)) != 0 {
				values[i] = base
				if w > 0 {
					values[i] = int64(uint64(base) + getWidth(r.b[k*w:], w))
				}
				k++
				if !inside && (values[i] < lo || values[i] > hi) {
					return outside(id, values[i], lo)
				}
			}
		}
		return nil
	}
	b := r.b
	switch w {
	case 0:
		for i := range values {
			values[i] = base
		}
	case 1:
		b = b[:len(values)]
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
	if inside {
		return nil
	}
	least, most := values[0], values[0]
	for _, v := range values {
		least, most = min(least, v), max(most, v)
	}
	if least < lo {
		return outside(id, least, lo)
	}
	if most > hi {
		return outside(id, most, lo)
	}
	return nil
}

// outside says that a value is below lo or above what its column may have.
func outside(id uint64, v, lo int64) error {
	e := &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf("frame: column %d has a value of %d, which is too great", id, v)}
	switch {
	case id == colTime:
		e.Reason, e.Message = usage.ReasonAbsurdTime, "frame: an event time is before the year 2000 or after 2199"
	case v < lo:
		e.Reason, e.Message = usage.ReasonNegativeCount, fmt.Sprintf("frame: column %d has a negative value", id)
	}
	return e
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
		if err := checkText(d); err != nil {
			return err
		}
	}
	return nil
}

func checkText(d []byte) error {
	if len(d) > usage.MaxIDBytes {
		return oversized("a text of %d bytes, at most %d are read", len(d), usage.MaxIDBytes)
	}
	if !utf8.Valid(d) || bytes.IndexByte(d, 0) >= 0 {
		return malformed("a text is not UTF-8 or contains a zero byte")
	}
	return nil
}

func (f *Frame) decodeFixed(col *Fixed, slot, width int, enc byte, payload []byte) error {
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
	col.Values = f.arena.fixedBytes(slot, f.N*width)
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
		Ending:       ending(uint64(f.Ending.At(i))),
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

// ending is one that is known here: a newer writer's is not.
func ending(v uint64) usage.Ending {
	if v > uint64(usage.NewestEnding) {
		return usage.EndingUnknown
	}
	return usage.Ending(v)
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
