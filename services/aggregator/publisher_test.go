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
	t         *rapid.T
	place     map[string]int // of each decision in the ledger's order
	decisions []usage.Decision
	sequence  uint64 // of the stream
	revision  uint64 // of the checkpoint
	last      checkpoint
	newestAt  uint64
	late      []*batch // lone decisions that may still be on their way
}

// store is what the stream does with a batch: all or nothing.
func (tp *tape) store(b *batch) error {
	if b.expect != tp.revision {
		return ledger.ErrStale
	}
	for _, d := range b.decisions {
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
	if !b.lone {
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

func (tp *tape) position() position {
	at := position{revision: tp.revision, found: tp.last, newestAt: tp.newestAt}
	if n := len(tp.decisions); n > 0 {
		at.newest = toldBy(&tp.decisions[n-1])
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

// decisions are the publisher's to change.
func (e *entry) decisions() []usage.Decision { return slices.Clone(e.made) }

// takeOver is what an owner does at its start.
func (tp *tape) takeOver() publisher {
	tp.straggle()
	tp.last.epoch++
	tp.last.owner = fmt.Sprint("owner", tp.last.epoch)
	tp.sequence++
	tp.revision = tp.sequence
	return newPublisher(0, tp.revision, tp.last, tp.position().newest)
}

func TestEveryDecisionIsPublishedInOrderWhateverHappens(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var log []entry
		var all []string
		tp := &tape{t: t, place: map[string]int{}}
		p := tp.takeOver()
		read := 0 // entries of the log that the publisher has
		snapshots := map[string]int{"": 0}
		sequence := uint64(0)
		doubt := false // something was unclear
		check := func() {
			// Who starts from the snapshot never sees the entries before it.
			need := 0
			for _, e := range log[:snapshots[tp.last.snapshot]] {
				need += len(e.made)
			}
			if need > 0 && (len(tp.decisions) == 0 || tp.place[tp.decisions[len(tp.decisions)-1].ID] < need-1) {
				t.Fatalf("snapshot %q passes decisions that are not published", tp.last.snapshot)
			}
		}
		publish := func(b *batch) {
			result := rapid.SampledFrom([]string{"stored", "stored", "stored", "answer lost", "not stored", "on its way"}).Draw(t, "result")
			doubt = doubt || result != "stored"
			switch result {
			case "stored":
				if err := tp.store(b); err != nil {
					t.Fatal(err)
				}
				if b.lone {
					p.acked(tp.newestAt)
				} else {
					p.acked(tp.revision)
				}
				return
			case "answer lost":
				if err := tp.store(b); err != nil {
					t.Fatal(err)
				}
			case "on its way":
				if b.lone {
					tp.late = append(tp.late, b)
				}
			}
			again, _, err := p.failed(tp.position())
			if err != nil || again != (result != "answer lost") {
				t.Fatalf("%s: again %t, %v", result, again, err)
			}
			if again && p.flight.lone {
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
				publish(b)
			case "snapshot":
				if p.snapshot == "" && read > 0 {
					name := fmt.Sprint("after ", read, " by ", p.last.epoch)
					snapshots[name] = read
					p.snapshot, p.snapshotAt = name, log[read-1].sequence
				}
			case "arrive":
				tp.straggle()
			case "crash":
				if b := p.flight; b != nil && b.lone {
					tp.late = append(tp.late, b)
					doubt = true
				}
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
				if _, _, err := old.failed(tp.position()); !errors.Is(err, ledger.ErrStale) {
					t.Fatalf("the old owner was told %v", err)
				}
			}
			check()
		}
		for ; read < len(log); read++ {
			p.add(log[read].sequence, log[read].decisions())
		}
		for b := p.flight; ; b = p.next() {
			if b == nil {
				if b = p.next(); b == nil {
					break
				}
			}
			if err := tp.store(b); err != nil {
				t.Fatal(err)
			}
			if b.lone {
				p.acked(tp.newestAt)
			} else {
				p.acked(tp.revision)
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
	p := newPublisher(1, 7, checkpoint{epoch: 1, owner: "a"}, told{})
	first := newEntry(3, 1)
	p.add(3, first.decisions())
	straggler := p.next()
	if !straggler.lone {
		t.Fatal("one decision needs no batch")
	}
	again, _, err := p.failed(position{revision: 7, found: p.last})
	if !again || err != nil || p.flight.lone || p.flight.expect != 7 || p.flight.next.sequence != 3 {
		t.Fatalf("again %t, %v: %+v", again, err, p.flight)
	}
	p.acked(9)
	second := newEntry(4, 1)
	p.add(4, second.decisions())
	if b := p.next(); !b.lone || b.expect != 9 || b.expect == straggler.expect {
		t.Fatalf("got %+v", b)
	}
	p.acked(10)
	if p.written != 10 || p.revision != 9 {
		t.Errorf("got %+v", p)
	}
}

func TestACheckpointIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	for _, want := range []checkpoint{
		{epoch: 1, owner: "a"},
		{epoch: 7, owner: "b", sequence: 99, snapshot: "shard-3/98-7"},
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
		if _, err := readCheckpoint(3, m.Header, []byte{0xff}); err == nil {
			t.Error("what is no protobuf was taken")
		}
	}
}
