package publish

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// tape is the decisions' stream as a Publisher sees it.
type tape struct {
	t         *rapid.T
	place     map[string]int // of each decision in the ledger's order
	decisions []usage.Decision
	sequence  uint64 // of the stream
	revision  uint64 // of the checkpoint
	last      Checkpoint
	newestAt  uint64
	late      []*Batch // lone decisions that may still be on their way
}

// store is what the stream does with a batch: all or nothing.
func (tp *tape) store(b *Batch) error {
	if b.expect != tp.revision {
		return ledger.ErrStale
	}
	for _, d := range b.Decisions {
		before := -1
		if n := len(tp.decisions); n > 0 {
			before = tp.place[tp.decisions[n-1].ID]
		}
		// The same again at most; none is left out, none goes back.
		if at := tp.place[d.ID]; at != before && at != before+1 {
			tp.t.Fatalf("decision %d was stored after decision %d", at, before)
		}
		tp.decisions = append(tp.decisions, d)
		tp.sequence++
		tp.newestAt = tp.sequence
	}
	if !b.Lone {
		tp.sequence++
		tp.revision, tp.last = tp.sequence, b.next
	}
	return nil
}

// straggle lets some of what was on its way arrive.
func (tp *tape) straggle() {
	for _, b := range tp.late {
		if rapid.Bool().Draw(tp.t, "arrives") {
			_ = tp.store(b) // refused when the checkpoint has moved
		}
	}
	tp.late = nil
}

func (tp *tape) position() Position {
	at := Position{Revision: tp.revision, Found: tp.last, NewestAt: tp.newestAt}
	if n := len(tp.decisions); n > 0 {
		at.Newest = ToldBy(&tp.decisions[n-1])
	}
	return at
}

// entry of a log: what it led to.
type entry struct {
	sequence uint64
	made     []usage.Decision
}

func newEntry(sequence uint64, decisions int) entry {
	e := entry{sequence: sequence}
	for i := range decisions {
		account := fmt.Sprintf("account-%04d", i)
		e.made = append(e.made, usage.Decision{ID: fmt.Sprint(sequence, account), Account: account, LimitID: "free/calls", Revision: sequence})
	}
	return e
}

// decisions are the Publisher's to change.
func (e *entry) decisions() []usage.Decision { return slices.Clone(e.made) }

// takeOver is what an owner does at its start.
func (tp *tape) takeOver() Publisher {
	tp.straggle()
	tp.last.Epoch++
	tp.last.Owner = fmt.Sprint("owner", tp.last.Epoch)
	tp.sequence++
	tp.revision = tp.sequence
	return New(0, tp.revision, tp.last, tp.position().Newest)
}

func TestEveryDecisionIsPublishedInOrderWhateverHappens(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var log []entry
		var all []string
		tp := &tape{t: t, place: map[string]int{}}
		p := tp.takeOver()
		read := 0 // entries of the log that the Publisher has
		snapshots := map[string]int{"": 0}
		sequence := uint64(0)
		doubt := false // something was unclear
		check := func() {
			// Who starts from the snapshot never sees the entries before it.
			need := 0
			for _, e := range log[:snapshots[tp.last.Snapshot]] {
				need += len(e.made)
			}
			if need > 0 && (len(tp.decisions) == 0 || tp.place[tp.decisions[len(tp.decisions)-1].ID] < need-1) {
				t.Fatalf("snapshot %q passes decisions that are not published", tp.last.Snapshot)
			}
		}
		publish := func(b *Batch) {
			result := rapid.SampledFrom([]string{"stored", "stored", "stored", "answer lost", "not stored", "on its way"}).Draw(t, "result")
			doubt = doubt || result != "stored"
			switch result {
			case "stored":
				if err := tp.store(b); err != nil {
					t.Fatal(err)
				}
				if b.Lone {
					p.Acked(tp.newestAt)
				} else {
					p.Acked(tp.revision)
				}
				return
			case "answer lost":
				if err := tp.store(b); err != nil {
					t.Fatal(err)
				}
			case "on its way":
				if b.Lone {
					tp.late = append(tp.late, b)
				}
			}
			again, _, err := p.Failed(tp.position())
			if err != nil || again != (result != "answer lost") {
				t.Fatalf("%s: again %t, %v", result, again, err)
			}
			if again && p.flight.Lone {
				t.Fatal("a lone decision that may be on its way is sent once more")
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"entry", "entry", "read", "read", "publish", "publish", "publish", "snapshot", "arrive", "crash", "another owner"}).Draw(t, "step") {
			case "entry":
				sequence += rapid.Uint64Range(1, 3).Draw(t, "others between")
				e := newEntry(sequence, rapid.SampledFrom([]int{0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 5, 6, 998, 999, 1000, 2500}).Draw(t, "decisions"))
				log = append(log, e)
				for _, d := range e.made {
					tp.place[d.ID] = len(all)
					all = append(all, d.ID)
				}
			case "read":
				if read < len(log) {
					p.Add(log[read].sequence, log[read].decisions())
					read++
				}
			case "publish":
				b := p.flight
				if b == nil {
					b = p.Next()
				}
				if b == nil {
					break
				}
				if len(b.Decisions) >= ledger.MaxBatch {
					t.Fatalf("a batch of %d decisions and a checkpoint", len(b.Decisions))
				}
				publish(b)
			case "snapshot":
				if p.snapshot == "" && read > 0 {
					name := fmt.Sprint("after ", read, " by ", p.last.Epoch)
					snapshots[name] = read
					p.snapshot, p.snapshotAt = name, log[read-1].sequence
				}
			case "arrive":
				tp.straggle()
			case "crash":
				if b := p.flight; b != nil && b.Lone {
					tp.late = append(tp.late, b)
					doubt = true
				}
				p = tp.takeOver()
				read = snapshots[tp.last.Snapshot]
			case "another owner":
				old := p
				p = tp.takeOver()
				read = snapshots[tp.last.Snapshot]
				b := old.flight
				if b == nil {
					b = old.Next()
				}
				if b == nil {
					break
				}
				if err := tp.store(b); !errors.Is(err, ledger.ErrStale) {
					t.Fatal("the old owner's batch was stored")
				}
				if _, _, err := old.Failed(tp.position()); !errors.Is(err, ledger.ErrStale) {
					t.Fatalf("the old owner was told %v", err)
				}
			}
			check()
		}
		for ; read < len(log); read++ {
			p.Add(log[read].sequence, log[read].decisions())
		}
		for b := p.flight; ; b = p.Next() {
			if b == nil {
				if b = p.Next(); b == nil {
					break
				}
			}
			if err := tp.store(b); err != nil {
				t.Fatal(err)
			}
			if b.Lone {
				p.Acked(tp.newestAt)
			} else {
				p.Acked(tp.revision)
			}
			check()
		}
		once := slices.CompactFunc(slices.Clone(tp.decisions), func(a, b usage.Decision) bool { return a.ID == b.ID })
		if len(once) != len(all) {
			t.Fatalf("%d of %d decisions are published", len(once), len(all))
		}
		if !doubt && len(tp.decisions) != len(all) {
			t.Fatalf("%d decisions were published, there are %d, and nothing was unclear", len(tp.decisions), len(all))
		}
	})
}

// After a lone decision whose fate is unclear the checkpoint has to move before
// anything newer is published: else the straggler could come after it.
func TestAStragglerIsShutOut(t *testing.T) {
	t.Parallel()
	p := New(1, 7, Checkpoint{Epoch: 1, Owner: "a"}, Told{})
	first := newEntry(3, 1)
	p.Add(3, first.decisions())
	straggler := p.Next()
	if !straggler.Lone {
		t.Fatal("one decision needs no batch")
	}
	again, _, err := p.Failed(Position{Revision: 7, Found: p.last})
	if !again || err != nil || p.flight.Lone || p.flight.expect != 7 || p.flight.next.Sequence != 3 {
		t.Fatalf("again %t, %v: %+v", again, err, p.flight)
	}
	p.Acked(9)
	second := newEntry(4, 1)
	p.Add(4, second.decisions())
	if b := p.Next(); !b.Lone || b.expect != 9 || b.expect == straggler.expect {
		t.Fatalf("got %+v", b)
	}
	p.Acked(10)
	if p.written != 10 || p.revision != 9 {
		t.Errorf("got %+v", p)
	}
}

func TestACheckpointIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	for _, want := range []Checkpoint{
		{Epoch: 1, Owner: "a"},
		{Epoch: 7, Owner: "b", Sequence: 99, Snapshot: "shard-3/98-7"},
	} {
		m, err := want.Message(3)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ReadCheckpoint(3, m.Header, m.Data); err != nil || got != want {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
		if _, err := ReadCheckpoint(4, m.Header, m.Data); err == nil {
			t.Error("it is another shard's")
		}
		if _, err := ReadCheckpoint(3, m.Header, []byte{0xff}); err == nil {
			t.Error("what is no protobuf was taken")
		}
	}
}
