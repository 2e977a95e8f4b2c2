package plans

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
