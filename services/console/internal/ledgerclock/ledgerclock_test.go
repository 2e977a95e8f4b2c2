package ledgerclock

import (
	"testing"
	"time"
)

// A console whose clock is an hour ahead showed blocks as ended that gateways enforce.
func TestAWrongClockIsCorrectedByTheServers(t *testing.T) {
	t.Parallel()
	now := time.Unix(10_000, 0)
	for name, c := range map[string]struct {
		way, wrong, want time.Duration
	}{
		"right":                       {10 * time.Millisecond, 0, 0},
		"an hour ahead":               {10 * time.Millisecond, -time.Hour, -time.Hour},
		"behind":                      {0, 3 * time.Second, 3 * time.Second},
		"within the way of an answer": {2 * time.Second, 900 * time.Millisecond, 0},
	} {
		var clock Clock
		clock.Note(now, now.Add(c.way), now.Add(c.way/2+c.wrong))
		if got := clock.At(now).Sub(now); got != c.want {
			t.Errorf("%s: corrected by %s, want %s", name, got, c.want)
		}
		clock.Note(now, now, time.Time{})
		if got := clock.At(now).Sub(now); got != c.want {
			t.Errorf("%s: after an answer without a time it is corrected by %s", name, got)
		}
	}
}
