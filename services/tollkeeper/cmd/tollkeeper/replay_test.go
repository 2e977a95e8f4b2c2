package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

// replayError runs replay with arguments that must be refused before anything starts.
func replayError(t *testing.T, args ...string) string {
	t.Helper()
	var c struct {
		Replay replayCmd `cmd:""`
	}
	parser, err := kong.New(&c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(append([]string{"replay"}, args...)); err != nil {
		return err.Error()
	}
	// Nothing runs there: whatever gets so far fails with another error.
	c.Replay.NATSURL, c.Replay.ClickHouseAddr = "nats://127.0.0.1:1", []string{"127.0.0.1:1"}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := c.Replay.Run(ctx); err != nil {
		return err.Error()
	}
	return ""
}

func TestWrongFlagsOfReplayAreRefusedBeforeAnythingStarts(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "x.csv")
	// Reading it would fail too: the flags come first.
	if err := os.WriteFile(file, []byte("not,a,trace\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mapped := []string{"--map", "time=t,account=a,meter.input_tokens=in,meter.gpu_ms=gpu"}
	for args, want := range map[string]string{
		"--limit calls:dya:5":                           `"dya" is no window: choose minute, hour, day`,
		"--limit call:day:5":                            `reports no meter "call", so the limit would never be reached; it reports calls, input_tokens, gpu_ms`,
		"--limit output_tokens:day:5":                   `reports no meter "output_tokens"`,
		"--limit calls:day:0":                           `"0" is no amount`,
		"--limit calls:day:-1":                          `"-1" is no amount`,
		"--limit calls:day:1.5":                         `"1.5" is no amount`,
		"--limit calls:day":                             "write METER:WINDOW:AMOUNT[:TIER",
		"--limit calls:day:5:exakt":                     `"exakt" is no tier: choose eventual, exact or leased`,
		"--limit calls:day:5:exact:2":                   `"2" is no exposure`,
		"--limit calls:day:5:leased:x":                  `"x" is no exposure`,
		"--limit calls:day:5 --limit calls:day:6:exact": "there is a limit of this meter and window already",
		"--speed 0":                                     `--speed "0"`,
		"--speed fast":                                  `--speed "fast"`,
		"--speed NaN":                                   `--speed "NaN"`,
		"--concurrency 0":                               "--concurrency 0",
		"--max-rows 0":                                  "--max-rows 0",
		"--where kind":                                  `--where "kind"`,
		"--time-layout YYYY-MM-DD":                      "--time-layout",
		"--time-zone Berlin":                            `--time-zone "Berlin"`,
		"--format mooncake":                             "--map is for --format csv",
		"--format nginx":                                "--format",
		"--sample 5":                                    "--sample 5",
		"--bad-rows ignore":                             "--bad-rows",
		"--isolated":                                    "--isolated is a Tollkeeper of the replay's own",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			if got := replayError(t, append(append([]string{file}, mapped...), strings.Fields(args)...)...); !strings.Contains(got, want) {
				t.Errorf("got %q, want it to contain %q", got, want)
			}
		})
	}
	for args, want := range map[string]string{
		"/does/not/exist --map time=t,account=a":                              "/does/not/exist",
		". --map time=t,account=a":                                            "is a directory",
		"- - --map time=t,account=a":                                          "- is named twice",
		file + " --map time=t":                                                "lacks account=COLUMN",
		file + " --map time=t,account=a":                                      `names the column "t", the file has not, a, trace`,
		file + " --format combined-log --where a=b":                           "which --format combined-log does not have",
		file + " --format mooncake --base-time yesterday":                     "--base-time",
		file + " --format servegen --limit input_tokens:day:5":                `reports no meter "input_tokens"`,
		file + " --format combined-log --limit bytes:day:5:exact --where x=y": "--where",
		file + " --format azure-llm --limit input_tokens:day:5:exact":         `names the column "TIMESTAMP"`,
		file + " --format combined-log --limit bytes:hour:5":                  "column host",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			if got := replayError(t, strings.Fields(args)...); !strings.Contains(got, want) {
				t.Errorf("got %q, want it to contain %q", got, want)
			}
		})
	}
}

func TestALimitsTierIsPartOfItsFlag(t *testing.T) {
	t.Parallel()
	c := replayCmd{Format: "csv", Map: []string{"time=t", "account=a", "meter.n=x"}, TimeZone: "UTC", BaseTime: "2024-01-01T00:00:00Z", Sample: 1}
	f, err := c.format()
	if err != nil {
		t.Fatal(err)
	}
	limits, err := parseLimits([]string{"calls:lifetime:10", "calls:day:10:exact", "n:month:100:leased", "calls:minute:100:leased:3"}, f)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		id, tier string
		exposure int64
	}{{"calls-lifetime", "eventual", 0}, {"calls-day", "exact", 0}, {"n-month", "leased", 10}, {"calls-minute", "leased", 3}} {
		l := limits[i]
		exposure := int64(0)
		if l.Lease != nil {
			exposure = l.Lease.MaxExposure
		}
		if l.ID != want.id || l.Tier != want.tier || exposure != want.exposure {
			t.Errorf("limit %d: %+v, exposure %d; want %+v", i, l, exposure, want)
		}
	}
}
