package lane

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "seed of the simulation; 0: a new one")
	simWorld = flag.Int("sim.worlds", 150, "how many worlds are simulated")
)

// The simulation is a process with two lanes, a disk, a network and a ledger,
// all in memory, in which everything goes wrong by chance:
//
//   - messages to the ledger are lost, late, doubled and out of order, and so
//     are acknowledgements; the ledger refuses; the connection breaks
//   - the disk refuses; what was not yet synced is lost, or not, in a crash
//   - the process is killed, and the next one finds what is on the disk, and some of
//     what was noted of what is acknowledged
//
// In the end everything works for long enough. Then, after de-duplication:
// every call that was acknowledged or spooled is in the ledger exactly once and
// in order, no number was skipped, and memory never held more than its bound.
func TestSimulation(t *testing.T) {
	t.Parallel()
	seed := *simSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	world, passed := seed, 0
	defer func() {
		if t.Failed() {
			t.Logf("again with: go test -run TestSimulation -sim.seed=%d -sim.worlds=1", world)
		}
	}()
	for i := range *simWorld {
		world = seed + uint64(i)
		w := newWorld(t, world)
		w.run(700)
		passed += w.passed
		if t.Failed() {
			return
		}
	}
	if passed == 0 && *simWorld >= 100 {
		t.Error("no frame was known to be acknowledged")
	}
	t.Logf("%d worlds from seed %d on; %d frames were known to be acknowledged", *simWorld, seed, passed)
}

const simShards = 2

// entry of the simulated ledger.
type entry struct {
	producer ksuid.KSUID
	number   uint64
	calls    []string
	closing  bool
}

type message struct {
	lane   *Lane
	life   int // of the process that sent it
	number uint64
	shard  uint32
	entry  entry
}

// record of the simulated disk.
type record struct {
	producer ksuid.KSUID
	shard    uint32
	frame    Frame
	acked    bool
}

type world struct {
	t    *testing.T
	seed uint64
	r    *rand.Rand
	now  usage.Micros

	ledger   [simShards][]entry
	requests []message // on their way to the ledger
	replies  []message // acknowledgements on their way back

	disk   []record // what a crash leaves
	handed []handed // being written
	noted  map[string]uint64
	passed int

	life      int
	connected bool
	producer  ksuid.KSUID
	lanes     []*Lane
	cursor    int // of reading back, in disk
	old       []*Lane
	oldIDs    []ksuid.KSUID
	oldCursor int
	memory    int64 // as the lanes' results say
	limit     int64
	// What is read back has memory of its own: else calls that gather behind a
	// hole could take the room that is needed to fill the hole.
	readMemory, readLimit int64

	calls    int
	inLane   [simShards][]string // of this process, in the order they were added
	promised [simShards]map[string]bool
	trouble  bool
}

type handed struct {
	lane *Lane
	rec  record
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, r: rand.New(rand.NewPCG(seed, 1)), now: usage.At(time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)), trouble: true, limit: 12_000, readLimit: 12_000, noted: map[string]uint64{}}
	for s := range simShards {
		w.promised[s] = map[string]bool{}
	}
	w.start()
	return w
}

func key(producer ksuid.KSUID, shard uint32) string { return fmt.Sprint(producer, shard) }

func (w *world) chance(percent int) bool { return w.r.IntN(100) < percent }

func (w *world) start() {
	w.life++
	var payload [16]byte
	for i := range payload {
		payload[i] = byte(w.r.Uint32())
	}
	w.producer, _ = ksuid.FromParts(w.now.Time(), payload[:])
	w.lanes, w.old, w.oldIDs = nil, nil, nil
	w.memory, w.readMemory = 0, 0
	w.handed, w.oldCursor, w.connected = nil, 0, w.chance(70)
	for s := range uint32(simShards) {
		w.lanes = append(w.lanes, New(w.producer, s, "sim"))
		w.inLane[s] = nil
	}
	w.cursor = len(w.disk)
	seen := map[string]bool{}
	for _, rec := range w.disk {
		k := key(rec.producer, rec.shard)
		if !seen[k] {
			seen[k] = true
			w.old = append(w.old, Earlier(rec.producer, rec.shard))
			w.oldIDs = append(w.oldIDs, rec.producer)
		}
	}
}

func (w *world) run(steps int) {
	for range steps {
		w.now += usage.Micros(w.r.IntN(20_000))
		w.step()
		if w.memory > w.limit || w.memory < 0 || w.readMemory > w.readLimit || w.readMemory < 0 {
			w.t.Fatalf("%d and %d bytes in memory", w.memory, w.readMemory)
		}
	}
	w.trouble = false
	w.connected = true
	for _, l := range append(append([]*Lane{}, w.lanes...), w.old...) {
		l.Lost()
	}
	for i := 0; ; i++ {
		w.now += 3_000_000
		w.sync()
		w.loadOwn()
		w.loadOld()
		busy := false
		for _, l := range append(append([]*Lane{}, w.lanes...), w.old...) {
			w.publish(l)
			busy = busy || !l.Empty()
		}
		for len(w.requests)+len(w.replies) > 0 {
			w.network()
		}
		busy = busy || w.oldCursor < len(w.disk) && len(w.old) > 0
		if !busy {
			break
		}
		if i > 5000 {
			w.t.Fatal("it does not come to an end")
		}
	}
	w.check()
}

func (w *world) step() {
	s := w.r.IntN(simShards)
	switch n := w.r.IntN(100); {
	case n < 35:
		w.add(s)
	case n < 55:
		w.publish(w.anyLane())
	case n < 80:
		w.network()
	case n < 83:
		w.connected = !w.connected
		for _, l := range append(append([]*Lane{}, w.lanes...), w.old...) {
			l.Lost()
		}
		if !w.connected {
			w.replies = nil
		}
	case n < 86:
		l := w.anyLane()
		if number, _, ok := l.Inflight(); ok {
			l.Failed(number, w.now, w.r.Float64()) // a timeout
		}
	case n < 90:
		l := w.lanes[s]
		if w.chance(50) {
			w.memory -= l.Seal(w.now)
		}
		w.handout(l)
	case n < 93:
		w.sync()
	case n < 95:
		l := w.lanes[s]
		freed, first := l.Evict(1 + w.r.IntN(3))
		w.memory -= freed
		if freed > 0 {
			w.cursor = min(w.cursor, int(first.Offset)-1)
		}
	case n < 97:
		w.loadOwn()
	case n < 99:
		w.loadOld()
	default:
		if w.chance(40) {
			w.crash()
		}
	}
	w.promise()
}

func (w *world) anyLane() *Lane {
	if len(w.old) > 0 && w.chance(40) {
		return w.old[w.r.IntN(len(w.old))]
	}
	return w.lanes[w.r.IntN(simShards)]
}

func (w *world) add(s int) {
	for range 1 + w.r.IntN(8) {
		c := usage.Call{Time: w.now, Account: "a", RequestID: fmt.Sprintf("c%d", w.calls), Status: 200}
		charge := Charge(&c)
		if w.memory+charge > w.limit {
			return // full: the shell's policy
		}
		w.calls++
		w.memory += charge
		w.memory -= w.lanes[s].Add(&c, charge, w.now)
		w.inLane[s] = append(w.inLane[s], c.RequestID)
	}
}

// promise remembers what the outbox says is safe: from then on it must be in
// the ledger in the end, whatever happens.
func (w *world) promise() {
	for s, l := range w.lanes {
		_, safe, acked := l.Calls()
		if acked > safe {
			w.t.Fatalf("%d acknowledged, %d safe", acked, safe)
		}
		for _, id := range w.inLane[s][:safe] {
			w.promised[s][id] = true
		}
	}
}

func (w *world) publish(l *Lane) {
	if !w.connected {
		return
	}
	_, _, before := l.Inflight()
	f, freed := l.Publish(w.now)
	w.memory -= freed
	if f == nil {
		return
	}
	if before {
		w.t.Fatalf("frame %d leaves although one is unacknowledged", f.Number)
	}
	e := entry{number: f.Number, closing: f.Closing}
	if !f.Closing {
		var d ledger.Frame
		if err := d.Decode(f.Data); err != nil {
			w.t.Fatal(err)
		}
		if d.Number != f.Number || d.N != int(f.Calls) {
			w.t.Fatalf("frame %d of %d calls says %d of %d", f.Number, f.Calls, d.Number, d.N)
		}
		e.producer = d.Producer
		for i := range d.N {
			e.calls = append(e.calls, string(d.RequestID.At(i)))
		}
	}
	m := message{lane: l, life: w.life, number: f.Number, shard: l.Shard(), entry: e}
	if w.trouble && w.chance(15) {
		return // lost on its way
	}
	w.requests = append(w.requests, m)
}

// network delivers a message, or doubles, loses or refuses it. Those of a
// connection arrive in any order.
func (w *world) network() {
	if n := len(w.requests); n > 0 && (len(w.replies) == 0 || w.chance(50)) {
		i := w.r.IntN(n)
		m := w.requests[i]
		if w.trouble && w.chance(10) {
			w.requests = append(w.requests, m) // a copy arrives later
		}
		w.requests = append(w.requests[:i], w.requests[i+1:]...)
		if w.trouble && w.chance(15) {
			if m.life == w.life {
				m.lane.Failed(m.number, w.now, w.r.Float64()) // refused
			}
			return
		}
		w.ledger[m.shard] = append(w.ledger[m.shard], m.entry)
		if !w.trouble || w.chance(75) {
			w.replies = append(w.replies, m)
		}
		return
	}
	if n := len(w.replies); n > 0 {
		i := w.r.IntN(n)
		m := w.replies[i]
		if !w.trouble || !w.chance(20) { // else the same acknowledgement comes again
			w.replies = append(w.replies[:i], w.replies[i+1:]...)
		}
		if m.life != w.life {
			return
		}
		if f := m.lane.Acked(m.number); f != nil {
			if w.chance(70) {
				w.noted[key(m.lane.producer, m.shard)] = m.lane.Known()
			}
			if m.lane.earlier {
				return
			}
			if f.Loaded {
				w.readMemory -= int64(len(f.Data))
			} else {
				w.memory -= int64(len(f.Data))
			}
			if at := f.Position; at != (Position{}) {
				w.disk[at.Offset-1].acked = true
			}
		}
	}
}

func (w *world) handout(l *Lane) {
	for _, f := range l.Handout(nil, int64(w.r.IntN(3000))) {
		w.handed = append(w.handed, handed{l, record{producer: w.producer, shard: l.Shard(), frame: *f}})
	}
}

// sync makes what was handed out durable, all of it or what fits.
func (w *world) sync() {
	n := len(w.handed)
	if w.trouble && n > 0 && w.chance(30) {
		n = w.r.IntN(n) // the disk fails behind these
	}
	for _, h := range w.handed[:n] {
		w.disk = append(w.disk, h.rec)
		// Offset is the record's place, counted from 1.
		f, freed := h.lane.Spooled(h.rec.frame.Number, Position{Segment: 1, Offset: int64(len(w.disk))})
		w.memory -= freed
		if f == nil {
			w.disk[len(w.disk)-1].acked = true
		}
		w.promise()
	}
	for i := len(w.handed) - 1; i >= n; i-- {
		w.handed[i].lane.Unspooled(w.handed[i].rec.frame.Number)
	}
	w.handed = nil
}

func (w *world) loadOwn() {
	for ; w.cursor < len(w.disk); w.cursor++ {
		rec := w.disk[w.cursor]
		if rec.producer != w.producer || !w.lanes[rec.shard].Wants(rec.frame.Number) {
			continue
		}
		if rec.acked {
			w.t.Fatalf("frame %d is wanted and was acknowledged", rec.frame.Number)
		}
		size := int64(len(rec.frame.Data))
		if w.readMemory+size > w.readLimit {
			return
		}
		w.readMemory += size
		f := rec.frame
		f.Position, f.Sends = Position{Segment: 1, Offset: int64(w.cursor) + 1}, 0
		w.lanes[rec.shard].Loaded(&f)
	}
	for _, l := range w.lanes {
		if l.Holed() {
			w.t.Fatalf("frame %d is only in the spool but the reader is past it", l.FirstMissing())
		}
	}
}

func (w *world) loadOld() {
	for n := 0; w.oldCursor < len(w.disk) && n < 4; w.oldCursor++ {
		rec := w.disk[w.oldCursor]
		for i, l := range w.old {
			if w.oldIDs[i] == rec.producer && l.Shard() == rec.shard && l.Wants(rec.frame.Number) {
				if rec.frame.Number <= w.noted[key(rec.producer, rec.shard)] {
					l.Passed(rec.frame.Number)
					w.passed++
					continue
				}
				f := rec.frame
				f.Sends = 0
				l.Loaded(&f)
				n++
			}
		}
	}
}

// crash kills the process. Of what was being written to the disk the first part
// may have got there.
func (w *world) crash() {
	for _, h := range w.handed[:w.r.IntN(len(w.handed)+1)] {
		w.disk = append(w.disk, h.rec)
	}
	w.replies = nil
	for _, k := range slices.Sorted(maps.Keys(w.noted)) {
		if w.chance(10) {
			delete(w.noted, k) // it can't be read
		}
	}
	// What the ledger's server has received may still be stored.
	w.start()
}

func (w *world) check() {
	for s := range simShards {
		set := dedup.New(0)
		got := map[string]int{}
		last := map[ksuid.KSUID]int{}
		for _, e := range w.ledger[s] {
			v, skipped := set.Frame(dedup.Producer(e.producer), e.number)
			if v == dedup.Duplicate {
				continue
			}
			if v == dedup.Gap {
				w.t.Errorf("shard %d: %d numbers of a producer are missing before %d", s, skipped, e.number)
			}
			for _, id := range e.calls {
				got[id]++
				var n int
				if _, err := fmt.Sscanf(id, "c%d", &n); err != nil {
					w.t.Fatal(err)
				}
				if n < last[e.producer] {
					w.t.Errorf("shard %d: call %d comes after %d", s, n, last[e.producer])
				}
				last[e.producer] = n
			}
		}
		for id, n := range got {
			if n != 1 {
				w.t.Errorf("shard %d: call %s is there %d times", s, id, n)
			}
		}
		for id := range w.promised[s] {
			if got[id] != 1 {
				w.t.Errorf("shard %d: call %s was acknowledged or spooled but is not in the ledger", s, id)
			}
		}
	}
}
