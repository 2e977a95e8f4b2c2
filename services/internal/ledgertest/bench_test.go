package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

// BenchmarkFrameSize says what the ledger takes from eight shards, each with
// one unacknowledged frame, when every frame is synced before it is
// acknowledged: what a gateway's bounds of a frame rest on.
func BenchmarkFrameSize(b *testing.B) {
	for _, size := range []int{4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s, err := embednats.Start(b.Context(), embednats.Options{StoreDir: b.TempDir(), MaxFile: 100 << 30, Logger: zerolog.Nop()})
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := s.Stop(context.Background()); err != nil {
					b.Error(err)
				}
			}()
			nc, err := nats.Connect(s.ClientURL())
			if err != nil {
				b.Fatal(err)
			}
			defer nc.Close()
			js, err := jetstream.New(nc)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := ledger.Provision(b.Context(), js, ledger.ProvisionOptions{}); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(size))
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ResetTimer()
			var wg sync.WaitGroup
			for shard := range uint32(8) {
				wg.Go(func() {
					m := ledger.FrameMessage(shard, make([]byte, size))
					for left.Add(-1) >= 0 {
						if _, err := js.PublishMsg(b.Context(), m); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
		})
	}
}

// BenchmarkRead reads what a stream holds, entries of 4 KiB, from its beginning.
func BenchmarkRead(b *testing.B) {
	const n = 20_000
	server, err := embednats.Start(b.Context(), embednats.Options{StoreDir: b.TempDir(), Logger: zerolog.Nop(), Sync: time.Minute, MaxFile: 100 << 30})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = server.Stop(context.Background()) }()
	nc, err := nats.Connect(server.ClientURL())
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := ledger.Provision(b.Context(), js, ledger.ProvisionOptions{}); err != nil {
		b.Fatal(err)
	}
	for range n {
		if _, err := js.PublishAsync("calls.0", make([]byte, 4096)); err != nil {
			b.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
	enough := errors.New("enough")
	for b.Loop() {
		left := n
		err := ledger.Read(b.Context(), js, ledger.ReadOptions{Stream: ledger.Stream}, func(ledger.Message) error {
			if left--; left == 0 {
				return enough
			}
			return nil
		})
		if !errors.Is(err, enough) {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}
