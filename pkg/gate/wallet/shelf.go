package wallet

import (
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// A purse that nobody has needed for a while has given back what was in it. It is then
// dropped, and what must be known of it is kept on the shelf of its desk, in a tenth of
// the room, until it is needed again or its window is over.

// shelved is a purse that rests.
type shelved struct {
	lease.Record
	end lease.Micros // of the window; 0: never
}

const (
	// restAfter is how long nobody may have needed a purse that is shelved.
	restAfter = lease.Micros(60_000_000)
	// sweepEvery is how often what is shelved is looked through for windows that are
	// over.
	sweepEvery = time.Minute
	// wordPause is how long last words that did not get into the ledger are not
	// repeated.
	wordPause = lease.Micros(100_000)
)

// rests is how long nobody may have needed a purse that is shelved: less where room gets
// scarce, but longer than any call waits that found it here.
func (w *Wallet) rests() lease.Micros {
	least := lease.Micros(w.o.Wait.Microseconds()) + 1_000_000
	if w.purses.Load() > int64(w.o.MaxPurses)/4*3 {
		return least
	}
	return max(least, restAfter)
}

// shelve drops a purse that is not needed, and reports whether it did. With d.mu.
func (d *desk) shelve(p *pocket, now lease.Micros) bool {
	pace := d.w.pace(now)
	if pace < p.touched {
		p.touched = pace // the clock was set back
	}
	if pace < p.touched+d.w.rests() || len(p.queue) > 0 || p.holds > 0 || p.noting || d.w.closing.Load() || p.end != 0 && now >= p.end-d.w.skew {
		return false
	}
	if p.again != 0 {
		// Its lease is over: only that the next one's messages are newer matters.
		d.floor = max(d.floor, p.sent.Seq)
		d.forget(p)
		return true
	}
	if d.w.shelved.Load() >= int64(d.w.o.MaxShelved) {
		return false
	}
	r, ok := p.purse.Rest()
	if !ok {
		return false
	}
	d.forget(p)
	if p.sent.Seq > 0 {
		d.w.shelved.Add(1)
		d.shelf[p.key] = shelved{r, p.end}
	} // else the ledger has heard nothing of it
	return true
}

// resume has a new purse go on where the one before it rested. With d.mu.
func (d *desk) resume(p *pocket) {
	s, ok := d.shelf[p.key]
	if !ok {
		p.purse.After(d.floor)
		return
	}
	d.unshelve(p.key)
	p.purse.Resume(s.Record)
	p.sent, p.heard = p.purse.Sent(), s.Seq
}

func (d *desk) unshelve(k key) {
	delete(d.shelf, k)
	d.w.shelved.Add(-1)
	if len(d.shelf) == 0 {
		d.shelf = make(map[key]shelved) // a map keeps the room that it once had
	}
}

// sweep drops the records of windows that are over.
func (d *desk) sweep() {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.w.tell()
	for k, s := range d.shelf {
		if s.end != 0 && now >= s.end+d.w.skew {
			d.unshelve(k)
		}
	}
}

// lastWords adds those of purses that rest to an entry with room for so many. With d.mu.
func (d *desk) lastWords(asks []*tollkeeperv1.LeaseAsk, room int, now lease.Micros) []*tollkeeperv1.LeaseAsk {
	if pace := d.w.pace(now); pace >= d.failedAt && pace < d.failedAt+wordPause {
		return asks
	}
	for k, s := range d.shelf {
		if room--; room < 0 {
			break
		}
		m := s.LastWord(d.w.gateway, now)
		asks = append(asks, askToProto(k, &m))
	}
	return asks
}
