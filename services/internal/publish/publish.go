// Package publish decides in which order a shard's decisions are published, and
// what was published after whatever failed: a pure state machine and the form of
// the checkpoint. Its caller does the publishing.
package publish

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

// Checkpoint says how far a shard's decisions are published, at least, and who
// may publish more: each of them is stored only as long as the checkpoint that
// its owner knows is the newest.
type Checkpoint struct {
	Epoch uint64
	// Owner tells two owners apart that both believe to have taken an epoch.
	Owner string
	// Sequence: every decision of entries up to it is published. Of later
	// entries those are that the shard's newest decision covers.
	Sequence uint64
	// Snapshot is the object that holds the state to start from; every
	// decision up to its position is published. Empty: there is none.
	Snapshot string
}

// Headers of a checkpoint message: what only the owner's successor needs.
const (
	ownerHeader    = "Tollkeeper-Owner"
	snapshotHeader = "Tollkeeper-Snapshot"
)

const kvPrefix = "$KV." + ledger.DecisionsBucket + "."

// CheckpointSubject is where a shard's checkpoints stand.
func CheckpointSubject(shard uint32) string { return kvPrefix + ledger.CheckpointKey(shard) }

// DecisionsSubject matches every decision of a shard.
func DecisionsSubject(shard uint32) string {
	return kvPrefix + strconv.FormatUint(uint64(shard), 10) + ".>"
}

// Message returns the message that stores the checkpoint; it has no expectation.
func (c Checkpoint) Message(shard uint32) (*nats.Msg, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(&tollkeeperv1.Checkpoint{Shard: shard, Epoch: c.Epoch, LedgerSequence: c.Sequence})
	if err != nil {
		return nil, fmt.Errorf("marshal checkpoint: %w", err)
	}
	m := &nats.Msg{Subject: CheckpointSubject(shard), Data: data, Header: nats.Header{ownerHeader: {c.Owner}}}
	if c.Snapshot != "" {
		m.Header.Set(snapshotHeader, c.Snapshot)
	}
	return m, nil
}

// ReadCheckpoint reads what Message wrote.
func ReadCheckpoint(shard uint32, header nats.Header, data []byte) (Checkpoint, error) {
	var p tollkeeperv1.Checkpoint
	if err := proto.Unmarshal(data, &p); err != nil {
		return Checkpoint{}, fmt.Errorf("the checkpoint of shard %d is not protobuf: %w", shard, err)
	}
	if p.GetShard() != shard {
		return Checkpoint{}, fmt.Errorf("the checkpoint of shard %d says it is of shard %d", shard, p.GetShard())
	}
	c := Checkpoint{Epoch: p.GetEpoch(), Sequence: p.GetLedgerSequence(), Owner: header.Get(ownerHeader), Snapshot: header.Get(snapshotHeader)}
	return c, nil
}

// Told is the newest decision in the stream. Decisions are published in one
// order, by entry, then account, then limit: so all before it are there too.
type Told struct {
	Revision       uint64
	Account, Limit string
}

// ToldBy returns how far one is who has published a decision.
func ToldBy(d *usage.Decision) Told { return Told{d.Revision, d.Account, d.LimitID} }

// Covers reports whether a decision is that one or stands before it.
func (t Told) Covers(d *usage.Decision) bool {
	return cmp.Or(cmp.Compare(d.Revision, t.Revision), cmp.Compare(d.Account, t.Account), cmp.Compare(d.LimitID, t.Limit)) <= 0
}

// fewDecisions is up to how many are published one by one: an atomic batch
// costs the server a store of its own, as much as many plain messages.
const fewDecisions = 4

// Publisher decides what is published next and what was. It is a pure state
// machine: one batch or one lone decision at a time, in the ledger's order, and
// after an unclear result what the stream says.
//
// A lone decision is conditional on the checkpoint, which it does not move. So
// one that may still be on its way could be stored again later, after newer
// ones: after an unclear result the next to be published is an atomic batch,
// whose checkpoint shuts such a straggler out. What is left is that a decision
// may stand twice, one right after the other.
type Publisher struct {
	shard uint32
	// revision is the stream sequence of the newest checkpoint we know of,
	// last is what it says; written is the newest of all that we have stored.
	revision, written uint64
	last              Checkpoint
	// told is what the owner before has published.
	told Told
	// queue holds the decisions that are not known to be published.
	queue []usage.Decision
	// applied is the newest entry whose decisions are in the queue or before.
	applied uint64
	// snapshot is an object that is uploaded and not yet named by a checkpoint.
	snapshot   string
	snapshotAt uint64
	flight     *Batch
}

// New begins where a takeover has stored the checkpoint last at
// revision and found the newest decision t.
func New(shard uint32, revision uint64, last Checkpoint, t Told) Publisher {
	return Publisher{shard: shard, revision: revision, written: revision, last: last, told: t, applied: last.Sequence}
}

// Last is the newest checkpoint that is known to stand.
func (p *Publisher) Last() Checkpoint { return p.last }

// Written is the newest sequence of the stream that this publisher has stored.
func (p *Publisher) Written() uint64 { return p.written }

// Queued is how many decisions are not known to be published.
func (p *Publisher) Queued() int { return len(p.queue) }

// Flight is what Next returned and is neither acked nor failed; nil: nothing.
func (p *Publisher) Flight() *Batch { return p.flight }

// Offer takes the name of a snapshot of the state after entry at, for a
// checkpoint to name; the one before must have been named (Offered is false).
func (p *Publisher) Offer(name string, at uint64) { p.snapshot, p.snapshotAt = name, at }

// Offered reports whether a snapshot waits to be named.
func (p *Publisher) Offered() bool { return p.snapshot != "" }

// Batch is what is published at once.
type Batch struct {
	Decisions []usage.Decision
	// Lone: a decision without a checkpoint.
	Lone   bool
	next   Checkpoint
	expect uint64
}

// Add takes the decisions of an entry, in the order of accounts and limits.
// Those of a replay that are published already are left out.
func (p *Publisher) Add(sequence uint64, decisions []usage.Decision) {
	p.applied = sequence
	if sequence <= p.last.Sequence {
		return
	}
	for i := range decisions {
		d := &decisions[i]
		if p.told.Covers(d) {
			continue
		}
		d.Epoch = p.last.Epoch
		p.queue = append(p.queue, *d)
	}
}

// Next returns the batch that is due, nil when there is none or one is in
// flight. The batch stays in flight until Acked or Failed.
func (p *Publisher) Next() *Batch {
	named := p.snapshot != "" && (len(p.queue) == 0 || p.queue[0].Revision > p.snapshotAt)
	switch {
	case p.flight != nil || (len(p.queue) == 0 && !named):
		return nil
	case !named && len(p.queue) <= fewDecisions:
		p.flight = &Batch{Decisions: p.queue[:1:1], Lone: true, next: p.last, expect: p.revision}
	default:
		p.flight = p.gather()
	}
	return p.flight
}

// gather makes an atomic batch of as much as there is.
func (p *Publisher) gather() *Batch {
	n := min(len(p.queue), ledger.MaxBatch-1)
	next := p.last
	next.Sequence = p.applied
	if n < len(p.queue) {
		next.Sequence = p.queue[n].Revision - 1
	}
	next.Sequence = max(next.Sequence, p.last.Sequence)
	if p.snapshot != "" && p.snapshotAt <= next.Sequence {
		next.Snapshot = p.snapshot
	}
	return &Batch{Decisions: p.queue[:n:n], next: next, expect: p.revision}
}

// Messages returns the batch's messages, the checkpoint last.
func (p *Publisher) Messages(b *Batch) ([]*nats.Msg, error) {
	msgs := make([]*nats.Msg, 0, len(b.Decisions)+1)
	for i := range b.Decisions {
		d := &b.Decisions[i]
		data, err := ledger.MarshalDecision(d)
		if err != nil {
			return nil, err
		}
		msgs = append(msgs, &nats.Msg{Subject: kvPrefix + ledger.DecisionKey(p.shard, d.Account, d.LimitID), Data: data})
	}
	if b.Lone {
		ledger.ExpectLastOf(msgs[0], CheckpointSubject(p.shard), b.expect)
		return msgs, nil
	}
	m, err := b.next.Message(p.shard)
	if err != nil {
		return nil, err
	}
	ledger.ExpectLast(m, b.expect)
	return append(msgs, m), nil
}

// Acked says that the batch in flight is stored, the last of it at the given
// stream sequence. It returns the snapshot that is not needed any more, if any.
func (p *Publisher) Acked(sequence uint64) (obsolete string) {
	b := p.flight
	p.flight = nil
	p.written = max(p.written, sequence)
	p.queue = p.queue[len(b.Decisions):]
	if len(p.queue) == 0 {
		p.queue = nil // lets go of the array that it was cut from
	}
	if b.Lone {
		return ""
	}
	p.revision = sequence
	if b.next.Snapshot != p.last.Snapshot {
		obsolete = p.last.Snapshot
	}
	if b.next.Snapshot == p.snapshot {
		p.snapshot = ""
	}
	p.last = b.next
	return obsolete
}

// Position is what the stream says of a shard.
type Position struct {
	// Revision is where the newest checkpoint stands, 0: there is none; it
	// says Found.
	Revision uint64
	Found    Checkpoint
	// Newest decision, and where it stands.
	Newest   Told
	NewestAt uint64
}

// Failed says that it is not known whether the batch in flight is stored, and
// how the stream stands. When again is true what is in flight now is to be
// published: the very same atomic batch, which may still be on its way (only
// the same content can be recognised when it arrives), or one in place of a lone
// decision. It returns ErrStale when somebody else has written since.
func (p *Publisher) Failed(at Position) (again bool, obsolete string, err error) {
	b := p.flight
	switch {
	case b.Lone && at.Revision == b.expect && at.Newest == ToldBy(&b.Decisions[0]):
		return false, p.Acked(at.NewestAt), nil
	case b.Lone && at.Revision == b.expect:
		p.flight = p.gather()
		return true, "", nil
	case at.Revision == b.expect:
		return true, "", nil
	case !b.Lone && at.Found == b.next:
		return false, p.Acked(at.Revision), nil
	}
	return false, "", p.stale(at.Found)
}

func (p *Publisher) stale(found Checkpoint) error {
	return fmt.Errorf("shard %d: epoch %d has taken it over from epoch %d: %w", p.shard, found.Epoch, p.last.Epoch, ledger.ErrStale)
}
