// Command auditor holds gateways, ledger, counters and ClickHouse against each
// other, all the time.
package main

import (
	"context"
	"fmt"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/auditor"
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
	Every          time.Duration `name:"every" env:"TOLLKEEPER_AUDIT_EVERY" default:"10s" help:"How often counters and history are compared with the ledger."`
	Again          time.Duration `name:"again" env:"TOLLKEEPER_AUDIT_AGAIN" default:"10m" help:"After how long the history is compared once more."`
	Overdue        time.Duration `name:"overdue" env:"TOLLKEEPER_AUDIT_OVERDUE" default:"10m" help:"How long what a gateway says it sent may be on its way before it is a gap."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("auditor"), kong.Description("Holds gateways, ledger, counters and ClickHouse against each other, all the time."), kong.Vars{"admin_listen": "127.0.0.1:8086"})
	run.Main(func(ctx context.Context) error { return start(ctx, &f) })
}

func start(ctx context.Context, f *flags) error {
	log, err := f.Logger("auditor")
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
	return auditor.Run(ctx, auditor.Options{
		NATS: f.NATS.Options("auditor", log), ClickHouse: clickhouse, Provision: ledger.ProvisionOptions{Shards: f.Shards, Currency: f.Currency, Replicas: f.Replicas},
		Logger: log, Registerer: registry, AdminListen: f.AdminListen, AdminToken: token, Readiness: readiness,
		Horizon: f.Horizon, Every: f.Every, Again: f.Again, Overdue: f.Overdue,
	})
}
