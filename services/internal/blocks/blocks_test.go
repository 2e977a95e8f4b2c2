package blocks

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

var testLimits = Limits{Rows: 20, Bytes: 1000, Entries: 12, Age: 500 * time.Millisecond, Stall: 10 * time.Second}

// drawItems draws a stretch of a stream: entries with gaps between them, some
// without rows, over the turns of months.
func drawItems(t *rapid.T) []Item {
	at := usage.At(time.Date(2025, 11, 30, 23, 59, 0, 0, time.UTC))
	sequence := uint64(0)
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Item {
		sequence += rapid.Uint64Range(1, 3).Draw(t, "gap")
		at += usage.Micros(rapid.SampledFrom([]int64{0, 1000, 30_000_000, 27 * 24 * 3600_000_000}).Draw(t, "passed"))
		return Item{Sequence: sequence, Time: at, Rows: rapid.SampledFrom([]int{0, 1, 1, 5, 19, 25}).Draw(t, "rows"), Bytes: rapid.IntRange(0, 400).Draw(t, "bytes"), Near: rapid.Bool().Draw(t, "near")}
	}), 1, 60).Draw(t, "items")
}

// plan feeds items at drawn moments and returns the blocks as they were cut.
func plan(t *rapid.T, p *Planner, items []Item) []Span {
	var spans []Span
	now := time.Unix(0, 0)
	for _, it := range items {
		now = now.Add(time.Duration(rapid.IntRange(0, 700).Draw(t, "wait")) * time.Millisecond)
		if s, ok := p.Due(now); ok {
			spans = append(spans, s)
		}
		if s, ok := p.Before(it); ok {
			spans = append(spans, s)
		}
		p.Add(it, now)
		if s, ok := p.Due(now); ok {
			spans = append(spans, s)
		}
	}
	if s, ok := p.Due(now.Add(time.Hour)); ok {
		spans = append(spans, s)
	}
	return spans
}

func TestBlocksCoverTheStreamWithoutGapsWithinTheirBounds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		items := drawItems(t)
		spans := plan(t, New(testLimits, 1), items)
		next, k := uint64(1), 0
		for _, s := range spans {
			if s.From != next || s.To < s.From {
				t.Fatalf("block %d-%d does not begin at %d", s.From, s.To, next)
			}
			next = s.To + 1
			rows, size, entries, months := 0, 0, 0, map[uint32]bool{}
			for ; k < len(items) && items[k].Sequence <= s.To; k++ {
				entries++
				if items[k].Rows > 0 {
					rows, size = rows+items[k].Rows, size+items[k].Bytes
					months[history.Month(items[k].Time)] = true
				}
			}
			if entries > testLimits.Entries || len(months) > 1 {
				t.Fatalf("block %d-%d has %d entries of %d months", s.From, s.To, entries, len(months))
			}
			if rows > max(testLimits.Rows, 25) || size > testLimits.Bytes+400 {
				t.Fatalf("block %d-%d has %d rows and %d bytes", s.From, s.To, rows, size)
			}
		}
		if k != len(items) {
			t.Fatalf("%d of %d entries are in no block", len(items)-k, len(items))
		}
	})
}

func TestAForcedBlockEndsWhereItDidWhateverTheTime(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		items := drawItems(t)
		first := plan(t, New(testLimits, 1), items)
		which := rapid.IntRange(0, len(first)-1).Draw(t, "pending")
		pending := first[which]
		p := New(testLimits, pending.From)
		p.Force(pending.To)
		var rest []Item
		for _, it := range items {
			if it.Sequence >= pending.From {
				rest = append(rest, it)
			}
		}
		again := plan(t, p, rest)
		if len(again) == 0 || again[0] != pending {
			t.Fatalf("the pending block %v came again as %v", pending, again)
		}
	})
}

func TestABlockWaitsForMoreOnlyWhileTheReaderIsBehind(t *testing.T) {
	t.Parallel()
	start := time.Unix(0, 0)
	p := New(testLimits, 1)
	p.Add(Item{Sequence: 1, Rows: 1, Near: false}, start)
	if _, ok := p.Due(start.Add(testLimits.Age)); ok {
		t.Error("a block was closed half empty although the stream has more")
	}
	if s, ok := p.Due(start.Add(testLimits.Stall)); !ok || s != (Span{1, 1}) {
		t.Error("a block stayed open for ever")
	}
	p.Add(Item{Sequence: 2, Rows: 1, Near: true}, start)
	if at, ok := p.Wake(); !ok || at != start.Add(testLimits.Age) {
		t.Errorf("it has to be asked at %v, not after %v", at, testLimits.Age)
	}
	if _, ok := p.Due(start.Add(testLimits.Age - 1)); ok {
		t.Error("a block was closed before its age")
	}
	if s, ok := p.Due(start.Add(testLimits.Age)); !ok || s != (Span{2, 2}) {
		t.Errorf("at its age the block is %v", s)
	}
}
