package soak

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/points"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// takeoverWithin is how soon after an owner's death another must decide.
const takeoverWithin = 2 * time.Second

// idsByShard returns, for each shard, n account ids that belong to it.
func idsByShard(prefix string, shards uint32, n int) [][]string {
	out := make([][]string, shards)
	for i, left := 0, int(shards)*n; left > 0; i++ {
		id := fmt.Sprintf("%s-%d", prefix, i)
		if s := ledger.ShardOf(id, shards); len(out[s]) < n {
			out[s] = append(out[s], id)
			left--
		}
	}
	return out
}

// takeOver kills, stops and cuts off owners of shards, one after the other, and
// crosses a limit in each shard of the victim at that moment.
func takeOver(ctx context.Context, o Options, out *report.Outcome, f fleet.Options, acts []faults.Act) (err error) {
	doc, accounts := people("failover", 16, "")
	ids := idsByShard("crossing", ledger.DefaultLocalShards, o.Rounds)
	first := len(accounts) // of the crossings, shard by shard
	limit := plans.Plan{ID: "soak-crossing", Limits: []plans.Limit{{ID: "all", Meter: "calls", Window: "lifetime", Amount: probeLimit}}}
	for _, list := range ids {
		for _, id := range list {
			doc = append(doc, plans.Account{ID: id, Plan: limit.ID, Keys: []plans.Key{{ID: "k-" + id, SHA256: plans.HashKey("tk_soak_" + id)}}})
			accounts = append(accounts, traffic.Account{ID: id, Key: "tk_soak_" + id})
		}
	}
	w, err := begin(ctx, o, out, f, 0, &plans.Document{Version: plans.FormatVersion, Plans: []plans.Plan{limit}, Accounts: doc}, accounts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	w.load = first
	if w.shards != ledger.DefaultLocalShards {
		return fmt.Errorf("the ledger has %d shards, %d are expected", w.shards, ledger.DefaultLocalShards)
	}
	life, stop := context.WithCancel(ctx)
	var beside sync.WaitGroup
	defer func() { stop(); beside.Wait() }()
	beside.Go(func() { w.supervise(life) })
	beside.Go(func() { w.drive(life, 12, o.rate(300)) })

	took := map[faults.Act][]time.Duration{}
	var calm []time.Duration
	for round := range o.Rounds {
		victim, shards, err := w.someOwner(ctx, f.Aggregators)
		if err != nil {
			return err
		}
		fault := faults.Fault{Act: acts[round%len(acts)], Victims: []string{victim}, For: 5 * time.Second}
		w.count(fault)
		var lasting sync.WaitGroup
		lasting.Go(func() { w.strike(ctx, fault) })
		struck := time.Now()
		worst, others, err := w.crossShards(ctx, shards, func(shard uint32) int { return first + int(shard)*o.Rounds + round }, struck)
		lasting.Wait()
		if err != nil {
			return fmt.Errorf("round %d, %s %s: %w", round+1, fault.Act, victim, err)
		}
		took[fault.Act] = append(took[fault.Act], worst)
		calm = append(calm, others...)
		o.Say("%s: %s %s, which owned %d of %d shards: all of them decided after %d ms", out.Scenario, fault.Act, victim, len(shards), w.shards, worst.Milliseconds())
		out.Rounds = round + 1
	}
	stop()
	beside.Wait()
	check, err := w.settle(ctx)
	if err != nil {
		return err
	}
	out.Check = &check
	for _, b := range check.Broken(!w.safe) {
		out.Breaks("%s", b)
	}
	out.NoAnswers = w.traffic.Errors()
	for _, act := range []faults.Act{faults.Kill, faults.Freeze, faults.Cut, faults.Terminate} {
		if len(took[act]) > 0 {
			out.Measure(report.Durations(fmt.Sprintf("%s of an owner: all its shards decide again", act), takeoverWithin, took[act]))
		}
	}
	out.Measure(report.Durations("meanwhile in the others' shards: limit crossed to refused", 0, calm))
	if err := w.fleet.StateHashes(ctx); err != nil {
		out.Breaks("the state is not that of the ledger: %v", err)
	}
	decisions, wrong, err := points.Decisions(ctx, w.js)
	for _, text := range wrong {
		out.Breaks("%s", text)
	}
	o.Say("%s: %d decisions were published", out.Scenario, decisions)
	return err
}

// someOwner returns who owns the most shards, once every shard has an owner and
// all members own some, or after a while if one owns none.
func (w *world) someOwner(ctx context.Context, members int) (string, []uint32, error) {
	began := time.Now()
	for {
		owned, free := points.Claims(ctx, w.js, w.shards, w.names(fleet.Aggregator))
		if free == 0 && (len(owned) == members || time.Since(began) > 20*time.Second) {
			var most string
			for _, name := range w.names(fleet.Aggregator) {
				if len(owned[name]) > len(owned[most]) {
					most = name
				}
			}
			return most, owned[most], nil
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return "", nil, fmt.Errorf("%d shards have no owner: %w", free, err)
		}
	}
}

func (w *world) names(kind string) []string {
	var out []string
	for _, p := range w.fleet.Processes() {
		if p.Kind == kind {
			out = append(out, p.Name)
		}
	}
	return out
}

// crossShards crosses a limit in every shard at once. It returns how long after
// the fault the last of the victim's shards had decided, and how long it took in
// the others.
func (w *world) crossShards(ctx context.Context, victims []uint32, account func(shard uint32) int, struck time.Time) (worst time.Duration, others []time.Duration, err error) {
	type crossed struct {
		shard uint32
		took  time.Duration
		at    time.Time
		err   error
	}
	results := make(chan crossed, w.shards)
	gateways := len(w.fleet.GatewayURLs())
	for shard := range w.shards {
		go func() {
			took, err := w.cross(ctx, account(shard), 0, (1+int(shard))%gateways)
			results <- crossed{shard, took, time.Now(), err}
		}()
	}
	var errs []error
	for range w.shards {
		r := <-results
		switch {
		case r.err != nil:
			errs = append(errs, fmt.Errorf("shard %d: %w", r.shard, r.err))
		case slices.Contains(victims, r.shard):
			worst = max(worst, r.at.Sub(struck))
		default:
			others = append(others, r.took)
		}
	}
	return worst, others, errors.Join(errs...)
}
