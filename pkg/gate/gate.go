// Package gate puts Tollkeeper into a program that serves HTTP, or anything else
// that has calls to admit: it keeps the decisions of the ledger's aggregators in
// memory, admits or refuses calls without asking anybody, and hands the record
// of every call to an outbox.
//
//	g, err := gate.New(gate.Options{Conn: nc, OpenOutbox: …})
//	go g.Run(ctx)
//	http.Handle("/", g.Middleware(gate.MiddlewareOptions{Route: "api"}, app))
package gate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/directory"
	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/pace"
	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/ready"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/gate/wallet"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// The words of package table that callers need.
type (
	// KeyHash is the SHA-256 of an API key.
	KeyHash = table.KeyHash
	// Account is a handle on an account; it may be kept, see Account.Known.
	Account = table.Account
	// Caller is who makes a call.
	Caller = table.Caller
	// Request is what a limit's filter looks at.
	Request = table.Request
	// Verdict is the answer to a request for admission.
	Verdict = table.Verdict
	// Lookup is the outcome of a search for a key or an account.
	Lookup = table.Lookup
)

// The outcomes of a search.
const (
	Found      = table.Found
	NotFound   = table.NotFound
	CannotTell = table.CannotTell
)

// UnknownMode says what happens to calls whose verdict can't be known (law 5).
type UnknownMode string

// The modes.
const (
	// PassUnknown lets them through, up to a bound, and marks their events.
	PassUnknown UnknownMode = "pass"
	// RefuseUnknown answers them 503 BILLING_STATE_UNKNOWN.
	RefuseUnknown UnknownMode = "refuse"
)

// Unknown is the policy for calls whose verdict can't be known.
type Unknown struct {
	// Mode is PassUnknown when empty.
	Mode UnknownMode
	// MaxCalls that PassUnknown lets through for each account since its state
	// became unknown, those of the accounts below it included; 0 means
	// DefaultMaxUnknown. What comes after is refused. Each gateway counts for
	// itself: with n of them the bound is n times as large.
	MaxCalls uint32
}

// Defaults of Options.
const (
	DefaultMaxUnknown   = 1000
	DefaultStaleAfter   = 3 * time.Second
	DefaultCloseTimeout = 3 * time.Second
)

// Outbox takes the records of calls to the ledger. Its methods are safe for
// concurrent use.
type Outbox interface {
	// Run publishes until ctx is done.
	Run(ctx context.Context) error
	// Add returns nil once the call is the outbox's to deliver, outbox.ErrFull
	// when there is no room. It does not keep the pointer.
	Add(ctx context.Context, shard uint32, c *usage.Call) error
	// Close publishes or spools what is left and waits for it until ctx is done.
	Close(ctx context.Context) error
	// Producer is the identity of this run's frames, and of its leases.
	Producer() ksuid.KSUID
}

// Readiness hears whether a part can do its work. Its methods are safe for
// concurrent use.
type Readiness interface {
	OK()
	NotReady(reason string)
}

// Options configure a Gate. Conn or Connect, and OpenOutbox, are needed.
type Options struct {
	// Conn is the connection to NATS, which stays the caller's.
	Conn *nats.Conn
	// Connect is used when Conn is nil: it is called once, may wait as long as
	// its context lives, and what it returns is closed when Run ends.
	Connect func(ctx context.Context) (*nats.Conn, error)
	// Shards of the ledger; 0 asks the ledger, again and again until it answers.
	Shards uint32
	// OpenOutbox opens the outbox once NATS and the number of shards are known.
	OpenOutbox func(nc *nats.Conn, js jetstream.JetStream, shards uint32) (Outbox, error)

	Unknown Unknown
	// Leases are for limits of the tiers exact and leased.
	Leases Leases
	// StaleAfter is how long beacons or changes may be missing before what they
	// tell counts as unknown; DefaultStaleAfter when 0.
	StaleAfter time.Duration
	// AbortUnsettled breaks the answer off when its call could not be recorded:
	// what a client has whole has been metered, at the price of answers that were
	// served for nothing. It goes with an outbox that returns from Add only when
	// the call is on disk or in the ledger.
	AbortUnsettled bool
	// CloseTimeout bounds what Run takes after its context is done;
	// DefaultCloseTimeout when 0.
	CloseTimeout time.Duration

	Logger     zerolog.Logger
	Registerer prometheus.Registerer // nil: no metrics
	// Directory, Decisions and Outbox hear of the readiness of these parts; nil
	// is allowed.
	DirectoryReadiness, DecisionsReadiness, OutboxReadiness Readiness
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// TestClock of the ledger; nil: beacons tell, a quarter of a second late.
	TestClock func() usage.Micros
}

// Gate admits calls. Its methods are safe for concurrent use.
type Gate struct {
	o       Options
	now     func() time.Time
	metrics *metrics

	// The feeds write one at a time, and so does who asks for an account first.
	write     sync.Mutex
	directory atomic.Pointer[directory.Directory] // in front of table
	table     atomic.Pointer[table.Table]
	outbox    atomic.Pointer[Outbox]
	wallet    atomic.Pointer[wallet.Wallet]
	ready     *ready.Parts
	logs      pace.Limiter
	full      pace.Full
	beacon    atomic.Int64 // a test clock's time as the newest beacon shows it
}

// Errors of Settle.
var (
	// ErrNotReady: the ledger was never reached, so nobody knows where the
	// call's record belongs.
	ErrNotReady = errors.New("the ledger was not reached yet")
	// ErrUnknownAccount: the directory does not have the account.
	ErrUnknownAccount = errors.New("the directory does not have the account")
)

// New returns a gate that knows nothing until Run has reached NATS.
func New(o Options) (*Gate, error) {
	if o.Conn == nil && o.Connect == nil {
		return nil, errors.New("gate: neither a connection to NATS nor a way to get one is given")
	}
	if o.OpenOutbox == nil {
		return nil, errors.New("gate: no outbox is given: calls would not be metered")
	}
	switch o.Unknown.Mode {
	case "":
		o.Unknown.Mode = PassUnknown
	case PassUnknown, RefuseUnknown:
	default:
		return nil, fmt.Errorf("gate: unknown mode %q: choose %s or %s", o.Unknown.Mode, PassUnknown, RefuseUnknown)
	}
	if o.Unknown.MaxCalls == 0 {
		o.Unknown.MaxCalls = DefaultMaxUnknown
	}
	if o.StaleAfter <= 0 {
		o.StaleAfter = DefaultStaleAfter
	}
	if o.Leases.Wait < 0 || o.Leases.Skew < 0 || o.Leases.MaxPurses < 0 || o.Leases.MaxShelved < 0 || o.Leases.MaxWaiting < 0 || o.Leases.MaxReservations < 0 {
		return nil, errors.New("gate: the times and bounds of leases must not be negative")
	}
	if o.CloseTimeout <= 0 {
		o.CloseTimeout = DefaultCloseTimeout
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Shards > ledger.MaxShards {
		return nil, fmt.Errorf("gate: %d shards: at most %d", o.Shards, ledger.MaxShards)
	}
	g := &Gate{o: o, now: o.Now}
	g.ready = ready.New(part(o.DirectoryReadiness), part(o.DecisionsReadiness), part(o.OutboxReadiness))
	m, err := newMetrics(o.Registerer, g)
	if err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	g.metrics = m
	return g, nil
}

// Account finds who owns the API key with this SHA-256. It takes no lock and
// does not allocate, except for the first time that an account is asked for.
func (g *Gate) Account(h *KeyHash) (Caller, Lookup) {
	d := g.directory.Load()
	if d == nil {
		return Caller{}, CannotTell
	}
	return d.ByKey(h)
}

// AccountByID finds an account of the directory. It takes no lock and does not
// allocate, except for the first time that the account is asked for.
func (g *Gate) AccountByID(id string) (*Account, Lookup) {
	d := g.directory.Load()
	if d == nil {
		return nil, CannotTell
	}
	return d.ByID(id)
}

// Admit decides about a call from what is in memory. It takes no lock and does
// not allocate. It records nothing: Settle does. A call that a limit of the tiers
// exact and leased concerns is refused here as unknown, unless it is refused
// anyway: only Take can admit it.
func (g *Gate) Admit(a *Account, req Request) Verdict {
	t := g.table.Load()
	if t != nil && t.Fine(a) {
		return Verdict{Allowed: true}
	}
	if t != nil && needsTake(a, req) {
		v := t.DecideLeased(a, req, usage.At(g.now()))
		if v.Allowed {
			v = Verdict{Unknown: true, Code: usage.BillingStateUnknown, Detail: "This call has a limit whose units must be taken before it begins, which was not done."}
		}
		g.metrics.refused(v.Code)
		return v
	}
	return g.decide(t, a, req)
}

func needsTake(a *Account, req Request) bool {
	draws := a.Leased()
	for i := range draws {
		if draws[i].Concerns(req) {
			return true
		}
	}
	return false
}

func (g *Gate) decide(t *table.Table, a *Account, req Request) Verdict {
	v := Verdict{Unknown: true, Code: usage.BillingStateUnknown}
	if t != nil {
		v = t.Decide(a, req, usage.At(g.now()))
	}
	switch {
	case !v.Allowed:
		g.metrics.refused(v.Code)
	case v.Unknown:
		g.metrics.unknownPassed.Inc()
	}
	return v
}

// Violations returns every deny that stands against a call, the gravest first,
// at most max of them.
func (g *Gate) Violations(a *Account, req Request, max int) []*usage.Decision {
	t := g.table.Load()
	if t == nil {
		return nil
	}
	return t.Violations(a, req, usage.At(g.now()), max)
}

// fine: nothing is held against the account and nothing has to be taken, whatever the
// call is.
func (g *Gate) fine(a *Account) bool {
	t := g.table.Load()
	return t != nil && t.Fine(a)
}

// LedgerNow is the ledger's time as this gateway estimates it from beacons.
func (g *Gate) LedgerNow() usage.Micros {
	now := usage.At(g.now())
	if t := g.table.Load(); t != nil {
		return t.LedgerTime(now)
	}
	return now
}

// Settle hands the record of a finished call to the outbox of its account's
// shard. When it returns nil the outbox will deliver it, now or after a restart,
// as far as the outbox's policy promises.
func (g *Gate) Settle(ctx context.Context, c usage.Call) error {
	a, found := g.AccountByID(c.Account)
	switch found {
	case Found:
	case NotFound:
		return ErrUnknownAccount
	default:
		return ErrNotReady
	}
	_, shard, ok := a.Root()
	if !ok {
		return ErrUnknownAccount
	}
	return g.SettleShard(ctx, shard, &c)
}

// SettleShard is Settle for a caller that has kept the account's shard (see
// Account.Root) since the call began: the account may have gone meanwhile.
func (g *Gate) SettleShard(ctx context.Context, shard uint32, c *usage.Call) error {
	out := g.outbox.Load()
	if out == nil {
		return ErrNotReady
	}
	err := (*out).Add(ctx, shard, c)
	switch {
	case err == nil:
		g.full.Clear()
		return nil
	case errors.Is(err, outbox.ErrFull), errors.Is(err, outbox.ErrNotSafe) && errors.Is(err, context.DeadlineExceeded):
		g.full.Set(g.now())
	}
	g.metrics.unsettled.Inc()
	return fmt.Errorf("settle: %w", err)
}

// Ready returns nil when the gate has current decisions and a directory and can
// settle; else what is missing.
func (g *Gate) Ready() error { return g.ready.Err() }

func part(r Readiness) ready.Part {
	if r == nil {
		return nil // and not an interface that holds nothing
	}
	return r
}
