package directory

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	wire "github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// document is a directory in the plainest form.
type document struct {
	plans    map[string]usage.Plan
	accounts map[string]wire.Account
	keys     map[byte]wire.Key
}

func (d *document) records(t *rapid.T) map[string][]byte {
	var plans []usage.Plan
	var accounts []wire.Account
	var keys []wire.Key
	for _, p := range d.plans {
		plans = append(plans, p)
	}
	for _, a := range d.accounts {
		accounts = append(accounts, a)
	}
	for _, k := range d.keys {
		keys = append(keys, k)
	}
	out, err := wire.Records(plans, accounts, keys)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// path of an account; nil when something on it is missing.
func (d *document) path(id string) (path []string, limits []string) {
	for {
		a, ok := d.accounts[id]
		if !ok || len(path) > 8 {
			return nil, nil
		}
		path = append(path, id)
		if a.Plan != "" {
			p, ok := d.plans[a.Plan]
			if !ok {
				return nil, nil
			}
			for _, l := range p.Limits {
				limits = append(limits, fmt.Sprint(id, " ", p.ID, "/", l.ID, " ", l.Amount))
			}
		}
		if a.Parent == "" {
			return path, limits
		}
		id = a.Parent
	}
}

var names = []string{"org", "team", "svc", "leaf", "other"}

// change changes one thing at random.
func (d *document) change(t *rapid.T) {
	switch rapid.IntRange(0, 5).Draw(t, "what") {
	case 0:
		id := rapid.SampledFrom([]string{"p", "q"}).Draw(t, "plan")
		d.plans[id] = usage.Plan{ID: id, Limits: []usage.Limit{{ID: "l", Meter: usage.Calls, Window: usage.Day, Tier: usage.TierExact, Amount: int64(rapid.IntRange(1, 3).Draw(t, "amount"))}}}
	case 1:
		delete(d.plans, rapid.SampledFrom([]string{"p", "q"}).Draw(t, "plan"))
	case 2:
		delete(d.accounts, rapid.SampledFrom(names).Draw(t, "account"))
	case 3:
		delete(d.keys, byte(rapid.IntRange(0, 3).Draw(t, "key")))
	case 4:
		n := byte(rapid.IntRange(0, 3).Draw(t, "key"))
		d.keys[n] = wire.Key{Hash: wire.Hash{n, 1: n << 6}, ID: fmt.Sprint("k", rapid.IntRange(0, 1).Draw(t, "name")), Account: rapid.SampledFrom(names).Draw(t, "owner")}
	default:
		i := rapid.IntRange(0, len(names)-1).Draw(t, "account")
		a := wire.Account{ID: names[i], Plan: rapid.SampledFrom([]string{"", "p", "q"}).Draw(t, "plan")}
		if i > 0 && rapid.Bool().Draw(t, "below") {
			a.Parent = names[rapid.IntRange(0, i-1).Draw(t, "parent")] // no circles
		}
		d.accounts[a.ID] = a
	}
}

// Whatever changes in whatever order, and whoever asked before for whatever: what is
// answered is what the bucket says at that moment, and a handle that is kept follows.
func TestWhatIsAnsweredIsWhatTheBucketSays(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var write sync.Mutex
		tab := table.New(2, ledger.ShardOf, table.Policy{StaleAfter: 1})
		d := New(tab, &write)
		doc := &document{plans: map[string]usage.Plan{}, accounts: map[string]wire.Account{}, keys: map[byte]wire.Key{}}
		bucket := map[string][]byte{} // what was handed over
		kept := map[string]*table.Account{}
		reset := func() {
			var all []ledger.Change
			for key, value := range bucket {
				all = append(all, ledger.Change{Key: key, Value: value})
			}
			if bad := d.Reset(all); len(bad) > 0 {
				t.Fatal(bad)
			}
		}
		reset()
		for range rapid.IntRange(1, 25).Draw(t, "changes") {
			doc.change(t)
			now := doc.records(t)
			again := rapid.IntRange(0, 4).Draw(t, "read it all again") == 0
			for _, key := range slices.Concat(keysOf(bucket), keysOf(now)) {
				if string(bucket[key]) == string(now[key]) {
					continue
				}
				if bucket[key] = now[key]; now[key] == nil {
					delete(bucket, key)
				}
				if !again {
					if err := d.Apply(ledger.Change{Key: key, Value: now[key]}); err != nil {
						t.Fatal(err)
					}
				}
			}
			if again {
				reset()
				// A handle that was not known may not be in use any more.
				maps.DeleteFunc(kept, func(_ string, a *table.Account) bool { return !a.Known() })
			}
			check(t, d, doc, kept)
		}
	})
}

func keysOf(m map[string][]byte) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func check(t *rapid.T, d *Directory, doc *document, kept map[string]*table.Account) {
	if accounts, keys := d.Size(); accounts != len(doc.accounts) || keys != len(doc.keys) {
		t.Errorf("%d accounts and %d keys, want %d and %d", accounts, keys, len(doc.accounts), len(doc.keys))
	}
	for _, id := range names {
		// Some are asked for only now and then.
		path, limits := doc.path(id)
		if a := kept[id]; a != nil && a.Known() != (path != nil) {
			t.Errorf("a kept handle of %s is known: %v, want %v", id, a.Known(), path != nil)
		}
		if rapid.Bool().Draw(t, "ask") {
			continue
		}
		a, found := d.ByID(id)
		_, there := doc.accounts[id]
		switch {
		case path != nil:
			if found != table.Found {
				t.Fatalf("%s: %v", id, found)
			}
			root, _, _ := a.Root()
			var got []string
			for _, l := range a.Leased() {
				got = append(got, fmt.Sprint(l.Account(), " ", l.LimitID(), " ", l.Limit.Amount))
			}
			if root != path[len(path)-1] || a.Plan() != doc.accounts[id].Plan || !cmp.Equal(got, limits) {
				t.Errorf("%s: root %s, plan %s, limits %v; want path %v, limits %v", id, root, a.Plan(), got, path, limits)
			}
			kept[id] = a
		case there:
			if found != table.CannotTell {
				t.Errorf("%s, whose path is not whole: %v", id, found)
			}
		default:
			if found != table.NotFound {
				t.Errorf("%s, which is not there: %v", id, found)
			}
		}
	}
	for n := range byte(4) {
		h := table.KeyHash{n, 1: n << 6}
		k, there := doc.keys[n]
		c, found := d.ByKey(&h)
		if there != (found == table.Found) {
			t.Errorf("key %d: %v, there is %v", n, found, there)
		}
		if !there {
			continue
		}
		path, _ := doc.path(k.Account)
		if *c.KeyID != k.ID || c.Account.ID() != k.Account || c.Account.Known() != (path != nil) {
			t.Errorf("key %d is %s of %s (known %v), want %+v with path %v", n, *c.KeyID, c.Account.ID(), c.Account.Known(), k, path)
		}
	}
}

func TestBeforeTheDirectoryWasReadNothingIsToldToBeMissing(t *testing.T) {
	t.Parallel()
	var write sync.Mutex
	d := New(table.New(1, ledger.ShardOf, table.Policy{}), &write)
	if _, found := d.ByKey(&table.KeyHash{1}); found != table.CannotTell {
		t.Errorf("a key: %v", found)
	}
	if _, found := d.ByID("acme"); found != table.CannotTell {
		t.Errorf("an account: %v", found)
	}
}

// What many ask for at once, first and while it changes, is found by all of them.
func TestManyAskAtOnceWhileItChanges(t *testing.T) {
	t.Parallel()
	var write sync.Mutex
	d := New(table.New(4, ledger.ShardOf, table.Policy{}), &write)
	const accounts = 500
	records := func(plan string) map[string][]byte {
		var all []wire.Account
		var keys []wire.Key
		for i := range accounts {
			id := fmt.Sprint("a", i)
			all = append(all, wire.Account{ID: id, Plan: plan, Parent: "org"})
			keys = append(keys, wire.Key{Hash: wire.Hash{byte(i), byte(i >> 8)}, ID: id, Account: id})
		}
		out, err := wire.Records([]usage.Plan{{ID: "p"}, {ID: "q"}}, append(all, wire.Account{ID: "org"}), keys)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var first []ledger.Change
	for key, value := range records("p") {
		first = append(first, ledger.Change{Key: key, Value: value})
	}
	d.Reset(first)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for n := range 4 * accounts {
				i := (n*7 + g) % accounts
				c, found := d.ByKey(&table.KeyHash{byte(i), byte(i >> 8)})
				if found != table.Found || c.Account.ID() != fmt.Sprint("a", i) || !c.Account.Known() {
					t.Errorf("key %d: %v", i, found)
					return
				}
			}
		})
	}
	for _, plan := range []string{"q", "p", "q"} {
		for key, value := range records(plan) {
			if err := d.Apply(ledger.Change{Key: key, Value: value}); err != nil {
				t.Error(err)
			}
		}
	}
	wg.Wait()
	for i := range accounts {
		if a, _ := d.ByID(fmt.Sprint("a", i)); a.Plan() != "q" {
			t.Fatalf("account %d has plan %s", i, a.Plan())
		}
	}
}
