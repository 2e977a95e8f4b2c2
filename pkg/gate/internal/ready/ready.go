// Package ready turns freshness into sentences and tells of changes only.
package ready

import (
	"errors"
	"fmt"
	"sync"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Part hears whether a part can do its work.
type Part interface {
	OK()
	NotReady(reason string)
}

// Parts are the directory, the decisions and the outbox of a gate. Its methods are
// safe for concurrent use.
type Parts struct {
	mu      sync.Mutex
	parts   map[string]Part
	said    map[string]string // "" is ready
	reasons map[string]string // why a bucket's copy is not current
}

const outboxPart = "outbox"

// New returns parts of which nothing is known. Each of the three may be nil.
func New(directory, decisions, outbox Part) *Parts {
	return &Parts{
		parts:   map[string]Part{ledger.DirectoryBucket: directory, ledger.DecisionsBucket: decisions, outboxPart: outbox},
		said:    map[string]string{ledger.DirectoryBucket: "starting", ledger.DecisionsBucket: "starting", outboxPart: "starting"},
		reasons: make(map[string]string),
	}
}

func (r *Parts) say(part, reason string) {
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

// Waiting: nothing works before the ledger was reached.
func (r *Parts) Waiting(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, part := range []string{ledger.DirectoryBucket, ledger.DecisionsBucket, outboxPart} {
		r.say(part, reason)
	}
}

// Stale notes why the copy of a bucket may be behind.
func (r *Parts) Stale(bucket string, reason error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reasons[bucket] = reason.Error()
}

// Reading returns what hears how many of how many records of a bucket are read.
func (r *Parts) Reading(bucket string) func(read, of uint64) {
	return func(read, of uint64) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.reasons[bucket] = fmt.Sprintf("%d of %d records are read", read, of)
	}
}

// Resync notes that a bucket was read as a whole.
func (r *Parts) Resync(bucket string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.reasons, bucket)
}

// Fresh tells how current the table is, and whether the outbox is full.
func (r *Parts) Fresh(f table.Freshness, outboxFull bool) {
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

func (r *Parts) because(what, bucket string) string {
	if why := r.reasons[bucket]; why != "" {
		return what + " (" + why + ")"
	}
	return what
}

// Err says what is missing; nil: nothing.
func (r *Parts) Err() error {
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
