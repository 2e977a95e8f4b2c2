package limits

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const (
	minute = usage.Micros(60_000_000)
	start  = 28_333_333 * minute
	end    = start + minute
)

func counted(used int64, verdict string, revision uint64) ledger.LimitUsage {
	return ledger.LimitUsage{LimitID: "p/l", Window: usage.Minute, Amount: 100, Used: used, Remaining: max(100-used, 0), PeriodStart: start, PeriodEnd: end, Verdict: verdict, Revision: revision}
}

func decided(verdict usage.Verdict, used int64, revision uint64) *usage.Decision {
	return &usage.Decision{ID: "d", LimitID: "p/l", Verdict: verdict, Used: used, Amount: 100, Revision: revision, PeriodStart: start, PeriodEnd: end}
}

func TestALimitSaysWhatARefusalOfThatMomentSays(t *testing.T) {
	t.Parallel()
	type told struct {
		Used, Remaining int64
		Verdict         string
		End             usage.Micros
	}
	roomy := decided(usage.Deny, 60, 9)
	roomy.Room = 40
	for name, c := range map[string]struct {
		counters ledger.LimitUsage
		decision *usage.Decision
		now      usage.Micros
		want     told
	}{
		"no decision":                                 {counted(40, "allow", 0), nil, start + 1, told{40, 60, "allow", end}},
		"the same":                                    {counted(100, "deny", 9), decided(usage.Deny, 100, 9), start + 1, told{100, 0, "deny", end}},
		"calls after the decision are counted":        {counted(120, "deny", 9), decided(usage.Deny, 100, 9), start + 1, told{120, 0, "deny", end}},
		"the decision is on its way":                  {counted(100, "deny", 9), decided(usage.Warn, 80, 5), start + 1, told{100, 0, "deny", end}},
		"it was unblocked, the message is on its way": {counted(10, "allow", 12), decided(usage.Deny, 100, 9), start + 1, told{10, 90, "allow", end}},
		"counters of one that takes over are behind":  {counted(70, "allow", 0), decided(usage.Deny, 100, 9), start + 1, told{100, 0, "deny", end}},
		"a smaller call may pass":                     {counted(50, "allow", 0), roomy, start + 1, told{60, 40, "deny", end}},
		"the block ended with its period":             {counted(100, "deny", 9), decided(usage.Deny, 100, 9), end, told{0, 100, "allow", end + minute}},
		"the period ended long ago":                   {counted(40, "allow", 0), nil, end + 10*minute + 5, told{0, 100, "allow", end + 11*minute}},
		"the ledger is ahead of this clock":           {counted(3, "allow", 0), nil, start - minute, told{3, 97, "allow", end}},
		"a window of a newer program":                 {ledger.LimitUsage{Window: "decade", Amount: 9, Used: 4, Remaining: 5, PeriodEnd: 1, Verdict: "allow"}, nil, end, told{4, 5, "allow", 1}},
		"lifetime":                                    {ledger.LimitUsage{Window: usage.Lifetime, Amount: 9, Used: 9, Verdict: "deny", Revision: 3}, nil, end, told{9, 0, "deny", 0}},
	} {
		l := c.counters
		Settle(&l, c.decision, c.now)
		if diff := cmp.Diff(c.want, told{l.Used, l.Remaining, l.Verdict, l.PeriodEnd}); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if l.Verdict == "deny" && l.Room == 0 && l.Remaining != 0 {
			t.Errorf("%s: all calls are denied and %d remain", name, l.Remaining)
		}
	}
}

func TestTheSeverestVerdictCounts(t *testing.T) {
	t.Parallel()
	l := func(verdicts ...string) (out []ledger.LimitUsage) {
		for _, v := range verdicts {
			out = append(out, ledger.LimitUsage{Verdict: v})
		}
		return out
	}
	if Worst(nil) != usage.Allow || Worst(l("allow", "warn")) != usage.Warn || Worst(l("deny", "warn")) != usage.Deny {
		t.Error("another verdict than the severest")
	}
}
