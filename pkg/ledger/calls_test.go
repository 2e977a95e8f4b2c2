package ledger

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/segmentio/ksuid"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// sameCalls fails unless both lists hold the same calls. A list that is empty
// and one that is nil are the same; so are quantities with the same readings.
func sameCalls(t interface {
	Helper()
	Fatalf(string, ...any)
}, got, want []usage.Call) {
	t.Helper()
	if reflect.DeepEqual(got, want) { // much faster than cmp
		return
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(usage.Quantities{})); d != "" {
		t.Fatalf("the calls differ (-want +got):\n%s", d)
	}
}

func rows(f *Frame) []usage.Call {
	calls := make([]usage.Call, f.N)
	for i := range calls {
		calls[i] = f.Call(i)
	}
	return calls
}

func seal(h Header, calls []usage.Call) []byte {
	var b Builder
	for i := range calls {
		b.Add(&calls[i])
	}
	return b.Seal(h)
}

// texts draws strings that make all three string encodings likely: one value,
// few, and all different ones.
func texts(t *rapid.T, label string, n int, mayBeEmpty bool) []string {
	out := make([]string, n)
	few := rapid.SliceOfN(anyText(mayBeEmpty), 1, 4).Draw(t, label+" values")
	switch kind := rapid.SampledFrom([]string{"absent", "same", "few", "different", "many"}).Draw(t, label); {
	case kind == "absent" && mayBeEmpty:
	case kind == "same":
		for i := range out {
			out[i] = few[0]
		}
	case kind == "different":
		for i := range out {
			out[i] = fmt.Sprintf("%s-%d", label, i)
		}
	case kind == "many":
		for i := range out {
			out[i] = fmt.Sprintf("%d", rapid.IntRange(0, 2*n).Draw(t, label))
		}
	default:
		for i := range out {
			out[i] = rapid.SampledFrom(few).Draw(t, label)
		}
	}
	return out
}

func anyText(mayBeEmpty bool) *rapid.Generator[string] {
	least := 1
	if mayBeEmpty {
		least = 0
	}
	short := rapid.StringOfN(rapid.RuneFrom([]rune("abzé語-_.:/ \n\"\\")), least, 20, usage.MaxIDBytes)
	long := rapid.Just(strings.Repeat("x", usage.MaxIDBytes))
	return rapid.OneOf(short, short, short, long)
}

func quantity() *rapid.Generator[int64] {
	return rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, 100_000), rapid.Int64Range(0, usage.MaxQuantity), rapid.Just(usage.MaxQuantity))
}

// ints draws a column of numbers: all 0, constant, or any.
func ints(t *rapid.T, label string, n int, g *rapid.Generator[int64]) []int64 {
	out := make([]int64, n)
	switch rapid.SampledFrom([]string{"zero", "same", "some", "any"}).Draw(t, label) {
	case "same":
		v := g.Draw(t, label)
		for i := range out {
			out[i] = v
		}
	case "some":
		out[rapid.IntRange(0, n-1).Draw(t, label)] = g.Draw(t, label)
	case "any":
		for i := range out {
			out[i] = g.Draw(t, label)
		}
	}
	return out
}

// presence draws which rows have a value: none, all, the first, the last, any.
func presentRows(t *rapid.T, label string, n int) []bool {
	out := make([]bool, n)
	switch rapid.SampledFrom([]string{"none", "all", "head", "tail", "any"}).Draw(t, label+" known") {
	case "all":
		for i := range out {
			out[i] = true
		}
	case "head":
		for i := range rapid.IntRange(0, n).Draw(t, label) {
			out[i] = true
		}
	case "tail":
		for i := rapid.IntRange(0, n).Draw(t, label); i < n; i++ {
			out[i] = true
		}
	case "any":
		for i := range out {
			out[i] = rapid.Bool().Draw(t, label)
		}
	}
	return out
}

// anyCalls draws calls that usage.Call.Validate accepts.
func anyCalls(t *rapid.T, most int) []usage.Call {
	n := rapid.IntRange(1, most).Draw(t, "calls")
	calls := make([]usage.Call, n)
	set := func(label string, mayBeEmpty bool, put func(c *usage.Call, s string)) {
		for i, s := range texts(t, label, n, mayBeEmpty) {
			put(&calls[i], s)
		}
	}
	set("account", false, func(c *usage.Call, s string) { c.Account = s })
	set("key", true, func(c *usage.Call, s string) { c.KeyID = s })
	set("request", true, func(c *usage.Call, s string) { c.RequestID = s })
	set("method", true, func(c *usage.Call, s string) { c.Method = s })
	set("route", true, func(c *usage.Call, s string) { c.Route = s })
	set("model", true, func(c *usage.Call, s string) { c.Model = s })
	set("region", true, func(c *usage.Call, s string) { c.Region = s })
	set("code", true, func(c *usage.Call, s string) { c.Code = usage.Code(s) })
	set("decision", true, func(c *usage.Call, s string) { c.DecisionID = s })
	set("source", true, func(c *usage.Call, s string) { c.Source = s })
	set("event", true, func(c *usage.Call, s string) { c.EventID = s })
	set("price", true, func(c *usage.Call, s string) { c.PriceVersion = s })
	for i := range calls {
		calls[i].Currency = rapid.SampledFrom([]string{"", "USD", "EUR"}).Draw(t, "currency")
	}
	number := func(label string, g *rapid.Generator[int64], put func(c *usage.Call, v int64)) {
		for i, v := range ints(t, label, n, g) {
			put(&calls[i], v)
		}
	}
	at := rapid.OneOf(
		rapid.Just(int64(usage.OldestTimeMicros)), rapid.Just(int64(usage.NewestTimeMicros)),
		rapid.Int64Range(1_700_000_000_000_000, 1_700_000_000_100_000),
		rapid.Int64Range(int64(usage.OldestTimeMicros), int64(usage.NewestTimeMicros)))
	for i := range calls {
		calls[i].Time = usage.Micros(at.Draw(t, "time"))
	}
	number("status", rapid.Int64Range(0, usage.MaxStatus), func(c *usage.Call, v int64) { c.Status = uint16(v) })
	number("duration", quantity(), func(c *usage.Call, v int64) { c.Duration = v })
	number("flags", rapid.Int64Range(0, math.MaxUint32), func(c *usage.Call, v int64) { c.Flags = usage.Flags(v) })
	number("ending", rapid.Int64Range(0, int64(usage.NewestEnding)), func(c *usage.Call, v int64) { c.Ending = usage.Ending(v) })
	number("trace flags", rapid.Int64Range(0, 255), func(c *usage.Call, v int64) { c.TraceFlags = byte(v) })
	for i, known := range presentRows(t, "trace", n) {
		if known {
			calls[i].TraceID[i%16], calls[i].TraceID[15] = byte(i), 1
		}
	}
	for i, known := range presentRows(t, "span", n) {
		if known {
			calls[i].SpanID[i%8], calls[i].SpanID[7] = byte(i), 1
		}
	}
	meters := usage.BuiltInMeters()
	names := append([]usage.Meter{}, meters[:]...)
	for i := range rapid.SampledFrom([]int{0, 1, 2, usage.MaxCustomMeters}).Draw(t, "own meters") {
		names = append(names, usage.Meter(fmt.Sprintf("own.%c", 'p'-i)))
	}
	for _, m := range names {
		known := presentRows(t, string(m), n)
		for i, v := range ints(t, string(m), n, quantity()) {
			if known[i] {
				calls[i].Quantities.Set(m, v)
			}
		}
	}
	for i := range calls {
		if calls[i].EventID == "" {
			calls[i].Source = ""
		}
		if calls[i].ReportsCost() && calls[i].Currency == "" {
			calls[i].Currency = "JPY"
		}
		if err := calls[i].Validate(calls[i].Time); err != nil {
			t.Fatalf("the generator made an invalid call: %v", err)
		}
	}
	return calls
}

func anyHeader(t *rapid.T) Header {
	h := Header{
		Shard:    uint32(rapid.IntRange(0, MaxShards-1).Draw(t, "shard")),
		Number:   rapid.Uint64Min(1).Draw(t, "number"),
		Gateway:  anyText(true).Draw(t, "gateway"),
		SealedAt: usage.Micros(rapid.SampledFrom([]int64{0, int64(usage.OldestTimeMicros), 1_700_000_000_000_000, int64(usage.NewestTimeMicros)}).Draw(t, "sealed at")),
	}
	copy(h.Producer[:], rapid.SliceOfN(rapid.ByteMin(1), 20, 20).Draw(t, "producer"))
	return h
}

// exampleCalls are n calls as a gateway of an LLM API records them.
func exampleCalls(t testing.TB, n int) []usage.Call {
	t.Helper()
	calls := make([]usage.Call, n)
	for i := range calls {
		c := &calls[i]
		c.Time = 1_700_000_000_000_000 + usage.Micros(i*137)
		c.Account, c.KeyID = fmt.Sprintf("acct-%d", i%7), fmt.Sprintf("key-%d", i%11)
		c.RequestID = fmt.Sprintf("req-%06d", i)
		c.Method, c.Route, c.Model, c.Status = "POST", "/v1/chat/completions", "small", 200
		c.Duration = int64(1000 + i)
		c.Quantities.Set(usage.InputTokens, int64(100+i))
		if i%3 == 0 {
			c.Quantities.Set(usage.CachedInputTokens, 64)
			c.Quantities.Set("pages", int64(i))
		}
		if i%5 == 0 {
			c.Status, c.Code, c.DecisionID = 402, usage.QuotaExceeded, "d-1"
			c.TraceID[0], c.SpanID[0] = byte(i+1), byte(i+1)
		}
	}
	return calls
}

func exampleHeader() Header {
	return Header{Producer: ksuid.Max, Shard: 3, Number: 9, Gateway: "gw-1", SealedAt: 1_700_000_001_000_000}
}
