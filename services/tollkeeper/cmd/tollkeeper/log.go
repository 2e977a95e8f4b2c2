package main

import (
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/config"
)

// commandLog says what is logged by a command that a person looks at: what is wrong,
// unless more is asked for.
type commandLog struct {
	Verbose   bool   `short:"v" help:"Log also what goes well, such as connections."`
	LogLevel  string `name:"log-level" env:"TOLLKEEPER_LOG_LEVEL" default:"warn" help:"trace, debug, info, warn or error."`
	LogFormat string `name:"log-format" env:"TOLLKEEPER_LOG_FORMAT" default:"auto" help:"auto, console or json."`
}

// natsWait bounds how long such a command waits for NATS.
type natsWait struct {
	NATSWait time.Duration `name:"nats-wait" env:"TOLLKEEPER_NATS_WAIT" default:"5s" help:"How long NATS may not answer, at the start and later, and its ledger may be missing at the start, before the command gives up."`
}

// Logger returns the logger of a command, which writes to standard error.
func (l commandLog) Logger(command string) (zerolog.Logger, error) {
	log, err := config.Log{LogLevel: l.LogLevel, LogFormat: l.LogFormat}.Logger(command)
	if l.Verbose && log.GetLevel() > zerolog.InfoLevel {
		log = log.Level(zerolog.InfoLevel)
	}
	return log, err
}
