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
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type flags struct {
	Listen    string            `name:"console-listen" env:"TOLLKEEPER_CONSOLE_LISTEN" default:"127.0.0.1:8402" help:"Address of the API and the page. Other machines can reach it only with a token."`
	TokenFile string            `name:"console-token-file" env:"TOLLKEEPER_CONSOLE_TOKEN_FILE" type:"path" help:"File with the bearer token that changes need and, where other machines can connect, everything."`
	Peers     map[string]string `name:"peer" env:"TOLLKEEPER_PEER" help:"Another service's /readyz, as in alerter=http://127.0.0.1:8084/readyz; may be repeated."`

	config.NATS    `embed:""`
	history.Flags  `embed:""`
	config.Streams `embed:""`
	config.Log     `embed:""`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("console"), kong.Description("Serves Tollkeeper's HTTP API and page."))
	run.Main(func(ctx context.Context) error { return start(ctx, &f) })
}

func start(ctx context.Context, f *flags) error {
	log, err := f.Logger("console")
	if err != nil {
		return err
	}
	o := console.Options{
		Listen: f.Listen, Flag: "console-listen", Shards: f.Shards, Currency: f.Currency, Replicas: f.Replicas, Logger: log, Registry: telemetry.NewRegistry(),
		NATS: f.NATS.Options("console", log),
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
