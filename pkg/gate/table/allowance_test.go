package table

import (
	"testing"
	"unsafe"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func purseOf(units int64) *lease.Purse {
	p := lease.NewPurse(lease.Gateway{1}, 0, lease.Habits{Term: 1_000_000, RetryAfter: 1000, FirstWant: 1, MaxWant: 1})
	p.Receive(lease.Answer{Gateway: lease.Gateway{1}, Epoch: 1, Revision: 1, Granted: units, Expiry: 1 << 60}, 0)
	return p
}

// Whose limit it is, the account's own, an ancestor's, one of several or one that came
// after another: a call takes a unit of each that concerns it, or of none.
func TestACallTakesAUnitOfEveryLimitThatConcernsIt(t *testing.T) {
	t.Parallel()
	limit := func(account, id string, models ...string) LeasedLimit {
		return LeasedLimit{Account: account, LimitID: id, Limit: usage.Limit{ID: id, Meter: usage.Calls, Window: usage.Lifetime, Amount: 10, Tier: usage.TierExact, Filter: usage.Filter{Models: models}}}
	}
	for name, c := range map[string]struct {
		before, limits []LeasedLimit
		model          string
		units          []int64 // -1: there is no purse
		takes          int
	}{
		"its own":                       {nil, []LeasedLimit{limit("leaf", "a")}, "m", []int64{3}, 3},
		"its own, no purse":             {nil, []LeasedLimit{limit("leaf", "a")}, "m", []int64{-1}, 0},
		"its own, for this model":       {nil, []LeasedLimit{limit("leaf", "a", "m")}, "m", []int64{3}, 3},
		"its own, for another model":    {nil, []LeasedLimit{limit("leaf", "a", "n")}, "m", []int64{3}, 0},
		"its parent's":                  {nil, []LeasedLimit{limit("org", "a")}, "m", []int64{3}, 3},
		"after another":                 {[]LeasedLimit{limit("leaf", "b")}, []LeasedLimit{limit("leaf", "a")}, "m", []int64{3}, 3},
		"its own and its parent's":      {nil, []LeasedLimit{limit("leaf", "a"), limit("org", "a")}, "m", []int64{3, 2}, 2},
		"two of its own, one concerned": {nil, []LeasedLimit{limit("leaf", "a", "n"), limit("leaf", "b", "m")}, "m", []int64{3, 2}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tab := New(2, testShardOf, Policy{StaleAfter: 1})
			if c.before != nil {
				tab.SetAccount(AccountRecord{ID: "leaf", Path: []string{"leaf", "org"}, Seq: 1, Leased: c.before})
				old, _ := tab.ByID("leaf")
				old.Leased()[0].Use(purseOf(100))
			}
			tab.SetAccount(AccountRecord{ID: "leaf", Path: []string{"leaf", "org"}, Seq: 2, Leased: c.limits})
			a, _ := tab.ByID("leaf")
			for i, units := range c.units {
				if units >= 0 {
					a.Leased()[i].Use(purseOf(units))
				}
			}
			req, took := Request{Model: c.model}, 0
			for range 10 {
				if taken, _ := tab.TakeOne(a, &req, 1, false); taken {
					took++
				}
			}
			if took != c.takes {
				t.Errorf("%d calls, want %d", took, c.takes)
			}
			a.Leased()[0].Use(nil)
			if taken, _ := tab.TakeOne(a, &req, 1, false); taken && a.Leased()[0].Concerns(req) {
				t.Error("taken from a purse that is out of use")
			}
		})
	}
}

// What an admission looks at begins with a line of memory, or does not cross one.
func TestAnAdmissionTouchesFewLines(t *testing.T) {
	t.Parallel()
	if a, r, p := unsafe.Sizeof(Account{}), unsafe.Sizeof(record{}), unsafe.Sizeof(lease.Purse{}); a != 96 || r != 128 || p != 512 {
		t.Errorf("an account has %d bytes, a record %d, a purse %d: TakeOne becomes slower where they cross lines", a, r, p)
	}
	if end := unsafe.Offsetof(Account{}.purse) + unsafe.Sizeof(Account{}.purse); end > 32 {
		t.Errorf("the purse ends at %d", end)
	}
	if at := unsafe.Offsetof(record{}.leased); at > 64 {
		t.Errorf("what is looked at ends at %d", at)
	}
}
