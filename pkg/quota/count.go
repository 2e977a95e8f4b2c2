package quota

import (
	"math"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// counter is one account's use of one limit.
type counter struct {
	cur, prev int64  // use in window number, and in the one before
	revision  uint64 // of the last decision; 0: none
	number    int32
	published int32  // window of the last decision
	decidedAt uint32 // stream time of the last decision, seconds
	verdict   uint8  // of the last decision; 0 is Allow
	flags     counterFlags
}

type counterFlags uint8

const (
	isTouched counterFlags = 1 << iota
	isForced               // a decision is due although the verdict may be the same
	isRoomy                // the last decision denies and says that there is room
)

// roll makes number the counter's current window.
func (c *counter) roll(number int32) {
	if c.number == number {
		return
	}
	if c.number == number-1 {
		c.prev = c.cur
	} else {
		c.prev = 0
	}
	c.cur, c.number = 0, number
}

// frame is the scratch memory of counting one batch.
type frame struct {
	b    *Batch
	now  int64 // stream time of the entry: no call counts later
	from int64 // the earliest event time
	zero []uint32
	// Rows to leave out or to refuse; nil: every row is admitted.
	rows  []rowKind
	marks []rowKind
	// hash of the frame, of which those of its rows are made. Without a producer
	// they are their events': events has them, by row.
	hash      uint64
	events    []uint64
	eventsBuf []uint64
	producers [16]producerHash // a few of those that came last

	// By entry of the account dictionary:
	accounts          []uint32
	admitted, refused []int64
	hashes            []uint64 // sums of what was counted
	calls             []int64  // use of the meter calls
	callsBuf          []int64
	cols              []column  // meters that the batch reports
	colOf             []int32   // by meter: position in cols, or -1
	sums              [][]int64 // by column, then entry
	reported          [][]bool
	start             []uint32 // rows of entry d are order[start[d]:start[d+1]]
	order             []uint32
	ordered           bool
	late              []bool // by row
	under             []int8 // by entry: 0 unknown, 1 in the subtree, -1 not
	rowsBelow         []uint32
}

type rowKind uint8

const (
	admittedRow rowKind = iota
	refusedRow
	repeatedRow
)

// producerHash spares hashing a producer's name for each of its frames. It is
// not part of the state.
type producerHash struct {
	producer dedup.Producer
	hash     uint64
}

// identify finds the hash that those of the batch's rows are made of.
func (s *Shard) identify() {
	f, b := &s.f, s.f.b
	f.hash, f.events = 0, nil
	if b.Producer == (dedup.Producer{}) {
		f.eventsBuf = resized(f.eventsBuf, b.N)
		f.events = f.eventsBuf
		for i := range f.events {
			f.events[i] = audit.RowHash(0, i) // unless it is an event of a source
		}
		return
	}
	p := &f.producers[b.Producer[len(b.Producer)-1]%16]
	if p.producer != b.Producer {
		*p = producerHash{b.Producer, audit.ProducerHash(ksuid.KSUID(b.Producer).String())}
	}
	f.hash = audit.FrameHash(p.hash, s.shard, b.Number)
}

type column struct {
	meter uint32
	*Ints
}

func (f *frame) index() []uint32 {
	if f.b.Account.Index != nil {
		return f.b.Account.Index
	}
	return f.zero[:f.b.N]
}

func resized[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n, max(n, 1024))
	}
	s = s[:n]
	clear(s)
	return s
}

// count adds a batch to the counters of every account on its calls' paths.
func (s *Shard) count(b *Batch, at usage.Micros) {
	f := &s.f
	f.b, f.now, f.ordered = b, int64(at), false
	if f.zero == nil {
		f.zero = make([]uint32, MaxRows)
	}
	s.times()
	s.identify()
	s.sortRows()
	s.sum()
	for d := range b.Account.Dict {
		if f.admitted[d]|f.refused[d] != 0 {
			s.countEntry(d)
		}
	}
	for _, late := range f.late {
		if late {
			s.effects.Late++
		}
	}
}

// times finds the earliest event and the ones that are ahead of the stream.
func (s *Shard) times() {
	f := &s.f
	from := int64(math.MaxInt64)
	future := 0
	for _, t := range f.b.Time {
		from = min(from, t)
		if t > f.now {
			future++
		}
	}
	// A frame of the future only is counted at the entry's time.
	f.from = min(from, f.now)
	s.effects.Future = future
	f.late = f.late[:0]
}

// sortRows marks refused calls and foreign events that were seen before.
func (s *Shard) sortRows() {
	f, b := &s.f, s.f.b
	f.rows = nil
	if len(b.Code.Dict) > 0 {
		f.marks = resized(f.marks, b.N)
		f.rows = f.marks
		for i := range f.rows {
			if len(b.Code.At(i)) > 0 {
				f.rows[i] = refusedRow
			}
		}
	}
	if len(b.Source.Dict) == 0 {
		return
	}
	if f.rows == nil {
		f.marks = resized(f.marks, b.N)
		f.rows = f.marks
	}
	for i := range b.N {
		// A row with a source is a foreign event, whoever brought it.
		source := b.Source.At(i)
		if len(source) == 0 {
			continue
		}
		event := dedup.ForeignID(b.Account.At(i), source, b.EventID.At(i))
		if f.events != nil {
			f.events[i] = audit.ForeignIDHash(event)
		}
		if !s.dedup.Foreign(event, s.now) {
			f.rows[i] = repeatedRow
			s.effects.Duplicates++
		}
	}
}

// sum adds up, for each entry of the account dictionary, its calls and meters.
func (s *Shard) sum() {
	f, b := &s.f, s.f.b
	entries := len(b.Account.Dict)
	f.admitted, f.refused = resized(f.admitted, entries), resized(f.refused, entries)
	f.accounts, f.hashes = resized(f.accounts, entries), resized(f.hashes, entries)
	index := f.index()
	if f.rows == nil && f.events == nil {
		for i, d := range index {
			f.admitted[d]++
			f.hashes[d] += audit.RowHash(f.hash, i)
		}
	} else {
		for i, d := range index {
			switch {
			case f.rows == nil || f.rows[i] == admittedRow:
				f.admitted[d]++
			case f.rows[i] == refusedRow:
				f.refused[d]++
			default:
				continue
			}
			if f.events != nil {
				f.hashes[d] += f.events[i]
			} else {
				f.hashes[d] += audit.RowHash(f.hash, i)
			}
		}
	}
	admitted, refused := int64(0), int64(0)
	for d := range f.admitted {
		admitted += f.admitted[d]
		refused += f.refused[d]
	}
	s.effects.Admitted, s.effects.Refused = int(admitted), int(refused)

	f.cols = f.cols[:0]
	for m := range b.BuiltIns {
		if b.BuiltIns[m].Values != nil {
			f.cols = append(f.cols, column{uint32(m), &b.BuiltIns[m]})
		}
	}
	for i := range b.Custom {
		c := &b.Custom[i]
		if _, known := s.meterIDs[c.Meter]; !known && len(s.meters) >= MaxMeters {
			for row := range b.N {
				if _, reported := c.get(row); reported && (f.rows == nil || f.rows[row] == admittedRow) {
					s.effects.Unmetered++
				}
			}
			continue
		}
		f.cols = append(f.cols, column{s.meter(c.Meter), &c.Ints})
	}
	for len(f.colOf) < len(s.meters) {
		f.colOf = append(f.colOf, -1)
	}
	for len(f.sums) < len(f.cols) {
		f.sums = append(f.sums, nil)
		f.reported = append(f.reported, nil)
	}
	for c := range f.cols {
		f.sums[c], f.reported[c] = resized(f.sums[c], entries), resized(f.reported[c], entries)
		s.sumColumn(c, index)
		f.colOf[f.cols[c].meter] = int32(c)
	}
	f.calls = f.admitted
	if c := f.colOf[usage.CallsIndex]; c >= 0 {
		// A call that does not say how many it stands for is one.
		f.callsBuf = resized(f.callsBuf, entries)
		f.calls = f.callsBuf
		for i, d := range index {
			if f.rows == nil || f.rows[i] == admittedRow {
				v, ok := f.cols[c].get(i)
				if !ok {
					v = 1
				}
				f.calls[d] = s.add(f.calls[d], v)
			}
		}
	}
}

// noCarry is the size below which MaxRows values can be added unchecked.
const noCarry = math.MaxInt64 / MaxRows

func (s *Shard) sumColumn(c int, index []uint32) {
	f := &s.f
	col, sums, reported := f.cols[c], f.sums[c], f.reported[c]
	if f.rows == nil && col.Known == nil {
		all := int64(0)
		for i, d := range index {
			v := col.Values[i]
			all |= v
			sums[d] += v
			reported[d] = true
		}
		if all >= 0 && all <= noCarry {
			return
		}
		clear(sums)
	}
	for i, d := range index {
		if f.rows != nil && f.rows[i] != admittedRow {
			continue
		}
		if v, ok := col.get(i); ok {
			sums[d] = s.add(sums[d], v)
			reported[d] = true
		}
	}
}

// add adds two quantities; a sum that would leave the range stays at its end
// and is told.
func (s *Shard) add(a, b int64) int64 {
	sum := a + b
	if sum < a || b < 0 {
		s.effects.Overflows++
		if b < 0 {
			return a
		}
		return math.MaxInt64
	}
	return sum
}

// countEntry adds what an entry of the account dictionary used to the accounts
// of its path.
func (s *Shard) countEntry(d int) {
	f := &s.f
	admitted, refused := f.admitted[d], f.refused[d]
	leaf := s.payer(f.b.Account.Dict[d], admitted+refused)
	f.accounts[d] = leaf
	a := &s.accounts[leaf]
	if a.flags&dirty == 0 {
		s.soil(leaf)
	}
	a.admitted, a.refused = s.add(a.admitted, admitted), s.add(a.refused, refused)
	a.hash += f.hashes[d]
	s.calls += f.hashes[d]
	if len(f.cols) > 0 {
		a.sums = s.addSums(a.sums, d)
		s.total.sums = s.addSums(s.total.sums, d)
	}
	s.total.admitted, s.total.refused = s.add(s.total.admitted, admitted), s.add(s.total.refused, refused)
	for p := int32(leaf); ; {
		if admitted > 0 {
			if s.plans.defs[a.plan].n > 0 {
				s.countLimits(uint32(p), a, d)
			}
			if a.flags&retires != 0 {
				s.countRetired(uint32(p), d)
			}
		}
		if p = a.parent; p < 0 {
			return
		}
		a = &s.accounts[p]
		if a.flags&dirty == 0 {
			s.soil(uint32(p))
		}
		r := &s.rollups[a.rollup]
		r.admitted, r.refused = s.add(r.admitted, admitted), s.add(r.refused, refused)
		if len(f.cols) > 0 {
			r.sums = s.addSums(r.sums, d)
		}
	}
}

func (s *Shard) addSums(at uint32, d int) uint32 {
	f := &s.f
	for c := range f.cols {
		if !f.reported[c][d] {
			continue
		}
		if at == 0 {
			at = uint32(len(s.sums))
			s.sums = append(s.sums, sums{})
		}
		to := &s.sums[at]
		m := f.cols[c].meter
		if m < usage.NumBuiltIn {
			to.known |= 1 << m
			to.values[m] = s.add(to.values[m], f.sums[c][d])
			continue
		}
		if to.custom == 0 {
			to.custom = uint32(len(s.customs))
			s.customs = append(s.customs, nil)
		}
		list := &s.customs[to.custom]
		k := 0
		for k < len(*list) && (*list)[k].meter != m {
			k++
		}
		if k == len(*list) {
			*list = append(*list, customSum{meter: m})
		}
		(*list)[k].value = s.add((*list)[k].value, f.sums[c][d])
	}
	return at
}

func (s *Shard) countLimits(p uint32, a *account, d int) {
	f := &s.f
	def := s.plans.defs[a.plan]
	limits := s.plans.limits[def.first : def.first+def.n]
	counters := s.counters[a.first : a.first+def.n]
	for k := range counters {
		c, l := &counters[k], &limits[k]
		w := &s.windows[l.kind]
		c.roll(w.number)
		used := int64(0)
		switch {
		case !l.plain || f.from < int64(w.at):
			var before int64
			used, before = s.usedBy(d, l, w)
			c.prev = s.add(c.prev, before)
		case l.meter == uint32(usage.CallsIndex):
			used = f.calls[d]
		default:
			if col := f.colOf[l.meter]; col >= 0 {
				used = f.sums[col][d]
			}
		}
		c.cur = s.add(c.cur, used)
		if l.leased && used > 0 {
			s.countLeased(p, uint32(k), d, used)
		}
		if c.cur >= l.next[c.verdict] && c.flags&isTouched == 0 {
			s.touch(p, uint32(k), false)
		}
	}
}

// usedBy returns what the rows of a dictionary entry use of a limit in the
// current window and in the one before.
func (s *Shard) usedBy(d int, l *limit, w *span) (used, before int64) {
	f := &s.f
	for _, i := range f.rowsOf(d) {
		v, ok := s.uses(int(i), l)
		if !ok {
			continue
		}
		switch t := min(f.b.Time[i], f.now); {
		case t >= int64(w.at):
			used = s.add(used, v)
		case t >= int64(w.before):
			before = s.add(before, v)
		default:
			if len(f.late) == 0 {
				f.late = resized(f.late, f.b.N)
			}
			f.late[i] = true
		}
	}
	return used, before
}

// uses returns what row i uses of a limit, false when the limit does not mean
// it or the quantity is unknown.
func (s *Shard) uses(i int, l *limit) (int64, bool) {
	f, b := &s.f, s.f.b
	if f.rows != nil && f.rows[i] != admittedRow {
		return 0, false
	}
	if !l.plain && !(oneOf(l.Filter.Models, b.Model.At(i)) && oneOf(l.Filter.Routes, b.Route.At(i)) && oneOf(l.Filter.Methods, b.Method.At(i))) {
		return 0, false
	}
	if c := f.colOf[l.meter]; c >= 0 {
		if v, ok := f.cols[c].get(i); ok {
			return max(v, 0), true
		}
	}
	if l.meter == uint32(usage.CallsIndex) {
		return 1, true
	}
	return 0, false
}

func oneOf(list []string, v []byte) bool {
	if len(list) == 0 {
		return true
	}
	for _, l := range list {
		if l == string(v) {
			return true
		}
	}
	return false
}

// rowsOf returns the rows of an entry of the account dictionary, in order.
func (f *frame) rowsOf(d int) []uint32 {
	if !f.ordered {
		index := f.index()
		entries := len(f.b.Account.Dict)
		f.start = resized(f.start, entries+1)
		f.order = resized(f.order, f.b.N)
		for _, d := range index {
			f.start[d+1]++
		}
		for d := range entries {
			f.start[d+1] += f.start[d]
		}
		// start[d] moves to the end of d while its rows are placed, so that
		// afterwards it stands where start[d+1] should.
		for i, d := range index {
			f.order[f.start[d]] = uint32(i)
			f.start[d]++
		}
		copy(f.start[1:], f.start[:entries])
		f.start[0] = 0
		f.ordered = true
	}
	return f.order[f.start[d]:f.start[d+1]]
}

// endFrame forgets the batch.
func (f *frame) endFrame() {
	for c := range f.cols {
		f.colOf[f.cols[c].meter] = -1
		f.cols[c].Ints = nil
	}
	f.b = nil
}
