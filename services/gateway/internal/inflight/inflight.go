// Package inflight counts calls that are under way.
package inflight

import (
	"net/http"
	"sync"
	"time"
)

// Calls counts calls until their handlers have returned: http.Server loses sight
// of connections that were upgraded, and of handlers that outlive its patience.
type Calls struct {
	mu   sync.Mutex
	n    int
	idle chan struct{} // closed when there is none; nil when nobody waits
}

// Count returns a handler whose calls are counted.
func (f *Calls) Count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.n++
		f.mu.Unlock()
		defer func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.n--; f.n == 0 && f.idle != nil {
				close(f.idle)
				f.idle = nil
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// Wait returns when no call is in flight, or after d, and how many still are. It is
// called once.
func (f *Calls) Wait(d time.Duration) int {
	f.mu.Lock()
	if f.n == 0 {
		f.mu.Unlock()
		return 0
	}
	idle := make(chan struct{})
	f.idle = idle
	f.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-idle:
	case <-timer.C:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}
