package aggregator

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// tape is the decisions' stream as a publisher sees it.
type tape struct {
	decisions []string // ids, in order
	revision  uint64
	last      checkpoint
}

func (tp *tape) store(b *batch) error {
	if b.expect != tp.revision {
		return ledger.ErrStale
	}
	for _, d := range b.decisions {
		tp.decisions = append(tp.decisions, d.ID)
	}
	tp.revision += uint64(len(b.decisions)) + 1
	tp.last = b.next
	return nil
}

// entry of a log: what it led to.
type entry struct {
	sequence uint64
	ids      []string
}

func (e *entry) decisions() []usage.Decision {
	out := make([]usage.Decision, 0, len(e.ids))
	for _, id := range e.ids {
		out = append(out, usage.Decision{ID: id, Revision: e.sequence})
	}
	return out
}

// takeOver is what an owner does at its start.
func (tp *tape) takeOver() publisher {
	tp.last.epoch++
	tp.last.owner = fmt.Sprint("owner", tp.last.epoch)
	tp.revision++
	return publisher{revision: tp.revision, last: tp.last, owed: tp.last.count, applied: tp.last.sequence}
}

func TestEveryDecisionIsPublishedOnceInOrderWhateverHappens(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var log []entry
		var all []string
		tp := &tape{}
		p := tp.takeOver()
		read := 0 // entries of the log that the publisher has
		snapshots := map[string]int{"": 0}
		sequence := uint64(0)
		checked := 0
		check := func() {
			if n := len(tp.decisions); n > len(all) || !slices.Equal(tp.decisions[checked:], all[checked:n]) {
				t.Fatalf("the stream does not hold each decision once, in order: %d of %d", n, len(all))
			}
			checked = len(tp.decisions)
			// Who starts from the snapshot never sees the entries before it.
			need := 0
			for _, e := range log[:snapshots[tp.last.snapshot]] {
				need += len(e.ids)
			}
			if len(tp.decisions) < need {
				t.Fatalf("snapshot %q passes decisions that are not published", tp.last.snapshot)
			}
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"entry", "entry", "read", "read", "publish", "publish", "snapshot", "crash", "another owner"}).Draw(t, "step") {
			case "entry":
				sequence += rapid.Uint64Range(1, 3).Draw(t, "others between")
				e := entry{sequence: sequence}
				for i := range rapid.SampledFrom([]int{0, 0, 0, 1, 1, 2, 2, 998, 999, 1000, 2500}).Draw(t, "decisions") {
					e.ids = append(e.ids, fmt.Sprint(sequence, "/", i))
				}
				log, all = append(log, e), append(all, e.ids...)
			case "read":
				if read < len(log) {
					p.add(log[read].sequence, log[read].decisions())
					read++
				}
			case "publish":
				b := p.flight
				if b == nil {
					b = p.next()
				}
				if b == nil {
					break
				}
				if len(b.decisions) >= ledger.MaxBatch {
					t.Fatalf("a batch of %d decisions and a checkpoint", len(b.decisions))
				}
				switch rapid.SampledFrom([]string{"stored", "stored", "answer lost", "not stored"}).Draw(t, "result") {
				case "stored":
					if err := tp.store(b); err != nil {
						t.Fatal(err)
					}
					p.acked(tp.revision)
				case "answer lost":
					if err := tp.store(b); err != nil {
						t.Fatal(err)
					}
					if again, _, err := p.failed(tp.revision, tp.last); again || err != nil {
						t.Fatalf("it is stored: again %t, %v", again, err)
					}
				case "not stored":
					if again, _, err := p.failed(tp.revision, tp.last); !again || err != nil {
						t.Fatalf("it is not stored: again %t, %v", again, err)
					}
				}
			case "snapshot":
				if p.snapshot == "" && read > 0 {
					name := fmt.Sprint("after ", read, " by ", p.last.epoch)
					snapshots[name] = read
					p.snapshot, p.snapshotAt = name, log[read-1].sequence
				}
			case "crash":
				p = tp.takeOver()
				read = snapshots[tp.last.snapshot]
			case "another owner":
				old := p
				p = tp.takeOver()
				read = snapshots[tp.last.snapshot]
				b := old.flight
				if b == nil {
					b = old.next()
				}
				if b == nil {
					break
				}
				if err := tp.store(b); !errors.Is(err, ledger.ErrStale) {
					t.Fatal("the old owner's batch was stored")
				}
				if _, _, err := old.failed(tp.revision, tp.last); !errors.Is(err, ledger.ErrStale) {
					t.Fatalf("the old owner was told %v", err)
				}
			}
			check()
		}
		for ; read < len(log); read++ {
			p.add(log[read].sequence, log[read].decisions())
		}
		for b := p.next(); b != nil || p.flight != nil; b = p.next() {
			if err := tp.store(p.flight); err != nil {
				t.Fatal(err)
			}
			p.acked(tp.revision)
			check()
		}
		if !slices.Equal(tp.decisions, all) {
			t.Fatalf("%d of %d decisions are published", len(tp.decisions), len(all))
		}
	})
}

func TestACheckpointIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	for _, want := range []checkpoint{
		{epoch: 1, owner: "a"},
		{epoch: 7, owner: "b", sequence: 99, partly: 120, count: 1998, snapshot: "shard-3/98-7"},
	} {
		m, err := want.message(3)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := readCheckpoint(3, m.Header, m.Data); err != nil || got != want {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
		if _, err := readCheckpoint(4, m.Header, m.Data); err == nil {
			t.Error("it is another shard's")
		}
		m.Header.Set(partlyHeader, "some")
		if _, err := readCheckpoint(3, m.Header, m.Data); err == nil {
			t.Error("a header that says nothing was taken")
		}
	}
}
