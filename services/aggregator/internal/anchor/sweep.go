package anchor

import (
	"context"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/leftovers"
)

const (
	// sweepAfter is how long it is waited for more shards that were taken over.
	sweepAfter = 200 * time.Millisecond
	// tidyEvery is how often it is looked for pieces of snapshots, and tidyTimeout
	// how long at once.
	tidyEvery   = 5 * time.Minute
	tidyTimeout = time.Minute
)

// Sweeper removes from the bucket what is of no use any more. Zero values of what is
// optional are the defaults.
type Sweeper struct {
	*Stores
	// Taken are shards that came to us: their former owners' snapshots go.
	Taken <-chan Taking
	// Ours says whether we are to look for what uploads that died and objects that
	// were deleted have left, whoever made them: one does it for all.
	Ours func() bool
	// Every is how often, and After how old it has to be; optional.
	Every, After time.Duration
}

// Run sweeps until ctx is done.
func (s Sweeper) Run(ctx context.Context) error {
	if s.Every == 0 {
		s.Every = tidyEvery
	}
	if s.After == 0 {
		s.After = leftovers.Age
	}
	tidy := time.NewTicker(s.Every)
	defer tidy.Stop()
	for {
		var taken []Taking
		var over <-chan time.Time
	gather:
		for {
			select {
			case t := <-s.Taken:
				if taken = append(taken, t); over == nil {
					over = time.After(sweepAfter)
				}
			case <-over:
				break gather
			case <-tidy.C:
				if s.Ours() {
					s.tidy(ctx)
				}
			case <-ctx.Done():
				return nil
			}
		}
		if err := s.Sweep(ctx, taken); err != nil && ctx.Err() == nil {
			s.Log.Warn().Err(err).Msg("old snapshots could not be removed: the next take-over tries again")
		}
	}
}

// tidy removes what nobody can find any more.
func (s Sweeper) tidy(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, tidyTimeout)
	defer cancel()
	swept, err := leftovers.Sweep(ctx, s.JS, ledger.SnapshotsBucket, s.After)
	if swept != (leftovers.Swept{}) {
		s.Log.Info().Int("uploads", swept.Uploads).Int("deleted", swept.Names).Msg("removed what was left behind in the bucket of snapshots")
	}
	if err != nil && ctx.Err() == nil {
		s.Log.Warn().Err(err).Dur("again_in_ms", s.Every).Msg("what was left behind in the bucket of snapshots could not be removed")
	}
}
