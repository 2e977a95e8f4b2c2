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
				Rows: madeUpTrace(6000, 20), Speed: 3, Concurrency: 16, Wait: time.Minute, NATS: s.natsOptions(), ClickHouse: s.historyOptions(),
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
			if report.Seen.Failures > 0 {
				t.Errorf("%d calls got no answer, the last: %v", report.Seen.Failures, report.Seen.LastError)
			}
			if got := report.Ledger.Admitted; got != 6000 {
				t.Errorf("the ledger has %d admitted calls, sent were 6000", got)
			}
		})
	}
}

// A gateway that is killed may take with it what it had answered and not sent;
// what it had sent (acknowledged or spooled) is in ledger, counters and
// ClickHouse, each call once. With spool-before-answer nothing that was answered
// is missing.
func TestAKilledGatewayLosesNothingItHadSent(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	for _, safe := range []bool{false, true} {
		t.Run(fmt.Sprintf("spool before answer %v", safe), func(t *testing.T) {
			ctx := within(t, 2*time.Minute)
			restarted := make(chan struct{})
			dir := t.TempDir()
			report, err := tollkeeper.Replay(ctx, tollkeeper.ReplayOptions{
				Rows: madeUpTrace(6000, 20), Speed: 3, Concurrency: 16, Wait: time.Minute, NATS: s.natsOptions(), ClickHouse: s.historyOptions(), Logger: zerolog.Nop(),
				Gateway: func(upstream string) (tollkeeper.ReplayGateway, error) {
					g := s.gateway(upstream, dir, safe)
					return g, g.Await(ctx)
				},
				Halfway: func() {
					go func() {
						defer close(restarted)
						s.kill("gateway")
						s.restart("gateway")
					}()
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			<-restarted
			answered, counted := report.Clients.Admitted, report.Ledger.Admitted
			t.Logf("clients saw %d calls answered and %d unanswered (last: %v); the ledger has %d: %d more were answered than sent", answered, report.Seen.Failures, report.Seen.LastError, counted, max(answered-counted, 0))
			if !report.Ledger.Equal(report.Counters) || !report.Ledger.Equal(report.History) {
				t.Errorf("ledger %+v, counters %+v, ClickHouse %+v", report.Ledger, report.Counters, report.History)
			}
			if report.Seen.Failures == 0 {
				t.Error("no call was under way when the gateway was killed: the test shows nothing")
			}
			if counted > answered+report.Seen.Failures {
				t.Errorf("the ledger has %d calls, %d were sent at most", counted, answered+report.Seen.Failures)
			}
			if safe && counted < answered {
				t.Errorf("%d answered calls are missing, with spool-before-answer", answered-counted)
			}
		})
	}
}
