package bench

import (
	"math/rand/v2"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
)

// admission measures the check of an account that may go on, at a running
// gateway that knows all of them, from all CPUs at once: by account id and with
// the account at hand.
func admission(g *gate.Gate, accounts []string) (byID, atHand testing.BenchmarkResult) {
	const picks = 1 << 16
	rng := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(rng, 1.1, 1, uint64(len(accounts)-1))
	ids := make([]string, picks)
	handles := make([]*gate.Account, picks)
	for i := range ids {
		ids[i] = accounts[zipf.Uint64()]
		handles[i], _ = g.AccountByID(ids[i])
	}
	req := gate.Request{Method: "POST", Route: "chat", Model: "model-1"}
	run := func(admit func(i int) bool) testing.BenchmarkResult {
		return testing.Benchmark(func(b *testing.B) {
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
	byID = run(func(i int) bool {
		a, found := g.AccountByID(ids[i])
		return found == gate.Found && g.Admit(a, req).Allowed
	})
	atHand = run(func(i int) bool { return g.Admit(handles[i], req).Allowed })
	return byID, atHand
}
