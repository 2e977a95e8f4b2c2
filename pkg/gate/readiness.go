package gate

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// readiness turns freshness into sentences and tells of changes only.
type readiness struct {
	mu      *sync.Mutex
	parts   map[string]Readiness
	said    map[string]string // "" is ready
	reasons map[string]string // why a bucket's copy is not current
}

const outboxPart = "outbox"

func newReadiness(o Options) readiness {
	return readiness{
		mu:      &sync.Mutex{},
		parts:   map[string]Readiness{ledger.DirectoryBucket: o.DirectoryReadiness, ledger.DecisionsBucket: o.DecisionsReadiness, outboxPart: o.OutboxReadiness},
		said:    map[string]string{ledger.DirectoryBucket: "starting", ledger.DecisionsBucket: "starting", outboxPart: "starting"},
		reasons: make(map[string]string),
	}
}

func (r *readiness) say(part, reason string) {
	if r.said[part] == reason {
		return
	}
	r.said[part] = reason
	p := r.parts[part]
	switch {
	case p == nil:
	case reason == "":
		p.OK()
	default:
		p.NotReady(reason)
	}
}

// waiting: nothing works before the ledger was reached.
func (r *readiness) waiting(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, part := range []string{ledger.DirectoryBucket, ledger.DecisionsBucket, outboxPart} {
		r.say(part, reason)
	}
}

func (r *readiness) staleBucket(bucket string, reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reasons[bucket] = reason.Error()
}

func (r *readiness) resync(bucket string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.reasons, bucket)
}

func (r *readiness) fresh(f table.Freshness, outboxFull bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !f.DirectoryLoaded:
		r.say(ledger.DirectoryBucket, r.because("the directory was not read yet", ledger.DirectoryBucket))
	case !f.DirectoryCurrent:
		r.say(ledger.DirectoryBucket, r.because("the directory may be behind", ledger.DirectoryBucket))
	default:
		r.say(ledger.DirectoryBucket, "")
	}
	switch {
	case !f.DecisionsLoaded:
		r.say(ledger.DecisionsBucket, r.because("the decisions were not read yet", ledger.DecisionsBucket))
	case !f.DecisionsCurrent:
		r.say(ledger.DecisionsBucket, r.because("the decisions may be behind", ledger.DecisionsBucket))
	case f.Silent >= 0:
		r.say(ledger.DecisionsBucket, fmt.Sprintf("nobody says that shard %d is counted (%d of %d shards are known): is the aggregator running?", f.Silent, f.Known, f.Shards))
	default:
		r.say(ledger.DecisionsBucket, "")
	}
	if outboxFull {
		r.say(outboxPart, "the outbox is full, or can make no call safe in time: calls are refused until the ledger takes what waits")
	} else {
		r.say(outboxPart, "")
	}
}

func (r *readiness) because(what, bucket string) string {
	if why := r.reasons[bucket]; why != "" {
		return what + " (" + why + ")"
	}
	return what
}

func (r *readiness) err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, part := range []string{ledger.DirectoryBucket, ledger.DecisionsBucket, outboxPart} {
		if reason := r.said[part]; reason != "" {
			errs = append(errs, fmt.Errorf("%s: %s", part, reason))
		}
	}
	return errors.Join(errs...)
}

// limiter lets one line a second through.
type limiter struct {
	mu   sync.Mutex
	last time.Time
}

func (l *limiter) allow(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d := now.Sub(l.last); d >= 0 && d < time.Second && !l.last.IsZero() {
		return false
	}
	l.last = now
	return true
}
