package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/points"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// people are accounts under one plan, which may be none.
func people(prefix string, n int, plan string) ([]plans.Account, []traffic.Account) {
	var doc []plans.Account
	var out []traffic.Account
	for i := range n {
		id := fmt.Sprintf("%s-%d", prefix, i)
		key := "tk_soak_" + id
		doc = append(doc, plans.Account{ID: id, Plan: plan, Keys: []plans.Key{{ID: "k-" + id, SHA256: plans.HashKey(key)}}})
		out = append(out, traffic.Account{ID: id, Key: key})
	}
	return doc, out
}

// killsOptions say how kills are dealt out.
type killsOptions struct {
	fleet    fleet.Options
	kills    int // per round
	rounds   int
	rate     float64
	workers  int
	pause    time.Duration
	last     time.Duration
	victims  func(*fleet.Fleet) []string // nil: every process
	figures  func(*world)                // at the end; may be nil
	accounts int
}

// endure runs rounds of load and faults, and compares the points after each.
func endure(ctx context.Context, o Options, out *report.Outcome, k killsOptions) (err error) {
	// Under full load an account runs into its limit after some seconds of a
	// minute, so that there are decisions and refusals to be lost.
	quota := plans.Plan{ID: "soak", Limits: []plans.Limit{{ID: "minute", Meter: "calls", Window: "minute", Amount: max(int64(k.rate*8)/int64(k.accounts), 1)}}}
	doc, accounts := people("kills", k.accounts, "soak")
	free, more := people("kills-free", 1, "")
	w, err := begin(ctx, o, out, k.fleet, k.rounds+1, &plans.Document{Version: plans.FormatVersion, Plans: []plans.Plan{quota}, Accounts: append(doc, free...)}, append(accounts, more...))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	life, stop := context.WithCancel(ctx)
	var beside sync.WaitGroup
	beside.Go(func() { w.supervise(life) })
	defer func() { stop(); beside.Wait() }()

	var all, cables []string
	for _, p := range w.fleet.Processes() {
		all = append(all, p.Name)
		if w.fleet.CanCut(p.Name) {
			cables = append(cables, p.Name)
		}
	}
	if k.victims != nil {
		all = k.victims(w.fleet)
	}
	var blocks []time.Duration
	for round := range k.rounds {
		list := faults.Schedule(w.r, faults.Plan{Kills: k.kills, Victims: all, Cables: cables, Pause: k.pause, Last: k.last})
		raging, over := context.WithCancel(ctx)
		var load sync.WaitGroup
		load.Go(func() { w.drive(raging, k.workers, k.rate) })
		if err := pause(ctx, 300*time.Millisecond); err != nil {
			over()
			load.Wait()
			return err
		}
		w.rage(ctx, list)
		_ = pause(ctx, 300*time.Millisecond) // under load after the last fault; the end of ctx is seen below
		over()
		load.Wait()
		decided, err := w.crossNext(ctx)
		if err != nil {
			return fmt.Errorf("round %d: after the faults: %w", round+1, err)
		}
		blocks = append(blocks, decided)
		check, err := w.settle(ctx)
		if err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
		out.Rounds, out.Check = round+1, &check
		o.Say("%s: round %d of %d, %d kills: %d calls, %d passed, %d refused, %d without an answer; lost %d, doubled %d",
			out.Scenario, round+1, k.rounds, out.Kills, check.Sent, check.Passed, check.Refused, check.Nothing+check.Other+check.Unknown, check.Lost+check.LostRefusals, check.Doubled)
		if broken := check.Broken(!w.safe); len(broken) > 0 {
			for _, b := range broken {
				out.Breaks("round %d: %s", round+1, b)
			}
			return nil // what comes after would only repeat it
		}
	}
	if err := w.audited(ctx); err != nil {
		return err
	}
	if err := w.fleet.StateHashes(ctx); err != nil {
		out.Breaks("the state is not that of the ledger: %v", err)
	}
	if !w.safe {
		w.loss()
	}
	out.Measure(report.Durations("a limit crossed right after the faults: refused at another gateway", 0, blocks))
	out.NoAnswers = w.traffic.Errors()
	if k.figures != nil {
		k.figures(w)
	}
	return nil
}

// drive makes calls of all accounts through all gateways until ctx is done.
func (w *world) drive(ctx context.Context, workers int, rate float64) {
	gateways := len(w.fleet.GatewayURLs())
	dice := make([]*rand.Rand, workers)
	seed := w.r.Uint64()
	for i := range dice {
		dice[i] = rand.New(rand.NewPCG(seed, uint64(i)))
	}
	w.traffic.Drive(ctx, workers, rate, func(worker, _ int) (traffic.Shape, bool) {
		r := dice[worker]
		return traffic.Shape{Account: r.IntN(w.load), Gateway: r.IntN(gateways), Output: 1 + r.IntN(50)}, true
	})
}

// audited asks Tollkeeper's own audit: it must have found nothing that is wrong, or,
// where gateways may lose calls, at least have come to the end.
func (w *world) audited(ctx context.Context) error {
	if w.fleet.Process(fleet.Auditor) == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("the audit did not come to an end in time"))
	defer cancel()
	a, err := points.ReadAudit(ctx, w.js, w.ledger.LastOurs)
	if err != nil {
		return err
	}
	w.out.Audit = &a
	if a.Open > 0 && w.safe {
		w.out.Breaks("the audit has %d open findings: %s", a.Open, a.Findings)
	}
	return nil
}

// loss holds the lost calls against the kills of their gateways.
func (w *world) loss() {
	w.mu.Lock()
	defer w.mu.Unlock()
	ends := make([][]int64, len(w.fleet.GatewayURLs()))
	for g := range ends {
		ends[g] = w.ends[gatewayName(g)]
	}
	l, wrong := points.Losses(w.traffic.Seen(), w.out.Check.LostCalls, ends)
	w.out.Loss = &l
	for _, text := range wrong {
		w.out.Breaks("%s", text)
	}
}

func gatewayName(i int) string { return fmt.Sprintf("%s-%d", fleet.Gateway, i+1) }
