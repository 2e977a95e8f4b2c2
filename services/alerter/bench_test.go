package alerter

import (
	"fmt"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/seen"
)

// BenchmarkFold is the whole way of a frame of 1,000 calls of 100,000 accounts
// through decoding, de-duplication and the default rule.
func BenchmarkFold(b *testing.B) {
	o := Options{}
	o.setDefaults()
	m, err := newMetrics(newRegistry())
	if err != nil {
		b.Fatal(err)
	}
	e := newEvaluator(&o, nil, m, nopReadiness{})
	at := time.Now()
	producer := ksuid.New()
	var builder ledger.Builder
	frames := make([][]byte, 100)
	for i := range frames {
		for k := range ledger.MaxFrameCalls {
			builder.Add(&usage.Call{Time: usage.At(at), Account: fmt.Sprintf("account-%d", i*ledger.MaxFrameCalls+k), Status: 200, RequestID: fmt.Sprint(k)})
		}
		frames[i] = builder.Seal(ledger.Header{Producer: producer, Shard: 1, Number: uint64(i + 1), SealedAt: usage.At(at)})
	}
	msg := ledger.Message{Subject: ledger.CallsSubject(1), Header: map[string][]string{ledger.CodecHeader: {ledger.CodecColumnar}}}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if i%len(frames) == 0 {
			e.seen = seen.New(0) // the frames come again
		}
		msg.Sequence++
		at = at.Add(time.Millisecond)
		msg.Time, msg.Data = at, frames[i%len(frames)]
		if err := e.handle(b.Context(), msg); err != nil {
			b.Fatal(err)
		}
		i++
	}
	b.ReportMetric(float64(b.N)*ledger.MaxFrameCalls/b.Elapsed().Seconds(), "calls/s")
}
