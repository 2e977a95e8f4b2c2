package plans

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// claimRenewal is how often one who performs an act shows that it is alive and
// learns that it was overtaken.
const claimRenewal = time.Second

// quietRenewals is how many renewals another who does the same act misses before
// it is overtaken. It does no harm to one who is alive, but what that one has
// written is written again.
const quietRenewals = 5

// claim is our right to perform the pending act: the revision that we gave its
// manifest. It ends when another writes it.
type claim struct {
	a     *Applier
	store *store
	m     *manifest
	rev   uint64
	// renewed is when that was.
	renewed time.Time
	// done of the total of entries and records are acknowledged.
	done, total int
}

// renew fails with ErrConflict when the claim has ended. It writes, because a
// read may be answered by a replica that lags.
func (c *claim) renew(ctx context.Context) error {
	rev, err := c.store.put(ctx, pendingKey, c.m, c.rev)
	if err != nil {
		return err
	}
	c.rev, c.renewed = rev, c.a.now()
	c.a.progress(c.done, c.total)
	return nil
}

// advance counts what was acknowledged and renews the claim when it is time to.
func (c *claim) advance(ctx context.Context, n int) error {
	c.done += n
	if n > 0 {
		c.a.progress(c.done, c.total)
	}
	if c.a.now().Sub(c.renewed) < c.a.renewEvery() {
		return nil
	}
	return c.renew(ctx)
}

func (a *Applier) renewEvery() time.Duration {
	if a.renewal > 0 {
		return a.renewal
	}
	return claimRenewal
}

func (a *Applier) progress(done, total int) {
	if a.Progress != nil {
		a.Progress(done, total)
	}
}

// finishAct completes the act, at once or, unless now, after it has seen that
// nobody else is at it. When somebody is, it waits until that one has completed it.
func (a *Applier) finishAct(ctx context.Context, s *store, g ledger.Geometry, id string, now bool) error {
	for {
		if !now {
			done, err := a.await(ctx, s, id)
			if err != nil || done {
				return err
			}
		}
		err := a.complete(ctx, s, g, id)
		if !errors.Is(err, ErrConflict) || errors.Is(err, errStale) {
			return err
		}
		now = false
	}
}

// await waits while another gets on with the act. It returns true when the act is
// applied and false when nobody is at it; ErrConflict when others have replaced it.
func (a *Applier) await(ctx context.Context, s *store, id string) (bool, error) {
	quiet := quietRenewals * a.renewEvery()
	tick := time.NewTicker(quiet / 20)
	defer tick.Stop()
	var seen uint64
	var since time.Time
	for {
		pending, rev, at, err := s.manifest(ctx, pendingKey)
		if err != nil {
			return false, err
		}
		// Afterwards, because an act is first pending and then applied.
		applied, _, _, err := s.manifest(ctx, appliedKey)
		switch {
		case err != nil:
			return false, err
		case applied != nil && applied.Act.ID == id:
			return true, nil
		case pending == nil || pending.Act.ID != id:
			return false, ErrConflict
		case rev != seen:
			if seen == 0 && a.now().Sub(at) >= quiet {
				return false, nil
			}
			if seen != 0 {
				a.progress(0, 0)
			}
			seen, since = rev, a.now()
		case a.now().Sub(since) >= quiet:
			return false, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false, fmt.Errorf("wait for another who applies the same plans: %w", ctx.Err())
		}
	}
}

// StalledError says that applying was given up because nothing got on.
type StalledError struct {
	// Stall is how long nothing did.
	Stall time.Duration
	// Done of Total entries and records were acknowledged.
	Done, Total int
	Err         error
}

func (e *StalledError) Error() string {
	if e.Total == 0 {
		return fmt.Sprintf("nothing got on for %s: %v", e.Stall, e.Err)
	}
	return fmt.Sprintf("nothing got on for %s, with %d of %d entries and records written: %v", e.Stall, e.Done, e.Total, e.Err)
}

func (e *StalledError) Unwrap() error { return e.Err }

var errStalled = errors.New("no progress")

// watched returns an Applier whose progress keeps the returned context alive, and
// what must be called with the result in the end.
func (a *Applier) watched(ctx context.Context) (*Applier, context.Context, func(error) error) {
	if a.Stall <= 0 {
		return a, ctx, func(err error) error { return err }
	}
	w := *a
	stalled := &StalledError{Stall: a.Stall}
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(a.Stall, func() { cancel(errStalled) })
	w.Progress = func(done, total int) {
		timer.Reset(a.Stall)
		if total > 0 {
			stalled.Done, stalled.Total = done, total
		}
		a.progress(done, total)
	}
	return &w, ctx, func(err error) error {
		timer.Stop()
		defer cancel(nil)
		if err != nil && errors.Is(context.Cause(ctx), errStalled) {
			stalled.Err = err
			return stalled
		}
		return err
	}
}
