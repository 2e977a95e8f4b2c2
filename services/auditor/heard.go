package auditor

import (
	"context"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// ends is where the streams ended at a time, or a little later: it is from before they
// were asked.
type ends struct {
	at             time.Time
	ledger, claims uint64
}

// watch asks where the streams end. While they do not answer nothing is heard.
func (a *auditor) watch(ctx context.Context) error {
	tick := time.NewTicker(min(time.Second, a.o.Every))
	defer tick.Stop()
	for {
		if e, err := a.askEnds(ctx); err == nil {
			select {
			case a.ends <- e:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *auditor) askEnds(ctx context.Context) (e ends, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	e.at = time.Now()
	if e.ledger, err = a.endOf(ctx, ledger.Stream); err != nil {
		return e, err
	}
	e.claims, err = a.endOf(ctx, ledger.AuditStream)
	return e, err
}

// endOf returns the last sequence of a stream that there is to be read.
func (a *auditor) endOf(ctx context.Context, name string) (uint64, error) {
	stream, err := a.js.Stream(ctx, name)
	if err != nil {
		return 0, err
	}
	s := stream.CachedInfo().State
	if s.Msgs == 0 {
		return 0, nil // the last ones have expired
	}
	return s.LastSeq, nil
}

// ear is up to when a stream was read to its end. Pure.
type ear struct {
	end  uint64    // to be reached
	at   time.Time // when it ended there; zero: it was not asked since
	upTo time.Time // all that it had by then was read; zero: not yet
}

// maxHeard bounds what reaching one end says to have been heard: between two that are
// further apart the stream was away, or the reader was.
const maxHeard = 5 * time.Second

// ends takes note of where the stream ended. One that is still to be reached stays:
// who is always a little behind would never reach one.
func (e *ear) ends(at time.Time, end uint64) {
	if e.at.IsZero() || end < e.end {
		e.at, e.end = at, end
	}
}

// reach returns for how much longer the stream was heard to its end, now that it is
// read up to position.
func (e *ear) reach(position uint64) (more time.Duration) {
	if e.at.IsZero() || position < e.end {
		return 0
	}
	if !e.upTo.IsZero() {
		more = max(min(e.at.Sub(e.upTo), maxHeard), 0)
	}
	e.upTo, e.at = e.at, time.Time{}
	return more
}
