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
