package history

import (
	"fmt"
	"os"
	"strings"

	"github.com/rs/zerolog"
)

// Credentials are the flags that say who we are to ClickHouse; each is also a
// TOLLKEEPER_* variable. Embed them into a kong command.
type Credentials struct {
	ClickHouseDatabase string `name:"clickhouse-database" env:"TOLLKEEPER_CLICKHOUSE_DATABASE" default:"tollkeeper" help:"Database of ClickHouse."`
	ClickHouseUser     string `name:"clickhouse-user" env:"TOLLKEEPER_CLICKHOUSE_USER" default:"tollkeeper" help:"User of ClickHouse."`
	ClickHousePassword string `name:"clickhouse-password" env:"TOLLKEEPER_CLICKHOUSE_PASSWORD" help:"Password of ClickHouse; better in the environment or a file, since flags are seen by others."`
	ClickHousePassFile string `name:"clickhouse-password-file" env:"TOLLKEEPER_CLICKHOUSE_PASSWORD_FILE" type:"path" help:"File with the password of ClickHouse."`
	ClickHouseTLS      bool   `name:"clickhouse-tls" env:"TOLLKEEPER_CLICKHOUSE_TLS" help:"Encrypt the connection to ClickHouse."`
	ClickHouseCA       string `name:"clickhouse-ca" env:"TOLLKEEPER_CLICKHOUSE_CA" type:"path" help:"PEM file of the authority that signed ClickHouse's certificate; implies --clickhouse-tls."`
}

// Options returns how to connect to the servers at addrs.
func (c Credentials) Options(addrs []string, log zerolog.Logger) (Options, error) {
	o := Options{Addrs: addrs, Database: c.ClickHouseDatabase, User: c.ClickHouseUser, Password: c.ClickHousePassword, Logger: log}
	if c.ClickHousePassFile != "" {
		b, err := os.ReadFile(c.ClickHousePassFile)
		if err != nil {
			return o, fmt.Errorf("password of ClickHouse: %w", err)
		}
		o.Password = strings.TrimRight(string(b), "\r\n")
	}
	if c.ClickHouseTLS || c.ClickHouseCA != "" {
		cfg, err := LoadTLS(c.ClickHouseCA)
		if err != nil {
			return o, err
		}
		o.TLS = cfg
	}
	return o, nil
}

// Flags are the flags of a ClickHouse of one's own.
type Flags struct {
	ClickHouseAddr []string `name:"clickhouse-addr" env:"TOLLKEEPER_CLICKHOUSE_ADDR" default:"127.0.0.1:9000" help:"Addresses of ClickHouse's native protocol."`
	Credentials    `embed:""`
}

// Options returns how to connect.
func (c Flags) Options(log zerolog.Logger) (Options, error) {
	return c.Credentials.Options(c.ClickHouseAddr, log)
}
