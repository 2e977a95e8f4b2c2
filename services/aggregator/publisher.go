package aggregator

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// checkpoint says how far a shard's decisions are published. It stands in one
// atomic batch with them.
type checkpoint struct {
	epoch uint64
	// owner tells two owners apart that both believe to have taken an epoch.
	owner string
	// sequence: every decision of entries up to it is published.
	sequence uint64
	// partly and count: and the first count decisions of this later entry.
	partly uint64
	count  int
	// snapshot is the object that holds the state to start from; every
	// decision up to its position is published. Empty: there is none.
	snapshot string
}

// Headers of a checkpoint message: what only the owner's successor needs.
const (
	ownerHeader    = "Tollkeeper-Owner"
	snapshotHeader = "Tollkeeper-Snapshot"
	partlyHeader   = "Tollkeeper-Partly" // "<ledger sequence>:<decisions>"
)

const kvPrefix = "$KV." + ledger.DecisionsBucket + "."

func (c checkpoint) message(shard uint32) (*nats.Msg, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(&tollkeeperv1.Checkpoint{Shard: shard, Epoch: c.epoch, LedgerSequence: c.sequence})
	if err != nil {
		return nil, fmt.Errorf("marshal checkpoint: %w", err)
	}
	m := &nats.Msg{Subject: kvPrefix + ledger.CheckpointKey(shard), Data: data, Header: nats.Header{ownerHeader: {c.owner}}}
	if c.snapshot != "" {
		m.Header.Set(snapshotHeader, c.snapshot)
	}
	if c.count > 0 {
		m.Header.Set(partlyHeader, fmt.Sprintf("%d:%d", c.partly, c.count))
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
	if v := header.Get(partlyHeader); v != "" {
		entry, count, _ := strings.Cut(v, ":")
		var err error
		if c.partly, err = strconv.ParseUint(entry, 10, 64); err == nil {
			c.count, err = strconv.Atoi(count)
		}
		if err != nil {
			return checkpoint{}, fmt.Errorf("the checkpoint of shard %d: %s is %q: %w", shard, partlyHeader, v, err)
		}
	}
	return c, nil
}

// publisher decides what is published next and what was. It is a pure state
// machine: one batch at a time, in the ledger's order, and after an unclear
// result what the stream says.
type publisher struct {
	shard uint32
	// revision is the stream sequence of the newest checkpoint we know of,
	// last is what it says.
	revision uint64
	last     checkpoint
	// queue holds the decisions that are not known to be published.
	queue []usage.Decision
	// applied is the newest entry whose decisions are in the queue or before.
	applied uint64
	// snapshot is an object that is uploaded and not yet named by a checkpoint.
	snapshot   string
	snapshotAt uint64
	flight     *batch
	// owed is how many decisions of entry last.partly were made so far in a
	// replay; they are published already.
	owed int
}

// batch is what is published at once.
type batch struct {
	decisions []usage.Decision
	next      checkpoint
	expect    uint64
}

// add takes the decisions of an entry. Those of a replay that are published
// already are left out.
func (p *publisher) add(sequence uint64, decisions []usage.Decision) {
	p.applied = sequence
	if sequence <= p.last.sequence || len(decisions) == 0 {
		return
	}
	if p.owed > 0 && sequence == p.last.partly {
		n := min(p.owed, len(decisions))
		decisions = decisions[n:]
		p.owed = 0
	}
	for i := range decisions {
		decisions[i].Epoch = p.last.epoch
	}
	p.queue = append(p.queue, decisions...)
}

// next returns the batch that is due, nil when there is none or one is in
// flight. The batch stays in flight until acked or failed.
func (p *publisher) next() *batch {
	named := p.snapshot != "" && (len(p.queue) == 0 || p.queue[0].Revision > p.snapshotAt)
	if p.flight != nil || (len(p.queue) == 0 && !named) {
		return nil
	}
	n := min(len(p.queue), ledger.MaxBatch-1)
	next := p.last
	next.sequence = p.applied
	if p.applied >= p.last.partly {
		// Else a replay has yet to come to that entry.
		next.partly, next.count = 0, 0
	}
	if n < len(p.queue) {
		cut := p.queue[n].Revision
		next.sequence, next.partly, next.count = cut-1, 0, 0
		for i := n; i > 0 && p.queue[i-1].Revision == cut; i-- {
			next.count++
		}
		if next.count > 0 {
			next.partly = cut
			if p.last.partly == cut {
				next.count += p.last.count
			}
		}
	}
	next.sequence = max(next.sequence, p.last.sequence)
	if p.snapshot != "" && p.snapshotAt <= next.sequence {
		next.snapshot = p.snapshot
	}
	p.flight = &batch{decisions: p.queue[:n:n], next: next, expect: p.revision}
	return p.flight
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
	m, err := b.next.message(p.shard)
	if err != nil {
		return nil, err
	}
	ledger.ExpectLast(m, b.expect)
	return append(msgs, m), nil
}

// acked says that the batch in flight is stored and its checkpoint stands at
// the given stream sequence. It returns the snapshot that is not needed any
// more, if any.
func (p *publisher) acked(revision uint64) (obsolete string) {
	b := p.flight
	p.flight = nil
	p.revision = revision
	p.queue = p.queue[len(b.decisions):]
	if len(p.queue) == 0 {
		p.queue = nil // lets go of the array that it was cut from
	}
	if b.next.snapshot != p.last.snapshot {
		obsolete = p.last.snapshot
	}
	if b.next.snapshot == p.snapshot {
		p.snapshot = ""
	}
	p.last = b.next
	return obsolete
}

// failed says that it is not known whether the batch in flight is stored, and
// what the newest checkpoint is: at revision, saying found. When again is true
// the very same batch is to be published again: it may still be on its way, and
// only the same content can be recognised when it arrives. It returns ErrStale
// when somebody else has written since.
func (p *publisher) failed(revision uint64, found checkpoint) (again bool, obsolete string, err error) {
	switch {
	case revision == p.flight.expect:
		return true, "", nil
	case found == p.flight.next:
		return false, p.acked(revision), nil
	}
	return false, "", p.stale(found)
}

func (p *publisher) stale(found checkpoint) error {
	return fmt.Errorf("shard %d: epoch %d has taken it over from epoch %d: %w", p.shard, found.epoch, p.last.epoch, ledger.ErrStale)
}
