package tollkeeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
)

// addressFile of the data directory says where a Tollkeeper that runs there can
// be reached. It holds no secret.
const addressFile = "running.json"

// writeAddresses notes the addresses of a running Tollkeeper.
func writeAddresses(dataDir string, a Addresses) error {
	data, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("write addresses: %w", err)
	}
	tmp := filepath.Join(dataDir, addressFile+".new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("write addresses: %w", err)
	}
	return os.Rename(tmp, filepath.Join(dataDir, addressFile))
}

func removeAddresses(dataDir string) error {
	err := os.Remove(filepath.Join(dataDir, addressFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Running returns the addresses of the Tollkeeper that runs in a data
// directory, and false when none does.
func Running(dataDir string) (Addresses, bool, error) {
	data, err := os.ReadFile(filepath.Join(dataDir, addressFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Addresses{}, false, nil
	}
	var a Addresses
	if err == nil {
		err = json.Unmarshal(data, &a)
	}
	if err != nil {
		return a, false, fmt.Errorf("read %s: %w", filepath.Join(dataDir, addressFile), err)
	}
	// The file outlives a kill -9: what it names must answer.
	for _, addr := range []string{a.ClickHouse, a.NATSAddr} {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			return a, false, nil
		}
		if err := c.Close(); err != nil {
			return a, false, fmt.Errorf("probe %s: %w", addr, err)
		}
	}
	credentials, err := embedclickhouse.ReadCredentials(filepath.Join(dataDir, "clickhouse"))
	if err != nil {
		return a, false, err
	}
	a.ClickHouseOptions = engine.History(a.ClickHouse, credentials)
	return a, true, nil
}

// ReplayTarget says which Tollkeeper a replay goes into: the one that is
// given, else the one that runs in DataDir, else one of its own in a scratch
// directory.
type ReplayTarget struct {
	// NATS has credentials also where its URL is found in DataDir.
	NATS       natsconn.Options
	ClickHouse history.Options
	DataDir    string
	EngineDir  string
	// Isolated takes one of its own in any case.
	Isolated bool
	Out      io.Writer
	Logger   zerolog.Logger
}

// ReplayInto replays into a target.
func ReplayInto(ctx context.Context, t ReplayTarget, o ReplayOptions) (*replay.Report, error) {
	say := func(format string, args ...any) {
		_, _ = fmt.Fprintf(t.Out, format+"\n", args...) // for people; its loss harms nothing
	}
	o.NATS, o.ClickHouse = t.NATS, t.ClickHouse
	if o.NATS.URL != "" {
		say("replaying into the Tollkeeper at %s", natsconn.Redact(o.NATS.URL))
		return Replay(ctx, o)
	}
	if !t.Isolated {
		a, ok, err := Running(t.DataDir)
		if err != nil {
			return nil, err
		}
		if ok {
			say("replaying into the Tollkeeper that runs here (%s)", a.NATS)
			o.NATS.URL, o.ClickHouse = a.NATS, a.ClickHouseOptions
			o.ClickHouse.Logger = t.Logger
			return Replay(ctx, o)
		}
	}
	say("replaying into a Tollkeeper of its own, in a scratch directory")
	return replayAlone(ctx, t, o)
}

// scratchSync is how often frames of a scratch directory are forced to disk.
const scratchSync = 2 * time.Minute

// replayAlone starts everything, replays, and stops everything. Its ledger's time is
// the trace's where the calls keep theirs.
func replayAlone(ctx context.Context, t ReplayTarget, o ReplayOptions) (report *replay.Report, err error) {
	if len(o.Rows) == 0 {
		return nil, errors.New("the trace has no rows (after the filters)")
	}
	o.TestClock = o.KeepTime
	if o.KeepTime {
		if err := replay.CheckTimes(o.Rows, o.Limits, true, time.Now()); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp("", "tollkeeper-replay-")
	if err != nil {
		return nil, fmt.Errorf("make a scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// An interruption ends the replay, which ends this.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	up := make(chan Addresses, 1)
	done := make(chan error, 1)
	whole := Options{
		Engines: engine.Options{
			DataDir: dir, EngineDir: t.EngineDir, NATSListen: "127.0.0.1:0", ClickHouseListen: "127.0.0.1:0",
			ClickHouseHTTPListen: "127.0.0.1:0", Progress: t.Out,
			// The directory is removed at the end: after a power cut there is nothing to
			// go on with.
			NATSSync: scratchSync,
		},
		Logger: t.Logger, Ready: func(a Addresses) { up <- a },
	}
	if o.TestClock {
		whole.TestClock = o.Rows[0].Time
	}
	go func() { done <- Run(life, whole) }()
	select {
	case a := <-up:
		o.NATS, o.ClickHouse = natsconn.Options{URL: a.NATS, Logger: t.Logger}, a.ClickHouseOptions
		o.ClickHouse.Logger = t.Logger
	case err := <-done:
		return nil, err
	case <-ctx.Done():
		stop()
		return nil, errors.Join(ErrInterrupted, <-done)
	}
	report, err = Replay(ctx, o)
	stop()
	return report, errors.Join(err, <-done)
}
