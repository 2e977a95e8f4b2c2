package history

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// traffic makes frames as three gateways would seal them: accounts by a zipf
// law, six models with prices, token counts and durations with long tails, a few
// refusals, and every column of a call filled but request and trace ids.
type traffic struct {
	r        *rand.Rand
	zipf     *rand.Zipf
	accounts int
	now      usage.Micros
	gap      float64 // mean, microseconds
	shards   uint32
	ids      bool // random request and trace ids
	prefix   string

	gateways []*trafficGateway
	sequence uint64
}

type trafficGateway struct {
	name     string
	producer ksuid.KSUID
	numbers  []uint64
	builders []ledger.Builder
}

var models = []struct {
	name        string
	in, out     int64 // nano-units a token
	meanIn      float64
	meanOut     float64
	perTokenOut float64 // microseconds
}{
	{"gpt-5.1", 1250, 10000, 1100, 220, 9000}, {"gpt-5-mini", 250, 2000, 900, 180, 5000}, {"claude-sonnet-4.5", 3000, 15000, 2000, 300, 14000},
	{"gemini-2.5-flash", 300, 2500, 1500, 250, 4000}, {"llama-4", 200, 800, 700, 150, 7000}, {"text-embedding-3-small", 20, 0, 400, 0, 0},
}

func newTraffic(seed uint64, accounts int, prefix string) *traffic {
	r := rand.New(rand.NewPCG(seed, 1))
	t := &traffic{r: r, zipf: rand.NewZipf(r, 1.1, 10, uint64(accounts-1)), accounts: accounts, now: usage.At(time.Date(2025, 11, 17, 9, 0, 0, 0, time.UTC)), gap: 3000, shards: 8, prefix: prefix}
	for g := range 3 {
		id, err := ksuid.FromParts(t.now.Time(), []byte(fmt.Sprintf("producer-%07d", g)))
		if err != nil {
			panic(err)
		}
		t.gateways = append(t.gateways, &trafficGateway{name: fmt.Sprintf("gateway-%c", 'a'+g), producer: id, numbers: make([]uint64, t.shards), builders: make([]ledger.Builder, t.shards)})
	}
	return t
}

func (t *traffic) tail(mean float64) int64 {
	return max(1, int64(mean*math.Exp(t.r.NormFloat64()*0.8-0.32)))
}

func (t *traffic) call() usage.Call {
	t.now += usage.Micros(t.r.ExpFloat64() * t.gap)
	a := t.zipf.Uint64()
	// An account has a favourite model and route.
	m := models[(a+t.r.Uint64N(10)/9)%uint64(len(models))]
	in := t.tail(m.meanIn)
	c := usage.Call{
		Time: t.now, Account: fmt.Sprintf("%sorg-%05d", t.prefix, a), KeyID: fmt.Sprintf("key-%06d", a*3+t.r.Uint64N(2)), Method: "POST", Route: "/v1/chat/completions", Model: m.name,
		Region: "eu-west", Status: 200, PriceVersion: "2025-11-01", Currency: "USD",
	}
	if m.out == 0 {
		c.Route = "/v1/embeddings"
	}
	if t.ids {
		c.RequestID = fmt.Sprintf("req_%016x%016x", t.r.Uint64(), t.r.Uint64())
		for i := range c.TraceID {
			c.TraceID[i] = byte(t.r.Uint32())
		}
		for i := range c.SpanID {
			c.SpanID[i] = byte(t.r.Uint32())
		}
	}
	if t.r.IntN(50) == 0 {
		c.Status, c.Code, c.DecisionID, c.Duration = 402, usage.QuotaExceeded, fmt.Sprintf("2uZ%012d%012d", a, int64(t.now)/60_000_000), 200+t.r.Int64N(200)
		return c
	}
	out := int64(0)
	if m.out > 0 {
		out = t.tail(m.meanOut)
	}
	c.Duration = 120_000 + int64(float64(out)*m.perTokenOut) + t.r.Int64N(50_000)
	c.Quantities.Set(usage.InputTokens, in)
	c.Quantities.Set(usage.OutputTokens, out)
	if t.r.IntN(4) == 0 {
		c.Quantities.Set(usage.CachedInputTokens, in/128*128/2)
	}
	c.Quantities.Set(usage.Cost, in*m.in+out*m.out)
	c.Quantities.Set(usage.Bytes, in*4+out*5+600)
	return c
}

// frames makes frames of n calls together.
func (t *traffic) frames(tb testing.TB, n int) []trafficFrame {
	tb.Helper()
	var all []trafficFrame
	seal := func(g *trafficGateway, shard uint32) {
		t.sequence++
		g.numbers[shard]++
		sealed := t.now + 100
		all = append(all, trafficFrame{Entry{Sequence: t.sequence, Time: sealed + 300}, g.builders[shard].Seal(ledger.Header{Producer: g.producer, Shard: shard, Number: g.numbers[shard], Gateway: g.name, SealedAt: sealed})})
	}
	for range n {
		c := t.call()
		g := t.gateways[t.r.IntN(len(t.gateways))]
		shard := ledger.ShardOf(c.Account, t.shards)
		b := &g.builders[shard]
		b.Add(&c)
		if b.Full() || b.Len() >= 500 {
			seal(g, shard)
		}
	}
	for _, g := range t.gateways {
		for shard := range t.shards {
			if g.builders[shard].Len() > 0 {
				seal(g, shard)
			}
		}
	}
	return all
}

type trafficFrame struct {
	entry Entry
	data  []byte
}

// blocks fills blocks of about n rows from frames.
func fillBlocks(tb testing.TB, frames []trafficFrame, n int) []*Block {
	tb.Helper()
	var f ledger.Frame
	all := []*Block{NewBlock()}
	for _, fr := range frames {
		if err := f.Decode(fr.data); err != nil {
			tb.Fatal(err)
		}
		b := all[len(all)-1]
		if b.Rows() > 0 && b.Rows()+f.N > n {
			b = NewBlock()
			all = append(all, b)
		}
		b.AppendFrame(&f, fr.entry, nil)
	}
	return all
}
