// Package planfile is the plans file: what it may say, what is wrong with it, how
// two of them differ, and what gateways are told of it. It is pure.
package planfile

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile/bulk"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile/terms"
)

// FormatVersion is the version of the file format.
const FormatVersion = 1

// Document is the content of a plans file.
type Document struct {
	Version  int       `json:"version"`
	Plans    []Plan    `json:"plans,omitempty"`
	Accounts []Account `json:"accounts,omitempty"`

	// Where it was read from, for problems that are found later; nil and
	// empty when it was not.
	file string
	tree *tree
}

// Plan is a named set of limits.
type Plan struct {
	ID     string  `json:"id"`
	Limits []Limit `json:"limits,omitempty"`
}

// Limit of a plan; see usage.Limit.
type Limit struct {
	ID          string  `json:"id"`
	Meter       string  `json:"meter"`
	Window      string  `json:"window"`
	Amount      int64   `json:"amount"`
	Tier        string  `json:"tier,omitempty"`         // eventual when empty
	WarnPercent uint32  `json:"warn_percent,omitempty"` // 0: never warns
	Code        string  `json:"code,omitempty"`         // QUOTA_EXCEEDED when empty
	ActionURL   string  `json:"action_url,omitempty"`
	Filter      *Filter `json:"filter,omitempty"`
	Lease       *Lease  `json:"lease,omitempty"` // tiers exact and leased only
}

// Lease says how gateways share the amount of a limit of the tiers exact and
// leased.
type Lease = terms.Lease

// Filter restricts a limit to some calls; an empty list matches every call.
type Filter struct {
	Models  []string `json:"models,omitempty"`
	Routes  []string `json:"routes,omitempty"`
	Methods []string `json:"methods,omitempty"`
}

// Account is who pays.
type Account = bulk.Account

// Key is an API key, known by its hash only.
type Key = bulk.Key

// HashKey returns what stands for an API key in the plans file and in the
// directory: its SHA-256 in lower-case hex. Keys are random and long, so that a
// plain hash gives nothing away.
func HashKey(key string) string {
	sum := sha256.Sum256([]byte(key))
	return hex.EncodeToString(sum[:])
}

// Usage converts a limit to the words of the core.
func (l *Limit) Usage() usage.Limit {
	u := usage.Limit{
		ID: l.ID, Meter: usage.Meter(l.Meter), Window: usage.WindowKind(l.Window), Amount: l.Amount, Tier: usage.Tier(l.Tier),
		WarnPercent: l.WarnPercent, Code: usage.Code(l.Code), ActionURL: l.ActionURL,
	}
	if u.Tier == "" {
		u.Tier = usage.TierEventual
	}
	if u.Tier.Leased() {
		u.Lease = l.Lease.Usage()
	}
	u.Code = u.RefusalCode()
	if l.Filter != nil {
		u.Filter = usage.Filter{Models: l.Filter.Models, Routes: l.Filter.Routes, Methods: l.Filter.Methods}
	}
	return u
}

// Usage converts a plan to the words of the core.
func (p *Plan) Usage() usage.Plan {
	u := usage.Plan{ID: p.ID}
	for i := range p.Limits {
		u.Limits = append(u.Limits, p.Limits[i].Usage())
	}
	return u
}

// Canonical returns a copy in which equal content has one form: defaults
// written out, lists in order, empty lists absent.
func (d *Document) Canonical() *Document {
	c := &Document{Version: FormatVersion, Plans: make([]Plan, len(d.Plans)), Accounts: make([]Account, len(d.Accounts))}
	for i, p := range d.Plans {
		limits := make([]Limit, len(p.Limits))
		for k, l := range p.Limits {
			if l.Tier == "" {
				l.Tier = string(usage.TierEventual)
			}
			if l.Code == "" {
				l.Code = string(usage.QuotaExceeded)
			}
			if usage.Tier(l.Tier).Leased() {
				l.Lease = l.Lease.Canonical()
			}
			if f := l.Filter; f != nil {
				l.Filter = &Filter{Models: sorted(f.Models), Routes: sorted(f.Routes), Methods: sorted(f.Methods)}
				if len(f.Models)+len(f.Routes)+len(f.Methods) == 0 {
					l.Filter = nil
				}
			}
			limits[k] = l
		}
		slices.SortFunc(limits, func(a, b Limit) int { return strings.Compare(a.ID, b.ID) })
		c.Plans[i] = Plan{ID: p.ID, Limits: limits}
	}
	slices.SortFunc(c.Plans, func(a, b Plan) int { return strings.Compare(a.ID, b.ID) })
	for i, a := range d.Accounts {
		a.Keys = slices.Clone(a.Keys)
		slices.SortFunc(a.Keys, func(x, y Key) int { return strings.Compare(x.SHA256, y.SHA256) })
		c.Accounts[i] = a
	}
	slices.SortFunc(c.Accounts, func(a, b Account) int { return strings.Compare(a.ID, b.ID) })
	return c
}

func sorted(list []string) []string {
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

// versionBytes of a hash is enough to tell versions apart, and short enough to read.
const versionBytes = 8

func contentHash(v any) string {
	// Strings and integers only: it can't fail.
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("plans: %v", err))
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:versionBytes])
}

// Version identifies the content of a document: the same for two files that
// say the same in another order or with defaults written out.
func Version(d *Document) string { return contentHash(d.Canonical()) }

// PlansVersion identifies the plans of a document without its accounts. It is
// the version that decisions carry.
func PlansVersion(d *Document) string {
	return contentHash((&Document{Plans: d.Plans}).Canonical())
}

// Merge returns a copy of doc in which every plan and account of extra stands,
// replacing the one with the same id. Neither argument is changed; the result is
// not checked.
func Merge(doc, extra *Document) *Document {
	out := &Document{Version: FormatVersion}
	if doc != nil {
		out.Plans, out.Accounts = slices.Clone(doc.Plans), slices.Clone(doc.Accounts)
	}
	if extra == nil {
		return out
	}
	plans := make(map[string]int, len(out.Plans))
	for i := range out.Plans {
		plans[out.Plans[i].ID] = i
	}
	for _, p := range extra.Plans {
		if i, ok := plans[p.ID]; ok {
			out.Plans[i] = p
			continue
		}
		plans[p.ID] = len(out.Plans)
		out.Plans = append(out.Plans, p)
	}
	accounts := make(map[string]int, len(out.Accounts))
	for i := range out.Accounts {
		accounts[out.Accounts[i].ID] = i
	}
	for _, a := range extra.Accounts {
		if i, ok := accounts[a.ID]; ok {
			out.Accounts[i] = a
			continue
		}
		accounts[a.ID] = len(out.Accounts)
		out.Accounts = append(out.Accounts, a)
	}
	return out
}

// Index finds what a checked document says. Safe for concurrent use as long as
// the document is not changed.
type Index struct {
	plans    map[string]*Plan
	accounts map[string]*Account
}

// NewIndex Indexes a checked document.
func NewIndex(d *Document) Index {
	x := Index{plans: make(map[string]*Plan, len(d.Plans)), accounts: make(map[string]*Account, len(d.Accounts))}
	for i := range d.Plans {
		x.plans[d.Plans[i].ID] = &d.Plans[i]
	}
	for i := range d.Accounts {
		x.accounts[d.Accounts[i].ID] = &d.Accounts[i]
	}
	return x
}

// Account returns the account of that id; false when there is none.
func (x Index) Account(id string) (*Account, bool) {
	a, ok := x.accounts[id]
	return a, ok
}

// Plan returns the plan of that id; false when there is none.
func (x Index) Plan(id string) (*Plan, bool) {
	p, ok := x.plans[id]
	return p, ok
}

// Path returns the account and those above it, from leaf to root; empty when
// there is no such account. It is cut at MaxDepth, which a checked document never
// reaches.
func (x Index) Path(id string) []string {
	var path []string
	for len(path) < MaxDepth {
		a, ok := x.accounts[id]
		if !ok {
			break
		}
		path = append(path, id)
		if a.Parent == "" {
			break
		}
		id = a.Parent
	}
	return path
}

// Root returns the root of an account; an unknown one is its own.
func (x Index) Root(id string) string {
	p := x.Path(id)
	if len(p) == 0 {
		return id
	}
	return p[len(p)-1]
}
