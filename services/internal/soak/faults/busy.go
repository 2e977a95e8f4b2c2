package faults

import "sync"

// Busy are the victims to which something is being done. Safe for concurrent use.
type Busy struct {
	mu    sync.Mutex
	taken map[string]bool
}

// NewBusy returns one with nobody in it.
func NewBusy() *Busy { return &Busy{taken: map[string]bool{}} }

// Take takes all of them, or none when one is taken.
func (b *Busy) Take(victims []string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, v := range victims {
		if b.taken[v] {
			return false
		}
	}
	for _, v := range victims {
		b.taken[v] = true
	}
	return true
}

// Free gives them back.
func (b *Busy) Free(victims []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, v := range victims {
		delete(b.taken, v)
	}
}
