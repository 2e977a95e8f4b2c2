package columnar

import (
	"encoding/binary"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// words is a text column kept as the ledger's frames bring it: each distinct
// value once and a number for each row. Position 0 is the empty text, so that a
// column that a frame does not have costs nothing to fill.
//
// A frame's own dictionary is translated once a frame, so that a row costs a
// table look-up and not a hash: the general writers of both drivers hash, box
// and compare every value of every row, which took more time than the server.
type words struct {
	ids   map[string]uint32
	dict  [][]byte // values, inside of chunks
	size  int      // bytes of all values
	bytes int      // bytes of all rows
	keys  []uint32

	translate []uint32 // of the frame at hand
	chunk     []byte
}

func (w *words) reset() {
	clear(w.ids)
	w.dict, w.keys = w.dict[:0], w.keys[:0]
	w.chunk = w.chunk[:0]
	w.size, w.bytes = 0, 0
}

// id returns the position of a value, which is copied when it is new.
func (w *words) id(v []byte) uint32 {
	if len(v) == 0 {
		return 0
	}
	if id, ok := w.ids[string(v)]; ok {
		return id
	}
	if w.ids == nil {
		w.ids = make(map[string]uint32)
	}
	if cap(w.chunk)-len(w.chunk) < len(v) {
		w.chunk = make([]byte, 0, max(64<<10, len(v)))
	}
	at := len(w.chunk)
	w.chunk = append(w.chunk, v...)
	id := uint32(len(w.dict)) + 1
	w.dict = append(w.dict, w.chunk[at:len(w.chunk):len(w.chunk)])
	w.ids[string(v)] = id
	w.size += len(v)
	return id
}

func (w *words) value(id uint32) []byte {
	if id == 0 {
		return nil
	}
	return w.dict[id-1]
}

// appendColumn adds the rows of a frame's column that keep names, or all n of
// them when keep is nil.
func (w *words) appendColumn(s *ledger.Strings, n int, keep []uint32) {
	rows := n
	if keep != nil {
		rows = len(keep)
	}
	if s.Index == nil {
		var v []byte
		if len(s.Dict) > 0 {
			v = s.Dict[0]
		}
		w.appendSame(v, rows)
		return
	}
	w.translate = w.translate[:0]
	for _, v := range s.Dict {
		w.translate = append(w.translate, w.id(v))
	}
	at := len(w.keys)
	w.keys = grow(w.keys, rows)
	out := w.keys[at:]
	if keep == nil {
		for i, k := range s.Index[:n] {
			out[i] = w.translate[k]
		}
		for _, k := range s.Index[:n] {
			w.bytes += len(s.Dict[k])
		}
		return
	}
	for i, row := range keep {
		k := s.Index[row]
		out[i] = w.translate[k]
		w.bytes += len(s.Dict[k])
	}
}

func (w *words) appendSame(v []byte, rows int) {
	at := len(w.keys)
	w.keys = grow(w.keys, rows)
	w.bytes += rows * len(v)
	id := w.id(v)
	out := w.keys[at:]
	for i := range out {
		out[i] = id
	}
}

func (w *words) appendKey(id uint32) {
	w.keys = append(w.keys, id)
	w.bytes += len(w.value(id))
}

func grow[T any](s []T, n int) []T {
	if cap(s)-len(s) >= n {
		return s[:len(s)+n]
	}
	out := make([]T, len(s)+n, max(2*cap(s), len(s)+n, 4096))
	copy(out, s)
	return out
}

// text writes words as a String column.
type text struct{ *words }

func (text) Type() proto.ColumnType { return proto.ColumnTypeString }
func (t text) Rows() int            { return len(t.keys) }

func (t text) EncodeColumn(b *proto.Buffer) {
	out := b.Buf
	if need := len(t.keys)*2 + t.bytes; cap(out)-len(out) < need {
		bigger := make([]byte, len(out), len(out)+need)
		copy(bigger, out)
		out = bigger
	}
	for _, k := range t.keys {
		if k == 0 {
			out = append(out, 0)
			continue
		}
		v := t.dict[k-1]
		out = binary.AppendUvarint(out, uint64(len(v)))
		out = append(out, v...)
	}
	b.Buf = out
}

func (t text) WriteColumn(w *proto.Writer) { w.ChainBuffer(t.EncodeColumn) }

// Marks of a LowCardinality column on the wire: the dictionary stands with the
// block, and so do its keys, whose width is the low byte.
const (
	lowVersion   = 1
	lowOwnKeys   = 1<<9 | 1<<10
	lowKeyUInt8  = 0
	lowKeyUInt16 = 1
	lowKeyUInt32 = 2
)

// low writes words as a LowCardinality(String) column.
type low struct{ *words }

func (low) Type() proto.ColumnType        { return proto.ColumnTypeLowCardinality.Sub(proto.ColumnTypeString) }
func (l low) Rows() int                   { return len(l.keys) }
func (low) EncodeState(b *proto.Buffer)   { b.PutInt64(lowVersion) }
func (l low) WriteColumn(w *proto.Writer) { w.ChainBuffer(l.EncodeColumn) }
func (l low) EncodeColumn(b *proto.Buffer) {
	if len(l.keys) == 0 {
		return
	}
	width := int64(lowKeyUInt32)
	switch n := len(l.dict) + 1; {
	case n <= 1<<8:
		width = lowKeyUInt8
	case n <= 1<<16:
		width = lowKeyUInt16
	}
	b.PutInt64(lowOwnKeys | width)
	b.PutInt64(int64(len(l.dict) + 1))
	b.PutString("")
	for _, v := range l.dict {
		b.PutLen(len(v))
		b.PutRaw(v)
	}
	b.PutInt64(int64(len(l.keys)))
	out := b.Buf
	at := len(out)
	switch width {
	case lowKeyUInt8:
		out = grow(out, len(l.keys))
		for i, k := range l.keys {
			out[at+i] = byte(k)
		}
	case lowKeyUInt16:
		out = grow(out, 2*len(l.keys))
		for i, k := range l.keys {
			binary.LittleEndian.PutUint16(out[at+2*i:], uint16(k))
		}
	default:
		out = grow(out, 4*len(l.keys))
		for i, k := range l.keys {
			binary.LittleEndian.PutUint32(out[at+4*i:], k)
		}
	}
	b.Buf = out
}

// texts is a String column of values that hardly repeat: request and event ids.
type texts struct {
	ends []int
	buf  []byte
}

func (t *texts) reset() { t.ends, t.buf = t.ends[:0], t.buf[:0] }

func (t *texts) appendColumn(s *ledger.Strings, n int, keep []uint32) {
	if keep != nil {
		for _, row := range keep {
			t.append(s.At(int(row)))
		}
		return
	}
	if s.Absent() {
		at := len(t.ends)
		t.ends = grow(t.ends, n)
		for i := range t.ends[at:] {
			t.ends[at+i] = len(t.buf)
		}
		return
	}
	for i := range n {
		t.append(s.At(i))
	}
}

func (t *texts) append(v []byte) {
	t.buf = append(t.buf, v...)
	t.ends = append(t.ends, len(t.buf))
}

func (*texts) Type() proto.ColumnType        { return proto.ColumnTypeString }
func (t *texts) Rows() int                   { return len(t.ends) }
func (t *texts) WriteColumn(w *proto.Writer) { w.ChainBuffer(t.EncodeColumn) }
func (t *texts) EncodeColumn(b *proto.Buffer) {
	from := 0
	for _, end := range t.ends {
		b.PutLen(end - from)
		b.Buf = append(b.Buf, t.buf[from:end]...)
		from = end
	}
}

// readings is a Map(LowCardinality(String), Int64) column.
type readings struct {
	ends   []uint64
	meters words
	values proto.ColInt64
}

func (r *readings) reset() {
	r.ends, r.values = r.ends[:0], r.values[:0]
	r.meters.reset()
}

// appendColumns adds the readings of the rows' own meters. Their order in a row
// is that of the frame.
func (r *readings) appendColumns(custom []ledger.CustomMeter, n int, keep []uint32) {
	rows := n
	if keep != nil {
		rows = len(keep)
	}
	if len(custom) == 0 {
		at, end := len(r.ends), uint64(len(r.values))
		r.ends = grow(r.ends, rows)
		out := r.ends[at:]
		for i := range out {
			out[i] = end
		}
		return
	}
	ids := make([]uint32, len(custom))
	for k := range custom {
		ids[k] = r.meters.id([]byte(custom[k].Meter))
	}
	for i := range rows {
		row := i
		if keep != nil {
			row = int(keep[i])
		}
		for k := range custom {
			if v, ok := custom[k].Get(row); ok {
				r.meters.appendKey(ids[k])
				r.values = append(r.values, v)
			}
		}
		r.ends = append(r.ends, uint64(len(r.values)))
	}
}

func (*readings) Type() proto.ColumnType {
	return proto.ColumnTypeMap.Sub(proto.ColumnTypeLowCardinality.Sub(proto.ColumnTypeString), proto.ColumnTypeInt64)
}
func (r *readings) Rows() int                   { return len(r.ends) }
func (*readings) EncodeState(b *proto.Buffer)   { b.PutInt64(lowVersion) }
func (r *readings) WriteColumn(w *proto.Writer) { w.ChainBuffer(r.EncodeColumn) }
func (r *readings) EncodeColumn(b *proto.Buffer) {
	proto.ColUInt64(r.ends).EncodeColumn(b)
	low{&r.meters}.EncodeColumn(b)
	r.values.EncodeColumn(b)
}
