//go:build !linux

package ownership

import "time"

var origin = time.Now()

// steady is a clock that nobody sets. On some systems it stands still while the
// machine is suspended; there the checkpoint's fence alone guards a suspended owner.
func steady() time.Duration { return time.Since(origin) }
