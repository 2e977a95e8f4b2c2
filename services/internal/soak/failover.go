package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
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
func takeOver(ctx context.Context, o Options, out *Outcome, f fleet.Options, acts []Act) (err error) {
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

	took := map[Act][]time.Duration{}
	var calm []time.Duration
	for round := range o.Rounds {
		victim, shards, err := w.someOwner(ctx, f.Aggregators)
		if err != nil {
			return err
		}
		fault := Fault{Act: acts[round%len(acts)], Victims: []string{victim}, For: 5 * time.Second}
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
		out.breaks("%s", b)
	}
	out.NoAnswers = w.traffic.Errors()
	for _, act := range []Act{Kill, Freeze, Cut, Terminate} {
		if len(took[act]) > 0 {
			out.measure(figure(fmt.Sprintf("%s of an owner: all its shards decide again", act), takeoverWithin, took[act]))
		}
	}
	out.measure(figure("meanwhile in the others' shards: limit crossed to refused", 0, calm))
	return w.compareDecisions(ctx)
}

// someOwner returns who owns the most shards, once every shard has an owner and
// all members own some, or after a while if one owns none.
func (w *world) someOwner(ctx context.Context, members int) (string, []uint32, error) {
	began := time.Now()
	for {
		owned, free := w.claims(ctx)
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

// claims returns which member says to own which shards, and how many nobody does.
func (w *world) claims(ctx context.Context) (owned map[string][]uint32, free int) {
	owned = map[string][]uint32{}
	kv, err := w.js.KeyValue(ctx, ownership.DefaultBucket)
	if err != nil {
		return owned, int(w.shards)
	}
	for shard := range w.shards {
		var claim struct {
			Member   string `json:"member"`
			Released bool   `json:"released"`
		}
		e, err := kv.Get(ctx, fmt.Sprintf("shard.%d", shard))
		if err != nil || json.Unmarshal(e.Value(), &claim) != nil || claim.Released || !slices.Contains(w.names(fleet.Aggregator), claim.Member) {
			free++
			continue
		}
		owned[claim.Member] = append(owned[claim.Member], shard)
	}
	return owned, free
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

// compareDecisions looks at every decision that was ever published: none twice,
// none behind one that was published before it, and no crossing without its own.
func (w *world) compareDecisions(ctx context.Context) error {
	stream, err := w.js.Stream(ctx, "KV_"+ledger.DecisionsBucket)
	if err != nil {
		return fmt.Errorf("decisions: %w", err)
	}
	state := stream.CachedInfo().State
	ids := map[string]uint64{}
	newest := map[string]uint64{}
	for seq := state.FirstSeq; seq <= state.LastSeq; seq++ {
		m, err := stream.GetMsg(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("decision %d: %w", seq, err)
		}
		if len(m.Data) == 0 || isCheckpoint(m.Subject) {
			continue
		}
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			return fmt.Errorf("decision %d: %w", seq, err)
		}
		if before, twice := ids[d.ID]; twice {
			w.out.breaks("decision %s was published as %d and as %d", d.ID, before, seq)
		}
		ids[d.ID] = seq
		if d.Revision < newest[m.Subject] {
			w.out.breaks("%s: revision %d was published after %d", m.Subject, d.Revision, newest[m.Subject])
		}
		newest[m.Subject] = d.Revision
	}
	w.o.Say("%s: %d decisions, each once and in order", w.out.Scenario, len(ids))
	return nil
}

func isCheckpoint(subject string) bool {
	const prefix = "$KV." + ledger.DecisionsBucket + ".checkpoint."
	return len(subject) > len(prefix) && subject[:len(prefix)] == prefix
}
