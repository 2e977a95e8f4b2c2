package soak

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// exactOptions say how gateways share exact limits.
type exactOptions struct {
	fleet   fleet.Options
	rounds  int
	limit   int64
	clients int // per gateway
	// faults of a round, counted from 0; nil: nothing happens in it.
	faults func(round int, r *rand.Rand, f *fleet.Fleet) []faults.Fault
	// longest a round may last.
	longest time.Duration
}

// The bound of a call's output that its request names, and what of the limit may
// be left when nothing is killed: a call whose bound is larger is refused.
const (
	maxTokens  = 10
	leftover   = 10
	deniedEnds = 5 // denials in a row end a client
)

// share lets every client of every gateway use up one account's limit, round after
// round with a fresh account, in turn one of calls and one of tokens.
func share(ctx context.Context, o Options, out *report.Outcome, x exactOptions) (err error) {
	doc, accounts := people("exact", x.rounds, "")
	for i := range doc {
		doc[i].Plan = "soak-" + kindOf(i)
	}
	limit := func(kind string, meter usage.Meter) plans.Plan {
		return plans.Plan{ID: "soak-" + kind, Limits: []plans.Limit{{ID: kind, Meter: string(meter), Window: "lifetime", Amount: x.limit, Tier: "exact"}}}
	}
	free, last := people("exact-free", 1, "")
	w, err := begin(ctx, o, out, x.fleet, 1, &plans.Document{
		Version: plans.FormatVersion, Plans: []plans.Plan{limit("calls", usage.Calls), limit("tokens", usage.OutputTokens)}, Accounts: append(doc, free...),
	}, append(accounts, last...))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	life, stop := context.WithCancel(ctx)
	var beside sync.WaitGroup
	beside.Go(func() { w.supervise(life) })
	defer func() { stop(); beside.Wait() }()
	for round := range x.rounds {
		if err := w.fleet.AwaitReady(ctx); err != nil {
			return err
		}
		q, err := w.shareRound(ctx, x, round)
		if err != nil {
			return err
		}
		out.Quotas = append(out.Quotas, q)
		out.Rounds = round + 1
		o.Say("%s: round %d of %d (%s, %d faults): limit %d, admitted %d, served %d, %d refused (%d early), %d unknown, %.1f s",
			out.Scenario, round+1, x.rounds, q.Kind, q.Faults, q.Limit, q.Admitted, q.Served, q.Refused, q.Early, q.Unknown, q.Seconds)
		if q.Admitted > q.Limit {
			out.Breaks("round %d (%s): %d admitted of %d", round+1, q.Kind, q.Admitted, q.Limit)
		}
		// The upstream knows also of calls that a killed gateway had sent on and
		// answered to nobody.
		if q.Served > q.Limit {
			out.Breaks("round %d (%s): the upstream served %d of %d", round+1, q.Kind, q.Served, q.Limit)
		}
		if least := x.limit - leftover; q.Faults == 0 && q.Served < least {
			out.Missed = append(out.Missed, fmt.Sprintf("round %d (%s): %d admitted of %d although nothing was killed, at least %d are expected", round+1, q.Kind, q.Served, q.Limit, least))
		}
	}
	check, err := w.settle(ctx)
	if err != nil {
		return err
	}
	out.Check = &check
	for _, b := range check.Broken(!w.safe) {
		out.Breaks("%s", b)
	}
	out.NoAnswers = w.traffic.Errors()
	return nil
}

func kindOf(round int) string {
	if round%2 == 0 {
		return "calls"
	}
	return "tokens"
}

func (w *world) shareRound(ctx context.Context, x exactOptions, round int) (report.Quota, error) {
	q := report.Quota{Kind: kindOf(round), Limit: x.limit}
	ctx, cancel := context.WithTimeout(ctx, x.longest)
	defer cancel()
	var trouble []faults.Fault
	if x.faults != nil {
		trouble = x.faults(round, w.r, w.fleet)
	}
	q.Faults = len(trouble)
	began := time.Now()
	var raging sync.WaitGroup
	raging.Go(func() { w.rage(ctx, trouble) })
	defer raging.Wait()

	gateways := len(w.fleet.GatewayURLs())
	id := w.accounts[round].ID
	var admitted, refused, unknown, early, unanswered atomic.Int64
	seed := w.r.Uint64()
	var clients sync.WaitGroup
	for n := range gateways * x.clients {
		clients.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(n)))
			for denials := 0; denials < deniedEnds && ctx.Err() == nil; {
				s := traffic.Shape{Account: round, Gateway: n % gateways, Output: 1}
				units := int64(1)
				if q.Kind == "tokens" {
					s.Output, s.MaxTokens = 1+r.IntN(maxTokens), maxTokens
					units = int64(s.Output)
				}
				a := w.traffic.Call(context.WithoutCancel(ctx), s)
				switch a.Outcome {
				case traffic.Passed:
					admitted.Add(units)
					denials = 0
					continue
				case traffic.Refused:
					refused.Add(1)
					// What is on its way to the upstream may use up the rest.
					if w.served(q.Kind, id) < x.limit-int64(gateways*x.clients)*units {
						early.Add(1)
					}
					denials++
				case traffic.Unknown:
					unknown.Add(1)
				default:
					unanswered.Add(units)
				}
				_ = pause(ctx, 30*time.Millisecond) // its end ends the loop
			}
		})
	}
	clients.Wait()
	raging.Wait()
	q.Admitted, q.Refused, q.Unknown, q.Early = admitted.Load(), refused.Load(), unknown.Load(), early.Load()
	q.Unanswered = unanswered.Load()
	q.Served, q.Seconds = w.served(q.Kind, id), time.Since(began).Seconds()
	return q, nil
}

// served is what the upstream served of an account, in the limit's units.
func (w *world) served(kind, account string) int64 {
	s := w.upstream.Served(account)
	if kind == "tokens" {
		return s.Output
	}
	return s.Calls
}

// trouble is what befalls the odd pairs of rounds: kills of anything, one of
// everything now and then, and a cut cable.
func trouble(round int, r *rand.Rand, f *fleet.Fleet) []faults.Fault {
	if round%4 < 2 {
		return nil // a round of each kind in peace
	}
	var names, cables []string
	for _, p := range f.Processes() {
		names = append(names, p.Name)
		if f.CanCut(p.Name) {
			cables = append(cables, p.Name)
		}
	}
	list := faults.Schedule(r, faults.Plan{Kills: 3, Victims: names, Cables: cables, Pause: 700 * time.Millisecond, Last: 800 * time.Millisecond})
	if len(cables) > 0 {
		list = append(list, faults.Fault{After: faults.Span(r, 300*time.Millisecond), Act: faults.Cut, Victims: []string{cables[r.IntN(len(cables))]}, For: time.Second + faults.Span(r, 4*time.Second)})
	}
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}
