package publish

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// standing is a member that folds the log and owns the shard or does not.
type standing struct {
	read    int // entries
	owner   bool
	p       Publisher
	backlog Backlog
}

// The log is published whole and in order, whoever of several members that all
// fold it becomes its owner, loses it, comes back or begins anew.
func TestWhoTakesOverWithWhatItHasFoldedLosesDoublesAndReversesNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var log []entry
		all := 0
		tp := &tape{t: t, place: map[string]int{}}
		members := []*standing{{}, {}, {}}
		sequence, doubt := uint64(0), false
		var old Position
		fold := func(m *standing) {
			e := log[m.read]
			if m.read++; m.owner {
				m.p.Add(e.sequence, e.decisions())
			} else {
				m.backlog.Add(e.decisions())
			}
		}
		store := func(m *standing, b *Batch, answered bool) {
			if err := tp.store(b); err != nil {
				m.owner, m.backlog = false, m.p.Resign()
				return
			}
			switch {
			case !answered:
			case b.Lone:
				m.p.Acked(tp.newestAt)
			default:
				m.p.Acked(tp.revision)
			}
		}
		takeOver := func(m *standing) {
			if m.owner {
				m.backlog = m.p.Resign()
			}
			fresh := tp.takeOver()
			applied := uint64(0)
			if m.read > 0 {
				applied = log[m.read-1].sequence
			}
			var ok bool
			m.owner = true
			if m.p, ok = m.backlog.Resume(0, tp.revision, tp.last, tp.position().Newest, applied); !ok {
				m.p, m.read = fresh, 0
			}
			m.backlog = Backlog{}
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			m := members[rapid.IntRange(0, len(members)-1).Draw(t, "member")]
			switch rapid.SampledFrom([]string{"entry", "entry", "fold", "fold", "fold", "publish", "publish", "publish", "publish", "look", "look later", "drop", "start", "resign", "take over"}).Draw(t, "step") {
			case "entry":
				sequence += rapid.Uint64Range(1, 3).Draw(t, "others between")
				e := newEntry(sequence, rapid.SampledFrom([]int{0, 0, 1, 1, 2, 4, 5, 6, 1100}).Draw(t, "decisions"))
				for _, d := range e.made {
					tp.place[d.ID] = all
					all++
				}
				log = append(log, e)
			case "fold":
				if m.read < len(log) {
					fold(m)
				}
			case "publish":
				if !m.owner {
					break
				}
				b := m.p.Flight()
				if b == nil {
					b = m.p.Next()
				}
				if b == nil {
					break
				}
				// Killed after it was stored and before it knew, the flight goes on.
				answered := rapid.Bool().Draw(t, "answered")
				store(m, b, answered)
				if !answered && m.owner {
					doubt = true
					m.owner, m.backlog = false, m.p.Resign()
				}
			case "look":
				if !m.owner {
					m.backlog.Saw(tp.position())
				}
			case "look later":
				if !m.owner {
					m.backlog.Saw(old)
				}
				old = tp.position()
			case "drop":
				if !m.owner {
					m.backlog.Drop()
				}
			case "start":
				*m = standing{}
			case "resign":
				if m.owner {
					m.owner, m.backlog = false, m.p.Resign()
				}
			case "take over":
				takeOver(m)
			}
		}
		m := members[0]
		takeOver(m)
		for m.read < len(log) {
			fold(m)
		}
		for b := m.p.Next(); b != nil; b = m.p.Next() {
			store(m, b, true)
		}
		once := slices.CompactFunc(slices.Clone(tp.decisions), func(a, b usage.Decision) bool { return a.ID == b.ID })
		if len(once) != all {
			t.Fatalf("%d of %d decisions are published", len(once), all)
		}
		if !doubt && len(tp.decisions) != all {
			t.Fatalf("%d decisions were published, there are %d, and nothing was unclear", len(tp.decisions), all)
		}
	})
}

func TestABacklogOfAStreamThatHasLostItsEndIsNoBeginning(t *testing.T) {
	t.Parallel()
	var b Backlog
	b.Saw(Position{Revision: 9, NewestAt: 12})
	if _, ok := b.Resume(0, 11, Checkpoint{}, Told{}, 0); ok {
		t.Error("what was seen at 12 may be gone, and it goes on")
	}
	if _, ok := b.Resume(0, 13, Checkpoint{}, Told{}, 0); !ok {
		t.Error("nothing is missing, and it does not go on")
	}
}
