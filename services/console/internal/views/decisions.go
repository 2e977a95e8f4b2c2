// Package views keeps small copies of what the services publish, ready to be
// asked: decisions, beacons, alerts, dead letters. All types are safe for
// concurrent use and do no I/O: the console feeds them.
package views

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/limits"
)

// Decisions is a copy of the decisions bucket. It implements
// ledger.MirrorHandler.
type Decisions struct {
	mu      sync.RWMutex
	byKey   map[string]usage.Decision
	account map[string][]string // keys of an account's decisions
	loaded  bool
	feed    freshness.Feed
	bad     int
}

// Reset implements ledger.MirrorHandler.
func (d *Decisions) Reset(all []ledger.Change) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.byKey, d.account = make(map[string]usage.Decision, len(all)), make(map[string][]string, len(all))
	d.loaded, d.bad = true, 0
	d.feed.Note(nil, time.Now())
	for _, c := range all {
		d.apply(c)
	}
}

// Apply implements ledger.MirrorHandler.
func (d *Decisions) Apply(c ledger.Change) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.apply(c)
}

func (d *Decisions) apply(c ledger.Change) {
	if strings.HasPrefix(c.Key, "checkpoint.") {
		return
	}
	old, had := d.byKey[c.Key]
	if c.Value == nil {
		if had {
			delete(d.byKey, c.Key)
			keys := slices.DeleteFunc(d.account[old.Account], func(k string) bool { return k == c.Key })
			if d.account[old.Account] = keys; len(keys) == 0 {
				delete(d.account, old.Account)
			}
		}
		return
	}
	now, err := ledger.UnmarshalDecision(c.Value)
	if err != nil {
		d.bad++
		return
	}
	if had && old.Revision > now.Revision {
		return // law 6
	}
	d.byKey[c.Key] = now
	if !had {
		d.account[now.Account] = append(d.account[now.Account], c.Key)
	}
}

// Stale implements ledger.MirrorHandler.
func (d *Decisions) Stale(reason error) { d.feed.Note(reason, time.Now()) }

// Loaded reports whether the copy was ever complete.
func (d *Decisions) Loaded() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.loaded
}

// At is how current the copy is at a time.
func (d *Decisions) At(now time.Time) freshness.Freshness { return d.feed.At(now) }

// Counts returns how many decisions there are, and how many hold as deny and
// warn at a time.
func (d *Decisions) Counts(now usage.Micros) (all, deny, warn int) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for k := range d.byKey {
		v := d.byKey[k]
		switch limits.Effective(&v, now) {
		case usage.Deny:
			deny++
		case usage.Warn:
			warn++
		}
	}
	return len(d.byKey), deny, warn
}

// Held returns the decision on an account's limit.
func (d *Decisions) Held(account, limitID string) (usage.Decision, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, k := range d.account[account] {
		if v := d.byKey[k]; v.LimitID == limitID {
			return v, true
		}
	}
	return usage.Decision{}, false
}

// Of returns the decisions of an account, by limit.
func (d *Decisions) Of(account string) []usage.Decision {
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := make([]usage.Decision, 0, len(d.account[account]))
	for _, k := range d.account[account] {
		out = append(out, d.byKey[k])
	}
	slices.SortFunc(out, func(a, b usage.Decision) int { return strings.Compare(a.LimitID, b.LimitID) })
	return out
}

// Worst returns the severest verdict of an account's own limits at a time;
// Allow when there is none.
func (d *Decisions) Worst(account string, now usage.Micros) usage.Verdict {
	d.mu.RLock()
	defer d.mu.RUnlock()
	worst := usage.Allow
	for _, k := range d.account[account] {
		v := d.byKey[k]
		worst = max(worst, limits.Effective(&v, now))
	}
	return worst
}

// IsCursor reports whether s can be what Page returned as the cursor of the next page,
// in a ledger of so many shards: the key of a decision, which may be gone by now.
func IsCursor(s string, shards uint32) bool {
	parts := strings.Split(s, ".")
	if len(parts) != 3 {
		return false
	}
	shard, err := strconv.ParseUint(parts[0], 10, 32)
	return err == nil && uint32(shard) < shards && isToken(parts[1]) && isToken(parts[2])
}

// isToken reports whether ledger.KeyToken can have written s.
func isToken(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] != '=' {
			continue
		}
		if len(s) < i+3 {
			return false
		}
		if b, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err != nil || ledger.KeyToken(string([]byte{byte(b)})) != s[i:i+3] {
			return false
		}
		i += 2
	}
	return s != "" && ledger.KeyToken(strings.ReplaceAll(s, "=", "_")) == strings.ReplaceAll(s, "=", "_")
}

// Page returns up to n decisions whose key comes after cursor and that match,
// in order of keys, and the cursor of the next page, empty at the end.
func (d *Decisions) Page(cursor string, n int, match func(*usage.Decision) bool) (page []usage.Decision, next string) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var keys []string
	for k := range d.byKey {
		if v := d.byKey[k]; k > cursor && match(&v) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	if len(keys) > n {
		keys = keys[:n]
		next = keys[n-1]
	}
	page = make([]usage.Decision, 0, len(keys))
	for _, k := range keys {
		page = append(page, d.byKey[k])
	}
	return page, next
}
