package lease

import (
	"flag"
	"math/rand/v2"
	"testing"
)

var (
	simSeed  = flag.Uint64("lease.seed", 0, "run one simulated world only")
	simSeeds = flag.Int("lease.seeds", 1000, "simulated worlds of each kind")
)

// random returns a small world with all that can go wrong.
func random(seed uint64) plan {
	r := rand.New(rand.NewPCG(seed, 1))
	on := func(n int) int {
		if r.IntN(2) == 0 {
			return 0
		}
		return r.IntN(n) + 1
	}
	p := plan{
		seed: seed, gateways: 1 + r.IntN(4), clients: 1 + r.IntN(5), windows: 1 + r.IntN(3), levels: 1 + r.IntN(2), width: Micros(300+r.IntN(1200)) * ms,
		amount: 1 + r.Int64N(200), think: Micros(1+r.IntN(20)) * ms, most: 1 + r.Int64N(3), reserve: on(1000), bound: 1 + r.Int64N(20),
	}
	p.faults = faults{
		delay: Micros(1+r.IntN(30)) * ms, loss: on(200), duplicate: on(300), crashes: on(3000), spool: on(1000), ownerCrashes: on(4000),
		zombies: r.IntN(2) == 0, amounts: on(3000), lateHolds: on(200), lostHolds: on(50), void: on(200), above: on(100), deaf: on(2000),
	}
	if r.IntN(2) == 0 {
		p.faults.skew = Micros(r.Int64N(int64(simSkew) + 1))
	}
	return p
}

func TestWhateverDiesNoMoreIsAdmittedThanIsAllowed(t *testing.T) {
	t.Parallel()
	worlds(t, "exact", random)
}

// counted returns a world in which the log counts calls beside their gateways'
// words: before them, after them, and when they are dead.
func counted(seed uint64) plan {
	p := random(seed)
	r := rand.New(rand.NewPCG(seed, 2))
	p.faults.frames = Micros(1+r.IntN(int(1+r.Int64N(2000)))) * ms
	p.faults.complete = r.IntN(1001)
	if r.IntN(2) == 0 {
		p.reserve = 0
	}
	p.faults.release = r.IntN(4) == 0
	return p
}

func TestUseThatTheLogCountsIsSettledOnce(t *testing.T) {
	t.Parallel()
	worlds(t, "counted", counted)
}

// sealed returns a world in which units are used up to marks, which is all that is
// known of a gateway that was killed: its calls may be in the log or not.
func sealed(seed uint64) plan {
	p := counted(seed)
	r := rand.New(rand.NewPCG(seed, 3))
	p.faults.journal = Micros(1+r.IntN(1+r.IntN(100))) * ms
	p.faults.marked = 1000 - r.IntN(500)
	p.faults.crashes = max(p.faults.crashes, 1500)
	if r.IntN(2) == 0 {
		p.amount *= 20
	}
	if p.faults.release {
		p.reserve = 0 // else units are released that calls under way may yet use, beyond the mark
	}
	return p
}

func TestMarksGiveBackWhatAKilledGatewayCantHaveUsed(t *testing.T) {
	t.Parallel()
	if sum := worlds(t, "marks", sealed); sum.marks == 0 || sum.given == 0 {
		t.Errorf("%d marks gave back %d units", sum.marks, sum.given)
	}
}

// rested returns a world whose purses are dropped, whenever nothing is in them, and made
// of their records again.
func rested(seed uint64) plan {
	p := sealed(seed)
	if seed%2 == 0 {
		p.faults.journal, p.faults.marked = 0, 0
	}
	p.faults.rests = true
	return p
}

func TestAPurseThatRestedGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	if sum := worlds(t, "rests", rested); sum.rests == 0 {
		t.Error("none rested")
	}
}

func TestTheLeasedTierExceedsByItsExposureAtMost(t *testing.T) {
	t.Parallel()
	worlds(t, "leased", func(seed uint64) plan {
		p := random(seed)
		p.faults.release = true
		return p
	})
}

func TestAWrongClockAdmitsNoMore(t *testing.T) {
	t.Parallel()
	worlds(t, "wrong clocks", func(seed uint64) plan {
		p := random(seed)
		p.faults.skew = 30 * simSkew
		return p
	})
}

func worlds(t *testing.T, name string, make func(uint64) plan) (sum world) {
	t.Helper()
	first, n := uint64(1), uint64(*simSeeds)
	if *simSeed != 0 {
		first, n = *simSeed, 1
	}
	if raceDetector {
		n = min(n, 100) // there is one goroutine in a world
	}
	var s Counts
	for seed := first; seed < first+n; seed++ {
		w := newWorld(make(seed))
		w.run()
		if w.failure != "" {
			t.Fatalf("%s; run it alone with -args -lease.seed=%d\n%+v", w.failure, seed, w.plan)
		}
		checkMessages(t, w)
		sum.admittedCalls += w.admittedCalls
		sum.refused += w.refused
		sum.refusedEarly += w.refusedEarly
		sum.falseEarly += w.falseEarly
		sum.timeouts += w.timeouts
		sum.asks += w.asks
		sum.answers += w.answers
		sum.marks += w.marks
		sum.given += w.given
		sum.rests += w.rests
		for _, e := range w.fold {
			c := e.State().Counts
			s.Grants += c.Grants
			s.Recalls += c.Recalls
			s.DeniedEarly += c.DeniedEarly
			s.DeniedFinal += c.DeniedFinal
			s.Released += c.Released
			s.Late += c.Late
			s.Above += c.Above
			s.Lowered += c.Lowered
		}
	}
	t.Logf("%s: %d worlds from seed %d: %d calls admitted, %d refused, %d early (%d of them wrongly), %d gave up waiting; %d asks, %d answers; %+v",
		name, n, first, sum.admittedCalls, sum.refused, sum.refusedEarly, sum.falseEarly, sum.timeouts, sum.asks, sum.answers, s)
	return sum
}

// checkMessages: a gateway speaks because it gets, gives back or is refused
// something, or else no more often than it may repeat itself.
func checkMessages(t *testing.T, w *world) {
	t.Helper()
	events, purses := int64(0), int64(0)
	for _, e := range w.fold {
		c := e.State().Counts
		events += c.Grants + c.Recalls + c.DeniedEarly + c.DeniedFinal
	}
	for _, g := range w.gateways {
		for _, p := range g.purses {
			if p != nil {
				purses++
			}
		}
	}
	if most := 3*events + purses*int64(20+w.width/(40*ms)); int64(w.asks) > most {
		t.Errorf("seed %d: %d messages about %d events and %d leases", w.seed, w.asks, events, purses)
	}
}

// quiet returns a large world in which nothing dies and nothing is lost.
func quiet(seed uint64) plan {
	p := plan{
		seed: seed, gateways: 3, clients: 64, amount: 10_000, windows: 1, levels: 1, width: 3 * second, think: 10 * ms, most: 1,
	}
	p.faults = faults{delay: 2 * ms, skew: 10 * ms}
	return p
}

// A test that can't fail proves nothing: each way to break the protocol is found.
func TestTheSimulationFindsABrokenProtocol(t *testing.T) {
	t.Parallel()
	for broken, make := range map[string]func(uint64) plan{
		"a frame is counted twice":     counted,
		"an end before all is counted": counted,

		"units are used before their mark is noted": sealed,
		"a purse that rests forgets its lease":      rested,

		"a unit is used twice":                random,
		"use goes on after the lease's end":   random,
		"the spool forgets":                   random,
		"grants die with the owner":           random,
		"a restarted gateway keeps its name":  random,
		"answered before it is in the ledger": random,
		"who ends has used nothing":           random,
	} {
		t.Run(broken, func(t *testing.T) {
			t.Parallel()
			for seed := uint64(1); seed <= 300; seed++ {
				p := make(seed)
				p.broken = broken
				w := newWorld(p)
				w.run()
				if w.failure != "" {
					t.Log(w.failure)
					return
				}
			}
			t.Error("300 worlds did not show it")
		})
	}
}

func TestWithoutFaultsAllButAThousandthIsAdmitted(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*plan){
		"counted calls":                  func(p *plan) {},
		"counted calls, a slow network":  func(p *plan) { p.faults.delay = 25 * ms },
		"calls of several units":         func(p *plan) { p.most = 5 },
		"twenty gateways":                func(p *plan) { p.gateways, p.clients = 20, 10 },
		"two limits on the path":         func(p *plan) { p.levels = 2 },
		"units up to marks":              func(p *plan) { p.faults.journal = 10 * ms },
		"one gateway that does all":      func(p *plan) { p.gateways, p.clients = 1, 192 },
		"reservations":                   func(p *plan) { p.reserve, p.bound = 1000, 20 },
		"reservations and counted calls": func(p *plan) { p.reserve, p.bound, p.amount = 500, 100, 100_000 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(2) {
				p := quiet(seed + 1)
				change(&p)
				w := newWorld(p)
				w.run()
				if w.failure != "" {
					t.Fatalf("%s\n%+v", w.failure, w.plan)
				}
				checkMessages(t, w)
				s := w.fold[0].State()
				if s.Settled < s.Amount-s.Amount/1000 {
					t.Errorf("seed %d: only %d of %d units could be used", p.seed, s.Settled, s.Amount)
				}
				if w.falseEarly != 0 {
					t.Errorf("seed %d: %d calls were refused that would have fitted", p.seed, w.falseEarly)
				}
				t.Logf("seed %d: %d of %d units settled; %d calls admitted, %d refused, %d early (%d wrongly), %d gave up; %d asks, %d answers, %+v",
					p.seed, s.Settled, s.Amount, w.admittedCalls, w.refused, w.refusedEarly, w.falseEarly, w.timeouts, w.asks, w.answers, s.Counts)
			}
		})
	}
}
