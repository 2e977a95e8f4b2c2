package findings

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/books"
)

const minute = audit.Minute(28_333_334)

func gap(account string, want, got int64) audit.Difference {
	w, g := audit.Tally{Count: want}, audit.Tally{Count: got}
	return audit.Difference{Minute: minute, Account: account, Kind: audit.KindOf(&w, &g), Want: w, Got: g}
}

func outcome(origin string, d ...audit.Difference) *books.Outcome {
	return &books.Outcome{Pair: books.LedgerHistory, Origin: origin, From: 1, To: 2, Differences: d}
}

func TestAFindingLivesUntilEveryStretchOfItAgrees(t *testing.T) {
	t.Parallel()
	b := New()
	b.Hear(outcome("1-2", gap("acme", 5, 3), gap("globex", 1, 2)), 10)
	b.Hear(outcome("3-4", gap("acme", 2, 1)), 20)
	list := b.List()
	if len(list) != 2 {
		t.Fatalf("%d findings", len(list))
	}
	byAccount := map[string]*Finding{}
	for _, f := range list {
		byAccount[f.Account] = f
	}
	acme := byAccount["acme"]
	if acme.Kind != audit.Gap || len(acme.Parts) != 2 || acme.FirstSeen != 10 || acme.LastSeen != 20 || !strings.Contains(acme.Text, "-3 calls") || !strings.Contains(acme.Text, minute.String()) {
		t.Errorf("acme: %+v", acme)
	}
	if f := byAccount["globex"]; f.Kind != audit.Double || f.Minute != int64(minute)*60 {
		t.Errorf("globex: %+v", f)
	}
	// The first stretch agrees again, but for globex.
	b.Hear(outcome("1-2", gap("globex", 1, 2)), 30)
	if !acme.Open() || len(acme.Parts) != 1 || !strings.Contains(acme.Text, "-1 calls") {
		t.Errorf("acme after one stretch agrees: %+v", acme)
	}
	b.Hear(outcome("3-4"), 40)
	if acme.Open() || acme.ResolvedAt != 40 || acme.Text == "" || !byAccount["globex"].Open() {
		t.Errorf("acme healed: %+v", acme)
	}
	// It comes again: a new one of the same name.
	b.Hear(outcome("5-6", gap("acme", 1, 0)), 50)
	if f := b.Get(acme.ID); !f.Open() || f.FirstSeen != 50 || b.List()[0] != f {
		t.Errorf("acme again: %+v", f)
	}
}

func TestALookAtOneFindingSaysNothingOfOthersOfItsStretch(t *testing.T) {
	t.Parallel()
	b := New()
	b.Hear(outcome("1-2", gap("acme", 5, 3), gap("globex", 1, 2)), 10)
	var acme *Finding
	for _, f := range b.List() {
		if f.Account == "acme" {
			acme = f
		}
	}
	healed := outcome("1-2")
	healed.Only = acme.ID
	b.Hear(healed, 20)
	if acme.Open() || b.open() != 1 {
		t.Errorf("%d are open, acme: %+v", b.open(), acme)
	}
}

func TestAnAccountsCountersHaveOneFinding(t *testing.T) {
	t.Parallel()
	b := New()
	for i := range 3 {
		d := gap("acme", 5, 3)
		d.Minute += audit.Minute(i) // it is asked for again and again
		b.Hear(&books.Outcome{Pair: books.LedgerCounters, Origin: "1/acme", Differences: []audit.Difference{d}}, usage.Micros(10+i))
	}
	if list := b.List(); len(list) != 1 || list[0].Minute != int64(minute)*60 || len(list[0].Parts) != 1 {
		t.Errorf("%+v", list)
	}
}

func TestFindingsAreBounded(t *testing.T) {
	t.Parallel()
	b := New()
	for i := range MaxOpen + 10 {
		b.Hear(outcome("1-2/"+fmt.Sprint(i), gap(fmt.Sprint("account-", i), 1, 0)), 1)
	}
	if b.open() != MaxOpen || b.Dropped != 10 {
		t.Errorf("%d are open, %d were dropped", b.open(), b.Dropped)
	}
	for i := range MaxParts + 3 {
		b.Hear(outcome(fmt.Sprint("part-", i), gap("account-0", 1, 0)), 2)
	}
	for _, f := range b.List() {
		if len(f.Parts) > MaxParts {
			t.Errorf("%d parts", len(f.Parts))
		}
	}
	b.Expire(usage.Micros((8 * 24 * time.Hour).Microseconds()), 7*24*time.Hour)
	if b.open() != 0 || len(b.List()) != MaxResolved || len(b.origins) != 0 {
		t.Errorf("%d are open, %d are kept, %d stretches are remembered", b.open(), len(b.List()), len(b.origins))
	}
	changed, removed := b.Changes()
	if len(changed) != MaxResolved || len(removed) != MaxOpen-MaxResolved {
		t.Errorf("%d changed, %d removed", len(changed), len(removed))
	}
}

func TestARestartKnowsWhatWasStored(t *testing.T) {
	t.Parallel()
	b := New()
	b.Hear(outcome("1-2", gap("acme", 5, 3)), 10)
	changed, _ := b.Changes()
	data, err := json.Marshal(changed[0])
	if err != nil {
		t.Fatal(err)
	}
	b.Saved(changed[0].ID)
	if changed, removed := b.Changes(); len(changed)+len(removed) != 0 {
		t.Errorf("still to be stored: %v, %v", changed, removed)
	}
	var f Finding
	if err := json.Unmarshal(data, &f); err != nil {
		t.Fatal(err)
	}
	next := New()
	next.Restore(&f)
	next.Hear(outcome("1-2", gap("acme", 5, 3)), 20) // it is found again, and is nothing new
	if changed, _ := next.Changes(); len(changed) != 0 {
		t.Errorf("changed: %+v", changed)
	}
	next.Hear(outcome("1-2"), 30)
	if next.open() != 0 {
		t.Error("it did not heal after a restart")
	}
}

// TestAFindingThatComesAgainAfterItWasForgottenIsKept: what is to be removed is
// not what has its name by then.
func TestAFindingThatComesAgainAfterItWasForgottenIsKept(t *testing.T) {
	t.Parallel()
	b := New()
	b.Hear(outcome("1-2", gap("acme", 5, 3)), 1)
	b.Hear(outcome("1-2"), 2)
	for i := range MaxResolved {
		origin := fmt.Sprint("later-", i)
		b.Hear(outcome(origin, gap(origin, 1, 0)), 3)
		b.Hear(outcome(origin), 4)
	}
	if _, removed := b.Changes(); len(removed) != 1 {
		t.Fatalf("to be removed: %v", removed)
	}
	b.Hear(outcome("7-8", gap("acme", 5, 3)), 5)
	if _, removed := b.Changes(); len(removed) != 0 || b.open() != 1 {
		t.Errorf("to be removed: %v; %d are open", removed, b.open())
	}
}

func TestARestartDoesNotTakeWhatIsResolvedForWhatDiffersNow(t *testing.T) {
	t.Parallel()
	b := New()
	counters := func(d ...audit.Difference) *books.Outcome {
		return &books.Outcome{Pair: books.LedgerCounters, Origin: "1/acme", Differences: d}
	}
	b.Hear(counters(gap("acme", 5, 3)), 10)
	b.Hear(counters(), 20)
	next := New()
	next.Restore(b.List()[0])
	later := gap("acme", 9, 8)
	later.Minute += 60
	next.Hear(counters(later), 30)
	if list := next.List(); len(list) != 2 || list[0].ID == list[1].ID || !strings.Contains(list[0].ID, fmt.Sprint(int64(later.Minute))) {
		t.Errorf("%d findings: %+v", len(list), list)
	}
}
