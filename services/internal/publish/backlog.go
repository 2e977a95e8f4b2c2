package publish

import (
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Backlog is what a member keeps of the decisions of a shard that it folds and
// does not own, so that it can go on where the owner stops: every decision that
// it has made and does not know to be stored. The zero value belongs to a state
// whose decisions are all stored, such as a snapshot's.
type Backlog struct {
	queue []usage.Decision
	// dropped is the newest decision that was let go without being known to
	// be stored; until it is, nobody can begin with this backlog.
	dropped Told
	lacks   bool
	// seen is the newest sequence of the stream that is known.
	seen uint64
}

// Add takes the decisions of an entry, in the order of accounts and limits.
func (b *Backlog) Add(decisions []usage.Decision) { b.queue = append(b.queue, decisions...) }

// Len is how many decisions are kept.
func (b *Backlog) Len() int { return len(b.queue) }

// Drop lets everything go.
func (b *Backlog) Drop() {
	if n := len(b.queue); n > 0 {
		b.dropped, b.lacks = ToldBy(&b.queue[n-1]), true
		b.queue = nil
	}
}

// Saw takes how the stream stands, or stood: what is stored is let go.
func (b *Backlog) Saw(at Position) {
	b.seen = max(b.seen, at.Revision, at.NewestAt)
	b.trim(at.Found.Sequence, at.Newest)
}

func (b *Backlog) trim(upTo uint64, told Told) {
	n := 0
	for n < len(b.queue) && (b.queue[n].Revision <= upTo || told.Covers(&b.queue[n])) {
		n++
	}
	if n == len(b.queue) {
		b.queue = nil
	} else {
		b.queue = b.queue[n:]
	}
	last := usage.Decision{Revision: b.dropped.Revision, Account: b.dropped.Account, LimitID: b.dropped.Limit}
	if b.lacks && (last.Revision <= upTo || told.Covers(&last)) {
		b.lacks = false
	}
}

// Resume begins to publish as New does, with the decisions of a state that has
// folded everything up to applied. It returns false when some may be missing:
// then only a state of which all decisions are stored will do.
func (b *Backlog) Resume(shard uint32, revision uint64, last Checkpoint, t Told, applied uint64) (Publisher, bool) {
	b.trim(last.Sequence, t)
	// What was seen to be stored is not any more if the stream has lost its end.
	if b.lacks || revision < b.seen {
		return Publisher{}, false
	}
	p := New(shard, revision, last, t)
	for i := range b.queue {
		p.Add(b.queue[i].Revision, b.queue[i:i+1])
	}
	p.applied = max(p.applied, applied)
	return p, true
}

// Resign ends the publishing: somebody else may have begun, or will.
func (p *Publisher) Resign() Backlog {
	return Backlog{queue: slices.Clone(p.queue), seen: max(p.revision, p.written)}
}
