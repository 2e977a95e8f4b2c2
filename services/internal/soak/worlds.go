package soak

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/services/internal/simulation"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
)

// worldsOfARound are simulated one after the other's seed.
const worldsOfARound = 100

// worlds runs simulated ones, each from a seed of its own.
func worlds(ctx context.Context, o Options, out *report.Outcome) error {
	var (
		mu    sync.Mutex
		total simulation.Report
	)
	for round := range o.Rounds {
		var group errgroup.Group
		group.SetLimit(runtime.GOMAXPROCS(0))
		for i := range worldsOfARound {
			group.Go(func() error {
				if ctx.Err() != nil {
					return nil
				}
				r, err := simulation.Run(simulation.Draw(o.Seed + uint64(round*worldsOfARound+i)))
				mu.Lock()
				defer mu.Unlock()
				total.Add(&r)
				if err != nil {
					out.Breaks("%v; again with: go test ./internal/simulation -simulation.seed=%d -simulation.worlds=1 -simulation.trace", err, r.Seed)
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		out.Rounds, out.Kills = round+1, total.Kills
		o.Say("%d worlds: %s", out.Rounds*worldsOfARound, total.String())
	}
	out.Notes = append(out.Notes, fmt.Sprintf("%d worlds: %s", out.Rounds*worldsOfARound, total.String()))
	return nil
}
