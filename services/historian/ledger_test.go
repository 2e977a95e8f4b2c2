package historian

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// clients writes calls to the ledger as gateways do and keeps count of what the
// history must say in the end.
type clients struct {
	w         *world
	r         *rand.Rand
	producers []ksuid.KSUID
	numbers   map[string]uint64
	last      uint64 // newest entry
	want      history.Totals
	resend    []*nats.Msg // frames that may come once more
	events    int
}

func newClients(w *world, seed uint64) *clients {
	return &clients{w: w, r: rand.New(rand.NewPCG(seed, 7)), producers: []ksuid.KSUID{ksuid.New(), ksuid.New()}, numbers: map[string]uint64{},
		want: history.Totals{ByCode: map[string]int64{}, Meters: map[usage.Meter]int64{}}}
}

func (c *clients) call() usage.Call {
	call := usage.Call{Time: usage.At(time.Now()), Account: fmt.Sprintf("acct-%02d", c.r.IntN(20)), KeyID: "k", Method: "POST", Route: "/v1/chat/completions", Model: []string{"small", "large"}[c.r.IntN(2)], Status: 200, Duration: 1000}
	if c.r.IntN(5) == 0 {
		call.Status, call.Code, call.DecisionID = 402, usage.QuotaExceeded, "d"
		return call
	}
	call.Quantities.Set(usage.InputTokens, c.r.Int64N(2000))
	if c.r.IntN(2) == 0 {
		call.Quantities.Set(usage.OutputTokens, c.r.Int64N(500))
	}
	if c.r.IntN(4) == 0 {
		call.Quantities.Set("pages", c.r.Int64N(9))
	}
	return call
}

func (c *clients) expect(call *usage.Call) {
	if !call.Admitted() {
		c.want.Refused++
		c.want.ByCode[string(call.Code)]++
		return
	}
	c.want.Admitted++
	for _, m := range []usage.Meter{usage.Calls, usage.InputTokens, usage.OutputTokens, "pages"} {
		if v, ok := call.Usage(m); ok {
			c.want.Meters[m] += v
		}
	}
}

func (c *clients) publish(m *nats.Msg) {
	c.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ack, err := c.w.js.PublishMsg(ctx, m)
	if err != nil {
		c.w.t.Fatal(err)
	}
	c.last = ack.Sequence
}

// frame sends a frame of n calls by a random producer.
func (c *clients) frame(n int) {
	c.w.t.Helper()
	p := c.producers[c.r.IntN(len(c.producers))]
	shard := uint32(c.r.IntN(testShards))
	var b ledger.Builder
	for range n {
		call := c.call()
		c.expect(&call)
		b.Add(&call)
	}
	key := fmt.Sprint(p, shard)
	c.numbers[key]++
	m := ledger.FrameMessage(shard, b.Seal(ledger.Header{Producer: p, Shard: shard, Number: c.numbers[key], Gateway: "gw", SealedAt: usage.At(time.Now())}))
	c.publish(m)
	c.resend = append(c.resend, m)
}

// again sends a frame that was sent before.
func (c *clients) again() {
	if len(c.resend) > 0 {
		m := c.resend[c.r.IntN(len(c.resend))]
		c.publish(&nats.Msg{Subject: m.Subject, Header: maps.Clone(m.Header), Data: m.Data})
	}
}

// foreign sends a CloudEvent, times times.
func (c *clients) foreign(times int) {
	c.events++
	data := fmt.Sprintf(`{"specversion":"1.0","id":"e-%d","source":"billing","type":%q,"subject":"acct-01","time":%q,"data":{"meters":{"input_tokens":7}}}`,
		c.events, ledger.CloudEventType, time.Now().UTC().Format(time.RFC3339Nano))
	for range times {
		c.publish(&nats.Msg{Subject: ledger.CallsSubject(1), Header: nats.Header{ledger.CodecHeader: {ledger.CodecCloudEvent}}, Data: []byte(data)})
	}
	c.want.Admitted++
	c.want.Meters[usage.Calls]++
	c.want.Meters[usage.InputTokens] += 7
}

// rubbish sends what can't be decoded.
func (c *clients) rubbish() {
	c.publish(&nats.Msg{Subject: ledger.CallsSubject(2), Header: nats.Header{ledger.CodecHeader: {ledger.CodecColumnar}}, Data: []byte("TKF1 is what it says, and nothing else it is")})
	c.publish(&nats.Msg{Subject: ledger.CallsSubject(3), Data: []byte("{}")})
}

// some sends a mixture of everything, about n frames.
func (c *clients) some(n int) {
	c.w.t.Helper()
	for range n {
		c.frame(1 + c.r.IntN(12))
		switch c.r.IntN(8) {
		case 0:
			c.again()
		case 1:
			c.foreign(1 + c.r.IntN(3))
		case 2:
			c.rubbish()
		}
	}
}

// agree waits until the history says what was sent, in the calls and in the
// rollups, and reports what it says when it does not.
func (c *clients) agree() {
	t := c.w.t
	t.Helper()
	c.frame(1) // always a last entry with rows
	eventually(t, "the history has the newest call", 30*time.Second, func() bool {
		last, err := c.w.h.Position(context.Background())
		return err == nil && last >= c.last
	})
	for _, rollup := range []bool{false, true} {
		var got history.Totals
		// The tables get a block at the same time, not one after the other.
		var diff string
		deadline := time.Now().Add(10 * time.Second)
		for {
			var err error
			if got, err = c.w.h.Totals(context.Background(), history.TotalsQuery{Rollup: rollup}); err != nil {
				t.Fatal(err)
			}
			if diff = c.differs(got); diff == "" || time.Now().After(deadline) {
				break
			}
		}
		if diff != "" {
			t.Errorf("rollup %v: %s", rollup, diff)
		}
	}
}

func (c *clients) differs(got history.Totals) string {
	if got.Admitted != c.want.Admitted || got.Refused != c.want.Refused {
		return fmt.Sprintf("%d admitted and %d refused calls in the history, %d and %d were sent", got.Admitted, got.Refused, c.want.Admitted, c.want.Refused)
	}
	for m, v := range c.want.Meters {
		if got.Meters[m] != v {
			return fmt.Sprintf("%s: %d in the history, %d were sent", m, got.Meters[m], v)
		}
	}
	if !maps.Equal(got.ByCode, c.want.ByCode) {
		return fmt.Sprintf("codes %v in the history, %v were sent", got.ByCode, c.want.ByCode)
	}
	return ""
}

func TestEveryCallIsInTheHistoryOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 1)
	c.some(30)
	w.start(w.options(), seams{})
	c.some(30)
	c.agree()
}
