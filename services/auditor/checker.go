package auditor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/books"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/findings"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// checker asks ClickHouse, one piece of work at a time.
type checker struct {
	o       Options
	js      jetstream.JetStream
	jobs    chan job
	results chan result
}

// job is a round to compare, or a finding that may have healed, or neither.
type job struct {
	round   *round
	finding *findings.Finding
}

type result struct {
	job       job
	done      bool
	outcomes  []books.Outcome
	committed uint64
	floor     uint64
	err       error
}

func newChecker(o Options, js jetstream.JetStream) *checker {
	return &checker{o: o, js: js, jobs: make(chan job, 1), results: make(chan result, 1)}
}

func (c *checker) run(ctx context.Context) error {
	o := c.o.ClickHouse
	o.Logger = c.o.Logger
	if o.Readiness == nil {
		o.Readiness = c.o.Readiness.Component("auditor_clickhouse")
	}
	h, err := history.Open(ctx, o)
	if err != nil {
		return errors.Join(err, ctx.Err())
	}
	defer func() { _ = h.Close() }() // it only reads
	ready := c.o.Readiness.Component("auditor_tables")
	begun := false
	for {
		select {
		case j := <-c.jobs:
			r := result{job: j}
			if !begun {
				if r.floor, r.err = begin(ctx, h, ready); r.err == nil {
					begun = true
				}
				var refused *history.MigrationError
				if errors.As(r.err, &refused) || history.Permanent(r.err) {
					return r.err
				}
			}
			if r.err == nil {
				r.err = c.check(ctx, h, &r)
			}
			select {
			case c.results <- r:
			case <-ctx.Done():
				return ctx.Err()
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tables of ClickHouse; *history.History has them.
type tables interface {
	// Migrated says whether they are made.
	Migrated(ctx context.Context) error
	// AuditFrom returns up to where they can't be compared.
	AuditFrom(ctx context.Context) (uint64, error)
}

// begin finds out from where on the history can be compared. The tables are the
// historian's to make: until it has, that is what the auditor waits for, and the
// next piece of work comes in a second.
func begin(ctx context.Context, h tables, ready *telemetry.Component) (floor uint64, err error) {
	if err = h.Migrated(ctx); err == nil {
		floor, err = h.AuditFrom(ctx)
	}
	switch {
	case err == nil:
		ready.OK()
	case errors.Is(err, history.ErrNotMigrated):
		ready.NotReady(err.Error() + ": waiting for the historian, which makes them when it starts")
	default:
		ready.NotReady("whether ClickHouse's tables are made can't be found out: " + err.Error())
	}
	return floor, err
}

// compared is what is held against the ledger; *history.History has it.
type compared interface {
	// Ping says whether it can be asked now.
	Ping(ctx context.Context) error
	Audit(ctx context.Context, q history.AuditQuery) (*audit.Cells, error)
}

func (c *checker) check(ctx context.Context, h compared, r *result) (err error) {
	if r.job.round == nil && r.job.finding == nil {
		// Without work nothing else would show that ClickHouse is away, and the audit
		// would go on to say that all agrees.
		if err := h.Ping(ctx); err != nil {
			return err
		}
	}
	if r.committed, err = c.committed(ctx); err != nil {
		return err
	}
	switch {
	case r.job.round != nil:
		x := r.job.round
		got, err := h.Audit(ctx, history.AuditQuery{From: x.From, To: x.To, Since: x.Since, Until: x.Until, Limit: x.Cells.Len() + 10_000})
		if err != nil {
			return err
		}
		r.outcomes = append(r.outcomes, books.Outcome{
			Pair: books.LedgerHistory, Origin: stretch(x.From, x.To), From: x.From, To: x.To, Since: x.Since, Until: x.Until,
			Differences: audit.Compare(x.Cells, got),
		})
		r.done = true
	case r.job.finding != nil && !r.job.finding.Others:
		return c.heal(ctx, h, r)
	}
	return nil
}

func stretch(from, to uint64) string {
	return strconv.FormatUint(from, 10) + "-" + strconv.FormatUint(to, 10)
}

// heal looks whether the parts of a finding agree by now. A part's outcome is
// of this account alone: it names no other finding of the same stretch.
func (c *checker) heal(ctx context.Context, h compared, r *result) error {
	f := r.job.finding
	minute := audit.Minute(f.Minute / 60)
	for i := range f.Parts {
		p := &f.Parts[i]
		cells, err := h.Audit(ctx, history.AuditQuery{From: p.From, To: p.To, Since: p.Since, Until: p.Until, Accounts: []string{f.Account}, Limit: 10_000})
		if err != nil {
			return err
		}
		o := books.Outcome{Pair: f.Pair, Origin: p.Origin, From: p.From, To: p.To, Since: p.Since, Until: p.Until, Only: f.ID}
		if got, _ := cells.Get(minute, f.Account); got != p.Want {
			o.Differences = []audit.Difference{{Minute: minute, Account: f.Account, Kind: audit.KindOf(&p.Want, &got), Want: p.Want, Got: got}}
		}
		r.outcomes = append(r.outcomes, o)
	}
	return nil
}

// boundary is the historian's durable word on its newest block of calls: it
// stands before the block is sent, and Done says that it has arrived.
type boundary struct {
	From uint64 `json:"from"`
	To   uint64 `json:"to"`
	Done bool   `json:"done"`
}

// committed is up to where the historian says that all is in the history.
func (c *checker) committed(ctx context.Context) (uint64, error) {
	kv, err := c.js.KeyValue(ctx, ledger.HistorianBucket)
	if err != nil {
		return 0, fmt.Errorf("bucket %s: %w", ledger.HistorianBucket, err)
	}
	e, err := kv.Get(ctx, "calls")
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("how far the history is: %w", err)
	}
	var b boundary
	if err := json.Unmarshal(e.Value(), &b); err != nil {
		return 0, fmt.Errorf("how far the history is: %w", err)
	}
	if b.Done {
		return b.To, nil
	}
	return max(b.From, 1) - 1, nil
}
