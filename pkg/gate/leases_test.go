package gate

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/gate/wallet"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// leased gives an offline gate n accounts with an exact limit on calls each, and
// units of all of them at hand.
func leased(t testing.TB, g *Gate, n int) []string {
	t.Helper()
	nc := &nats.Conn{}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	w, err := wallet.New(wallet.Options{Conn: nc, JS: js, Gateway: ksuid.New(), Shards: 4, Now: g.LedgerNow})
	if err != nil {
		t.Fatal(err)
	}
	g.wallet.Store(w)
	tab := g.table.Load()
	limit := usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Lifetime, Amount: 1 << 50, Tier: usage.TierExact}
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprintf("service-%06d", i)
		tab.SetAccount(table.AccountRecord{
			ID: ids[i], Path: []string{ids[i], fmt.Sprintf("team-%05d", i/10), fmt.Sprintf("org-%04d", i/100)}, Seq: 5,
			Leased: []table.LeasedLimit{{Account: ids[i], LimitID: "pro/calls", Limit: limit}},
		})
		a, _ := tab.ByID(ids[i])
		p := lease.NewPurse(lease.Gateway{1}, 0, lease.Habits{Term: 1_000_000, RetryAfter: 1000, FirstWant: 1, MaxWant: 1})
		p.Receive(lease.Answer{Gateway: lease.Gateway{1}, Epoch: 1, Revision: 1, Granted: 1 << 50, Expiry: 1 << 60}, 0)
		a.Leased()[0].Use(p)
	}
	return ids
}

// Not parallel: it counts allocations.
func TestACallFromALeaseAtHandIsStampedAndAllocatesNothing(t *testing.T) {
	g, _ := offline(t)
	a, _ := g.AccountByID(leased(t, g, 1)[0])
	v, k := g.Take(t.Context(), a, Request{}, nil)
	var c usage.Call
	k.Stamp(&c)
	if !v.Allowed || v.Unknown || !k.Leased() || c.Flags&usage.FromLease == 0 || c.Time == 0 || c.Time > g.LedgerNow() {
		t.Errorf("%+v, %+v", v, c)
	}
	if n := testing.AllocsPerRun(100, func() { v, k = g.Take(t.Context(), a, Request{}, nil); k.Settle(&c.Quantities) }); n != 0 && !raceEnabled {
		t.Errorf("%v allocations", n)
	}
	// Who can't take is not let through.
	if v := g.Admit(a, Request{}); v.Allowed || v.Code != usage.BillingStateUnknown {
		t.Errorf("admitted without taking: %+v", v)
	}
	// What is held against it is looked at first.
	(&decisionsFeed{g}).Apply(decisionOf(t, "service-000000", 1, usage.Deny, 0))
	if v, _ := g.Take(t.Context(), a, Request{}, nil); v.Code != usage.QuotaExceeded || v.Decision.ID != "d1" {
		t.Errorf("against a deny: %+v", v)
	}
	(&decisionsFeed{g}).Apply(decisionOf(t, "service-000000", 2, usage.Deny, 7))
	if v, k := g.Take(t.Context(), a, Request{}, nil); !v.Allowed || !k.Leased() {
		t.Errorf("against a deny that leaves room for it: %+v", v)
	}
	(&decisionsFeed{g}).Apply(decisionOf(t, "service-000000", 3, usage.Warn, 0))
	if v, k := g.Take(t.Context(), a, Request{}, nil); !v.Allowed || !k.Leased() || v.Decision == nil {
		t.Errorf("with a warning: %+v", v)
	}
}

// Admission as a caller sees it, from leases at hand, over 100,000 accounts.
func BenchmarkTake(b *testing.B) {
	g, _ := offline(b)
	ids := leased(b, g, 100_000)
	const picks = 1 << 16
	z := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, uint64(len(ids)-1))
	where := rand.New(rand.NewPCG(3, 4)).Perm(len(ids))
	order, handles := make([]string, picks), make([]*Account, picks)
	for i := range order {
		order[i] = ids[where[z.Uint64()]]
		handles[i], _ = g.AccountByID(order[i])
	}
	req := Request{Model: "m", Route: "r", Method: "POST"}
	ctx := context.Background()
	for name, take := range map[string]func(i int) bool{
		"handle": func(i int) bool { v, _ := g.Take(ctx, handles[i], req, nil); return v.Allowed },
		"id": func(i int) bool {
			a, _ := g.AccountByID(order[i])
			v, _ := g.Take(ctx, a, req, nil)
			return v.Allowed
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				i := rand.IntN(picks)
				for pb.Next() {
					if !take(i & (picks - 1)) {
						b.Error("refused")
						return
					}
					i++
				}
			})
		})
	}
}

// Take and Admit beside what is the least for anything of the kind, a counter whose
// place is known, and a concurrent map with counters: all by turns, so that what
// else the machine does concerns all alike. Medians of the rounds are reported.
func BenchmarkTakeBesideTheLeast(b *testing.B) {
	g, _ := offline(b)
	const accounts, picks, turn = 100_000, 1 << 16, 1 << 15
	ids := leased(b, g, accounts)
	tab := g.table.Load()
	type counter struct {
		n atomic.Int64
		_ [56]byte
	}
	var counters sync.Map
	for i, id := range ids {
		free := fmt.Sprintf("free-%06d", i)
		tab.SetAccount(table.AccountRecord{ID: free, Path: []string{free, fmt.Sprintf("team-%05d", i/10), fmt.Sprintf("org-%04d", i/100)}, Seq: 5})
		counters.Store(id, &counter{})
	}
	z := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, accounts-1)
	where := rand.New(rand.NewPCG(3, 4)).Perm(accounts)
	order, leasing, plain, bare := make([]string, picks), make([]*Account, picks), make([]*Account, picks), make([]*counter, picks)
	for i := range order {
		n := where[z.Uint64()]
		order[i] = ids[n]
		leasing[i], _ = g.AccountByID(order[i])
		plain[i], _ = g.AccountByID(fmt.Sprintf("free-%06d", n))
		c, _ := counters.Load(order[i])
		bare[i], _ = c.(*counter)
	}
	req := Request{Model: "m", Route: "r", Method: "POST"}
	ctx := context.Background()
	kinds := []struct {
		name string
		do   func(i int) bool
	}{
		{"counter", func(i int) bool { return bare[i].n.Add(1) > 0 }},
		{"map", func(i int) bool {
			v, _ := counters.Load(order[i])
			c, _ := v.(*counter)
			return c.n.Add(1) > 0
		}},
		{"admit", func(i int) bool { return g.Admit(plain[i], req).Allowed }},
		{"take", func(i int) bool { v, _ := g.Take(ctx, leasing[i], req, nil); return v.Allowed }},
		{"take-id", func(i int) bool {
			a, _ := g.AccountByID(order[i])
			v, _ := g.Take(ctx, a, req, nil)
			return v.Allowed
		}},
	}
	took := make([][]float64, len(kinds))
	procs := runtime.GOMAXPROCS(0)
	runtime.GC()
	for b.Loop() {
		for k := range kinds {
			var wg sync.WaitGroup
			began := time.Now()
			for p := range procs {
				wg.Go(func() {
					do := kinds[k].do
					for i, from := 0, p*picks/procs; i < turn; i++ {
						if !do((from + i) & (picks - 1)) {
							b.Error("refused")
							return
						}
					}
				})
			}
			wg.Wait()
			took[k] = append(took[k], float64(time.Since(began).Nanoseconds())/turn)
		}
	}
	medians := make([]float64, len(kinds))
	for k := range kinds {
		slices.Sort(took[k])
		medians[k] = took[k][len(took[k])/2]
		// Of one call on one core; all cores work at the same time.
		b.ReportMetric(medians[k], kinds[k].name+"-ns/call")
	}
	b.ReportMetric(medians[3]/medians[2], "take/admit")
	b.ReportMetric(medians[3]/medians[0], "take/counter")
	b.ReportMetric(medians[4]/medians[1], "take-id/map")
	b.ReportMetric(0, "ns/op")
}
