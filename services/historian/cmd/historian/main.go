// Command historian brings the ledger into ClickHouse.
package main

import (
	"context"
	"fmt"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/historian"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type flags struct {
	config.NATS    `embed:""`
	history.Flags  `embed:""`
	config.Admin   `embed:""`
	config.Streams `embed:""`
	config.Log     `embed:""`
	Horizon        time.Duration `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long events of foreign producers are remembered; the same as the aggregator's."`
	MaxRows        int           `name:"max-rows" env:"TOLLKEEPER_HISTORIAN_MAX_ROWS" default:"100000" help:"Rows of a block."`
	MaxAge         time.Duration `name:"max-age" env:"TOLLKEEPER_HISTORIAN_MAX_AGE" default:"500ms" help:"How long a call may wait for its block."`
	SnapshotEvery  int           `name:"snapshot-every" env:"TOLLKEEPER_HISTORIAN_SNAPSHOT_EVERY" default:"64" help:"Blocks between two snapshots of what has been seen."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("historian"), kong.Description("Brings the ledger into ClickHouse, each row exactly once."), kong.Vars{"admin_listen": "127.0.0.1:8083"})
	run.Main(func(ctx context.Context) error { return start(ctx, &f) })
}

func start(ctx context.Context, f *flags) error {
	log, err := f.Logger("historian")
	if err != nil {
		return err
	}
	clickhouse, err := f.Flags.Options(log)
	if err != nil {
		return err
	}
	token, err := f.Token()
	if err != nil {
		return err
	}
	readiness := telemetry.NewReadiness()
	registry := telemetry.NewRegistry()
	if err := registry.Register(readiness); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return historian.Run(ctx, historian.Options{
		NATS: f.NATS.Options("historian", log), ClickHouse: clickhouse, Provision: ledger.ProvisionOptions{Shards: f.Shards, Currency: f.Currency, Replicas: f.Replicas},
		Logger: log, Registerer: registry, AdminListen: f.AdminListen, AdminToken: token, Readiness: readiness,
		Horizon: f.Horizon, MaxRows: f.MaxRows, MaxAge: f.MaxAge, SnapshotEvery: f.SnapshotEvery,
	})
}
