package tollkeeper_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// sharedData returns a file of the data that stands beside the repository. It is
// not a part of it: without it the test is skipped, loudly, but not in CI.
func sharedData(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("TOLLKEEPER_SHARED_DATA")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "data")
	}
	file := filepath.Join(dir, name)
	_, err := os.Stat(file)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist) && os.Getenv("CI") != "true":
		t.Skipf("NOT RUN: %s is not there; put the shared data beside the repository or name it with TOLLKEEPER_SHARED_DATA", file)
	default:
		t.Fatal(err)
	}
	return file
}

func azure(t *testing.T, name string) []trace.Row {
	t.Helper()
	file := sharedData(t, filepath.Join("azure-llm-2023", "AzureLLMInferenceTrace_"+name+".csv"))
	r, f, err := trace.Open("azure-llm", file, trace.Mapping{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	rows, err := trace.Load(r, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// The published hour of two real services goes through gateway, ledger, counters
// and ClickHouse without a call or a token lost or doubled.
func TestTheAzureTracesAreConserved(t *testing.T) {
	t.Parallel()
	conv, code := azure(t, "conv"), azure(t, "code")
	s := newSystem(t)
	run := func(t *testing.T, rows []trace.Row, limits ...plans.Limit) *replay.Report {
		t.Helper()
		report, err := tollkeeper.Replay(within(t, 2*time.Minute), tollkeeper.ReplayOptions{
			Rows: rows, Limits: limits, KeepTime: len(limits) == 0, NATS: s.natsOptions(), ClickHouse: s.historyOptions(), SpoolDir: t.TempDir(), Logger: zerolog.Nop(),
		})
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
	points := func(r *replay.Report) map[string]replay.Totals {
		return map[string]replay.Totals{"gateway": r.Gateway, "ledger": r.Ledger, "counters": r.Counters, "ClickHouse": r.History}
	}
	for name, want := range map[string]struct {
		rows                 []trace.Row
		calls, input, output int64
	}{
		"conv": {conv, 19_366, 22_361_870, 4_088_665},
		"code": {code, 8_819, 18_059_974, 245_896},
	} {
		t.Run(name, func(t *testing.T) {
			for point, got := range points(run(t, want.rows)) {
				if got.Admitted != want.calls || got.Refused != 0 || got.Meters[usage.InputTokens] != want.input || got.Meters[usage.OutputTokens] != want.output {
					t.Errorf("%s has %+v, want %d calls, %d and %d tokens", point, got, want.calls, want.input, want.output)
				}
			}
		})
	}
	t.Run("conv with a lifetime limit of 10,000 calls", func(t *testing.T) {
		report := run(t, conv, plans.Limit{ID: "calls", Meter: "calls", Window: "lifetime", Amount: 10_000, Tier: "eventual"})
		for point, got := range points(report) {
			if got.Admitted+got.Refused != 19_366 || got.Admitted < 10_000 {
				t.Errorf("%s has %d admitted and %d refused calls of 19,366, the limit being 10,000", point, got.Admitted, got.Refused)
			}
		}
		if len(report.Overshoots) != 1 {
			t.Fatalf("overshoots: %+v", report.Overshoots)
		}
		// Report.Err has compared it with the bound.
		if o := report.Overshoots[0]; o.Bound <= 0 || o.DecisionLatency <= 0 {
			t.Errorf("the overshoot is stated without a bound: %+v", o)
		}
	})
}
