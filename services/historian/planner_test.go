package historian

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/segmentio/ksuid"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

var testLimits = limits{rows: 20, bytes: 1000, entries: 12, age: 500 * time.Millisecond, stall: 10 * time.Second}

// drawItems draws a stretch of a stream: entries with gaps between them, some
// without rows, over the turns of months.
func drawItems(t *rapid.T) []item {
	at := usage.At(time.Date(2025, 11, 30, 23, 59, 0, 0, time.UTC))
	sequence := uint64(0)
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) item {
		sequence += rapid.Uint64Range(1, 3).Draw(t, "gap")
		at += usage.Micros(rapid.SampledFrom([]int64{0, 1000, 30_000_000, 27 * 24 * 3600_000_000}).Draw(t, "passed"))
		return item{sequence: sequence, time: at, rows: rapid.SampledFrom([]int{0, 1, 1, 5, 19, 25}).Draw(t, "rows"), bytes: rapid.IntRange(0, 400).Draw(t, "bytes"), near: rapid.Bool().Draw(t, "near")}
	}), 1, 60).Draw(t, "items")
}

// plan feeds items at drawn moments and returns the blocks as they were cut.
func plan(t *rapid.T, p *planner, items []item) []span {
	var spans []span
	now := time.Unix(0, 0)
	for _, it := range items {
		now = now.Add(time.Duration(rapid.IntRange(0, 700).Draw(t, "wait")) * time.Millisecond)
		if s, ok := p.due(now); ok {
			spans = append(spans, s)
		}
		if s, ok := p.before(it); ok {
			spans = append(spans, s)
		}
		p.add(it, now)
		if s, ok := p.due(now); ok {
			spans = append(spans, s)
		}
	}
	if s, ok := p.due(now.Add(time.Hour)); ok {
		spans = append(spans, s)
	}
	return spans
}

func TestBlocksCoverTheStreamWithoutGapsWithinTheirBounds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		items := drawItems(t)
		spans := plan(t, newPlanner(testLimits, 1), items)
		next, k := uint64(1), 0
		for _, s := range spans {
			if s.from != next || s.to < s.from {
				t.Fatalf("block %d-%d does not begin at %d", s.from, s.to, next)
			}
			next = s.to + 1
			rows, size, entries, months := 0, 0, 0, map[uint32]bool{}
			for ; k < len(items) && items[k].sequence <= s.to; k++ {
				entries++
				if items[k].rows > 0 {
					rows, size = rows+items[k].rows, size+items[k].bytes
					months[history.Month(items[k].time)] = true
				}
			}
			if entries > testLimits.entries || len(months) > 1 {
				t.Fatalf("block %d-%d has %d entries of %d months", s.from, s.to, entries, len(months))
			}
			if rows > max(testLimits.rows, 25) || size > testLimits.bytes+400 {
				t.Fatalf("block %d-%d has %d rows and %d bytes", s.from, s.to, rows, size)
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
		first := plan(t, newPlanner(testLimits, 1), items)
		which := rapid.IntRange(0, len(first)-1).Draw(t, "pending")
		pending := first[which]
		p := newPlanner(testLimits, pending.from)
		p.force(pending.to)
		var rest []item
		for _, it := range items {
			if it.sequence >= pending.from {
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
	p := newPlanner(testLimits, 1)
	p.add(item{sequence: 1, rows: 1, near: false}, start)
	if _, ok := p.due(start.Add(testLimits.age)); ok {
		t.Error("a block was closed half empty although the stream has more")
	}
	if s, ok := p.due(start.Add(testLimits.stall)); !ok || s != (span{1, 1}) {
		t.Error("a block stayed open for ever")
	}
	p.add(item{sequence: 2, rows: 1, near: true}, start)
	if at, ok := p.wake(); !ok || at != start.Add(testLimits.age) {
		t.Errorf("it has to be asked at %v, not after %v", at, testLimits.age)
	}
	if _, ok := p.due(start.Add(testLimits.age - 1)); ok {
		t.Error("a block was closed before its age")
	}
	if s, ok := p.due(start.Add(testLimits.age)); !ok || s != (span{2, 2}) {
		t.Errorf("at its age the block is %v", s)
	}
}

// drawMessages draws ledger entries: frames with repeated and skipped numbers,
// foreign events, control entries and rubbish.
func drawMessages(t *rapid.T) []ledger.Message {
	at := time.Date(2025, 11, 17, 9, 0, 0, 0, time.UTC)
	var all []ledger.Message
	n := rapid.IntRange(1, 40).Draw(t, "entries")
	for k := range n {
		at = at.Add(time.Duration(rapid.IntRange(-50, 5000).Draw(t, "passed")) * time.Millisecond)
		shard := rapid.Uint32Range(0, 2).Draw(t, "shard")
		m := ledger.Message{Sequence: uint64(k + 1), Time: at}
		switch rapid.IntRange(0, 9).Draw(t, "kind") {
		case 0:
			m.Subject, m.Data = ledger.CallsSubject(shard), []byte("rubbish")
		case 1:
			producer := ksuid.KSUID{byte(rapid.IntRange(1, 2).Draw(t, "producer"))}
			msg, err := ledger.ControlMessage(shard, &tollkeeperv1.ControlEntry{Id: fmt.Sprint("act-", k/2), Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: producer[:]}}})
			if err != nil {
				t.Fatal(err)
			}
			m.Subject, m.Header, m.Data = msg.Subject, msg.Header, msg.Data
		default:
			var b ledger.Builder
			for range rapid.IntRange(1, 4).Draw(t, "calls") {
				c := usage.Call{Time: usage.At(at) - usage.Micros(rapid.Int64Range(-1e6, 300e6).Draw(t, "age")), Account: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "account"), Model: rapid.SampledFrom([]string{"", "m"}).Draw(t, "model")}
				if rapid.IntRange(0, 3).Draw(t, "foreign") == 0 {
					c.Source, c.EventID = "s", rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "event")
				}
				if rapid.Bool().Draw(t, "known") {
					c.Quantities.Set(usage.InputTokens, rapid.Int64Range(0, 100).Draw(t, "tokens"))
				}
				b.Add(&c)
			}
			msg := ledger.FrameMessage(shard, b.Seal(ledger.Header{Producer: ksuid.KSUID{byte(rapid.IntRange(1, 2).Draw(t, "producer"))}, Shard: shard, Number: rapid.Uint64Range(1, 12).Draw(t, "number"), Gateway: "g"}))
			m.Subject, m.Header, m.Data = msg.Subject, msg.Header, msg.Data
		}
		all = append(all, m)
	}
	return all
}

// gathered is a block's content as bytes: what is sent to each table.
func gathered(c *calls, messages []ledger.Message, keepFrom uint64) []byte {
	for _, m := range messages {
		c.weigh(m)
		c.take(m, m.Sequence >= keepFrom)
	}
	return c.block.Fingerprint()
}

func testCalls(t fataler) *calls {
	m, err := newMetrics(discard{})
	if err != nil {
		t.Fatal(err)
	}
	return newCalls(0, func(*history.Block) []part { return nil }, m, nopLog)
}

func TestTheSameEntriesBetweenTheSameBoundariesGiveTheSameBlock(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		messages := drawMessages(t)
		from := rapid.IntRange(0, len(messages)-1).Draw(t, "from")
		snapshotAt := rapid.IntRange(0, from).Draw(t, "snapshot")

		// Once without interruption …
		straight := gathered(testCalls(t), messages, uint64(from+1))

		// … and once from a snapshot before the block, over a silent fold.
		before := testCalls(t)
		gathered(before, messages[:snapshotAt], 1<<62)
		data := before.snapshot(uint64(snapshotAt), "stream")
		after := testCalls(t)
		position, err := after.restore(data, "stream")
		if err != nil || position != uint64(snapshotAt) {
			t.Fatalf("the snapshot came back at %d: %v", position, err)
		}
		if again := after.snapshot(uint64(snapshotAt), "stream"); !bytes.Equal(again, data) {
			t.Fatal("the snapshot came back as another one")
		}
		if redone := gathered(after, messages[snapshotAt:], uint64(from+1)); !bytes.Equal(redone, straight) {
			t.Fatalf("the block from %d came out differently after a restart at %d", from+1, snapshotAt)
		}
	})
}

func TestADamagedOrForeignSnapshotIsNotUsed(t *testing.T) {
	t.Parallel()
	c := testCalls(t)
	c.fold.pass(1, 5).set.Frame(dedup.Producer{1}, 7)
	data := c.snapshot(9, "stream")
	if _, err := testCalls(t).restore(data, "another"); err == nil {
		t.Error("the snapshot of another ledger was taken")
	}
	for i := range data {
		bad := bytes.Clone(data)
		bad[i] ^= 0x10
		if _, err := testCalls(t).restore(bad, "stream"); err == nil {
			t.Fatalf("a snapshot with a flipped bit in byte %d was taken", i)
		}
		if _, err := testCalls(t).restore(data[:i], "stream"); err == nil && i > 0 {
			t.Fatalf("a snapshot cut off after %d bytes was taken", i)
		}
	}
}

func TestForeignEventsAreKnownAgainWhoeverBringsThem(t *testing.T) {
	t.Parallel()
	var b ledger.Builder
	for range 3 {
		b.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a", Source: "s", EventID: "1"})
	}
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.KSUID{1}, Number: 1})); err != nil {
		t.Fatal(err)
	}
	s := newFold(0).pass(0, usage.OldestTimeMicros)
	if got := s.calls(&f, nil); len(got.keep) != 1 || got.foreign != 2 {
		t.Errorf("of three copies of one event %v were kept, %d were left out", got.keep, got.foreign)
	}
	if got := s.calls(&f, nil); got.verdict != dedup.Duplicate {
		t.Errorf("the same frame again is %v", got.verdict)
	}
	f.Number = 2
	if got := s.calls(&f, nil); got.keep == nil || len(got.keep) != 0 || got.foreign != 3 {
		t.Errorf("a frame of events that are all known keeps %v", got.keep)
	}
}
