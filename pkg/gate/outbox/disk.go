package outbox

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/bound"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/spool"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// disk is the sender's side of the spool: it says what is to be written, read
// and deleted, one job at a time, and a goroutine that knows nothing else does
// it. It belongs to the sender.
type disk struct {
	s       *sender
	store   *spool.Store
	own     *source
	earlier []*spool.Log // still to be sent, oldest first
	drain   *source      // the earlier producer that is being sent; nil: none
	drains  uint64       // how many there were
	marks   *marks.Journal

	jobs    chan *job
	results chan *job
	busy    bool
	owed    bool // the newest job was our own: an earlier producer's is next
	turn    int  // the slot that is first heard for the next job

	budget  bound.Budget // of frames read back
	retryAt usage.Micros
	// unwritable: it was not possible to write, and is tried again at writeAt; what
	// earlier producers left is sent meanwhile, and makes room.
	unwritable bool
	writeAt    usage.Micros
	trouble    trouble
	noting     trouble
}

// source is a producer's log and how far it is sent.
type source struct {
	log   *spool.Log
	slots []*slot // by shard; nil where an earlier producer has none
	base  uint64  // id of slots[0]
	// cursor is before every frame that is still to be read.
	cursor spool.Position
	// live counts the records of a segment that are not acknowledged.
	live       map[uint64]int
	first      uint64       // oldest segment that may exist
	active     uint64       // segment that is written
	emptySince usage.Micros // no live records since; 0: there are some
	stage      stage
	unnoted    []*slot      // of which more is acknowledged than is noted
	notedAt    usage.Micros // when that was last written
	// lossy: something that was in the log did not get into the ledger.
	lossy bool
	// passed is the newest stretch that was not to be read and was told of.
	passed spool.Position
	// seen has numbers of frames that there were and that can't be read, by shard.
	seen map[uint32]uint64
}

// stage of an earlier producer on its way out.
type stage int

const (
	reading   stage = iota // its spool is being sent
	exhausted              // all of it was read
	cleared                // all of it is acknowledged, and deleted
	closed                 // the closing entries are acknowledged
	done                   // nothing is left of it
	damaged                // its directory can't be read or deleted: left for a person
)

// job is a piece of work for the disk, and then what became of it.
type job struct {
	src     *source
	append  []spool.Record
	probe   bool // whether there is room again
	refs    []ref
	load    int64             // bytes at most
	wants   map[uint32]uint64 // by shard: number to load next; others are passed
	all     bool              // an earlier producer's: load what is newer than wants says
	remove  uint64            // segments before this one
	marks   bool              // read those of its leases
	destroy bool
	notes   []spool.Acked // of what is acknowledged

	at        []spool.Position
	appendErr error
	loaded    []loaded
	cursor    spool.Position
	atEnd     bool
	loadErr   error
	removeErr error
	aside     []spool.Aside
	noteErr   error
	leases    []marks.Mark
	marked    bool
	marksErr  error
	active    uint64
}

type ref struct {
	slot   *slot
	number uint64
}

// loaded is a record, or what was passed on the way to the next one.
type loaded struct {
	record spool.Record
	at     spool.Position
	torn   *spool.Torn
}

// Bounds of a job, so that none takes long.
const (
	maxAppend = 4 << 20
	// pauseAfterError of the disk, microseconds.
	pauseAfterError = 500_000
	// keepEmpty is for how long an active segment without live records is kept.
	keepEmpty = 2_000_000
	// noteEvery is how often what is acknowledged is noted where nothing else is to
	// be done, microseconds.
	noteEvery = 10_000
)

func newDisk(s *sender) (*disk, error) {
	o := &s.b.o
	store, err := spool.Open(o.SpoolDir, o.SpoolBytes)
	if err != nil {
		if errors.Is(err, spool.ErrInUse) {
			err = fmt.Errorf("%w: give each its own directory, or stop the other one first: %w", ErrSpoolInUse, err)
		}
		return nil, fmt.Errorf("open outbox: %w", err)
	}
	d := &disk{s: s, store: store, trouble: trouble{log: o.Logger}, noting: trouble{log: o.Logger}}
	d.budget.Limit = o.MemoryBytes / 4
	d.earlier, err = store.Earlier()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open outbox: %w", err), store.Close())
	}
	store.Genuine = genuine
	log := store.Create(spool.Identity{Producer: s.b.producer, Gateway: o.Gateway, Shards: o.Shards, OpenedAt: s.b.now()})
	switch err := log.Make(); {
	case err == nil:
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		d.notWritten(err)
	default:
		return nil, errors.Join(fmt.Errorf("open outbox: %w", err), store.Close())
	}
	d.marks = marks.New(log.Dir(), s.b.producer)
	d.marks.After(log.Make)
	d.own = &source{log: log, slots: s.slots, live: map[uint64]int{}, first: 1, active: 1}
	if n := len(d.earlier); n > 0 {
		o.Logger.Info().Int("producers", n).Int64("bytes", store.Bytes()).Msg("the spool of earlier producers will be sent")
	}
	return d, nil
}

// genuine reports whether a frame is that of its record.
func genuine(producer ksuid.KSUID, r *spool.Record) bool {
	var f ledger.Frame
	return f.Decode(r.Data) == nil && f.Producer == producer && f.Shard == r.Shard && f.Number == r.Number
}

// begin starts the goroutine that does the jobs, end waits for it.
func (d *disk) begin() {
	d.jobs, d.results = make(chan *job, 1), make(chan *job, 1)
	go func() {
		for j := range d.jobs {
			j.do()
			d.results <- j
		}
		close(d.results)
	}()
}

func (d *disk) end() {
	if d.busy {
		d.handle(<-d.results)
	}
	close(d.jobs)
	for range d.results { // until it is closed: the goroutine has ended
	}
}

func (j *job) do() {
	log := j.src.log
	if len(j.append) > 0 {
		j.at, j.appendErr = log.Append(j.append)
	} else if j.probe {
		j.appendErr = log.Probe()
	}
	if j.load > 0 {
		j.doLoad(log)
	}
	if len(j.notes) > 0 {
		j.noteErr = log.NoteAcked(j.notes)
	}
	if j.remove > 0 {
		j.removeErr = log.Remove(j.remove)
	}
	if j.marks && j.removeErr == nil {
		j.leases, j.marked, j.marksErr = marks.Read(log.Dir(), log.Identity().Producer)
	}
	if j.destroy && j.removeErr == nil {
		j.removeErr = log.Destroy()
	}
	j.aside = log.Aside()
	j.active = log.Active()
}

func (j *job) doLoad(log *spool.Log) {
	for size := int64(0); ; {
		r, at, next, torn, ok, err := log.Read(j.cursor)
		if err == nil && slices.ContainsFunc(torn, func(t spool.Torn) bool { return t.Damaged }) {
			err = log.MarkLossy() // before anything makes the damage forgotten
		}
		if err != nil {
			j.loadErr = err
			return
		}
		for i := range torn {
			j.loaded = append(j.loaded, loaded{torn: &torn[i]})
		}
		if !ok {
			j.cursor, j.atEnd = next, true
			return
		}
		want, listed := j.wants[r.Shard]
		if !(listed && r.Number == want || j.all && r.Number >= want) {
			j.cursor = next
			continue
		}
		if size += int64(len(r.Data)); size > j.load {
			return
		}
		j.wants[r.Shard] = r.Number + 1
		j.loaded = append(j.loaded, loaded{record: r, at: at})
		j.cursor = next
	}
}

// work gives the disk its next job, if there is one.
func (d *disk) work() {
	if d.busy {
		return
	}
	now := d.s.b.now()
	if now < d.retryAt {
		return
	}
	// In turns: where the disk never rests, earlier producers would wait for ever.
	var j *job
	if d.owed {
		j = d.drainJob()
	}
	if j == nil {
		j = d.ownJob(now)
	}
	if d.owed = j != nil && j.src == d.own; j == nil {
		j = d.drainJob()
	}
	if j != nil {
		d.busy = true
		d.jobs <- j // never blocks: one place, and the disk has none
	}
}

// ownJob writes what must be safe, reads back what can leave, and deletes what
// is acknowledged.
func (d *disk) ownJob(now usage.Micros) *job {
	src := d.own
	j := &job{src: src, cursor: src.cursor}
	if !d.unwritable || now >= d.writeAt {
		d.collect(j, now)
		j.probe = d.unwritable && len(j.append) == 0
	}
	d.wantBack(j)
	keep := src.keep()
	if len(src.live) > 0 {
		src.emptySince = 0
	} else if src.emptySince == 0 {
		src.emptySince = now
	} else if now-src.emptySince > keepEmpty && len(j.append) == 0 {
		keep = src.active + 1
	}
	if keep > src.first {
		j.remove = keep
		src.first = keep
	}
	if len(j.append) == 0 && !j.probe && j.load == 0 && j.remove == 0 && !src.noteDue(now) {
		return nil
	}
	j.notes = src.takeNotes(now)
	return j
}

// note: more of the slot is acknowledged than is noted.
func (src *source) note(sl *slot) {
	if !sl.unnoted {
		sl.unnoted = true
		src.unnoted = append(src.unnoted, sl)
	}
}

func (src *source) noteDue(now usage.Micros) bool {
	return len(src.unnoted) > 0 && now-src.notedAt >= noteEvery
}

func (src *source) takeNotes(now usage.Micros) []spool.Acked {
	if len(src.unnoted) == 0 {
		return nil
	}
	notes := make([]spool.Acked, len(src.unnoted))
	for i, sl := range src.unnoted {
		sl.unnoted = false
		notes[i] = spool.Acked{Shard: sl.lane.Shard(), Number: sl.lane.Known()}
	}
	clear(src.unnoted)
	src.unnoted, src.notedAt = src.unnoted[:0], now
	return notes
}

// keep returns the oldest segment that is still needed.
func (src *source) keep() uint64 {
	keep := src.active
	for n := range src.live {
		keep = min(keep, n)
	}
	return keep
}

// collect gathers the frames that must go to the spool now.
func (d *disk) collect(j *job, now usage.Micros) {
	s := d.s
	always := s.b.o.SpoolBeforeAnswer
	pressed := s.b.budget.Pressed()
	away := !s.connected
	linger := usage.Micros(s.b.o.Linger.Microseconds())
	size := int64(0)
	var frames []*lane.Frame
	for i := range s.slots {
		sl := s.slots[(d.turn+i)%len(s.slots)]
		unsure := away || sl.lane.Failing()
		if !always && !pressed && !unsure && !sl.lane.Holed() {
			continue
		}
		switch {
		case always:
			// What gathered while the disk was busy goes with one fsync.
			s.take(sl)
			sl.budget.Give(sl.lane.Seal(now))
		case pressed, unsure && sl.lane.Gathered() > 0 && now-sl.lane.GatheredSince() >= linger:
			sl.budget.Give(sl.lane.Seal(now))
		}
		frames = sl.lane.Handout(frames[:0], maxAppend-size)
		for _, f := range frames {
			size += int64(len(f.Data))
			j.append = append(j.append, spool.Record{Shard: sl.lane.Shard(), Number: f.Number, Calls: f.Calls, At: f.At, Data: f.Data})
			j.refs = append(j.refs, ref{sl, f.Number})
		}
		if size >= maxAppend {
			// Else the last ones would never have their turn on a slow disk.
			d.turn = (d.turn + i + 1) % len(s.slots)
			return
		}
	}
}

// wantBack asks for frames that only the spool has.
func (d *disk) wantBack(j *job) {
	if !d.s.connected {
		return
	}
	for _, sl := range d.own.slots {
		if sl.lane.Holed() {
			if j.wants == nil {
				j.wants = map[uint32]uint64{}
			}
			j.wants[sl.lane.Shard()] = sl.lane.FirstMissing()
		}
	}
	if j.wants != nil {
		d.takeRoom(j)
	}
}

// takeRoom lets the job load as much as memory for it is free, if that is
// enough to be worth it.
func (d *disk) takeRoom(j *job) {
	if free := d.budget.Limit - d.budget.Used(); free >= d.budget.Limit/2 && d.budget.Take(free) {
		j.load = free
	}
}

// drainJob moves an earlier producer on.
func (d *disk) drainJob() *job {
	if d.drain == nil {
		if len(d.earlier) == 0 || !d.s.connected {
			return nil
		}
		d.next()
	}
	src := d.drain
	switch src.stage {
	case reading:
		j := &job{src: src, cursor: src.cursor, all: true, wants: map[uint32]uint64{}}
		for _, sl := range src.slots {
			if sl != nil {
				j.wants[sl.lane.Shard()] = sl.lane.Last() + 1
			}
		}
		if d.s.connected {
			d.takeRoom(j)
		}
		if keep := min(src.keep(), src.cursor.Segment); keep > src.first {
			j.remove, src.first = keep, keep
		}
		now := d.s.b.now()
		if j.load == 0 && j.remove == 0 && !src.noteDue(now) {
			return nil
		}
		j.notes = src.takeNotes(now)
		return j
	case exhausted:
		if src.empty() {
			// Deleted before the producer is retired: what a crash leaves now can
			// only be retired again, never sent again to somebody who forgot it.
			return &job{src: src, remove: src.active + 1, marks: true}
		}
		return src.noteJob(d.s.b.now())
	case cleared:
		if src.empty() {
			src.stage = closed
			return &job{src: src, destroy: true}
		}
	case done:
		d.s.b.o.Logger.Info().Stringer("producer", src.log.Identity().Producer).Msg("the spool of an earlier producer was sent")
		d.drain = nil
		return d.drainJob()
	case damaged:
		if now := d.s.b.now(); !src.empty() || src.noteDue(now) {
			return src.noteJob(now) // what was read is still being sent
		}
		d.s.b.o.Logger.Error().Stringer("producer", src.log.Identity().Producer).Msg("the spool of an earlier producer can't be read or deleted: it is left for the next start")
		d.drain = nil
		return d.drainJob()
	}
	return nil
}

// noteJob only notes, where that is due.
func (src *source) noteJob(now usage.Micros) *job {
	if !src.noteDue(now) {
		return nil
	}
	return &job{src: src, cursor: src.cursor, notes: src.takeNotes(now)}
}

func (src *source) empty() bool {
	for _, sl := range src.slots {
		if sl != nil && !sl.lane.Empty() {
			return false
		}
	}
	return true
}

func (d *disk) next() {
	log := d.earlier[0]
	d.earlier = d.earlier[1:]
	d.drains++
	d.drain = &source{log: log, base: d.drains * ledger.MaxShards, live: map[uint64]int{}, slots: make([]*slot, ledger.MaxShards), active: log.Active()}
}

// slotOf returns the slot of a shard, made when it is the first time.
func (d *disk) slotOf(src *source, shard uint32) *slot {
	if src.slots[shard] == nil {
		src.slots[shard] = &slot{id: src.base + uint64(shard), src: src, lane: lane.Earlier(src.log.Identity().Producer, shard), budget: &d.budget}
	}
	return src.slots[shard]
}

// handle takes note of what the disk has done.
func (d *disk) handle(j *job) {
	d.busy = false
	j.src.active = j.active
	d.appended(j)
	if j.load > 0 {
		d.loaded(j)
		d.missed(j)
	}
	if j.removeErr != nil {
		d.failed(j.removeErr)
	}
	d.putAside(j)
	d.noted(j)
	if j.src != d.own {
		d.drained(j)
		return
	}
	if d.s.b.budget.Pressed() {
		d.evict()
	}
}

// noted tells when notes can't be written. The newest are not written again: what is
// noted too little is sent again, and known by its number.
func (d *disk) noted(j *job) {
	switch {
	case len(j.notes) == 0:
	case j.noteErr != nil:
		d.noting.is(d.s.b.o.Now(), "what of the spool is acknowledged can't be noted: after a kill more of it is sent again than has to be: "+j.noteErr.Error())
	default:
		d.noting.over(d.s.b.o.Now(), "what of the spool is acknowledged is noted again")
	}
}

func (d *disk) appended(j *job) {
	s := d.s
	for i, r := range j.refs[:len(j.at)] {
		at := lane.Position{Segment: j.at[i].Segment, Offset: j.at[i].Offset}
		f, freed := r.slot.lane.Spooled(r.number, at)
		if f == nil {
			j.src.note(r.slot)
			continue // acknowledged in the meantime
		}
		j.src.live[at.Segment]++
		s.count(func(c *counts) {
			c.spooled += int64(f.Calls)
			if !f.Counted {
				c.sent.Plus(&f.Totals)
			}
		})
		f.Counted = true
		r.slot.budget.Give(freed)
		s.advance(r.slot)
	}
	for _, r := range slices.Backward(j.refs[len(j.at):]) {
		r.slot.lane.Unspooled(r.number)
	}
	if j.appendErr != nil {
		d.notWritten(j.appendErr)
	} else if len(j.at) > 0 || j.probe {
		d.unwritable = false
		d.trouble.over(s.b.o.Now(), "the spool takes frames again")
		s.b.spoolFails.Store(false)
	}
}

// notWritten pauses writing.
func (d *disk) notWritten(err error) {
	d.unwritable, d.writeAt = true, d.s.b.now()+pauseAfterError
	d.alarm(err)
}

// failed pauses the disk.
func (d *disk) failed(err error) {
	d.retryAt = d.s.b.now() + pauseAfterError
	if errors.Is(err, spool.ErrGone) {
		d.unwritable, d.writeAt = true, d.retryAt // so that it is tried, and known when it is back
	}
	d.alarm(err)
}

func (d *disk) alarm(err error) {
	now := d.s.b.o.Now()
	d.s.b.spoolFails.Store(true)
	what := "the spool fails: " + err.Error()
	if errors.Is(err, spool.ErrFull) {
		what = fmt.Sprintf("the spool is full (%d bytes): calls stay in memory, and then what is configured for a full outbox happens", d.s.b.o.SpoolBytes)
	}
	if d.trouble.grave = errors.Is(err, spool.ErrGone); d.trouble.grave {
		// The same at whichever file it was noticed: it is told once.
		what = "the spool fails: " + d.s.b.o.SpoolDir + " or what this gateway wrote there was deleted, moved away or unmounted: restore the directory or restart the gateway; until then a crash loses what was answered as safe before and the ledger does not have"
	}
	d.trouble.is(now, what)
	if !d.trouble.grave {
		return
	}
	for _, sl := range d.own.slots { // it will be safe again where this is mended
		sl.lane.Doubt(d.own.dead)
	}
}

// dead: a record of the segment needs it no more.
func (src *source) dead(segment uint64) {
	if src.live[segment]--; src.live[segment] <= 0 {
		delete(src.live, segment)
	}
}

// gone returns an error where a segment with records that are not acknowledged is not
// where the next gateway would find it.
func (d *disk) gone() error {
	var err error
	if d.unwritable && d.trouble.grave {
		err = spool.ErrGone
	}
	for n := range d.own.live {
		err = errors.Join(err, d.own.log.Has(n))
	}
	return err
}

func (d *disk) loaded(j *job) {
	s, src := d.s, j.src
	room := j.load
	for _, l := range j.loaded {
		if l.torn != nil {
			d.passed(src, l.torn)
			continue
		}
		if l.record.Shard >= uint32(len(src.slots)) {
			src.lossy = true // not a shard at all: the ledger has fewer now
			continue
		}
		sl := src.slots[l.record.Shard]
		if sl == nil {
			sl = d.slotOf(src, l.record.Shard)
		}
		if !sl.lane.Wants(l.record.Number) {
			continue
		}
		if src != d.own && l.record.Number <= src.log.Acked(l.record.Shard) {
			d.claim(sl, &l.record) // which its producer may not have done
			sl.lane.Passed(l.record.Number)
			s.count(func(c *counts) { c.knownFrames++ })
			continue
		}
		room -= int64(len(l.record.Data))
		if src != d.own {
			src.live[l.at.Segment]++
			d.claim(sl, &l.record)
		}
		sl.lane.Loaded(&lane.Frame{
			Number: l.record.Number, Data: l.record.Data, Calls: l.record.Calls, At: l.record.At,
			Position: lane.Position{Segment: l.at.Segment, Offset: l.at.Offset}, Counted: true,
		})
		s.pump(sl)
	}
	d.budget.Give(room)
	src.cursor = j.cursor
	if j.loadErr != nil {
		d.failed(j.loadErr)
	}
}

// passed tells of what could not be read.
func (d *disk) passed(src *source, t *spool.Torn) {
	s := d.s
	if at := src.passed; t.Position.Segment < at.Segment || t.Position.Segment == at.Segment && t.Position.Offset <= at.Offset {
		return
	}
	src.passed = t.Position
	id := src.log.Identity()
	to := func(e *zerolog.Event) *zerolog.Event {
		return e.Stringer("producer", id.Producer).Uint64("segment", t.Position.Segment).Int64("at", t.Position.Offset).Int64("bytes", t.Bytes)
	}
	if !t.Damaged {
		s.count(func(c *counts) { c.torn++ })
		to(s.b.o.Logger.Warn()).Msg("the end of a spool segment is torn: a crash came while it was written; what was answered as safe is before it")
		return
	}
	src.lossy = true
	s.count(func(c *counts) { c.damaged++ })
	e := to(s.b.o.Logger.Error())
	if r := &t.Record; r.Number > 0 && r.Shard < min(id.Shards, ledger.MaxShards) {
		e.Uint32("shard", r.Shard).Uint64("frame", r.Number)
		if src != d.own {
			d.lost(src, r)
		}
	}
	e.Msg("a part of the spool is damaged: calls that were answered as safe may be in it, and are lost unless the ledger has them; what is behind it is sent, and its segment is put aside then")
}

// putAside tells what became of damaged segments.
func (d *disk) putAside(j *job) {
	for _, a := range j.aside {
		e := d.s.b.o.Logger.Error().Stringer("producer", j.src.log.Identity().Producer).Uint64("segment", a.Segment)
		if a.Path != "" {
			e.AnErr("error", a.Err).Str("kept", a.Path).Msg("a damaged segment of the spool was put aside: take it away when nobody needs it any more")
		} else {
			e.Err(a.Err).Msg("a damaged segment of the spool could not be put aside, and is deleted")
		}
	}
}

const (
	// farthest is how far beyond the newest frame that is known a number is believed.
	farthest = 1 << 16
	// nobody stands for the accounts of calls that are lost.
	nobody = "unknown (damaged spool)"
)

// lost takes note of a frame of an earlier producer that can't be read: its number is
// missed, and its calls are claimed, so that the audit misses them also where nothing
// comes after it.
func (d *disk) lost(src *source, r *spool.Record) {
	sl := d.slotOf(src, r.Shard)
	known := max(sl.lane.Last(), src.log.Acked(r.Shard), src.seen[r.Shard])
	if r.Number <= known || r.Number-known > farthest {
		return
	}
	if src.seen == nil {
		src.seen = map[uint32]uint64{}
	}
	src.seen[r.Shard] = r.Number
	// Of others before it nobody knows here, and they would count as claimed as well.
	if claims := d.claims(sl); claims != nil && r.Number == known+1 && r.Calls > 0 && r.Calls <= ledger.MaxFrameCalls {
		for range r.Calls {
			claims.Add(r.Number, &usage.Call{Account: nobody})
		}
		claims.Seal(r.At)
	}
}

// claims hears what is in frames of an earlier producer; nil: nobody does.
func (d *disk) claims(sl *slot) lane.Claims {
	if b := d.s.b; sl.claims == nil && b.o.Claims != nil {
		sl.claims = b.o.Claims(sl.producer(b), sl.lane.Shard(), true)
	}
	return sl.claims
}

// missed looks for frames of our own that only the spool has and that are not there any
// more. They hold up their shard until the next start, which passes them by.
func (d *disk) missed(j *job) {
	if !j.atEnd || j.src != d.own {
		return
	}
	for shard := range j.wants {
		if l := d.own.slots[shard].lane; l.Holed() {
			d.failed(fmt.Errorf("frame %d of shard %d is not in %s any more, or damaged", l.FirstMissing(), shard, d.own.log.Dir()))
			return
		}
	}
}

// claim says what is in a frame of an earlier producer, which may have died
// before it could.
func (d *disk) claim(sl *slot, r *spool.Record) {
	s, claims := d.s, d.claims(sl)
	if claims == nil || s.frame.Decode(r.Data) != nil {
		return // readers of the ledger will dead-letter it and say so
	}
	for i := range s.frame.N {
		c := s.frame.Call(i)
		claims.Add(r.Number, &c)
	}
	claims.Seal(s.frame.SealedAt)
}

// drained moves an earlier producer on after a job.
func (d *disk) drained(j *job) {
	src := j.src
	switch {
	case j.removeErr != nil || j.loadErr != nil && !slices.ContainsFunc(j.loaded, func(l loaded) bool { return l.torn == nil }):
		if src.stage == closed || j.loadErr != nil {
			src.stage = damaged
		}
	case src.stage == reading && j.atEnd:
		src.stage = exhausted
	case src.stage == exhausted && j.remove > 0:
		src.stage = cleared
		d.retire(src, j)
	case src.stage == closed:
		src.stage = done
	}
}

// retire sends the closing entries of an earlier producer: on every shard that
// it may have used, for what it sent from memory left no trace here. Its marks go with
// them.
func (d *disk) retire(src *source, j *job) {
	id := src.log.Identity()
	for shard := range min(id.Shards, ledger.MaxShards) {
		d.slotOf(src, shard)
	}
	for i := range j.leases {
		d.slotOf(src, min(j.leases[i].Shard, ledger.MaxShards-1))
	}
	whole := src.log.Whole() && !src.lossy
	if j.marksErr != nil {
		if errors.Is(j.marksErr, marks.ErrDamaged) {
			d.s.count(func(c *counts) { c.damagedMarks++ })
		}
		d.s.b.o.Logger.Error().Err(j.marksErr).Stringer("producer", id.Producer).Msg("how much of its leases an earlier producer can have used can't be read: what it held stays spent until the windows end")
	}
	left := j.leases
	for shard, sl := range src.slots {
		if sl == nil {
			continue
		}
		var leases *tollkeeperv1.LeaseMarks
		n := ofShard(left, uint32(shard))
		if j.marked {
			leases = d.s.marksOf(id.Producer, left[:n])
		}
		unmarked := leases == nil && (j.marked || j.marksErr != nil)
		if unmarked {
			d.s.count(func(c *counts) { c.unmarked++ })
		}
		left = left[n:]
		sl.lane.Retire(closing(id.Producer, max(sl.lane.Last(), src.seen[uint32(shard)]), whole && !unmarked, leases, d.s.b.o.Now()))
		d.s.pump(sl)
	}
}

// evict lets go of spooled frames while memory is short.
func (d *disk) evict() {
	for _, sl := range d.own.slots {
		freed, first := sl.lane.Evict(1)
		if freed == 0 {
			continue
		}
		sl.budget.Give(freed)
		at := spool.Position{Segment: first.Segment, Offset: first.Offset}
		if c := d.own.cursor; at.Segment < c.Segment || at.Segment == c.Segment && at.Offset < c.Offset {
			d.own.cursor = at
		}
	}
}

func (d *disk) release() error {
	if d == nil {
		return nil
	}
	err := errors.Join(d.own.log.Close(), d.marks.Close())
	for _, l := range d.earlier {
		err = errors.Join(err, l.Close())
	}
	if d.drain != nil {
		err = errors.Join(err, d.drain.log.Close())
	}
	return errors.Join(err, d.store.Close())
}

// acked takes note that a frame which the spool has is acknowledged.
func (src *source) acked(sl *slot, f *lane.Frame) {
	n := f.Position.Segment
	if n == 0 {
		return
	}
	src.note(sl)
	src.dead(n)
}

// noteRest notes what is acknowledged, at the end and for the last time.
func (d *disk) noteRest() {
	j := &job{src: d.own, cursor: d.own.cursor, notes: d.own.takeNotes(d.s.b.now())}
	j.do()
	d.handle(j)
}

// secure writes what memory holds, at the end and for the last time.
func (d *disk) secure(now time.Time) error {
	for _, sl := range d.own.slots {
		d.s.take(sl)
		sl.budget.Give(sl.lane.Seal(usage.At(now)))
	}
	for {
		j := &job{src: d.own, cursor: d.own.cursor}
		for _, sl := range d.own.slots {
			for _, f := range sl.lane.Handout(nil, maxAppend) {
				j.append = append(j.append, spool.Record{Shard: sl.lane.Shard(), Number: f.Number, Calls: f.Calls, At: f.At, Data: f.Data})
				j.refs = append(j.refs, ref{sl, f.Number})
			}
		}
		if len(j.append) == 0 {
			return nil
		}
		j.do()
		d.handle(j)
		if j.appendErr != nil {
			return j.appendErr
		}
	}
}
