package replay

import (
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// aheadAtMost is how far rows may be in the future of a ledger whose time is now.
const aheadAtMost = time.Minute

// CheckTimes refuses rows that keep their times, of which there is one at least, where
// limits would limit nothing without saying so. With a test clock the ledger's time is
// the trace's; else it is now.
func CheckTimes(rows []trace.Row, limits []plans.Limit, testClock bool, now time.Time) error {
	first, last := &rows[0], &rows[len(rows)-1]
	if usage.At(first.Time) < usage.OldestTimeMicros || usage.At(last.Time) > usage.NewestTimeMicros {
		return fmt.Errorf("rows are from %s to %s: times from 2000 to 2199 can be counted; leave out --keep-time, so that calls happen now", first.Time.Format(time.RFC3339), last.Time.Format(time.RFC3339))
	}
	if testClock {
		return nil
	}
	for _, l := range limits {
		if l.Window != string(usage.Lifetime) {
			return fmt.Errorf("--keep-time with a limit per %s: the Tollkeeper that runs counts by its own clock, which is now, so that rows from %s to %s would be limited by nothing; "+
				"use --isolated, which gives the replay a ledger whose clock is the trace's, or leave out --keep-time, so that calls happen now", l.Window, first.Time.Format(time.RFC3339), last.Time.Format(time.RFC3339))
		}
	}
	if last.Time.After(now.Add(aheadAtMost)) {
		return fmt.Errorf("--keep-time: %s:%d is of %s, which is in the future of the Tollkeeper that runs, where no call can be; use --isolated, which gives the replay a ledger whose clock is the trace's", last.File, last.Line, last.Time.Format(time.RFC3339))
	}
	return nil
}
