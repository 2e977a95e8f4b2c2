package explanation

import (
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/services/internal/explain"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
)

func TestLeasesAndCorrectionsAreToldToPeople(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	err := writeText(&b, &explain.Explanation{
		Decision: explain.Decision{Verdict: "deny", LimitID: "p/calls", Account: "acme", Used: 10, Amount: 10},
		Limit:    explain.Limit{Amount: 10, Meter: "calls", Window: "day", Tier: "exact"},
		Fed:      trace.Fed{Calls: 2, Used: 2, Adjusted: -1, Reported: 9},
		Allowance: &explain.Allowance{Settled: 10, Outstanding: 3, Dead: 2, Leases: []explain.Lease{
			{Gateway: "first", State: "live", Granted: 7, Used: 6, Outstanding: 1}, {Gateway: "second", State: "lapsed", Granted: 6, Used: 4, Outstanding: 2, Held: 1},
		}},
		Calls: []explain.Call{{Sequence: 9, Index: -1, Adds: -1, UsedAfter: 1, Act: &explain.Act{ID: "the-id", Author: "ada", What: "usage of acme corrected: calls -1 (sent twice)"}},
			{Sequence: 8, Adds: 1, UsedAfter: 2, RequestID: "gone", Ending: "client_left", Estimated: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, want := range []string{
		"tier exact", "-1 by control entries; +9 that gateways said they used of their leases",
		"10 used for certain, 3 outstanding with 2 gateways; 2 of it with gateways that may not use it any more",
		"leases at that entry", "lapsed", "usage of acme corrected: calls -1 (sent twice)", "by ada (the-id)",
		"client_left (estimate)",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("it does not say %q:\n%s", want, text)
		}
	}
}
