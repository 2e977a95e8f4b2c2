// Package findings keeps what the audit found, from when it was first seen until
// it is resolved: a late arrival heals a gap. It is pure.
package findings

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/books"
)

// Part of a finding: one stretch in which two points differ.
type Part struct {
	Origin string `json:"origin"`
	// From and To are ledger positions, or frames of a producer.
	From  uint64       `json:"from"`
	To    uint64       `json:"to"`
	Since usage.Micros `json:"since_unix_micros,omitempty"`
	Until usage.Micros `json:"until_unix_micros,omitempty"`
	Want  audit.Tally  `json:"want"`
	Got   audit.Tally  `json:"got"`
}

// Finding is that two points do not agree about an account and minute.
type Finding struct {
	ID   string     `json:"id"`
	Pair books.Pair `json:"pair"`
	Kind audit.Kind `json:"kind"`
	// Minute, seconds since the Unix epoch, and account; Others: somewhere among
	// accounts that are not told apart.
	Minute     int64        `json:"minute_unix"`
	MinuteText string       `json:"minute"`
	Account    string       `json:"account"`
	Others     bool         `json:"others,omitempty"`
	Text       string       `json:"text"`
	Parts      []Part       `json:"parts"`
	More       int          `json:"more_parts,omitempty"`
	FirstSeen  usage.Micros `json:"first_seen_unix_micros"`
	LastSeen   usage.Micros `json:"last_seen_unix_micros"`
	ResolvedAt usage.Micros `json:"resolved_at_unix_micros,omitempty"`
}

// Clone returns a copy that shares nothing that changes.
func (f *Finding) Clone() *Finding {
	c := *f
	c.Parts = slices.Clone(f.Parts)
	return &c
}

// Open reports whether it still holds.
func (f *Finding) Open() bool { return f.ResolvedAt == 0 }

// Bounds of what is kept.
const (
	MaxOpen     = 1000
	MaxResolved = 500
	MaxParts    = 16
)

// Book keeps findings. Not safe for concurrent use.
type Book struct {
	all     map[string]*Finding
	origins map[string]map[string]bool // findings by the stretches they are of
	changed map[string]bool
	removed map[string]bool
	// Total counts findings ever by pair and kind, Dropped those beyond MaxOpen.
	Total   map[[2]string]int64
	Dropped int64
}

// New returns an empty book.
func New() *Book {
	return &Book{all: map[string]*Finding{}, origins: map[string]map[string]bool{}, changed: map[string]bool{}, removed: map[string]bool{}, Total: map[[2]string]int64{}}
}

// Restore takes over a finding that was stored.
func (b *Book) Restore(f *Finding) {
	b.all[f.ID] = f
	if !f.Open() {
		return // what differs where it did is another
	}
	for i := range f.Parts {
		b.link(originKey(f.Pair, f.Parts[i].Origin), f.ID)
	}
}

func originKey(p books.Pair, origin string) string { return string(p) + " " + origin }

func (b *Book) link(origin, id string) {
	if b.origins[origin] == nil {
		b.origins[origin] = map[string]bool{}
	}
	b.origins[origin][id] = true
}

func (b *Book) unlink(origin, id string) {
	delete(b.origins[origin], id)
	if len(b.origins[origin]) == 0 {
		delete(b.origins, origin)
	}
}

// identity is the same for the same pair, minute and account; it can stand in a
// KV key.
func identity(p books.Pair, d *audit.Difference) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%t\x00%s", p, d.Minute, d.Others, d.Account))
	return string(p) + "-" + strconv.FormatInt(int64(d.Minute), 10) + "-" + hex.EncodeToString(h[:8])
}

// Hear takes note of an outcome.
func (b *Book) Hear(o *books.Outcome, now usage.Micros) {
	key := originKey(o.Pair, o.Origin)
	still := map[string]bool{}
	for i := range o.Differences {
		d := &o.Differences[i]
		id := identity(o.Pair, d)
		if o.Pair == books.LedgerCounters {
			// Its minute is where it began; what it is of is the account.
			id = b.counters(key, id)
		}
		still[id] = true
		b.differs(id, o, d, now)
	}
	for id := range b.origins[key] {
		if !still[id] && (o.Only == "" || o.Only == id) {
			b.agrees(id, o.Origin, now)
			b.unlink(key, id)
		}
	}
}

// counters returns the open finding that an account's counters have already.
func (b *Book) counters(key, id string) string {
	for known := range b.origins[key] {
		return known
	}
	return id
}

func (b *Book) differs(id string, o *books.Outcome, d *audit.Difference, now usage.Micros) {
	f := b.all[id]
	if f == nil || !f.Open() {
		if b.open() >= MaxOpen {
			b.Dropped++
			return
		}
		f = &Finding{
			ID: id, Pair: o.Pair, Minute: int64(d.Minute) * 60, MinuteText: d.Minute.String(),
			Account: d.Account, Others: d.Others, FirstSeen: now,
		}
		b.all[id] = f
		delete(b.removed, id) // else it would be once it is stored
		b.Total[[2]string{string(o.Pair), string(d.Kind)}]++
	}
	part := Part{Origin: o.Origin, From: o.From, To: o.To, Since: o.Since, Until: o.Until, Want: d.Want, Got: d.Got}
	switch at := slices.IndexFunc(f.Parts, func(p Part) bool { return p.Origin == o.Origin }); {
	case at >= 0:
		if f.Parts[at].Want == part.Want && f.Parts[at].Got == part.Got {
			return // nothing new
		}
		f.Parts[at] = part
	case len(f.Parts) < MaxParts:
		f.Parts = append(f.Parts, part)
	default:
		f.More++
		return
	}
	b.link(originKey(o.Pair, o.Origin), id)
	f.LastSeen = now
	f.describe()
	b.changed[id] = true
}

// describe sums up the parts.
func (f *Finding) describe() {
	var want, got audit.Tally
	for i := range f.Parts {
		want.Plus(&f.Parts[i].Want)
		got.Plus(&f.Parts[i].Got)
	}
	f.Kind = audit.KindOf(&want, &got)
	who := "account " + strconv.Quote(f.Account)
	if f.Others {
		who = "one of the accounts that are not told apart"
	}
	f.Text = fmt.Sprintf("%s, %s: %s (%s)", f.MinuteText, who, sentence(f.Pair), audit.Describe(&want, &got))
}

func sentence(p books.Pair) string {
	switch p {
	case books.GatewayLedger:
		return "the ledger does not have what its gateway sent"
	case books.LedgerCounters:
		return "the counters do not have what the ledger has"
	case books.LedgerHistory:
		return "ClickHouse does not have what the ledger has"
	}
	return "two points differ"
}

// agrees takes note that a stretch agrees after all.
func (b *Book) agrees(id, origin string, now usage.Micros) {
	f := b.all[id]
	if f == nil || !f.Open() {
		return
	}
	left := slices.DeleteFunc(slices.Clone(f.Parts), func(p Part) bool { return p.Origin == origin })
	b.changed[id] = true
	if len(left) > 0 || f.More > 0 {
		f.Parts = left
		if len(left) > 0 {
			f.describe()
			return
		}
	}
	// What it was stays readable.
	f.ResolvedAt, f.LastSeen = now, now
	b.prune()
}

// prune forgets the oldest resolved findings.
func (b *Book) prune() {
	var resolved []*Finding
	for _, f := range b.all {
		if !f.Open() {
			resolved = append(resolved, f)
		}
	}
	if len(resolved) <= MaxResolved {
		return
	}
	slices.SortFunc(resolved, func(x, y *Finding) int { return cmp.Compare(x.ResolvedAt, y.ResolvedAt) })
	for _, f := range resolved[:len(resolved)-MaxResolved] {
		delete(b.all, f.ID)
		delete(b.changed, f.ID)
		b.removed[f.ID] = true
	}
}

// Expire resolves what has been open for longer than keep: nothing will heal it,
// and somebody has had the time to look.
func (b *Book) Expire(now usage.Micros, keep time.Duration) {
	for id, f := range b.all {
		if f.Open() && now-f.FirstSeen > usage.Micros(keep.Microseconds()) {
			f.ResolvedAt = now
			b.changed[id] = true
			for i := range f.Parts {
				b.unlink(originKey(f.Pair, f.Parts[i].Origin), id)
			}
		}
	}
	b.prune()
}

func (b *Book) open() int {
	n := 0
	for _, f := range b.all {
		if f.Open() {
			n++
		}
	}
	return n
}

// List returns all findings, open ones first, then the newest.
func (b *Book) List() []*Finding {
	out := make([]*Finding, 0, len(b.all))
	for _, f := range b.all {
		out = append(out, f)
	}
	slices.SortFunc(out, func(x, y *Finding) int {
		if x.Open() != y.Open() {
			if x.Open() {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(y.FirstSeen, x.FirstSeen), cmp.Compare(x.ID, y.ID))
	})
	return out
}

// Get returns a finding; nil when there is none.
func (b *Book) Get(id string) *Finding { return b.all[id] }

// Changes returns which findings changed and which are gone since Saved.
func (b *Book) Changes() (changed []*Finding, removed []string) {
	for id := range b.changed {
		changed = append(changed, b.all[id])
	}
	for id := range b.removed {
		removed = append(removed, id)
	}
	return changed, removed
}

// Saved takes note that the changes of a finding are stored.
func (b *Book) Saved(id string) {
	delete(b.changed, id)
	delete(b.removed, id)
}
