package soak

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// Targets of a decision's way to another gateway, nothing else going on.
const decisionTarget = 5 * time.Millisecond

// latency measures blocks and their ends at another gateway than the one through
// which they came about.
func latency(ctx context.Context, o Options, out *report.Outcome) (err error) {
	// Every account has a plan of its own, which is raised to end its block.
	var doc []plans.Account
	var own []plans.Plan
	var accounts []traffic.Account
	limit := func(i int, amount int64) plans.Plan {
		return plans.Plan{ID: fmt.Sprintf("soak-latency-%d", i), Limits: []plans.Limit{{ID: "all", Meter: "calls", Window: "lifetime", Amount: amount}}}
	}
	for i := range o.Rounds {
		p := limit(i, probeLimit)
		a, c := people(fmt.Sprintf("latency-%d", i), 1, p.ID)
		own, doc, accounts = append(own, p), append(doc, a...), append(accounts, c...)
	}
	free, more := people("latency-free", 1, "")
	w, err := begin(ctx, o, out, fleet.Options{Gateways: 2, NoHistory: true}, 0, &plans.Document{
		Version: plans.FormatVersion, Plans: own, Accounts: append(doc, free...),
	}, append(accounts, more...))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	var blocks, unblocks []time.Duration
	for round := range o.Rounds {
		block, err := w.cross(ctx, round, 0, 1)
		if err != nil {
			return err
		}
		blocks = append(blocks, block)
		raised := limit(round, 1<<40)
		if err := w.apply(ctx, &plans.Document{Version: plans.FormatVersion, Plans: []plans.Plan{raised}}); err != nil {
			return err
		}
		applied := time.Now()
		for {
			a := w.traffic.Call(ctx, traffic.Shape{Account: round, Gateway: 1, Output: 1})
			if a.Outcome == traffic.Passed {
				break
			}
			if err := pause(ctx, time.Millisecond); err != nil {
				return fmt.Errorf("%s is still refused: %w", w.accounts[round].ID, err)
			}
		}
		unblocks = append(unblocks, time.Since(applied))
		out.Rounds = round + 1
	}
	out.Measure(report.Durations("limit crossed at one gateway, refused at another", decisionTarget, blocks))
	out.Measure(report.Durations("limit raised and stored, admitted again", decisionTarget, unblocks))
	return nil
}
