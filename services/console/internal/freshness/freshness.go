// Package freshness says of an answer how current it is: as of when it is complete, and
// why it is not complete up to now.
package freshness

import (
	"fmt"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Freshness of an answer, or of a part of one.
type Freshness struct {
	// Current: it is complete up to now, as far as that can be known.
	Current bool `json:"current"`
	// AsOf is up to when it is complete; 0: it never was.
	AsOf usage.Micros `json:"as_of_unix_micros"`
	// Age of AsOf in seconds; -1: it never was complete.
	Age float64 `json:"age_seconds"`
	// Reason why it is not current, for people.
	Reason string `json:"reason,omitempty"`
}

// Now is of what is complete at a time.
func Now(now time.Time) Freshness { return Freshness{Current: true, AsOf: usage.At(now)} }

// Since is of what is complete up to a time in the past, and why it goes no further. The
// zero time is never.
func Since(at, now time.Time, reason string) Freshness {
	if at.IsZero() {
		return Freshness{Age: -1, Reason: reason}
	}
	return Freshness{AsOf: usage.At(at), Age: max(now.Sub(at), 0).Seconds(), Reason: reason}
}

// Worst is that of an answer that is made of several parts: of those that are not current
// the oldest, otherwise the oldest of all.
func Worst(parts ...Freshness) Freshness {
	worst := parts[0]
	for _, p := range parts[1:] {
		if p.Current != worst.Current {
			if worst.Current {
				worst = p
			}
			continue
		}
		if p.AsOf < worst.AsOf {
			worst = p
		}
	}
	return worst
}

// Feed notes whether a source that tells changes is being read. The zero value was never
// read. Safe for concurrent use.
type Feed struct {
	mu      sync.Mutex
	reading bool
	until   time.Time // when it was last known to be read, while it is not
	reason  string
}

// Note takes note of the source's state at a time: nil is being read.
func (f *Feed) Note(err error, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err == nil:
		f.reading = true
	default:
		if f.reading {
			f.reading, f.until = false, now
		}
		f.reason = err.Error()
	}
}

// At is how current the source's copy is.
func (f *Feed) At(now time.Time) Freshness {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.reading:
		return Now(now)
	case f.reason == "":
		return Since(time.Time{}, now, "it was not read yet")
	}
	return Since(f.until, now, f.reason)
}

// Reader judges from a stream's newest entry whether what reads the stream keeps up. A
// reader that is told of interruptions only does not know, on a quiet stream, when they
// end. The zero value is ready. Safe for concurrent use.
type Reader struct {
	Feed
	mu     sync.Mutex
	looked bool
	last   uint64 // newest entry at the look before
}

// Look takes note of the stream's newest entry, or why it can't be asked for, and up to
// where it is read. What came since the look before may be on its way.
func (r *Reader) Look(last, position uint64, err error, now time.Time) {
	r.mu.Lock()
	want := last
	if r.looked {
		want = min(want, r.last)
	}
	if err == nil {
		r.looked, r.last = true, last
	}
	r.mu.Unlock()
	if err == nil && position < want {
		err = fmt.Errorf("%d entries are not read yet", last-position)
	}
	r.Note(err, now)
}

// historyLate is how long a block is on its way at most: the historian's age of a block,
// its insert, and two looks of ours.
const historyLate = 10 * time.Second

// Behind is how current a history is that has come to a position, when it moved there,
// beside the newest entry with calls.
func Behind(position, calls uint64, moved, now time.Time) Freshness {
	if calls > position && now.Sub(moved) > historyLate {
		return Since(moved, now, fmt.Sprintf("the history is %d ledger entries behind, and has not moved", calls-position))
	}
	return Now(now)
}
