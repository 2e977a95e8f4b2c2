// Package history keeps what happened in ClickHouse and answers questions about
// it. It is the only package that knows a ClickHouse driver: the general one
// (clickhouse-go) for questions, the low-level one beneath it (ch-go) for the
// blocks of calls, whose columns go out as the ledger's frames brought them.
package history

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/rs/zerolog"
)

// Readiness hears whether ClickHouse can be reached. Both methods must be safe
// for concurrent use. *telemetry.Component is one.
type Readiness interface {
	OK()
	NotReady(reason string)
}

// DefaultDatabase holds the tables when Options names none.
const DefaultDatabase = "tollkeeper"

// Options says where ClickHouse is and who we are.
type Options struct {
	// Addrs are host:port of the native protocol. Several are names of ONE
	// server, tried in order: the tables are its own, and what one server has
	// can't be told from another's answer.
	Addrs []string
	// Database is DefaultDatabase when empty: letters, digits and '_'.
	Database string
	User     string
	Password string
	// TLS, if set, encrypts the connections.
	TLS *tls.Config
	// Timeout bounds one try to connect; 2 s when 0.
	Timeout time.Duration
	// Logger hears once of every change, not of every try.
	Logger zerolog.Logger
	// Readiness hears the same; nil is allowed.
	Readiness Readiness
}

// History is a connection to ClickHouse. It is safe for concurrent use.
type History struct {
	o       Options
	conn    driver.Conn
	senders [numTargets]sender

	mu   sync.Mutex
	said string // the last thing said to log and readiness while away
}

var databaseName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)

// Open waits until ClickHouse answers or ctx is done, trying again with growing,
// jittered pauses of at most two seconds, and says so on Readiness. It gives up
// at once only on what waiting won't mend: wrong options or refused credentials.
func Open(ctx context.Context, o Options) (*History, error) {
	if len(o.Addrs) == 0 {
		return nil, errors.New("no address of ClickHouse: give one such as 127.0.0.1:9000")
	}
	for _, a := range o.Addrs {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return nil, fmt.Errorf("the address of ClickHouse %q is not of the form host:port: %w", a, err)
		}
	}
	if o.Database == "" {
		o.Database = DefaultDatabase
	}
	if !databaseName.MatchString(o.Database) {
		return nil, fmt.Errorf("%q cannot name a database: use letters, digits and '_'", o.Database)
	}
	if o.Timeout <= 0 {
		o.Timeout = 2 * time.Second
	}
	h := &History{o: o}
	conn, err := clickhouse.Open(h.options(o.Database))
	if err != nil {
		return nil, fmt.Errorf("connect to ClickHouse: %w", err)
	}
	h.conn = conn
	for i := range h.senders {
		h.senders[i].h = h
	}
	if err := h.wait(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return h, nil
}

func (h *History) options(database string) *clickhouse.Options {
	return &clickhouse.Options{
		Addr:         h.o.Addrs,
		Auth:         clickhouse.Auth{Database: database, Username: h.o.User, Password: h.o.Password},
		TLS:          h.o.TLS,
		DialTimeout:  h.o.Timeout,
		ReadTimeout:  time.Minute, // a query's own deadline comes first
		MaxOpenConns: 8,
		MaxIdleConns: 4,
		Compression:  &clickhouse.Compression{Method: clickhouse.CompressionLZ4},
		// A connection that a proxy or a restart has cut is found by its use;
		// this only keeps a very old one from being the first to be tried.
		ConnMaxLifetime: 10 * time.Minute,
	}
}

// LoadTLS returns a TLS configuration that trusts the authorities of a PEM
// file, or those of the system when caFile is empty.
func LoadTLS(caFile string) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile == "" {
		return cfg, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("ClickHouse certificate authority: %w", err)
	}
	cfg.RootCAs = x509.NewCertPool()
	if !cfg.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("ClickHouse certificate authority: %s holds no PEM certificate", caFile)
	}
	return cfg, nil
}

// Close closes all connections. An insert in flight fails, and is in doubt.
func (h *History) Close() error {
	errs := []error{h.conn.Close()}
	for i := range h.senders {
		errs = append(errs, h.senders[i].close())
	}
	return errors.Join(errs...)
}

// Database returns the name of the database in use.
func (h *History) Database() string { return h.o.Database }

// Ping asks whether ClickHouse answers now, and tells Readiness.
func (h *History) Ping(ctx context.Context) error {
	err := h.ping(ctx)
	if err != nil {
		if ctx.Err() == nil { // else nobody waited for the answer
			h.away(h.describe(err))
		}
		return err
	}
	h.back()
	return nil
}

func (h *History) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, h.o.Timeout+time.Second)
	defer cancel()
	// Without a database, because Migrate has yet to make it.
	conn, err := clickhouse.Open(h.options(""))
	if err != nil {
		return fmt.Errorf("connect to ClickHouse: %w", err)
	}
	err = conn.Ping(ctx)
	if cerr := conn.Close(); err == nil {
		err = cerr
	}
	return err
}

func (h *History) wait(ctx context.Context) error {
	for try := 0; ; try++ {
		err := h.Ping(ctx)
		if err == nil {
			return nil
		}
		if Permanent(err) {
			return fmt.Errorf("ClickHouse at %s refuses us: %w", h.target(), err)
		}
		if err := pause(ctx, try); err != nil {
			return fmt.Errorf("connect to ClickHouse at %s: %w", h.target(), err)
		}
	}
}

func (h *History) target() string { return strings.Join(h.o.Addrs, ", ") }

func (h *History) describe(err error) string {
	return fmt.Sprintf("ClickHouse at %s can't be reached (%s): waiting for it", h.target(), firstLine(err))
}

func (h *History) away(reason string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.said == reason {
		return
	}
	h.said = reason
	h.o.Logger.Warn().Msg(reason)
	if h.o.Readiness != nil {
		h.o.Readiness.NotReady(reason)
	}
}

func (h *History) back() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.said == "connected" {
		return
	}
	h.said = "connected"
	h.o.Logger.Info().Str("clickhouse", h.target()).Msg("connected to ClickHouse")
	if h.o.Readiness != nil {
		h.o.Readiness.OK()
	}
}

// Permanent says that trying again gives the same answer until a person has
// changed something: credentials, grants.
func Permanent(err error) bool {
	switch errorCode(err) {
	case proto.ErrAuthenticationFailed, proto.ErrUnknownUser, proto.ErrWrongPassword, proto.ErrRequiredPassword, proto.ErrAccessDenied:
		return true
	}
	return false
}

func errorCode(err error) proto.Error {
	var e *clickhouse.Exception
	if errors.As(err, &e) {
		return proto.Error(e.Code)
	}
	if e, ok := ch.AsException(err); ok {
		return e.Code
	}
	return 0
}

// firstLine is an error's text without the stack that a server may add.
func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return s
}

// pause waits before the next try; it returns ctx's error when that ends first.
func pause(ctx context.Context, try int) error {
	d := 2 * time.Second
	if try < 6 {
		d = min(d, 50*time.Millisecond<<try)
	}
	timer := time.NewTimer(d - time.Duration(rand.Int64N(int64(d)/2)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TableID returns the identity that a table got when it was made, and whether
// it has no rows.
func (h *History) TableID(ctx context.Context, table string) (id string, empty bool, err error) {
	var rows uint64
	const q = "SELECT toString(uuid), ifNull(total_rows, 0) FROM system.tables WHERE database = currentDatabase() AND name = ?"
	if err := h.conn.QueryRow(ctx, q, table).Scan(&id, &rows); err != nil {
		return "", false, fmt.Errorf("ask ClickHouse for table %s: %w", table, err)
	}
	return id, rows == 0, nil
}
