package table

import "github.com/tollkeeper/tollkeeper/pkg/usage"

// streamClock estimates how far the ledger's clock is ahead of our own, from
// beacons. A beacon's stream time is always late: by the pause between two ticks
// of an idle shard at worst, by almost nothing just after an entry. So only
// beacons with a new stream time count, the least late of half a minute is taken,
// and a difference that lateness alone explains is taken for none: clocks are
// kept by NTP, and then a block ends at the very turn of its window.
type streamClock struct {
	from      usage.Micros // when the current half began
	now, last sample       // best of the current half and of the one before
}

type sample struct {
	lead int64
	ok   bool
}

const (
	clockHalf = usage.Micros(30_000_000)
	// clockSlack is how late a stream time may be without our clocks differing:
	// a tick a second, a beacon every quarter, and the way.
	clockSlack = int64(1_500_000)
)

// observe takes a new stream time heard at the own time now, and when it was sent by
// its owner's clock. A stream time that is late by the owner's clock as well tells of
// an owner that lags, and not of clocks: then it is the owner's clock that ours is
// compared with, so that no block lasts longer because counting is behind.
func (c *streamClock) observe(stream, sent, now usage.Micros) {
	if now-c.from >= clockHalf || now < c.from {
		c.last, c.now, c.from = c.now, sample{}, now
	}
	if lead := int64(max(stream, min(sent, now)) - now); !c.now.ok || lead > c.now.lead {
		c.now = sample{lead, true}
	}
}

// offset is what must be added to the own clock to get the ledger's, microseconds.
func (c *streamClock) offset() int64 {
	best := c.now
	if c.last.ok && (!best.ok || c.last.lead > best.lead) {
		best = c.last
	}
	switch {
	case !best.ok:
		return 0
	case best.lead > 0:
		return best.lead
	case best.lead+clockSlack < 0:
		return best.lead + clockSlack
	}
	return 0
}
