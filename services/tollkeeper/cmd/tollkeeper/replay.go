package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

type replayCmd struct {
	Files       []string `arg:"" name:"file" help:"Trace files, replayed as one; plain, gzip or zstd; - is the standard input."`
	Format      string   `enum:"azure-llm,servegen,mooncake,combined-log,csv" default:"csv" help:"azure-llm, servegen, mooncake, combined-log or csv."`
	Map         []string `sep:"," help:"csv: FIELD=COLUMN, or FIELD==VALUE for the same in every row. FIELD is time, account, key, method, route, model, status or meter.NAME."`
	TimeLayout  string   `help:"How times are written: a layout of Go, or unix, unix_ms, unix_us or unix_ns; found out when empty."`
	TimeZone    string   `default:"UTC" help:"Zone of times that name none, such as Europe/Berlin."`
	BaseTime    string   `default:"2024-01-01T00:00:00Z" help:"mooncake, servegen: when the trace begins, which has relative times."`
	Sample      int64    `default:"1" help:"servegen: one call stands for so many requests."`
	Where       []string `sep:"none" help:"COLUMN=VALUE: only rows that have it. Several of one column: rows that have one of the values; of several columns: rows that have all."`
	BadRows     string   `enum:"stop,skip" default:"stop" help:"stop at a row that can't be read, or skip such rows and count them."`
	MaxRows     int      `default:"2000000" help:"Most rows that are read."`
	Speed       string   `default:"max" help:"Seconds of the trace in one second, such as 1, 60 or 0.5; max is as fast as the gateway answers."`
	KeepTime    bool     `help:"Keep the trace's own time stamps. In a Tollkeeper of the replay's own the ledger's clock goes through the trace too, so that limits per minute, day or month hold as they would have held then; else calls happen now."`
	Concurrency int      `default:"32" help:"Most calls in flight."`
	Limit       []string `help:"METER:WINDOW:AMOUNT[:TIER[:EXPOSURE]], a limit that every account of the trace gets, such as calls:lifetime:10000 or input_tokens:day:1000000:exact. TIER is eventual, exact or leased; EXPOSURE is leased's, a tenth of the amount when missing."`

	Isolated       bool                   `help:"Replay into a Tollkeeper of its own in a scratch directory, even if one is running."`
	NATSURL        string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"NATS of the Tollkeeper to replay into."`
	NATS           config.NATSCredentials `embed:""`
	ClickHouseAddr []string               `name:"clickhouse-addr" env:"TOLLKEEPER_CLICKHOUSE_ADDR" help:"ClickHouse of the Tollkeeper to replay into."`
	ClickHouse     history.Credentials    `embed:""`
	DataDir        string                 `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here: its addresses and passwords are found in it."`
	EngineDir      string                 `name:"engine-dir" env:"TOLLKEEPER_ENGINE_DIR" type:"path" help:"Where the ClickHouse engine is installed; the user's cache when empty."`
	natsWait       `embed:""`
	commandLog     `embed:""`
}

func (c *replayCmd) Run(ctx context.Context) error {
	log, err := c.Logger("replay")
	if err != nil {
		return err
	}
	// All flags are checked before anything is read or started.
	format, err := c.format()
	if err != nil {
		return err
	}
	o := tollkeeper.ReplayOptions{KeepTime: c.KeepTime, Concurrency: c.Concurrency, Wait: c.NATSWait, Logger: log, Progress: os.Stdout}
	if o.Speed, err = parseSpeed(c.Speed); err != nil {
		return err
	}
	if o.Limits, err = parseLimits(c.Limit, format); err != nil {
		return err
	}
	switch {
	case c.Concurrency < 1 || c.Concurrency > mostConcurrency:
		return fmt.Errorf("--concurrency %d: 1 to %d calls can be in flight", c.Concurrency, mostConcurrency)
	case c.MaxRows < 1:
		return fmt.Errorf("--max-rows %d: write a number above 0", c.MaxRows)
	}
	target := tollkeeper.ReplayTarget{DataDir: c.DataDir, EngineDir: c.EngineDir, Isolated: c.Isolated, Out: os.Stdout, Logger: log, NATS: c.NATS.Options(c.NATSURL, "replay", log)}
	if c.NATSURL != "" || len(c.ClickHouseAddr) > 0 {
		switch {
		case c.NATSURL == "" || len(c.ClickHouseAddr) == 0:
			return errors.New("give both --nats-url and --clickhouse-addr of the Tollkeeper to replay into, or neither")
		case c.Isolated:
			return errors.New("--isolated is a Tollkeeper of the replay's own, --nats-url another: give one of them")
		}
		if target.ClickHouse, err = c.ClickHouse.Options(c.ClickHouseAddr, log); err != nil {
			return err
		}
	}
	if o.Rows, err = c.rows(ctx, format); err != nil {
		return err
	}
	report, err := tollkeeper.ReplayInto(ctx, target, o)
	if report != nil {
		if err := report.Write(os.Stdout); err != nil {
			return err
		}
	}
	switch {
	case errors.Is(err, tollkeeper.ErrInterrupted) || err != nil && ctx.Err() != nil:
		return &run.ExitError{Code: 128 + int(syscall.SIGINT), Err: err}
	case err != nil:
		return err
	}
	return report.Err()
}

const mostConcurrency = 4096

// format checks everything that says how the files are read.
func (c *replayCmd) format() (*trace.Format, error) {
	f := &trace.Format{Name: c.Format, Sample: c.Sample, Mapping: trace.Mapping{Where: map[string][]string{}}}
	var err error
	if c.Format == trace.CSV {
		if f.Mapping, err = trace.ParseMapping(c.Map); err != nil {
			return nil, err
		}
	} else if len(c.Map) > 0 {
		return nil, fmt.Errorf("--map is for --format csv; %s has its own", c.Format)
	}
	if err := trace.CheckLayout(c.TimeLayout); err != nil {
		return nil, err
	}
	zone, err := time.LoadLocation(c.TimeZone)
	if err != nil || c.TimeZone == "Local" {
		return nil, fmt.Errorf("--time-zone %q is not known: write a name of the IANA database, such as Europe/Berlin or UTC", c.TimeZone)
	}
	f.Mapping.Times = trace.Times{Layout: c.TimeLayout, Zone: zone}
	if err := f.Mapping.ParseWhere(c.Where); err != nil {
		return nil, err
	}
	lines := c.Format == trace.Mooncake || c.Format == trace.CombinedLog
	if len(c.Where) > 0 && lines {
		return nil, fmt.Errorf("--where chooses by columns, which --format %s does not have", c.Format)
	}
	if f.Base, err = time.Parse(time.RFC3339Nano, c.BaseTime); err != nil {
		return nil, fmt.Errorf("--base-time %q: write a time such as 2024-01-01T00:00:00Z", c.BaseTime)
	}
	if c.Sample < 1 || c.Sample > 1 && c.Format != trace.ServeGen {
		return nil, fmt.Errorf("--sample %d: write a number from 1 on, for --format servegen", c.Sample)
	}
	for i, file := range c.Files {
		if file == "-" {
			if slices.Contains(c.Files[:i], file) {
				return nil, errors.New("- is named twice: there is one standard input")
			}
			continue
		}
		if info, err := os.Stat(file); err != nil {
			return nil, err
		} else if info.IsDir() {
			return nil, fmt.Errorf("%s is a directory, not a trace file", file)
		}
	}
	return f, nil
}

func parseSpeed(s string) (float64, error) {
	if s == "max" {
		return 0, nil
	}
	v, err := strconv.ParseFloat(strings.TrimSuffix(s, "x"), 64)
	if err != nil || !(v > 0 && v < 1e12) {
		return 0, fmt.Errorf("--speed %q: write a number above 0, or max", s)
	}
	return v, nil
}

// rows reads all files and says whatever a reader of the result must know of it.
func (c *replayCmd) rows(ctx context.Context, f *trace.Format) ([]trace.Row, error) {
	var rows []trace.Row
	var bad trace.Bad
	for _, file := range c.Files {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		r, closer, err := f.Open(file, os.Stdin)
		if err != nil {
			return nil, err
		}
		rows, err = trace.Load(r, rows, &bad, trace.LoadOptions{Most: c.MaxRows, SkipBad: c.BadRows == "skip"})
		if err = errors.Join(err, closer.Close()); err != nil {
			return nil, err
		}
	}
	say := func(format string, args ...any) { fmt.Printf(format+"\n", args...) }
	if bad.Rows > 0 {
		say("%d bad rows are left out:", bad.Rows)
		for _, e := range bad.First {
			say("  %v", e)
		}
		if more := bad.Rows - len(bad.First); more > 0 {
			say("  and %d more", more)
		}
	}
	if c.Format == trace.ServeGen {
		say("servegen: the numbers of requests are real, single calls are samples: one of %d requests, spread evenly over their ten minutes, without tokens", c.Sample)
	}
	if n := trace.Sort(rows); n > 0 {
		say("%d rows were not in order of time; they are replayed in order", n)
	}
	if len(rows) == 0 {
		return nil, errors.New("the trace has no rows (after the filters)")
	}
	return rows, nil
}

// limitForm is what a limit looks like.
const limitForm = "write METER:WINDOW:AMOUNT[:TIER[:EXPOSURE]], such as calls:lifetime:10000 or calls:day:500:exact"

func parseLimits(all []string, f *trace.Format) ([]plans.Limit, error) {
	var limits []plans.Limit
	for _, s := range all {
		l, err := parseLimit(s, f)
		if err != nil {
			return nil, fmt.Errorf("--limit %q: %w", s, err)
		}
		if slices.ContainsFunc(limits, func(x plans.Limit) bool { return x.ID == l.ID }) {
			return nil, fmt.Errorf("--limit %q: there is a limit of this meter and window already", s)
		}
		limits = append(limits, l)
	}
	if len(limits) == 0 {
		return nil, nil
	}
	// The rules of plans files hold too.
	doc := &plans.Document{Version: plans.FormatVersion, Plans: []plans.Plan{{ID: "replay", Limits: limits}}}
	if err := plans.Check(doc); err != nil {
		return nil, fmt.Errorf("--limit: %w", err)
	}
	return limits, nil
}

func parseLimit(s string, f *trace.Format) (plans.Limit, error) {
	parts := strings.Split(s, ":")
	if len(parts) < 3 || len(parts) > 5 {
		return plans.Limit{}, errors.New(limitForm)
	}
	meter, span, tier := usage.Meter(parts[0]), usage.WindowKind(parts[1]), usage.TierEventual
	if !meter.Valid() || !f.Reports(meter) {
		var known []string
		builtIn := usage.BuiltInMeters()
		for _, m := range append(builtIn[:], customMeters(f)...) {
			if f.Reports(m) {
				known = append(known, string(m))
			}
		}
		return plans.Limit{}, fmt.Errorf("the trace reports no meter %q, so the limit would never be reached; it reports %s", parts[0], strings.Join(known, ", "))
	}
	if _, ok := window.Parse(span); !ok {
		return plans.Limit{}, fmt.Errorf("%q is no window: choose minute, hour, day, week, month or lifetime", parts[1])
	}
	amount, err := strconv.ParseInt(parts[2], 10, 64)
	if err != nil || amount <= 0 {
		return plans.Limit{}, fmt.Errorf("%q is no amount: write a whole number above 0", parts[2])
	}
	if len(parts) > 3 {
		tier = usage.Tier(parts[3])
	}
	l := plans.Limit{ID: parts[0] + "-" + parts[1], Meter: parts[0], Window: parts[1], Amount: amount, Tier: string(tier)}
	switch tier {
	case usage.TierEventual:
	case usage.TierExact:
		l.Lease = &plans.Lease{Term: leaseTerm}
	case usage.TierLeased:
		l.Lease = &plans.Lease{Term: leaseTerm, ReleaseAfter: "10s", MaxExposure: max(amount/10, 1)}
	default:
		return plans.Limit{}, fmt.Errorf("%q is no tier: choose eventual, exact or leased", parts[3])
	}
	if len(parts) == 5 {
		exposure, err := strconv.ParseInt(parts[4], 10, 64)
		if err != nil || exposure <= 0 || tier != usage.TierLeased {
			return plans.Limit{}, fmt.Errorf("%q is no exposure: write a whole number above 0, for the tier leased", parts[4])
		}
		l.Lease.MaxExposure = exposure
	}
	return l, nil
}

// leaseTerm is long, because a trace's hours pass in seconds: a lease of the default
// term would end between two calls.
const leaseTerm = "24h"

func customMeters(f *trace.Format) []usage.Meter {
	var all []usage.Meter
	for m := range f.Mapping.Meters {
		if _, builtIn := m.Index(); !builtIn {
			all = append(all, m)
		}
	}
	slices.Sort(all)
	return all
}
