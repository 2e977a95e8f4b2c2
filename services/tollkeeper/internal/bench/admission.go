package bench

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
)

// admissions are what an admission costs on all CPUs at once, and the least that
// anything of the kind can cost.
type admissions struct {
	// bareMap looks an account up in a sync.Map, reads an atomic word of it and the clock.
	bareMap       testing.BenchmarkResult
	byID, atHand  testing.BenchmarkResult
	ratioOfBareID float64 // byID of bareMap, the median of rounds by turns
}

// admission measures the check of an account that may go on, at a running
// gateway that knows all of them, from all CPUs at once: by account id and with
// the account at hand, by turns with a bare map of as many accounts.
func admission(g *gate.Gate, accounts []string, rounds int) (out admissions) {
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
	var bare sync.Map
	for _, id := range accounts {
		bare.Store(id, new(atomic.Int64))
	}
	began := time.Now()
	inMap := func(i int) bool {
		state, ok := bare.Load(ids[i])
		return ok && state.(*atomic.Int64).Load() == 0 && time.Since(began) >= 0
	}
	inTable := func(i int) bool {
		a, found := g.AccountByID(ids[i])
		return found == gate.Found && g.Admit(a, req).Allowed
	}
	ratios := make([]float64, rounds)
	for i := range ratios {
		out.bareMap, out.byID = run(inMap), run(inTable)
		ratios[i] = perCall(out.byID) / perCall(out.bareMap)
	}
	out.ratioOfBareID = median(ratios)
	out.atHand = run(func(i int) bool { return g.Admit(handles[i], req).Allowed })
	return out
}

// perCall is NsPerOp with its fraction.
func perCall(r testing.BenchmarkResult) float64 { return float64(r.T.Nanoseconds()) / float64(r.N) }
