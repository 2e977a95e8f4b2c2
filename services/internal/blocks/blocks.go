// Package blocks decides where one block of a stream ends and the next begins.
package blocks

import (
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/history"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Limits bound a block.
type Limits struct {
	Rows, Bytes, Entries int
	// Age since the first row after which a block is closed although it is not
	// full, when the reader is near the stream's end.
	Age time.Duration
	// Stall is the age at which it is closed in any case, also without rows.
	Stall time.Duration
}

// Item is what the planner needs to know of an entry.
type Item struct {
	Sequence uint64
	// Time is the stream's time, which never goes back.
	Time usage.Micros
	// Rows the entry may have at most, known before duplicates are taken out.
	Rows, Bytes int
	// Near says that the reader is near the stream's end.
	Near bool
}

// Span is a block's stretch of a stream, both ends included.
type Span struct{ From, To uint64 }

// Planner decides where one block ends and the next begins. It is a pure state
// machine: entries and moments in, boundaries out. A boundary that was made
// durable is not decided again: Force repeats it.
type Planner struct {
	l Limits

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

// New begins with the entry next.
func New(l Limits, next uint64) *Planner { return &Planner{l: l, next: next} }

// Force makes the open block end at exactly to.
func (p *Planner) Force(to uint64) { p.forced = to }

// Before says whether the open block ends before the entry.
func (p *Planner) Before(it Item) (Span, bool) {
	if p.forced != 0 {
		if it.Sequence > p.forced {
			return p.close(p.forced)
		}
		return Span{}, false
	}
	if p.last == 0 {
		return Span{}, false
	}
	if p.rows > 0 && it.Rows > 0 && (p.rows+it.Rows > p.l.Rows || p.bytes+it.Bytes > p.l.Bytes || history.Month(it.Time) != p.month) {
		return p.close(p.last)
	}
	return Span{}, false
}

// Add takes the entry into the open block at the moment now.
func (p *Planner) Add(it Item, now time.Time) {
	if p.last == 0 {
		p.opened = now
	}
	p.last, p.near = it.Sequence, it.Near
	p.entries++
	if it.Rows == 0 {
		return
	}
	if p.rows == 0 {
		p.since, p.month = now, history.Month(it.Time)
	}
	p.rows += it.Rows
	p.bytes += it.Bytes
}

// Due says whether the open block ends at the moment now, after what it has.
func (p *Planner) Due(now time.Time) (Span, bool) {
	if p.forced != 0 {
		if p.last >= p.forced {
			return p.close(p.forced)
		}
		return Span{}, false
	}
	if p.last == 0 {
		return Span{}, false
	}
	full := p.rows >= p.l.Rows || p.bytes >= p.l.Bytes || p.entries >= p.l.Entries
	if at, ok := p.Wake(); full || ok && !now.Before(at) {
		return p.close(p.last)
	}
	return Span{}, false
}

// Wake says when due has to be asked although nothing came.
func (p *Planner) Wake() (time.Time, bool) {
	if p.last == 0 || p.forced != 0 {
		return time.Time{}, false
	}
	if p.rows > 0 && p.near {
		return p.since.Add(p.l.Age), true
	}
	return p.opened.Add(p.l.Stall), true
}

func (p *Planner) close(to uint64) (Span, bool) {
	s := Span{p.next, to}
	*p = Planner{l: p.l, next: to + 1}
	return s, true
}
