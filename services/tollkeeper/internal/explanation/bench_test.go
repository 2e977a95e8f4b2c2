package explanation

import (
	"fmt"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
)

// BenchmarkExplain: a crossing after 200,000 calls, all of which fed the counter,
// in frames of some sizes, and after that among as many calls of others.
func BenchmarkExplain(b *testing.B) {
	const calls = 200_000
	for _, c := range []struct {
		name          string
		frame, others int
	}{{"frames of 1000", 1000, 0}, {"frames of 20", 20, 0}, {"frames of 1", 1, 0}, {"frames of 1000 with 10 times others", 1000, 10}} {
		b.Run(c.name, func(b *testing.B) {
			w := newExplained(b)
			w.plans("v1", plan("free", lifetime("calls", usage.Calls, calls)))
			w.accounts("acme", usage.Account{ID: "acme", Plan: "free"}, usage.Account{ID: "team", Parent: "acme"})
			shard := w.shard("acme")
			for n := 0; n < calls; n += c.frame {
				var list []usage.Call
				for i := range c.frame {
					list = append(list, w.call("team", "m", 1))
					for k := range c.others {
						list = append(list, w.call(fmt.Sprint("other-", (n+i)*7%5000+k), "m", 1))
					}
				}
				for len(list) > 0 {
					part := list[:min(len(list), ledger.MaxFrameCalls)]
					list = list[len(part):]
					w.number[shard]++
					if _, err := w.js.PublishMsgAsync(w.frame(shard, w.producer, w.number[shard], part)); err != nil {
						b.Fatal(err)
					}
				}
				if n/c.frame%2000 == 1999 {
					<-w.js.PublishAsyncComplete()
				}
			}
			<-w.js.PublishAsyncComplete()
			stop := w.count()
			d := w.decided("acme", "acme", "free/calls", usage.Deny)
			stop()
			var first, second time.Duration
			for b.Loop() {
				x := explain.New(explain.Options{JS: w.js})
				begin := time.Now()
				e, err := x.Explain(b.Context(), explain.Query{ID: d.ID, Limit: 100})
				if err != nil || !e.Replay.Same || e.Fed.Calls != calls {
					b.Fatalf("%v, %+v", err, e)
				}
				first += time.Since(begin)
				begin = time.Now()
				if e, err = x.Explain(b.Context(), explain.Query{ID: d.ID, Limit: 100, Cursor: e.NextCursor}); err != nil || len(e.Calls) != 100 {
					b.Fatalf("%v, %d calls", err, len(e.Calls))
				}
				second += time.Since(begin)
			}
			b.ReportMetric(float64(first.Milliseconds())/float64(b.N), "first-page-ms")
			b.ReportMetric(float64(second.Microseconds())/1000/float64(b.N), "second-page-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}
