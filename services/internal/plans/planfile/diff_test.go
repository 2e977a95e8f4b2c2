package planfile

import (
	"fmt"
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
- account gone`
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
	got := Compare(first(), next).String()
	if want := "… and 51 more accounts (50 added, 1 changed, 0 removed)"; got[len(got)-len(want):] != want {
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
    key 4b227777…: k4 → (none)`
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
