package table

import (
	"crypto/sha256"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func testShardOf(root string, n uint32) uint32 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(root))
	return uint32(h.Sum64() % uint64(n))
}

// many returns a table of n leaf accounts, ten a team, ten teams an
// organisation, all known; every hundredth organisation is denied something
// that the benchmark does not call.
func many(n int) (*Table, []KeyHash, []string) {
	t := New(8, testShardOf, Policy{Pass: true, MaxCalls: 1000, StaleAfter: 3_000_000})
	keys := make([]Key, n)
	accounts := make([]AccountRecord, n)
	hashes, ids := make([]KeyHash, n), make([]string, n)
	for i := range n {
		id, team, org := fmt.Sprintf("service-%06d", i), fmt.Sprintf("team-%05d", i/10), fmt.Sprintf("org-%04d", i/100)
		hashes[i], ids[i] = sha256.Sum256([]byte(id)), id
		keys[i] = Key{Hash: hashes[i], KeyID: "k" + id, Account: id}
		accounts[i] = AccountRecord{ID: id, Path: []string{id, team, org}, Plan: "pro"}
	}
	t.setDirectory(keys, accounts)
	t.ResetDecisions(nil)
	for s := range uint32(8) {
		t.Hear(Beacon{Shard: s, Epoch: 1, StreamTime: 1}, 1)
	}
	t.Tick(1)
	return t, hashes, ids
}

// skewed picks accounts as traffic does, few of them often, scattered over memory.
func skewed(n, picks int) []int {
	r := rand.New(rand.NewPCG(1, 2))
	z := rand.NewZipf(r, 1.1, 1, uint64(n-1))
	where := r.Perm(n)
	out := make([]int, picks)
	for i := range out {
		out[i] = where[z.Uint64()]
	}
	return out
}

func uniform(n, picks int) []int {
	r := rand.New(rand.NewPCG(1, 2))
	out := make([]int, picks)
	for i := range out {
		out[i] = r.IntN(n)
	}
	return out
}

func BenchmarkAdmit(b *testing.B) {
	const n, picks = 100_000, 1 << 16
	t, hashes, ids := many(n)
	for _, traffic := range []struct {
		name string
		pick []int
	}{{"zipf", skewed(n, picks)}, {"uniform", uniform(n, picks)}} {
		order := make([]KeyHash, picks)
		orderIDs := make([]string, picks)
		handles := make([]*Account, picks)
		for i, p := range traffic.pick {
			order[i], orderIDs[i] = hashes[p], ids[p]
			c, _ := t.ByKey(&hashes[p])
			handles[i] = c.Account
		}
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
		run("handle", func(i int) bool { return t.Fine(handles[i]) })
		run("key", func(i int) bool {
			c, found := t.ByKey(&order[i])
			return found == Found && t.Fine(c.Account)
		})
		run("id", func(i int) bool {
			a, found := t.ByID(orderIDs[i])
			return found == Found && t.Fine(a)
		})
	}
}

func BenchmarkRefuse(b *testing.B) {
	t, hashes, _ := many(1000)
	for i := range 10 {
		t.Apply(Keyed{Key: fmt.Sprint(i), Seq: 1, Decision: usage.Decision{Account: fmt.Sprintf("org-%04d", i), LimitID: "pro/calls", Verdict: usage.Deny, Code: usage.QuotaExceeded, Revision: 1, PeriodEnd: 100}})
	}
	b.ReportAllocs()
	for i := range b.N {
		c, _ := t.ByKey(&hashes[i%1000])
		if v := t.Decide(c.Account, Request{Model: "m", Route: "r", Method: "POST"}, 50); v.Allowed {
			b.Fatal("allowed")
		}
	}
}
