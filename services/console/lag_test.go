package console

import (
	"testing"
	"time"
)

func TestLagIsHowLongAnEntryWaitsToBeCounted(t *testing.T) {
	t.Parallel()
	s := newState()
	at := time.Unix(1000, 0)
	for _, c := range []struct {
		after         time.Duration
		last, counted uint64
		want          time.Duration
	}{
		{0, 10, 10, 0},
		{100, 12, 10, 0}, // seen now
		{200, 15, 11, 100 * time.Second},
		{210, 20, 12, 0}, // 12 is counted; 20 is seen now
		{215, 25, 19, 5 * time.Second},
		{216, 25, 25, 0},
		{300, 26, 25, 0},
	} {
		if got := s.lag(3, c.last, c.counted, at.Add(c.after*time.Second)); got != c.want {
			t.Errorf("after %d s, last %d, counted %d: %s, want %s", c.after, c.last, c.counted, got, c.want)
		}
	}
}
