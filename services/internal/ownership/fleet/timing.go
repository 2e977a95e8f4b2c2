package fleet

import (
	"errors"
	"fmt"
	"time"
)

// Instant is a point of a member's own steady clock. Two members' instants
// cannot be compared; only how fast they pass is assumed to be about the same
// (Timing.Safety).
type Instant = time.Duration

// Timing is how a fleet tells a dead member from a slow one. All members of a
// fleet must have the same TTL; zero fields take their defaults.
type Timing struct {
	// TTL is how long a session lives after its last renewal: whoever has not
	// seen it renewed for that long may end it. Default 1.2 s, with which a
	// killed member's shards are owned again after 1 to 1.5 s.
	TTL time.Duration
	// Renew is how often a session is renewed. Default TTL/5; at most TTL/3.
	Renew time.Duration
	// Safety is how long before its TTL a member stops to act: what two clocks
	// may differ by over one TTL. Default TTL/6, clocks of which one runs 16 %
	// faster; at most TTL/2.
	Safety time.Duration
	// Poll is how often the whole bucket is read, in case the feed of changes
	// lost something. Default 500 ms.
	Poll time.Duration
	// Settle is how long a new member must have been there before others hand
	// shards over to it; it may take free ones at once. It doubles with each
	// time that the member was lost lately, up to five minutes. Default 3 s.
	Settle time.Duration
	// Dwell is how long a shard stays where it is before it is moved for the
	// sake of balance. Default 10 s.
	Dwell time.Duration
	// Drain is how long a hand-over may take before the old owner's context is
	// cancelled. Default 5 s.
	Drain time.Duration
}

const (
	defaultTTL  = 1200 * time.Millisecond
	maxSettle   = 5 * time.Minute
	minCooldown = time.Second
	maxCooldown = time.Minute
	// maxMoves are the shards that one member hands over at the same time for
	// the sake of balance.
	maxMoves = 8
	// maxSessions bounds the sessions that a member looks at, dead ones included.
	maxSessions = 1000
)

// WithDefaults fills in what is zero.
func (t Timing) WithDefaults() Timing {
	set := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	set(&t.TTL, defaultTTL)
	set(&t.Renew, t.TTL/5)
	set(&t.Safety, t.TTL/6)
	set(&t.Poll, 500*time.Millisecond)
	set(&t.Settle, 3*time.Second)
	set(&t.Dwell, 10*time.Second)
	set(&t.Drain, 5*time.Second)
	return t
}

// Check says what is wrong with a complete timing.
func (t Timing) Check() error {
	switch {
	case t.TTL < 100*time.Millisecond || t.TTL > time.Minute:
		return fmt.Errorf("a session's TTL is %v: give 100 ms to 1 min", t.TTL)
	case t.Renew <= 0 || t.Renew > t.TTL/3:
		return fmt.Errorf("a session of %v is renewed every %v: give at most a third", t.TTL, t.Renew)
	case t.Safety <= 0 || t.Safety > t.TTL/2:
		return fmt.Errorf("the safety of a session of %v is %v: give at most half", t.TTL, t.Safety)
	case t.Poll <= 0 || t.Settle < 0 || t.Dwell < 0 || t.Drain <= 0:
		return errors.New("times to poll, settle, dwell and drain must not be negative")
	}
	return nil
}

// belief is how long after the sending of its newest renewal a member may act.
func (t Timing) belief() time.Duration { return t.TTL - t.Safety }

// retry is the pause after something failed.
func (t Timing) retry() time.Duration { return t.Renew / 3 }

// Request bounds one conditional write.
func (t Timing) Request() time.Duration { return 2 * t.Renew }

// garbage is when the server removes a session that nobody renews. It is far
// above the TTL because it runs on the servers' wall clocks, whose steps must
// not end a session, and it is whole seconds because the server cuts the rest.
func (t Timing) garbage() time.Duration { return max(time.Minute, (20 * t.TTL).Truncate(time.Second)) }
