// Package ledgerclock estimates the ledger's time, by which periods end. The clock of
// this machine may be wrong.
package ledgerclock

import (
	"sync/atomic"
	"time"
)

// tolerated is how far clocks may differ before it is corrected: within it the way of the
// answer is as large as the difference.
const tolerated = 250 * time.Millisecond

// Clock corrects this machine's clock. The zero value corrects nothing. Safe for
// concurrent use.
type Clock struct{ offset atomic.Int64 }

// Note takes note of the time that a server wrote into its answer, to a question that was
// asked and answered at these times of this machine. A server that writes none is passed over.
func (c *Clock) Note(asked, answered, server time.Time) {
	if server.IsZero() {
		return
	}
	way := answered.Sub(asked)
	// Between is when the server wrote it.
	off := server.Sub(asked.Add(way / 2))
	if off.Abs() <= tolerated+way/2 {
		off = 0
	}
	c.offset.Store(int64(off))
}

// At is the ledger's time at a time of this machine.
func (c *Clock) At(now time.Time) time.Time { return now.Add(time.Duration(c.offset.Load())) }
