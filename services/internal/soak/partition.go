package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
)

// partition lets gateways share exact limits in network namespaces while others
// are really cut off: of three nodes of NATS the one that stands alone, an owner,
// a gateway.
func partition(ctx context.Context, o Options, out *report.Outcome) error {
	r := rand.New(rand.NewPCG(o.Seed, uint64(os.Getpid())))
	network, err := fleet.NewNamespaces(ctx, fmt.Sprintf("%03x", r.IntN(1<<12)), r.IntN(128))
	if err != nil {
		return err
	}
	rounds := 0
	err = share(ctx, o, out, exactOptions{
		fleet:  fleet.Options{Nodes: 3, Gateways: 3, Aggregators: 2, SpoolBeforeAnswer: true, NoHistory: o.Short, Net: network},
		rounds: o.Rounds, limit: 10_000, clients: 16, longest: time.Minute,
		faults: func(round int, r *rand.Rand, f *fleet.Fleet) []faults.Fault {
			rounds++
			kind := []string{fleet.NATS, fleet.Aggregator, fleet.Gateway}[round%3]
			var names []string
			for _, p := range f.Processes() {
				if p.Kind == kind {
					names = append(names, p.Name)
				}
			}
			return []faults.Fault{{After: 100 * time.Millisecond, Act: faults.Cut, Victims: []string{names[r.IntN(len(names))]}, For: 4*time.Second + faults.Span(r, 4*time.Second)}}
		},
	})
	if err == nil && rounds == 0 {
		err = errors.New("nobody was cut off")
	}
	return err
}
