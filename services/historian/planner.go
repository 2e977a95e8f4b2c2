package historian

import (
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/history"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// limits bound a block.
type limits struct {
	rows, bytes, entries int
	// age since the first row after which a block is closed although it is not
	// full, when the reader is near the stream's end.
	age time.Duration
	// stall is the age at which it is closed in any case, also without rows.
	stall time.Duration
}

// item is what the planner needs to know of an entry.
type item struct {
	sequence uint64
	// time is the stream's time, which never goes back.
	time usage.Micros
	// rows the entry may have at most, known before duplicates are taken out.
	rows, bytes int
	// near says that the reader is near the stream's end.
	near bool
}

// span is a block's stretch of a stream, both ends included.
type span struct{ from, to uint64 }

// planner decides where one block ends and the next begins. It is a pure state
// machine: entries and moments in, boundaries out. A boundary that was made
// durable is not decided again: force repeats it.
type planner struct {
	l limits

	next    uint64 // where the open block begins
	last    uint64 // its newest entry, 0: it has none
	rows    int
	bytes   int
	entries int
	month   uint32
	since   time.Time // when its first row came
	opened  time.Time // when its first entry came
	near    bool
	forced  uint64 // its last entry is already decided; 0: it is not
}

// newPlanner begins with the entry next.
func newPlanner(l limits, next uint64) *planner { return &planner{l: l, next: next} }

// force makes the open block end at exactly to.
func (p *planner) force(to uint64) { p.forced = to }

// before says whether the open block ends before the entry.
func (p *planner) before(it item) (span, bool) {
	if p.forced != 0 {
		if it.sequence > p.forced {
			return p.close(p.forced)
		}
		return span{}, false
	}
	if p.last == 0 {
		return span{}, false
	}
	if p.rows > 0 && it.rows > 0 && (p.rows+it.rows > p.l.rows || p.bytes+it.bytes > p.l.bytes || history.Month(it.time) != p.month) {
		return p.close(p.last)
	}
	return span{}, false
}

// add takes the entry into the open block at the moment now.
func (p *planner) add(it item, now time.Time) {
	if p.last == 0 {
		p.opened = now
	}
	p.last, p.near = it.sequence, it.near
	p.entries++
	if it.rows == 0 {
		return
	}
	if p.rows == 0 {
		p.since, p.month = now, history.Month(it.time)
	}
	p.rows += it.rows
	p.bytes += it.bytes
}

// due says whether the open block ends at the moment now, after what it has.
func (p *planner) due(now time.Time) (span, bool) {
	if p.forced != 0 {
		if p.last >= p.forced {
			return p.close(p.forced)
		}
		return span{}, false
	}
	if p.last == 0 {
		return span{}, false
	}
	full := p.rows >= p.l.rows || p.bytes >= p.l.bytes || p.entries >= p.l.entries
	if at, ok := p.wake(); full || ok && !now.Before(at) {
		return p.close(p.last)
	}
	return span{}, false
}

// wake says when due has to be asked although nothing came.
func (p *planner) wake() (time.Time, bool) {
	if p.last == 0 || p.forced != 0 {
		return time.Time{}, false
	}
	if p.rows > 0 && p.near {
		return p.since.Add(p.l.age), true
	}
	return p.opened.Add(p.l.stall), true
}

func (p *planner) close(to uint64) (span, bool) {
	s := span{p.next, to}
	*p = planner{l: p.l, next: to + 1}
	return s, true
}
