package wallet

import (
	"context"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// JournalOf returns that of an outbox which a kill leaves something of; else nil.
func JournalOf(outbox any) Journal {
	if m, ok := outbox.(interface{ Marks() *marks.Journal }); ok {
		if j := m.Marks(); j != nil {
			return j
		}
	}
	return nil
}

// notary notes the marks of purses in the journal: what gathers while one batch is
// written goes with the next.
type notary struct {
	w       *Wallet
	trouble trouble

	mu   sync.Mutex
	list []noting // each pocket once
	kick chan struct{}
}

type noting struct {
	d *desk
	p *pocket
}

// unnotedPause is how long a journal that fails is left alone.
const unnotedPause = 250 * time.Millisecond

func newNotary(w *Wallet) *notary {
	return &notary{w: w, kick: make(chan struct{}, 1), trouble: trouble{
		log:    w.o.Logger,
		failed: "what leases may be used can't be noted: calls go on with what is, and are refused after that; make room in the spool directory, or mend it; trying again",
		works:  "what leases may be used is noted again",
	}}
}

// want has the purse's next mark noted if it needs one. With d.mu.
func (n *notary) want(d *desk, p *pocket) {
	mark, ok := p.purse.Mark(d.w.Clock())
	if !ok || mark <= p.wanted {
		return
	}
	p.wanted = mark
	if p.noting {
		return
	}
	p.noting = true
	n.mu.Lock()
	n.list = append(n.list, noting{d, p})
	n.mu.Unlock()
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

func (n *notary) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.kick:
		}
		for list := n.next(); len(list) > 0 && ctx.Err() == nil; list = n.next() {
			if n.note(list) {
				continue
			}
			select {
			case <-ctx.Done():
			case <-time.After(unnotedPause):
			}
		}
	}
}

// next takes a batch from the list.
func (n *notary) next() []noting {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := n.list
	if len(list) > marks.MaxBatch {
		list = list[:marks.MaxBatch:marks.MaxBatch]
	}
	n.list = n.list[len(list):]
	return list
}

// note writes a batch and then has its units used.
func (n *notary) note(list []noting) bool {
	batch := make([]marks.Mark, len(list))
	purses := make([]*lease.Purse, len(list))
	for i, x := range list {
		x.d.mu.Lock()
		x.p.noting = false
		purses[i] = x.p.purse
		batch[i] = marks.Mark{
			Shard: x.d.shard, Account: x.p.account, Limit: x.p.limit, Start: usage.Micros(x.p.start), End: usage.Micros(x.p.end), UsedAtMost: x.p.wanted,
		}
		x.d.mu.Unlock()
	}
	err := n.w.o.Journal.Write(usage.Micros(n.w.tell()), batch)
	if err != nil {
		n.w.metrics.unnoted.Add(float64(len(batch)))
		n.trouble.begins(err)
	} else {
		n.w.metrics.marks.Add(float64(len(batch)))
		n.trouble.ends()
	}
	for i, x := range list {
		x.d.mu.Lock()
		switch {
		case x.p.purse != purses[i] || x.p.gone:
		case err != nil && x.p.wanted == batch[i].UsedAtMost:
			x.p.wanted = 0 // whoever looks next wants it again
		case err != nil:
		default:
			x.p.purse.Unlocked(batch[i].UsedAtMost)
			x.p.of.Told()
			x.d.serve(x.p, n.w.tell())
		}
		x.d.mu.Unlock()
		if err == nil {
			x.d.wake()
		}
	}
	return err == nil
}
