package planfile

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestADifferenceReadsLikeASentenceALine(t *testing.T) {
	t.Parallel()
	got := Compare(first(), second()).String()
	want := `~ plan free
    ~ limit calls
        amount: 10 → 20
+ plan pro
    + limit tokens
        meter: output_tokens
        window: day
        amount: 5000
        tier: eventual
        warn_percent: 80
        code: QUOTA_EXCEEDED
- plan team
    - limit spend
~ account acme
    plan: team → pro
~ account acme/search
    key d4735e3a…: k2 → (none)
+ account acme/search/web
    parent: acme/search
    key d4735e3a…: k2
- account gone
accounts  1 added, 2 changed, 1 removed, 1 unchanged
keys      0 added, 1 changed, 1 removed, 2 unchanged
plans     1 added, 1 changed, 1 removed, 0 unchanged
limits    1 added, 1 changed, 1 removed, 0 unchanged`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := Compare(first(), first()).String(); got != "nothing changes" {
		t.Errorf("got %q", got)
	}
}

func TestALongDifferenceIsCut(t *testing.T) {
	t.Parallel()
	next := first()
	for i := range 100 {
		next.Accounts = append(next.Accounts, Account{ID: fmt.Sprintf("n%03d", i)})
	}
	next.Accounts[3].Plan = ""
	next.Accounts = slices.Delete(next.Accounts, 2, 3)
	got := Compare(first(), next).String()
	if want := "… and 52 more accounts (51 added, 1 changed, 0 removed)\naccounts  100 added, 1 changed, 1 removed, 2 unchanged\n"; !strings.Contains(got, want) || !strings.HasPrefix(got, "- account gone\n") {
		t.Errorf("got %s", got)
	}
}

func TestMergeAddsAndReplaces(t *testing.T) {
	t.Parallel()
	base := first()
	got := Merge(base, &Document{
		Plans:    []Plan{{ID: "free"}, {ID: "replay"}},
		Accounts: []Account{{ID: "solo", Plan: "replay"}, {ID: "new"}},
	})
	want := `~ plan free
    - limit calls
+ plan replay
+ account new
~ account solo
    plan: free → replay
    key 4b227777…: k4 → (none)
accounts  1 added, 1 changed, 0 removed, 3 unchanged
keys      0 added, 0 changed, 1 removed, 3 unchanged
plans     1 added, 1 changed, 0 removed, 1 unchanged
limits    0 added, 0 changed, 1 removed, 1 unchanged`
	if diff := cmp.Diff(want, Compare(base, got).String()); diff != "" {
		t.Error(diff)
	}
	if !Compare(first(), base).Empty() {
		t.Error("merging changed its argument")
	}
	if got := Merge(nil, first()); !Compare(first(), got).Empty() {
		t.Error("merging into nothing gives something else")
	}
}

func first() *Document {
	return &Document{
		Version: 1,
		Plans: []Plan{
			{ID: "free", Limits: []Limit{{ID: "calls", Meter: "calls", Window: "minute", Amount: 10}}},
			{ID: "team", Limits: []Limit{{ID: "spend", Meter: "cost", Window: "month", Amount: 1000, Code: "SPEND_CAP_REACHED"}}},
		},
		Accounts: []Account{
			{ID: "acme", Plan: "team"},
			{ID: "acme/search", Parent: "acme", Plan: "free", Keys: []Key{{ID: "k1", SHA256: HashKey("1")}, {ID: "k2", SHA256: HashKey("2")}}},
			{ID: "gone", Plan: "free", Keys: []Key{{ID: "k3", SHA256: HashKey("3")}}},
			{ID: "solo", Plan: "free", Keys: []Key{{ID: "k4", SHA256: HashKey("4")}}},
		},
	}
}

// second removes an account and keys, moves a key, changes, adds and removes plans.
func second() *Document {
	return &Document{
		Version: 1,
		Plans: []Plan{
			{ID: "free", Limits: []Limit{{ID: "calls", Meter: "calls", Window: "minute", Amount: 20}}},
			{ID: "pro", Limits: []Limit{{ID: "tokens", Meter: "output_tokens", Window: "day", Amount: 5000, WarnPercent: 80}}},
		},
		Accounts: []Account{
			{ID: "acme", Plan: "pro"},
			{ID: "acme/search", Parent: "acme", Plan: "free", Keys: []Key{{ID: "k1", SHA256: HashKey("1")}}},
			{ID: "acme/search/web", Parent: "acme/search", Keys: []Key{{ID: "k2", SHA256: HashKey("2")}}},
			{ID: "solo", Plan: "free", Keys: []Key{{ID: "k4", SHA256: HashKey("4")}}},
		},
	}
}
