package table

import (
	"math/rand/v2"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// leasedMany is many with an exact limit on calls on each leaf, and a purse that has
// more than is ever taken.
func leasedMany(n int) (*Table, []KeyHash, []string) {
	t, hashes, ids := many(n)
	limit := usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Lifetime, Amount: 1 << 50, Tier: usage.TierExact}
	for i, id := range ids {
		t.SetAccount(AccountRecord{
			ID: id, Path: []string{id, "team-" + ids[i/10*10][len("service-"):], "org-" + ids[i/100*100][len("service-"):]}, Plan: "pro", Seq: 1,
			Leased: []LeasedLimit{{Account: id, LimitID: "pro/calls", Limit: limit}},
		})
		a, _ := t.ByID(id)
		p := lease.NewPurse(lease.Gateway{1}, 0, lease.Habits{Term: 1_000_000, RetryAfter: 1000, FirstWant: 1, MaxWant: 1})
		p.Receive(lease.Answer{Gateway: lease.Gateway{1}, Epoch: 1, Revision: 1, Granted: 1 << 50, Expiry: 1 << 60}, 0)
		a.Leased()[0].Use(p)
	}
	return t, hashes, ids
}

// A call that units are taken for from a lease at hand.
func BenchmarkTakeOne(b *testing.B) {
	const n, picks = 100_000, 1 << 16
	t, hashes, ids := leasedMany(n)
	for _, traffic := range []struct {
		name string
		pick []int
	}{{"zipf", skewed(n, picks)}, {"uniform", uniform(n, picks)}} {
		order := make([]KeyHash, picks)
		orderIDs := make([]string, picks)
		handles := make([]*Account, picks)
		for i, p := range traffic.pick {
			order[i], orderIDs[i] = hashes[p], ids[p]
			handles[i], _ = t.ByID(ids[p])
		}
		req := Request{Model: "m", Route: "r", Method: "POST"}
		run := func(name string, admit func(i int) bool) {
			b.Run(name+"/"+traffic.name, func(b *testing.B) {
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					i := rand.IntN(picks)
					for pb.Next() {
						if !admit(i & (picks - 1)) {
							b.Error("refused")
							return
						}
						i++
					}
				})
			})
		}
		run("handle", func(i int) bool { ok, _ := t.TakeOne(handles[i], &req, 1, false); return ok })
		run("key", func(i int) bool {
			c, _ := t.ByKey(&order[i])
			ok, _ := t.TakeOne(c.Account, &req, 1, false)
			return ok
		})
		run("id", func(i int) bool {
			a, found := t.ByID(orderIDs[i])
			ok, _ := t.TakeOne(a, &req, 1, false)
			return ok && found == Found
		})
	}
}
