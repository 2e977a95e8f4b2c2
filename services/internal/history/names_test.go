package history

import (
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestAccountsMayHaveAnyNameInAQuestion(t *testing.T) {
	t.Parallel()
	h := open(t)
	for i, name := range []string{`it's`, `back\slash`, `\n`, `\'`, `"double"`, "`tick`", `{account:String}`, `%27`, `'); DROP TABLE calls; --`, `ü ✓`, `a,b`, `[x]`, `$1 ?`, `\`, "tab\there", "new\nline", "\r\b\x01"} {
		t.Run(name, func(t *testing.T) {
			account := unique(t) + name
			at := noon + usage.Micros(i)*3_600_000_000
			c := usage.Call{Time: at, Account: account, Status: 402, Code: usage.QuotaExceeded}
			insert(t, h, block(t, uint64(50_000_000+i), at, ksuid.New(), c), unique(t))
			for _, rollup := range []bool{false, true} {
				got, err := h.AccountTotals(t.Context(), TotalsQuery{Accounts: []string{"other", account}, Rollup: rollup})
				if err != nil || len(got) != 1 || got[0].Refused != 1 || got[0].Account != account {
					t.Errorf("totals (rollup %t): %+v %v", rollup, got, err)
				}
			}
			from := at.Time().Truncate(time.Hour)
			for _, step := range []time.Duration{time.Minute, time.Hour} {
				points, err := h.Calls(t.Context(), CallsQuery{From: from, To: from.Add(time.Hour), Step: step, Group: ByAccount, Account: account})
				if err != nil || len(points) != 1 || points[0].Name != account {
					t.Errorf("series in steps of %s: %+v %v", step, points, err)
				}
			}
			if list, err := h.Refusals(t.Context(), account, time.Time{}, 5); err != nil || len(list) != 1 {
				t.Errorf("refusals: %+v %v", list, err)
			}
			if _, err := h.Decisions(t.Context(), DecisionsQuery{Account: account, ID: name, Verdict: name, Limit: 5}); err != nil {
				t.Errorf("decisions: %v", err)
			}
		})
	}
}

func TestACallWhoseClockWasAheadIsInTheSeriesOfTheTimeItCounted(t *testing.T) {
	t.Parallel()
	h := open(t)
	account := unique(t)
	c := usage.Call{Time: noon + 2*3_600_000_000, Account: account, Status: 200}
	c.Quantities.Set(usage.InputTokens, 7)
	insert(t, h, block(t, 60_000_000, noon, ksuid.New(), c), unique(t))
	for _, step := range []time.Duration{30 * time.Second, time.Hour} { // out of the calls, out of the rollup
		points, err := h.Calls(t.Context(), CallsQuery{From: noon.Time(), To: noon.Time().Add(time.Hour), Step: step, Group: ByAccount, Account: account})
		if err != nil || len(points) != 1 || points[0].Step != 0 || points[0].Admitted != 1 || points[0].InputTokens != 7 {
			t.Errorf("calls in steps of %s: %+v %v", step, points, err)
		}
		used, err := h.Usage(t.Context(), UsageQuery{From: noon.Time(), To: noon.Time().Add(time.Hour), Step: step, Meter: usage.InputTokens, Accounts: []string{account}})
		if err != nil || len(used) != 1 || used[0] != (UsagePoint{Step: 0, Value: 7}) {
			t.Errorf("usage in steps of %s: %+v %v", step, used, err)
		}
	}
}
