// Command historian brings the ledger into ClickHouse.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/historian"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type flags struct {
	NATSURL       string `name:"nats-url" env:"TOLLKEEPER_NATS_URL" default:"nats://127.0.0.1:4222" help:"Addresses of NATS, separated by commas."`
	NATSCreds     string `name:"nats-creds" env:"TOLLKEEPER_NATS_CREDS" type:"path" help:"Credentials file of NATS."`
	NATSNKeySeed  string `name:"nats-nkey-seed" env:"TOLLKEEPER_NATS_NKEY_SEED" type:"path" help:"File with the seed of an nkey."`
	NATSTokenFile string `name:"nats-token-file" env:"TOLLKEEPER_NATS_TOKEN_FILE" type:"path" help:"File with a token for NATS."`
	NATSUser      string `name:"nats-user" env:"TOLLKEEPER_NATS_USER" help:"User of NATS."`
	NATSPassword  string `name:"nats-password" env:"TOLLKEEPER_NATS_PASSWORD" help:"Password of NATS; better in the environment, since flags are seen by others."`
	NATSCA        string `name:"nats-ca" env:"TOLLKEEPER_NATS_CA" type:"path" help:"PEM file of the authority that signed NATS's certificate."`
	Shards        uint32 `name:"shards" env:"TOLLKEEPER_SHARDS" help:"Shards of a ledger that does not exist yet; 0 is the default for one machine."`
	Replicas      int    `name:"replicas" env:"TOLLKEEPER_REPLICAS" default:"1" help:"Replicas of streams that do not exist yet."`

	history.Flags `embed:""`

	AdminListen   string        `name:"admin-listen" env:"TOLLKEEPER_ADMIN_LISTEN" default:"127.0.0.1:8083" help:"Where /metrics, /healthz and /readyz are served; empty: nowhere."`
	AdminToken    string        `name:"admin-token" env:"TOLLKEEPER_ADMIN_TOKEN" help:"Bearer token of the admin listener; needed when other machines can reach it."`
	Horizon       time.Duration `name:"foreign-horizon" env:"TOLLKEEPER_FOREIGN_HORIZON" default:"24h" help:"How long events of foreign producers are remembered; the same as the aggregator's."`
	MaxRows       int           `name:"max-rows" env:"TOLLKEEPER_HISTORIAN_MAX_ROWS" default:"100000" help:"Rows of a block."`
	MaxAge        time.Duration `name:"max-age" env:"TOLLKEEPER_HISTORIAN_MAX_AGE" default:"500ms" help:"How long a call may wait for its block."`
	SnapshotEvery int           `name:"snapshot-every" env:"TOLLKEEPER_HISTORIAN_SNAPSHOT_EVERY" default:"64" help:"Blocks between two snapshots of what has been seen."`
	LogLevel      string        `name:"log-level" env:"TOLLKEEPER_LOG_LEVEL" default:"info" help:"trace, debug, info, warn or error."`
	LogFormat     string        `name:"log-format" env:"TOLLKEEPER_LOG_FORMAT" default:"auto" help:"auto, console or json."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("historian"), kong.Description("Brings the ledger into ClickHouse, each row exactly once."))
	run.Main(func(ctx context.Context) error { return start(ctx, &f) })
}

func start(ctx context.Context, f *flags) error {
	log, err := telemetry.NewLogger(telemetry.LogOptions{Out: os.Stderr, Level: f.LogLevel, Format: f.LogFormat, Service: "historian"})
	if err != nil {
		return err
	}
	clickhouse, err := f.Flags.Options(log)
	if err != nil {
		return err
	}
	readiness := telemetry.NewReadiness()
	registry := telemetry.NewRegistry()
	if err := registry.Register(readiness); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return historian.Run(ctx, historian.Options{
		NATS: natsconn.Options{
			URL: f.NATSURL, CredsFile: f.NATSCreds, NKeySeedFile: f.NATSNKeySeed, TokenFile: f.NATSTokenFile,
			User: f.NATSUser, Password: f.NATSPassword, CAFile: f.NATSCA, Name: "tollkeeper-historian", Logger: log,
		},
		ClickHouse: clickhouse, Provision: ledger.ProvisionOptions{Shards: f.Shards, Replicas: f.Replicas}, Logger: log, Registerer: registry,
		AdminListen: f.AdminListen, AdminToken: f.AdminToken, Readiness: readiness,
		Horizon: f.Horizon, MaxRows: f.MaxRows, MaxAge: f.MaxAge, SnapshotEvery: f.SnapshotEvery,
	})
}
