// Package bound holds what callers of the outbox wait for: room in memory, and
// the fate of their calls.
package bound

import (
	"context"
	"sync"
	"sync/atomic"
)

// Budget bounds memory: nothing is kept that was not taken from it before.
type Budget struct {
	Limit   int64
	used    atomic.Int64
	waiting atomic.Int64
	mu      sync.Mutex
	freed   chan struct{} // closed when something was given back
}

// Take takes n, if that is still within the limit.
func (b *Budget) Take(n int64) bool {
	if b.used.Add(n) <= b.Limit {
		return true
	}
	b.used.Add(-n)
	return false
}

// Used returns how much is taken.
func (b *Budget) Used() int64 { return b.used.Load() }

// Give gives back n.
func (b *Budget) Give(n int64) {
	if n == 0 {
		return
	}
	b.used.Add(-n)
	if b.waiting.Load() > 0 {
		b.Wake()
	}
}

// Wake lets everybody who waits look again.
func (b *Budget) Wake() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.freed != nil {
		close(b.freed)
		b.freed = nil
	}
}

// Pressed reports whether half of it is used.
func (b *Budget) Pressed() bool { return b.used.Load() > b.Limit/2 }

// Wait returns when there may be room for n, or when something else happened
// that is worth a look.
func (b *Budget) Wait(ctx context.Context, n int64) error {
	b.waiting.Add(1)
	defer b.waiting.Add(-1)
	b.mu.Lock()
	if b.used.Load()+n <= b.Limit {
		b.mu.Unlock()
		return nil
	}
	if b.freed == nil {
		b.freed = make(chan struct{})
	}
	freed := b.freed
	b.mu.Unlock()
	select {
	case <-freed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Watermarks say how many of a shard's calls are safe and acknowledged.
type Watermarks struct {
	mu          sync.Mutex
	safe, acked uint64
	moved       chan struct{} // closed at the next advance; nil when nobody waits
}

// Advance moves the marks up; they never go down.
func (w *Watermarks) Advance(safe, acked uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if safe <= w.safe && acked <= w.acked {
		return
	}
	w.safe, w.acked = max(w.safe, safe), max(w.acked, acked)
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
}

// Get returns the marks.
func (w *Watermarks) Get() (safe, acked uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.safe, w.acked
}

// WaitSafe waits until n calls are safe.
func (w *Watermarks) WaitSafe(ctx context.Context, n uint64) error {
	return w.wait(ctx, func() bool { return w.safe >= n })
}

// WaitAcked waits until n calls are acknowledged.
func (w *Watermarks) WaitAcked(ctx context.Context, n uint64) error {
	return w.wait(ctx, func() bool { return w.acked >= n })
}

func (w *Watermarks) wait(ctx context.Context, reached func() bool) error {
	for {
		w.mu.Lock()
		if reached() {
			w.mu.Unlock()
			return nil
		}
		if w.moved == nil {
			w.moved = make(chan struct{})
		}
		moved := w.moved
		w.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
