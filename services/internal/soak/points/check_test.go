package points_test

import (
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/points"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// agreed are four calls on which all points agree: two passed, one refused, one of
// which the client heard nothing.
func agreed() points.Points {
	l := points.NewLedger(nil)
	l.Calls = []points.Held{{Admitted: 1}, {Admitted: 1}, {Refused: 1}, {}}
	sums := points.Sums{Admitted: 2, Refused: 1, Meters: map[usage.Meter]int64{usage.InputTokens: 6}}
	l.Accounts["a"] = &sums
	return points.Points{
		Seen:     []traffic.Seen{{Outcome: traffic.Passed}, {Outcome: traffic.Passed}, {Outcome: traffic.Refused}, {Outcome: traffic.Nothing}},
		Ledger:   l,
		Counters: map[string]points.Sums{"a": sums},
		History:  &points.History{Calls: []points.Held{{Admitted: 1}, {Admitted: 1}, {Refused: 1}}},
		Rollups:  map[string]points.Sums{"a": sums},
	}
}

func TestPointsThatAgreeBreakNothing(t *testing.T) {
	t.Parallel()
	p := agreed()
	if c := points.Compare(p); len(c.Broken(false)) > 0 || c.Ledger != 3 || c.History != 3 || c.Counters != 3 || c.Rollups != 3 {
		t.Errorf("%+v: %v", c, c.Broken(false))
	}
	// A call whose client heard nothing may have been counted.
	p = agreed()
	p.Ledger.Calls[3].Admitted = 1
	p.History.Calls = append(p.History.Calls, points.Held{Admitted: 1})
	p.Ledger.Accounts["a"] = &points.Sums{Admitted: 3, Refused: 1}
	p.Counters, p.Rollups = map[string]points.Sums{"a": *p.Ledger.Accounts["a"]}, map[string]points.Sums{"a": *p.Ledger.Accounts["a"]}
	c := points.Compare(p)
	if broken := c.Broken(false); len(broken) > 0 {
		t.Error(broken)
	}
}

func TestEachWayToBreakALawIsFound(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		harm func(*points.Points)
		says string
	}{
		"lost":               {func(p *points.Points) { p.Ledger.Calls[0] = points.Held{} }, "answered calls are not in the ledger"},
		"lost refusal":       {func(p *points.Points) { p.Ledger.Calls[2] = points.Held{} }, "refused calls are not in the ledger"},
		"doubled":            {func(p *points.Points) { p.Ledger.Calls[0].Admitted = 2 }, "more than once"},
		"doubled in history": {func(p *points.Points) { p.History.Calls[0].Admitted = 2 }, "more than once"},
		"misjudged":          {func(p *points.Points) { p.Ledger.Calls[2] = points.Held{Admitted: 1} }, "otherwise than the client was told"},
		"not in history":     {func(p *points.Points) { p.History.Calls[1] = points.Held{} }, "otherwise than in the ledger"},
		"gap":                {func(p *points.Points) { p.Ledger.Gaps = 1 }, "skipped"},
		"counters": {func(p *points.Points) {
			p.Counters["a"] = points.Sums{Admitted: 2, Refused: 1, Meters: map[usage.Meter]int64{usage.InputTokens: 7}}
		}, "counters: a"},
		"rollups of nobody": {func(p *points.Points) { p.Rollups["b"] = points.Sums{Admitted: 1} }, "rollups: b"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := agreed()
			c.harm(&p)
			check := points.Compare(p)
			if broken := strings.Join(check.Broken(false), "; "); !strings.Contains(broken, c.says) {
				t.Errorf("got %q, want %q", broken, c.says)
			}
		})
	}
}

func TestWithoutSpoolBeforeAnswerALossIsMeasuredAndNothingElseIsForgiven(t *testing.T) {
	t.Parallel()
	p := agreed()
	p.Ledger.Calls[0], p.History.Calls[0] = points.Held{}, points.Held{}
	sums := points.Sums{Admitted: 1, Refused: 1}
	p.Ledger.Accounts["a"], p.Counters["a"], p.Rollups["a"] = &sums, sums, sums
	c := points.Compare(p)
	if broken := c.Broken(true); len(broken) > 0 || c.Lost != 1 || len(c.LostCalls) != 1 || c.LostCalls[0] != 0 {
		t.Errorf("%+v: %v", c, broken)
	}
	p.Ledger.Calls[1].Admitted = 2
	c = points.Compare(p)
	if len(c.Broken(true)) == 0 {
		t.Error("a doubled call was forgiven")
	}
}

func TestOnlyWhatAGatewayHadJustAnsweredMayGoWithIt(t *testing.T) {
	t.Parallel()
	seen := []traffic.Seen{{Gateway: 0, Ended: 900_000}, {Gateway: 0, Ended: 950_000}, {Gateway: 0, Ended: 2_000_000}, {Gateway: 1, Ended: 900_000}, {Gateway: 0, Ended: 1_500_000}}
	ends := [][]int64{{1_000_000, 1_600_000}, {}}
	l, wrong := points.Losses(seen, []int{0, 1, 4}, ends)
	if len(wrong) > 0 || l != (points.Loss{Calls: 3, Kills: 2, Most: 2, Oldest: 100_000_000}) {
		t.Errorf("%+v, wrong: %v", l, wrong)
	}
	// After its last kill, and of a gateway that nobody killed.
	if l, wrong = points.Losses(seen, []int{2, 3}, ends); len(wrong) != 2 || l.Calls != 0 {
		t.Errorf("%+v, wrong: %v", l, wrong)
	}
	if _, wrong = points.Losses([]traffic.Seen{{Ended: 1}}, []int{0}, [][]int64{{60_000_000}}); len(wrong) != 1 {
		t.Errorf("a minute before the kill: %v", wrong)
	}
}
