package lease

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func filled(n int, amount int64) []*Purse {
	var all []*Purse
	for range n {
		p := NewPurse(Gateway{1}, 0, Habits{Term: second, RetryAfter: ms, FirstWant: 1, MaxWant: 1})
		p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 1, Granted: amount, Expiry: never / 2}, 0)
		all = append(all, p)
	}
	return all
}

func benchTake(b *testing.B, limits int, clock bool) {
	purses := filled(limits, 1<<60)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		parts := make([]Part, limits)
		for i := range parts {
			parts[i] = Part{purses[i], 1}
		}
		now := Micros(1)
		for pb.Next() {
			if clock {
				now = Micros(time.Now().UnixMicro()) & 0xffff
			}
			if out, _ := Take(parts, now); !out.OK() {
				b.Fatal("refused")
			}
		}
	})
}

func BenchmarkTake(b *testing.B) {
	b.Run("one limit", func(b *testing.B) { benchTake(b, 1, false) })
	b.Run("one limit, clock", func(b *testing.B) { benchTake(b, 1, true) })
	b.Run("three limits", func(b *testing.B) { benchTake(b, 3, false) })
}

// The least that an admission from a lease can cost: what is free goes down,
// what is used goes up.
func BenchmarkBare(b *testing.B) {
	var free, used atomic.Int64
	free.Store(1 << 60)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			for {
				n := free.Load()
				if free.CompareAndSwap(n, n-1) {
					break
				}
			}
			used.Add(1)
		}
	})
}

// Many accounts: the goroutines seldom meet.
func BenchmarkTakeOfManyAccounts(b *testing.B) {
	purses := filled(1<<16, 1<<60)
	b.ResetTimer()
	var start atomic.Uint64
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		parts := make([]Part, 1)
		i := start.Add(0x9e3779b97f4a7c15)
		for pb.Next() {
			i = i*6364136223846793005 + 1442695040888963407
			parts[0] = Part{purses[i>>48], 1}
			if out, _ := Take(parts, 1); !out.OK() {
				b.Fatal("refused")
			}
		}
	})
}

func BenchmarkRefuse(b *testing.B) {
	p := filled(1, 1)[0]
	parts := []Part{{p, 1}}
	Take(parts, 1)
	p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 2, Granted: 1, Verdict: DeniedFinal}, 0)
	p.denial.Load().until = never
	b.ReportAllocs()
	for b.Loop() {
		if out, _ := Take(parts, 1); out != Refused {
			b.Fatal(out)
		}
	}
}

func BenchmarkReserveAndSettle(b *testing.B) {
	parts := []Part{{filled(1, 1<<60)[0], 4096}}
	hs := NewHolds(1024)
	actual := []int64{100}
	b.ReportAllocs()
	for b.Loop() {
		h, _, _ := hs.Reserve(parts, 1, 100)
		h.Settle(actual, 2)
	}
}

func BenchmarkApply(b *testing.B) {
	e := NewEscrow(MaxUnits, Terms{Term: second, Patience: second, Horizon: second, MaxLeases: 64})
	var asks [16]Ask
	for i := range asks {
		asks[i] = Ask{Gateway: Gateway{byte(i)}, Need: 1, Want: 100}
	}
	b.ReportAllocs()
	n := uint64(0)
	for b.Loop() {
		m := &asks[n%16]
		n++
		m.Seq++
		for _, a := range e.Apply(Entry{Sequence: n, Time: Micros(n), Ask: m}).Answers {
			m.Known, m.Used = a.Granted, a.Granted
		}
	}
}

// The real thing with threads: gateways whose calls come at the same time, and a
// ledger between them and the fold.
func TestManyGoroutinesTakeExactlyWhatThereIs(t *testing.T) {
	t.Parallel()
	const amount, gateways, callers = 10_000, 3, 64
	var ledger struct {
		sync.Mutex
		escrow   *Escrow
		sequence uint64
	}
	ledger.escrow = NewEscrow(amount, Terms{Term: second, Patience: 10 * second, Horizon: second, MaxLeases: 64})
	type gateway struct {
		sync.Mutex
		*sync.Cond
		purse *Purse
	}
	all := map[Gateway]*gateway{}
	var inbox [gateways]chan Answer
	index := map[Gateway]int{}
	for i := range gateways {
		id := Gateway{byte(i + 1)}
		g := &gateway{purse: NewPurse(id, 0, Habits{Term: second, ReportEvery: ms, RetryAfter: second, Recheck: second, FirstWant: 16, MaxWant: 1 << 20})}
		g.Cond = sync.NewCond(&g.Mutex)
		all[id], inbox[i], index[id] = g, make(chan Answer, 100_000), i
	}
	// say sends what is due; with the gateway's lock.
	say := func(g *gateway) {
		for m, ok := g.purse.Next(1); ok; m, ok = g.purse.Next(1) {
			ledger.Lock()
			ledger.sequence++
			for _, a := range ledger.escrow.Apply(Entry{Sequence: ledger.sequence, Time: 1, Ask: &m}).Answers {
				a.Epoch = 1
				inbox[index[a.Gateway]] <- a
			}
			ledger.Unlock()
		}
	}
	var hearing, calling sync.WaitGroup
	var admitted atomic.Int64
	for id, g := range all {
		hearing.Go(func() {
			for a := range inbox[index[id]] {
				g.Lock()
				g.purse.Receive(a, 1)
				g.Broadcast()
				say(g)
				g.Unlock()
			}
		})
		for range callers {
			calling.Go(func() {
				parts := []Part{{g.purse, 1}}
				for {
					out, _ := Take(parts, 1)
					switch {
					case out.OK():
						admitted.Add(1)
						if out == AdmittedLow {
							g.Lock()
							say(g)
							g.Unlock()
						}
						continue
					case out == Refused:
						return
					}
					g.Lock()
					if g.purse.Outcome(1, 1) == Fetch {
						g.purse.Need(1, never)
						say(g)
						g.Wait()
					}
					g.Unlock()
				}
			})
		}
	}
	calling.Wait()
	for i := range inbox {
		close(inbox[i])
	}
	hearing.Wait()
	s := ledger.escrow.State()
	if admitted.Load() != amount || s.Counts.DeniedEarly != 0 {
		t.Errorf("%d calls were admitted of %d: %+v", admitted.Load(), amount, s)
	}
	t.Logf("%d ledger entries, %+v", ledger.sequence, s.Counts)
}

// Not in parallel with other tests: they would keep the calls from meeting.
func TestConcurrentTakesNeitherMakeNorLoseUnits(t *testing.T) {
	const units, callers = 4_000_000, 4
	p := filled(1, units)[0]
	var taken atomic.Int64
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			parts := []Part{{p, 1}}
			for n := int64(0); ; n++ {
				if out, _ := Take(parts, 1); !out.OK() {
					taken.Add(n)
					return
				}
			}
		})
	}
	all.Wait()
	if taken.Load() != units || p.used.Load() != units || p.free.Load() != 0 {
		t.Errorf("%d of %d units were taken: %d used, %d free", taken.Load(), units, p.used.Load(), p.free.Load())
	}
}

// All that may be called at the same time, at the same time.
func TestConcurrentCallsNeitherMakeNorLoseUnits(t *testing.T) {
	t.Parallel()
	const units, callers = 500_000, 8
	purses := filled(2, units)
	hs := NewHolds(callers)
	var used [2]atomic.Int64
	var all sync.WaitGroup
	for n := range callers {
		all.Go(func() {
			parts := []Part{{purses[0], 1}, {purses[1], 1}}
			for i := n; ; i++ {
				switch i % 3 {
				case 0:
					if out, _ := Take(parts, 1); !out.OK() {
						return
					}
					used[0].Add(1)
					used[1].Add(1)
				case 1: // fails as a whole
					if out, _ := Take([]Part{{purses[1], 1}, {purses[0], units + 1}}, 1); out.OK() {
						t.Error("taken")
						return
					}
				case 2:
					h, out, _ := hs.Reserve([]Part{{purses[0], 5}, {purses[1], 5}}, 1, 100)
					if !out.OK() {
						return
					}
					cost := []int64{int64(i % 8), int64(i % 6)}
					h.Settle(cost, 2)
					used[0].Add(cost[0])
					used[1].Add(cost[1])
				}
			}
		})
	}
	all.Wait()
	for i, p := range purses {
		free, spent, over := p.free.Load(), p.used.Load(), p.over.Load()
		if free+spent != units || spent+over != used[i].Load() || p.held.Load() != 0 {
			t.Errorf("purse %d: %d free, %d used, %d over, %d held; %d were used of %d", i, free, spent, over, p.held.Load(), used[i].Load(), units)
		}
	}
}

// Many reservations are open, and every few milliseconds somebody looks whether one has
// passed its deadline.
func BenchmarkSweep(b *testing.B) {
	const open = 50_000
	parts := []Part{{filled(1, 1<<50)[0], 10}}
	hs := NewHolds(open)
	for i := range open {
		if _, out, _ := hs.Reserve(parts, 1, 1000+Micros(i)); !out.OK() {
			b.Fatal(out)
		}
	}
	for b.Loop() {
		hs.Sweep(999)
	}
}

// So many reservations are open that there is no room for another one.
func BenchmarkReserveWhereIsNoRoom(b *testing.B) {
	const open = 50_000
	parts := []Part{{filled(1, 1<<50)[0], 10}}
	hs := NewHolds(open)
	for range open {
		hs.Reserve(parts, 1, 1000)
	}
	for b.Loop() {
		if _, out, _ := hs.Reserve(parts, 1, 1000); out != Full {
			b.Fatal(out)
		}
	}
}
