package table

import "sync/atomic"

// cell is one key of an index. It never changes: a new value is a new cell. The
// first 40 bytes are all that a lookup touches.
type cell[K comparable] struct {
	key     K
	account *Account // nil: the key was deleted
	keyID   *string  // of an API key; nil in an index of accounts
	seq     uint64
}

type slots[K comparable] []atomic.Pointer[cell[K]]

// index is a hash table with one writer and any number of readers, which take no
// lock and allocate nothing. sync.Map boxes its keys, and a copied map costs the
// whole table for every change.
type index[K comparable] struct {
	slots atomic.Pointer[slots[K]]
	hash  func(*K) uint64
	used  int // slots that are taken, deleted keys included; the writer's
}

const leastSlots = 64

func (x *index[K]) reset(n int, hash func(*K) uint64) {
	size := leastSlots
	for size < 4*n {
		size *= 2
	}
	s := make(slots[K], size)
	x.hash, x.used = hash, 0
	x.slots.Store(&s)
}

// get returns the cell of a key whose hash is h, nil when there is none.
func (x *index[K]) get(k *K, h uint64) *cell[K] {
	s := *x.slots.Load()
	mask := uint64(len(s) - 1)
	for i := h & mask; ; i = (i + 1) & mask {
		c := s[i].Load()
		if c == nil {
			return nil
		}
		if c.key == *k {
			if c.account == nil {
				return nil
			}
			return c
		}
	}
}

// put stores a cell in place of the one with its key. Writer only.
func (x *index[K]) put(c *cell[K]) {
	s := *x.slots.Load()
	if 2*(x.used+1) > len(s) {
		s = x.grow(s)
	}
	if place(s, x.hash(&c.key), c) {
		x.used++
	}
}

// grow makes a table with room for twice the live keys and publishes it.
func (x *index[K]) grow(old slots[K]) slots[K] {
	live := 0
	for i := range old {
		if c := old[i].Load(); c != nil && c.account != nil {
			live++
		}
	}
	size := leastSlots
	for size < 4*(live+1) {
		size *= 2
	}
	s := make(slots[K], size)
	x.used = 0
	for i := range old {
		if c := old[i].Load(); c != nil && c.account != nil {
			place(s, x.hash(&c.key), c)
			x.used++
		}
	}
	x.slots.Store(&s)
	return s
}

// place stores c and reports whether it took a free slot.
func place[K comparable](s slots[K], h uint64, c *cell[K]) bool {
	mask := uint64(len(s) - 1)
	for i := h & mask; ; i = (i + 1) & mask {
		switch at := s[i].Load(); {
		case at == nil:
			s[i].Store(c)
			return true
		case at.key == c.key:
			s[i].Store(c)
			return false
		}
	}
}

// each calls f with every live cell. Writer only.
func (x *index[K]) each(f func(*cell[K])) {
	s := *x.slots.Load()
	for i := range s {
		if c := s[i].Load(); c != nil && c.account != nil {
			f(c)
		}
	}
}
