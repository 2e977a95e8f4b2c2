// Command gateway runs Tollkeeper's reverse proxy.
package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
)

type flags struct {
	Config   string `help:"File with the routes (see --example-config)." env:"TOLLKEEPER_GATEWAY_CONFIG" placeholder:"FILE" xor:"routes"`
	Upstream string `help:"Send everything to this URL instead." env:"TOLLKEEPER_GATEWAY_UPSTREAM" placeholder:"URL" xor:"routes"`
	Profile  string `help:"Form of refusals with --upstream: problem, openai, anthropic or flat." enum:"problem,openai,anthropic,flat" default:"problem" env:"TOLLKEEPER_GATEWAY_PROFILE"`

	ExampleConfig bool `help:"Print a commented configuration and end."`

	GatewayListen      string `help:"Address of the proxy." default:"127.0.0.1:8080" env:"TOLLKEEPER_GATEWAY_LISTEN" placeholder:"HOST:PORT"`
	GatewayAdminListen string `help:"Address for events, admit, metrics and readiness; empty for none." default:"127.0.0.1:8081" env:"TOLLKEEPER_GATEWAY_ADMIN_LISTEN" placeholder:"HOST:PORT"`
	AdminToken         string `help:"Bearer token of the admin address; needed where other machines can reach it. Better in the environment or a file, since flags are seen by others." env:"TOLLKEEPER_ADMIN_TOKEN"`
	AdminTokenFile     string `help:"File with that token." env:"TOLLKEEPER_ADMIN_TOKEN_FILE" placeholder:"FILE"`

	Name   string `help:"This gateway's name; the host's by default." env:"TOLLKEEPER_GATEWAY_NAME"`
	Region string `help:"Region in the events." env:"TOLLKEEPER_REGION"`

	config.NATS `embed:""`

	Unknown         string        `help:"Calls whose verdict can't be known: pass or refuse." enum:"pass,refuse" default:"pass" env:"TOLLKEEPER_UNKNOWN"`
	UnknownMaxCalls uint32        `help:"How many of them pass, for each account, since its state became unknown." default:"1000" env:"TOLLKEEPER_UNKNOWN_MAX_CALLS"`
	LeaseWait       time.Duration `help:"How long a call waits for units of an exact limit that have to be fetched; then it is refused with 503." default:"1s" env:"TOLLKEEPER_LEASE_WAIT"`
	LeaseSkew       time.Duration `help:"By how much this machine's idea of the ledger's time is wrong at most." default:"250ms" env:"TOLLKEEPER_LEASE_SKEW"`
	LeasePass       bool          `help:"Let calls under limits of the tier leased pass as --unknown says when nobody answers in time; those of the tier exact never do." env:"TOLLKEEPER_LEASE_PASS"`
	LeasePurses     int           `help:"How many accounts' limits of the tiers exact and leased may be in use at a time, about 1 KB each; beyond, calls are refused with 503." default:"200000" env:"TOLLKEEPER_LEASE_PURSES"`
	LeaseShelved    int           `help:"How many of them, not in use any more, are remembered until their window is over, 80 to 200 bytes each." default:"2000000" env:"TOLLKEEPER_LEASE_SHELVED"`
	StaleAfter      time.Duration `help:"How long nothing may be heard of a shard before its state is unknown." default:"3s" env:"TOLLKEEPER_STALE_AFTER"`
	TrustEventTime  bool          `help:"Let clients say when a call took place (Tollkeeper-Event-Time): for replays only." env:"TOLLKEEPER_TRUST_EVENT_TIME"`

	SpoolDir          string `help:"Directory for events while NATS is away. Without it they are in memory only, and lost when the gateway ends." env:"TOLLKEEPER_SPOOL_DIR" placeholder:"DIR"`
	SpoolBytes        int64  `help:"Bound of the spool." env:"TOLLKEEPER_SPOOL_BYTES"`
	SpoolBeforeAnswer bool   `help:"Answer a call only when its event is on disk or in the ledger." env:"TOLLKEEPER_SPOOL_BEFORE_ANSWER"`
	OnFull            string `help:"What happens when memory and spool are full: block, refuse or drop." enum:"block,refuse,drop" default:"block" env:"TOLLKEEPER_ON_FULL"`

	config.Log `embed:""`
}

func main() {
	run.Main(start)
}

func start(ctx context.Context) error {
	var f flags
	kong.Parse(&f, kong.Name("gateway"), kong.Description("Tollkeeper's gateway: admits calls, answers 402 for what is used up, and meters."))
	if f.ExampleConfig {
		_, err := os.Stdout.Write(gateway.Example)
		return err
	}
	o, err := f.options()
	if err != nil {
		return &run.ExitError{Code: 2, Err: err}
	}
	return gateway.Run(ctx, o)
}

func (f *flags) options() (gateway.Options, error) {
	logger, err := f.Logger("gateway")
	if err != nil {
		return gateway.Options{}, err
	}
	o := gateway.Options{
		NATS:   f.NATS.Options("gateway", logger),
		Listen: f.GatewayListen, AdminListen: f.GatewayAdminListen, Name: f.Name, Region: f.Region,
		Unknown:    gate.Unknown{Mode: gate.UnknownMode(f.Unknown), MaxCalls: f.UnknownMaxCalls},
		Leases:     gate.Leases{Wait: f.LeaseWait, Skew: f.LeaseSkew, PassUnknown: f.LeasePass, MaxPurses: f.LeasePurses, MaxShelved: f.LeaseShelved},
		StaleAfter: f.StaleAfter, TrustEventTime: f.TrustEventTime,
		SpoolDir: f.SpoolDir, SpoolBytes: f.SpoolBytes, SpoolBeforeAnswer: f.SpoolBeforeAnswer,
		OnFull: map[string]outbox.FullPolicy{"block": outbox.Block, "refuse": outbox.Refuse, "drop": outbox.Drop}[f.OnFull],
		Logger: logger,
	}
	switch {
	case f.Upstream != "":
		o.Config = gateway.SingleUpstream("default", f.Upstream, refusal.Profile(f.Profile))
	case f.Config != "":
		if o.Config, err = gateway.LoadConfig(f.Config); err != nil {
			return o, err
		}
	default:
		return o, errors.New("no routes: give --config FILE (--example-config prints one) or --upstream URL")
	}
	o.AdminToken, err = config.Admin{AdminToken: f.AdminToken, AdminTokenFile: f.AdminTokenFile}.Token()
	return o, err
}
