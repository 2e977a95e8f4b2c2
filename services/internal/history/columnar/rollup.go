package columnar

import (
	"math"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const hourMicros = usage.Micros(time.Hour / time.Microsecond)

// rollup sums a block's rows by what its table is sorted by. Only the hourly
// one is by account.
type rollup struct {
	width usage.Micros
	index map[rollupKey]int
	sums  []rollupSum

	// Rows of one account, hour, model and code often follow each other.
	lastKey rollupKey
	lastSum int
}

type rollupKey struct {
	bucket               usage.Micros
	account, model, code uint32 // positions in the block's columns
}

type rollupSum struct {
	key               rollupKey
	attempts, refused uint64
	duration          uint64
	meters            [usage.NumBuiltIn]int64
	known             [usage.NumBuiltIn]uint64 // admitted calls that reported the meter
	custom            []usage.Quantity
	last              uint64
}

func newRollup(width usage.Micros) *rollup {
	return &rollup{width: width, index: map[rollupKey]int{}, lastSum: -1}
}

func (r *rollup) byAccount() bool { return r.width == hourMicros }

func (r *rollup) reset() {
	clear(r.index)
	r.sums, r.lastSum = r.sums[:0], -1
}

// add sums the block's rows from at on. A sum that would leave the range of 64
// bits stays at its end.
func (r *rollup) add(b *Block, at int, custom []ledger.CustomMeter, keep []uint32) {
	byAccount := r.byAccount()
	ledgerTime := b.until
	codes, models, accounts := b.code.keys, b.model.keys, b.account.keys
	for i := at; i < b.rows; i++ {
		counted := min(usage.Micros(b.time.ColInt64[i]), ledgerTime)
		key := rollupKey{bucket: counted - counted%r.width, model: models[i], code: codes[i]}
		if byAccount {
			key.account = accounts[i]
		}
		k := r.lastSum
		if k < 0 || key != r.lastKey {
			var ok bool
			if k, ok = r.index[key]; !ok {
				k = len(r.sums)
				r.index[key] = k
				r.sums = append(r.sums, rollupSum{key: key})
			}
			r.lastKey, r.lastSum = key, k
		}
		s := &r.sums[k]
		s.attempts++
		s.last = b.sequence[i]
		s.duration += uint64(b.duration.ColInt64[i])
		if key.code != 0 {
			s.refused++
			continue
		}
		known := b.known[i]
		if known&(1<<usage.CallsIndex) == 0 {
			s.meters[usage.CallsIndex] = addSaturated(s.meters[usage.CallsIndex], 1)
		}
		for m := range s.meters {
			if known&(1<<m) != 0 {
				s.meters[m] = addSaturated(s.meters[m], b.meters[m].ColInt64[i])
				s.known[m]++
			}
		}
		if len(custom) == 0 {
			continue
		}
		row := i - at
		if keep != nil {
			row = int(keep[row])
		}
		for c := range custom {
			if v, ok := custom[c].Get(row); ok {
				s.addCustom(custom[c].Meter, v)
			}
		}
	}
}

func (s *rollupSum) addCustom(m usage.Meter, v int64) {
	for i := range s.custom {
		if s.custom[i].Meter == m {
			s.custom[i].Value = addSaturated(s.custom[i].Value, v)
			return
		}
	}
	s.custom = append(s.custom, usage.Quantity{Meter: m, Value: v})
}

// addSaturated adds two numbers that are not negative.
func addSaturated(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// input names the rollup's columns, sorted, so that equal sums give equal bytes
// however the rows lay in their frames.
func (r *rollup) input(b *Block) proto.Input {
	slices.SortFunc(r.sums, func(x, y rollupSum) int {
		if c := strings.Compare(string(b.account.value(x.key.account)), string(b.account.value(y.key.account))); c != 0 {
			return c
		}
		if x.key.bucket != y.key.bucket {
			return int((x.key.bucket - y.key.bucket) / r.width)
		}
		if c := strings.Compare(string(b.model.value(x.key.model)), string(b.model.value(y.key.model))); c != 0 {
			return c
		}
		return strings.Compare(string(b.code.value(x.key.code)), string(b.code.value(y.key.code)))
	})
	// Sorting has moved the sums away from where the index says they are.
	clear(r.index)
	r.lastSum = -1

	var (
		month, bucket               = make(proto.ColUInt32, 0, len(r.sums)), proto.ColDateTime{}
		attempts, refused, duration proto.ColUInt64
		last                        proto.ColUInt64
		meters                      [usage.NumBuiltIn]proto.ColInt64
		known                       [usage.NumBuiltIn]proto.ColUInt64
		account, model, code        words
		customEnds                  proto.ColUInt64
		customNames                 texts
		customValues                proto.ColInt64
	)
	for i := range r.sums {
		s := &r.sums[i]
		month = append(month, Month(b.until))
		bucket.Data = append(bucket.Data, proto.DateTime(int64(s.key.bucket)/1_000_000))
		account.appendKey(account.id(b.account.value(s.key.account)))
		model.appendKey(model.id(b.model.value(s.key.model)))
		code.appendKey(code.id(b.code.value(s.key.code)))
		attempts, refused, duration = append(attempts, s.attempts), append(refused, s.refused), append(duration, s.duration)
		last = append(last, s.last)
		for m := range meters {
			meters[m] = append(meters[m], s.meters[m])
			known[m] = append(known[m], s.known[m])
		}
		slices.SortFunc(s.custom, func(x, y usage.Quantity) int { return strings.Compare(string(x.Meter), string(y.Meter)) })
		for _, q := range s.custom {
			customNames.append([]byte(q.Meter))
			customValues = append(customValues, q.Value)
		}
		customEnds = append(customEnds, uint64(len(customValues)))
	}
	in := proto.Input{{Name: "month", Data: month}}
	if r.byAccount() {
		in = append(in, proto.InputColumn{Name: "hour", Data: &bucket}, proto.InputColumn{Name: "account", Data: text{&account}})
	} else {
		in = append(in, proto.InputColumn{Name: "minute", Data: &bucket})
	}
	in = append(in,
		proto.InputColumn{Name: "model", Data: low{&model}},
		proto.InputColumn{Name: "code", Data: low{&code}},
		proto.InputColumn{Name: "attempts", Data: attempts},
		proto.InputColumn{Name: "refused", Data: refused},
		proto.InputColumn{Name: "duration_micros", Data: duration},
	)
	for m, name := range usage.BuiltInMeters() {
		in = append(in, proto.InputColumn{Name: string(name), Data: meters[m]})
		if m != int(usage.CallsIndex) { // an admitted call is one, unless it says else
			in = append(in, proto.InputColumn{Name: "known_" + string(name), Data: known[m]})
		}
	}
	return append(in,
		proto.InputColumn{Name: "custom", Data: sums{customEnds, &customNames, customValues}},
		proto.InputColumn{Name: "last_sequence", Data: last},
	)
}

// sums is a Map(String, Int64) column.
type sums struct {
	ends   proto.ColUInt64
	names  *texts
	values proto.ColInt64
}

func (sums) Type() proto.ColumnType {
	return proto.ColumnTypeMap.Sub(proto.ColumnTypeString, proto.ColumnTypeInt64)
}
func (s sums) Rows() int                   { return len(s.ends) }
func (s sums) WriteColumn(w *proto.Writer) { w.ChainBuffer(s.EncodeColumn) }
func (s sums) EncodeColumn(b *proto.Buffer) {
	s.ends.EncodeColumn(b)
	s.names.EncodeColumn(b)
	s.values.EncodeColumn(b)
}

// Month returns the month of a time as the server's toYYYYMM has it, in UTC:
// 202511.
func Month(t usage.Micros) uint32 {
	at := t.Time()
	return uint32(at.Year())*100 + uint32(at.Month())
}
