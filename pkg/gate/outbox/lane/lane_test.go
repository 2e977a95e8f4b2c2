package lane

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// The memory bound rests on this: a frame is never larger than what its calls
// were charged, however unlucky they are.
func TestAFrameIsWithinItsCharge(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 7))
	text := func(max int) string {
		if r.IntN(3) == 0 {
			return ""
		}
		b := make([]byte, r.IntN(max+1))
		for i := range b {
			b[i] = byte('a' + r.IntN(26))
		}
		return string(b)
	}
	number := func() int64 { return r.Int64N(usage.MaxQuantity) >> r.IntN(53) }
	for range 300 {
		var b ledger.Builder
		charge := int64(0)
		longest := 1 + r.IntN(usage.MaxIDBytes)
		own := r.IntN(2) * usage.MaxCustomMeters
		for n := 1 + r.IntN(1200); n > 0 && !b.Full(); n-- {
			c := usage.Call{
				Time: usage.Micros(r.Int64()) >> r.IntN(30), Account: text(longest) + "x", KeyID: text(longest), RequestID: text(longest), Method: text(9), Route: text(longest),
				Model: text(longest), Region: text(9), Status: uint16(r.IntN(1000)), Code: usage.Code(text(9)), DecisionID: text(27), Duration: number(),
				Flags: usage.Flags(r.Uint32()), TraceFlags: byte(r.IntN(256)), Source: text(longest), EventID: text(longest), PriceVersion: text(9), Currency: text(3),
			}
			if r.IntN(2) == 0 {
				c.TraceID[3], c.SpanID[3] = 1, 1
			}
			for i := range usage.BuiltIn(usage.NumBuiltIn) {
				if r.IntN(2) == 0 {
					c.Quantities.SetBuiltIn(i, number())
				}
			}
			for range own {
				c.Quantities.Set(usage.Meter("m"+strings.Repeat("x", r.IntN(60))), number())
			}
			charge += Charge(&c)
			b.Add(&c)
		}
		calls := b.Len()
		frame := b.Seal(ledger.Header{Producer: ksuid.Max, Shard: ledger.MaxShards, Number: 1 << 62, Gateway: strings.Repeat("g", MaxGateway), SealedAt: 1 << 62})
		if int64(len(frame)) > charge {
			t.Fatalf("a frame of %d calls has %d bytes, charged were %d", calls, len(frame), charge)
		}
	}
}

func TestPausesGrowToABound(t *testing.T) {
	t.Parallel()
	l := New(ksuid.New(), 0, "")
	l.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a"}, 1000, 1)
	now := usage.Micros(1_000_000)
	var last usage.Micros
	for range 12 {
		f, _ := l.Publish(now)
		if f == nil {
			t.Fatal("nothing to send")
		}
		l.Failed(f.Number, now, 0)
		if again, _ := l.Publish(now); again != nil {
			t.Fatal("sent again without a pause")
		}
		last = l.retryAt - now
		now += last
	}
	if last != lastPause {
		t.Errorf("the last pause is %d µs", last)
	}
	if f, _ := l.Publish(now); f.Sends != 13 {
		t.Errorf("sent %d times", f.Sends)
	}
	l.Lost()
	if f, _ := l.Publish(now); f == nil {
		t.Error("after a reconnection there is a pause")
	}
}
