package wallet

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

var worlds = flag.Int("wallet.worlds", 15, "random worlds")

var seed = flag.Uint64("wallet.seed", 0, "run one random world only")

// notes is a journal that takes its time and sometimes fails.
type notes struct {
	mu sync.Mutex
	r  *rand.Rand
}

func (n *notes) Write(usage.Micros, []marks.Mark) error {
	n.mu.Lock()
	pause, fails := time.Duration(n.r.IntN(20))*time.Millisecond, n.r.IntN(20) == 0
	n.mu.Unlock()
	time.Sleep(pause)
	if fails {
		return errLost
	}
	return nil
}

// Several gateways share small allowances, entries get lost and late, calls come and give
// up at any time, windows end: every call that was let through has its units, of the
// window that its time is in, and after the last words the ledger has the same.
func TestWhoIsLetThroughHasItsUnitsAndNoUnitIsLost(t *testing.T) {
	t.Parallel()
	first, n := uint64(1), uint64(*worlds)
	if *seed != 0 {
		first, n = *seed, 1
	}
	for s := first; s < first+n; s++ {
		t.Run(fmt.Sprintf("seed %d", s), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { randomWorld(t, s) })
		})
	}
}

func randomWorld(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	var lock sync.Mutex
	roll := func(n int) int { // for many goroutines, in whatever order
		lock.Lock()
		defer lock.Unlock()
		return r.IntN(n)
	}
	slow, lossy, sealed, gateways := 1+r.IntN(1+r.IntN(300)), r.IntN(2)*(1+r.IntN(10)), r.IntN(2) == 0, 1+r.IntN(3)
	s := newShard()
	s.ack = func() time.Duration { return time.Duration(1+roll(slow)) * time.Millisecond }
	s.owner = s.ack
	s.lose = func() bool { return lossy > 0 && roll(100) < lossy }
	s.again = func() (time.Duration, bool) { return time.Duration(roll(10_000)) * time.Millisecond, roll(100) < lossy }
	limits := []usage.Limit{exact("minute", usage.Minute, int64(1+r.IntN(300)))}
	if r.IntN(2) == 0 {
		limits = append(limits, exact("hour", usage.Hour, int64(1+r.IntN(600))))
	}
	// A clock that is quite wrong can put a call into another window, and no more than that.
	jumps := r.IntN(3) == 0
	if jumps {
		limits = []usage.Limit{exact("lifetime", usage.Lifetime, int64(1+r.IntN(900)))}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go s.tick(ctx)

	var worlds []*world
	for range gateways {
		var skew atomic.Int64
		skew.Store(int64(roll(401)-200) * int64(time.Millisecond))
		if jumps {
			go func() {
				for {
					select {
					case <-ctx.Done():
						return
					case <-time.After(time.Duration(roll(10_000)) * time.Millisecond):
						skew.Store(int64(roll(180_000)-90_000) * int64(time.Millisecond) * int64(roll(2)))
					}
				}
			}()
		}
		worlds = append(worlds, newWorld(t, s, func(o *Options) {
			o.Now = func() usage.Micros { return usage.At(time.Now().Add(time.Duration(skew.Load()))) }
			if sealed {
				o.Journal = &notes{r: rand.New(rand.NewPCG(seed, 2))}
			}
			o.MaxWaiting = 50
		}))
	}
	spent := map[key]int64{}
	refused, early := map[key]int64{}, map[key]int64{} // the least that was
	spend := func(parts []Part, at usage.Micros, units int64) {
		lock.Lock()
		defer lock.Unlock()
		for _, p := range parts {
			start, _ := window.Bounds(p.Limit.Window, at)
			spent[key{p.Account(), p.LimitID(), lease.Micros(start)}] += units
		}
	}
	counts := map[Standing]int{}
	var calls sync.WaitGroup
	for _, w := range worlds {
		parts := w.parts("acme", 1, limits...)
		for range 20 {
			calls.Go(func() {
				for end := time.Now().Add(130 * time.Second); time.Now().Before(end); time.Sleep(time.Duration(roll(3000)) * time.Millisecond) {
					mine := make([]Part, len(parts))
					copy(mine, parts)
					reserve := roll(2) == 0
					if reserve {
						for i := range mine {
							mine[i].Units = 3
						}
					}
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(roll(1500))*time.Millisecond)
					res := w.Take(ctx, mine, reserve, time.Second)
					cancel()
					lock.Lock()
					counts[res.Standing]++
					if of := map[Standing]map[key]int64{Denied: refused, DeniedEarly: early}[res.Standing]; of != nil {
						p := mine[res.At]
						k := key{p.Account(), p.LimitID(), lease.Micros(res.Start)}
						if n := of[k]; n == 0 || p.Units < n {
							of[k] = p.Units
						}
					}
					lock.Unlock()
					if (res.Hold != nil) != (reserve && res.Standing == Taken) {
						t.Errorf("a hold: %v, standing %d", res.Hold, res.Standing)
					}
					switch {
					case res.Standing != Taken:
					case !reserve:
						spend(mine, res.Time, 1)
					case roll(4) == 0:
						res.Hold.Void()
						res.Hold.Void()
					default:
						time.Sleep(time.Duration(roll(1500)) * time.Millisecond)
						n := int64(roll(4))
						actual := make([]int64, len(mine))
						for i := range actual {
							actual[i] = n
						}
						spend(mine, res.Time, n)
						res.Hold.Settle(actual)
						res.Hold.Settle(actual)
					}
				}
			})
		}
	}
	// Purses are shelved whenever that can be.
	var shelved atomic.Int64
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Duration(roll(500)) * time.Millisecond):
			}
			for _, w := range worlds {
				d := &w.desks[0]
				d.mu.Lock()
				for _, p := range slices.Clone(d.open) {
					touched := p.touched
					p.touched = 0
					if roll(2) == 0 && d.shelve(p, w.tell()) {
						shelved.Add(1)
						continue
					}
					p.touched = touched
				}
				d.mu.Unlock()
			}
		}
	}()
	over := make(chan struct{})
	go func() {
		for {
			select {
			case <-over:
				return
			case <-time.After(50 * time.Millisecond):
			}
			lock.Lock()
			for k, n := range spent {
				for _, l := range limits {
					if "plan/"+l.ID == k.limit && n > l.Amount {
						t.Errorf("%+v: %d of %d units", k, n, l.Amount)
					}
				}
			}
			lock.Unlock()
		}
	}()
	calls.Wait()
	close(over)
	for _, w := range worlds {
		within, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		if err := w.Close(within); err != nil {
			t.Error(err)
		}
		cancel()
	}
	time.Sleep(20 * time.Second) // for answers, and copies
	s.mu.Lock()
	defer s.mu.Unlock()
	wrong := 0
	for k, e := range s.escrows {
		st := e.State()
		if n := refused[k]; n > 0 && spent[k]+n <= st.Amount {
			t.Errorf("%+v: %d units were refused for good, and %d of %d were spent", k, n, spent[k], st.Amount)
		}
		if n := early[k]; n > 0 && spent[k]+n <= st.Amount {
			wrong++
			t.Logf("%+v: %d units refused early, %d spent of %d %+v", k, n, spent[k], st.Amount, st.Counts)
		}
		if st.Settled > st.Amount || st.Settled > spent[k] {
			t.Errorf("%+v: the ledger has %d settled of %d, calls spent %d", k, st.Settled, st.Amount, spent[k])
		}
		if !st.Ended && (st.Outstanding != 0 || st.Settled != spent[k]) {
			t.Errorf("%+v: %+v, calls spent %d", k, st, spent[k])
		}
	}
	for _, w := range worlds {
		if n, m := w.purses.Load(), w.waiting.Load(); n != 0 || m != 0 {
			t.Errorf("%d purses, %d waiting", n, m)
		}
		if d := &w.desks[0]; len(d.pockets)+len(d.byPurse)+len(d.open)+len(d.turning)+len(d.shelf)+int(w.shelved.Load()) != 0 {
			t.Errorf("left: %d, %d, %d, %d, %d", len(d.pockets), len(d.byPurse), len(d.open), len(d.turning), len(d.shelf))
		}
	}
	t.Logf("slow %d, unreliable %d, sealed %v, jumps %v, %d gateways, %d times shelved, %+v: %v", slow, lossy, sealed, jumps, gateways, shelved.Load(), limits[0].Amount, counts)
}
