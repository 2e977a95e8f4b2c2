package history

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// target is one table that gets blocks.
type target int

const (
	targetCalls target = iota
	targetHourly
	targetMinutely
	targetDecisions
	targetControl
	targetAlerts
	targetCorrections
	numTargets
)

func (t target) String() string {
	return [...]string{"calls", "usage_hourly", "traffic_minute", "decisions", "control", "alerts", "corrections"}[t]
}

// Part is what one table gets of a block: one insert, which the server keeps
// whole or not at all.
type Part struct {
	h      *History
	target target
	rows   int
	input  func() proto.Input
	// present asks whether the server has it; nothing newer was ever sent.
	present func(ctx context.Context) (bool, error)
}

// Table returns the part's table: one of a few names.
func (p *Part) Table() string { return p.target.String() }

// Rows returns how many rows the part has.
func (p *Part) Rows() int { return p.rows }

// Insert sends the part under a de-duplication token: another insert with the
// same token does nothing. After an error the part is in doubt: it may be there,
// or come to be there later. Not safe for concurrent use with another part of
// the same table.
func (p *Part) Insert(ctx context.Context, token string) error {
	if err := p.h.senders[p.target].insert(ctx, p.target, token, p.input()); err != nil {
		return fmt.Errorf("insert %d rows into %s: %w", p.rows, p.target, err)
	}
	return nil
}

// Present reports whether the server has the part, by its rows and not by the
// token: a server that was killed may have noted a token without having kept the
// rows, or kept the rows without the token. It errs when only a part of it is
// there (ErrTorn). It is meant for the newest block of a table.
func (p *Part) Present(ctx context.Context) (bool, error) { return p.present(ctx) }

// ErrTorn says that a block is neither there nor missing.
var ErrTorn = errors.New("the history holds another number of rows of this block than it has: two historians may have written, or rows were removed by hand")

// Parts returns what each table gets of the block; the block must not change
// until they are inserted. A block without rows has none.
func (h *History) Parts(b *Block) []Part {
	if b.Rows() == 0 {
		return nil
	}
	var calls, hourly, minutely proto.Input // made once, also when tried again
	rollupPresent := func(table string) func(context.Context) (bool, error) {
		return func(ctx context.Context) (bool, error) {
			last, err := h.lastSequence(ctx, table, Month(b.Until()))
			return last >= b.Last(), err
		}
	}
	once := func(in *proto.Input, build func() proto.Input) func() proto.Input {
		return func() proto.Input {
			if *in == nil {
				*in = build()
			}
			return *in
		}
	}
	hours, hourlyColumns := b.Hourly()
	minutes, minutelyColumns := b.Minutely()
	return []Part{
		{h: h, target: targetCalls, rows: b.Rows(), input: once(&calls, b.Calls), present: func(ctx context.Context) (bool, error) {
			n, err := h.CountCalls(ctx, b.First(), b.Last(), b.Since(), b.Until())
			return present(n, b.Rows(), err)
		}},
		{h: h, target: targetHourly, rows: hours, input: once(&hourly, hourlyColumns), present: rollupPresent("usage_hourly")},
		{h: h, target: targetMinutely, rows: minutes, input: once(&minutely, minutelyColumns), present: rollupPresent("traffic_minute")},
	}
}

func present(n uint64, rows int, err error) (bool, error) {
	switch {
	case err != nil:
		return false, err
	case n == 0:
		return false, nil
	case n == uint64(rows):
		return true, nil
	}
	return false, fmt.Errorf("%d rows where %d belong: %w", n, rows, ErrTorn)
}

// CountCalls returns how many calls the history has of a range of the ledger,
// both ends included. since and until bound the ledger's time of that range; they
// spare the server from looking everywhere.
func (h *History) CountCalls(ctx context.Context, from, to uint64, since, until usage.Micros) (n uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	const q = `SELECT count() FROM calls
		WHERE sequence BETWEEN ? AND ? AND stream_time BETWEEN toDateTime(?, 'UTC') AND toDateTime(?, 'UTC')`
	if err := h.conn.QueryRow(ctx, q, from, to, int64(since)/1_000_000, int64(until)/1_000_000).Scan(&n); err != nil {
		return 0, fmt.Errorf("count the calls of ledger entries %d to %d: %w", from, to, err)
	}
	return n, nil
}

func (h *History) lastSequence(ctx context.Context, table string, month uint32) (last uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := h.conn.QueryRow(ctx, "SELECT max(last_sequence) FROM "+table+" WHERE month = ?", month).Scan(&last); err != nil {
		return 0, fmt.Errorf("read how far %s is: %w", table, err)
	}
	return last, nil
}

// sender has the one connection over which a table gets its blocks.
type sender struct {
	h *History

	mu     sync.Mutex
	client *ch.Client
}

func (s *sender) insert(ctx context.Context, t target, token string, in proto.Input) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client == nil || s.client.IsClosed() {
		c, err := s.dial(ctx)
		if err != nil {
			return err
		}
		s.client = c
	}
	// The driver notices that ctx has ended when the server says something, or
	// after insertSilence: a server that hangs would hold up a stop for as long.
	client := s.client
	stop := context.AfterFunc(ctx, func() { _ = client.Close() })
	defer stop()
	err := client.Do(ctx, ch.Query{
		Body:  in.Into(t.String()),
		Input: in,
		Settings: []ch.Setting{
			{Key: "insert_deduplicate", Value: "1", Important: true},
			{Key: "insert_deduplication_token", Value: token, Important: true},
			// The rows are there when the server answers, not some time later.
			{Key: "async_insert", Value: "0", Important: true},
		},
	})
	if err != nil {
		// What the server still has to say to this query must not be taken
		// for the answer to the next.
		if cerr := client.Close(); cerr != nil && !errors.Is(cerr, ch.ErrClosed) && !errors.Is(cerr, net.ErrClosed) {
			err = errors.Join(err, cerr)
		}
		s.client = nil
		return err
	}
	return nil
}

func (s *sender) dial(ctx context.Context) (*ch.Client, error) {
	o := s.h.o
	var errs []error
	for _, addr := range o.Addrs {
		opts := ch.Options{
			Address: addr, Database: o.Database, User: o.User, Password: o.Password, TLS: o.TLS,
			DialTimeout: o.Timeout, HandshakeTimeout: 5 * time.Second, ReadTimeout: insertSilence,
			ClientName: "tollkeeper", Compression: ch.CompressionLZ4,
		}
		if loopback(addr) {
			// Between two processes of one machine compressing costs more than
			// it spares.
			opts.Compression = ch.CompressionDisabled
		}
		c, err := ch.Dial(ctx, opts)
		if err == nil {
			return c, nil
		}
		errs = append(errs, fmt.Errorf("connect to ClickHouse at %s: %w", addr, err))
	}
	return nil, errors.Join(errs...)
}

// insertSilence is how long a server may say nothing while it writes a block;
// it sends progress several times a second while it lives.
const insertSilence = 30 * time.Second

func (s *sender) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client == nil {
		return nil
	}
	err := s.client.Close()
	s.client = nil
	if errors.Is(err, ch.ErrClosed) {
		return nil
	}
	return err
}

func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
