package embedclickhouse

import (
	"testing"
	"time"
)

func TestRestartsSlowDownToABoundAndAHealthyRunForgets(t *testing.T) {
	t.Parallel()
	failures, before := 0, time.Duration(0)
	for range 50 {
		delay := restartDelay(failures)
		if delay < before || delay > backoffMost {
			t.Fatalf("after %d failures the delay is %s, before it was %s", failures, delay, before)
		}
		before = delay
		failures = failuresAfter(failures, time.Millisecond)
	}
	if before != backoffMost {
		t.Errorf("the delay ends at %s, want %s", before, backoffMost)
	}
	if got := restartDelay(failuresAfter(failures, healthyAfter)); got != backoffFirst {
		t.Errorf("after a healthy run the delay is %s, want %s", got, backoffFirst)
	}
}
