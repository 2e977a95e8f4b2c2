package leasetest

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var request = gate.Request{Model: "m", Route: "r", Method: "POST"}

func exactly(amount int64, w usage.WindowKind) usage.Limit {
	return usage.Limit{ID: "calls", Meter: usage.Calls, Window: w, Amount: amount, Tier: usage.TierExact, ActionURL: "https://pay.example"}
}

// storm lets 64 callers of each gateway call until each was refused, and returns how
// many calls were admitted and refused for other reasons than money.
func storm(t *testing.T, nodes []*node, account string, cost *gate.Cost) (admitted, unknown int64) {
	t.Helper()
	var yes, other atomic.Int64
	var all sync.WaitGroup
	for _, n := range nodes {
		a := n.find(account)
		for range 64 {
			all.Go(func() {
				for {
					v, k := n.Take(context.Background(), a, request, cost)
					switch {
					case v.Allowed:
						yes.Add(1)
						if !k.Leased() {
							t.Error("a call was admitted without a lease")
							return
						}
						k.Settle(&usage.Quantities{})
					case v.Code.Status() == 402:
						return
					default:
						other.Add(1)
					}
				}
			})
		}
	}
	all.Wait()
	return yes.Load(), other.Load()
}

func TestThreeGatewaysShareALimitToTheCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	const limit = 10_000
	w.account([]string{"acme"}, exactly(limit, usage.Lifetime))
	nodes := []*node{w.gate(), w.gate(), w.gate()}
	for _, n := range nodes {
		n.find("acme")
	}
	began := time.Now()
	admitted, unknown := storm(t, nodes, "acme", nil)
	t.Logf("%d admitted in %s, %d unknown", admitted, time.Since(began), unknown)
	if admitted > limit || admitted < limit-10 || unknown != 0 {
		t.Errorf("%d calls are admitted of %d, %d are refused as unknown", admitted, limit, unknown)
	}
	early := 0.0
	for _, n := range nodes {
		early += n.metric("tollkeeper_gate_lease_takes_total", "standing=denied_early")
	}
	t.Logf("early denials: %v; %+v", early, own.state("acme", "pro/calls", 0))
	for _, n := range nodes {
		n.stop()
	}
	if s := own.state("acme", "pro/calls", 0); s.Settled != admitted || s.Outstanding != 0 {
		t.Errorf("after all have closed in order: %+v", s)
	}
}
