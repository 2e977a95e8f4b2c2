package soak

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
)

// Scenario is one way to try Tollkeeper.
type Scenario struct {
	Name, About string
	// Rounds of a long run.
	Rounds int
	run    func(ctx context.Context, o Options, out *Outcome) error
}

// Scenarios are all there are, in the order in which they are best run.
func Scenarios() []Scenario {
	return []Scenario{
		{"kills", "random kill -9 of any process and of everything at once, with spool-before-answer: nothing lost, nothing doubled", 10, func(ctx context.Context, o Options, out *Outcome) error {
			return endure(ctx, o, out, killsOptions{
				fleet: fleet.Options{Gateways: 2, SpoolBeforeAnswer: true, Links: true, UnknownMaxCalls: 1 << 30},
				kills: 10, rounds: o.Rounds, rate: o.rate(1500), workers: 48, pause: 1200 * time.Millisecond, last: 1200 * time.Millisecond, accounts: 24,
			})
		}},
		{"kills-unsafe", "the same without spool-before-answer: what killed gateways take with them is measured", 3, func(ctx context.Context, o Options, out *Outcome) error {
			return endure(ctx, o, out, killsOptions{
				fleet: fleet.Options{Gateways: 2, Links: true, UnknownMaxCalls: 1 << 30},
				kills: 10, rounds: o.Rounds, rate: o.rate(1500), workers: 48, pause: 1200 * time.Millisecond, last: 1200 * time.Millisecond, accounts: 24,
			})
		}},
		{"exact", "three gateways with 64 clients each share limits of 10,000 calls or tokens, in peace and with kills and cut cables: never more is admitted", 20, func(ctx context.Context, o Options, out *Outcome) error {
			return share(ctx, o, out, exactOptions{
				fleet:  fleet.Options{Gateways: 3, SpoolBeforeAnswer: true, Links: true},
				rounds: o.Rounds, limit: 10_000, clients: 64, faults: trouble, longest: time.Minute,
			})
		}},
		{"failover", "two aggregators, the one that owns most is killed, frozen or cut off: the other decides within 2 s, and no decision is lost, doubled or reversed", 12, func(ctx context.Context, o Options, out *Outcome) error {
			return takeOver(ctx, o, out, fleet.Options{Aggregators: 2, Gateways: 2, SpoolBeforeAnswer: true, Links: true, UnknownMaxCalls: 1 << 30}, []Act{Kill, Freeze, Cut})
		}},
		{"cluster", "three nodes of NATS with three replicas, one killed at a time: nothing lost, and the ledger stands still no longer than the election and 2 s", 9, func(ctx context.Context, o Options, out *Outcome) error {
			return loseNodes(ctx, o, out, fleet.Options{Nodes: 3, Gateways: 2, SpoolBeforeAnswer: true, UnknownMaxCalls: 1 << 30})
		}},
	}
}

func (o Options) rate(otherwise float64) float64 {
	if o.Rate > 0 {
		return o.Rate
	}
	return otherwise
}

// Run runs a scenario. Its error says that the scenario itself could not be run
// to its end, which is as bad as a broken law; the outcome is never nil.
func (s Scenario) Run(ctx context.Context, o Options) (*Outcome, error) {
	out := &Outcome{Scenario: s.Name, Seed: o.Seed}
	if o.Rounds <= 0 {
		o.Rounds = s.Rounds
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	o.Dir = filepath.Join(o.Dir, s.Name)
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return out, fmt.Errorf("%s: %w", s.Name, err)
	}
	began := time.Now()
	err := s.run(ctx, o, out)
	out.Seconds = time.Since(began).Seconds()
	if err != nil {
		err = fmt.Errorf("%s (seed %d, logs in %s): %w", s.Name, o.Seed, o.Dir, err)
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = errors.Join(err, cause)
		}
		out.breaks("%v", err)
	}
	return out, err
}
