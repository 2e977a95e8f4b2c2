// Command console serves Tollkeeper's HTTP API and page.
package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/services/console"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type flags struct {
	Listen    string            `name:"console-listen" env:"TOLLKEEPER_CONSOLE_LISTEN" default:"127.0.0.1:8402" help:"Address of the API and the page. Other machines can reach it only with a token."`
	TokenFile string            `name:"console-token-file" env:"TOLLKEEPER_CONSOLE_TOKEN_FILE" type:"path" help:"File with the bearer token that changes need and, where other machines can connect, everything."`
	Peers     map[string]string `name:"peer" env:"TOLLKEEPER_PEER" help:"Another service's /readyz, as in alerter=http://127.0.0.1:8084/readyz; may be repeated."`

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

	LogLevel  string `name:"log-level" env:"TOLLKEEPER_LOG_LEVEL" default:"info" help:"trace, debug, info, warn or error."`
	LogFormat string `name:"log-format" env:"TOLLKEEPER_LOG_FORMAT" default:"auto" help:"auto, console or json."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("console"), kong.Description("Serves Tollkeeper's HTTP API and page."))
	run.Main(func(ctx context.Context) error { return start(ctx, &f) })
}

func start(ctx context.Context, f *flags) error {
	log, err := telemetry.NewLogger(telemetry.LogOptions{Out: os.Stderr, Level: f.LogLevel, Format: f.LogFormat, Service: "console"})
	if err != nil {
		return err
	}
	o := console.Options{
		Listen: f.Listen, Flag: "console-listen", Shards: f.Shards, Replicas: f.Replicas, Logger: log, Registry: telemetry.NewRegistry(),
		NATS: natsconn.Options{
			URL: f.NATSURL, CredsFile: f.NATSCreds, NKeySeedFile: f.NATSNKeySeed, TokenFile: f.NATSTokenFile,
			User: f.NATSUser, Password: f.NATSPassword, CAFile: f.NATSCA, Name: "tollkeeper-console", Logger: log,
		},
	}
	if o.ClickHouse, err = f.Flags.Options(log); err != nil {
		return err
	}
	if f.TokenFile != "" {
		data, err := os.ReadFile(f.TokenFile)
		if err != nil {
			return fmt.Errorf("the console's token: %w", err)
		}
		if o.Token = strings.TrimSpace(string(data)); o.Token == "" {
			return fmt.Errorf("the console's token: the file %s is empty", f.TokenFile)
		}
	}
	for name, url := range f.Peers {
		o.Peers = append(o.Peers, console.Peer{Name: name, URL: url})
	}
	slices.SortFunc(o.Peers, func(a, b console.Peer) int { return strings.Compare(a.Name, b.Name) })
	return console.Run(ctx, o)
}
