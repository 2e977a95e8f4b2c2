package outbox

import (
	"context"
	"sync"
	"sync/atomic"
)

// budget bounds memory: nothing is kept that was not taken from it before.
type budget struct {
	limit   int64
	used    atomic.Int64
	waiting atomic.Int64
	mu      sync.Mutex
	freed   chan struct{} // closed when something was given back
}

func (b *budget) take(n int64) bool {
	if b.used.Add(n) <= b.limit {
		return true
	}
	b.used.Add(-n)
	return false
}

func (b *budget) give(n int64) {
	if n == 0 {
		return
	}
	b.used.Add(-n)
	if b.waiting.Load() > 0 {
		b.wake()
	}
}

func (b *budget) wake() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.freed != nil {
		close(b.freed)
		b.freed = nil
	}
}

// pressed reports whether half of it is used.
func (b *budget) pressed() bool { return b.used.Load() > b.limit/2 }

// wait returns when there may be room for n, or when something else happened
// that is worth a look.
func (b *budget) wait(ctx context.Context, n int64) error {
	b.waiting.Add(1)
	defer b.waiting.Add(-1)
	b.mu.Lock()
	if b.used.Load()+n <= b.limit {
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

// watermarks say how many of a shard's calls are safe and acknowledged.
type watermarks struct {
	mu          sync.Mutex
	safe, acked uint64
	moved       chan struct{} // closed at the next advance; nil when nobody waits
}

func (w *watermarks) advance(safe, acked uint64) {
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

func (w *watermarks) get() (safe, acked uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.safe, w.acked
}

func (w *watermarks) waitSafe(ctx context.Context, n uint64) error {
	return w.wait(ctx, func() bool { return w.safe >= n })
}

func (w *watermarks) waitAcked(ctx context.Context, n uint64) error {
	return w.wait(ctx, func() bool { return w.acked >= n })
}

func (w *watermarks) wait(ctx context.Context, reached func() bool) error {
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
