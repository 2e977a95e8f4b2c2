package ownership

import (
	"time"

	"golang.org/x/sys/unix"
)

// steady is a clock that nobody sets. CLOCK_BOOTTIME goes on while the machine
// is suspended, which Go's own monotonic clock does not: a machine that wakes
// must know how long it slept.
func steady() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("ownership: this system has no steady clock: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
