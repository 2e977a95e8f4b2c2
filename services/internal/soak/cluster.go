package soak

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/watch"
)

// stopBeyondElection is how much longer than the election the ledger may stand
// still when a node of NATS is lost.
const stopBeyondElection = 2 * time.Second

// loseNodes kills one node of a cluster after the other under load, each when the
// one before has caught up again, and compares the points.
func loseNodes(ctx context.Context, o Options, out *report.Outcome, f fleet.Options) (err error) {
	doc, accounts := people("cluster", 12, "")
	w, err := begin(ctx, o, out, f, o.Rounds+1, &plans.Document{Version: plans.FormatVersion, Accounts: doc}, accounts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	life, stop := context.WithCancel(ctx)
	var beside sync.WaitGroup
	beside.Go(func() { w.supervise(life) })
	defer func() { stop(); beside.Wait() }()

	loading, over := context.WithCancel(ctx)
	var load sync.WaitGroup
	load.Go(func() { w.drive(loading, 16, o.rate(300)) })
	defer func() { over(); load.Wait() }()

	seen, watched, err := watch.Start(life, w.fleet.NATSOptions(), ledger.ShardOf(w.accounts[0].ID, w.shards))
	if err != nil {
		return err
	}
	defer func() { stop(); <-watched }()

	var elections, stops, counting, decisions, beyond []time.Duration
	for round := range o.Rounds {
		if err := w.current(ctx, f.Nodes); err != nil {
			return err
		}
		// In the first round the node that leads the ledger, then the others in turn.
		leader, err := w.leader(ctx, ledger.Stream)
		if err != nil {
			return err
		}
		victim := fmt.Sprintf("%s-%d", fleet.NATS, 1+(leaderNumber(leader)-1+round)%f.Nodes)
		w.count(faults.Fault{Act: faults.Kill, Victims: []string{victim}})
		killed := time.Now()
		if err := w.fleet.Process(victim).Kill(); err != nil {
			return err
		}
		led := victim == fmt.Sprintf("%s-%d", fleet.NATS, leaderNumber(leader))
		election, err := w.elected(ctx, killed, "n"+victim[len(fleet.NATS)+1:])
		if err != nil {
			return err
		}
		if err := seen.Counted(ctx, killed.Add(election+500*time.Millisecond)); err != nil {
			return err
		}
		if err := w.readLedger(ctx); err != nil {
			return err
		}
		// The longest silence that began or ended after the kill.
		gap := w.ledger.Silence(killed.Add(-100 * time.Millisecond))
		stops = append(stops, gap)
		uncounted := seen.Silence(killed)
		counting = append(counting, uncounted)
		if led {
			elections = append(elections, election)
			beyond = append(beyond, max(gap-election, uncounted-election, 0))
		}
		o.Say("%s: %s killed (led the ledger: %v): a leader after %d ms, the ledger stood still for %d ms, the counters for %d ms",
			out.Scenario, victim, led, election.Milliseconds(), gap.Milliseconds(), uncounted.Milliseconds())
		decided, err := w.crossNext(ctx)
		if err != nil {
			return fmt.Errorf("%s is killed: %w", victim, err)
		}
		decisions = append(decisions, decided)
		if err := w.fleet.Process(victim).Start(); err != nil {
			return err
		}
		out.Rounds = round + 1
	}
	if err := w.current(ctx, f.Nodes); err != nil {
		return err
	}
	over()
	load.Wait()
	o.Say("%s: every replica has caught up; comparing the points", out.Scenario)
	check, err := w.settle(ctx)
	if err != nil {
		return err
	}
	out.Check = &check
	for _, b := range check.Broken(!w.safe) {
		out.Breaks("%s", b)
	}
	out.NoAnswers = w.traffic.Errors()
	out.Measure(report.Durations("election of the ledger's leader", 0, elections))
	out.Measure(report.Durations("ledger stood still, a node killed", 0, stops))
	out.Measure(report.Durations("counters stood still, a node killed", 0, counting))
	out.Measure(report.Durations("a limit crossed with a node missing: refused elsewhere", 0, decisions))
	out.Measure(report.Durations("either stood still beyond the election", stopBeyondElection, beyond))
	return nil
}

func leaderNumber(name string) int {
	n := 0
	_, _ = fmt.Sscanf(name, "n%d", &n) // what does not look so is nobody
	return max(n, 1)
}

// leader returns who leads a stream.
func (w *world) leader(ctx context.Context, stream string) (string, error) {
	for {
		name, _ := w.replicas(ctx, stream)
		if name != "" {
			return name, nil
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return "", fmt.Errorf("nobody leads %s: %w", stream, err)
		}
	}
}

// replicas returns a stream's leader, empty when it can't be told now, and how
// many of its replicas are current.
func (w *world) replicas(ctx context.Context, stream string) (leader string, current int) {
	ask, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
	defer cancel()
	s, err := w.js.Stream(ask, stream)
	if err != nil {
		return "", 0
	}
	c := s.CachedInfo().Cluster
	if c == nil || c.Leader == "" {
		return "", 0
	}
	current = 1
	for _, r := range c.Replicas {
		if r.Current && !r.Offline {
			current++
		}
	}
	return c.Leader, current
}

// elected waits for a leader of the ledger that is not the lost node, and returns
// how long after the kill it was heard of.
func (w *world) elected(ctx context.Context, killed time.Time, lost string) (time.Duration, error) {
	for {
		if leader, _ := w.replicas(ctx, ledger.Stream); leader != "" && leader != lost {
			return time.Since(killed), nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return 0, fmt.Errorf("nobody was elected: %w", err)
		}
	}
}

// current waits until every replica of every stream has caught up.
func (w *world) current(ctx context.Context, nodes int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("the replicas did not catch up"))
	defer cancel()
	for {
		behind, err := w.behind(ctx, nodes)
		if err == nil && behind == "" {
			return nil
		}
		if pause(ctx, 100*time.Millisecond) != nil {
			return errors.Join(context.Cause(ctx), err, fmt.Errorf("stream %q is behind", behind))
		}
	}
}

func (w *world) behind(ctx context.Context, nodes int) (string, error) {
	list := w.js.ListStreams(ctx)
	for info := range list.Info() {
		if !caughtUp(info, nodes) {
			return info.Config.Name, nil
		}
	}
	return "", list.Err()
}

func caughtUp(info *jetstream.StreamInfo, nodes int) bool {
	if info.Config.Replicas != nodes {
		return false
	}
	if info.Cluster == nil || info.Cluster.Leader == "" {
		return false
	}
	current := 1
	for _, r := range info.Cluster.Replicas {
		if r.Current && !r.Offline {
			current++
		}
	}
	return current == nodes
}
