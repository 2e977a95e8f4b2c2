// Command aggregator counts the ledger and decides.
package main

import (
	"context"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/services/aggregator"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
)

type flags struct {
	config.NATS      `embed:""`
	config.Admin     `embed:""`
	config.Streams   `embed:""`
	config.Log       `embed:""`
	Member           string        `name:"member" env:"TOLLKEEPER_MEMBER" help:"Name among the aggregators that share the shards, the same at every start; made up when empty."`
	SnapshotInterval time.Duration `name:"snapshot-interval" env:"TOLLKEEPER_SNAPSHOT_INTERVAL" default:"30s" help:"How often the state is kept, so that a restart reads less of the ledger."`
	Horizon          time.Duration `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long events of foreign producers are remembered, so that a repetition is not counted."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("aggregator"), kong.Description("Counts the calls in the ledger and decides when a quota is spent."), kong.Vars{"admin_listen": "127.0.0.1:8082"})
	run.Main(func(ctx context.Context) error {
		log, err := f.Logger("aggregator")
		if err != nil {
			return err
		}
		token, err := f.Token()
		if err != nil {
			return err
		}
		return aggregator.Run(ctx, aggregator.Options{
			NATS: f.NATS.Options("aggregator", log), Logger: log, AdminListen: f.AdminListen, AdminToken: token,
			Shards: f.Shards, Currency: f.Currency, Replicas: f.Replicas, SnapshotEvery: f.SnapshotInterval, Horizon: f.Horizon, Member: f.Member,
		})
	})
}
