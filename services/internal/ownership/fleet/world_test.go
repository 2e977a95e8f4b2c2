package fleet

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
	over      map[string]bool // sessions that were ended or fenced
	log       []kept
	members   []*simulated
	tokens    []uint64 // newest of each shard
	acquired  []acquisition
	fences    int
	lapses    int
	conflicts int
	sole      bool
	longest   []time.Duration // since when a shard has no owner; -1: it has one
}

type kept struct {
	Entry
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
	m       *Machine
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
		t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), shards: shards, timing: timing.WithDefaults(),
		latency: 3 * time.Millisecond, drainMax: 20 * time.Millisecond, skew: 0.08,
		store: map[string]kept{}, over: map[string]bool{}, tokens: make([]uint64, shards), longest: make([]time.Duration, shards),
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
	x.m = New(x.clock(), Config{Member: name, Shards: w.shards, Timing: w.timing, Sole: w.sole, NewID: func() string {
		w.ids++
		return fmt.Sprintf("%s-%d", name, w.ids)
	}})
	w.members = slices.DeleteFunc(w.members, func(y *simulated) bool { return y.name == name && y.dead })
	w.members = append(w.members, x)
	x.input(func(Instant, *Effects) {})
	return x
}

func (x *simulated) clock() Instant { return x.offset + time.Duration(float64(x.w.now)*x.rate) }

func (x *simulated) kill() { x.dead = true }

// input hands something to the machine; a paused member takes it when it wakes.
func (x *simulated) input(f func(now Instant, fx *Effects)) {
	if x.dead {
		return
	}
	if x.paused > x.w.now {
		// In any order: timers and sockets are not ordered among each other.
		x.w.after(x.paused-x.w.now+x.w.upTo(time.Microsecond), func() { x.input(f) })
		return
	}
	x.w.touched = x
	var fx Effects
	now := x.clock()
	f(now, &fx)
	x.m.Step(now, &fx)
	x.do(&fx)
	if x.m.done {
		x.dead = true
		return
	}
	x.wake++
	wake := x.wake
	x.w.after(max(time.Duration(float64(x.m.Next(now)-now)/x.rate), time.Microsecond), func() {
		if wake == x.wake {
			x.input(func(Instant, *Effects) {})
		}
	})
}

func (x *simulated) do(fx *Effects) {
	w := x.w
	for _, n := range fx.Notes {
		switch n.Kind {
		case NoteFenced:
			w.fences++
		case NoteLapsed:
			w.lapses++
		}
	}
	for _, tn := range fx.Acquire {
		if tn.Token <= w.tokens[tn.Shard] {
			w.fatalf("%s owns shard %d with token %d after %d", x.name, tn.Shard, tn.Token, w.tokens[tn.Shard])
		}
		w.tokens[tn.Shard] = tn.Token
		w.acquired = append(w.acquired, acquisition{w.now, tn.Shard, x.name})
		if x.runs[tn.Shard] != 0 {
			w.fatalf("%s runs shard %d twice", x.name, tn.Shard)
		}
		x.lastRun++
		x.runs[tn.Shard] = x.lastRun
		if w.chance(w.failures) {
			x.end(tn.Shard, w.upTo(time.Second), true, false)
		}
	}
	for _, h := range fx.Drain {
		x.end(h.Shard, w.upTo(w.drainMax), false, false)
	}
	for _, s := range fx.Revoke {
		x.end(s, w.upTo(20*time.Millisecond), false, true)
	}
	if fx.StandbyChanged {
		x.standby = fx.Standby
	}
	for _, wr := range fx.Writes {
		x.send(wr)
	}
	if fx.Poll {
		x.poll()
	}
}

// end lets a callback return.
func (x *simulated) end(s uint32, d time.Duration, failed, cut bool) {
	run := x.runs[s]
	x.w.after(d, func() {
		x.input(func(now Instant, fx *Effects) {
			if run != 0 && x.runs[s] == run {
				x.runs[s] = 0
				x.m.Returned(now, s, failed, cut, fx)
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

func (x *simulated) send(wr Write) {
	w := x.w
	x.waiting[wr.ID] = true
	answer := func(revision uint64, result Outcome) {
		x.input(func(now Instant, fx *Effects) {
			if x.waiting[wr.ID] {
				delete(x.waiting, wr.ID)
				x.m.Wrote(now, wr.ID, revision, result, fx)
			}
		})
	}
	w.after(w.timing.Request(), func() { answer(0, Unknown) })
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
		result := Stored
		if !ok {
			w.conflicts++
			result = Conflict
		}
		if d, ok := x.trip(); ok {
			w.after(d, func() {
				if x.cut <= w.now {
					answer(revision, result)
				}
			})
		}
	})
}

func (w *world) put(wr Write) (uint64, bool) {
	old := w.store[wr.Key]
	if old.removed {
		old.Revision = 0
	}
	if old.Revision != wr.Expect {
		return 0, false
	}
	if _, rec, _, _, err := parse(Entry{Key: wr.Key, Value: wr.Value}, w.shards); err == nil && rec != nil {
		// Whoever knows it to be over takes what it claims, for ever.
		if w.over[wr.Key] && !rec.over() {
			w.fatalf("%s was over and is %s again", wr.Key, rec.State)
		}
		w.over[wr.Key] = rec.over()
	}
	w.sequence++
	k := kept{Entry: Entry{wr.Key, w.sequence, wr.Value}, at: w.now}
	w.store[wr.Key] = k
	w.log = append(w.log, k)
	for _, x := range w.members {
		if d, ok := x.trip(); ok {
			w.after(d, func() {
				if x.cut <= w.now {
					x.input(func(now Instant, fx *Effects) { x.m.Saw(now, k.Entry, fx) })
				}
			})
		}
	}
	if wr.TTL > 0 {
		w.after(wr.TTL, func() {
			if w.store[wr.Key].Revision == k.Revision {
				k.removed, k.at = true, w.now
				w.store[wr.Key] = k
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
	answer := func(all []Entry, ok bool) {
		x.input(func(now Instant, fx *Effects) {
			if open {
				open = false
				x.m.Read(now, asked, all, ok, fx)
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
func (w *world) state() []Entry {
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
			newest[k.Key] = k
		}
	}
	var all []Entry
	for _, k := range newest {
		if !k.removed {
			all = append(all, k.Entry)
		}
	}
	slices.SortFunc(all, func(a, b Entry) int { return int(a.Revision) - int(b.Revision) })
	return all
}
