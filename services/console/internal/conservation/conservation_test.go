package conservation

import (
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestTheAuditIsJudgedInAWord(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	fine := []Point{{Pair: "gateway-ledger", OK: true}, {Pair: "ledger-history", OK: true}}
	late := []Point{{Pair: "gateway-ledger", OK: true, LagSeconds: 59}, {Pair: "ledger-history", OK: true}}
	for name, c := range map[string]struct {
		a    Answer
		away string
		want string
		says string
	}{
		"nobody has said anything":        {Answer{}, "", "unknown", "start one"},
		"all agree":                       {Answer{At: usage.At(now), Points: fine}, "", "ok", "all points agree"},
		"nothing was compared":            {Answer{At: usage.At(now)}, "", "waiting", "not compared anything"},
		"one can't be asked":              {Answer{At: usage.At(now), Points: []Point{{Pair: "ledger-history", Detail: "ClickHouse can't be asked"}}}, "", "waiting", "ClickHouse can't be asked"},
		"ClickHouse is stopped":           {Answer{At: usage.At(now), Points: fine}, "connection refused", "waiting", "ClickHouse does not answer: connection refused"},
		"a pair is 59 s behind":           {Answer{At: usage.At(now), Points: late}, "", "waiting", "are 59s old"},
		"the auditor is silent":           {Answer{At: usage.At(now.Add(-time.Minute)), Points: fine}, "", "waiting", "nothing for 1m0s"},
		"something is missing":            {Answer{At: usage.At(now), Points: fine, Open: 1}, "", "down", "1 finding holds"},
		"missing, and silent by then":     {Answer{At: usage.At(now.Add(-time.Hour)), Points: fine, Open: 2}, "", "down", "nothing for 1h0m0s"},
		"missing, and ClickHouse is away": {Answer{At: usage.At(now), Points: fine, Open: 2}, "timeout", "down", "does not answer: timeout"},
	} {
		got := Judge(c.a, now, c.away)
		if got.State != c.want || !strings.Contains(got.Detail, c.says) || got.Points == nil || got.Findings == nil {
			t.Errorf("%s: %+v", name, got)
		}
		green := 0
		for _, p := range got.Points {
			if p.State == "ok" {
				green++
			}
		}
		if c.want == "ok" != got.Freshness.Current && c.a.Open == 0 || c.want == "waiting" && green == len(got.Points) && green > 0 {
			t.Errorf("%s: %d points are green, %+v", name, green, got.Freshness)
		}
	}
	if c := Judge(Answer{At: usage.At(now), Points: fine}, now, "away"); fine[1].State != "" || c.Points[1].OK {
		t.Errorf("judging changes what was read: %+v", fine)
	}
}
