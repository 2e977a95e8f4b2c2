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

// What is left is with another gateway that does not use it: it is called back before
// anybody is denied.
func TestWhatOthersDoNotUseIsRecalledBeforeADenial(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account([]string{"acme"}, exactly(1000, usage.Lifetime))
	first, second := w.gate(), w.gate()
	a := first.find("acme")
	second.find("acme")
	admitted := int64(0)
	for range 100 { // enough for it to fetch ahead
		if v, _ := first.Take(t.Context(), a, request, nil); !v.Allowed {
			t.Fatalf("%+v", v)
		}
		admitted++
	}
	more, unknown := storm(t, []*node{second}, "acme", nil)
	if admitted += more; admitted != 1000 || unknown != 0 {
		t.Errorf("%d admitted, %d unknown: %+v", admitted, unknown, own.state("acme", "pro/calls", 0))
	}
	if s := own.state("acme", "pro/calls", 0); s.Counts.Recalls == 0 {
		t.Errorf("nothing was recalled: %+v", s)
	}
	v, _ := first.Take(t.Context(), a, request, nil)
	if v.Allowed || v.Code != usage.QuotaExceeded || v.Decision == nil || v.Decision.ID == "" || v.Requested != 1 {
		t.Errorf("the refusal: %+v", v)
	}
	f := first.Refusal(a, request, v, "r1")
	if f.HTTPStatus() != 402 || f.Requested != 1 {
		t.Errorf("the answer: %+v", f)
	}
}

// The owner is away: what leases hold is used on, and after that nobody knows.
func TestLeasesOutliveTheirOwner(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account([]string{"acme"}, exactly(1_000_000, usage.Month))
	n := w.gate(func(o *gate.Options) {
		o.Leases.Wait, o.StaleAfter = 200*time.Millisecond, 100*time.Millisecond
		o.Leases.PassUnknown = true // which an exact limit does not heed
	})
	a := n.find("acme")
	for range 200 {
		if v, k := n.Take(t.Context(), a, request, nil); !v.Allowed || !k.Leased() {
			t.Fatalf("%+v", v)
		}
	}
	own.leave(true)
	until(t, "the gateway finds that nobody speaks", func() bool { return n.Ready() != nil })
	held := 0
	for {
		v, k := n.Take(t.Context(), a, request, nil)
		if !v.Allowed {
			if v.Code != usage.BillingStateUnknown || !v.Unknown {
				t.Fatalf("%+v", v)
			}
			break
		}
		if v.Unknown || !k.Leased() {
			t.Fatalf("a call passed without a lease: %+v", v)
		}
		held++
	}
	if held == 0 {
		t.Error("nothing was at hand when the owner went")
	}
	own.leave(false)
	until(t, "it goes on", func() bool { v, _ := n.Take(t.Context(), a, request, nil); return v.Allowed })
	if n.metric("tollkeeper_gate_lease_takes_total", "standing=no_answer") == 0 {
		t.Error("the metric does not tell")
	}
}

// A limit of a minute, called without a pause over the turn of the minute: no more
// than its amount in either, nobody is denied in the second for the first's sake.
func TestATurnOfTheWindowIsSharp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.owner()
	limit := exactly(3000, usage.Minute)
	w.account([]string{"acme"}, limit)
	// Both gateways' clocks are moved to shortly before the turn.
	turn := time.Now().Truncate(time.Minute).Add(time.Minute)
	shift := time.Until(turn) - 1200*time.Millisecond
	w.own.shift(shift)
	edit := func(o *gate.Options) {
		o.Now = func() time.Time { return time.Now().Add(shift) }
		o.Leases.Skew = 100 * time.Millisecond
	}
	nodes := []*node{w.gate(edit), w.gate(edit)}
	var mu sync.Mutex
	counts := make(map[int64]int)
	var denied, unknown atomic.Int64
	var all sync.WaitGroup
	for _, n := range nodes {
		a := n.find("acme")
		for range 16 {
			all.Go(func() {
				pace := time.NewTicker(time.Millisecond)
				defer pace.Stop()
				for time.Now().Add(shift).Before(turn.Add(800 * time.Millisecond)) {
					<-pace.C
					v, k := n.Take(context.Background(), a, request, nil)
					switch {
					case v.Allowed:
						var c usage.Call
						k.Stamp(&c)
						mu.Lock()
						counts[int64(c.Time)/60_000_000]++
						mu.Unlock()
					case v.Code.Status() == 402:
						denied.Add(1)
						if now := time.Now().Add(shift); now.After(turn.Add(300 * time.Millisecond)) {
							mu.Lock()
							full := counts[turn.UnixMicro()/60_000_000] >= int(limit.Amount)-10
							mu.Unlock()
							if !full {
								t.Errorf("denied at %s for the window before", now)
								return
							}
						}
					default:
						unknown.Add(1)
					}
				}
			})
		}
	}
	all.Wait()
	t.Logf("%v, %d denied, %d unknown", counts, denied.Load(), unknown.Load())
	before, after := counts[turn.UnixMicro()/60_000_000-1], counts[turn.UnixMicro()/60_000_000]
	if before > 3000 || after > 3000 || before < 2990 || after < 2990 || len(counts) != 2 {
		t.Errorf("calls by minute: %v", counts)
	}
	if unknown.Load() > 0 {
		t.Errorf("%d calls found nobody who knows", unknown.Load())
	}
}

// Token reservations: three gateways never reserve more than there is, what was not
// used comes back, and at the end at most one call's bound is left.
func TestReservationsHoldTheirBound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	const limit, most = 100_000, 100
	w.account([]string{"acme"},
		usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: limit, Tier: usage.TierExact},
		usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 1 << 40, Tier: usage.TierExact})
	nodes := []*node{w.gate(), w.gate(), w.gate()}
	var used, calls atomic.Int64
	var all sync.WaitGroup
	for _, n := range nodes {
		a := n.find("acme")
		for g := range 64 {
			all.Go(func() {
				for i := 0; ; i++ {
					var cost gate.Cost
					cost.Bounds.SetBuiltIn(usage.OutputTokensIndex, most)
					v, k := n.Take(context.Background(), a, request, &cost)
					if v.Code.Status() == 402 {
						return
					}
					if !v.Allowed {
						continue
					}
					calls.Add(1)
					switch actual := int64((i*31 + g*7) % (most + 1)); actual {
					case 0:
						k.Void()
						calls.Add(-1)
					default:
						var q usage.Quantities
						q.SetBuiltIn(usage.OutputTokensIndex, actual)
						used.Add(actual)
						k.Settle(&q)
					}
				}
			})
		}
	}
	all.Wait()
	for _, n := range nodes {
		n.stop()
	}
	s := own.state("acme", "pro/tokens", 0)
	t.Logf("%d used in %d calls; %+v", used.Load(), calls.Load(), s)
	if used.Load() > limit || used.Load() < limit-most || s.Settled != used.Load() || s.Outstanding != 0 {
		t.Errorf("%d tokens are used of %d: %+v", used.Load(), limit, s)
	}
}

// What can't be bounded, or is larger than the limit, is refused before it costs
// anything.
func TestWhatIsNotBoundedIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.owner()
	w.account([]string{"acme"}, usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: 100, Tier: usage.TierExact, Filter: usage.Filter{Models: []string{"m"}}})
	n := w.gate()
	a := n.find("acme")
	if got := n.Measured(a, request); len(got) != 1 || got[0] != usage.OutputTokens {
		t.Errorf("what is measured: %v", got)
	}
	if v, _ := n.Take(t.Context(), a, request, nil); v.Code != usage.CostExceedsLimit || v.Detail == "" {
		t.Errorf("without a bound: %+v", v)
	}
	var cost gate.Cost
	cost.Bounds.SetBuiltIn(usage.OutputTokensIndex, 101)
	v, _ := n.Take(t.Context(), a, request, &cost)
	if f := n.Refusal(a, request, v, "r"); f.HTTPStatus() != 403 || f.Requested != 101 || v.Decision.Amount != 100 {
		t.Errorf("more than there is: %+v", v)
	}
	if v := n.Admit(a, request); v.Allowed {
		t.Error("it was admitted without taking anything")
	}
	until(t, "its shard is known", func() bool {
		v, k := n.Take(t.Context(), a, gate.Request{Model: "other"}, nil)
		return v.Allowed && !v.Unknown && !k.Leased()
	})
}
