package ledger

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/encoding/protowire"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger/cloudevent"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestAnyValidCallsComeOutOfAFrameAsTheyWentIn(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		h, calls := anyHeader(t), anyCalls(t, 40)
		var f Frame
		if err := f.Decode(seal(h, calls)); err != nil {
			t.Fatalf("decode: %v", err)
		}
		if f.Header != h {
			t.Fatalf("header %+v, want %+v", f.Header, h)
		}
		sameCalls(t, rows(&f), calls)
		for i := range calls {
			if f.Admitted(i) != calls[i].Admitted() {
				t.Fatalf("row %d: admitted %v", i, f.Admitted(i))
			}
		}
	})
}

// At, Get and Values must agree on rows without a value: a sum over Values
// must not count what nobody reported.
func TestAnUnknownReadingIsZeroWhereverItIsRead(t *testing.T) {
	t.Parallel()
	for name, readings := range map[string][]int64{"constant": {5, -1, 5, -1}, "different": {5, -1, 7, -1}, "only the first": {5, -1, -1, -1}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			calls := exampleCalls(t, len(readings))
			for i, v := range readings {
				calls[i].Quantities = usage.Quantities{}
				if v >= 0 {
					calls[i].Quantities.Set(usage.Cost, v)
				}
			}
			var f Frame
			if err := f.Decode(seal(exampleHeader(), calls)); err != nil {
				t.Fatal(err)
			}
			cost := &f.Meters[usage.CostIndex]
			for i, want := range readings {
				v, known := cost.Get(i)
				if known != (want >= 0) || v != max(want, 0) || cost.At(i) != max(want, 0) || cost.Values[i] != max(want, 0) {
					t.Errorf("row %d: Get gives %d, %v, At %d, Values %d; the reading is %d (-1: unknown)", i, v, known, cost.At(i), cost.Values[i], want)
				}
			}
		})
	}
}

func TestAFrameThatIsReusedHoldsNothingOfTheFrameBefore(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var reused Frame
		for range rapid.IntRange(2, 5).Draw(t, "frames") {
			h, calls := anyHeader(t), anyCalls(t, 20)
			data := seal(h, calls)
			if rapid.Bool().Draw(t, "a broken one before") {
				cut := rapid.IntRange(0, len(data)-1).Draw(t, "cut")
				if err := reused.Decode(data[:cut]); err == nil {
					t.Fatalf("a cut frame was accepted")
				}
			}
			if err := reused.Decode(data); err != nil {
				t.Fatalf("decode: %v", err)
			}
			var fresh Frame
			if err := fresh.Decode(data); err != nil {
				t.Fatalf("decode: %v", err)
			}
			a, b := fresh, reused
			a.arena, b.arena = arena{}, arena{}
			if len(a.Custom)+len(b.Custom) == 0 {
				a.Custom, b.Custom = nil, nil
			}
			if !reflect.DeepEqual(a, b) {
				t.Fatalf("a reused frame differs from a fresh one:\n%s", cmp.Diff(a, b, cmpopts.IgnoreUnexported(Frame{})))
			}
		}
	})
}

func TestABuilderThatIsReusedSealsWhatAFreshOneSeals(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var reused Builder
		for range rapid.IntRange(2, 5).Draw(t, "frames") {
			h, calls := anyHeader(t), anyCalls(t, 20)
			for i := range calls {
				reused.Add(&calls[i])
			}
			if got, want := reused.Seal(h), seal(h, calls); !bytes.Equal(got, want) {
				t.Fatalf("a reused builder sealed other bytes:\n% x\n% x", got, want)
			}
			if reused.Len() != 0 || reused.Size() != 0 || reused.Full() {
				t.Fatalf("after sealing: %d calls, %d bytes, full: %v", reused.Len(), reused.Size(), reused.Full())
			}
		}
	})
}

// The size decides when a frame is sealed: too small an estimate makes frames
// that are greater than a reader takes.
func TestTheSizeIsNeverFarBelowWhatIsSealed(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		calls := anyCalls(t, 60)
		var b Builder
		for i := range calls {
			b.Add(&calls[i])
		}
		size := b.Size()
		h := anyHeader(t)
		if real := len(b.Seal(h)) - len(h.Gateway); size < real-512 {
			t.Fatalf("Size was %d, the frame has %d bytes", size, real)
		}
	})
}

// A gateway seals when Full; what it seals must be readable, whatever it was
// given, or its own calls end as dead letters.
func TestWhatIsSealedWhenFullIsAlwaysReadable(t *testing.T) {
	t.Parallel()
	worst := func(i int) usage.Call {
		c := usage.Call{Time: usage.OldestTimeMicros, Account: "a"}
		if i%2 == 1 {
			c.Time, c.Duration = usage.NewestTimeMicros, usage.MaxQuantity
		}
		return c
	}
	text := func(i int) string { return fmt.Sprintf("%0*d", usage.MaxIDBytes, i) }
	for name, call := range map[string]func(i int) usage.Call{
		"every call has meters of its own": func(i int) usage.Call {
			c := worst(i)
			for k := range usage.MaxCustomMeters {
				c.Quantities.Set(usage.Meter(fmt.Sprintf("m%d.%d", i, k)), usage.MaxQuantity)
			}
			return c
		},
		"long texts": func(i int) usage.Call {
			c := worst(i)
			c.Account, c.KeyID, c.RequestID, c.Method, c.Route, c.Model, c.Region = text(i), text(i+1), text(i+2), text(i+3), text(i+4), text(i+5), text(i+6)
			c.Code, c.DecisionID, c.Source, c.EventID, c.PriceVersion, c.Currency = usage.Code(text(i)), text(i), text(i), text(i), text(i), text(i)
			return c
		},
		"small calls and at last a great one": func(i int) usage.Call {
			c := usage.Call{Time: usage.OldestTimeMicros, Account: "a"}
			if i == MaxFrameCalls-2 {
				c = worst(1)
			}
			return c
		},
		"wide numbers": func(i int) usage.Call {
			c := worst(i)
			for m := range usage.BuiltIn(usage.NumBuiltIn) {
				c.Quantities.SetBuiltIn(m, usage.MaxQuantity*int64(i%2))
			}
			c.TraceID[0], c.SpanID[0] = 1, 1
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var b Builder
			var want []usage.Call
			for i := 0; !b.Full(); i++ {
				c := call(i)
				want = append(want, c)
				b.Add(&c)
			}
			data := b.Seal(exampleHeader())
			if len(data) > 2*TargetFrameBytes {
				t.Errorf("the frame has %d bytes, the target is %d", len(data), TargetFrameBytes)
			}
			var f Frame
			if err := f.Decode(data); err != nil {
				t.Fatal(err)
			}
			sameCalls(t, rows(&f), want)
		})
	}
}

func invalid(t *testing.T, err error, reason string) {
	t.Helper()
	var e *usage.InvalidError
	if !errors.As(err, &e) || e.Reason != reason {
		t.Errorf("got %v; want a usage.InvalidError with the reason %s", err, reason)
	}
}

func TestACorruptByteAnywhereIsFound(t *testing.T) {
	t.Parallel()
	data := seal(exampleHeader(), exampleCalls(t, 12))
	var f Frame
	for at := range data {
		for _, flip := range []byte{1, 0x80, 0xff} {
			broken := bytes.Clone(data)
			broken[at] ^= flip
			var e *usage.InvalidError
			if err := f.Decode(broken); !errors.As(err, &e) {
				t.Fatalf("byte %d xor %#x: %v", at, flip, err)
			}
		}
	}
	for cut := range data {
		var e *usage.InvalidError
		if err := f.Decode(data[:cut]); !errors.As(err, &e) {
			t.Fatalf("cut to %d bytes: %v", cut, err)
		}
	}
}

// block writes a column; frameOf a frame around columns, with a right checksum.
func block(id uint64, enc byte, payload ...byte) []byte {
	return append(appendBlockHeader(nil, id, enc, len(payload)), payload...)
}

func frameOf(n uint64, blocks ...[]byte) []byte {
	out := append([]byte(frameMagic), ksuid.Max[:]...)
	out = binary.AppendUvarint(out, 3) // shard
	out = binary.AppendUvarint(out, 9) // number
	out = binary.AppendVarint(out, int64(exampleHeader().SealedAt))
	out = appendString(out, "gw-1")
	out = binary.AppendUvarint(out, n)
	for _, b := range blocks {
		out = append(out, b...)
	}
	return binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli))
}

func constant(id uint64, v int64) []byte {
	return block(id, encIntConst, binary.AppendVarint(nil, v)...)
}

func offsets(id uint64, base int64, width int, values ...uint64) []byte {
	p := append(binary.AppendVarint(nil, base), byte(width))
	for _, v := range values {
		p = append(p, binary.LittleEndian.AppendUint64(nil, v)[:width]...)
	}
	return block(id, encIntOffset, p...)
}

func text(id uint64, s string) []byte { return block(id, encStrConst, appendString(nil, s)...) }

func own(name string, column []byte) []byte {
	// id 64 takes one byte, then encoding and a length below 128.
	return block(colCustomMeter, column[1], append(appendString(nil, name), column[3:]...)...)
}

const someTime = 1_700_000_000_000_000

func TestFramesThatNoWriterMakesAreRefusedWithTheirReason(t *testing.T) {
	t.Parallel()
	at, who := constant(colTime, someTime), text(colAccount, "a")
	huge := binary.AppendUvarint(nil, math.MaxUint64)
	var manyOwn, rowTooMany [][]byte
	for i := range maxCustomColumns + 1 {
		manyOwn = append(manyOwn, own(fmt.Sprint("m", i), constant(1, 1)))
	}
	rowTooMany = append([][]byte{at, who}, manyOwn[:usage.MaxCustomMeters+1]...)
	manyOwn = append([][]byte{at, who}, manyOwn...)
	for name, c := range map[string]struct {
		data   []byte
		reason string
	}{
		"nothing":                                {nil, usage.ReasonUnknownSchema},
		"another magic":                          {[]byte("TKF2" + strings.Repeat("x", 40)), usage.ReasonUnknownSchema},
		"over a mebibyte":                        {make([]byte, maxDecodeBytes+1), usage.ReasonOversized},
		"a checksum of something else":           {append(frameOf(1, at, who), 0), usage.ReasonChecksum},
		"no calls":                               {frameOf(0, at, who), usage.ReasonMalformed},
		"too many calls":                         {frameOf(maxDecodeCalls+1, at, who), usage.ReasonMalformed},
		"as many calls as there are numbers":     {frameOf(math.MaxUint64, at, who), usage.ReasonMalformed},
		"no time":                                {frameOf(1, who), usage.ReasonMalformed},
		"no account":                             {frameOf(1, at), usage.ReasonMalformed},
		"an empty account":                       {frameOf(1, at, text(colAccount, "")), usage.ReasonMalformed},
		"an empty account among others":          {frameOf(2, at, block(colAccount, encStrPlain, 1, 'a', 0)), usage.ReasonMalformed},
		"a call without a time":                  {frameOf(2, block(colTime, encIntConst|encNullable, append([]byte{1}, binary.AppendVarint(nil, someTime)...)...), who), usage.ReasonMalformed},
		"a time twice":                           {frameOf(1, at, at, who), usage.ReasonMalformed},
		"an account twice":                       {frameOf(1, at, who, who), usage.ReasonMalformed},
		"a trace id twice":                       {frameOf(1, at, who, block(colTraceID, encFixed, make([]byte, 16)...), block(colTraceID, encFixed, make([]byte, 16)...)), usage.ReasonMalformed},
		"a time before the year 2000":            {frameOf(1, constant(colTime, int64(usage.OldestTimeMicros)-1), who), usage.ReasonAbsurdTime},
		"a time after 2199":                      {frameOf(1, constant(colTime, int64(usage.NewestTimeMicros)+1), who), usage.ReasonAbsurdTime},
		"a time that wraps":                      {frameOf(2, offsets(colTime, someTime, 8, 0, math.MaxUint64-someTime), who), usage.ReasonAbsurdTime},
		"a negative reading":                     {frameOf(1, at, who, constant(colMeter0, -1)), usage.ReasonNegativeCount},
		"a reading below 0 by its base":          {frameOf(2, at, who, offsets(colMeter0, -1, 1, 0, 1)), usage.ReasonNegativeCount},
		"a reading that wraps below 0":           {frameOf(2, at, who, offsets(colMeter0, 5, 8, 0, math.MaxUint64-5)), usage.ReasonNegativeCount},
		"a reading that wraps from the greatest": {frameOf(2, at, who, offsets(colMeter0, math.MaxInt64-1, 1, 0, 5)), usage.ReasonNegativeCount},
		"a reading that wraps with 4 bytes":      {frameOf(1, at, who, offsets(colMeter0, math.MaxInt64, 4, 1)), usage.ReasonNegativeCount},
		"a sparse reading that wraps":            {frameOf(2, at, who, block(colMeter0, encIntOffset|encNullable, 1, 2, 8, 254, 255, 255, 255, 255, 255, 255, 255)), usage.ReasonNegativeCount},
		"a reading beyond what sums can hold":    {frameOf(1, at, who, constant(colMeter0, usage.MaxQuantity+1)), usage.ReasonOversized},
		"the greatest reading and one":           {frameOf(1, at, who, offsets(colMeter0, usage.MaxQuantity, 1, 1)), usage.ReasonOversized},
		"an own meter below 0":                   {frameOf(1, at, who, own("m", constant(1, -1))), usage.ReasonNegativeCount},
		"a status that a uint16 would cut":       {frameOf(1, at, who, constant(colStatus, 65536+200)), usage.ReasonOversized},
		"trace flags that a byte would cut":      {frameOf(1, at, who, constant(colTraceFlags, 256)), usage.ReasonOversized},
		"flags that 32 bits would cut":           {frameOf(1, at, who, constant(colFlags, 1<<32)), usage.ReasonOversized},
		"a negative duration":                    {frameOf(1, at, who, constant(colDuration, -1)), usage.ReasonNegativeCount},
		"a width of 3":                           {frameOf(1, at, who, block(colStatus, encIntOffset, 0, 3, 1, 2, 3)), usage.ReasonMalformed},
		"a width of 0":                           {frameOf(1, at, who, block(colStatus, encIntOffset, 0, 0)), usage.ReasonMalformed},
		"too few offsets":                        {frameOf(2, at, who, offsets(colStatus, 0, 1, 1)), usage.ReasonMalformed},
		"too many offsets":                       {frameOf(1, at, who, offsets(colStatus, 0, 1, 1, 2)), usage.ReasonMalformed},
		"integers encoded as strings":            {frameOf(1, at, who, block(colStatus, encStrConst, 1, 'a')), usage.ReasonMalformed},
		"strings encoded as integers":            {frameOf(1, at, constant(colAccount, 5)), usage.ReasonMalformed},
		"a bitmap of rows that do not exist":     {frameOf(1, at, who, block(colMeter0, encIntConst|encNullable, 2, 2)), usage.ReasonMalformed},
		"a bitmap that is cut off":               {frameOf(9, at, who, block(colMeter0, encIntConst|encNullable, 1)), usage.ReasonMalformed},
		"a sparse trace id that is cut off":      {frameOf(9, at, who, block(colTraceID, encFixed|encNullable, 1, 1, 7, 7)), usage.ReasonMalformed},
		"a dictionary of nothing":                {frameOf(1, at, block(colAccount, encStrDict, 0, 1, 0)), usage.ReasonMalformed},
		"a dictionary of more than there are":    {frameOf(1, at, block(colAccount, encStrDict, append(huge, 1, 'a')...)), usage.ReasonMalformed},
		"an index outside of the dictionary":     {frameOf(2, at, block(colAccount, encStrDict, 2, 1, 'a', 1, 'b', 1, 0, 2)), usage.ReasonMalformed},
		"an index of 4 bytes far outside":        {frameOf(1, at, block(colAccount, encStrDict, 1, 1, 'a', 4, 0, 0, 0, 128)), usage.ReasonMalformed},
		"a text longer than its column":          {frameOf(1, at, block(colAccount, encStrConst, append(huge, 'a')...)), usage.ReasonMalformed},
		"a text of 257 bytes":                    {frameOf(1, at, text(colAccount, strings.Repeat("a", 257))), usage.ReasonOversized},
		"a text that is not UTF-8":               {frameOf(1, at, text(colAccount, "\xff")), usage.ReasonMalformed},
		"a text with a zero byte":                {frameOf(1, at, text(colAccount, "a\x00b")), usage.ReasonMalformed},
		"something behind a constant text":       {frameOf(1, at, block(colAccount, encStrConst, 1, 'a', 'b')), usage.ReasonMalformed},
		"an own meter without a name":            {frameOf(1, at, who, own("", constant(1, 1))), usage.ReasonMalformed},
		"an own meter named like a built-in one": {frameOf(1, at, who, own("calls", constant(1, 1))), usage.ReasonMalformed},
		"an own meter with a bad name":           {frameOf(1, at, who, own("a b", constant(1, 1))), usage.ReasonMalformed},
		"an own meter twice":                     {frameOf(1, at, who, own("m", constant(1, 1)), own("m", constant(1, 1))), usage.ReasonMalformed},
		"too many own meters in a frame":         {frameOf(1, manyOwn...), usage.ReasonMalformed},
		"too many own meters in a call":          {frameOf(1, rowTooMany...), usage.ReasonOversized},
		"a column that is cut off":               {frameOf(1, at, who, []byte{colStatus, encIntConst, 200}), usage.ReasonMalformed},
		"a column id of 11 bytes":                {frameOf(1, at, who, bytes.Repeat([]byte{0x80}, 11)), usage.ReasonMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var f Frame
			invalid(t, f.Decode(c.data), c.reason)
		})
	}
}

func TestColumnsOfANewerWriterAreSkipped(t *testing.T) {
	t.Parallel()
	at, who := constant(colTime, someTime), text(colAccount, "a")
	var f Frame
	if err := f.Decode(frameOf(2, block(29, 99, 1, 2, 3), at, block(39, encIntOffset, 9), who, block(63, 0), block(1<<40, 255, 7))); err != nil {
		t.Fatal(err)
	}
	want := usage.Call{Time: someTime, Account: "a"}
	sameCalls(t, rows(&f), []usage.Call{want, want})
}

func TestAFrameOfTheFewestBytesAllocatesNoMoreThanItsBound(t *testing.T) {
	// Not parallel: it counts allocations.
	at, who := constant(colTime, someTime), text(colAccount, "a")
	blocks := [][]byte{at, who}
	for _, id := range []uint64{colStatus, colDuration, colFlags, colTraceFlags} {
		blocks = append(blocks, constant(id, 1))
	}
	for m := range uint64(usage.NumBuiltIn) {
		blocks = append(blocks, constant(colMeter0+m, 1))
	}
	for i := range usage.MaxCustomMeters {
		blocks = append(blocks, own(fmt.Sprint("m", i), constant(1, 1)))
	}
	data := frameOf(maxDecodeCalls, blocks...)
	r := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			var f Frame
			if err := f.Decode(data); err != nil {
				b.Fatal(err)
			}
		}
	})
	// 28 columns of 4,096 numbers of 8 bytes, and what belongs to them.
	if got := r.AllocedBytesPerOp(); got > 1<<20 {
		t.Errorf("a frame of %d bytes took %d bytes of memory", len(data), got)
	}
}

func TestDecodingAgainAndAgainAllocatesNothing(t *testing.T) {
	// Not parallel: it counts allocations.
	data := seal(exampleHeader(), exampleCalls(t, 500))
	other := seal(exampleHeader(), exampleCalls(t, 100))
	var f Frame
	if n := testing.AllocsPerRun(20, func() {
		for _, d := range [][]byte{data, other} {
			if err := f.Decode(d); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestTheThreeFormsOfACallGiveTheSameRows(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		h, calls := anyHeader(t), anyCalls(t, 12)
		subject := CallsSubject(h.Shard)
		var columnar, rowwise Frame
		if err := DecodeCalls(&columnar, subject, nats.Header{CodecHeader: {CodecColumnar}}, seal(h, calls)); err != nil {
			t.Fatalf("columnar: %v", err)
		}
		data, err := MarshalProtobuf(h, calls)
		if err != nil {
			t.Fatalf("marshal protobuf: %v", err)
		}
		if err := DecodeCalls(&rowwise, subject, nats.Header{CodecHeader: {CodecProtobuf}}, data); err != nil {
			t.Fatalf("protobuf: %v", err)
		}
		if rowwise.Header != columnar.Header {
			t.Fatalf("headers %+v and %+v", rowwise.Header, columnar.Header)
		}
		sameCalls(t, rows(&rowwise), rows(&columnar))

		// What a CloudEvent can say of a call.
		c := calls[0]
		if c.Source == "" || c.EventID == "" || (c.Code != "" && c.Code.Status() == 0) {
			c.Source, c.EventID, c.Code = "//gw", "e-1", usage.QuotaExceeded
		}
		c.TraceID, c.SpanID, c.TraceFlags, c.Flags, c.Ending, c.DecisionID, c.PriceVersion = [16]byte{}, [8]byte{}, 0, 0, 0, "", ""
		var event Frame
		if err := DecodeCalls(&event, subject, nats.Header{CodecHeader: {CodecCloudEvent}}, cloudEventOf(t, &c)); err != nil {
			t.Fatalf("CloudEvent: %v", err)
		}
		if event.Producer != ksuid.Nil || event.Shard != h.Shard {
			t.Fatalf("the event's header is %+v", event.Header)
		}
		sameCalls(t, rows(&event), []usage.Call{c})
	})
}

func cloudEventOf(t interface{ Fatalf(string, ...any) }, c *usage.Call) []byte {
	meters := map[string]*int64{}
	for _, m := range usage.BuiltInMeters() {
		meters[string(m)] = nil
		if v, ok := c.Quantities.Get(m); ok {
			meters[string(m)] = &v
		}
	}
	for _, q := range c.Quantities.Custom() {
		meters[string(q.Meter)] = &q.Value
	}
	data, err := json.Marshal(map[string]any{
		"specversion": "1.0", "type": CloudEventType, "source": c.Source, "id": c.EventID, "time": c.Time.Time().Format(time.RFC3339Nano),
		"subject": c.Account, "datacontenttype": "application/json",
		"data": cloudevent.Data{
			KeyID: c.KeyID, RequestID: c.RequestID, Method: c.Method, Route: c.Route, Model: c.Model, Region: c.Region,
			Status: int64(c.Status), Code: string(c.Code), DurationMicros: c.Duration, Meters: meters, Currency: c.Currency,
		},
	})
	if err != nil {
		t.Fatalf("marshal event: %v", err)
	}
	return data
}

func TestProtobufFramesThatCannotBeCountedAreRefusedWithTheirReason(t *testing.T) {
	t.Parallel()
	good := func(edit func(c *usage.Call)) []byte {
		calls := exampleCalls(t, 3)
		edit(&calls[1])
		data, err := MarshalProtobuf(exampleHeader(), calls)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	sum := func(body []byte) []byte {
		out := protowire.AppendTag(body, protoFrameCRC, protowire.Fixed32Type)
		return protowire.AppendFixed32(out, crc32.Checksum(body, castagnoli))
	}
	repeat := func(call []byte, n int) []byte {
		var out []byte
		for range n {
			out = protowire.AppendTag(out, protoFrameCalls, protowire.BytesType)
			out = protowire.AppendBytes(out, call)
		}
		return sum(out)
	}
	field := func(num protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v)
	}
	bytesField := func(num protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, num, protowire.BytesType), v)
	}
	base := append(field(1, someTime), bytesField(2, "a")...)
	with := func(more ...[]byte) []byte { return bytes.Join(append([][]byte{base}, more...), nil) }
	quantityOf := func(m string, v uint64) []byte {
		return bytesField(protoCallQuantities, string(append(bytesField(1, m), field(2, v)...)))
	}
	whole := good(func(*usage.Call) {})
	for name, c := range map[string]struct {
		data   []byte
		reason string
	}{
		"not protobuf":                  {[]byte{0xff, 0xff}, usage.ReasonMalformed},
		"no checksum":                   {whole[:len(whole)-5], usage.ReasonChecksum},
		"nothing":                       {nil, usage.ReasonMalformed},
		"over a mebibyte":               {make([]byte, maxDecodeBytes+1), usage.ReasonOversized},
		"half a million empty calls":    {repeat(nil, maxDecodeBytes/2-8), usage.ReasonMalformed},
		"a call of 100,000 meters":      {repeat(bytes.Repeat(quantityOf("", 0), 100_000), 1), usage.ReasonOversized},
		"no account":                    {good(func(c *usage.Call) { c.Account = "" }), usage.ReasonMalformed},
		"an absurd time":                {good(func(c *usage.Call) { c.Time = 1 }), usage.ReasonAbsurdTime},
		"a time after 2199":             {good(func(c *usage.Call) { c.Time = math.MaxInt64 }), usage.ReasonAbsurdTime},
		"a negative reading":            {good(func(c *usage.Call) { c.Quantities.Set(usage.Cost, -1) }), usage.ReasonNegativeCount},
		"too great a reading":           {good(func(c *usage.Call) { c.Quantities.Set(usage.Cost, math.MaxInt64) }), usage.ReasonOversized},
		"a meter with a bad name":       {good(func(c *usage.Call) { c.Quantities.Set("a b", 1) }), usage.ReasonMalformed},
		"a status that would be cut":    {repeat(with(field(12, 65536+200)), 1), usage.ReasonMalformed},
		"trace flags that would be cut": {repeat(with(field(7, 257)), 1), usage.ReasonMalformed},
		"half a trace id":               {repeat(with(bytesField(5, "12345678")), 1), usage.ReasonMalformed},
		"a longer span id":              {repeat(with(bytesField(6, "123456789")), 1), usage.ReasonMalformed},
		"a meter twice":                 {repeat(with(quantityOf("cost", 1), quantityOf("cost", 2)), 1), usage.ReasonMalformed},
		"a producer of 3 bytes":         {sum(append(bytesField(1, "abc"), repeat(with(), 1)[:len(with())+2]...)), usage.ReasonMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var f Frame
			invalid(t, DecodeCalls(&f, "calls.3", nats.Header{CodecHeader: {CodecProtobuf}}, c.data), c.reason)
		})
	}
	t.Run("the checksum may stand anywhere", func(t *testing.T) {
		t.Parallel()
		moved := append(bytes.Clone(whole[len(whole)-5:]), whole[:len(whole)-5]...)
		var f Frame
		if err := DecodeCalls(&f, "calls.3", nats.Header{CodecHeader: {CodecProtobuf}}, moved); err != nil {
			t.Error(err)
		}
	})
	t.Run("any corrupt byte is found", func(t *testing.T) {
		t.Parallel()
		var f Frame
		for at := range whole {
			broken := bytes.Clone(whole)
			broken[at] ^= 0x41
			var e *usage.InvalidError
			if err := DecodeCalls(&f, "calls.3", nats.Header{CodecHeader: {CodecProtobuf}}, broken); !errors.As(err, &e) {
				t.Fatalf("byte %d: %v", at, err)
			}
		}
	})
}

func TestCloudEventsThatCannotBeCountedAreRefusedWithTheirReason(t *testing.T) {
	t.Parallel()
	const good = `{"specversion":"1.0","type":"io.tollkeeper.call.v1","source":"s","id":"1","subject":"a","time":"2026-01-02T03:04:05Z","data":{"status":200}}`
	var many strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&many, `"m%d":1,`, i)
	}
	for name, c := range map[string]struct{ old, new, reason string }{
		"not JSON":                {`{"spec`, `{spec`, usage.ReasonMalformed},
		"another version":         {`"1.0"`, `"0.3"`, usage.ReasonUnknownSchema},
		"another type":            {`call.v1`, `call.v2`, usage.ReasonUnknownSchema},
		"no id":                   {`"id":"1"`, `"id":""`, usage.ReasonMalformed},
		"no source":               {`"source":"s",`, ``, usage.ReasonMalformed},
		"no account":              {`"subject":"a",`, ``, usage.ReasonMalformed},
		"no time":                 {`"time":"2026-01-02T03:04:05Z",`, ``, usage.ReasonMalformed},
		"a time in the year 1":    {`2026`, `0001`, usage.ReasonAbsurdTime},
		"a time in the year 9999": {`2026`, `9999`, usage.ReasonAbsurdTime},
		"no data":                 {`,"data":{"status":200}`, ``, usage.ReasonMalformed},
		"a status of 1000":        {`200`, `1000`, usage.ReasonMalformed},
		"a negative status":       {`200`, `-1`, usage.ReasonMalformed},
		"an unknown code":         {`"status":200`, `"code":"NO"`, usage.ReasonMalformed},
		"a negative reading":      {`"status":200`, `"meters":{"cost":-1}`, usage.ReasonNegativeCount},
		"a reading of 1e300":      {`"status":200`, `"meters":{"cost":1e300}`, usage.ReasonOversized},
		"a broken reading":        {`"status":200`, `"meters":{"cost":1.5}`, usage.ReasonMalformed},
		"a thousand meters":       {`"status":200`, `"meters":{` + many.String() + `"x":1}`, usage.ReasonOversized},
		"an event of 65 KB":       {`"status":200`, `"x":"` + strings.Repeat("x", cloudevent.MaxBytes) + `"`, usage.ReasonOversized},
		"an unknown member":       {`"status":200`, `"meter":{"calls":5}`, usage.ReasonMalformed},
		"a member twice":          {`"status":200`, `"status":200,"status":402`, usage.ReasonMalformed},
		"an id of no UTF-8":       {`"id":"1"`, "\"id\":\"\xff\"", usage.ReasonMalformed},
		"half a surrogate pair":   {`"id":"1"`, `"id":"\ud800"`, usage.ReasonMalformed},
		"two events":              {`200}}`, `200}}{}`, usage.ReasonMalformed},
		"a comma in the time":     {`05Z`, `05,5Z`, usage.ReasonMalformed},
		"a long account":          {`"subject":"a"`, `"subject":"` + strings.Repeat("x", 257) + `"`, usage.ReasonOversized},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data := strings.Replace(good, c.old, c.new, 1)
			if data == good {
				t.Fatal("the case changes nothing")
			}
			var f Frame
			invalid(t, DecodeCalls(&f, "calls.3", nats.Header{CodecHeader: {CodecCloudEvent}}, []byte(data)), c.reason)
		})
	}
}

func TestWhereAMessageStandsMustAgreeWithWhatItSays(t *testing.T) {
	t.Parallel()
	data := seal(exampleHeader(), exampleCalls(t, 2))
	anonymous := exampleHeader()
	anonymous.Producer = ksuid.Nil
	foreign := exampleCalls(t, 2)
	for i := range foreign {
		foreign[i].Source, foreign[i].EventID = "s", fmt.Sprint(i)
	}
	unnumbered := exampleHeader()
	unnumbered.Number = 0
	for name, c := range map[string]struct {
		subject, codec string
		data           []byte
		reason         string // empty: accepted
	}{
		"as written":                          {"calls.3", CodecColumnar, data, ""},
		"on another shard":                    {"calls.4", CodecColumnar, data, usage.ReasonWrongShard},
		"on a subject nobody reads":           {"calls.03", CodecColumnar, data, usage.ReasonMalformed},
		"on a control subject":                {"control.3", CodecColumnar, data, usage.ReasonMalformed},
		"without a codec":                     {"calls.3", "", data, usage.ReasonUnknownSchema},
		"with an unknown codec":               {"calls.3", "columnar.v2", data, usage.ReasonUnknownSchema},
		"with a codec that it is not":         {"calls.3", CodecProtobuf, data, usage.ReasonMalformed},
		"a producer's frame without a number": {"calls.3", CodecColumnar, seal(unnumbered, exampleCalls(t, 2)), usage.ReasonMalformed},
		"no producer and no event ids":        {"calls.3", CodecColumnar, seal(anonymous, exampleCalls(t, 2)), usage.ReasonMalformed},
		"no producer, events with ids":        {"calls.3", CodecColumnar, seal(anonymous, foreign), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var f Frame
			err := DecodeCalls(&f, c.subject, nats.Header{CodecHeader: {c.codec}}, c.data)
			if c.reason == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			invalid(t, err, c.reason)
		})
	}
}

func TestSealingNothingAndAddingWithoutEndPanic(t *testing.T) {
	t.Parallel()
	panics := func(what string, f func()) {
		defer func() {
			if recover() == nil {
				t.Errorf("%s did not panic", what)
			}
		}()
		f()
	}
	var b Builder
	panics("sealing nothing", func() { b.Seal(Header{}) })
	c := exampleCalls(t, 1)[0]
	panics("adding without end", func() {
		for range maxDecodeCalls + 1 {
			b.Add(&c)
		}
	})
}

// Many different texts, in an order that makes the dictionary's hash table
// grow, be cleared and be used again.
func TestDictionariesOfEverySizeKeepTheirTexts(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	var b Builder
	var f Frame
	for _, distinct := range []int{1, 2, 7, 8, 9, 63, 64, 255, 256, 257, 900, 3, 4000, 1} {
		want := make([]usage.Call, min(maxDecodeCalls, distinct*3/2+1))
		for i := range want {
			want[i] = usage.Call{Time: someTime, Account: fmt.Sprint("a", rng.IntN(distinct)), Model: fmt.Sprint(i % distinct)}
			b.Add(&want[i])
		}
		if err := f.Decode(b.Seal(exampleHeader())); err != nil {
			t.Fatal(err)
		}
		sameCalls(t, rows(&f), want)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(seal(exampleHeader(), exampleCalls(f, 20)))
	f.Add(seal(exampleHeader(), exampleCalls(f, 1)))
	f.Add(frameOf(2, constant(colTime, someTime), text(colAccount, "a"), offsets(colMeter0, 5, 8, 0, 1), own("m", constant(1, 1))))
	var reused Frame
	f.Fuzz(func(t *testing.T, data []byte) {
		// The checksum would keep the fuzzer out of all that follows it.
		if len(data) >= 4 {
			binary.LittleEndian.PutUint32(data[len(data)-4:], crc32.Checksum(data[:len(data)-4], castagnoli))
		}
		if err := reused.Decode(data); err != nil {
			var e *usage.InvalidError
			if !errors.As(err, &e) {
				t.Fatalf("%v is not a usage.InvalidError", err)
			}
			return
		}
		checkAccepted(t, &reused)
	})
}

// Events of a source are told apart by their ids: without one, the second would
// be taken for a repetition of the first, whoever brought it.
func TestAnEventOfASourceHasAnID(t *testing.T) {
	t.Parallel()
	calls := exampleCalls(t, 3)
	calls[2].Source, calls[2].EventID = "https://example.com", ""
	data, err := MarshalProtobuf(exampleHeader(), calls)
	if err != nil {
		t.Fatal(err)
	}
	for codec, data := range map[string][]byte{
		CodecColumnar: seal(exampleHeader(), calls), CodecProtobuf: data, CodecCloudEvent: cloudEventOf(t, &calls[2]),
	} {
		var f Frame
		var invalid *usage.InvalidError
		if err := DecodeCalls(&f, "calls.3", nats.Header{CodecHeader: {codec}}, data); !errors.As(err, &invalid) || invalid.Reason != usage.ReasonMalformed {
			t.Errorf("%s: got %v", codec, err)
		}
	}
}

func FuzzDecodeCalls(f *testing.F) {
	calls := exampleCalls(f, 5)
	proto, err := MarshalProtobuf(exampleHeader(), calls)
	if err != nil {
		f.Fatal(err)
	}
	calls[1].Source, calls[1].EventID = "s", "1"
	f.Add(byte(0), seal(exampleHeader(), calls))
	f.Add(byte(1), proto)
	f.Add(byte(2), cloudEventOf(f, &calls[1]))
	var reused Frame
	f.Fuzz(func(t *testing.T, codec byte, data []byte) {
		codecs := []string{CodecColumnar, CodecProtobuf, CodecCloudEvent}
		if err := DecodeCalls(&reused, "calls.3", nats.Header{CodecHeader: {codecs[int(codec)%3]}}, data); err != nil {
			var e *usage.InvalidError
			if !errors.As(err, &e) {
				t.Fatalf("%v is not a usage.InvalidError", err)
			}
			return
		}
		checkAccepted(t, &reused)
	})
}

// checkAccepted checks of a frame that was accepted that each call is valid
// and that the frame can be written and read again.
func checkAccepted(t *testing.T, f *Frame) {
	t.Helper()
	want := rows(f)
	for i := range want {
		if err := want[i].Validate(want[i].Time); err != nil {
			t.Fatalf("call %d of an accepted frame is invalid: %v", i, err)
		}
	}
	var again Frame
	if err := again.Decode(seal(f.Header, want)); err != nil {
		t.Fatalf("an accepted frame cannot be read again: %v", err)
	}
	sameCalls(t, rows(&again), want)
}

// Frames that were written before calls had an ending say that it was not told, and so
// does one of a newer writer that is not known here.
func TestAnEndingThatIsNotKnownWasNotTold(t *testing.T) {
	t.Parallel()
	at, who := constant(colTime, 1_700_000_000_000_000), text(colAccount, "acme")
	for data, want := range map[string]usage.Ending{
		string(frameOf(1, at, who)):                           usage.EndingUnknown,
		string(frameOf(1, at, who, constant(colEnding, 2))):   usage.ClientLeft,
		string(frameOf(1, at, who, constant(colEnding, 3))):   usage.UpstreamFailed,
		string(frameOf(1, at, who, constant(colEnding, 255))): usage.EndingUnknown,
	} {
		var f Frame
		if err := f.Decode([]byte(data)); err != nil {
			t.Fatal(err)
		}
		if c := f.Call(0); c.Ending != want {
			t.Errorf("%v, wanted %v", c.Ending, want)
		}
	}
	var f Frame
	if err := f.Decode(frameOf(1, at, who, constant(colEnding, 256))); err == nil {
		t.Error("an ending of two bytes was taken")
	}
}
