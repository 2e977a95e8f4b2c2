package columnar

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var noon = usage.At(time.Date(2025, 11, 17, 12, 0, 0, 0, time.UTC))

func TestLateAndFutureCallsAreMarked(t *testing.T) {
	t.Parallel()
	at := noon + 90_000_000 // 12:01:30
	minute := func(m, s int64) usage.Micros { return noon + usage.Micros(m*60_000_000+s*1_000_000) }
	calls := []usage.Call{
		{Time: minute(-1, 59), Account: "a"},    // its minute ended 90 s ago
		{Time: minute(0, 0), Account: "a"},      // its minute ended 30 s ago
		{Time: minute(1, 30), Account: "a"},     // now
		{Time: minute(1, 30) + 1, Account: "a"}, // ahead
		{Time: usage.At(time.Date(2198, 1, 1, 0, 0, 0, 0, time.UTC)), Account: "a"},
	}
	var builder ledger.Builder
	for i := range calls {
		builder.Add(&calls[i])
	}
	var f ledger.Frame
	if err := f.Decode(builder.Seal(ledger.Header{Producer: ksuid.New(), Number: 1})); err != nil {
		t.Fatal(err)
	}
	b := NewBlock()
	b.AppendFrame(&f, Entry{Sequence: 1, Time: at}, nil)
	if got := fmt.Sprint(b.late, b.flags); got != "[1 0 0 0 0] [0 0 0 4 4]" {
		t.Errorf("late and flags are %s", got)
	}
	// What is ahead counts for the ledger's own time.
	if len(b.minutely.sums) != 3 {
		t.Errorf("%d minutes, wanted 11:59, 12:00 and 12:01", len(b.minutely.sums))
	}
}

func TestLeftOutRowsLeaveNoTrace(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(5, 6))
	var f ledger.Frame
	kept := NewBlock()
	var rows []usage.Call
	for n := range uint64(40) {
		var builder ledger.Builder
		for range 1 + random.IntN(60) {
			c := usage.Call{Time: noon - usage.Micros(random.IntN(7_200_000_000)), Account: fmt.Sprint("account-", random.IntN(30)), Model: fmt.Sprint("model-", random.IntN(3)), RequestID: fmt.Sprint(random.Uint64())}
			for i := range c.TraceID {
				c.TraceID[i] = byte(random.Uint32())
			}
			if random.IntN(5) == 0 {
				c.Code = usage.QuotaExceeded
			}
			for _, m := range usage.BuiltInMeters() {
				if m != usage.ReasoningTokens && random.IntN(2) == 0 {
					c.Quantities.Set(m, random.Int64N(1000))
				}
			}
			builder.Add(&c)
		}
		if err := f.Decode(builder.Seal(ledger.Header{Producer: ksuid.New(), Number: 1})); err != nil {
			t.Fatal(err)
		}
		var keep []uint32
		for i := range f.N {
			if i%3 != 1 {
				keep = append(keep, uint32(i))
				rows = append(rows, f.Call(i))
			}
		}
		kept.AppendFrame(&f, Entry{Sequence: n + 1, Time: noon}, keep)
	}
	if kept.Rows() != len(rows) {
		t.Fatalf("%d rows, wanted %d", kept.Rows(), len(rows))
	}
	type totals struct {
		refused int64
		meters  [usage.NumBuiltIn]int64
	}
	var want, got totals
	for i := range rows {
		if !rows[i].Admitted() {
			want.refused++
		}
		for k, m := range usage.BuiltInMeters() {
			if v, ok := rows[i].Usage(m); ok {
				want.meters[k] += v
			}
		}
		if got := string(kept.account.value(kept.account.keys[i])); got != rows[i].Account || string(kept.requestID.buf[:kept.requestID.ends[0]]) != rows[0].RequestID || !bytes.Equal(kept.traceID.Buf[i*16:i*16+16], rows[i].TraceID[:]) {
			t.Fatalf("row %d is of %q, wanted %q", i, got, rows[i].Account)
		}
	}
	for _, s := range kept.hourly.sums {
		got.refused += int64(s.refused)
		for i, v := range s.meters {
			got.meters[i] += v
		}
	}
	if got != want {
		t.Errorf("the rollup says %v, wanted %v", got, want)
	}
}

func TestSumsStopAtTheEndOfTheirRange(t *testing.T) {
	t.Parallel()
	var c usage.Call
	c.Time, c.Account = noon, "a"
	c.Quantities.Set(usage.Cost, usage.MaxQuantity)
	calls := make([]usage.Call, 1000)
	for i := range calls {
		calls[i] = c
	}
	var builder ledger.Builder
	b := NewBlock()
	for range 2 {
		for i := range calls {
			builder.Add(&calls[i])
		}
		var f ledger.Frame
		if err := f.Decode(builder.Seal(ledger.Header{Producer: ksuid.New(), Number: 1})); err != nil {
			t.Fatal(err)
		}
		b.AppendFrame(&f, Entry{Sequence: 1, Time: noon}, nil)
	}
	if got := b.hourly.sums[0].meters[usage.CostIndex]; got != math.MaxInt64 {
		t.Errorf("the sum of 2000 times the greatest cost is %d", got)
	}
}
