// Package pace keeps what may not be done every time: log lines, and tries of an
// outbox that is full.
package pace

import (
	"sync"
	"sync/atomic"
	"time"
)

// Full remembers that the outbox refused a call for want of room, or could not
// make it safe in time. Until it takes
// one again, calls are refused before they cost anything, except for one in a
// while that finds out.
type Full struct{ probe atomic.Int64 } // when the next one may try, nanoseconds; 0: there is room

// ProbeEvery is how often a full outbox is tried.
const ProbeEvery = 100 * time.Millisecond

// Set notes that there was no room.
func (f *Full) Set(now time.Time) { f.probe.Store(now.Add(ProbeEvery).UnixNano()) }

// Clear notes that there is room.
func (f *Full) Clear() {
	if f.probe.Load() != 0 {
		f.probe.Store(0)
	}
}

// Refuses reports whether a call should not even begin.
func (f *Full) Refuses(now time.Time) bool {
	at := f.probe.Load()
	return at != 0 && (now.UnixNano() < at || !f.probe.CompareAndSwap(at, now.Add(ProbeEvery).UnixNano()))
}

// ToldFor is how long a full outbox is told of after nobody has tried it any more:
// where calls are sent to ready gateways only, nobody will.
const ToldFor = 10 * time.Second

// Told reports whether there was no room, as far as is known.
func (f *Full) Told(now time.Time) bool {
	at := f.probe.Load()
	return at != 0 && now.UnixNano()-at < int64(ToldFor)
}

// Limiter lets one line a second through.
type Limiter struct {
	mu   sync.Mutex
	last time.Time
}

// Allow reports whether this one is let through.
func (l *Limiter) Allow(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d := now.Sub(l.last); d >= 0 && d < time.Second && !l.last.IsZero() {
		return false
	}
	l.last = now
	return true
}
