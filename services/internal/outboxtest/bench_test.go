package outboxtest

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const benchShards = 8

func calls() []*usage.Call {
	out := make([]*usage.Call, 1<<14)
	for i := range out {
		out[i] = call(i)
	}
	return out
}

// BenchmarkAdd is what a call costs its gateway's request: Add alone, with
// memory enough that it never waits. Run with a fixed -benchtime, such as
// 1000000x.
func BenchmarkAdd(b *testing.B) {
	r := newRig(b)
	o := open(b, outbox.Options{NATS: r.connect(), Shards: benchShards, MemoryBytes: 8 << 30})
	run(b, o)
	cs := calls()
	var worker atomic.Uint32
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		ctx := context.Background()
		for i := worker.Add(1) * 1000; pb.Next(); i++ {
			if err := o.Add(ctx, i%benchShards, cs[i%uint32(len(cs))]); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.StopTimer()
	flush(b, o)
	if err := o.Close(context.Background()); err != nil {
		b.Error(err)
	}
}

// BenchmarkAddToAcked is the way from Add to the ledger's fsync.
func BenchmarkAddToAcked(b *testing.B) {
	for name, opts := range map[string]outbox.Options{
		"memory":            {},
		"spoolBeforeAnswer": {SpoolBeforeAnswer: true},
	} {
		for _, inProcess := range []bool{false, true} {
			transport := "/tcp"
			if inProcess {
				transport = "/in-process"
			}
			b.Run(name+transport, func(b *testing.B) {
				r := newRig(b)
				opts.NATS = r.connect()
				if inProcess {
					nc, err := nats.Connect("", nats.InProcessServer(r.s.InProcess()))
					if err != nil {
						b.Fatal(err)
					}
					b.Cleanup(nc.Close)
					opts.NATS = nc
				}
				opts.Shards = benchShards
				if opts.SpoolBeforeAnswer {
					opts.SpoolDir = b.TempDir()
					b.SetParallelism(256) // requests that wait for the disk together
				}
				o := open(b, opts)
				run(b, o)
				cs := calls()
				var worker atomic.Uint32
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					ctx := context.Background()
					for i := worker.Add(1) * 1000; pb.Next(); i++ {
						if err := o.Add(ctx, i%benchShards, cs[i%uint32(len(cs))]); err != nil {
							b.Error(err)
							return
						}
					}
				})
				flush(b, o)
				b.StopTimer()
				st := o.Stats()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
				b.ReportMetric(float64(st.Acked)/float64(max(st.Frames, 1)), "calls/frame")
				if err := o.Close(context.Background()); err != nil {
					b.Error(err)
				}
			})
		}
	}
}
