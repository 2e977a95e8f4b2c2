package conservation

import (
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestTheAuditIsJudgedInAWord(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	fine := []Point{{Pair: "gateway-ledger", OK: true}, {Pair: "ledger-history", OK: true}}
	for name, c := range map[string]struct {
		a    Answer
		want string
	}{
		"nobody has said anything":    {Answer{}, "unknown"},
		"all agree":                   {Answer{At: usage.At(now), Points: fine}, "ok"},
		"one can't be asked":          {Answer{At: usage.At(now), Points: []Point{{Pair: "ledger-history", Detail: "ClickHouse can't be asked"}}}, "waiting"},
		"the auditor is silent":       {Answer{At: usage.At(now.Add(-time.Minute)), Points: fine}, "waiting"},
		"something is missing":        {Answer{At: usage.At(now), Points: fine, Open: 1}, "down"},
		"missing, and silent by then": {Answer{At: usage.At(now.Add(-time.Hour)), Points: fine, Open: 2}, "down"},
	} {
		got := Judge(c.a, now)
		if got.State != c.want || got.Detail == "" || got.Points == nil || got.Findings == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
