package tollkeeper_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// madeUpTrace is n calls of some accounts, a millisecond apart; it is load, not
// a finding.
func madeUpTrace(n, accounts int) []trace.Row {
	rows := make([]trace.Row, n)
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range rows {
		rows[i] = trace.Row{
			Time: start.Add(time.Duration(i) * time.Millisecond), Account: fmt.Sprintf("acct-%d", i%accounts), Model: "m",
			Meters: []usage.Quantity{{Meter: usage.InputTokens, Value: int64(i%977 + 1)}, {Meter: usage.OutputTokens, Value: int64(i % 211)}},
		}
	}
	return rows
}

// Whatever is killed in the middle of a replay and started again, gateway,
// ledger, counters and ClickHouse agree on every call and token, and the clients
// notice nothing.
func TestKilledInTheMiddleOfAReplayNothingIsLostOrDoubled(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	for _, victim := range []string{"aggregator", "historian", "nats", "clickhouse"} {
		// One system after the other victim: what the first kill left must not
		// harm the second replay either.
		t.Run(victim, func(t *testing.T) {
			ctx := within(t, 2*time.Minute)
			restarted := make(chan struct{})
			report, err := tollkeeper.Replay(ctx, tollkeeper.ReplayOptions{
				Rows: madeUpTrace(6000, 20), Speed: 3, Concurrency: 16, NATS: s.natsOptions(), ClickHouse: s.historyOptions(),
				SpoolDir: t.TempDir(), Logger: zerolog.Nop(),
				Halfway: func() {
					go func() {
						defer close(restarted)
						s.kill(victim)
						s.start(victim)
					}()
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			<-restarted
			var out bytes.Buffer
			if err := report.Write(&out); err != nil {
				t.Fatal(err)
			}
			t.Log(strings.TrimSpace(out.String()))
			if err := report.Err(); err != nil {
				t.Error(err)
			}
			if report.Seen.Failed > 0 {
				t.Errorf("%d calls got no answer, the last: %v", report.Seen.Failed, report.Seen.LastError)
			}
			if got := report.Ledger.Admitted; got != 6000 {
				t.Errorf("the ledger has %d admitted calls, sent were 6000", got)
			}
		})
	}
}
