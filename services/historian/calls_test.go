package historian

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/segmentio/ksuid"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

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
			msg, err := ledger.ControlMessage(shard, &tollkeeperv1.ControlEntry{Id: rapid.SampledFrom([]string{producer.String(), fmt.Sprint("act-", k/2)}).Draw(t, "id"), Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: producer[:]}}})
			if err != nil {
				t.Fatal(err)
			}
			if rapid.Bool().Draw(t, "closing") { // not all under the producer's name: those are left out
				msg = ledger.ClosingMessage(shard, msg.Data)
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
	return newCalls(0, "", func(*history.Block) []part { return nil }, m, nopLog)
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
	var b ledger.Builder
	b.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a"})
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.KSUID{1}, Number: 7})); err != nil {
		t.Fatal(err)
	}
	c.fold.Pass(1, 5).Calls(&f, nil)
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
