package historian

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func TestMain(m *testing.M) {
	embedclickhouse.MaybeRunChild()
	if os.Getenv(childMarker) != "" {
		os.Exit(runChild())
	}
	os.Exit(m.Run())
}

var enginePath = sync.OnceValues(func() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	return embedclickhouse.Install(ctx, embedclickhouse.InstallOptions{Logger: zerolog.New(os.Stderr)})
})

// world is a real NATS and a real ClickHouse of a test's own.
type world struct {
	t    testing.TB
	nats *embednats.Server
	nc   *nats.Conn
	js   jetstream.JetStream
	ch   *embedclickhouse.Server
	h    *history.History
	log  zerolog.Logger
	dir  string // of the NATS server
}

const testShards = 4

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, log: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.WarnLevel)}
	path, err := enginePath()
	if err != nil {
		t.Fatalf("these tests need a ClickHouse: %v", err)
	}
	dir := t.TempDir()
	ch, err := embedclickhouse.Start(t.Context(), embedclickhouse.Options{DataDir: filepath.Join(dir, "clickhouse"), EnginePath: path, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	w.ch = ch
	t.Cleanup(func() { w.stopping("ClickHouse", ch.Stop) })
	w.dir = filepath.Join(dir, "nats")
	server, err := embednats.Start(t.Context(), embednats.Options{StoreDir: w.dir, Logger: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.WarnLevel)})
	if err != nil {
		t.Fatal(err)
	}
	w.nats = server
	t.Cleanup(func() { w.stopping("NATS", server.Stop) })
	if w.nc, err = nats.Connect(w.nats.ClientURL()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
	h, err := history.Open(t.Context(), w.clickhouse())
	if err != nil {
		t.Fatal(err)
	}
	w.h = h
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := w.h.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) stopping(what string, stop func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := stop(ctx); err != nil {
		w.t.Errorf("stop %s: %v", what, err)
	}
}

func (w *world) clickhouse() history.Options {
	return history.Options{Addrs: []string{w.ch.Addr()}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: w.ch.Credentials().ServicePassword, Logger: zerolog.Nop()}
}

func (w *world) options() Options {
	return Options{
		NATS: natsconn.Options{URL: w.nats.ClientURL(), Logger: w.log}, ClickHouse: w.clickhouse(), Logger: w.log,
		Registerer: prometheus.NewRegistry(), Readiness: telemetry.NewReadiness(),
		// Blocks end by age and not by rows: where they end can't be found out
		// again from the entries alone.
		MaxAge: 20 * time.Millisecond, SnapshotEvery: 2,
	}
}

// start runs a historian and returns what stops it and gives its error.
func (w *world) start(o Options, s seams) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, o, s) }()
	var once sync.Once
	var err error
	stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case err = <-done:
			case <-time.After(10 * time.Second):
				err = fmt.Errorf("the historian did not stop")
			}
		})
		return err
	}
	w.t.Cleanup(func() {
		if err := stop(); err != nil {
			w.t.Errorf("historian: %v", err)
		}
	})
	return stop
}

// eventually polls for what other processes do; there is no event of it.
func eventually(t testing.TB, what string, within time.Duration, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline.C:
			t.Fatalf("not within %s: %s", within, what)
		case <-tick.C:
		}
	}
}
