package planfile

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// randomDocument is a valid one of few names, so that two have much in common.
func randomDocument(r *rand.Rand) *Document {
	d := &Document{Version: FormatVersion}
	for i := range 3 {
		if r.IntN(3) == 0 {
			continue
		}
		p := Plan{ID: fmt.Sprint("p", i)}
		for k := range 3 {
			if r.IntN(2) == 0 {
				p.Limits = append(p.Limits, Limit{ID: fmt.Sprint("l", k), Meter: "calls", Window: "day", Amount: 1 + r.Int64N(2)})
			}
		}
		d.Plans = append(d.Plans, p)
	}
	hashes := r.Perm(6)
	for i := range 4 {
		if r.IntN(3) == 0 {
			continue
		}
		a := Account{ID: fmt.Sprint("a", i)}
		if n := len(d.Plans); n > 0 && r.IntN(2) == 0 {
			a.Plan = d.Plans[r.IntN(n)].ID
		}
		d.Accounts = append(d.Accounts, a)
	}
	for i := range 4 { // key k<i> is somewhere, with some hash
		if n := len(d.Accounts); n > 0 && r.IntN(3) > 0 {
			a := &d.Accounts[r.IntN(n)]
			a.Keys = append(a.Keys, Key{ID: fmt.Sprint("k", i), SHA256: HashKey(fmt.Sprint(hashes[i]))})
		}
	}
	return d
}

func sizes(d *Document) (accounts, keys, plans, limits int) {
	for i := range d.Accounts {
		keys += len(d.Accounts[i].Keys)
	}
	for i := range d.Plans {
		limits += len(d.Plans[i].Limits)
	}
	return len(d.Accounts), keys, len(d.Plans), limits
}

func TestTotalsCountEverythingOnce(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 500 {
		old, now := randomDocument(r), randomDocument(r)
		for _, d := range []*Document{old, now} {
			if err := Check(d); err != nil {
				t.Fatal(err)
			}
		}
		d := Compare(old, now)
		check := func(what string, c Counts, before, after int) {
			if c.Removed+c.Changed+c.Unchanged != before || c.Added+c.Changed+c.Unchanged != after || min(c.Added, c.Changed, c.Removed, c.Unchanged) < 0 {
				t.Fatalf("%s: %+v of %d before and %d after:\n%+v\n%+v\n%s", what, c, before, after, old, now, d)
			}
		}
		oa, ok, op, ol := sizes(old)
		na, nk, np, nl := sizes(now)
		check("accounts", d.Totals.Accounts, oa, na)
		check("plans", d.Totals.Plans, op, np)
		check("limits", d.Totals.Limits, ol, nl)
		// A key that took over another's hash makes two of before one.
		if c := d.Totals.Keys; c.Removed+c.Changed+c.Unchanged != ok || c.Added+c.Unchanged > nk {
			t.Fatalf("keys: %+v of %d before and %d after", c, ok, nk)
		}
	}
}

// What another has added since is not lost by a document that does not know of it.
func TestKeepingRemovesNothing(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 500 {
		now, next := randomDocument(r), randomDocument(r)
		kept := Keep(now, next)
		if err := Check(kept); err != nil {
			t.Fatalf("%v\n%+v\n%+v", err, now, next)
		}
		if removed := Compare(now, kept).Totals.Removed(); removed != "" {
			t.Fatalf("%s removed:\n%+v\n%+v", removed, now, next)
		}
		// All that the document says holds: going on to it only removes.
		if c := Compare(kept, next).Totals; c.Accounts.Added+c.Keys.Added+c.Keys.Changed+c.Plans.Added+c.Limits.Added+c.Limits.Changed > 0 {
			t.Fatalf("not all of the document holds:\n%s", Compare(kept, next))
		}
	}
	if got := Keep(nil, first()); !Compare(first(), got).Empty() {
		t.Error("kept beside nothing it is something else")
	}
}

func TestWhatIsRemovedIsCountedInWords(t *testing.T) {
	t.Parallel()
	for want, totals := range map[string]Totals{
		"":                            {Accounts: Counts{Added: 3, Changed: 1}},
		"1 account":                   {Accounts: Counts{Removed: 1}},
		"2 accounts, 1 key, 3 limits": {Accounts: Counts{Removed: 2}, Keys: Counts{Removed: 1}, Limits: Counts{Removed: 3}},
	} {
		if got := totals.Removed(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
