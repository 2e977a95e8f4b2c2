package aggregator

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

const (
	benchAccounts = 100_000
	benchCalls    = 1000 // a frame
)

// benchFrames returns frames as gateways seal them: each of the producers has
// its frames of each shard in order.
func benchFrames(w *world, producers, frames int) [][]*nats.Msg {
	r := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(r, 1.1, 1, benchAccounts-1)
	lanes := make([][]*nats.Msg, producers*int(w.shards))
	ids := make([]ksuid.KSUID, producers)
	for i := range ids {
		ids[i] = ksuid.New()
	}
	now := usage.At(time.Now())
	models, routes := []string{"gpt-4o", "gpt-4o-mini", "claude-sonnet"}, []string{"/v1/chat/completions", "/v1/embeddings"}
	builders := make([]ledger.Builder, w.shards)
	next := make([]int, w.shards) // producer
	for i := 0; i < frames; {
		id := fmt.Sprintf("account-%06d", zipf.Uint64())
		shard := w.shardOf(id)
		c := usage.Call{
			Time: now, Account: id, KeyID: "k" + id[7:], Method: "POST", Route: routes[r.IntN(2)],
			Model: models[r.IntN(3)], Status: 200, Duration: int64(r.IntN(1_000_000)),
		}
		c.Quantities.Set(usage.InputTokens, int64(r.IntN(4000)))
		c.Quantities.Set(usage.OutputTokens, int64(r.IntN(1000)))
		b := &builders[shard]
		b.Add(&c)
		if b.Len() < benchCalls {
			continue
		}
		producer := next[shard]
		next[shard] = (producer + 1) % producers
		lane := producer*int(w.shards) + int(shard)
		lanes[lane] = append(lanes[lane], ledger.FrameMessage(shard, b.Seal(ledger.Header{
			Producer: ids[producer], Shard: shard, Number: uint64(len(lanes[lane]) + 1), Gateway: "bench", SealedAt: now,
		})))
		i++
	}
	return lanes
}

// BenchmarkPublishedToCounted sends frames over loopback TCP to an embedded
// server, one unacknowledged frame for each producer and shard, until the last
// is counted.
func BenchmarkPublishedToCounted(b *testing.B) {
	for _, sync := range []time.Duration{time.Minute, 0} {
		for _, shards := range []uint32{1, 8, 64} {
			b.Run(fmt.Sprintf("sync always=%t/%d shards", sync == 0, shards), func(b *testing.B) {
				benchmarkPublishedToCounted(b, shards, sync)
			})
		}
	}
}

func benchmarkPublishedToCounted(b *testing.B, shards uint32, sync time.Duration) {
	const frames = 4000
	w := newWorld(b, shards, sync)
	w.plans("v1", usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 1 << 50, Tier: usage.TierEventual})
	accounts := make([][]*tollkeeperv1.Account, shards)
	for i := range benchAccounts {
		id := fmt.Sprintf("account-%06d", i)
		accounts[w.shardOf(id)] = append(accounts[w.shardOf(id)], &tollkeeperv1.Account{Id: id, Plan: "free"})
	}
	for shard, list := range accounts {
		for len(list) > 0 {
			n := min(len(list), 10_000)
			w.control(uint32(shard), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{Accounts: list[:n]}}})
			list = list[n:]
		}
	}
	r := w.run(Options{})
	defer func() {
		if err := r.stop(b); err != nil {
			b.Error(err)
		}
	}()
	producers := max(1, 32/int(shards))
	for b.Loop() {
		b.StopTimer()
		lanes := benchFrames(w, producers, frames)
		last := make([]uint64, shards)
		b.StartTimer()
		begin, cpu := time.Now(), cpuTime(b)
		w.pump(lanes, last)
		stored := time.Since(begin)
		for shard, seq := range last {
			if seq > 0 {
				w.counted(uint32(shard), seq)
			}
		}
		b.ReportMetric(float64((cpuTime(b)-cpu).Nanoseconds())/(frames*benchCalls), "cpu-ns/event")
		b.ReportMetric(frames*benchCalls/stored.Seconds()/1e6, "M-stored/s")
		b.ReportMetric(frames*benchCalls/time.Since(begin).Seconds()/1e6, "M-counted/s")
		b.ReportMetric(float64(len(lanes[w.shardOf("account-000000")][0].Data)), "B/frame")
	}
}

// cpuTime is what this process has used: publishers, server and aggregator
// together. It says more than the clock on a machine that is not ours alone.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// pump publishes every lane in order, each message when the one before is
// acknowledged.
func (w *world) pump(lanes [][]*nats.Msg, last []uint64) {
	js, err := jetstream.New(w.nc, jetstream.WithPublishAsyncMaxPending(len(lanes)+1))
	if err != nil {
		w.t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, lane := range lanes {
		wg.Go(func() {
			for _, m := range lane {
				f, err := js.PublishMsgAsync(m)
				if err != nil {
					w.t.Error(err)
					return
				}
				select {
				case ack := <-f.Ok():
					_, shard, _ := ledger.ParseSubject(m.Subject)
					mu.Lock()
					last[shard] = max(last[shard], ack.Sequence)
					mu.Unlock()
				case err := <-f.Err():
					w.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkCrossingToFeed measures from the publishing of the call that spends
// a quota to the decision's arrival on the feed that gateways listen to.
func BenchmarkCrossingToFeed(b *testing.B) {
	for _, sync := range []time.Duration{time.Minute, 0} {
		b.Run(fmt.Sprintf("sync always=%t", sync == 0), func(b *testing.B) {
			const n = 1000
			w := newWorld(b, 8, sync)
			w.plans("v1", lifetimeLimit(1))
			feed := make(chan *nats.Msg, 2*n)
			sub, err := w.nc.ChanSubscribe("feed.decisions.*.*.*", feed)
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = sub.Unsubscribe() }()
			r := w.run(Options{})
			defer func() {
				if err := r.stop(b); err != nil {
					b.Error(err)
				}
			}()
			p := ksuid.New()
			var took []time.Duration
			for round := 0; b.Loop(); round++ {
				// A quota of a whole life is spent once: each round has its own.
				accounts := make([][]*tollkeeperv1.Account, 8)
				for i := range n {
					id := fmt.Sprintf("account-%d-%d", round, i)
					accounts[w.shardOf(id)] = append(accounts[w.shardOf(id)], &tollkeeperv1.Account{Id: id, Plan: "free"})
				}
				for shard, list := range accounts {
					w.control(uint32(shard), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{Accounts: list}}})
				}
				for i := range n {
					cs := calls(fmt.Sprintf("account-%d-%d", round, i), 1)
					begin := time.Now()
					w.send(p, cs)
					<-feed
					took = append(took, time.Since(begin))
				}
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}
