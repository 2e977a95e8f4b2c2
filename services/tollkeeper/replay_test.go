package tollkeeper_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// checked prints the report of a replay and wants it to be right.
func checked(t *testing.T, report *replay.Report, err error) *replay.Report {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := report.Write(&out); err != nil {
		t.Fatal(err)
	}
	t.Log(out.String())
	if err := report.Err(); err != nil {
		t.Error(err)
	}
	return report
}

// replay replays into a Tollkeeper that runs.
func (s *system) replay(t *testing.T, o tollkeeper.ReplayOptions) *replay.Report {
	t.Helper()
	o.NATS, o.ClickHouse, o.SpoolDir, o.Logger = s.natsOptions(), s.historyOptions(), t.TempDir(), zerolog.Nop()
	o.Wait = time.Minute
	report, err := tollkeeper.Replay(within(t, 2*time.Minute), o)
	return checked(t, report, err)
}

// generated makes rows of some accounts in the order of their times, and prints the
// seed. Some know all their tokens, some a part, some nothing.
func generated(t *testing.T, n, accounts int, next func(r *rand.Rand, at time.Time) time.Time) []trace.Row {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 402))
	at := time.Date(2024, 2, 28, 23, 58, 0, 0, time.UTC)
	rows := make([]trace.Row, n)
	for i := range rows {
		at = next(r, at)
		row := trace.Row{Time: at, Account: fmt.Sprintf("a%d", r.IntN(accounts)), Method: "POST", Route: "chat", Model: "m", File: "generated", Line: i + 1}
		if r.IntN(4) > 0 {
			row.Meters = append(row.Meters, usage.Quantity{Meter: usage.InputTokens, Value: r.Int64N(500)})
		}
		if r.IntN(4) > 0 {
			row.Meters = append(row.Meters, usage.Quantity{Meter: usage.OutputTokens, Value: r.Int64N(50)})
		}
		rows[i] = row
	}
	return rows
}

// What a trace knows goes through gateway, ledger, counters and ClickHouse without a
// call or a token lost or doubled; what it does not know stays unknown at all points.
func TestAGeneratedTraceIsConserved(t *testing.T) {
	t.Parallel()
	s := newSystem(t)
	rows := generated(t, 3_000, 20, func(r *rand.Rand, at time.Time) time.Time {
		return at.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
	})
	want := map[usage.Meter]int64{}
	for _, row := range rows {
		for _, q := range row.Meters {
			want[q.Meter] += q.Value
		}
	}
	t.Run("without limits", func(t *testing.T) {
		report := s.replay(t, tollkeeper.ReplayOptions{Rows: rows, KeepTime: true})
		for point, got := range points(report) {
			if got.Admitted != 3_000 || got.Refused != 0 || got.Meters[usage.InputTokens] != want[usage.InputTokens] || got.Meters[usage.OutputTokens] != want[usage.OutputTokens] {
				t.Errorf("%s has %+v, want 3,000 calls and %v", point, got, want)
			}
		}
		if report.Unreported[usage.InputTokens] < 600 || report.Unreported[usage.OutputTokens] < 600 {
			t.Errorf("about 750 calls report none of each: %v", report.Unreported)
		}
	})
	t.Run("with an eventual limit for life", func(t *testing.T) {
		report := s.replay(t, tollkeeper.ReplayOptions{Rows: rows, Limits: []plans.Limit{{ID: "calls", Meter: "calls", Window: "lifetime", Amount: 50, Tier: "eventual"}}})
		for point, got := range points(report) {
			if got.Admitted+got.Refused != 3_000 || got.Admitted < 1_000 {
				t.Errorf("%s has %d admitted and %d refused calls of 3,000, the limit of 20 accounts being 50", point, got.Admitted, got.Refused)
			}
		}
		// Report.Err has compared what went over with the bound.
		if len(report.Limits) != 1 || report.Limits[0].Windows != 20 {
			t.Errorf("limits: %+v", report.Limits)
		}
	})
	t.Run("broken off half way", func(t *testing.T) {
		ctx, cancel := context.WithCancel(within(t, time.Minute))
		report, err := tollkeeper.Replay(ctx, tollkeeper.ReplayOptions{
			Rows: rows, Halfway: cancel, Wait: time.Minute, NATS: s.natsOptions(), ClickHouse: s.historyOptions(), SpoolDir: t.TempDir(), Logger: zerolog.Nop(),
		})
		if !errors.Is(err, tollkeeper.ErrInterrupted) || report == nil {
			t.Fatalf("report %v, error %v", report, err)
		}
		checked(t, report, nil)
		if n := report.Clients.Admitted; n < 1_500 || n >= 3_000 || !report.Interrupted || report.Ledger.Admitted != n {
			t.Errorf("clients saw %d calls, the ledger has %d; about half of 3,000 were sent", n, report.Ledger.Admitted)
		}
	})
	nc, err := natsconn.Connect(t.Context(), s.natsOptions())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	now, err := (&plans.Applier{JS: js, NC: nc}).Current(t.Context())
	if err != nil || len(now.Document.Accounts) != 0 || len(now.Document.Plans) != 0 {
		t.Errorf("the replays have left %d accounts and %d plans (%v)", len(now.Document.Accounts), len(now.Document.Plans), err)
	}
}

// oracle says which rows an exact limit refuses.
func oracle(rows []trace.Row, limits []plans.Limit) []int {
	used := map[string]int64{}
	var refused []int
	for i, row := range rows {
		fits := true
		cell := func(l plans.Limit) string {
			kind, _ := window.Parse(usage.WindowKind(l.Window))
			return fmt.Sprint(row.Account, l.ID, kind.Number(usage.At(row.Time)))
		}
		for _, l := range limits {
			fits = fits && used[cell(l)] < l.Amount
		}
		if !fits {
			refused = append(refused, i)
			continue
		}
		for _, l := range limits {
			used[cell(l)]++
		}
	}
	return refused
}

// A trace of years ago is refused where it would have been then, at the same rows every
// time: over a leap day and the ends of months, with gaps of days, many rows of one
// moment, and rows at the very ends of windows.
func TestAHistoricalTraceIsRefusedByItsOwnDaysAtTheSameRowsEveryTime(t *testing.T) {
	t.Parallel()
	rows := generated(t, 1_500, 3, func(r *rand.Rand, at time.Time) time.Time {
		switch r.IntN(40) {
		case 0:
			return at.Add(time.Duration(r.IntN(72)) * time.Hour)
		case 1, 2:
			return at.Truncate(time.Minute).Add(time.Minute - time.Duration(r.IntN(3))*time.Microsecond)
		case 3:
			return at.Truncate(24 * time.Hour).Add(24 * time.Hour)
		}
		return at.Add(time.Duration(r.IntN(3)) * time.Second * time.Duration(r.IntN(2)))
	})
	limits := []plans.Limit{
		{ID: "minute", Meter: "calls", Window: "minute", Amount: 4, Tier: "exact"},
		{ID: "day", Meter: "calls", Window: "day", Amount: 9, Tier: "exact"},
		{ID: "month", Meter: "calls", Window: "month", Amount: 60, Tier: "exact"},
	}
	want := oracle(rows, limits)
	if len(want) < 100 || len(want) > 1_400 {
		t.Fatalf("%d of 1,500 rows are to be refused: that shows little", len(want))
	}
	report := replayAlone(t, tollkeeper.ReplayOptions{Rows: rows, Limits: limits, Concurrency: 8})
	var got []int
	for _, x := range report.Refused {
		got = append(got, x.Row)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d rows are refused, want %d; the first that differ are %v", len(got), len(want), firstDifferent(got, want, rows))
	}
}

func firstDifferent(got, want []int, rows []trace.Row) string {
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			at := func(all []int) string {
				if i >= len(all) {
					return "none"
				}
				return fmt.Sprintf("%d (%s, %s)", all[i], rows[all[i]].Account, rows[all[i]].Time.Format(time.RFC3339Nano))
			}
			return "got " + at(got) + ", want " + at(want)
		}
	}
	return "none"
}

// A day's limit is kept in each tier as it states, and a trace from the future can be
// replayed too. Report.Err compares each with its bound.
func TestHistoricalTracesAreLimitedInEveryTier(t *testing.T) {
	t.Parallel()
	rows := generated(t, 500, 2, func(r *rand.Rand, at time.Time) time.Time { return at.Add(time.Duration(r.IntN(900)) * time.Second) })
	for i := range rows {
		rows[i].Time = rows[i].Time.AddDate(60, 0, 0)
	}
	report := replayAlone(t, tollkeeper.ReplayOptions{Rows: rows, Limits: []plans.Limit{
		{ID: "eventual", Meter: "calls", Window: "hour", Amount: 1, Tier: "eventual"},
		{ID: "leased", Meter: "calls", Window: "day", Amount: 15, Tier: "leased", Lease: &plans.Lease{ReleaseAfter: "10s", MaxExposure: 2}},
		{ID: "tokens", Meter: "input_tokens", Window: "day", Amount: 5_000, Tier: "exact"},
	}})
	for _, l := range report.Limits {
		if l.Windows == 0 {
			t.Errorf("limit %s was never reached: that shows nothing", l.ID)
		}
	}
	if report.Clients.Refused == 0 || report.Clients.Admitted < 50 {
		t.Errorf("admitted %d, refused %d", report.Clients.Admitted, report.Clients.Refused)
	}
}

// What would limit nothing is refused, and says what to do.
func TestTimesThatTheLedgerCanNotHaveAreRefused(t *testing.T) {
	t.Parallel()
	day := []plans.Limit{{ID: "calls", Meter: "calls", Window: "day", Amount: 5, Tier: "exact"}}
	life := []plans.Limit{{ID: "calls", Meter: "calls", Window: "lifetime", Amount: 5, Tier: "exact"}}
	at := func(t time.Time) []trace.Row { return []trace.Row{{Time: t, Account: "a", File: "x.csv", Line: 2}} }
	for name, c := range map[string]struct {
		rows   []trace.Row
		limits []plans.Limit
		want   string
	}{
		"yesterday, by the day":   {at(time.Now().Add(-24 * time.Hour)), day, "use --isolated"},
		"now, by the day":         {at(time.Now()), day, "use --isolated"},
		"tomorrow":                {at(time.Now().Add(24 * time.Hour)), nil, "x.csv:2 is of"},
		"tomorrow, for life":      {at(time.Now().Add(24 * time.Hour)), life, "use --isolated"},
		"before 2000":             {at(time.Date(1995, 7, 1, 0, 0, 0, 0, time.UTC)), nil, "leave out --keep-time"},
		"before 2000, isolated":   {at(time.Date(1995, 7, 1, 0, 0, 0, 0, time.UTC)), day, "leave out --keep-time"},
		"nothing after a filter":  {nil, day, "the trace has no rows"},
		"the year 2200, isolated": {at(time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)), nil, "times from 2000 to 2199"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			target := tollkeeper.ReplayTarget{NATS: natsconn.Options{URL: "nats://127.0.0.1:1"}, Out: t.Output(), Logger: zerolog.Nop()}
			if strings.Contains(name, "isolated") {
				target = tollkeeper.ReplayTarget{Isolated: true, Out: t.Output(), Logger: zerolog.Nop()}
			}
			_, err := tollkeeper.ReplayInto(within(t, 10*time.Second), target, tollkeeper.ReplayOptions{Rows: c.rows, Limits: c.limits, KeepTime: true})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to contain %q", err, c.want)
			}
		})
	}
}
