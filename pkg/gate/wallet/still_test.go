package wallet

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// still is a world whose ledger has a test clock, which stands at the middle of a month.
func still(t *testing.T, s *shard) (*world, *atomic.Int64) {
	t.Helper()
	var clock atomic.Int64
	clock.Store(time.Date(2015, 5, 17, 10, 0, 0, 0, time.UTC).UnixMicro())
	s.now = func() lease.Micros { return lease.Micros(clock.Load()) }
	return newWorld(t, s, func(o *Options) {
		o.Now, o.TestClock, o.Skew = func() usage.Micros { return usage.Micros(clock.Load()) }, true, 3*time.Microsecond
	}), &clock
}

// While the ledger's time stands still messages get lost all the same.
func TestWhileATestClockStandsStillWhatWasLostIsRepeated(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string]int{"one": 1, "three": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, _ := still(t, newShard())
				w.shard.losing(func() bool { lost--; return lost >= 0 })
				if s := w.take(t, w.parts("acme", 1, exact("month", usage.Month, 100))); s != Taken {
					t.Errorf("after asks that were lost: %d", s)
				}
			})
		})
	}
}

// The clock jumps while a call waits for its turn to ask, or for the answer, or for a
// lost ask to be repeated: it waits no longer for that, and is neither given up nor
// refused. By more than two minutes it jumps only beside an account whose lease the
// ledger knows: it takes older first asks for copies.
func TestAJumpOfATestClockLosesNoCallThatWaits(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]time.Duration{
		"before it asks": 0, "before its ask is in the ledger": 30 * time.Millisecond, "before it is answered": 70 * time.Millisecond, "before it asks again": 110 * time.Millisecond,
	} {
		for jump, by := range map[string]time.Duration{"two seconds": 2 * time.Second, "a minute": time.Minute, "five days": 5 * 24 * time.Hour} {
			for lost, fails := range map[string]bool{"": false, ", and the first ask is lost": true} {
				t.Run(name+", by "+jump+lost, func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) {
						s := newShard()
						slow := func() time.Duration { return 50 * time.Millisecond }
						s.ack, s.owner = slow, slow
						s.losing(func() bool { was := fails; fails = false; return was })
						w, clock := still(t, s)
						first := w.parts("first", 1, exact("month", usage.Month, 100))
						parts := w.parts("acme", 50, exact("month", usage.Month, 100))
						if by > 2*time.Minute {
							w.take(t, w.parts("acme", 1, exact("month", usage.Month, 100)))
						}
						go w.take(t, first) // keeps the desk busy: acme's ask has to wait
						synctest.Wait()
						time.AfterFunc(when, func() { clock.Add(by.Microseconds()) })
						if s := w.take(t, parts); s != Taken {
							t.Errorf("standing %d", s)
						}
						time.Sleep(time.Second)
					})
				})
			}
		}
	}
}

// A gateway can know an account before its shard does; that is so for a moment only.
func TestWhileATestClockStandsStillALimitThatBecomesKnownIsAskedForAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, _ := still(t, newShard())
		month := exact("month", usage.Month, 10)
		parts := w.parts("acme", 1, month)
		w.shard.mu.Lock()
		delete(w.shard.limits, "plan/month")
		w.shard.mu.Unlock()
		if s := w.take(t, parts); s != NoAnswer && s != Turning {
			t.Fatal(s)
		}
		time.Sleep(time.Second)
		w.shard.change("plan/month", month)
		if s := w.take(t, parts); s != Taken {
			t.Errorf("when it is known: %d", s)
		}
	})
}
