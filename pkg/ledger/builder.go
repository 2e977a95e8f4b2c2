package ledger

import (
	"encoding/binary"
	"hash/crc32"
	"hash/maphash"
	"math/bits"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Builder gathers calls and seals them into one columnar frame. The zero value
// is ready. Not safe for concurrent use.
type Builder struct {
	n     int
	bytes int
	ints  [numIntColumns]intColumn
	strs  [numStrColumns]strColumn
	trace fixedColumn
	span  fixedColumn
	// custom[:customN] are in use; the rest keep their memory.
	custom  []customColumn
	customN int
	buf     []byte
}

type customColumn struct {
	meter usage.Meter
	col   intColumn
}

// Len returns how many calls are gathered.
func (b *Builder) Len() int { return b.n }

// Size returns about how many bytes the frame will have: never much less than
// it has in the end.
func (b *Builder) Size() int { return b.bytes }

// Full reports whether the frame should be sealed before another call is added.
func (b *Builder) Full() bool {
	return b.n >= MaxFrameCalls || b.bytes >= TargetFrameBytes || b.customN > maxCustomColumns-usage.MaxCustomMeters
}

// Add gathers one call. The caller has validated it (usage.Call.Validate) and
// seals when Full; more calls than any reader takes are a programming error
// and panic.
func (b *Builder) Add(c *usage.Call) {
	if b.n == maxDecodeCalls {
		panic("ledger: adding to a frame that is more than full")
	}
	i := b.n
	b.n++
	if i == 0 {
		b.bytes = frameOverhead
	}
	size := b.ints[intTime].add(i, int64(c.Time))
	// Most calls leave most of the columns empty: that must cost nothing.
	if v := int64(c.Status); v != 0 || b.ints[intStatus].begun() {
		size += b.ints[intStatus].addZeroed(i, v)
	}
	if v := c.Duration; v != 0 || b.ints[intDuration].begun() {
		size += b.ints[intDuration].addZeroed(i, v)
	}
	if v := int64(c.Flags); v != 0 || b.ints[intFlags].begun() {
		size += b.ints[intFlags].addZeroed(i, v)
	}
	if v := int64(c.TraceFlags); v != 0 || b.ints[intTraceFlags].begun() {
		size += b.ints[intTraceFlags].addZeroed(i, v)
	}
	if v := int64(c.Ending); v != 0 || b.ints[intEnding].begun() {
		size += b.ints[intEnding].addZeroed(i, v)
	}
	for m := range usage.BuiltIn(usage.NumBuiltIn) {
		if v, ok := c.Quantities.BuiltIn(m); ok {
			size += b.ints[intMeter0+int(m)].add(i, v)
		}
	}
	size += b.strs[strAccount].add(i, c.Account)
	if c.KeyID != "" || b.strs[strKeyID].begun() {
		size += b.strs[strKeyID].add(i, c.KeyID)
	}
	if c.RequestID != "" || b.strs[strRequestID].begun() {
		size += b.strs[strRequestID].add(i, c.RequestID)
	}
	if c.Method != "" || b.strs[strMethod].begun() {
		size += b.strs[strMethod].add(i, c.Method)
	}
	if c.Route != "" || b.strs[strRoute].begun() {
		size += b.strs[strRoute].add(i, c.Route)
	}
	if c.Model != "" || b.strs[strModel].begun() {
		size += b.strs[strModel].add(i, c.Model)
	}
	if c.Code != "" || b.strs[strCode].begun() {
		size += b.strs[strCode].add(i, string(c.Code))
	}
	if c.DecisionID != "" || b.strs[strDecisionID].begun() {
		size += b.strs[strDecisionID].add(i, c.DecisionID)
	}
	if c.Source != "" || b.strs[strSource].begun() {
		size += b.strs[strSource].add(i, c.Source)
	}
	if c.EventID != "" || b.strs[strEventID].begun() {
		size += b.strs[strEventID].add(i, c.EventID)
	}
	if c.PriceVersion != "" || b.strs[strPriceVersion].begun() {
		size += b.strs[strPriceVersion].add(i, c.PriceVersion)
	}
	if c.Currency != "" || b.strs[strCurrency].begun() {
		size += b.strs[strCurrency].add(i, c.Currency)
	}
	if c.Region != "" || b.strs[strRegion].begun() {
		size += b.strs[strRegion].add(i, c.Region)
	}
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

// frameOverhead is what header, checksum and the columns' own headers take.
const frameOverhead = 128

func (b *Builder) customColumn(m usage.Meter) *intColumn {
	for i := range b.custom[:b.customN] {
		if b.custom[i].meter == m {
			return &b.custom[i].col
		}
	}
	if b.customN == len(b.custom) {
		b.custom = append(b.custom, customColumn{})
	}
	c := &b.custom[b.customN]
	b.customN++
	c.meter = m
	// Its name, its bitmap and its header.
	b.bytes += len(m) + MaxFrameCalls/8 + 16
	return &c.col
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
		out = b.ints[p].appendBlock(out, intColumnID(p), "", b.n)
		b.ints[p].reset()
	}
	for p := range b.strs {
		out = b.strs[p].appendBlock(out, strColumnID(p))
		b.strs[p].reset()
	}
	out = b.trace.appendBlock(out, colTraceID, b.n)
	out = b.span.appendBlock(out, colSpanID, b.n)
	b.trace.reset()
	b.span.reset()
	for i := range b.custom[:b.customN] {
		c := &b.custom[i]
		out = c.col.appendBlock(out, colCustomMeter, string(c.meter), b.n)
		c.col.reset()
	}
	out = binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli))
	b.buf, b.n, b.bytes, b.customN = out, 0, 0, 0
	return slices.Clone(out)
}

func appendString(out []byte, s string) []byte {
	out = binary.AppendUvarint(out, uint64(len(s)))
	return append(out, s...)
}

// appendBlockHeader writes what stands before a payload of the given length.
func appendBlockHeader(out []byte, id uint64, enc byte, length int) []byte {
	out = binary.AppendUvarint(out, id)
	out = append(out, enc)
	return binary.AppendUvarint(out, uint64(length))
}

func uvarintLen(v uint64) int { return max(1, (bits.Len64(v)+6)/7) }

func varintLen(v int64) int { return uvarintLen(uint64(v)<<1 ^ uint64(v>>63)) }

// presence says which rows of a column have a value. As long as all have one,
// which is the rule, it holds nothing.
type presence struct {
	sparse bool
	bits   []byte
}

// skip notes that after the first count values, all present, some row has none.
func (p *presence) skip(count int) {
	p.sparse = true
	p.bits = p.bits[:0]
	for range count / 8 {
		p.bits = append(p.bits, 0xff)
	}
	if count%8 != 0 {
		p.bits = append(p.bits, 1<<(count%8)-1)
	}
}

func (p *presence) set(row int) {
	for len(p.bits) <= row>>3 {
		p.bits = append(p.bits, 0)
	}
	p.bits[row>>3] |= 1 << (row & 7)
}

func (p *presence) append(out []byte, n int) []byte {
	out = append(out, p.bits...)
	for range (n+7)/8 - len(p.bits) {
		out = append(out, 0)
	}
	return out
}

type intColumn struct {
	values   []int64
	present  presence
	min, max int64
	width    int
}

func (c *intColumn) add(row int, v int64) (size int) {
	k := len(c.values)
	if c.present.sparse || k != row {
		if !c.present.sparse {
			c.present.skip(k)
		}
		c.present.set(row)
	}
	c.values = append(c.values, v)
	if k == 0 {
		c.min, c.max, c.width = v, v, 0
		return 0
	}
	if v < c.min || v > c.max {
		c.min, c.max = min(c.min, v), max(c.max, v)
		if w := offsetWidth(uint64(c.max) - uint64(c.min)); w != c.width {
			size = k * (w - c.width)
			c.width = w
		}
	}
	return size + c.width
}

func (c *intColumn) begun() bool { return len(c.values) > 0 }

// addZeroed is add for a column in which a row without a value has 0.
func (c *intColumn) addZeroed(row int, v int64) (size int) {
	for k := len(c.values); k < row; k++ {
		size += c.add(k, 0)
	}
	return size + c.add(row, v)
}

func (c *intColumn) reset() {
	c.values, c.min, c.max, c.width, c.present.sparse = c.values[:0], 0, 0, 0, false
}

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

func (c *intColumn) appendBlock(out []byte, id uint64, name string, n int) []byte {
	k := len(c.values)
	if k == 0 {
		return out
	}
	if k < n && !c.present.sparse {
		c.present.skip(k)
	}
	enc, length := byte(encIntConst), varintLen(c.min)
	if c.width != 0 {
		enc, length = encIntOffset, length+1+k*c.width
	}
	if k < n {
		enc, length = enc|encNullable, length+(n+7)/8
	}
	if name != "" {
		length += uvarintLen(uint64(len(name))) + len(name)
	}
	out = appendBlockHeader(out, id, enc, length)
	if name != "" {
		out = appendString(out, name)
	}
	if k < n {
		out = c.present.append(out, n)
	}
	out = binary.AppendVarint(out, c.min)
	if c.width == 0 {
		return out
	}
	out = append(out, byte(c.width))
	at := len(out)
	out = slices.Grow(out, k*c.width)[:at+k*c.width]
	p, base := out[at:], uint64(c.min)
	switch c.width {
	case 1:
		p = p[:k]
		for i, v := range c.values {
			p[i] = byte(uint64(v) - base)
		}
	case 2:
		for i, v := range c.values {
			binary.LittleEndian.PutUint16(p[i*2:], uint16(uint64(v)-base))
		}
	case 4:
		for i, v := range c.values {
			binary.LittleEndian.PutUint32(p[i*4:], uint32(uint64(v)-base))
		}
	default:
		for i, v := range c.values {
			binary.LittleEndian.PutUint64(p[i*8:], uint64(v)-base)
		}
	}
	return out
}

// strColumn is a dictionary and an index into it. A column that has been empty
// in every row so far holds nothing.
type strColumn struct {
	dict  []string
	index []uint16
	last  uint16 // the row before: most columns repeat it
	bytes int    // of the dictionary's entries with their lengths
	// table is a hash table of dictionary positions + 1 with linear probing,
	// used from linearDict entries on; its length is a power of two.
	table  []uint16
	hashed bool // the table holds this dictionary
	seed   maphash.Seed
}

// linearDict is up to how many entries a dictionary is searched one by one.
const linearDict = 8

// add is for a column that has begun, or a text that is not empty.
func (c *strColumn) add(row int, s string) (size int) {
	if len(c.dict) == 0 {
		if s == "" {
			return 0
		}
		// The rows so far were empty.
		if row > 0 {
			size += c.enter("", 0)
			for range row {
				c.index = append(c.index, 0)
			}
		}
	} else if c.dict[c.last] == s {
		c.index = append(c.index, c.last)
		return c.indexWidth()
	}
	before := c.indexWidth()
	id, hash, known := c.find(s)
	if !known {
		id = uint16(len(c.dict))
		size += c.enter(s, hash)
	}
	w := c.indexWidth()
	size += len(c.index)*(w-before) + w
	c.index = append(c.index, id)
	c.last = id
	return size
}

func (c *strColumn) begun() bool { return len(c.dict) > 0 }

func (c *strColumn) indexWidth() int {
	switch n := len(c.dict); {
	case n <= 1:
		return 0
	case n <= 256:
		return 1
	}
	return 2
}

// find looks for a text; hash is for enter.
func (c *strColumn) find(s string) (id uint16, hash uint64, known bool) {
	if len(c.dict) < linearDict {
		for i, d := range c.dict {
			if d == s {
				return uint16(i), 0, true
			}
		}
		return 0, 0, false
	}
	if !c.hashed {
		// The table of the frame before is about as long as is needed.
		c.build(max(64, len(c.table)))
	}
	hash = maphash.String(c.seed, s)
	mask := len(c.table) - 1
	for i := int(hash) & mask; c.table[i] != 0; i = (i + 1) & mask {
		if c.dict[c.table[i]-1] == s {
			return c.table[i] - 1, hash, true
		}
	}
	return 0, hash, false
}

// enter appends an entry that find has not found and returns its size.
func (c *strColumn) enter(s string, hash uint64) int {
	c.dict = append(c.dict, s)
	if c.hashed {
		if 2*len(c.dict) > len(c.table) {
			c.build(2 * len(c.table))
		} else {
			c.place(len(c.dict)-1, hash)
		}
	}
	n := uvarintLen(uint64(len(s))) + len(s)
	c.bytes += n
	return n
}

func (c *strColumn) build(size int) {
	if len(c.table) == 0 {
		// Dictionaries come from outside: a fixed hash would let somebody
		// choose entries that collide.
		c.seed = maphash.MakeSeed()
	}
	if len(c.table) < size {
		c.table = make([]uint16, size)
	} else {
		clear(c.table)
	}
	c.hashed = true
	for i, d := range c.dict {
		c.place(i, maphash.String(c.seed, d))
	}
}

func (c *strColumn) place(id int, hash uint64) {
	mask := len(c.table) - 1
	i := int(hash) & mask
	for c.table[i] != 0 {
		i = (i + 1) & mask
	}
	c.table[i] = uint16(id + 1)
}

func (c *strColumn) reset() {
	clear(c.dict) // the calls' strings are not kept alive
	c.dict, c.index, c.hashed, c.last, c.bytes = c.dict[:0], c.index[:0], false, 0, 0
}

func (c *strColumn) appendBlock(out []byte, id uint64) []byte {
	n, m := len(c.index), len(c.dict)
	switch {
	case m == 0:
		return out
	case m == 1:
		out = appendBlockHeader(out, id, encStrConst, c.bytes)
		return appendString(out, c.dict[0])
	case m == n:
		// All different, in the order of the rows: the index would say nothing.
		out = appendBlockHeader(out, id, encStrPlain, c.bytes)
		for _, s := range c.dict {
			out = appendString(out, s)
		}
		return out
	}
	w := c.indexWidth()
	out = appendBlockHeader(out, id, encStrDict, uvarintLen(uint64(m))+c.bytes+1+n*w)
	out = binary.AppendUvarint(out, uint64(m))
	for _, s := range c.dict {
		out = appendString(out, s)
	}
	out = append(out, byte(w))
	at := len(out)
	out = slices.Grow(out, n*w)[:at+n*w]
	p := out[at:]
	if w == 1 {
		for i, id := range c.index {
			p[i] = byte(id)
		}
		return out
	}
	for i, id := range c.index {
		binary.LittleEndian.PutUint16(p[i*2:], id)
	}
	return out
}

type fixedColumn struct {
	count   int
	bytes   []byte
	present presence
}

func (c *fixedColumn) add(row int, v []byte) int {
	if c.present.sparse || c.count != row {
		if !c.present.sparse {
			c.present.skip(c.count)
		}
		c.present.set(row)
	}
	c.count++
	c.bytes = append(c.bytes, v...)
	return len(v)
}

func (c *fixedColumn) reset() { c.count, c.bytes, c.present.sparse = 0, c.bytes[:0], false }

func (c *fixedColumn) appendBlock(out []byte, id uint64, n int) []byte {
	if c.count == 0 {
		return out
	}
	if c.count == n {
		out = appendBlockHeader(out, id, encFixed, len(c.bytes))
		return append(out, c.bytes...)
	}
	if !c.present.sparse {
		c.present.skip(c.count)
	}
	out = appendBlockHeader(out, id, encFixed|encNullable, (n+7)/8+len(c.bytes))
	out = c.present.append(out, n)
	return append(out, c.bytes...)
}
