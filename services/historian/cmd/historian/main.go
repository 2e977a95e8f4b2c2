// Command historian brings the ledger into ClickHouse.
package main

import (
	"context"
	"fmt"
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
	NATS struct {
		URL       string `name:"url" default:"nats://127.0.0.1:4222" env:"TOLLKEEPER_NATS_URL" help:"Address of NATS, or several separated by commas."`
		Creds     string `env:"TOLLKEEPER_NATS_CREDS" help:"File with JWT and seed, as nsc writes it."`
		NKey      string `name:"nkey" env:"TOLLKEEPER_NATS_NKEY" help:"File with an nkey seed."`
		TokenFile string `env:"TOLLKEEPER_NATS_TOKEN_FILE" help:"File with a token."`
		CAFile    string `name:"ca-file" env:"TOLLKEEPER_NATS_CA_FILE" help:"PEM of the authority that signed the server's certificate."`
		Shards    uint32 `env:"TOLLKEEPER_NATS_SHARDS" help:"Shards of a ledger that does not exist yet."`
		Replicas  int    `default:"1" env:"TOLLKEEPER_NATS_REPLICAS" help:"Replicas of streams that do not exist yet."`
	} `embed:"" prefix:"nats-"`
	ClickHouse struct {
		Addr     []string `default:"127.0.0.1:9000" env:"TOLLKEEPER_CLICKHOUSE_ADDR" help:"Native address of ClickHouse; several are names of one server."`
		Database string   `default:"tollkeeper" env:"TOLLKEEPER_CLICKHOUSE_DATABASE" help:"Database of the history."`
		User     string   `default:"default" env:"TOLLKEEPER_CLICKHOUSE_USER" help:"User that may create tables in the database."`
		Password string   `env:"TOLLKEEPER_CLICKHOUSE_PASSWORD" help:"Password; better given by the environment."`
		TLS      bool     `name:"tls" env:"TOLLKEEPER_CLICKHOUSE_TLS" help:"Encrypt the connection."`
		CAFile   string   `name:"ca-file" env:"TOLLKEEPER_CLICKHOUSE_CA_FILE" help:"PEM of the authority that signed the server's certificate."`
	} `embed:"" prefix:"clickhouse-"`
	Listen        string        `name:"historian-listen" default:"127.0.0.1:8083" env:"TOLLKEEPER_HISTORIAN_LISTEN" help:"Address of /metrics, /healthz and /readyz; empty: none."`
	Horizon       time.Duration `default:"24h" env:"TOLLKEEPER_DEDUP_HORIZON" help:"How long foreign events are remembered; the same as the aggregator's."`
	MaxRows       int           `default:"100000" env:"TOLLKEEPER_HISTORIAN_MAX_ROWS" help:"Rows of a block."`
	MaxAge        time.Duration `default:"500ms" env:"TOLLKEEPER_HISTORIAN_MAX_AGE" help:"How long a call may wait for its block."`
	SnapshotEvery int           `default:"64" env:"TOLLKEEPER_HISTORIAN_SNAPSHOT_EVERY" help:"Blocks between two snapshots."`
	LogLevel      string        `default:"info" env:"TOLLKEEPER_LOG_LEVEL" help:"trace, debug, info, warn or error."`
	LogFormat     string        `default:"auto" env:"TOLLKEEPER_LOG_FORMAT" help:"auto, console or json."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("historian"), kong.Description("Brings the ledger into ClickHouse, each row exactly once."))
	run.Main(func(ctx context.Context) error { return start(ctx, &f) })
}

func start(ctx context.Context, f *flags) error {
	log, err := telemetry.NewLogger(telemetry.LogOptions{Level: f.LogLevel, Format: f.LogFormat, Service: "historian"})
	if err != nil {
		return err
	}
	ch := history.Options{Addrs: f.ClickHouse.Addr, Database: f.ClickHouse.Database, User: f.ClickHouse.User, Password: f.ClickHouse.Password}
	if f.ClickHouse.TLS || f.ClickHouse.CAFile != "" {
		if ch.TLS, err = history.LoadTLS(f.ClickHouse.CAFile); err != nil {
			return err
		}
	}
	readiness := telemetry.NewReadiness()
	registry := telemetry.NewRegistry()
	if err := registry.Register(readiness); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return historian.Run(ctx, historian.Options{
		NATS: natsconn.Options{
			URL: f.NATS.URL, CredsFile: f.NATS.Creds, NKeySeedFile: f.NATS.NKey, TokenFile: f.NATS.TokenFile, CAFile: f.NATS.CAFile,
			Logger: log,
		},
		ClickHouse:    ch,
		Provision:     ledger.ProvisionOptions{Shards: f.NATS.Shards, Replicas: f.NATS.Replicas},
		Logger:        log,
		Registerer:    registry,
		AdminListen:   f.Listen,
		Readiness:     readiness,
		Horizon:       f.Horizon,
		MaxRows:       f.MaxRows,
		MaxAge:        f.MaxAge,
		SnapshotEvery: f.SnapshotEvery,
	})
}
