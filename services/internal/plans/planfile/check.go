package planfile

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile/bulk"
)

// Bounds that the schema can't state.
const (
	// MaxDepth of accounts: an account and at most 15 above it.
	MaxDepth = 16
	// MaxPlansBytes bounds all plans together as one ledger entry.
	MaxPlansBytes = 512 << 10
	// MaxMeters is how many different meters the plans may name.
	MaxMeters = 1000
)

// Check reports, as an *Error, what is wrong with a document that was not read
// from a file.
func Check(doc *Document) error {
	schema, err := compiledSchema()
	if err != nil {
		return err
	}
	// The accounts that need no look are most of them, and a generic value of each
	// would cost a kilobyte.
	c := &collector{file: doc.file, tree: doc.tree}
	look := Document{Version: doc.Version, Plans: doc.Plans}
	if n := len(doc.Accounts); n > maxAccounts {
		c.add([]any{"accounts"}, fmt.Sprintf("accounts has %d entries", n), fmt.Sprintf("use at most %d", maxAccounts))
		return c.result()
	}
	if err := validate(schema, &look, c); err != nil {
		return err
	}
	for i := range doc.Accounts {
		if bulk.Valid(&doc.Accounts[i]) {
			continue
		}
		one := &collector{file: doc.file, tree: doc.tree, account: i}
		look = Document{Version: FormatVersion, Accounts: doc.Accounts[i : i+1]}
		if err := validate(schema, &look, one); err != nil {
			return err
		}
		c.take(one)
	}
	if err := c.result(); err != nil {
		return err
	}
	check(doc, c)
	return c.result()
}

// validate finds what is wrong by the schema.
func validate(schema *jsonschema.Schema, doc *Document, c *collector) error {
	data, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("plans: %w", err)
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("plans: %w", err)
	}
	if err := schema.Validate(value); err != nil {
		var invalid *jsonschema.ValidationError
		if !errors.As(err, &invalid) {
			return fmt.Errorf("plans: %w", err)
		}
		c.schemaProblems(invalid)
	}
	return nil
}

// check finds what the schema can't: what concerns two places of the file.
func check(doc *Document, c *collector) {
	plans := make(map[string]int, len(doc.Plans))
	for i := range doc.Plans {
		p := &doc.Plans[i]
		if first, twice := plans[p.ID]; twice {
			c.add([]any{"plans", i, "id"}, fmt.Sprintf("the plan %q is there twice%s", p.ID, c.where("plans", first, "id")), "rename or remove one")
			continue
		}
		plans[p.ID] = i
		checkLimits(p, i, c)
	}
	accounts := make(map[string]int, len(doc.Accounts))
	for i := range doc.Accounts {
		a := &doc.Accounts[i]
		if first, twice := accounts[a.ID]; twice {
			c.add([]any{"accounts", i, "id"}, fmt.Sprintf("the account %q is there twice%s", a.ID, c.where("accounts", first, "id")), "rename or remove one")
			continue
		}
		accounts[a.ID] = i
		if len(a.ID) > usage.MaxIDBytes {
			c.add([]any{"accounts", i, "id"}, fmt.Sprintf("the account's id is %d bytes long", len(a.ID)), fmt.Sprintf("use at most %d", usage.MaxIDBytes))
		}
	}
	checkAccounts(doc, plans, accounts, c)
	checkKeys(doc, c)
	if len(c.err.Problems) == 0 {
		checkSizes(doc, c)
	}
}

func checkLimits(p *Plan, i int, c *collector) {
	limits := make(map[string]int, len(p.Limits))
	for k := range p.Limits {
		l := &p.Limits[k]
		at := func(field string) []any { return []any{"plans", i, "limits", k, field} }
		if first, twice := limits[l.ID]; twice {
			c.add(at("id"), fmt.Sprintf("the plan %q has two limits %q%s", p.ID, l.ID, c.where("plans", i, "limits", first, "id")), "rename or remove one")
			continue
		}
		limits[l.ID] = k
		if !usage.Meter(l.Meter).Valid() {
			c.add(at("meter"), fmt.Sprintf("%q cannot name a meter", l.Meter), "use letters, digits, '_', '.', '-', at most 64")
		}
		if l.Amount <= 0 {
			c.add(at("amount"), fmt.Sprintf("the amount is %d", l.Amount), "write a number from 1 on")
		}
		if l.Code != "" && usage.Code(l.Code).Status() == 0 {
			c.add(at("code"), fmt.Sprintf("%q is not a refusal code", l.Code), "leave it out for QUOTA_EXCEEDED")
		}
		if l.ActionURL != "" && !validActionURL(l.ActionURL) {
			c.add(at("action_url"), "action_url is neither an http or https URL nor a path", "write it like https://example.com/billing or /billing")
		}
		l.Lease.Check(l.Tier, l.Amount, func(reason, do string, field ...any) {
			c.add(append([]any{"plans", i, "limits", k}, field...), reason, do)
		})
		if f := l.Filter; f != nil {
			for name, list := range map[string][]string{"models": f.Models, "routes": f.Routes, "methods": f.Methods} {
				for _, v := range list {
					if len(v) > usage.MaxNameBytes {
						c.add(append(at("filter"), name), fmt.Sprintf("a name in %s is %d bytes long", name, len(v)), fmt.Sprintf("use at most %d", usage.MaxNameBytes))
					}
				}
			}
		}
	}
}

func validActionURL(s string) bool {
	u, err := url.Parse(s)
	if err != nil || strings.ContainsAny(s, "<>\"\\ \t\r\n") {
		return false // it goes into a Link header
	}
	if u.Scheme == "" && u.Host == "" {
		return strings.HasPrefix(s, "/")
	}
	return (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil
}

func checkAccounts(doc *Document, plans, accounts map[string]int, c *collector) {
	// depth is 0 while unknown, -1 while on the way up.
	depth := make([]int, len(doc.Accounts))
	for i := range doc.Accounts {
		a := &doc.Accounts[i]
		if accounts[a.ID] != i {
			continue
		}
		if _, ok := plans[a.Plan]; a.Plan != "" && !ok {
			c.add([]any{"accounts", i, "plan"}, fmt.Sprintf("there is no plan %q%s", a.Plan, nearest(a.Plan, plans)), "add the plan or correct its name")
		}
		if _, ok := accounts[a.Parent]; a.Parent != "" && !ok {
			c.add([]any{"accounts", i, "parent"}, fmt.Sprintf("there is no account %q%s", a.Parent, nearest(a.Parent, accounts)), "add the account or correct its name")
			continue
		}
		var way []int
		for k := i; depth[k] == 0; {
			depth[k] = -1
			way = append(way, k)
			parent := doc.Accounts[k].Parent
			next, ok := accounts[parent]
			if parent == "" || !ok {
				break
			}
			k = next
			if depth[k] == -1 {
				c.add([]any{"accounts", k, "parent"}, fmt.Sprintf("the account %q is its own ancestor", doc.Accounts[k].ID), "break the circle of parents")
				break
			}
		}
		above := 0
		if n := len(way); n > 0 {
			last := &doc.Accounts[way[n-1]]
			if next, ok := accounts[last.Parent]; ok && last.Parent != "" && depth[next] > 0 {
				above = depth[next]
			}
			for k := n - 1; k >= 0; k-- {
				above++
				depth[way[k]] = above
			}
		}
		if depth[i] > MaxDepth {
			c.add([]any{"accounts", i, "parent"}, fmt.Sprintf("the account %q has %d accounts above it", a.ID, depth[i]-1), fmt.Sprintf("nest at most %d accounts", MaxDepth))
		}
	}
}

func checkKeys(doc *Document, c *collector) {
	type place struct{ account, key int }
	hashes, ids := map[string]place{}, map[string]place{}
	for i := range doc.Accounts {
		a := &doc.Accounts[i]
		for k, key := range a.Keys {
			if p, twice := hashes[key.SHA256]; twice {
				owner := &doc.Accounts[p.account]
				c.add([]any{"accounts", i, "keys", k, "sha256"}, fmt.Sprintf("the key %q of account %q is also the key %q of account %q%s", key.ID, a.ID, owner.Keys[p.key].ID, owner.ID, c.where("accounts", p.account, "keys", p.key, "sha256")), "a key belongs to one account: remove one")
			} else {
				hashes[key.SHA256] = place{i, k}
			}
			if p, twice := ids[key.ID]; twice {
				c.add([]any{"accounts", i, "keys", k, "id"}, fmt.Sprintf("the key id %q is there twice%s", key.ID, c.where("accounts", p.account, "keys", p.key, "id")), "rename one: events tell keys apart by it")
			} else {
				ids[key.ID] = place{i, k}
			}
			if len(key.ID) > usage.MaxIDBytes {
				c.add([]any{"accounts", i, "keys", k, "id"}, fmt.Sprintf("the key's id is %d bytes long", len(key.ID)), fmt.Sprintf("use at most %d", usage.MaxIDBytes))
			}
		}
	}
}

// checkSizes makes sure that what is written for the document fits the streams.
func checkSizes(doc *Document, c *collector) {
	meters := map[string]bool{}
	for i := range doc.Plans {
		for k := range doc.Plans[i].Limits {
			meters[doc.Plans[i].Limits[k].Meter] = true
		}
	}
	if len(meters) > MaxMeters {
		c.add([]any{"plans"}, fmt.Sprintf("the plans name %d different meters", len(meters)), fmt.Sprintf("at most %d are allowed", MaxMeters))
		return
	}
	if n := proto.Size(PlanSet(doc)); n > MaxPlansBytes {
		c.add([]any{"plans"}, fmt.Sprintf("the plans have %d bytes as one ledger entry", n), fmt.Sprintf("at most %d are allowed: merge plans, or shorten filters and URLs", MaxPlansBytes))
		return
	}
	if checkCore(doc, c); len(c.err.Problems) > 0 {
		return
	}
	checkRecords(doc, c)
}

// recordOverhead is at most what the wire adds to an entry of the directory.
const recordOverhead = 16

// checkRecords makes sure that the accounts and keys of each record of the directory
// fit into one message.
func checkRecords(doc *Document, c *collector) {
	var accounts, keys [directory.Parts]int
	for i := range doc.Accounts {
		a := &doc.Accounts[i]
		accounts[directory.AccountPart(a.ID)] += len(a.ID) + len(a.Parent) + len(a.Plan) + recordOverhead
		for _, k := range a.Keys {
			var h directory.Hash
			if _, err := hex.Decode(h[:], []byte(k.SHA256)); err != nil {
				continue // the schema has told
			}
			keys[directory.KeyPart(h)] += len(h) + len(k.ID) + len(a.ID) + recordOverhead
		}
	}
	for _, of := range []struct {
		name string
		size int
	}{{"accounts", slices.Max(accounts[:])}, {"keys", slices.Max(keys[:])}} {
		if of.size > directory.MaxRecordBytes {
			c.add([]any{"accounts"}, fmt.Sprintf("%d accounts with ids of this length make a record of %s of %d bytes, and %d fit", len(doc.Accounts), of.name, of.size, directory.MaxRecordBytes),
				"use fewer accounts or keys, or shorter ids")
		}
	}
}

// checkCore asks the core itself: a shard refuses an entry as a whole and tells
// only the dead letters, long after the act was said to be done.
func checkCore(doc *Document, c *collector) {
	sequence := uint64(0)
	shard := quota.New(quota.Options{})
	refused := func(control *quota.Control) *usage.InvalidError {
		sequence++
		return shard.Apply(quota.Entry{Sequence: sequence, Control: control}).Invalid
	}
	for i := range doc.Plans {
		if err := refused(&quota.Control{PlanSet: &quota.PlanSet{Plans: []usage.Plan{doc.Plans[i].Usage()}}}); err != nil {
			c.add([]any{"plans", i, "id"}, "counting can't take this plan: "+err.Message, "make it smaller")
		}
	}
	if len(c.err.Problems) > 0 {
		return
	}
	set := &quota.PlanSet{}
	for i := range doc.Plans {
		set.Plans = append(set.Plans, doc.Plans[i].Usage())
	}
	if err := refused(&quota.Control{PlanSet: set}); err != nil {
		c.add([]any{"plans"}, "counting can't take these plans together: "+err.Message, "use fewer")
		return
	}
	// Without parents, whose paths were checked; with them the order would matter.
	for i := range doc.Accounts {
		if err := refused(&quota.Control{Accounts: []usage.Account{{ID: doc.Accounts[i].ID}}}); err != nil {
			c.add([]any{"accounts", i, "id"}, "counting can't take this account: "+err.Message, "rename it")
		}
	}
}

// where says on which line something else stands.
func (c *collector) where(path ...any) string {
	if c.tree == nil {
		return ""
	}
	line, _ := c.tree.position(path)
	return fmt.Sprintf(" (first on line %d)", line)
}

// nearest suggests a known name that differs little.
func nearest(name string, known map[string]int) string {
	const tried = 5000 // a suggestion is not worth more
	best, n := "", 0
	for k := range known {
		if n++; n > tried {
			break
		}
		if (strings.EqualFold(k, name) || editDistanceOne(k, name)) && (best == "" || k < best) {
			best = k
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", but there is %q", best)
}

// editDistanceOne reports whether one letter more, less, changed or swapped
// with its neighbour makes a of b.
func editDistanceOne(a, b string) bool {
	if min(len(a), len(b)) < 3 {
		return false // nearly everything is near
	}
	if len(a) > len(b) {
		a, b = b, a
	}
	if len(b)-len(a) > 1 {
		return false
	}
	i := 0
	for i < len(a) && a[i] == b[i] {
		i++
	}
	if len(a) < len(b) {
		return a[i:] == b[i+1:]
	}
	if i == len(a) {
		return true
	}
	return a[i+1:] == b[i+1:] || i+2 <= len(a) && a[i] == b[i+1] && a[i+1] == b[i] && a[i+2:] == b[i+2:]
}

// CheckMove reports, as an *Error, accounts of next whose root is another than
// before; closed holds the roots of accounts that were removed earlier. An
// account's root decides its place in the ledger.
func CheckMove(before *Document, closed map[string]string, next *Document) error {
	c := &collector{file: next.file, tree: next.tree}
	old, now := Index{}, NewIndex(next)
	if before != nil {
		old = NewIndex(before)
	}
	for i := range next.Accounts {
		id := next.Accounts[i].ID
		from, known := closed[id]
		if _, ok := old.accounts[id]; ok {
			from, known = old.Root(id), true
		}
		if to := now.Root(id); known && from != to {
			c.add([]any{"accounts", i, "parent"}, fmt.Sprintf("the account %q would move from the root %q to %q", id, from, to),
				"the root of an account never changes: leave it, and open an account of another name under the new root")
		}
	}
	return c.result()
}
