package tollkeeper_test

import (
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

// testDataVariable names a folder with published traces, which are no part of the
// repository: azure-llm-2023/AzureLLMInferenceTrace_conv.csv and _code.csv.
const testDataVariable = "TOLLKEEPER_TEST_DATA"

func azure(t *testing.T, dir, name string) []trace.Row {
	t.Helper()
	f := trace.Format{Name: trace.Azure, Mapping: trace.Mapping{Times: trace.Times{Zone: time.UTC}}}
	r, closer, err := f.Open(filepath.Join(dir, "azure-llm-2023", "AzureLLMInferenceTrace_"+name+".csv"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = closer.Close() }()
	rows, err := trace.Load(r, nil, &trace.Bad{}, trace.LoadOptions{Most: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	trace.Sort(rows)
	return rows
}

// The published hour of two real services goes through gateway, ledger, counters
// and ClickHouse without a call or a token lost or doubled, and is refused where it
// would have been then. TestAGeneratedTraceIsConserved holds the same of made-up
// traffic, everywhere.
func TestTheAzureTracesAreConserved(t *testing.T) {
	t.Parallel()
	dir := os.Getenv(testDataVariable)
	if dir == "" {
		t.Skipf("NOT RUN: set %s to a folder with the published traces to run this test with real data", testDataVariable)
	}
	conv, code := azure(t, dir, "conv"), azure(t, dir, "code")
	s := newSystem(t)
	for name, want := range map[string]struct {
		rows                 []trace.Row
		calls, input, output int64
	}{
		"conv": {conv, 19_366, 22_361_870, 4_088_665},
		"code": {code, 8_819, 18_059_974, 245_896},
	} {
		t.Run(name, func(t *testing.T) {
			report := s.replay(t, tollkeeper.ReplayOptions{Rows: want.rows, KeepTime: true})
			for point, got := range points(report) {
				if got.Admitted != want.calls || got.Refused != 0 || got.Meters[usage.InputTokens] != want.input || got.Meters[usage.OutputTokens] != want.output {
					t.Errorf("%s has %+v, want %d calls, %d and %d tokens", point, got, want.calls, want.input, want.output)
				}
			}
		})
	}
	t.Run("conv by its own minutes, exact", func(t *testing.T) {
		limits := []plans.Limit{{ID: "calls", Meter: "calls", Window: "minute", Amount: 300, Tier: "exact"}}
		report := replayAlone(t, tollkeeper.ReplayOptions{Rows: conv, Limits: limits})
		if n := len(report.Refused); n != 2_760 || report.Refused[0].Line != 824 {
			t.Errorf("%d rows are refused, the first is %+v; want 2,760 from line 824 on", n, report.Refused[0])
		}
	})
}

func points(r *replay.Report) map[string]replay.Totals {
	return map[string]replay.Totals{"gateway": r.Gateway, "ledger": r.Ledger, "counters": r.Counters, "ClickHouse": r.History}
}

// replayAlone replays into a Tollkeeper of its own, whose clock is the trace's.
func replayAlone(t *testing.T, o tollkeeper.ReplayOptions) *replay.Report {
	t.Helper()
	o.KeepTime, o.Logger = true, zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.ErrorLevel)
	report, err := tollkeeper.ReplayInto(within(t, 2*time.Minute), tollkeeper.ReplayTarget{Isolated: true, Out: t.Output(), Logger: o.Logger}, o)
	return checked(t, report, err)
}
