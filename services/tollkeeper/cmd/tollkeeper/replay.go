package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

type replayCmd struct {
	Files       []string `arg:"" name:"file" type:"existingfile" help:"Trace files, replayed as one."`
	Format      string   `enum:"azure-llm,csv" default:"csv" help:"azure-llm or csv."`
	Map         []string `sep:"," help:"csv: FIELD=COLUMN, or FIELD==VALUE for the same in every row. FIELD is time, account, key, method, route, model, status or meter.NAME."`
	TimeLayout  string   `help:"csv: how times are written, in Go's layout, or unix or unix_ms."`
	Where       []string `help:"COLUMN=VALUE: only rows that have it."`
	MaxRows     int      `default:"2000000" help:"Most rows that are read."`
	Speed       string   `default:"max" help:"Seconds of the trace in one second, such as 1, 60 or 0.5; max is as fast as the gateway answers."`
	KeepTime    bool     `help:"Keep the trace's own time stamps as event time; else calls happen now."`
	Concurrency int      `default:"32" help:"Most calls in flight."`
	Limit       []string `help:"METER:WINDOW:AMOUNT, a limit that every account of the trace gets, such as calls:lifetime:10000."`

	Isolated       bool                   `help:"Replay into a Tollkeeper of its own in a scratch directory, even if one is running."`
	NATSURL        string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"NATS of the Tollkeeper to replay into."`
	NATS           config.NATSCredentials `embed:""`
	ClickHouseAddr []string               `name:"clickhouse-addr" env:"TOLLKEEPER_CLICKHOUSE_ADDR" help:"ClickHouse of the Tollkeeper to replay into."`
	ClickHouse     history.Credentials    `embed:""`
	DataDir        string                 `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Data directory of the Tollkeeper that runs here: its addresses and passwords are found in it."`
	EngineDir      string                 `name:"engine-dir" env:"TOLLKEEPER_ENGINE_DIR" type:"path" help:"Where the ClickHouse engine is installed; the user's cache when empty."`
	commandLog     `embed:""`
}

func (c *replayCmd) Run(ctx context.Context) error {
	log, err := c.Logger("replay")
	if err != nil {
		return err
	}
	o := tollkeeper.ReplayOptions{KeepTime: c.KeepTime, Concurrency: c.Concurrency, Logger: log, Progress: os.Stdout}
	if o.Rows, err = c.rows(); err != nil {
		return err
	}
	if c.Speed != "max" {
		if o.Speed, err = strconv.ParseFloat(strings.TrimSuffix(c.Speed, "x"), 64); err != nil || o.Speed <= 0 {
			return fmt.Errorf("--speed %q: write a number above 0, or max", c.Speed)
		}
	}
	for _, l := range c.Limit {
		limit, err := parseLimit(l)
		if err != nil {
			return err
		}
		o.Limits = append(o.Limits, limit)
	}
	target := tollkeeper.ReplayTarget{DataDir: c.DataDir, EngineDir: c.EngineDir, Isolated: c.Isolated, Out: os.Stdout, Logger: log, NATS: c.NATS.Options(c.NATSURL, "replay", log)}
	if c.NATSURL != "" || len(c.ClickHouseAddr) > 0 {
		if c.NATSURL == "" || len(c.ClickHouseAddr) == 0 {
			return errors.New("give both --nats-url and --clickhouse-addr of the Tollkeeper to replay into, or neither")
		}
		if target.ClickHouse, err = c.ClickHouse.Options(c.ClickHouseAddr, log); err != nil {
			return err
		}
	}
	report, err := tollkeeper.ReplayInto(ctx, target, o)
	if err != nil {
		return err
	}
	if err := report.Write(os.Stdout); err != nil {
		return err
	}
	return report.Err()
}

func (c *replayCmd) rows() ([]trace.Row, error) {
	var m trace.Mapping
	if c.Format == "csv" {
		var err error
		if m, err = trace.ParseMapping(c.Map); err != nil {
			return nil, err
		}
		m.TimeLayout = c.TimeLayout
	} else if len(c.Map) > 0 {
		return nil, fmt.Errorf("--map is for --format csv; %s has its own", c.Format)
	}
	if err := m.ParseWhere(c.Where); err != nil {
		return nil, err
	}
	var rows []trace.Row
	for _, file := range c.Files {
		r, f, err := trace.Open(c.Format, file, m)
		if err != nil {
			return nil, err
		}
		more, err := trace.Load(r, c.MaxRows-len(rows))
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
		rows = append(rows, more...)
	}
	trace.Sort(rows)
	return rows, nil
}

func parseLimit(s string) (plans.Limit, error) {
	parts := strings.Split(s, ":")
	if len(parts) != 3 {
		return plans.Limit{}, fmt.Errorf("--limit %q: write METER:WINDOW:AMOUNT, such as calls:lifetime:10000", s)
	}
	amount, err := strconv.ParseInt(parts[2], 10, 64)
	if err != nil || amount <= 0 {
		return plans.Limit{}, fmt.Errorf("--limit %q: the amount is a whole number above 0", s)
	}
	return plans.Limit{ID: parts[0] + "-" + parts[1], Meter: parts[0], Window: parts[1], Amount: amount, Tier: "eventual"}, nil
}
