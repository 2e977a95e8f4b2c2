// Package config holds the flags that several programs have: each is also a
// TOLLKEEPER_* variable. Embed the structs into a kong command.
package config

import (
	"fmt"
	"os"
	"strings"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// NATSCredentials say who we are to NATS; at most one kind.
type NATSCredentials struct {
	NATSCreds     string `name:"nats-creds" env:"TOLLKEEPER_NATS_CREDS" type:"path" help:"Credentials file of NATS."`
	NATSNKeySeed  string `name:"nats-nkey-seed" env:"TOLLKEEPER_NATS_NKEY_SEED" type:"path" help:"File with the seed of an nkey."`
	NATSTokenFile string `name:"nats-token-file" env:"TOLLKEEPER_NATS_TOKEN_FILE" type:"path" help:"File with a token for NATS."`
	NATSUser      string `name:"nats-user" env:"TOLLKEEPER_NATS_USER" help:"User of NATS."`
	NATSPassword  string `name:"nats-password" env:"TOLLKEEPER_NATS_PASSWORD" help:"Password of NATS; better in the environment, since flags are seen by others."`
	NATSCA        string `name:"nats-ca" env:"TOLLKEEPER_NATS_CA" type:"path" help:"PEM file of the authority that signed NATS's certificate."`
}

// Options returns how to connect to the server at url.
func (c NATSCredentials) Options(url, name string, log zerolog.Logger) natsconn.Options {
	return natsconn.Options{
		URL: url, CredsFile: c.NATSCreds, NKeySeedFile: c.NATSNKeySeed, TokenFile: c.NATSTokenFile, User: c.NATSUser,
		Password: c.NATSPassword, CAFile: c.NATSCA, Name: "tollkeeper " + name, Logger: log,
	}
}

// NATS is a NATS of one's own.
type NATS struct {
	NATSURL         string `name:"nats-url" env:"TOLLKEEPER_NATS_URL" default:"nats://127.0.0.1:4222" help:"Addresses of NATS, separated by commas."`
	NATSCredentials `embed:""`
}

// Options returns how to connect.
func (n NATS) Options(name string, log zerolog.Logger) natsconn.Options {
	return n.NATSCredentials.Options(n.NATSURL, name, log)
}

// Admin is a listener for machines and operators. Its default is the variable
// admin_listen of the kong parser.
type Admin struct {
	AdminListen    string `name:"admin-listen" env:"TOLLKEEPER_ADMIN_LISTEN" default:"${admin_listen}" help:"Where /metrics, /healthz and /readyz are served; empty: nowhere."`
	AdminToken     string `name:"admin-token" env:"TOLLKEEPER_ADMIN_TOKEN" help:"Bearer token of the admin listener; needed when other machines can reach it. Better in the environment or a file, since flags are seen by others."`
	AdminTokenFile string `name:"admin-token-file" env:"TOLLKEEPER_ADMIN_TOKEN_FILE" type:"path" help:"File with that token."`
}

// Token returns the token, empty when there is none.
func (a Admin) Token() (string, error) {
	if a.AdminTokenFile == "" {
		return a.AdminToken, nil
	}
	b, err := os.ReadFile(a.AdminTokenFile)
	if err != nil {
		return "", fmt.Errorf("admin token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("the admin token file %s is empty", a.AdminTokenFile)
	}
	return token, nil
}

// Streams says how streams are made that do not exist yet.
type Streams struct {
	Shards   uint32 `name:"shards" env:"TOLLKEEPER_SHARDS" help:"Shards of a ledger that does not exist yet; 0 is the default for one machine."`
	Currency string `name:"currency" env:"TOLLKEEPER_CURRENCY" help:"Currency of all costs of a ledger that does not exist yet, by its ISO 4217 code; USD when empty."`
	Replicas int    `name:"replicas" env:"TOLLKEEPER_REPLICAS" default:"1" help:"Replicas of streams that do not exist yet."`
}

// Log says what is logged, and how.
type Log struct {
	LogLevel  string `name:"log-level" env:"TOLLKEEPER_LOG_LEVEL" default:"info" help:"trace, debug, info, warn or error."`
	LogFormat string `name:"log-format" env:"TOLLKEEPER_LOG_FORMAT" default:"auto" help:"auto, console or json."`
}

// Logger returns the logger of a program, which writes to standard error.
func (l Log) Logger(service string) (zerolog.Logger, error) {
	return telemetry.NewLogger(telemetry.LogOptions{Out: os.Stderr, Level: l.LogLevel, Format: l.LogFormat, Service: service})
}
