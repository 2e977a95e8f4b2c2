package simulation

import (
	"fmt"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

// member is an aggregator. It believes to own the shards it has taken until a
// write of its is refused; what it does not own it may fold all the same, so that
// it can go on where the owner stops.
type member struct {
	w      *world
	proc   *proc
	owners [shards]*owner
	tails  [shards]*tail
	taking [shards]bool
}

// tail is the state of a shard that another owns.
type tail struct {
	m       *member
	shard   uint32
	state   *quota.Shard
	backlog publish.Backlog
	reader  *reader
	decoder fold.Decoder
}

// mostBacklog decisions are kept; it is small, so that it is passed sometimes.
const mostBacklog = 6

// fold takes an entry of another's shard.
func (t *tail) fold(m ledger.Message, _ uint64) bool {
	_, shard, err := ledger.ParseSubject(m.Subject)
	if err != nil || shard != t.shard || m.Sequence <= t.state.Sequence() {
		return true
	}
	e, _, err := t.decoder.Decode(&m)
	if err != nil {
		t.m.w.fail("entry %d: %v", m.Sequence, err)
		return false
	}
	t.backlog.Add(t.state.Apply(e).Decisions)
	if t.backlog.Len() > mostBacklog {
		t.backlog.Drop()
	}
	return true
}

// look finds out what the owner has published.
func (t *tail) look() {
	if t.m.tails[t.shard] != t {
		return
	}
	n := t.m.w.nats
	t.m.proc.ask(func() any { return n.position(t.shard) }, func(result any, ok bool) {
		if at, is := result.(publish.Position); ok && is && t.m.tails[t.shard] == t {
			t.backlog.Saw(at)
		}
	})
	t.m.proc.after(t.m.w.between(200_000, 1_500_000), t.look)
}

// owner is a member's hold on one shard.
type owner struct {
	m      *member
	shard  uint32
	state  *quota.Shard
	pub    publish.Publisher
	reader *reader
	target uint64

	decoder     fold.Decoder
	lastControl uint64
	busy        bool // a batch is on its way
	ticking     bool
	uploading   bool
	entries     int
	gone        bool
}

func (w *world) newMember(name string) *member {
	m := &member{w: w}
	m.proc = &proc{w: w, name: name, up: true, start: func() {}, killed: func() {
		for _, o := range m.owners {
			if o != nil {
				o.gone = true
			}
		}
		m.owners = [shards]*owner{}
		m.tails = [shards]*tail{}
		m.taking = [shards]bool{}
	}}
	return m
}

// take makes the member try to become the owner of a shard: by its own lights,
// whoever else may be one.
func (m *member) take(shard uint32) {
	if !m.proc.up || m.taking[shard] || m.owners[shard] != nil {
		return
	}
	m.taking[shard] = true
	w := m.w
	m.proc.ask(func() any { return w.nats.position(shard) }, func(result any, ok bool) {
		if !ok {
			m.taking[shard] = false
			return
		}
		m.claim(shard, result.(publish.Position))
	})
}

func (m *member) claim(shard uint32, before publish.Position) {
	w := m.w
	next := before.Found
	next.Epoch, next.Owner = before.Found.Epoch+1, fmt.Sprintf("%s/%d/%d", m.proc.name, m.proc.life, w.order)
	msg, err := next.Message(shard)
	if err != nil {
		w.fail("%v", err)
		return
	}
	ledger.ExpectLast(msg, before.Revision)
	m.proc.ask(func() any { return w.nats.publish(&w.nats.decisions, msg) }, func(any, bool) {
		// Whatever the answer was: what stands there now is ours or not.
		m.proc.ask(func() any { return w.nats.position(shard) }, func(result any, ok bool) {
			m.taking[shard] = false
			if at, is := result.(publish.Position); ok && is && at.Found == next {
				m.open(shard, at)
			}
		})
	})
}

// open begins with what is folded already, if no decision can be missing, else
// with the snapshot.
func (m *member) open(shard uint32, at publish.Position) {
	w := m.w
	o := &owner{m: m, shard: shard}
	from := "a snapshot"
	if t := m.tails[shard]; t != nil {
		m.tails[shard] = nil
		t.reader.closed = true
		if pub, ok := t.backlog.Resume(shard, at.Revision, at.Found, at.Newest, t.state.Sequence()); ok {
			o.state, o.pub, from = t.state, pub, "what it had folded"
			w.report.Warm++
		}
	}
	if o.state == nil {
		o.pub = publish.New(shard, at.Revision, at.Found, at.Newest)
		if o.state = w.load(shard, at.Found); o.state == nil {
			if w.nats.position(shard).Found == at.Found {
				w.fail("shard %d: the checkpoint names snapshot %q, which is gone", shard, at.Found.Snapshot)
			}
			return // replaced already, and its successor has a newer one
		}
	}
	for _, subject := range ledger.ShardSubjects(shard) {
		o.target = max(o.target, w.nats.ledger.last[subject])
	}
	o.lastControl = w.nats.ledger.last[ledger.ControlSubject(shard)]
	m.owners[shard] = o
	w.report.Takeovers++
	w.trace("%s owns shard %d from %d by %s, epoch %d", m.proc.name, shard, o.state.Sequence(), from, at.Found.Epoch)
	o.reader = m.proc.read(&w.nats.ledger, o.state.Sequence()+1, 16, o.apply)
	if o.ready() {
		o.resume()
	}
	o.beat()
}

// load returns the state that a checkpoint names; nil when it is gone.
func (w *world) load(shard uint32, found publish.Checkpoint) *quota.Shard {
	if found.Snapshot == "" {
		return quota.New(quota.Options{Shard: shard})
	}
	data, ok := w.nats.objects[found.Snapshot]
	if !ok {
		return nil
	}
	state, err := quota.Read(data)
	if err != nil {
		w.fail("shard %d: %v", shard, err)
		return nil
	}
	return state
}

// standBy lets a member fold a shard from a snapshot on.
func (m *member) standBy(shard uint32) {
	w := m.w
	if !m.proc.up || m.owners[shard] != nil || m.tails[shard] != nil {
		return
	}
	m.proc.ask(func() any { return w.nats.position(shard) }, func(result any, ok bool) {
		at, is := result.(publish.Position)
		if !ok || !is || m.owners[shard] != nil || m.tails[shard] != nil {
			return
		}
		if state := w.load(shard, at.Found); state != nil {
			m.tail(&tail{m: m, shard: shard, state: state})
		}
	})
}

func (m *member) tail(t *tail) {
	m.tails[t.shard] = t
	t.reader = m.proc.read(&m.w.nats.ledger, t.state.Sequence()+1, 16, t.fold)
	t.look()
}

func (o *owner) ready() bool { return o.state.Sequence() >= o.target }

func (o *owner) lose(why string) {
	if o.gone {
		return
	}
	o.m.w.trace("%s loses shard %d: %s", o.m.proc.name, o.shard, why)
	o.gone = true
	o.reader.closed = true
	o.m.owners[o.shard] = nil
	if o.m.w.chance(0.7) {
		o.m.tail(&tail{m: o.m, shard: o.shard, state: o.state, backlog: o.pub.Resign()})
	}
}

// beat is what time does to an owner.
func (o *owner) beat() {
	if o.gone {
		return
	}
	o.publish()
	if o.ready() && !o.ticking {
		if due, ok := o.state.NextTimer(); ok && o.m.w.now >= due+5_000 {
			o.tick()
		}
	}
	if !o.uploading && !o.pub.Offered() && o.entries > 40 && o.m.w.chance(0.3) {
		o.snapshot()
	}
	o.m.proc.after(o.m.w.between(10_000, 60_000), o.beat)
}

func (o *owner) apply(m ledger.Message, _ uint64) bool {
	if o.gone || o.pub.Queued() > 500 {
		return false
	}
	kind, shard, err := ledger.ParseSubject(m.Subject)
	if err != nil || shard != o.shard {
		return true
	}
	was := o.ready()
	e, _, err := o.decoder.Decode(&m)
	if err != nil {
		o.m.w.fail("entry %d: %v", m.Sequence, err)
		return false
	}
	if kind == ledger.KindControl {
		o.lastControl = m.Sequence
	}
	fx := o.state.Apply(e)
	if fx.Invalid != nil {
		o.m.w.fail("entry %d: %v", m.Sequence, fx.Invalid)
		return false
	}
	o.entries++
	o.pub.Add(m.Sequence, fx.Decisions)
	switch {
	case was:
		o.answer(fx.Answers)
	case o.ready():
		o.resume()
	}
	o.publish()
	return true
}

func (o *owner) resume() { o.answer(o.state.Resume()) }

func (o *owner) answer(answers []quota.LeaseAnswer) {
	w := o.m.w
	for _, a := range answers {
		a.Epoch = o.pub.Last().Epoch
		if a.Decision != nil {
			d := *a.Decision
			a.Decision = &d
		}
		for _, g := range w.gateways {
			if a.Gateway == [20]byte(g.producer) {
				w.tell(o.m.proc, g.proc, func() { g.hear(a) })
			}
		}
	}
}

func (o *owner) publish() {
	if o.gone || o.busy {
		return
	}
	b := o.pub.Flight()
	if b == nil {
		b = o.pub.Next()
	}
	if b == nil {
		return
	}
	msgs, err := o.pub.Messages(b)
	if err != nil {
		o.m.w.fail("%v", err)
		return
	}
	o.busy = true
	n := o.m.w.nats
	o.m.proc.ask(func() any { return n.publishBatch(&n.decisions, msgs) }, func(result any, ok bool) {
		if o.gone {
			return
		}
		if sequence, is := result.(uint64); ok && is && sequence > 0 {
			o.stored(o.pub.Acked(sequence))
			return
		}
		o.m.proc.ask(func() any { return n.position(o.shard) }, func(result any, ok bool) {
			o.busy = false
			if o.gone || !ok {
				return
			}
			again, obsolete, err := o.pub.Failed(result.(publish.Position))
			switch {
			case err != nil:
				o.lose(err.Error())
			case !again:
				o.stored(obsolete)
			}
		})
	})
}

func (o *owner) stored(obsolete string) {
	o.busy = false
	if obsolete != "" {
		delete(o.m.w.nats.objects, obsolete)
	}
	o.publish()
}

func (o *owner) tick() {
	w := o.m.w
	msg, err := ledger.ControlMessage(o.shard, &tollkeeperv1.ControlEntry{
		Id: w.ksuid().String(), Author: o.m.proc.name, Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: o.pub.Last().Epoch}},
	})
	if err != nil {
		w.fail("%v", err)
		return
	}
	ledger.ExpectLast(msg, o.lastControl)
	o.ticking = true
	o.m.proc.ask(func() any { return w.nats.publish(&w.nats.ledger, msg) }, func(any, bool) { o.ticking = false })
}

func (o *owner) snapshot() {
	w := o.m.w
	data, at := o.state.AppendBinary(nil), o.state.Sequence()
	name := fmt.Sprintf("shard-%d/%d-%d", o.shard, at, o.pub.Last().Epoch)
	o.uploading, o.entries = true, 0
	o.m.proc.ask(func() any { w.nats.objects[name] = data; return nil }, func(_ any, ok bool) {
		o.uploading = false
		if ok && !o.gone {
			o.pub.Offer(name, at)
		}
	})
}

func (w *world) ksuid() ksuid.KSUID {
	var payload [16]byte
	for i := range payload {
		payload[i] = byte(w.r.Uint32())
	}
	id, err := ksuid.FromParts(w.now.Time(), payload[:])
	if err != nil {
		w.fail("%v", err)
	}
	return id
}

// verdict of a pure fold: what everybody must come to.
type verdict struct {
	states    [shards]*quota.Shard
	decisions []usage.Decision
	grants    int
	denials   int
	twice     int
}

// foldAll folds the whole log anew.
func (w *world) foldAll() *verdict {
	v := &verdict{}
	for s := range v.states {
		v.states[s] = quota.New(quota.Options{Shard: uint32(s)})
	}
	var d fold.Decoder
	for i := range w.nats.ledger.messages {
		m := &w.nats.ledger.messages[i]
		_, shard, err := ledger.ParseSubject(m.Subject)
		if err != nil {
			w.fail("%v", err)
			return v
		}
		e, _, err := d.Decode(m)
		if err != nil {
			w.fail("entry %d: %v", m.Sequence, err)
			return v
		}
		fx := v.states[shard].Apply(e)
		v.decisions = append(v.decisions, fx.Decisions...)
		if e.Control != nil && e.Control.Marks != nil {
			w.report.Returned += fx.Leases.Returned
		}
		if e.Batch != nil && fx.Admitted+fx.Refused == 0 {
			v.twice++
		}
		for _, a := range fx.Answers {
			if a.Granted > 0 {
				v.grants++
			}
			if a.Decision != nil {
				v.denials++
			}
		}
	}
	return v
}
