// Command console serves Tollkeeper's HTTP API and page.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/services/console"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type flags struct {
	Listen    string            `default:"127.0.0.1:8402" env:"TOLLKEEPER_LISTEN" help:"Address of the API and the page. Other machines can reach it only with a token."`
	TokenFile string            `env:"TOLLKEEPER_TOKEN_FILE" help:"File with the bearer token that changes need and, where other machines can connect, everything."`
	Peer      map[string]string `env:"TOLLKEEPER_PEER" help:"Another service's /readyz, as in alerter=http://127.0.0.1:8084/readyz; may be repeated."`
	Shards    uint32            `env:"TOLLKEEPER_SHARDS" help:"Shards of a ledger that does not exist yet."`
	Replicas  int               `default:"1" env:"TOLLKEEPER_REPLICAS" help:"Replicas of streams that do not exist yet."`

	NATS          string `name:"nats" default:"nats://127.0.0.1:4222" env:"TOLLKEEPER_NATS" help:"Addresses of NATS, separated by commas."`
	NATSCreds     string `name:"nats-creds" env:"TOLLKEEPER_NATS_CREDS" help:"Credentials file of NATS (JWT and seed)."`
	NATSNKey      string `name:"nats-nkey" env:"TOLLKEEPER_NATS_NKEY" help:"NKey seed file of NATS."`
	NATSTokenFile string `name:"nats-token-file" env:"TOLLKEEPER_NATS_TOKEN_FILE" help:"File with the token of NATS."`
	NATSCA        string `name:"nats-ca" env:"TOLLKEEPER_NATS_CA" help:"Certificate authority of NATS (PEM)."`

	ClickHouse             []string `name:"clickhouse" default:"127.0.0.1:9000" env:"TOLLKEEPER_CLICKHOUSE" help:"Addresses of ClickHouse (native protocol)."`
	ClickHouseDatabase     string   `name:"clickhouse-database" env:"TOLLKEEPER_CLICKHOUSE_DATABASE" help:"Database of the history."`
	ClickHouseUser         string   `name:"clickhouse-user" env:"TOLLKEEPER_CLICKHOUSE_USER" help:"User of ClickHouse."`
	ClickHousePasswordFile string   `name:"clickhouse-password-file" env:"TOLLKEEPER_CLICKHOUSE_PASSWORD_FILE" help:"File with the password of ClickHouse."`
	ClickHouseTLS          bool     `name:"clickhouse-tls" env:"TOLLKEEPER_CLICKHOUSE_TLS" help:"Encrypt the connections to ClickHouse."`
	ClickHouseCA           string   `name:"clickhouse-ca" env:"TOLLKEEPER_CLICKHOUSE_CA" help:"Certificate authority of ClickHouse (PEM); turns encryption on."`

	LogLevel  string `default:"info" env:"TOLLKEEPER_LOG_LEVEL" help:"trace, debug, info, warn or error."`
	LogFormat string `default:"auto" env:"TOLLKEEPER_LOG_FORMAT" help:"auto, console or json."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Description("Tollkeeper's HTTP API and page."))
	run.Main(func(ctx context.Context) error {
		o, err := f.options()
		if err != nil {
			return err
		}
		return console.Run(ctx, o)
	})
}

func (f *flags) options() (console.Options, error) {
	log, err := telemetry.NewLogger(telemetry.LogOptions{Level: f.LogLevel, Format: f.LogFormat, Service: "console"})
	if err != nil {
		return console.Options{}, err
	}
	o := console.Options{
		Listen: f.Listen, Shards: f.Shards, Replicas: f.Replicas, Logger: log, Registry: telemetry.NewRegistry(),
		NATS: natsconn.Options{URL: f.NATS, CredsFile: f.NATSCreds, NKeySeedFile: f.NATSNKey, TokenFile: f.NATSTokenFile, CAFile: f.NATSCA, Logger: log},
	}
	if o.Token, err = secret("the console's token", f.TokenFile); err != nil {
		return o, err
	}
	password, err := secret("the password of ClickHouse", f.ClickHousePasswordFile)
	if err != nil {
		return o, err
	}
	o.ClickHouse = history.Options{Addrs: f.ClickHouse, Database: f.ClickHouseDatabase, User: f.ClickHouseUser, Password: password, Logger: log}
	if f.ClickHouseTLS || f.ClickHouseCA != "" {
		if o.ClickHouse.TLS, err = history.LoadTLS(f.ClickHouseCA); err != nil {
			return o, err
		}
	}
	for name, url := range f.Peer {
		o.Peers = append(o.Peers, console.Peer{Name: name, URL: url})
	}
	return o, nil
}

// secret reads a file that holds nothing else; without a file there is none.
func secret(what, file string) (string, error) {
	if file == "" {
		return "", nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%s: %w", what, err)
	}
	s := strings.TrimSpace(string(data))
	if s == "" {
		return "", fmt.Errorf("%s: the file %s is empty", what, file)
	}
	return s, nil
}
