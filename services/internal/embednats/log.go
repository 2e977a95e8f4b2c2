package embednats

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// natsLogger is nats-server's logger on top of ours. It must not call the server,
// which may hold its lock while it logs.
type natsLogger struct {
	l     zerolog.Logger
	o     Options
	hide  *strings.Replacer
	fatal chan<- error
}

func newLogger(o Options, fatal chan<- error) *natsLogger {
	return &natsLogger{l: o.Logger.With().Str("component", "nats").Logger(), o: o, hide: newReplacer(o.secrets()), fatal: fatal}
}

func (n *natsLogger) say(e *zerolog.Event, format string, v []any) {
	if e != nil {
		e.Msg(n.text(format, v))
	}
}

func (n *natsLogger) text(format string, v []any) string {
	return n.hide.Replace(strings.TrimSpace(fmt.Sprintf(format, v...)))
}

// Noticef: what nats-server finds notable (a page at each start) is detail here.
func (n *natsLogger) Noticef(format string, v ...any) { n.say(n.l.Debug(), format, v) }
func (n *natsLogger) Warnf(format string, v ...any)   { n.say(n.l.Warn(), format, v) }
func (n *natsLogger) Errorf(format string, v ...any)  { n.say(n.l.Error(), format, v) }
func (n *natsLogger) Debugf(format string, v ...any)  { n.say(n.l.Trace(), format, v) }
func (n *natsLogger) Tracef(format string, v ...any)  { n.say(n.l.Trace(), format, v) }

// Fatalf is where nats-server's own main would exit. The start waits for the
// error; later ones have no reader and are only logged.
func (n *natsLogger) Fatalf(format string, v ...any) {
	err := n.fatalError(format, v)
	select {
	case n.fatal <- err:
	default:
		n.l.Error().Msg(err.Error())
	}
}

// fatalError keeps the cause, and names the flag when it is a taken port.
func (n *natsLogger) fatalError(format string, v []any) error {
	for _, a := range v {
		err, ok := a.(error)
		if !ok {
			continue
		}
		if errors.Is(err, syscall.EADDRINUSE) {
			flag, host, port := n.o.Flag, n.o.Host, n.o.Port
			if c := n.o.Cluster; c != nil && strings.Contains(format, "router port") {
				flag, host, port = c.Flag, c.Host, c.Port
			}
			return &telemetry.ListenError{
				Flag: flag, Addr: net.JoinHostPort(host, strconv.Itoa(port)), Err: syscall.EADDRINUSE,
			}
		}
		return &causeError{text: "embedded NATS: " + n.text(format, v), cause: err}
	}
	return errors.New("embedded NATS: " + n.text(format, v))
}

// causeError is a text without secrets over a cause whose own text may have them.
type causeError struct {
	text  string
	cause error
}

func (e *causeError) Error() string { return e.text }
func (e *causeError) Unwrap() error { return e.cause }
