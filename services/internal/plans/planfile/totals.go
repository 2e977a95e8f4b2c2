package planfile

import (
	"fmt"
	"slices"
	"strings"
)

// Counts of one kind of thing that two documents have.
type Counts struct {
	Added     int `json:"added"`
	Changed   int `json:"changed"`
	Removed   int `json:"removed"`
	Unchanged int `json:"unchanged"`
}

func (c *Counts) add(kind Kind) {
	switch kind {
	case Added:
		c.Added++
	case Changed:
		c.Changed++
	case Removed:
		c.Removed++
	}
}

// Totals of a difference.
type Totals struct {
	Accounts Counts `json:"accounts"`
	// Keys: one that has moved to another account, or has another hash or id, is changed;
	// its account is too.
	Keys  Counts `json:"keys"`
	Plans Counts `json:"plans"`
	// Limits of a plan that was removed are removed.
	Limits Counts `json:"limits"`
}

// Removed is how many things are removed, in words ("2 accounts, 1 key"); empty for none.
func (t Totals) Removed() string {
	var parts []string
	for _, c := range t.named() {
		if n := c.Removed; n == 1 {
			parts = append(parts, "1 "+strings.TrimSuffix(c.name, "s"))
		} else if n > 1 {
			parts = append(parts, fmt.Sprintf("%d %s", n, c.name))
		}
	}
	return strings.Join(parts, ", ")
}

type named struct {
	name string
	*Counts
}

func (t *Totals) named() []named {
	return []named{{"accounts", &t.Accounts}, {"keys", &t.Keys}, {"plans", &t.Plans}, {"limits", &t.Limits}}
}

// String is a line a kind.
func (t Totals) String() string {
	var b strings.Builder
	for _, c := range t.named() {
		fmt.Fprintf(&b, "%-8s  %d added, %d changed, %d removed, %d unchanged\n", c.name, c.Added, c.Changed, c.Removed, c.Unchanged)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// count fills in the totals of two canonical documents.
func (d *Diff) count(old, now *Document) {
	t := &d.Totals
	*t = Totals{}
	changed := func(c *Counts, before int) { c.Unchanged = before - c.Changed - c.Removed }
	for _, a := range d.Accounts {
		t.Accounts.add(a.Kind)
	}
	changed(&t.Accounts, len(old.Accounts))
	limits := 0
	for i := range old.Plans {
		limits += len(old.Plans[i].Limits)
	}
	for i := range d.Plans {
		t.Plans.add(d.Plans[i].Kind)
		for _, l := range d.Plans[i].Limits {
			t.Limits.add(l.Kind)
		}
	}
	changed(&t.Plans, len(old.Plans))
	changed(&t.Limits, limits)
	t.Keys = countKeys(old, now)
}

type owned struct {
	account string
	Key
}

func keysOf(d *Document) (all []owned, byID, byHash map[string]owned) {
	byID, byHash = map[string]owned{}, map[string]owned{}
	for i := range d.Accounts {
		for _, k := range d.Accounts[i].Keys {
			o := owned{d.Accounts[i].ID, k}
			all = append(all, o)
			byID[k.ID], byHash[k.SHA256] = o, o
		}
	}
	return all, byID, byHash
}

// countKeys tells keys apart by id, and by what they are: ids and hashes are unique in a
// document. A key that is given a new hash under its id is changed, and so is one that is
// renamed.
func countKeys(old, now *Document) Counts {
	var c Counts
	before, oldIDs, oldHashes := keysOf(old)
	after, ids, hashes := keysOf(now)
	for _, k := range before {
		same, sameID := ids[k.ID]
		_, sameHash := hashes[k.SHA256]
		switch {
		case sameID && same == k:
			c.Unchanged++
		case sameID || sameHash:
			c.Changed++
		default:
			c.Removed++
		}
	}
	for _, k := range after {
		_, sameID := oldIDs[k.ID]
		_, sameHash := oldHashes[k.SHA256]
		if !sameID && !sameHash {
			c.Added++
		}
	}
	return c
}

// Keep returns a copy of next with all that it leaves out of now: accounts, plans, keys of
// accounts and limits of plans. What stands in both is as next has it.
func Keep(now, next *Document) *Document {
	if now == nil {
		now = &Document{}
	}
	out := &Document{Version: FormatVersion}
	given := map[string]*Plan{}
	for i := range next.Plans {
		given[next.Plans[i].ID] = &next.Plans[i]
	}
	for _, p := range now.Plans {
		g := given[p.ID]
		if g == nil {
			out.Plans = append(out.Plans, p)
			continue
		}
		merged := *g
		merged.Limits = slices.Clone(g.Limits)
		for _, l := range p.Limits {
			if !slices.ContainsFunc(g.Limits, func(x Limit) bool { return x.ID == l.ID }) {
				merged.Limits = append(merged.Limits, l)
			}
		}
		out.Plans = append(out.Plans, merged)
		delete(given, p.ID)
	}
	for _, p := range next.Plans {
		if given[p.ID] != nil {
			out.Plans = append(out.Plans, p)
		}
	}
	_, ids, hashes := keysOf(next)
	kept := func(keys []Key) []Key {
		return slices.DeleteFunc(slices.Clone(keys), func(k Key) bool {
			_, sameID := ids[k.ID]
			_, sameHash := hashes[k.SHA256]
			return sameID || sameHash
		})
	}
	accounts := map[string]*Account{}
	for i := range next.Accounts {
		accounts[next.Accounts[i].ID] = &next.Accounts[i]
	}
	for _, a := range now.Accounts {
		merged := a
		if g := accounts[a.ID]; g != nil {
			merged = *g
			merged.Keys = append(slices.Clone(g.Keys), kept(a.Keys)...)
			delete(accounts, a.ID)
		} else {
			merged.Keys = kept(a.Keys)
		}
		out.Accounts = append(out.Accounts, merged)
	}
	for _, a := range next.Accounts {
		if accounts[a.ID] != nil {
			out.Accounts = append(out.Accounts, a)
		}
	}
	return out
}
