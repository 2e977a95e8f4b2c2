// Package bench measures the pipeline against the raw limits of what it stands
// on, in one run, and prints medians of several interleaved rounds.
package bench

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// workload makes the calls that every part of the bench uses: accounts drawn
// from a zipf distribution, five models, three routes, token counts.
type workload struct {
	shards   uint32
	accounts [][]string // by shard
	rng      *rand.Rand
	zipf     []*rand.Zipf
	now      usage.Micros
}

func newWorkload(seed uint64, accounts int, shards uint32) *workload {
	w := &workload{shards: shards, accounts: make([][]string, shards), rng: rand.New(rand.NewPCG(seed, 402)), now: usage.At(time.Now())}
	for i := range accounts {
		id := "acct-" + strconv.Itoa(i)
		s := ledger.ShardOf(id, shards)
		w.accounts[s] = append(w.accounts[s], id)
	}
	for s := range w.accounts {
		w.zipf = append(w.zipf, rand.NewZipf(w.rng, 1.1, 1, uint64(len(w.accounts[s])-1)))
	}
	return w
}

// all returns every account.
func (w *workload) all() []string { return slices.Concat(w.accounts...) }

func (w *workload) call(shard uint32) usage.Call {
	w.now += usage.Micros(w.rng.Int64N(40))
	c := usage.Call{
		Time: w.now, Account: w.accounts[shard][w.zipf[shard].Uint64()], KeyID: "bench", Method: "POST",
		Route: [...]string{"chat", "embeddings", "responses"}[w.rng.IntN(3)], Model: "model-" + strconv.Itoa(w.rng.IntN(5)),
		Status: 200, Duration: 100_000 + w.rng.Int64N(1<<20),
	}
	c.Quantities.SetBuiltIn(usage.InputTokensIndex, 20+w.rng.Int64N(4000))
	c.Quantities.SetBuiltIn(usage.OutputTokensIndex, 1+w.rng.Int64N(800))
	return c
}

// encoded is a frame ready to be published.
type encoded struct {
	shard uint32
	data  []byte
	calls int
}

// frames encodes n frames of size calls, spread over the shards; numbers begin
// at 1 in each shard for the producer.
func (w *workload) frames(producer ksuid.KSUID, n, size int) []encoded {
	out := make([]encoded, 0, n)
	var b ledger.Builder
	numbers := make([]uint64, w.shards)
	for i := range n {
		shard := uint32(i) % w.shards
		for range size {
			c := w.call(shard)
			b.Add(&c)
		}
		numbers[shard]++
		data := b.Seal(ledger.Header{Producer: producer, Shard: shard, Number: numbers[shard], Gateway: "bench", SealedAt: w.now})
		out = append(out, encoded{shard, data, size})
	}
	return out
}

func bytesOf(frames []encoded) (bytes, calls int) {
	for _, f := range frames {
		bytes += len(f.data)
		calls += f.calls
	}
	return bytes, calls
}

// median of at least one value.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// quantile returns the value that a share q of the durations do not exceed.
func quantile(d []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[min(int(q*float64(len(s))), len(s)-1)]
}

// rate writes events a second for a person.
func rate(perSecond float64) string {
	switch {
	case perSecond >= 1e6:
		return fmt.Sprintf("%.2f M/s", perSecond/1e6)
	case perSecond >= 1e3:
		return fmt.Sprintf("%.1f k/s", perSecond/1e3)
	}
	return fmt.Sprintf("%.0f /s", perSecond)
}
