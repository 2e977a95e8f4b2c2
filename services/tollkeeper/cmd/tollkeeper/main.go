// Command tollkeeper runs everything in one process, and holds the commands that
// operators and developers type.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/alecthomas/kong"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/alerter"
	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
)

type cli struct {
	Up         upCmd         `cmd:"" help:"Run everything in this process, with NATS and ClickHouse embedded unless they are given."`
	Replay     replayCmd     `cmd:"" help:"Drive recorded traffic through a gateway and check that nothing is lost or doubled."`
	Bench      benchCmd      `cmd:"" help:"Measure throughput and latency beside the raw limits."`
	BenchPart  benchPartCmd  `cmd:"" name:"bench-part" hidden:"" help:"Serve a part of the bench."`
	Apply      applyCmd      `cmd:"" help:"Show what a plans file would change, and apply it."`
	Explain    explainCmd    `cmd:"" help:"Say why a decision was made: limit, counter, ledger position, the calls that led there, and the verdict replayed from the log."`
	Audit      auditCmd      `cmd:"" help:"Recompute the state of every shard from the ledger and compare its hash with what aggregators have counted."`
	Correct    correctCmd    `cmd:"" help:"Correct usage that was reported wrongly, twice or not at all: counters, history and a live block."`
	Engine     engineCmd     `cmd:"" help:"The embedded ClickHouse engine."`
	NATS       natsCmd       `cmd:"" name:"nats" help:"Run the embedded NATS server alone."`
	ClickHouse clickhouseCmd `cmd:"" name:"clickhouse" help:"Run the embedded ClickHouse server alone."`
}

func main() {
	// The embedded ClickHouse is this program again, as a child.
	embedclickhouse.MaybeRunChild()
	var c cli
	k := kong.Parse(&c, kong.Name("tollkeeper"), kong.Description("Usage metering and HTTP 402 enforcement for API and AI gateways."), kong.UsageOnError())
	run.Main(func(ctx context.Context) error {
		k.BindTo(ctx, (*context.Context)(nil))
		return k.Run()
	})
}

// engines are the flags of the embedded engines.
type engines struct {
	DataDir              string        `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Where everything that must survive a restart is kept."`
	EngineDir            string        `name:"engine-dir" env:"TOLLKEEPER_ENGINE_DIR" type:"path" help:"Where the ClickHouse engine is installed; the user's cache when empty."`
	NATSListen           string        `name:"nats-listen" env:"TOLLKEEPER_NATS_LISTEN" default:"127.0.0.1:4222" help:"Address of the embedded NATS."`
	NATSSync             time.Duration `name:"nats-sync" env:"TOLLKEEPER_NATS_SYNC" default:"0" help:"How often the embedded NATS forces acknowledged frames to disk; 0 is before every acknowledgement. Anything else is faster and loses up to that much in a power cut."`
	ClickHouseListen     string        `name:"clickhouse-listen" env:"TOLLKEEPER_CLICKHOUSE_LISTEN" default:"127.0.0.1:9000" help:"Address of the embedded ClickHouse, native protocol."`
	ClickHouseHTTPListen string        `name:"clickhouse-http-listen" env:"TOLLKEEPER_CLICKHOUSE_HTTP_LISTEN" default:"127.0.0.1:8123" help:"Address of the embedded ClickHouse, HTTP."`
}

func (e engines) options(log zerolog.Logger) engine.Options {
	return engine.Options{
		DataDir: e.DataDir, EngineDir: e.EngineDir, NATSListen: e.NATSListen, NATSSync: e.NATSSync,
		ClickHouseListen: e.ClickHouseListen, ClickHouseHTTPListen: e.ClickHouseHTTPListen, Logger: log, Progress: os.Stderr,
	}
}

type upCmd struct {
	Engines           engines                `embed:""`
	AnalystPassword   string                 `name:"clickhouse-analyst-password" env:"TOLLKEEPER_CLICKHOUSE_ANALYST_PASSWORD" help:"Password of the embedded ClickHouse's user analyst; generated when empty. With --clickhouse-password it is needed where other machines can reach ClickHouse."`
	NATSURL           string                 `name:"nats-url" env:"TOLLKEEPER_NATS_URL" help:"Addresses of a NATS of your own, separated by commas; embedded when empty."`
	NATS              config.NATSCredentials `embed:""`
	ClickHouseAddr    []string               `name:"clickhouse-addr" env:"TOLLKEEPER_CLICKHOUSE_ADDR" help:"Addresses of a ClickHouse of your own (native protocol); embedded when empty."`
	ClickHouse        history.Credentials    `embed:""`
	APIListen         string                 `name:"api-listen" env:"TOLLKEEPER_API_LISTEN" default:"127.0.0.1:8402" help:"Address of console and API."`
	APIToken          string                 `name:"api-token" env:"TOLLKEEPER_API_TOKEN" help:"Bearer token of the API; needed when other machines can reach it."`
	GatewayListen     string                 `name:"gateway-listen" env:"TOLLKEEPER_GATEWAY_LISTEN" default:"127.0.0.1:8080" help:"Address of the gateway."`
	GatewayAdmin      string                 `name:"gateway-admin-listen" env:"TOLLKEEPER_GATEWAY_ADMIN_LISTEN" default:"127.0.0.1:8081" help:"Address of the gateway's own API."`
	GatewayToken      string                 `name:"gateway-admin-token" env:"TOLLKEEPER_GATEWAY_ADMIN_TOKEN" help:"Bearer token of the gateway's own API; needed when other machines can reach it."`
	GatewayConfig     string                 `name:"gateway-config" env:"TOLLKEEPER_GATEWAY_CONFIG" type:"path" help:"Routes of the gateway; the demo's when empty."`
	SpoolBeforeAnswer bool                   `name:"spool-before-answer" env:"TOLLKEEPER_SPOOL_BEFORE_ANSWER" help:"The gateway answers a call only when its event is on disk or in the ledger."`
	Plans             string                 `name:"plans" env:"TOLLKEEPER_PLANS" type:"path" help:"Plans file to apply at the start; the demo's, once, when empty."`
	Demo              bool                   `name:"demo" env:"TOLLKEEPER_DEMO" default:"true" negatable:"" help:"Demo traffic through the gateway."`
	DemoSeed          uint64                 `name:"demo-seed" env:"TOLLKEEPER_DEMO_SEED" default:"402" help:"Seed of the demo traffic."`
	Shards            uint32                 `name:"shards" env:"TOLLKEEPER_SHARDS" help:"Shards of a ledger that does not exist yet; 0 is the default for one machine."`
	Currency          string                 `name:"currency" env:"TOLLKEEPER_CURRENCY" help:"Currency of all costs of a ledger that does not exist yet, by its ISO 4217 code; USD when empty. Costs in another are refused."`
	alerter.Receivers `embed:""`
	commandLog        `embed:""`
}

func (c *upCmd) Run(ctx context.Context) error {
	log, err := c.Logger("tollkeeper")
	if err != nil {
		return err
	}
	o := tollkeeper.Options{
		Engines: c.Engines.options(log), NATS: natsconn.Options{}, Shards: c.Shards, Currency: c.Currency, APIListen: c.APIListen, APIToken: c.APIToken,
		Gateway: &gateway.Options{Listen: c.GatewayListen, AdminListen: c.GatewayAdmin, AdminToken: c.GatewayToken, SpoolBeforeAnswer: c.SpoolBeforeAnswer},
		Plans:   c.Plans, Demo: c.Demo, DemoSeed: c.DemoSeed, Logger: log, Out: os.Stdout,
	}
	if c.NATSURL != "" {
		o.NATS = c.NATS.Options(c.NATSURL, "up", log)
	} else {
		o.Engines.NATSUser, o.Engines.NATSPassword = c.NATS.NATSUser, c.NATS.NATSPassword
	}
	if len(c.ClickHouseAddr) > 0 {
		if o.ClickHouse, err = c.ClickHouse.Options(c.ClickHouseAddr, log); err != nil {
			return err
		}
	}
	if len(c.ClickHouseAddr) == 0 {
		own, err := c.ClickHouse.Options(nil, log)
		if err != nil {
			return err
		}
		o.Engines.ClickHouse = embedclickhouse.Credentials{ServicePassword: own.Password, AnalystPassword: c.AnalystPassword}
	}
	if c.GatewayConfig != "" {
		if o.Gateway.Config, err = gateway.LoadConfig(c.GatewayConfig); err != nil {
			return err
		}
	} else if !c.Demo {
		o.Gateway = nil
	}
	if err := c.Receivers.Set(&o.Alerter, os.Getenv(alerter.WebhookSecretVariable)); err != nil {
		return err
	}
	return tollkeeper.Run(ctx, o)
}

type engineCmd struct {
	Install engineInstallCmd `cmd:"" help:"Fetch the engine, if it is not there, and say where it is."`
}

type engineInstallCmd struct {
	EngineDir  string `name:"engine-dir" env:"TOLLKEEPER_ENGINE_DIR" type:"path" help:"Where the engine is installed; the user's cache when empty."`
	config.Log `embed:""`
}

func (c *engineInstallCmd) Run(ctx context.Context) error {
	log, err := c.Logger("engine")
	if err != nil {
		return err
	}
	path, err := engine.Install(ctx, engine.Options{EngineDir: c.EngineDir, Logger: log, Progress: os.Stderr})
	if err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}

type natsCmd struct {
	DataDir    string        `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Where the streams are kept, in the folder nats."`
	NATSListen string        `name:"nats-listen" env:"TOLLKEEPER_NATS_LISTEN" default:"127.0.0.1:4222" help:"Address."`
	NATSSync   time.Duration `name:"nats-sync" env:"TOLLKEEPER_NATS_SYNC" default:"0" help:"How often acknowledged frames are forced to disk; 0 is before every acknowledgement."`
	config.Log `embed:""`
}

func (c *natsCmd) Run(ctx context.Context) error {
	log, err := c.Logger("nats")
	if err != nil {
		return err
	}
	return engine.RunNATS(ctx, engine.Options{DataDir: c.DataDir, NATSListen: c.NATSListen, NATSSync: c.NATSSync, Logger: log}, os.Stdout)
}

type clickhouseCmd struct {
	DataDir              string `name:"data-dir" env:"TOLLKEEPER_DATA_DIR" default:".tollkeeper" type:"path" help:"Where the tables are kept, in the folder clickhouse."`
	EngineDir            string `name:"engine-dir" env:"TOLLKEEPER_ENGINE_DIR" type:"path" help:"Where the engine is installed; the user's cache when empty."`
	ClickHouseListen     string `name:"clickhouse-listen" env:"TOLLKEEPER_CLICKHOUSE_LISTEN" default:"127.0.0.1:9000" help:"Address, native protocol."`
	ClickHouseHTTPListen string `name:"clickhouse-http-listen" env:"TOLLKEEPER_CLICKHOUSE_HTTP_LISTEN" default:"127.0.0.1:8123" help:"Address, HTTP."`
	config.Log           `embed:""`
}

func (c *clickhouseCmd) Run(ctx context.Context) error {
	log, err := c.Logger("clickhouse")
	if err != nil {
		return err
	}
	return engine.RunClickHouse(ctx, engine.Options{
		DataDir: c.DataDir, EngineDir: c.EngineDir, ClickHouseListen: c.ClickHouseListen, ClickHouseHTTPListen: c.ClickHouseHTTPListen,
		Logger: log, Progress: os.Stderr,
	}, os.Stdout)
}
