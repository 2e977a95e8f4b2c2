// Package hub hands one stream of messages to many clients, each as fast as it takes them.
package hub

import "sync"

// overlap is how many messages a client may miss: each carries ten seconds.
const overlap = 5

// New returns a hub without clients.
func New() *Hub { return &Hub{wake: make(chan struct{}, 1)} }

// Wake says that a client came.
func (h *Hub) Wake() <-chan struct{} { return h.wake }

// Hub hands the newest message to all clients. Safe for concurrent use.
type Hub struct {
	wake chan struct{} // a client came

	mu      sync.Mutex
	clients map[chan struct{}]struct{}
	n       uint64 // number of the newest message
	recent  []byte // the newest message
	reset   []byte // the same with all seconds
}

// Join takes in a client, unless most are there; its channel says that there is a message.
func (h *Hub) Join(most int) (chan struct{}, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.clients) >= most {
		return nil, false
	}
	if h.clients == nil {
		h.clients = map[chan struct{}]struct{}{}
	}
	ch := make(chan struct{}, 1)
	h.clients[ch] = struct{}{}
	select {
	case h.wake <- struct{}{}:
	default:
	}
	return ch, true
}

// Leave ends that.
func (h *Hub) Leave(ch chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.clients, ch)
}

// Size is how many clients there are.
func (h *Hub) Size() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.clients)
}

// Publish makes a message the newest; reset is the same one with all that it builds on.
func (h *Hub) Publish(recent, reset []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.n++
	h.recent, h.reset = recent, reset
	for ch := range h.clients {
		select {
		case ch <- struct{}{}:
		default: // it has not taken the one before; it will see this one
		}
	}
}

// Take returns what brings a client that had message n up to date.
func (h *Hub) Take(n uint64) (data []byte, now uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	// Messages overlap, so that missing a few leaves no gap.
	if n == 0 || h.n-n > overlap {
		return h.reset, h.n
	}
	return h.recent, h.n
}
