// Package telemetry is how a process shows itself: its log, its metrics, its
// health and readiness, and the listeners that serve them.
package telemetry

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
)

// LogOptions configures NewLogger. The zero value logs info and above to stderr.
type LogOptions struct {
	// Out is where lines go; nil means stderr.
	Out io.Writer
	// Level is trace, debug, info, warn or error; empty means info.
	Level string
	// Format is auto (console on a terminal, JSON otherwise), console or json;
	// empty means auto.
	Format string
	// Service, if set, stands in every line.
	Service string
}

// NewLogger returns a logger that is safe for concurrent use if Out is. Times are
// UTC, RFC 3339 with milliseconds. The error names the option that is wrong.
func NewLogger(o LogOptions) (zerolog.Logger, error) {
	level := zerolog.InfoLevel
	if o.Level != "" {
		l, err := zerolog.ParseLevel(o.Level)
		if err != nil || l < zerolog.TraceLevel || l > zerolog.ErrorLevel {
			return zerolog.Nop(), fmt.Errorf("log level %q: choose trace, debug, info, warn or error", o.Level)
		}
		level = l
	}
	out := o.Out
	if out == nil {
		out = os.Stderr
	}
	console := false
	switch o.Format {
	case "", "auto":
		if f, ok := out.(*os.File); ok {
			console = isatty.IsTerminal(f.Fd())
		}
	case "console":
		console = true
	case "json":
	default:
		return zerolog.Nop(), fmt.Errorf("log format %q: choose auto, console or json", o.Format)
	}
	if console {
		out = zerolog.ConsoleWriter{Out: out, TimeFormat: "15:04:05.000"}
	}
	// The stamp is a hook because zerolog's own takes its format from a global.
	l := zerolog.New(out).Level(level).Hook(zerolog.HookFunc(func(e *zerolog.Event, _ zerolog.Level, _ string) {
		e.Str(zerolog.TimestampFieldName, time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	}))
	if o.Service != "" {
		l = l.With().Str("service", o.Service).Logger()
	}
	return l, nil
}
