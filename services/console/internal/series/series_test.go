package series

import (
	"net/url"
	"testing"
	"time"
)

func TestStepsFitTheRange(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for span, want := range map[time.Duration]time.Duration{
		15 * time.Minute:     5 * time.Second,
		6 * time.Hour:        2 * time.Minute,
		7 * 24 * time.Hour:   time.Hour,
		365 * 24 * time.Hour: 24 * time.Hour,
	} {
		q, err := Query(url.Values{"from": {now.Add(-span).Format(time.RFC3339)}, "to": {now.Format(time.RFC3339)}}, now)
		if err != nil {
			t.Fatal(err)
		}
		if q.Step != want || q.From.Unix()%int64(want.Seconds()) != 0 || q.To.Before(now) || q.To.Sub(q.From)%q.Step != 0 {
			t.Errorf("%s: %s to %s in steps of %s, want %s", span, q.From, q.To, q.Step, want)
		}
	}
}
