package books

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

type laneKey struct {
	producer dedup.Producer
	shard    uint32
}

// newest identifies a producer's newest message of claims: a copy of it says
// nothing new.
type newest struct {
	Number uint64
	Sum    uint32
	At     time.Time
}

// lane brings together the frames and the claims of a producer and shard.
type lane struct {
	claimed uint64 // frames up to here are claimed, or nobody will
	gaveUp  uint64 // frames up to here were given up as unclaimed
	last    uint64 // newest frame that came
	held    []heldFrame
	waiting []*waiting
	partial *audit.Claim // of which more is to come
	closed  time.Time
	touched time.Time
}

// heldFrame is a frame without a claim.
type heldFrame struct {
	number uint64
	minute audit.Minute
	since  time.Time
	heard  time.Duration // what was heard of claims by then
	calls  int64
	cells  []heldCell
}

type heldCell struct {
	account string
	tally   audit.Tally
}

// waiting is a claim whose frames have not all come.
type waiting struct {
	from, through uint64
	want, got     *audit.Cells
	since         time.Time
	heard         time.Duration // what was heard of the ledger by then
	told          bool
}

// Heard is for how long the streams were listened to to their end: not while the
// auditor was away or behind, nor while they were.
type Heard struct{ Ledger, Claims time.Duration }

func (l *lane) idle() bool { return len(l.held) == 0 && len(l.waiting) == 0 && l.partial == nil }

func (b *Books) lane(key laneKey, now time.Time) *lane {
	l := b.lanes[key]
	if l == nil {
		l = &lane{}
		b.lanes[key] = l
	}
	l.touched = now
	return l
}

// arrived brings a fresh frame of a producer together with its claim.
func (b *Books) arrived(s *shard, f *ledger.Frame, minute audit.Minute, repeated bool, now time.Time) {
	key := laneKey{dedup.Producer(f.Producer), f.Shard}
	l := b.lane(key, now)
	l.last = f.Number
	frame := heldFrame{number: f.Number, minute: minute, since: now, heard: b.heard.Claims, calls: int64(f.N), cells: make([]heldCell, 0, len(f.Account.Dict))}
	for d, account := range f.Account.Dict {
		t := b.scratch.counted[d]
		if repeated {
			// It was sent, and so it is claimed.
			t.Plus(&b.scratch.repeated[d])
		}
		if t.Count > 0 {
			frame.cells = append(frame.cells, heldCell{string(account), t})
		}
	}
	taken := false
	for _, w := range l.waiting {
		if f.Number >= w.from && f.Number <= w.through {
			b.take(w.got, &frame)
			taken = true
		}
	}
	b.settle(key, l)
	switch {
	case taken:
	case b.held+len(frame.cells) > b.o.Cells:
		b.giveUp(l, len(l.held))
		b.stats.Unclaimed += frame.calls
		l.gaveUp = f.Number
	default:
		b.held += len(frame.cells)
		l.held = append(l.held, frame)
	}
}

func (b *Books) take(to *audit.Cells, f *heldFrame) {
	b.stats.Claimed += f.calls
	for i := range f.cells {
		to.At(f.minute, []byte(f.cells[i].account)).Plus(&f.cells[i].tally)
	}
}

// giveUp lets go of the oldest n held frames: nobody has claimed them.
func (b *Books) giveUp(l *lane, n int) {
	for i := range l.held[:n] {
		f := &l.held[i]
		b.stats.Unclaimed += f.calls
		b.held -= len(f.cells)
		l.gaveUp = f.number
	}
	l.held = append([]heldFrame(nil), l.held[n:]...)
}

// settle compares the claims whose frames have come, or have been overtaken.
func (b *Books) settle(key laneKey, l *lane) {
	for len(l.waiting) > 0 && l.waiting[0].through <= l.last {
		w := l.waiting[0]
		l.waiting = l.waiting[1:]
		b.waiting -= w.want.Len()
		b.compared(key, w)
	}
}

func (b *Books) compared(key laneKey, w *waiting) {
	d := audit.Compare(w.want, w.got)
	b.stats.CheckedCells += int64(w.want.Len())
	if d == nil && !w.told && len(b.told) == 0 {
		return
	}
	origin := fmt.Sprintf("%s/%d/%d-%d", ksuid.KSUID(key.producer), key.shard, w.from, w.through)
	if d == nil && !w.told && !b.told[origin] {
		return
	}
	w.told = true
	delete(b.told, origin)
	b.out = append(b.out, Outcome{Pair: GatewayLedger, Origin: origin, From: w.from, To: w.through, Differences: d})
}

// Told takes note of what is an open finding of GatewayLedger: books that were stored
// before it was told, and read on from there, say of it too that it has healed.
func (b *Books) Told(origin string) {
	if b.told == nil {
		b.told = map[string]bool{}
	}
	b.told[origin] = true
}

// Claims folds a message of a producer's claims; position is its place in their
// stream.
func (b *Books) Claims(position uint64, data []byte, now time.Time) error {
	b.ClaimsPosition = position
	m, err := audit.Decode(data)
	if err != nil {
		return err
	}
	sum := binary.LittleEndian.Uint32(data[len(data)-4:]) // the message's own CRC
	if n := b.producers[m.Producer]; n.Number == m.Number && n.Sum == sum {
		return nil
	}
	b.producers[m.Producer] = newest{m.Number, sum, now}
	for i := range m.Claims {
		c := &m.Claims[i]
		if c.Shard >= ledger.MaxShards {
			continue
		}
		b.claim(laneKey{m.Producer, c.Shard}, c, now)
	}
	return nil
}

func (b *Books) claim(key laneKey, c *audit.Claim, now time.Time) {
	l := b.lane(key, now)
	if p := l.partial; p != nil && (p.From != c.From || p.Through != c.Through) {
		// The rest of it was lost: what it covers can't be compared.
		l.partial, l.gaveUp = nil, max(l.gaveUp, p.Through)
		b.stats.LateClaims++
	}
	if c.Through <= l.claimed {
		return // claimed before, by the producer itself or by who reads its spool
	}
	if l.partial == nil {
		l.partial = &audit.Claim{Shard: c.Shard, From: c.From, Through: c.Through, Cells: audit.NewCells(b.o.Cells)}
	}
	for x := range c.Cells.All() {
		l.partial.Cells.Add(&x)
	}
	if c.More {
		return
	}
	w := &waiting{from: c.From, through: c.Through, want: l.partial.Cells, got: audit.NewCells(b.o.Cells), since: now, heard: b.heard.Ledger}
	l.partial = nil
	known := w.from > l.claimed && w.from > l.gaveUp
	l.claimed = c.Through
	keep := l.held[:0]
	for i := range l.held {
		f := l.held[i]
		if f.number < w.from || f.number > w.through {
			keep = append(keep, f)
			continue
		}
		b.held -= len(f.cells)
		b.take(w.got, &f)
	}
	clear(l.held[len(keep):])
	l.held = keep
	if !known {
		b.stats.LateClaims++
		return
	}
	// After a restart from a snapshot without this lane the set still knows.
	if s := b.shards[key.shard]; s != nil {
		l.last = max(l.last, s.set.Last(key.producer))
	}
	b.waiting += w.want.Len()
	l.waiting = append(l.waiting, w)
	b.settle(key, l)
}

// Tick does what time brings: frames that nobody claims, claims whose frames do
// not come, producers that are no more.
//
// more is what was heard since the last one: what there was no time to hear is
// neither unclaimed nor overdue.
func (b *Books) Tick(now time.Time, more Heard) {
	b.heard.Ledger += more.Ledger
	b.heard.Claims += more.Claims
	for key, l := range b.lanes {
		n := 0
		for n < len(l.held) && now.Sub(l.held[n].since) > b.o.Unclaimed && b.heard.Claims-l.held[n].heard > b.o.Unclaimed {
			n++
		}
		if n > 0 {
			b.giveUp(l, n)
		}
		for _, w := range l.waiting {
			if !w.told && now.Sub(w.since) > b.o.Overdue && b.heard.Ledger-w.heard > b.o.Overdue {
				b.compared(key, w)
			}
		}
		if l.idle() && (!l.closed.IsZero() && now.Sub(l.closed) > b.o.Unclaimed && now.Sub(l.touched) > b.o.Unclaimed || now.Sub(l.touched) > forget) {
			delete(b.lanes, key)
		}
	}
	for p, n := range b.producers {
		if now.Sub(n.At) > forget {
			delete(b.producers, p)
		}
	}
}

// forget is how long a producer that says nothing is remembered by its claims.
const forget = 8 * 24 * time.Hour
