package aggregator

import (
	"cmp"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// checkpoint says how far a shard's decisions are published, at least, and who
// may publish more: each of them is stored only as long as the checkpoint that
// its owner knows is the newest.
type checkpoint struct {
	epoch uint64
	// owner tells two owners apart that both believe to have taken an epoch.
	owner string
	// sequence: every decision of entries up to it is published. Of later
	// entries those are that the shard's newest decision covers.
	sequence uint64
	// snapshot is the object that holds the state to start from; every
	// decision up to its position is published. Empty: there is none.
	snapshot string
}

// Headers of a checkpoint message: what only the owner's successor needs.
const (
	ownerHeader    = "Tollkeeper-Owner"
	snapshotHeader = "Tollkeeper-Snapshot"
)

const kvPrefix = "$KV." + ledger.DecisionsBucket + "."

func checkpointSubject(shard uint32) string { return kvPrefix + ledger.CheckpointKey(shard) }

// decisionsSubject matches every decision of a shard.
func decisionsSubject(shard uint32) string {
	return kvPrefix + strconv.FormatUint(uint64(shard), 10) + ".>"
}

func (c checkpoint) message(shard uint32) (*nats.Msg, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(&tollkeeperv1.Checkpoint{Shard: shard, Epoch: c.epoch, LedgerSequence: c.sequence})
	if err != nil {
		return nil, fmt.Errorf("marshal checkpoint: %w", err)
	}
	m := &nats.Msg{Subject: checkpointSubject(shard), Data: data, Header: nats.Header{ownerHeader: {c.owner}}}
	if c.snapshot != "" {
		m.Header.Set(snapshotHeader, c.snapshot)
	}
	return m, nil
}

func readCheckpoint(shard uint32, header nats.Header, data []byte) (checkpoint, error) {
	var p tollkeeperv1.Checkpoint
	if err := proto.Unmarshal(data, &p); err != nil {
		return checkpoint{}, fmt.Errorf("the checkpoint of shard %d is not protobuf: %w", shard, err)
	}
	if p.GetShard() != shard {
		return checkpoint{}, fmt.Errorf("the checkpoint of shard %d says it is of shard %d", shard, p.GetShard())
	}
	c := checkpoint{epoch: p.GetEpoch(), sequence: p.GetLedgerSequence(), owner: header.Get(ownerHeader), snapshot: header.Get(snapshotHeader)}
	return c, nil
}

// told is the newest decision in the stream. Decisions are published in one
// order, by entry, then account, then limit: so all before it are there too.
type told struct {
	revision       uint64
	account, limit string
}

func toldBy(d *usage.Decision) told { return told{d.Revision, d.Account, d.LimitID} }

// covers reports whether a decision is that one or stands before it.
func (t told) covers(d *usage.Decision) bool {
	return cmp.Or(cmp.Compare(d.Revision, t.revision), cmp.Compare(d.Account, t.account), cmp.Compare(d.LimitID, t.limit)) <= 0
}

// fewDecisions is up to how many are published one by one: an atomic batch
// costs the server a store of its own, as much as many plain messages.
const fewDecisions = 4

// publisher decides what is published next and what was. It is a pure state
// machine: one batch or one lone decision at a time, in the ledger's order, and
// after an unclear result what the stream says.
//
// A lone decision is conditional on the checkpoint, which it does not move. So
// one that may still be on its way could be stored again later, after newer
// ones: after an unclear result the next to be published is an atomic batch,
// whose checkpoint shuts such a straggler out. What is left is that a decision
// may stand twice, one right after the other.
type publisher struct {
	shard uint32
	// revision is the stream sequence of the newest checkpoint we know of,
	// last is what it says; written is the newest of all that we have stored.
	revision, written uint64
	last              checkpoint
	// told is what the owner before has published.
	told told
	// queue holds the decisions that are not known to be published.
	queue []usage.Decision
	// applied is the newest entry whose decisions are in the queue or before.
	applied uint64
	// snapshot is an object that is uploaded and not yet named by a checkpoint.
	snapshot   string
	snapshotAt uint64
	flight     *batch
}

// newPublisher begins where a takeover has stored the checkpoint last at
// revision and found the newest decision t.
func newPublisher(shard uint32, revision uint64, last checkpoint, t told) publisher {
	return publisher{shard: shard, revision: revision, written: revision, last: last, told: t, applied: last.sequence}
}

// batch is what is published at once.
type batch struct {
	decisions []usage.Decision
	// lone: a decision without a checkpoint.
	lone   bool
	next   checkpoint
	expect uint64
}

// add takes the decisions of an entry, in the order of accounts and limits.
// Those of a replay that are published already are left out.
func (p *publisher) add(sequence uint64, decisions []usage.Decision) {
	p.applied = sequence
	if sequence <= p.last.sequence {
		return
	}
	for i := range decisions {
		d := &decisions[i]
		if p.told.covers(d) {
			continue
		}
		d.Epoch = p.last.epoch
		p.queue = append(p.queue, *d)
	}
}

// next returns the batch that is due, nil when there is none or one is in
// flight. The batch stays in flight until acked or failed.
func (p *publisher) next() *batch {
	named := p.snapshot != "" && (len(p.queue) == 0 || p.queue[0].Revision > p.snapshotAt)
	switch {
	case p.flight != nil || (len(p.queue) == 0 && !named):
		return nil
	case !named && len(p.queue) <= fewDecisions:
		p.flight = &batch{decisions: p.queue[:1:1], lone: true, next: p.last, expect: p.revision}
	default:
		p.flight = p.gather()
	}
	return p.flight
}

// gather makes an atomic batch of as much as there is.
func (p *publisher) gather() *batch {
	n := min(len(p.queue), ledger.MaxBatch-1)
	next := p.last
	next.sequence = p.applied
	if n < len(p.queue) {
		next.sequence = p.queue[n].Revision - 1
	}
	next.sequence = max(next.sequence, p.last.sequence)
	if p.snapshot != "" && p.snapshotAt <= next.sequence {
		next.snapshot = p.snapshot
	}
	return &batch{decisions: p.queue[:n:n], next: next, expect: p.revision}
}

// messages returns the batch's messages, the checkpoint last.
func (p *publisher) messages(b *batch) ([]*nats.Msg, error) {
	msgs := make([]*nats.Msg, 0, len(b.decisions)+1)
	for i := range b.decisions {
		d := &b.decisions[i]
		data, err := ledger.MarshalDecision(d)
		if err != nil {
			return nil, err
		}
		msgs = append(msgs, &nats.Msg{Subject: kvPrefix + ledger.DecisionKey(p.shard, d.Account, d.LimitID), Data: data})
	}
	if b.lone {
		ledger.ExpectLastOf(msgs[0], checkpointSubject(p.shard), b.expect)
		return msgs, nil
	}
	m, err := b.next.message(p.shard)
	if err != nil {
		return nil, err
	}
	ledger.ExpectLast(m, b.expect)
	return append(msgs, m), nil
}

// acked says that the batch in flight is stored, the last of it at the given
// stream sequence. It returns the snapshot that is not needed any more, if any.
func (p *publisher) acked(sequence uint64) (obsolete string) {
	b := p.flight
	p.flight = nil
	p.written = max(p.written, sequence)
	p.queue = p.queue[len(b.decisions):]
	if len(p.queue) == 0 {
		p.queue = nil // lets go of the array that it was cut from
	}
	if b.lone {
		return ""
	}
	p.revision = sequence
	if b.next.snapshot != p.last.snapshot {
		obsolete = p.last.snapshot
	}
	if b.next.snapshot == p.snapshot {
		p.snapshot = ""
	}
	p.last = b.next
	return obsolete
}

// position is what the stream says of a shard.
type position struct {
	// revision is where the newest checkpoint stands, 0: there is none; it
	// says found.
	revision uint64
	found    checkpoint
	// newest decision, and where it stands.
	newest   told
	newestAt uint64
}

// failed says that it is not known whether the batch in flight is stored, and
// how the stream stands. When again is true what is in flight now is to be
// published: the very same atomic batch, which may still be on its way (only
// the same content can be recognised when it arrives), or one in place of a lone
// decision. It returns ErrStale when somebody else has written since.
func (p *publisher) failed(at position) (again bool, obsolete string, err error) {
	b := p.flight
	switch {
	case b.lone && at.revision == b.expect && at.newest == toldBy(&b.decisions[0]):
		return false, p.acked(at.newestAt), nil
	case b.lone && at.revision == b.expect:
		p.flight = p.gather()
		return true, "", nil
	case at.revision == b.expect:
		return true, "", nil
	case !b.lone && at.found == b.next:
		return false, p.acked(at.revision), nil
	}
	return false, "", p.stale(at.found)
}

func (p *publisher) stale(found checkpoint) error {
	return fmt.Errorf("shard %d: epoch %d has taken it over from epoch %d: %w", p.shard, found.epoch, p.last.epoch, ledger.ErrStale)
}
