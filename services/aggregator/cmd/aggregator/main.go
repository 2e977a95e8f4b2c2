// Command aggregator counts the ledger and decides.
package main

import (
	"context"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/services/aggregator"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type flags struct {
	NATSURL          string        `name:"nats-url" env:"TOLLKEEPER_NATS_URL" default:"nats://127.0.0.1:4222" help:"Addresses of NATS, separated by commas."`
	NATSCreds        string        `name:"nats-creds" env:"TOLLKEEPER_NATS_CREDS" type:"path" help:"Credentials file of NATS."`
	NATSNKeySeed     string        `name:"nats-nkey-seed" env:"TOLLKEEPER_NATS_NKEY_SEED" type:"path" help:"File with the seed of an nkey."`
	NATSTokenFile    string        `name:"nats-token-file" env:"TOLLKEEPER_NATS_TOKEN_FILE" type:"path" help:"File with a token for NATS."`
	NATSUser         string        `name:"nats-user" env:"TOLLKEEPER_NATS_USER" help:"User of NATS."`
	NATSPassword     string        `name:"nats-password" env:"TOLLKEEPER_NATS_PASSWORD" help:"Password of NATS; better in the environment, since flags are seen by others."`
	NATSCA           string        `name:"nats-ca" env:"TOLLKEEPER_NATS_CA" type:"path" help:"PEM file of the authority that signed NATS's certificate."`
	AdminListen      string        `name:"admin-listen" env:"TOLLKEEPER_ADMIN_LISTEN" default:"127.0.0.1:8082" help:"Where /metrics, /healthz and /readyz are served; empty: nowhere."`
	AdminToken       string        `name:"admin-token" env:"TOLLKEEPER_ADMIN_TOKEN" help:"Bearer token of the admin listener; needed when other machines can reach it."`
	Shards           uint32        `name:"shards" env:"TOLLKEEPER_SHARDS" help:"Shards of a ledger that does not exist yet; 0 is the default for one machine."`
	Replicas         int           `name:"replicas" env:"TOLLKEEPER_REPLICAS" default:"1" help:"Replicas of streams that do not exist yet."`
	SnapshotInterval time.Duration `name:"snapshot-interval" env:"TOLLKEEPER_SNAPSHOT_INTERVAL" default:"30s" help:"How often the state is kept, so that a restart reads less of the ledger."`
	Horizon          time.Duration `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long events of foreign producers are remembered, so that a repetition is not counted."`
	LogLevel         string        `name:"log-level" env:"TOLLKEEPER_LOG_LEVEL" default:"info" help:"trace, debug, info, warn or error."`
	LogFormat        string        `name:"log-format" env:"TOLLKEEPER_LOG_FORMAT" default:"auto" help:"auto, console or json."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("aggregator"), kong.Description("Counts the calls in the ledger and decides when a quota is spent."))
	run.Main(func(ctx context.Context) error {
		log, err := telemetry.NewLogger(telemetry.LogOptions{Out: os.Stderr, Level: f.LogLevel, Format: f.LogFormat, Service: "aggregator"})
		if err != nil {
			return err
		}
		return aggregator.Run(ctx, aggregator.Options{
			NATS: natsconn.Options{
				URL: f.NATSURL, CredsFile: f.NATSCreds, NKeySeedFile: f.NATSNKeySeed, TokenFile: f.NATSTokenFile,
				User: f.NATSUser, Password: f.NATSPassword, CAFile: f.NATSCA, Name: "tollkeeper-aggregator", Logger: log,
			},
			Logger: log, AdminListen: f.AdminListen, AdminToken: f.AdminToken, Shards: f.Shards, Replicas: f.Replicas,
			SnapshotEvery: f.SnapshotInterval, Horizon: f.Horizon,
		})
	})
}
