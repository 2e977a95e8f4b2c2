// Package natsconn connects to NATS so that a service can wait for it at the
// start, loses it and gets it back without being restarted, and says so.
package natsconn

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
)

const (
	// DefaultTimeout bounds one try to connect.
	DefaultTimeout = 2 * time.Second
	// The pause between tries doubles from the first to the last; each is
	// shortened by up to half, so that a fleet does not come back in step.
	firstDelay = 50 * time.Millisecond
	lastDelay  = 2 * time.Second
)

// Readiness hears whether NATS can be reached. Both methods must be safe for
// concurrent use. *telemetry.Component is one.
type Readiness interface {
	OK()
	NotReady(reason string)
}

// Options says where NATS is and who we are. At most one kind of credentials.
type Options struct {
	// URL is one or more addresses, separated by commas, such as
	// nats://127.0.0.1:4222 or tls://nats.example.com:4222. Credentials inside
	// work, but a process list shows them.
	URL string
	// InProcess, if set, connects to an embedded server without a socket; URL
	// is ignored.
	InProcess nats.InProcessConnProvider

	CredsFile    string // JWT and seed, as nsc writes it
	NKeySeedFile string
	TokenFile    string // read again at every connect, so it may be rotated
	User         string
	Password     string
	CAFile       string // PEM of the authority that signed the server's certificate

	// Name is what `nats server report connections` shows.
	Name string
	// Logger hears once of every change, not of every try.
	Logger zerolog.Logger
	// Readiness hears the same; nil is allowed.
	Readiness Readiness
	// Timeout bounds one try to connect; 0 means DefaultTimeout.
	Timeout time.Duration
	// Extra options are applied last. Handlers among them replace this
	// package's, and with them what Readiness hears.
	Extra []nats.Option
}

// Connect waits until NATS accepts the connection or ctx is done, trying again
// with growing, jittered pauses of at most two seconds. It gives up at once only on
// what waiting won't mend: wrong options, unreadable credentials, or an
// authorization that the server refuses.
//
// The connection reconnects for ever. While it is away nothing is buffered:
// publishing fails with nats.ErrReconnectBufExceeded, so that the caller's spool,
// and not a buffer that dies with the process, holds what was not sent. End it
// with Close; ctx only bounds the waiting.
func Connect(ctx context.Context, o Options) (*nats.Conn, error) {
	target := Redact(o.URL)
	if o.InProcess != nil {
		target = "the embedded server"
	}
	c := &changes{o: o, target: target}
	opts, err := c.options()
	if err != nil {
		return nil, err
	}
	c.away(zerolog.DebugLevel, "connecting to NATS at "+target)
	for try := 0; ; try++ {
		tried := opts
		if end, ok := ctx.Deadline(); ok {
			// A server that says nothing holds a try up for all of its time.
			if left := max(time.Until(end), time.Millisecond); left < c.timeout() {
				tried = append(slices.Clone(opts), nats.Timeout(left))
			}
		}
		nc, err := nats.Connect(o.URL, tried...)
		if err == nil {
			if ctx.Err() != nil {
				// Its own handlers must not report the end of a
				// connection that nobody was given.
				c.mute()
				nc.Close()
				return nil, c.gaveUp(ctx, nil)
			}
			c.connected(nc)
			return nc, nil
		}
		if permanent(err) {
			return nil, &Error{text: fmt.Sprintf("connect to NATS at %s: %s", target, scrub(err, o)), cause: err}
		}
		c.away(zerolog.WarnLevel, fmt.Sprintf("NATS at %s can't be reached (%s): waiting for it", target, scrub(err, o)))
		timer := time.NewTimer(delay(try, rand.Float64()))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, c.gaveUp(ctx, err)
		}
	}
}

// Close lets what was received be handled and what was published leave, then
// closes; when ctx ends before, it closes at once and returns ctx's error. A
// connection that is away has nothing to drain and is closed at once.
func Close(ctx context.Context, nc *nats.Conn) error {
	if nc == nil || nc.IsClosed() {
		return nil
	}
	if !nc.IsConnected() {
		nc.Close()
		return nil
	}
	closed := nc.StatusChanged(nats.CLOSED)
	if err := nc.Drain(); err != nil {
		nc.Close()
		if errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrConnectionReconnecting) {
			return nil
		}
		return fmt.Errorf("drain the NATS connection: %w", err)
	}
	select {
	case <-closed:
		return nil
	case <-ctx.Done():
		nc.Close()
		return fmt.Errorf("drain the NATS connection: %w", ctx.Err())
	}
}

// changes tells log and readiness of a change once.
type changes struct {
	o      Options
	target string

	mu    sync.Mutex
	muted bool
	up    bool
	last  string // last thing said while away
}

func (c *changes) away(level zerolog.Level, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.muted || !c.up && c.last == reason {
		return
	}
	c.up, c.last = false, reason
	if c.o.Readiness != nil {
		c.o.Readiness.NotReady(reason)
	}
	c.o.Logger.WithLevel(level).Msg(reason)
}

// connected reports the first connection, unless it is lost already. Asking under
// the lock puts a loss that comes now behind this.
func (c *changes) connected(nc *nats.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if nc.IsConnected() {
		c.backLocked("connected to NATS")
	}
}

func (c *changes) back(how string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.backLocked(how)
}

func (c *changes) backLocked(how string) {
	if c.muted || c.up {
		return
	}
	c.up = true
	if c.o.Readiness != nil {
		c.o.Readiness.OK()
	}
	c.o.Logger.Info().Str("nats", c.target).Msg(how)
}

func (c *changes) mute() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.muted = true
}

func (c *changes) gaveUp(ctx context.Context, last error) error {
	e := &TimeoutError{Target: c.target, Err: ctx.Err()}
	if last != nil {
		e.Last = scrub(last, c.o)
	}
	return e
}

// TimeoutError says that the waiting was over before NATS accepted a connection.
type TimeoutError struct {
	Target string
	// Last is why the last try failed, without secrets; empty when that is not known.
	Last string
	Err  error // the context's
}

// Error is a sentence without secrets.
func (e *TimeoutError) Error() string {
	s := fmt.Sprintf("connect to NATS at %s: %v", e.Target, e.Err)
	if e.Last != "" {
		s += fmt.Sprintf(" (last answer: %s)", e.Last)
	}
	return s
}

// Unwrap returns the context's error.
func (e *TimeoutError) Unwrap() error { return e.Err }

// Error is a refused connection. Its text has no secrets; its cause, for
// errors.Is, is not meant to be printed.
type Error struct {
	text  string
	cause error
}

// Error is a sentence without secrets.
func (e *Error) Error() string { return e.text }

// Unwrap returns the cause, such as nats.ErrAuthorization.
func (e *Error) Unwrap() error { return e.cause }

func (c *changes) timeout() time.Duration {
	if c.o.Timeout > 0 {
		return c.o.Timeout
	}
	return DefaultTimeout
}

func (c *changes) options() ([]nats.Option, error) {
	o := c.o
	opts := []nats.Option{
		nats.Name(o.Name),
		nats.Timeout(c.timeout()),
		nats.MaxReconnects(-1),
		nats.ReconnectBufSize(-1),
		nats.CustomReconnectDelay(func(tries int) time.Duration { return delay(tries, rand.Float64()) }),
		// Credentials that are being rotated are refused for a while; the
		// default would close the connection for good at the second refusal.
		nats.IgnoreAuthErrorAbort(),
		// A server that vanished without a FIN is noticed within 3 × 5 s.
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.DisconnectErrHandler(func(nc *nats.Conn, err error) {
			if nc.IsClosed() {
				return
			}
			why := "closed by the server"
			if err != nil {
				why = scrub(err, o)
			}
			c.away(zerolog.WarnLevel, fmt.Sprintf("the connection to NATS at %s was lost (%s): reconnecting", c.target, why))
		}),
		nats.ReconnectHandler(func(*nats.Conn) { c.back("reconnected to NATS") }),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
			c.away(zerolog.WarnLevel, fmt.Sprintf("NATS at %s can't be reached (%s): waiting for it", c.target, scrub(err, o)))
		}),
		nats.ClosedHandler(func(*nats.Conn) { c.away(zerolog.DebugLevel, "the connection to NATS at "+c.target+" is closed") }),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			e := c.o.Logger.Error().Str("error", scrub(err, o))
			if sub != nil {
				e = e.Str("subject", sub.Subject)
			}
			e.Msg("NATS reported an error")
		}),
	}
	if o.InProcess != nil {
		opts = append(opts, nats.InProcessServer(o.InProcess))
	} else if strings.TrimSpace(o.URL) == "" {
		return nil, errors.New("no address of NATS: give one such as nats://127.0.0.1:4222")
	}

	kinds := 0
	if o.CredsFile != "" {
		kinds++
		if err := readable(o.CredsFile); err != nil {
			return nil, fmt.Errorf("NATS credentials file: %w", err)
		}
		opts = append(opts, nats.UserCredentials(o.CredsFile))
	}
	if o.NKeySeedFile != "" {
		kinds++
		opt, err := nats.NkeyOptionFromSeed(o.NKeySeedFile)
		if err != nil {
			return nil, fmt.Errorf("NATS nkey seed file %s: %w", o.NKeySeedFile, err)
		}
		opts = append(opts, opt)
	}
	if o.TokenFile != "" {
		kinds++
		if _, err := readToken(o.TokenFile); err != nil {
			return nil, err
		}
		opts = append(opts, nats.TokenHandler(func() string {
			token, err := readToken(o.TokenFile)
			if err != nil {
				// The server will refuse the empty token; this is why.
				c.o.Logger.Error().Err(err).Msg("the NATS token can't be read again")
			}
			return token
		}))
	}
	if o.User != "" || o.Password != "" {
		kinds++
		opts = append(opts, nats.UserInfo(o.User, o.Password))
	}
	if kinds > 1 {
		return nil, errors.New("several kinds of NATS credentials are given: choose one of credentials file, nkey seed file, token file, user and password")
	}
	if o.CAFile != "" {
		if err := readable(o.CAFile); err != nil {
			return nil, fmt.Errorf("NATS certificate authority: %w", err)
		}
		opts = append(opts, nats.RootCAs(o.CAFile))
	}
	return append(opts, o.Extra...), nil
}

func readable(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	return f.Close()
}

func readToken(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("NATS token file: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("NATS token file %s is empty", file)
	}
	return token, nil
}

// permanent says that trying again gives the same answer.
func permanent(err error) bool {
	var parse *url.Error
	return errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) ||
		errors.Is(err, nats.ErrAuthRevoked) || errors.Is(err, nats.ErrSecureConnRequired) ||
		errors.Is(err, nats.ErrSecureConnWanted) || errors.As(err, &parse)
}

// delay is the pause after the given number of failed tries; r in [0,1) is the
// jitter.
func delay(tries int, r float64) time.Duration {
	d := lastDelay
	if tries >= 0 && tries < 6 { // 50 ms << 6 is past the last delay
		d = min(firstDelay<<tries, lastDelay)
	}
	return d - time.Duration(r*float64(d)/2)
}

// Redact returns a list of URLs without the user, password or token that they may
// contain; what can't be parsed is not repeated at all.
func Redact(urls string) string {
	parts := strings.Split(urls, ",")
	for i, p := range parts {
		p = strings.TrimSpace(p)
		if !strings.Contains(p, "://") {
			p = "nats://" + p
		}
		u, err := url.Parse(p)
		if err != nil || u.Host == "" {
			parts[i] = "(an address that can't be parsed)"
			continue
		}
		parts[i] = u.Scheme + "://" + u.Host
	}
	return strings.Join(parts, ",")
}

// scrub returns the error's text without secrets.
func scrub(err error, o Options) string {
	var parse *url.Error
	if errors.As(err, &parse) {
		// It quotes the whole URL, and so does its cause at times.
		return "the address can't be parsed: give one such as nats://127.0.0.1:4222"
	}
	s := err.Error()
	if errors.Is(err, nats.ErrNoServers) {
		s = "connection refused" // which is all that nats.go means by it at a start
	}
	secrets := []string{o.Password}
	for p := range strings.SplitSeq(o.URL, ",") {
		if _, rest, ok := strings.Cut(p, "://"); ok {
			p = rest
		}
		if at := strings.LastIndexByte(p, '@'); at >= 0 {
			user, password, ok := strings.Cut(p[:at], ":")
			if ok {
				secrets = append(secrets, p[:at], password)
			} else {
				secrets = append(secrets, user) // a token
			}
		}
	}
	for _, secret := range secrets {
		if secret != "" {
			s = strings.ReplaceAll(s, secret, "…")
		}
	}
	return s
}
