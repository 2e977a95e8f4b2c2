package soak

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
)

// Scenario is one way to try Tollkeeper.
type Scenario struct {
	Name, About string
	// Rounds of a long run, and of a short one.
	Rounds, Short int
	run           func(ctx context.Context, o Options, out *report.Outcome) error
}

// Scenarios are all there are, in the order in which they are best run.
func Scenarios() []Scenario {
	return []Scenario{
		{"simulation", "worlds in which everything between the state machines misbehaves, a hundred in a round: the laws hold in each", 200, 1, worlds},
		{"kills", "random kill -9 of any process and of everything at once, with spool-before-answer: nothing lost, nothing doubled", 10, 1, kills(true)},
		{"kills-unsafe", "the same without spool-before-answer: what killed gateways take with them is measured", 3, 1, kills(false)},
		{"exact", "three gateways with 64 clients each share limits of 10,000 calls or tokens, in peace and with kills and cut cables: never more is admitted", 100, 3, exact},
		{"failover", "two aggregators, the one that owns most is killed, frozen or cut off: the other decides within 2 s, and no decision is lost, doubled or reversed", 12, 1, failover},
		{"cluster", "three nodes of NATS with three replicas, one killed at a time: nothing lost, and nothing stands still for longer than the election and 2 s", 9, 1, cluster},
		{"latency", "a limit crossed through one gateway until another refuses, and raised until it admits again", 200, 20, latency},
		{"partition", "in network namespaces: an aggregator, a gateway and a node of NATS are cut off, one after the other, while gateways share exact limits", 6, 3, partition},
	}
}

func kills(safe bool) func(ctx context.Context, o Options, out *report.Outcome) error {
	return func(ctx context.Context, o Options, out *report.Outcome) error {
		k := killsOptions{
			fleet: fleet.Options{Gateways: 2, Aggregators: 2, Auditor: true, SpoolBeforeAnswer: safe, Links: true, UnknownMaxCalls: 1 << 30},
			kills: 10, rounds: o.Rounds, rate: o.rate(1500), workers: 48, pause: 1200 * time.Millisecond, last: 1200 * time.Millisecond, accounts: 24,
		}
		if o.Short {
			k.kills, k.rate, k.workers, k.pause, k.last = 6, o.rate(400), 16, 700*time.Millisecond, 700*time.Millisecond
		}
		return endure(ctx, o, out, k)
	}
}

func exact(ctx context.Context, o Options, out *report.Outcome) error {
	return share(ctx, o, out, exactOptions{
		fleet:  fleet.Options{Gateways: 3, Aggregators: 2, SpoolBeforeAnswer: true, Links: true, NoHistory: o.Short},
		rounds: o.Rounds, limit: 10_000, clients: 64, faults: trouble, longest: time.Minute,
	})
}

func failover(ctx context.Context, o Options, out *report.Outcome) error {
	return takeOver(ctx, o, out, fleet.Options{
		Aggregators: 2, Gateways: 2, SpoolBeforeAnswer: true, Links: true, UnknownMaxCalls: 1 << 30, NoHistory: o.Short,
	}, []faults.Act{faults.Kill, faults.Freeze, faults.Cut})
}

func cluster(ctx context.Context, o Options, out *report.Outcome) error {
	return loseNodes(ctx, o, out, fleet.Options{Nodes: 3, Aggregators: 2, Gateways: 2, SpoolBeforeAnswer: true, UnknownMaxCalls: 1 << 30, NoHistory: o.Short})
}

func (o Options) rate(otherwise float64) float64 {
	if o.Rate > 0 {
		return o.Rate
	}
	return otherwise
}

// Run runs a scenario. Its error says that the scenario itself could not be run
// to its end, which is as bad as a broken law; the outcome is never nil.
func (s Scenario) Run(ctx context.Context, o Options) (*report.Outcome, error) {
	out := &report.Outcome{Scenario: s.Name, Seed: o.Seed}
	if o.Rounds <= 0 {
		o.Rounds = s.Rounds
		if o.Short {
			o.Rounds = s.Short
		}
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
	if errors.Is(err, fleet.ErrNoNamespaces) {
		out.Skipped = err.Error()
		return out, nil
	}
	if err != nil {
		err = fmt.Errorf("%s (seed %d, logs in %s): %w", s.Name, o.Seed, o.Dir, err)
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = errors.Join(err, cause)
		}
		out.Breaks("%v", err)
	}
	return out, err
}
