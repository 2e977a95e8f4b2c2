package alerter

import (
	"fmt"
	"os"
	"slices"
)

// WebhookSecretVariable is the environment's secret of webhooks without a file.
const WebhookSecretVariable = "TOLLKEEPER_WEBHOOK_SECRET"

// Receivers are the flags of who is told; each is also a TOLLKEEPER_* variable.
// Embed them into a kong command.
type Receivers struct {
	Alertmanager      []string          `name:"alertmanager" env:"TOLLKEEPER_ALERTMANAGER" sep:"," help:"Base URL of an Alertmanager, such as http://127.0.0.1:9093; every member of a cluster."`
	Webhook           map[string]string `name:"webhook" env:"TOLLKEEPER_WEBHOOK" mapsep:";" help:"NAME=URL of a webhook (Standard Webhooks)."`
	WebhookSecretFile map[string]string `name:"webhook-secret-file" env:"TOLLKEEPER_WEBHOOK_SECRET_FILE" mapsep:";" help:"NAME=FILE with the webhook's whsec_… secret; several, one a line, while it is rotated. Or variable TOLLKEEPER_WEBHOOK_SECRET for all without a file."`
}

// Set puts the receivers into o. secret signs for webhooks without a file.
func (f *Receivers) Set(o *Options, secret string) (err error) {
	o.Alertmanagers = f.Alertmanager
	o.Webhooks, err = f.webhooks(secret)
	return err
}

func (f *Receivers) webhooks(secret string) ([]Webhook, error) {
	var all []Webhook
	names := make([]string, 0, len(f.Webhook))
	for name := range f.Webhook {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		text, where := secret, WebhookSecretVariable
		if file, ok := f.WebhookSecretFile[name]; ok {
			b, err := os.ReadFile(file)
			if err != nil {
				return nil, fmt.Errorf("secret of webhook %s: %w", name, err)
			}
			text, where = string(b), file
		}
		s, err := ParseSecret(text)
		if err != nil {
			return nil, fmt.Errorf("webhook %s: %s: %w (give a file with --webhook-secret-file %s=FILE)", name, where, err, name)
		}
		all = append(all, Webhook{Name: name, URL: f.Webhook[name], Secret: s})
	}
	for name := range f.WebhookSecretFile {
		if _, ok := f.Webhook[name]; !ok {
			return nil, fmt.Errorf("--webhook-secret-file names webhook %s, which --webhook does not", name)
		}
	}
	return all, nil
}
