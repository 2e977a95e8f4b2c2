package replay

import (
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Watch is another holder of decisions: it notes how long after its entry in the
// ledger each deny of ours was held. It is safe for concurrent use.
type Watch struct {
	// Ours are the accounts' ids.
	Ours map[string]bool
	Log  zerolog.Logger

	held    sync.Map // revision → held
	mu      sync.Mutex
	longest map[string]time.Duration
}

type held struct {
	account string
	at      time.Time
}

// Reset has the decisions of before; they say nothing about latency.
func (*Watch) Reset([]ledger.Change) {}

// Stale says that decisions may be missed for a while.
func (w *Watch) Stale(reason error) {
	w.Log.Warn().Err(reason).Msg("decisions may be missed for a moment; the bound that is printed may be too small")
}

// Apply notes a deny of ours.
func (w *Watch) Apply(c ledger.Change) {
	if c.Value == nil || strings.HasPrefix(c.Key, "checkpoint.") {
		return
	}
	d, err := ledger.UnmarshalDecision(c.Value)
	if err != nil || d.Verdict != usage.Deny || !w.Ours[d.Account] {
		return
	}
	w.held.Store(d.Revision, held{d.Account, time.Now()})
}

// Stored says when the server stored an entry.
func (w *Watch) Stored(sequence uint64, at time.Time) {
	x, ok := w.held.Load(sequence)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.longest == nil {
		w.longest = map[string]time.Duration{}
	}
	h := x.(held)
	w.longest[h.account] = max(w.longest[h.account], h.at.Sub(at))
}

// Longest returns, by account, the longest time from an entry to its deny.
func (w *Watch) Longest() map[string]time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.longest
}
