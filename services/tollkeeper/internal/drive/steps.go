package drive

import (
	"context"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// Steps move a ledger's test clock through a trace: before a row is sent the clock
// stands at a time that is not before the row's, in the windows that the row is in. It
// moves while no call is in flight, so that a row meets the same time in every replay.
type Steps struct {
	// Advance takes the ledger's clock forward.
	Advance func(ctx context.Context, to usage.Micros) error
	// Settled waits until everything that was answered is in the ledger. It is called
	// where a window ends.
	Settled func(ctx context.Context) error
	// Windows of the limits.
	Windows []window.Kind

	at    usage.Micros
	begun bool
}

// mostInStep bounds how many rows go by while the clock stands still.
const mostInStep = 1000

// beforeEnd is how long before the end of a window the clock stops, so that leases,
// which a gateway leaves before their window ends, can be used up to then. Rows of
// that moment are counted in their window all the same.
const beforeEnd = usage.Micros(5)

// Skew is what a gateway allows for between its clock and the ledger's, where both
// are the same one.
const Skew = time.Duration(beforeEnd-2) * time.Microsecond

// take moves the clock for the rows from i on and returns up to which row. quiet waits
// until no call is in flight.
func (s *Steps) take(ctx context.Context, rows []trace.Row, i int, quiet func()) (upTo int, err error) {
	from := usage.At(rows[i].Time)
	end := s.end(from)
	upTo = i + 1
	for upTo < len(rows) && upTo-i < mostInStep && usage.At(rows[upTo].Time) < end {
		upTo++
	}
	to := min(usage.At(rows[upTo-1].Time), end-beforeEnd)
	if s.begun && to <= s.at {
		return upTo, nil
	}
	quiet()
	if s.begun && s.end(s.at) != end {
		// The old windows' calls come before the new windows begin.
		if err := s.Settled(ctx); err != nil {
			return 0, err
		}
	}
	s.at, s.begun = to, true
	return upTo, s.Advance(ctx, to)
}

// end is when the first of the windows that contain a time ends.
func (s *Steps) end(at usage.Micros) usage.Micros {
	end := usage.Micros(1<<63 - 1)
	for _, k := range s.Windows {
		if k != window.Lifetime {
			_, e := k.Bounds(at)
			end = min(end, e)
		}
	}
	return end
}
