// Command alerter reads the ledger's calls and wakes somebody when many
// accounts begin to be refused.
package main

import (
	"context"
	"os"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/pkg/alert"
	"github.com/tollkeeper/tollkeeper/services/alerter"
	"github.com/tollkeeper/tollkeeper/services/internal/config"
	"github.com/tollkeeper/tollkeeper/services/internal/run"
)

type flags struct {
	config.NATS  `embed:""`
	config.Admin `embed:""`
	config.Log   `embed:""`

	alerter.Receivers `embed:""`
	RunbookURL        string        `name:"runbook-url" env:"TOLLKEEPER_RUNBOOK_URL" help:"Link in every alert."`
	DashboardURL      string        `name:"dashboard-url" env:"TOLLKEEPER_DASHBOARD_URL" default:"http://127.0.0.1:8402/" help:"Link in every alert."`
	RepeatEvery       time.Duration `name:"alert-repeat-every" env:"TOLLKEEPER_ALERT_REPEAT_EVERY" default:"30s" help:"How often active alerts are repeated to Alertmanagers."`
	Timeout           time.Duration `name:"alert-timeout" env:"TOLLKEEPER_ALERT_TIMEOUT" default:"10s" help:"Timeout of one delivery."`

	Window         time.Duration `name:"alert-window" env:"TOLLKEEPER_ALERT_WINDOW" default:"60s" help:"Sliding window of the rule."`
	Threshold      float64       `name:"alert-threshold" env:"TOLLKEEPER_ALERT_THRESHOLD" default:"0.2" help:"Accounts that begin to be refused, as a part of the active ones."`
	MinAccounts    int           `name:"alert-min-accounts" env:"TOLLKEEPER_ALERT_MIN_ACCOUNTS" default:"5" help:"Least number of such accounts."`
	For            time.Duration `name:"alert-for" env:"TOLLKEEPER_ALERT_FOR" default:"5s" help:"How long it has to last."`
	ResolveAfter   time.Duration `name:"alert-resolve-after" env:"TOLLKEEPER_ALERT_RESOLVE_AFTER" default:"30s" help:"How long it has to be over."`
	NoTrafficAfter time.Duration `name:"alert-no-traffic-after" env:"TOLLKEEPER_ALERT_NO_TRAFFIC_AFTER" default:"10m" help:"Resolve, with that reason, after so long without calls; 0 is never."`
}

func main() {
	var f flags
	kong.Parse(&f, kong.Name("alerter"), kong.Description("Wakes somebody when many accounts begin to be refused with 402."), kong.Vars{"admin_listen": "127.0.0.1:8084"})
	run.Main(func(ctx context.Context) error {
		o, err := options(&f, os.Getenv(alerter.WebhookSecretVariable))
		if err != nil {
			return err
		}
		return alerter.Run(ctx, o)
	})
}

func options(f *flags, secret string) (alerter.Options, error) {
	log, err := f.Logger("alerter")
	if err != nil {
		return alerter.Options{}, err
	}
	rule := alert.DefaultRule()
	rule.Window, rule.Threshold, rule.MinAccounts, rule.For, rule.ResolveAfter, rule.NoTrafficAfter = f.Window, f.Threshold, f.MinAccounts, f.For, f.ResolveAfter, f.NoTrafficAfter
	rule.Quiet = max(rule.Quiet, rule.Window)
	o := alerter.Options{
		NATS:        f.NATS.Options("alerter", log),
		Rules:       []alert.Rule{rule},
		Links:       alerter.Links{Runbook: f.RunbookURL, Dashboard: f.DashboardURL, Generator: f.DashboardURL},
		RepeatEvery: f.RepeatEvery, Timeout: f.Timeout, AdminListen: f.AdminListen, Logger: log,
	}
	if o.AdminToken, err = f.Token(); err != nil {
		return alerter.Options{}, err
	}
	return o, f.Receivers.Set(&o, secret)
}
