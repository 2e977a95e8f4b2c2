package fleet

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var (
	oneSeed = flag.Uint64("ownership.seed", 0, "run the simulations with this seed only")
	seeds   = flag.Int("ownership.seeds", 0, "how many seeds the simulations run with")
)

// each runs a simulation with many seeds; one that fails is printed and runs
// again with -ownership.seed.
func each(t *testing.T, n int, run func(t *testing.T, seed uint64)) {
	t.Parallel()
	if *oneSeed != 0 {
		run(t, *oneSeed)
		return
	}
	if *seeds > 0 {
		n = *seeds
	}
	first := rand.Uint64N(1 << 48)
	t.Logf("seeds %d to %d", first, first+uint64(n)-1)
	for i := range n {
		run(t, first+uint64(i))
	}
}

func (w *world) member(name string) *simulated {
	for _, x := range w.members {
		if x.name == name {
			return x
		}
	}
	w.fatalf("nobody is called %s", name)
	return nil
}

// fleet starts members and waits until they share the shards.
func (w *world) fleet(n int) {
	for i := range n {
		name := fmt.Sprintf("m%d", i)
		w.after(w.upTo(time.Second), func() { w.start(name) })
	}
	w.run(time.Second)
	w.until(30*time.Second, "every member has its share", w.balanced)
	w.run(15 * time.Second) // all have settled and dwelt
	w.acquired, w.fences, w.lapses = nil, 0, 0
}

// The creation of a session is stored, but its member does not learn of it; it is
// fenced, and the server removes the tombstone at last. When the member is heard
// again, the condition "there is none" of a second creation would be met: the
// session would live on under an id that others know to be dead.
func TestAMemberThatNeverLearnsOfItsSessionComesUnderAnotherOne(t *testing.T) {
	each(t, 20, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 12, Timing{})
		w.fleet(2)
		x := w.start("new")
		w.until(time.Second, "its session is stored", func() bool { return w.store[sessionKey(x.m.own.id)].Revision > 0 })
		x.cut = w.now + w.timing.garbage() + w.timing.TTL + w.upTo(10*time.Second)
		w.run(x.cut - w.now)
		w.until(time.Minute, "the new one has its share", func() bool { return w.owners()["new"] == 4 })
	})
}

func TestNoTwoMembersEverBelieveToOwnAShard(t *testing.T) {
	each(t, 4, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 12, Timing{})
		n := 2 + w.rng.IntN(5)
		w.fleet(n)
		w.drop, w.slow, w.stale = 0.3*w.rng.Float64(), 0.2*w.rng.Float64(), 0.3*w.rng.Float64()
		w.failures = 0.02 * w.rng.Float64()
		w.drainMax = w.upTo(8 * time.Second)
		for end := w.now + 90*time.Second; w.now < end; {
			x := w.members[w.rng.IntN(len(w.members))]
			switch w.rng.IntN(7) {
			case 0:
				x.kill()
				w.after(w.upTo(4*time.Second), func() {
					if x.dead {
						w.start(x.name)
					}
				})
			case 1:
				x.paused = w.now + w.upTo(6*time.Second)
			case 2:
				x.cut = w.now + w.upTo(6*time.Second)
			case 3:
				w.outage = w.now + w.upTo(7*time.Second)
			case 4:
				x.input(func(now Instant, _ *Effects) { x.m.Leave(now) })
				w.after(w.upTo(4*time.Second), func() {
					x.kill()
					w.start(x.name)
				})
			case 5:
				// The wall clock of the servers jumps: a session is gone too soon.
				for _, k := range w.state() {
					if id := k.Key; len(id) > 8 && id[:8] == SessionPrefix && w.rng.IntN(4) == 0 && w.mayRemove(k) {
						w.store[id] = kept{Entry: k, at: w.now, removed: true}
						w.log = append(w.log, w.store[id])
					}
				}
			}
			w.run(w.upTo(3 * time.Second))
		}
		// Calm: everything is owned soon, shared before long, and stays. First
		// whoever is paused wakes, and whoever is to be started again is; those
		// that have come to live twice under one name go but for one.
		w.drop, w.slow, w.stale, w.failures, w.drainMax = 0, 0, 0, 0, 100*time.Millisecond
		w.run(11 * time.Second)
		for i := range n {
			name := fmt.Sprintf("m%d", i)
			here := false
			for _, x := range w.members {
				if x.name != name || x.dead {
					continue
				}
				if here || x.m.leaving {
					x.kill()
				}
				here = here || !x.dead
			}
			if !here {
				w.start(name)
			}
		}
		w.until(25*time.Second, "every shard is owned", w.allOwned)
		w.until(12*time.Minute, "every member has its share", w.balanced)
		w.run(20 * time.Second)
		w.acquired = nil
		w.run(time.Minute)
		if len(w.acquired) > 0 || !w.balanced() {
			w.fatalf("shards move though nothing happens: %v", w.acquired)
		}
	})
}

// mayRemove: a session may vanish early only after its member can act no more;
// else the servers' clocks have jumped by more than what is assumed of them.
func (w *world) mayRemove(e Entry) bool { return w.now-w.store[e.Key].at > w.timing.TTL }

func TestTheShardsOfAKilledMemberAreOwnedAgainWithinTwoSeconds(t *testing.T) {
	var worst time.Duration
	each(t, 6, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 64, Timing{})
		n := 2 + w.rng.IntN(4)
		w.latency = 30 * time.Millisecond
		w.fleet(n)
		w.run(w.upTo(time.Second))
		victim := w.members[w.rng.IntN(n)]
		var had, heirs []uint32
		for s := range uint32(64) {
			if w.owner(int(s)) == victim.name {
				had = append(had, s)
			}
		}
		for _, x := range w.members {
			for _, s := range x.standby {
				if slices.Contains(had, s) {
					heirs = append(heirs, s)
				}
			}
		}
		slices.Sort(heirs)
		if !slices.Equal(had, heirs) {
			w.fatalf("%v have standbys, want %v", heirs, had)
		}
		standbys := map[uint32]string{}
		for _, x := range w.members {
			for _, s := range x.standby {
				if slices.Contains(had, s) {
					standbys[s] = x.name
				}
			}
		}
		victim.kill()
		took := w.until(2*time.Second, "every shard is owned again", w.allOwned)
		worst = max(worst, took)
		w.run(20 * time.Second)
		if len(w.acquired) != len(had) {
			w.fatalf("%d shards were lost, %d have moved", len(had), len(w.acquired))
		}
		for _, a := range w.acquired {
			if standbys[a.shard] != a.member {
				w.fatalf("shard %d went to %s, its standby was %s", a.shard, a.member, standbys[a.shard])
			}
		}
	})
	t.Logf("at most %v", worst)
}

func TestOneWhoJoinsIsGivenAtMostItsShare(t *testing.T) {
	each(t, 3, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 1+rand.New(rand.NewPCG(seed, 2)).IntN(100), Timing{})
		n := 1 + w.rng.IntN(5)
		w.fleet(n)
		w.start("new")
		w.run(w.timing.Settle / 2)
		if len(w.acquired) > 0 {
			w.fatalf("shards move before it has settled")
		}
		w.until(time.Minute, "every member has its share", w.balanced)
		w.run(30 * time.Second)
		if share := (w.shards + n) / (n + 1); len(w.acquired) > share {
			w.fatalf("%d of %d shards moved for one of %d members", len(w.acquired), w.shards, n+1)
		}
		for _, a := range w.acquired {
			if a.member != "new" {
				w.fatalf("shard %d moved to %s", a.shard, a.member)
			}
		}
	})
}

// Whose name nobody else can bear does not wait for its own last start to be silent.
func TestASoleMemberThatWasKilledHasItsShardsAgainAtOnce(t *testing.T) {
	each(t, 10, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 64, Timing{})
		w.sole = true
		w.start("m")
		w.until(time.Second, "every shard is owned", w.allOwned)
		w.run(w.upTo(10 * time.Second))
		w.member("m").kill()
		x := w.start("m")
		if n := x.m.Unowned(); n != 64 {
			w.fatalf("%d shards have no owner", n)
		}
		w.until(200*time.Millisecond, "every shard is owned again", w.allOwned)
		if n := x.m.Unowned(); n != 0 || x.m.Held() != 64 {
			w.fatalf("%d shards have no owner, %d are held", n, x.m.Held())
		}
	})
}

func TestAnOrderlyEndHandsOverAtOnceAndMovesNothingElse(t *testing.T) {
	each(t, 3, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 64, Timing{})
		n := 2 + w.rng.IntN(4)
		w.fleet(n)
		x := w.members[w.rng.IntN(n)]
		had := w.owners()[x.name]
		x.input(func(now Instant, _ *Effects) { x.m.Leave(now) })
		took := w.until(200*time.Millisecond, "it is gone and every shard is owned", func() bool { return x.dead && w.allOwned() })
		w.run(30 * time.Second)
		if len(w.acquired) != had || w.fences > 0 {
			w.fatalf("%d shards were handed over in %v, %d moved, %d sessions fenced", had, took, len(w.acquired), w.fences)
		}
	})
}

func TestAnOutageOfTheStoreMovesNothing(t *testing.T) {
	each(t, 3, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 64, Timing{})
		n := 2 + w.rng.IntN(4)
		w.fleet(n)
		before := make([]string, w.shards)
		for s := range before {
			before[s] = w.owner(s)
		}
		w.outage = w.now + 2*time.Second + w.upTo(20*time.Second)
		w.run(w.outage - w.now)
		if w.owners()[""] != w.shards {
			w.fatalf("somebody acts without proof: %v", w.owners())
		}
		w.until(2*time.Second, "every shard is owned again", w.allOwned)
		for s := range before {
			if w.owner(s) != before[s] {
				w.fatalf("shard %d was %s's and is %s's", s, before[s], w.owner(s))
			}
		}
		if w.fences > 0 {
			w.fatalf("%d sessions were fenced", w.fences)
		}
	})
}

func TestAnOutageThatAMemberDoesNotSurviveMovesOnlyWhatItHad(t *testing.T) {
	each(t, 3, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 64, Timing{})
		n := 2 + w.rng.IntN(4)
		w.fleet(n)
		before := make([]string, w.shards)
		for s := range before {
			before[s] = w.owner(s)
		}
		victim := w.members[w.rng.IntN(n)].name
		w.outage = w.now + 2*time.Second + w.upTo(10*time.Second)
		w.member(victim).kill()
		w.run(w.outage - w.now)
		// Who waits for an answer that was lost with the leader tries again
		// after a request's time.
		w.until(2*time.Second+w.timing.Request(), "every shard is owned again", w.allOwned)
		for s := range before {
			if before[s] != victim && w.owner(s) != before[s] {
				w.fatalf("shard %d was %s's and is %s's", s, before[s], w.owner(s))
			}
		}
	})
}

func TestOneWhoCrashesAgainAndAgainIsGivenLessAndLess(t *testing.T) {
	each(t, 1, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 60, Timing{})
		w.fleet(3)
		const minutes = 4
		for end := w.now + minutes*time.Minute; w.now < end; {
			w.run(3*time.Second + w.upTo(4*time.Second))
			w.member("m1").kill()
			w.run(w.upTo(4 * time.Second))
			w.start("m1")
		}
		// Its 20 shards leave it once; it may come to have some a few times
		// before its penalty is longer than it lives.
		if len(w.acquired) > 100 {
			w.fatalf("%d moves in %d minutes", len(w.acquired), minutes)
		}
		w.until(15*time.Minute, "it has its share again", w.balanced)
	})
}

func TestAShardThatFailsSomewhereGoesElsewhereAndComesBackLater(t *testing.T) {
	each(t, 6, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 9, Timing{})
		w.fleet(3)
		x := w.member(w.owner(4))
		x.end(4, 0, true, false)
		w.until(time.Second, "another owns it", func() bool { o := w.owner(4); return o != "" && o != x.name })
		w.until(2*time.Minute, "every member has its share", w.balanced)
		moves := len(w.acquired)
		w.run(2 * time.Minute)
		if len(w.acquired) != moves || moves > 3 {
			w.fatalf("%d, then %d moves", moves, len(w.acquired))
		}
	})
}

func TestAShardThatAMemberRefusesIsNeverItsAgain(t *testing.T) {
	each(t, 6, func(t *testing.T, seed uint64) {
		w := newWorld(t, seed, 9, Timing{})
		w.fleet(2)
		refuse := func(x *simulated) {
			x.input(func(now Instant, fx *Effects) {
				x.runs[4] = 0
				x.m.Returned(now, 4, true, false, fx)
				x.m.Refuse(now, 4)
			})
		}
		never := func(begin int, names ...string) {
			for _, a := range w.acquired[begin:] {
				if a.shard == 4 && slices.Contains(names, a.member) {
					w.fatalf("%s has the shard again, at %v", a.member, a.at)
				}
			}
		}
		first := w.member(w.owner(4))
		begin := len(w.acquired)
		refuse(first)
		w.until(time.Second, "the other owns it", func() bool { o := w.owner(4); return o != "" && o != first.name })
		second := w.member(w.owner(4))
		w.run(3 * time.Minute)
		never(begin, first.name)
		begin = len(w.acquired)
		refuse(second)
		w.run(3 * time.Minute)
		never(begin, first.name, second.name)
		if first.m.Unowned() == 0 {
			w.fatalf("a shard that nobody can have has an owner")
		}
		w.start("newer")
		w.until(5*time.Second, "one that can owns it", func() bool { return w.owner(4) == "newer" })
		w.run(time.Minute)
		never(begin, first.name, second.name)
	})
}
