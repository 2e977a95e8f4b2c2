package wallet

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// key identifies an allowance.
type key struct {
	account, limit string
	start          lease.Micros
}

// pocket is a purse with its surroundings; the desk's lock is for all of it.
type pocket struct {
	key
	end      lease.Micros // of the window; 0: never
	purse    *lease.Purse
	of       *table.Allowance
	meter    int // index of its label
	pos      int // in the desk's list
	queue    []*waiter
	decision *usage.Decision // of the newest denial
	sent     lease.Ask       // the newest that is in the ledger or on its way
	heard    uint64          // newest ask that was answered
	wanted   int64           // mark that the notary was asked for; 0: none, or it failed
	again    lease.Micros    // when, by the wallet's pace, a new purse may be tried; 0: this one is good
	touched  lease.Micros    // when, by the wallet's pace, a call needed it last that was not admitted at once, or it spoke
	ahead    lease.Micros    // how far the ledger's time was before the wallet's pace when the purse was last looked at
	holds    int             // reservations that are not settled
	grace    bool            // somebody waits although an early denial stands
	due      bool            // in the desk's list of those whose Next is to be called
	hot      bool            // in the list of those that wait for something
	gone     bool            // forgotten
	said     bool            // the last word is in the ledger
	noting   bool            // in the notary's list
}

// desk keeps the purses of one shard and sends their asks, one entry at a time.
type desk struct {
	w     *Wallet
	shard uint32

	mu      sync.Mutex
	pockets map[key]*pocket
	byPurse map[*lease.Purse]*pocket
	open    []*pocket // for the round
	at      int       // of the round
	due     []*pocket
	hot     []*pocket
	turning []*waiter // for the next window

	shelf    map[key]shelved
	floor    uint64       // no purse that has no record has said anything under a higher number
	failedAt lease.Micros // when, by the wallet's pace, an entry was lost

	kick chan struct{}
	low  chan *lease.Purse
}

const (
	// lowRoom bounds how many purses can be told of at a time.
	lowRoom = 1024
	// beat is how often a desk looks at what it waits for; a lap is how many
	// beats it takes to look at everything.
	beat = 25 * time.Millisecond
	lap  = 40
	// unknownPause is how long an allowance that the ledger does not know is not
	// asked for again.
	unknownPause = lease.Micros(500_000)
	// maxAppend bounds how long an entry may take; what was lost is said again.
	maxAppend = time.Second
)

func (d *desk) init(w *Wallet, shard uint32) {
	d.w, d.shard = w, shard
	d.pockets, d.byPurse = make(map[key]*pocket), make(map[*lease.Purse]*pocket)
	d.shelf = make(map[key]shelved)
	d.kick, d.low = make(chan struct{}, 1), make(chan *lease.Purse, lowRoom)
}

func (d *desk) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// pocket returns that of the limit's current window and opens it when it is not;
// else which bound is in the way. With d.mu.
func (d *desk) pocket(l *table.Draw, now lease.Micros) (*pocket, Bound) {
	kind, ok := window.Parse(l.Limit.Window)
	if !ok {
		return nil, Unbounded // of a newer writer
	}
	pace := d.w.pace(now)
	start, end := kind.Bounds(usage.Micros(now))
	k := key{l.Account(), l.LimitID(), lease.Micros(start)}
	p := d.pockets[k]
	if p == nil {
		if d.w.purses.Add(1) > int64(d.w.o.MaxPurses) {
			d.w.purses.Add(-1)
			return nil, Purses
		}
		p = &pocket{key: k, end: lease.Micros(end), of: l.Allowance, meter: meterLabel(l.Limit.Meter), ahead: now - pace}
		d.pockets[k] = p
		d.fill(p, l.Limit)
		d.resume(p)
		p.pos = len(d.open)
		d.open = append(d.open, p)
	}
	if p.end != lease.Micros(end) {
		// The limit has another window, that began at the same time.
		p.end = lease.Micros(end)
		p.purse.SetEnd(p.end)
	}
	if p.again != 0 && (pace >= p.again || pace < p.again-unknownPause) { // or the clock was set back
		delete(d.byPurse, p.purse)
		seq := p.sent.Seq
		d.w.metrics.sent(p.meter, &p.sent, &lease.Ask{})
		p.again, p.sent, p.said, p.wanted = 0, lease.Ask{}, false, 0
		d.fill(p, l.Limit)
		p.purse.After(seq)
	}
	if p.of != l.Allowance {
		p.of = l.Allowance // the table was made anew
	}
	if p.of.Purse() != p.purse {
		p.of.Told()
		p.of.Use(p.purse)
	}
	p.touched = pace
	d.follow(p, now)
	return p, Unbounded
}

// follow keeps a test clock's jumps out of the pauses of a purse, and has them pass while
// it stands still. It is called before whatever looks at them. With d.mu.
func (d *desk) follow(p *pocket, now lease.Micros) {
	ahead := now - d.w.pace(now)
	if ahead != p.ahead {
		p.purse.Shift(ahead - p.ahead)
		p.ahead = ahead
	}
}

// fill puts a new purse into a pocket.
func (d *desk) fill(p *pocket, l *usage.Limit) {
	p.purse = lease.NewPurse(d.w.gateway, p.end, habits(l, d.w.skew, d.w.notary != nil))
	p.purse.Start = p.start
	d.byPurse[p.purse] = p
}

// habits of the purses of a limit. In both tiers units of reservations that passed
// their deadline stay held: ReleaseHolds is 0.
func habits(l *usage.Limit, skew lease.Micros, sealed bool) lease.Habits {
	term, patience := lease.Micros(l.Lease.Term), lease.Micros(l.Lease.Patience)
	if term <= 0 {
		term = lease.Micros(usage.DefaultLeaseTerm)
	}
	if patience <= 0 {
		patience = lease.Micros(usage.DefaultLeasePatience)
	}
	h := lease.Habits{
		Skew: min(skew, term/4), Term: term, ReportEvery: min(term/4, 1_000_000),
		RetryAfter: max(min(patience/4, 100_000), 10_000), Recheck: max(patience, 250_000),
		FirstWant: 16, MaxWant: lease.MaxUnits >> 10, Sealed: sealed,
	}
	if l.Meter != usage.Calls {
		h.FirstWant = 1 // what a call needs says how much that is
	}
	return h
}

// all notes that these are to be looked at. With d.mu.
func (d *desk) all(pockets []*pocket) {
	for _, p := range pockets {
		d.look(p)
	}
}

func (d *desk) look(p *pocket) {
	if p.gone {
		return
	}
	if !p.due {
		p.due = true
		d.due = append(d.due, p)
	}
	if d.w.notary != nil {
		d.w.notary.want(d, p)
	}
}

// resolved lets those that wait have what a reservation gave back.
func (d *desk) resolved(pockets []*pocket, how lease.Resolution) {
	d.mu.Lock()
	now := d.w.tell()
	for _, p := range pockets {
		if how != lease.Already {
			p.holds--
		}
		d.serve(p, now)
	}
	d.mu.Unlock()
	d.wake()
}

// serve tries those that wait for a purse, and then sees to its next message: in
// this order, so that what came for them is not given back first. With d.mu.
func (d *desk) serve(p *pocket, now lease.Micros) {
	queue := p.queue
	p.queue = nil
	rest := d.retry(queue, now)
	p.queue = append(p.queue, rest...)
	d.look(p)
}

// hear takes in the answers of the shard's owner.
func (d *desk) hear(m *tollkeeperv1.LeaseAnswers) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.w.tell()
	for _, a := range m.GetAnswers() {
		d.w.metrics.answers.Inc()
		p := d.pockets[key{a.GetAccount(), a.GetLimit(), lease.Micros(a.GetWindowStartUnixMicros())}]
		if p == nil {
			continue // its window is over
		}
		if len(a.GetDecision()) > 0 {
			decision, err := ledger.UnmarshalDecision(a.GetDecision())
			switch {
			case err != nil:
				d.w.metrics.undecodable.Inc()
			case p.decision == nil || decision.Revision >= p.decision.Revision:
				p.decision = &decision
			}
		}
		soon := lease.MaxUnits // an older owner does not say
		if a.Soon != nil {
			soon = max(0, min(a.GetSoon(), lease.MaxUnits))
		}
		d.receive(p, lease.Answer{
			Gateway: d.w.gateway, Epoch: m.GetEpoch(), Revision: a.GetRevision(), Seq: a.GetSeq(), Granted: a.GetGranted(),
			Expiry: lease.Micros(a.GetExpiryUnixMicros()), Verdict: lease.Verdict(a.GetStanding()), Room: a.GetRoom(), Soon: soon, Recall: a.GetRecall(),
		}, now)
	}
	d.wake()
}

func (d *desk) receive(p *pocket, a lease.Answer, now lease.Micros) {
	if a.Granted > p.sent.Known {
		d.w.metrics.grants.Inc()
	}
	p.heard = max(p.heard, a.Seq)
	d.follow(p, now)
	p.purse.Receive(a, now)
	p.of.Told()
	d.serve(p, now)
}

// run sends what is due until ctx is done.
func (d *desk) run(ctx context.Context) {
	timer := time.NewTimer(beat)
	timer.Stop()
	defer timer.Stop()
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	// While an entry is on its way, however long, purses are looked after. A beat that
	// is due is not put off by what wakes the desk meanwhile: it may be woken all the
	// time.
	busy, done := false, make(chan struct{}, 1)
	beats := false
	for {
		select {
		case <-ctx.Done():
			if busy {
				<-done
			}
			return
		case <-done:
			busy = false
		case <-d.kick:
			d.lows()
		case <-timer.C:
			beats = false
			d.tick()
		case <-sweep.C:
			d.sweep()
		}
		if !busy {
			if entry, pockets := d.gather(); entry != nil {
				busy = true
				go func() {
					d.append(ctx, entry, pockets)
					done <- struct{}{}
				}()
			}
		}
		if !beats && !d.idle() {
			beats = true
			timer.Reset(beat)
		}
	}
}

func (d *desk) idle() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open) == 0 && len(d.turning) == 0 && (len(d.shelf) == 0 || !d.w.closing.Load())
}

// lows looks at the purses that run low.
func (d *desk) lows() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for range lowRoom {
		select {
		case purse := <-d.low:
			if p := d.byPurse[purse]; p != nil {
				d.look(p)
			}
		default:
			return
		}
	}
}

// tick looks at those that wait for something, and at some of all.
func (d *desk) tick() {
	d.lows()
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.w.tell()
	d.turn(now)
	for _, p := range d.hot {
		p.hot = false
		p.queue = slices.DeleteFunc(p.queue, func(x *waiter) bool { return x.over })
		if len(p.queue) > 0 && (p.grace || p.end != 0 && now >= p.end-d.w.skew) {
			p.grace = false
			d.serve(p, now) // they give up, or want the next window's
		}
		d.look(p)
	}
	clear(d.hot)
	d.hot = d.hot[:0]
	for range (len(d.open) + lap - 1) / lap {
		if d.at >= len(d.open) {
			d.at = 0
		}
		p := d.open[d.at]
		if d.shelve(p, now) {
			continue // another is in its place
		}
		d.at++
		p.of.Told()
		d.look(p)
	}
}

// turn lets those go on whose next window has begun. With d.mu.
func (d *desk) turn(now lease.Micros) {
	if len(d.turning) == 0 {
		return
	}
	waiting := d.turning
	d.turning = nil
	var later, turned []*waiter
	for _, x := range waiting {
		switch {
		case x.over:
		case now < x.turn && !d.w.closing.Load():
			later = append(later, x)
		default:
			turned = append(turned, x)
		}
	}
	rest := d.retry(turned, now)
	d.turning = append(append(d.turning, later...), rest...)
}

// gather makes an entry of what is due; nil: nothing is.
func (d *desk) gather() (*tollkeeperv1.LeaseEntry, []*pocket) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.w.tell()
	var entry *tollkeeperv1.LeaseEntry
	var pockets []*pocket
	taken := 0
	for _, p := range d.due {
		if len(pockets) == ledger.MaxAsks {
			break
		}
		taken++
		p.due = false
		if p.gone {
			continue
		}
		d.follow(p, now)
		m, ok := p.purse.Next(now)
		past := p.end != 0 && now >= p.end
		if p.purse.Done() || past && p.purse.Ended() {
			// Nobody keeps account of a window that the ledger has seen the end of: what
			// is still reserved in it, maybe for ever, is the calls' own affair.
			d.turning = append(d.turning, p.queue...)
			p.queue = nil
			switch {
			case past || d.w.closing.Load() || p.sent.Seq == 0:
				d.forget(p)
			case p.again == 0:
				// It ended before its window did: the shard does not know the limit as
				// one that has leases, or not yet (a plan can take effect after the
				// directory told of it). Another purse may be tried in a while.
				p.again = d.w.pace(now) + unknownPause
			}
			continue
		}
		if ok {
			if entry == nil {
				entry = &tollkeeperv1.LeaseEntry{Gateway: d.w.o.Gateway.Bytes(), Name: d.w.o.Name}
			}
			entry.Asks = append(entry.Asks, askToProto(p.key, &m))
			pockets = append(pockets, p)
			d.w.metrics.sent(p.meter, &p.sent, &m)
			p.sent, p.touched = m, max(p.touched, d.w.pace(now))
		}
		if waits := p.sent.Seq > p.heard || len(p.queue) > 0; waits && !p.hot {
			p.hot = true
			d.hot = append(d.hot, p)
		}
	}
	d.due = slices.Delete(d.due, 0, taken)
	if d.w.closing.Load() && len(d.shelf) > 0 && len(pockets) < ledger.MaxAsks {
		if entry == nil {
			entry = &tollkeeperv1.LeaseEntry{Gateway: d.w.o.Gateway.Bytes(), Name: d.w.o.Name}
		}
		if entry.Asks = d.lastWords(entry.Asks, ledger.MaxAsks-len(pockets), now); len(entry.Asks) == 0 {
			entry = nil
		}
	}
	return entry, pockets
}

func askToProto(k key, m *lease.Ask) *tollkeeperv1.LeaseAsk {
	return &tollkeeperv1.LeaseAsk{
		Account: k.account, Limit: k.limit, WindowStartUnixMicros: int64(k.start), Seq: m.Seq, SentUnixMicros: int64(m.Sent), Seen: m.Seen, Known: m.Known,
		Used: m.Used, Returned: m.Returned, Over: m.Over, Held: m.Held, Need: m.Need, Want: m.Want, Renew: m.Renew, Closing: m.Closing,
	}
}

// append brings an entry into the ledger. What fails is not repeated here: the
// purses say again what was not answered.
func (d *desk) append(ctx context.Context, entry *tollkeeperv1.LeaseEntry, pockets []*pocket) {
	msg, err := ledger.LeaseMessage(d.shard, entry)
	if err == nil {
		within, cancel := context.WithTimeout(ctx, maxAppend)
		_, err = d.w.o.JS.PublishMsg(within, msg, jetstream.WithRetryAttempts(0))
		cancel()
	}
	if err != nil {
		if ctx.Err() == nil {
			d.w.metrics.lost.Add(float64(len(entry.GetAsks())))
			d.w.trouble.begins(err)
			d.mu.Lock()
			d.failedAt = d.w.pace(d.w.tell())
			d.mu.Unlock()
		}
		return
	}
	d.w.trouble.ends()
	d.w.metrics.asks.Add(float64(len(entry.GetAsks())))
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, p := range pockets {
		if entry.Asks[i].GetClosing() {
			p.said = true
			d.tellGone()
		}
	}
	for _, a := range entry.GetAsks()[len(pockets):] {
		d.unshelve(key{a.GetAccount(), a.GetLimit(), lease.Micros(a.GetWindowStartUnixMicros())})
		d.tellGone()
	}
}

func (d *desk) tellGone() {
	select {
	case d.w.gone <- struct{}{}:
	default:
	}
}

// forget drops a purse that has nothing to say any more. With d.mu.
func (d *desk) forget(p *pocket) {
	p.gone = true
	delete(d.pockets, p.key)
	delete(d.byPurse, p.purse)
	last := len(d.open) - 1
	d.open[p.pos] = d.open[last]
	d.open[p.pos].pos = p.pos
	d.open[last] = nil
	d.open = d.open[:last]
	if p.of.Purse() == p.purse {
		p.of.Use(nil)
	}
	d.w.purses.Add(-1)
	d.w.metrics.sent(p.meter, &p.sent, &lease.Ask{})
	d.tellGone()
}

// close begins the end of every purse.
func (d *desk) close() {
	d.mu.Lock()
	for _, p := range d.open {
		p.purse.Close()
		d.serve(p, d.w.tell())
	}
	d.turn(d.w.tell())
	d.mu.Unlock()
	d.wake()
}

// unsaid counts the purses whose last word is not in the ledger.
func (d *desk) unsaid() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.shelf)
	for _, p := range d.open {
		if !p.said {
			n++
		}
	}
	return n
}

// dismiss tells those that still wait that nobody will come any more.
func (d *desk) dismiss() {
	d.w.closing.Store(true)
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.w.tell()
	for _, p := range d.open {
		queue := p.queue
		p.queue = nil
		for len(queue) > 0 {
			queue = d.retry(queue, now)
		}
	}
	d.turn(now)
}
