package lease

import (
	"sync"
	"sync/atomic"
	"testing"
)

// A unit that comes back between an attempt that failed and the question why must not
// make the call admitted that did not get it.
func TestWhoIsAdmittedHasItsUnits(t *testing.T) {
	t.Parallel()
	p := filled(1, 3)[0]
	holds := NewHolds(100)
	var out atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20_000 {
				h, o, _ := holds.Reserve([]Part{{p, 2}}, 1, 1<<40)
				if o.OK() != (h != nil) {
					t.Error("it is admitted and holds nothing")
					return
				}
				if h == nil {
					continue
				}
				if out.Add(2) > 3 {
					t.Error("more is held than there is")
				}
				out.Add(-2)
				h.Void(1)
			}
		})
	}
	all.Wait()
}

// However many take at a time, and give back, what they have had is never more than
// what was noted before.
func TestNobodyTakesBeyondTheMark(t *testing.T) {
	t.Parallel()
	const granted = 20_000
	p := NewPurse(Gateway{1}, 0, Habits{Term: second, RetryAfter: ms, Sealed: true})
	p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 1, Granted: granted, Expiry: second}, 0)
	holds := NewHolds(100)
	var noted, had atomic.Int64
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			for had.Load() < granted {
				if g%2 == 0 {
					if o, _ := Take([]Part{{p, 1}}, 1); o.OK() && had.Add(1) > noted.Load() {
						t.Error("beyond the mark")
						return
					}
					continue
				}
				// A call that reserves three and costs two.
				h, o, _ := holds.Reserve([]Part{{p, 3}}, 1, 1<<40)
				if !o.OK() {
					if had.Load() > granted-6 {
						return
					}
					continue
				}
				if had.Add(2)+1 > noted.Load() {
					t.Error("beyond the mark")
				}
				h.Settle([]int64{2}, 1)
			}
		})
	}
	for had.Load() < granted && !t.Failed() {
		p.Need(3, second)
		if m, ok := p.Mark(1); ok {
			noted.Store(m)
			p.Unlocked(m)
		}
	}
	all.Wait()
	if used := p.used.Load(); used != had.Load() {
		t.Errorf("%d used, %d had", used, had.Load())
	}
}
