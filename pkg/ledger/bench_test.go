//go:build unix

package ledger

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// traffic draws calls as an LLM API's gateway sees them: 100,000 accounts by a
// Zipf law with a key each, 5 models, 3 routes, mostly 200, tokens and duration.
func traffic(n int, ids bool) []usage.Call {
	rng := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(rng, 1.1, 1, 99_999)
	models := []string{"gpt-4o", "gpt-4o-mini", "claude-sonnet", "llama-3-70b", "embedding-small"}
	routes := []string{"/v1/chat/completions", "/v1/embeddings", "/v1/responses"}
	status := []uint16{200, 200, 200, 200, 200, 200, 200, 200, 429, 500}
	calls := make([]usage.Call, n)
	at := usage.Micros(1_760_000_000_000_000)
	for i := range calls {
		a := zipf.Uint64()
		at += usage.Micros(rng.IntN(200))
		c := usage.Call{
			Time: at, Account: fmt.Sprintf("acct_%06d", a), KeyID: fmt.Sprintf("key_%06d", a), Method: "POST",
			Route: routes[rng.IntN(3)], Model: models[rng.IntN(5)], Status: status[rng.IntN(10)],
			Duration: 200_000 + rng.Int64N(5_000_000), Currency: "",
		}
		c.Quantities.SetBuiltIn(usage.InputTokensIndex, rng.Int64N(4000))
		c.Quantities.SetBuiltIn(usage.OutputTokensIndex, rng.Int64N(1000))
		if ids {
			c.RequestID = ksuid.New().String()
			for k := range c.TraceID {
				c.TraceID[k] = byte(rng.Uint32())
			}
			for k := range c.SpanID {
				c.SpanID[k] = byte(rng.Uint32())
			}
			c.TraceFlags = 1
		}
		calls[i] = c
	}
	return calls
}

var benchSizes = []int{1, 10, 100, 1000}

func benchKinds(b *testing.B, run func(b *testing.B, calls []usage.Call, n int)) {
	for _, ids := range []bool{false, true} {
		for _, n := range benchSizes {
			b.Run(fmt.Sprintf("ids=%v/%d", ids, n), func(b *testing.B) {
				b.ReportAllocs()
				run(b, traffic(2_000, ids), n)
			})
		}
	}
}

// BenchmarkBuild gathers and seals frames; its figures are for one event.
func BenchmarkBuildColumnar(b *testing.B) {
	benchKinds(b, func(b *testing.B, calls []usage.Call, n int) {
		var builder Builder
		h := exampleHeader()
		bytes, k := 0, 0
		spent := cpu(b)
		for b.Loop() {
			for range n {
				builder.Add(&calls[k])
				if k++; k == len(calls) {
					k = 0
				}
			}
			bytes += len(builder.Seal(h))
		}
		perEvent(b, n, bytes, spent)
	})
}

func BenchmarkBuildProtobuf(b *testing.B) {
	benchKinds(b, func(b *testing.B, calls []usage.Call, n int) {
		h := exampleHeader()
		bytes, k := 0, 0
		spent := cpu(b)
		for b.Loop() {
			data, err := MarshalProtobuf(h, calls[k:k+n])
			if err != nil {
				b.Fatal(err)
			}
			bytes += len(data)
			if k += n; k+n > len(calls) {
				k = 0
			}
		}
		perEvent(b, n, bytes, spent)
	})
}

func perEvent(b *testing.B, n, bytes int, spent func() time.Duration) {
	events := float64(b.N) * float64(n)
	b.ReportMetric(float64(spent().Nanoseconds())/events, "cpu-ns/event")
	b.ReportMetric(float64(bytes)/events, "B/event")
}

// cpu returns what this process has spent since, garbage collection included:
// what else the machine does must not be in the figures.
func cpu(b *testing.B) func() time.Duration {
	now := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	began := now()
	return func() time.Duration { return now() - began }
}

func benchDecode(b *testing.B, codec string, write func(h Header, calls []usage.Call) []byte) {
	benchKinds(b, func(b *testing.B, calls []usage.Call, n int) {
		var frames [][]byte
		for k := 0; k+n <= len(calls) && len(frames) < 200; k += n {
			frames = append(frames, write(exampleHeader(), calls[k:k+n]))
		}
		header := nats.Header{CodecHeader: {codec}}
		var f Frame
		bytes, k := 0, 0
		spent := cpu(b)
		for b.Loop() {
			if err := DecodeCalls(&f, "calls.3", header, frames[k]); err != nil {
				b.Fatal(err)
			}
			bytes += len(frames[k])
			if k++; k == len(frames) {
				k = 0
			}
		}
		perEvent(b, n, bytes, spent)
	})
}

func BenchmarkDecodeColumnar(b *testing.B) { benchDecode(b, CodecColumnar, seal) }

func BenchmarkDecodeProtobuf(b *testing.B) {
	benchDecode(b, CodecProtobuf, func(h Header, calls []usage.Call) []byte {
		data, err := MarshalProtobuf(h, calls)
		if err != nil {
			b.Fatal(err)
		}
		return data
	})
}

// BenchmarkUnmarshalProtobuf is the part of reading protobuf that nobody can
// leave out, without checks and columns.
func BenchmarkUnmarshalProtobuf(b *testing.B) {
	benchKinds(b, func(b *testing.B, calls []usage.Call, n int) {
		data, err := MarshalProtobuf(exampleHeader(), calls[:n])
		if err != nil {
			b.Fatal(err)
		}
		bytes := 0
		spent := cpu(b)
		for b.Loop() {
			var m tollkeeperv1.Frame
			if err := proto.Unmarshal(data, &m); err != nil {
				b.Fatal(err)
			}
			bytes += len(data)
		}
		perEvent(b, n, bytes, spent)
	})
}

// BenchmarkAdd is a call's own cost at the gateway, sealing at the bounds.
func BenchmarkAdd(b *testing.B) {
	for _, ids := range []bool{false, true} {
		b.Run(fmt.Sprintf("ids=%v", ids), func(b *testing.B) {
			calls := traffic(2_000, ids)
			var builder Builder
			h := exampleHeader()
			frames, k := 0, 0
			b.ReportAllocs()
			spent := cpu(b)
			for b.Loop() {
				builder.Add(&calls[k])
				if builder.Full() {
					builder.Seal(h)
					frames++
				}
				if k++; k == len(calls) {
					k = 0
				}
			}
			b.ReportMetric(float64(spent().Nanoseconds())/float64(b.N), "cpu-ns/event")
			b.ReportMetric(float64(b.N)/float64(max(frames, 1)), "events/frame")
		})
	}
}
