package auditor

import (
	"testing"
	"time"
)

// What counts as heard is the time up to which a stream was read to its end.
func TestTheTimeForWhichAStreamWasHeard(t *testing.T) {
	t.Parallel()
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(seconds int) time.Time { return begin.Add(time.Duration(seconds) * time.Second) }
	var e ear
	step := func(what string, position uint64, want time.Duration) {
		t.Helper()
		if got := e.reach(position); got != want {
			t.Errorf("%s: %v were heard, want %v", what, got, want)
		}
	}
	step("nothing was asked", 0, 0)
	e.ends(at(100), 10)
	step("much is to be read after a start", 4, 0)
	e.ends(at(110), 20)
	step("the first end is what was to be reached", 10, 0)
	e.ends(at(111), 20)
	step("still behind", 15, 0)
	step("read: up to the second time it was asked, within the bound", 20, maxHeard)
	step("nothing was asked since", 20, 0)
	e.ends(at(112), 20)
	step("nothing is new", 20, time.Second)
	e.ends(at(172), 25)
	step("the stream was away for a minute", 25, maxHeard)
	e.ends(at(173), 30)
	e.ends(at(174), 3)
	step("the stream was made anew", 3, 2*time.Second)
	e.ends(at(170), 3)
	step("the clock was set back", 3, 0)
	e.ends(at(171), 3)
	step("and goes on", 3, time.Second)
}
