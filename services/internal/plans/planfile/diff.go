package planfile

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Kind of a change.
type Kind string

// The kinds of changes.
const (
	Added   Kind = "added"
	Removed Kind = "removed"
	Changed Kind = "changed"
)

// Diff is how two documents differ, in order of ids.
type Diff struct {
	// From and To are versions (Version); From is empty when there was none.
	From     string          `json:"from"`
	To       string          `json:"to"`
	Plans    []PlanChange    `json:"plans"`
	Accounts []AccountChange `json:"accounts"`
	Totals   Totals          `json:"totals"`
}

// PlanChange is a plan that was added, removed or changed.
type PlanChange struct {
	ID     string        `json:"id"`
	Kind   Kind          `json:"kind"`
	Limits []LimitChange `json:"limits"`
}

// LimitChange is a limit that was added, removed or changed.
type LimitChange struct {
	ID     string        `json:"id"`
	Kind   Kind          `json:"kind"`
	Fields []FieldChange `json:"fields"`
}

// AccountChange is an account that was added, removed or changed. A removed
// account keeps its counters and has no limits any more.
type AccountChange struct {
	ID     string        `json:"id"`
	Kind   Kind          `json:"kind"`
	Fields []FieldChange `json:"fields"`
}

// FieldChange is one field's change; empty means absent.
type FieldChange struct {
	Field string `json:"field"`
	From  string `json:"from"`
	To    string `json:"to"`
}

// Empty reports whether nothing differs.
func (d Diff) Empty() bool { return len(d.Plans) == 0 && len(d.Accounts) == 0 }

// Compare returns how next differs from before, which may be nil.
func Compare(before, next *Document) Diff {
	d := Diff{To: Version(next), Plans: []PlanChange{}, Accounts: []AccountChange{}}
	old := &Document{}
	if before != nil {
		d.From = Version(before)
		old = before.Canonical()
	}
	now := next.Canonical()
	merge(old.Plans, now.Plans, func(p Plan) string { return p.ID }, func(id string, a, b *Plan) {
		var from, to []Limit
		kind := Changed
		if a == nil {
			kind = Added
		} else {
			from = a.Limits
		}
		if b == nil {
			kind = Removed
		} else {
			to = b.Limits
		}
		change := PlanChange{ID: id, Kind: kind, Limits: compareLimits(from, to)}
		if kind != Changed || len(change.Limits) > 0 {
			d.Plans = append(d.Plans, change)
		}
	})
	merge(old.Accounts, now.Accounts, func(a Account) string { return a.ID }, func(id string, a, b *Account) {
		kind := Changed
		var from, to Account
		if a == nil {
			kind = Added
		} else {
			from = *a
		}
		if b == nil {
			kind = Removed
		} else {
			to = *b
		}
		change := AccountChange{ID: id, Kind: kind, Fields: compareAccount(from, to)}
		if kind != Changed || len(change.Fields) > 0 {
			d.Accounts = append(d.Accounts, change)
		}
	})
	d.count(old, now)
	return d
}

// merge walks two lists, ordered by id, side by side.
func merge[T any](old, now []T, id func(T) string, visit func(id string, a, b *T)) {
	i, k := 0, 0
	for i < len(old) || k < len(now) {
		switch {
		case k == len(now) || i < len(old) && id(old[i]) < id(now[k]):
			visit(id(old[i]), &old[i], nil)
			i++
		case i == len(old) || id(old[i]) > id(now[k]):
			visit(id(now[k]), nil, &now[k])
			k++
		default:
			visit(id(old[i]), &old[i], &now[k])
			i, k = i+1, k+1
		}
	}
}

func compareLimits(old, now []Limit) []LimitChange {
	out := []LimitChange{}
	merge(old, now, func(l Limit) string { return l.ID }, func(id string, a, b *Limit) {
		change := LimitChange{ID: id, Kind: Changed, Fields: []FieldChange{}}
		var from, to Limit
		if a == nil {
			change.Kind = Added
		} else {
			from = *a
		}
		if b == nil {
			change.Kind = Removed
		} else {
			to = *b
		}
		if b != nil {
			change.Fields = compareLimit(from, to)
		}
		if change.Kind != Changed || len(change.Fields) > 0 {
			out = append(out, change)
		}
	})
	return out
}

type fieldList []FieldChange

func (f *fieldList) add(name, from, to string) {
	if from != to {
		*f = append(*f, FieldChange{name, from, to})
	}
}

func compareLimit(a, b Limit) []FieldChange {
	f := fieldList{}
	f.add("meter", a.Meter, b.Meter)
	f.add("window", a.Window, b.Window)
	f.add("amount", number(a.Amount), number(b.Amount))
	f.add("tier", a.Tier, b.Tier)
	f.add("warn_percent", number(int64(a.WarnPercent)), number(int64(b.WarnPercent)))
	f.add("code", a.Code, b.Code)
	f.add("action_url", a.ActionURL, b.ActionURL)
	var x, y Filter
	if a.Filter != nil {
		x = *a.Filter
	}
	if b.Filter != nil {
		y = *b.Filter
	}
	var s, t Lease
	if a.Lease != nil {
		s = *a.Lease
	}
	if b.Lease != nil {
		t = *b.Lease
	}
	f.add("lease.term", s.Term, t.Term)
	f.add("lease.patience", s.Patience, t.Patience)
	f.add("lease.release_after", s.ReleaseAfter, t.ReleaseAfter)
	f.add("lease.max_exposure", number(s.MaxExposure), number(t.MaxExposure))
	f.add("filter.models", strings.Join(x.Models, ", "), strings.Join(y.Models, ", "))
	f.add("filter.routes", strings.Join(x.Routes, ", "), strings.Join(y.Routes, ", "))
	f.add("filter.methods", strings.Join(x.Methods, ", "), strings.Join(y.Methods, ", "))
	return f
}

func compareAccount(a, b Account) []FieldChange {
	f := fieldList{}
	f.add("parent", a.Parent, b.Parent)
	f.add("plan", a.Plan, b.Plan)
	merge(a.Keys, b.Keys, func(k Key) string { return k.SHA256 }, func(hash string, x, y *Key) {
		var from, to string
		if x != nil {
			from = x.ID
		}
		if y != nil {
			to = y.ID
		}
		f.add("key "+hash[:min(8, len(hash))]+"…", from, to)
	})
	return f
}

// number is empty for 0, which is absent.
func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// toldAccounts bounds the accounts that String tells one by one.
const toldAccounts = 50

// String is the difference for people, a line each, with the totals at its end.
func (d Diff) String() string {
	if d.Empty() {
		return "nothing changes"
	}
	var b strings.Builder
	for _, p := range d.Plans {
		fmt.Fprintf(&b, "%s plan %s\n", sign(p.Kind), p.ID)
		for _, l := range p.Limits {
			fmt.Fprintf(&b, "    %s limit %s\n", sign(l.Kind), l.ID)
			writeFields(&b, "        ", l.Kind, l.Fields)
		}
	}
	accounts := d.Accounts
	if len(accounts) > toldAccounts {
		// What is removed must be seen first: it may be a mistake.
		accounts = slices.Clone(accounts)
		slices.SortStableFunc(accounts, func(x, y AccountChange) int {
			switch {
			case x.Kind == Removed && y.Kind != Removed:
				return -1
			case y.Kind == Removed && x.Kind != Removed:
				return 1
			}
			return 0
		})
	}
	for _, a := range accounts[:min(len(accounts), toldAccounts)] {
		fmt.Fprintf(&b, "%s account %s\n", sign(a.Kind), a.ID)
		if a.Kind != Removed {
			writeFields(&b, "    ", a.Kind, a.Fields)
		}
	}
	if more := accounts[min(len(accounts), toldAccounts):]; len(more) > 0 {
		counts := map[Kind]int{}
		for _, a := range more {
			counts[a.Kind]++
		}
		fmt.Fprintf(&b, "… and %d more accounts (%d added, %d changed, %d removed)\n", len(more), counts[Added], counts[Changed], counts[Removed])
	}
	b.WriteString(d.Totals.String())
	return b.String()
}

func sign(k Kind) string {
	return map[Kind]string{Added: "+", Removed: "-", Changed: "~"}[k]
}

func writeFields(b *strings.Builder, indent string, kind Kind, fields []FieldChange) {
	for _, f := range fields {
		if kind == Added {
			fmt.Fprintf(b, "%s%s: %s\n", indent, f.Field, f.To)
			continue
		}
		fmt.Fprintf(b, "%s%s: %s → %s\n", indent, f.Field, orNone(f.From), orNone(f.To))
	}
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}
