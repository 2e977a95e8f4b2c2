package ownership

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// world simulates members, their clocks and callbacks, the bucket and the
// network between them. Everything follows from the seed.
type world struct {
	t      *testing.T
	seed   uint64
	rng    *rand.Rand
	now    time.Duration // true time; no member sees it
	queue  events
	order  int
	shards int
	timing Timing
	ids    int
	// touched is who was given something by the newest event.
	touched *simulated

	// network
	latency   time.Duration // at most, each way
	drop      float64       // of a message
	slow      float64       // of a message: up to 3 s
	stale     float64       // of a reading: up to 2 s old
	outage    time.Duration // the store answers nobody until then
	drainMax  time.Duration
	failures  float64 // of a callback, by itself
	skew      float64 // clocks run at 1±skew
	sequence  uint64
	store     map[string]kept
	log       []kept
	members   []*simulated
	tokens    []uint64 // newest of each shard
	acquired  []acquisition
	fences    int
	lapses    int
	conflicts int
	longest   []time.Duration // since when a shard has no owner; -1: it has one
}

type kept struct {
	entry
	at      time.Duration
	removed bool // by its TTL
}

type acquisition struct {
	at     time.Duration
	shard  uint32
	member string
}

type simulated struct {
	w       *world
	name    string
	m       *machine
	rate    float64
	offset  time.Duration
	dead    bool
	paused  time.Duration // until
	cut     time.Duration // until
	wake    int           // the valid timer
	runs    map[uint32]int
	lastRun int
	waiting map[uint64]bool
	standby []uint32
}

type event struct {
	at    time.Duration
	order int
	do    func()
}
type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	old := *e
	x := old[len(old)-1]
	*e = old[:len(old)-1]
	return x
}

func newWorld(t *testing.T, seed uint64, shards int, timing Timing) *world {
	w := &world{
		t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), shards: shards, timing: timing.withDefaults(),
		latency: 3 * time.Millisecond, drainMax: 20 * time.Millisecond, skew: 0.08,
		store: map[string]kept{}, tokens: make([]uint64, shards), longest: make([]time.Duration, shards),
	}
	return w
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("seed %d, at %v: %s", w.seed, w.now, fmt.Sprintf(format, args...))
}

func (w *world) after(d time.Duration, do func()) {
	w.order++
	heap.Push(&w.queue, event{w.now + d, w.order, do})
}

func (w *world) upTo(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return time.Duration(w.rng.Int64N(int64(d)))
}

func (w *world) chance(p float64) bool { return p > 0 && w.rng.Float64() < p }

// run lets time pass, and looks after every event.
func (w *world) run(d time.Duration) {
	end := w.now + d
	for len(w.queue) > 0 && w.queue[0].at <= end {
		e := heap.Pop(&w.queue).(event)
		w.now, w.touched = e.at, nil
		e.do()
		w.look()
	}
	w.now = end
}

// until runs until a condition holds and returns how long it took.
func (w *world) until(limit time.Duration, what string, cond func() bool) time.Duration {
	w.t.Helper()
	start := w.now
	for w.touched = nil; w.touched == nil && w.now > start || !cond(); {
		if len(w.queue) == 0 || w.queue[0].at > start+limit {
			w.fatalf("not within %v: %s", limit, what)
		}
		e := heap.Pop(&w.queue).(event)
		w.now, w.touched = e.at, nil
		e.do()
		w.look()
	}
	return w.now - start
}

// look checks that nobody believes what another believes. Only who was given
// something can have come to believe more.
func (w *world) look() {
	x := w.touched
	if x == nil || x.dead || !x.m.proven(x.clock()) {
		return
	}
	for _, y := range w.members {
		if y == x || y.dead || !y.m.proven(y.clock()) {
			continue
		}
		for s := range w.shards {
			if x.m.slots[s].phase.tenure() && y.m.slots[s].phase.tenure() {
				w.fatalf("%s and %s both may act on shard %d", x.name, y.name, s)
			}
		}
	}
}

func (w *world) owner(s int) string {
	for _, x := range w.members {
		if !x.dead && x.m.believes(x.clock(), uint32(s)) {
			return x.name
		}
	}
	return ""
}

func (w *world) owners() map[string]int {
	n := map[string]int{}
	for s := range w.shards {
		n[w.owner(s)]++
	}
	return n
}

func (w *world) allOwned() bool { return w.owners()[""] == 0 }

func (w *world) balanced() bool {
	n := w.owners()
	low, high := w.shards, 0
	for _, x := range w.members {
		if !x.dead {
			low, high = min(low, n[x.name]), max(high, n[x.name])
		}
	}
	return n[""] == 0 && high-low <= 1
}

// start adds a member, or starts one again.
func (w *world) start(name string) *simulated {
	x := &simulated{
		w: w, name: name, runs: map[uint32]int{}, waiting: map[uint64]bool{},
		rate: 1 + w.skew*(2*w.rng.Float64()-1), offset: time.Duration(w.rng.Int64N(int64(time.Hour))) - w.now,
	}
	x.m = newMachine(x.clock(), config{member: name, shards: w.shards, timing: w.timing, newID: func() string {
		w.ids++
		return fmt.Sprintf("%s-%d", name, w.ids)
	}})
	w.members = slices.DeleteFunc(w.members, func(y *simulated) bool { return y.name == name && y.dead })
	w.members = append(w.members, x)
	x.input(func(instant, *effects) {})
	return x
}

func (x *simulated) clock() instant { return x.offset + time.Duration(float64(x.w.now)*x.rate) }

func (x *simulated) kill() { x.dead = true }

// input hands something to the machine; a paused member takes it when it wakes.
func (x *simulated) input(f func(now instant, fx *effects)) {
	if x.dead {
		return
	}
	if x.paused > x.w.now {
		// In any order: timers and sockets are not ordered among each other.
		x.w.after(x.paused-x.w.now+x.w.upTo(time.Microsecond), func() { x.input(f) })
		return
	}
	x.w.touched = x
	var fx effects
	now := x.clock()
	f(now, &fx)
	x.m.step(now, &fx)
	x.do(&fx)
	if x.m.done {
		x.dead = true
		return
	}
	x.wake++
	wake := x.wake
	x.w.after(max(time.Duration(float64(x.m.next(now)-now)/x.rate), time.Microsecond), func() {
		if wake == x.wake {
			x.input(func(instant, *effects) {})
		}
	})
}

func (x *simulated) do(fx *effects) {
	w := x.w
	for _, n := range fx.notes {
		switch n.kind {
		case noteFenced:
			w.fences++
		case noteLapsed:
			w.lapses++
		}
	}
	for _, tn := range fx.acquire {
		if tn.token <= w.tokens[tn.shard] {
			w.fatalf("%s owns shard %d with token %d after %d", x.name, tn.shard, tn.token, w.tokens[tn.shard])
		}
		w.tokens[tn.shard] = tn.token
		w.acquired = append(w.acquired, acquisition{w.now, tn.shard, x.name})
		if x.runs[tn.shard] != 0 {
			w.fatalf("%s runs shard %d twice", x.name, tn.shard)
		}
		x.lastRun++
		x.runs[tn.shard] = x.lastRun
		if w.chance(w.failures) {
			x.end(tn.shard, w.upTo(time.Second), true, false)
		}
	}
	for _, s := range fx.drain {
		x.end(s, w.upTo(w.drainMax), false, false)
	}
	for _, s := range fx.revoke {
		x.end(s, w.upTo(20*time.Millisecond), false, true)
	}
	if fx.standbyChanged {
		x.standby = fx.standby
	}
	for _, wr := range fx.writes {
		x.send(wr)
	}
	if fx.poll {
		x.poll()
	}
}

// end lets a callback return.
func (x *simulated) end(s uint32, d time.Duration, failed, cut bool) {
	run := x.runs[s]
	x.w.after(d, func() {
		x.input(func(now instant, fx *effects) {
			if run != 0 && x.runs[s] == run {
				x.runs[s] = 0
				x.m.returned(now, s, failed, cut, fx)
			}
		})
	})
}

// trip is how long a message takes; false: it is lost.
func (x *simulated) trip() (time.Duration, bool) {
	w := x.w
	if x.cut > w.now || w.chance(w.drop) {
		return 0, false
	}
	if w.chance(w.slow) {
		return w.upTo(3 * time.Second), true
	}
	return w.upTo(w.latency), true
}

func (x *simulated) send(wr write) {
	w := x.w
	x.waiting[wr.id] = true
	answer := func(revision uint64, result outcome) {
		x.input(func(now instant, fx *effects) {
			if x.waiting[wr.id] {
				delete(x.waiting, wr.id)
				x.m.wrote(now, wr.id, revision, result, fx)
			}
		})
	}
	w.after(w.timing.request(), func() { answer(0, unknown) })
	d, ok := x.trip()
	if !ok {
		return
	}
	w.after(d, func() {
		if x.cut > w.now {
			return
		}
		if w.outage > w.now {
			// Lost with the leader, or stored by the next one.
			if w.rng.IntN(2) == 0 {
				w.after(w.outage-w.now+w.upTo(50*time.Millisecond), func() { w.put(wr) })
			}
			return
		}
		revision, ok := w.put(wr)
		result := stored
		if !ok {
			w.conflicts++
			result = conflict
		}
		if d, ok := x.trip(); ok {
			w.after(d, func() { answer(revision, result) })
		}
	})
}

func (w *world) put(wr write) (uint64, bool) {
	old := w.store[wr.key]
	if old.removed {
		old.revision = 0
	}
	if old.revision != wr.expect {
		return 0, false
	}
	w.sequence++
	k := kept{entry: entry{wr.key, w.sequence, wr.value}, at: w.now}
	w.store[wr.key] = k
	w.log = append(w.log, k)
	for _, x := range w.members {
		if d, ok := x.trip(); ok {
			w.after(d, func() {
				if x.cut <= w.now {
					x.input(func(now instant, fx *effects) { x.m.saw(now, k.entry, fx) })
				}
			})
		}
	}
	if wr.ttl > 0 {
		w.after(wr.ttl, func() {
			if w.store[wr.key].revision == k.revision {
				k.removed, k.at = true, w.now
				w.store[wr.key] = k
				w.log = append(w.log, k)
			}
		})
	}
	return w.sequence, true
}

func (x *simulated) poll() {
	w := x.w
	asked := x.clock()
	open := true
	answer := func(all []entry, ok bool) {
		x.input(func(now instant, fx *effects) {
			if open {
				open = false
				x.m.read(now, asked, all, ok, fx)
			}
		})
	}
	w.after(time.Second, func() { answer(nil, false) })
	d, ok := x.trip()
	if !ok {
		return
	}
	w.after(d, func() {
		if x.cut > w.now {
			return
		}
		if d, ok := x.trip(); ok {
			all := w.state()
			w.after(d, func() { answer(all, true) })
		}
	})
}

// state is what a replica answers.
func (w *world) state() []entry {
	at := w.now
	if w.chance(w.stale) {
		at -= w.upTo(2 * time.Second)
	}
	newest := map[string]kept{}
	if at == w.now {
		newest = w.store
	} else {
		for _, k := range w.log {
			if k.at > at {
				break
			}
			newest[k.key] = k
		}
	}
	var all []entry
	for _, k := range newest {
		if !k.removed {
			all = append(all, k.entry)
		}
	}
	slices.SortFunc(all, func(a, b entry) int { return int(a.revision) - int(b.revision) })
	return all
}
