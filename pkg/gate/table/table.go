// Package table is what a gateway holds in memory to decide on its own: which
// account a key belongs to, that account's path, and the decisions that are not
// "allow". It has no goroutine, clock or I/O: time and state come in, verdicts go
// out.
//
// One goroutine at a time may call the methods that change the table; any number
// may ask it meanwhile. Asking takes no lock, and allocates nothing unless the
// method says so.
package table

import (
	"cmp"
	"encoding/binary"
	"hash/maphash"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// KeyHash is the SHA-256 of an API key.
type KeyHash [32]byte

// Account is a handle that stays the same while the table lives. It may be kept
// and used by any goroutine.
type Account struct {
	held    atomic.Pointer[[]*usage.Decision] // nil: nothing exceptional
	record  atomic.Pointer[record]            // nil: not in the directory
	unknown atomic.Uint64                     // episode<<32 | calls passed in it
	// purse is that of the account's first allowance: here, where an admission looks
	// anyway, it is one line of memory nearer.
	purse atomic.Pointer[lease.Purse]
	id    string

	// The writer's.
	states     *state // first of its decisions
	keys       int32  // keys that point here
	below      int32  // records of other accounts whose path it is on
	seq        uint64 // of its record
	allowances []*Allowance
}

// inlinePath is how many accounts of a path stand in the record itself.
const inlinePath = 4

// record's first 64 bytes are all that most admissions look at. It has 128, so that
// the allocator begins it with a line of memory.
type record struct {
	shard  *shard
	n      int32
	leases bool // there are leased
	// measured: some of leased count something else than calls.
	measured bool
	// eventual: the path has limits that are not in leased.
	eventual bool
	counted  uint8                // built-in meters that limits of the path count, a bit each
	path     [inlinePath]*Account // leaf first
	only     *Account             // whose purse is that of leased, if that is one and on calls; else nil
	filter   *usage.Filter        // of only; nil: it has none

	leased []Draw // limits that calls are admitted by from leases
	rest   []*Account
	plan   string
}

func (r *record) root() *Account { return r.at(int(r.n) + len(r.rest) - 1) }

// ID returns the account's id.
func (a *Account) ID() string { return a.id }

// Known reports whether the directory has the account.
func (a *Account) Known() bool { return a.record.Load() != nil }

// Root returns the id of the account's root and the ledger's shard of it; false
// when the directory does not have the account.
func (a *Account) Root() (root string, shard uint32, ok bool) {
	r := a.record.Load()
	if r == nil {
		return "", 0, false
	}
	return r.root().id, r.shard.number, true
}

// Plan returns the account's plan; empty for none.
func (a *Account) Plan() string {
	if r := a.record.Load(); r != nil {
		return r.plan
	}
	return ""
}

// Counts reports whether a limit on the account's path counts a meter, whatever the
// limit's filter.
func (a *Account) Counts(m usage.BuiltIn) bool {
	r := a.record.Load()
	return r != nil && r.counted&(1<<m) != 0
}

// shard is what is known of a shard of the ledger.
type shard struct {
	known   atomic.Bool   // decisions are current: absent means fine
	episode atomic.Uint32 // counts the times it became unknown
	_       [56]byte      // known is read by every call: no neighbour may invalidate its line

	number     uint32
	heard      usage.Micros // last beacon; the writer's, like all below
	everHeard  bool
	epoch      uint64
	streamTime usage.Micros
}

// Policy says what happens to calls whose verdict can't be known (law 5).
type Policy struct {
	// Pass lets up to MaxCalls calls of each account through since its shard
	// became unknown; an account's calls count for every account on its path.
	// Else they are refused with BILLING_STATE_UNKNOWN.
	Pass     bool
	MaxCalls uint32
	// StaleAfter is how long a shard's beacons or a bucket's changes may be
	// missing before they count as unknown, microseconds.
	StaleAfter usage.Micros
	// TestClock is where the test clock of the ledger stands; nil: the ledger has
	// none, and its time is estimated from beacons.
	TestClock func() usage.Micros
}

// Table is the whole of it. New makes one.
type Table struct {
	policy Policy
	shards []shard
	lookup func(root string) uint32
	seed   maphash.Seed
	keys   index[KeyHash]
	ids    index[string]

	directory atomic.Bool  // unknown keys are unknown to the directory too
	offset    atomic.Int64 // the ledger's clock minus ours, microseconds

	// The writer's.
	states          map[string]*state // by KV key
	clock           streamClock
	directoryMirror mirror
	decisionsMirror mirror

	exceptional, accounts, keyCount atomic.Int64
}

// state is the newest decision of a KV key, also when it allows: an older one
// must be told from a newer one.
type state struct {
	revision uint64
	seq      uint64
	account  *Account
	decision *usage.Decision // nil: allow, or deleted
	next     *state          // of the same account
}

// mirror is how current a bucket's copy is.
type mirror struct {
	loaded bool
	stale  bool
	since  usage.Micros // when it became stale
}

func (m *mirror) current(now, staleAfter usage.Micros) bool {
	return m.loaded && (!m.stale || now-m.since <= staleAfter)
}

// New returns an empty table, in which everything is unknown. shardOf says which
// of n shards a root account belongs to.
func New(n uint32, shardOf func(root string, n uint32) uint32, p Policy) *Table {
	t := &Table{
		policy: p,
		shards: make([]shard, n),
		lookup: func(root string) uint32 { return shardOf(root, n) },
		seed:   maphash.MakeSeed(),
		states: make(map[string]*state),
	}
	for i := range t.shards {
		t.shards[i].number = uint32(i)
		t.shards[i].episode.Store(1)
	}
	t.keys.reset(0, hashKey)
	t.ids.reset(0, t.hashID)
	return t
}

// hashKey: SHA-256 is as good a hash as there is.
func hashKey(k *KeyHash) uint64 { return binary.LittleEndian.Uint64(k[:8]) }

func (t *Table) hashID(id *string) uint64 { return maphash.String(t.seed, *id) }

// Caller is who makes a call.
type Caller struct {
	Account *Account
	// KeyID is the public id of the API key; nil when the account was found by id.
	KeyID *string
}

// Lookup is the outcome of a search in the directory.
type Lookup uint8

// The outcomes of a search.
const (
	// Found: the directory has it.
	Found Lookup = iota + 1
	// NotFound: a current directory does not have it.
	NotFound
	// CannotTell: it isn't there, but the directory was never read or is stale,
	// or its account is still to come.
	CannotTell
)

// ByKey finds who owns the key with this hash.
func (t *Table) ByKey(h *KeyHash) (Caller, Lookup) {
	c := t.keys.get(h, hashKey(h))
	if c == nil {
		return Caller{}, t.missing()
	}
	return Caller{c.account, c.keyID}, Found
}

// ByID finds an account of the directory.
func (t *Table) ByID(id string) (*Account, Lookup) {
	c := t.ids.get(&id, t.hashID(&id))
	if c == nil || c.account.record.Load() == nil {
		return nil, t.missing()
	}
	return c.account, Found
}

func (t *Table) missing() Lookup {
	if t.directory.Load() {
		return NotFound
	}
	return CannotTell
}

// Request is what filters look at.
type Request struct {
	Model, Route, Method string
	// Unused are meters that such a call can't use: their limits do not concern it.
	Unused usage.MeterSet
}

// Verdict is the answer to a request for admission.
type Verdict struct {
	Allowed bool
	// Unknown: there was no knowing, and the policy decided.
	Unknown bool
	// Code of the refusal; empty when allowed.
	Code usage.Code
	// Decision that refuses, or the gravest that warns; nil when there is none.
	// It must not be changed.
	Decision *usage.Decision
	// Requested is how much of the decision's meter was asked for; 0: not known.
	Requested int64
	// Detail says to a person what stands against the call; empty: the decision,
	// or that it could not be known.
	Detail string
}

// Fine reports that nothing is held against any account of the path, that nothing
// has to be taken from leases, and that this is known: the call is admitted,
// whatever it is. It needs no clock.
func (t *Table) Fine(a *Account) bool {
	r := a.record.Load()
	if r == nil || r.leases || !r.shard.known.Load() {
		return false
	}
	return r.clean(a)
}

// clean: nothing is held against any account of the path, whose first is a.
func (r *record) clean(a *Account) bool {
	if a.held.Load() != nil {
		return false
	}
	for i := 1; i < int(r.n); i++ {
		if r.path[i].held.Load() != nil {
			return false
		}
	}
	for _, p := range r.rest {
		if p.held.Load() != nil {
			return false
		}
	}
	return true
}

// Decide answers for an account that is not Fine; now is our own clock's time. A
// deny that is held is an answer and stays one while the feed is silent, until
// its period ends; it is the absence of one that has to be fresh (law 5).
func (t *Table) Decide(a *Account, req Request, now usage.Micros) Verdict {
	r := a.record.Load()
	if r == nil {
		return Verdict{Unknown: true, Code: usage.BillingStateUnknown}
	}
	return t.decide(r, req, now, r.shard.known.Load())
}

// DecideLeased is Decide for a call that is to be admitted from leases: they are
// the knowledge of the limits that have them, so only limits of the other tier can
// be unknown.
func (t *Table) DecideLeased(a *Account, req Request, now usage.Micros) Verdict {
	r := a.record.Load()
	if r == nil {
		return Verdict{Unknown: true, Code: usage.BillingStateUnknown}
	}
	return t.decide(r, req, now, !r.eventual || r.shard.known.Load())
}

func (t *Table) decide(r *record, req Request, now usage.Micros, known bool) Verdict {
	at := t.LedgerTime(now)
	var best *usage.Decision
	for i := range r.n {
		best = graver(best, effective(r.path[i], req, at))
	}
	for _, p := range r.rest {
		best = graver(best, effective(p, req, at))
	}
	if best != nil && best.Verdict == usage.Deny {
		return Verdict{Code: best.Code, Decision: best}
	}
	if known {
		return Verdict{Allowed: true, Decision: best}
	}
	if !t.policy.Pass || !r.pass(r.shard.episode.Load(), t.policy.MaxCalls) {
		return Verdict{Unknown: true, Code: usage.BillingStateUnknown}
	}
	return Verdict{Allowed: true, Unknown: true, Decision: best}
}

// Violations returns every deny that stands against the call, the gravest first,
// at most max. It allocates.
func (t *Table) Violations(a *Account, req Request, now usage.Micros, max int) []*usage.Decision {
	r := a.record.Load()
	if r == nil {
		return nil
	}
	at := t.LedgerTime(now)
	var all []*usage.Decision
	add := func(p *Account) {
		if held := p.held.Load(); held != nil {
			for _, d := range *held {
				if d.Verdict == usage.Deny && stands(d, req, at) {
					all = append(all, d)
				}
			}
		}
	}
	for i := range r.n {
		add(r.path[i])
	}
	for _, p := range r.rest {
		add(p)
	}
	slices.SortStableFunc(all, compare)
	return all[:min(len(all), max)]
}

// EventTime is the time of a call that began at this time of our own clock: where
// the ledger has a test clock, that one's.
func (t *Table) EventTime(began time.Time) time.Time {
	if t == nil || t.policy.TestClock == nil {
		return began
	}
	return t.policy.TestClock().Time()
}

// TestClock reports whether the ledger has a test clock.
func (t *Table) TestClock() bool { return t.policy.TestClock != nil }

// LedgerTime is the ledger's time when our own clock shows now.
func (t *Table) LedgerTime(now usage.Micros) usage.Micros {
	if t.policy.TestClock != nil {
		return t.policy.TestClock()
	}
	return now + usage.Micros(t.offset.Load())
}

// Offset is how far the ledger's clock is ahead of ours, microseconds.
func (t *Table) Offset() int64 { return t.offset.Load() }

// effective returns the gravest decision of one account that stands at a time of
// the ledger's clock.
func effective(a *Account, req Request, at usage.Micros) *usage.Decision {
	held := a.held.Load()
	if held == nil {
		return nil
	}
	for _, d := range *held { // in order of gravity
		if stands(d, req, at) {
			return d
		}
	}
	return nil
}

// stands: a deny with room refused one call's need, and a smaller one may pass:
// the purse knows.
func stands(d *usage.Decision, req Request, at usage.Micros) bool {
	return (d.PeriodEnd == 0 || at < d.PeriodEnd) && (d.Room == 0 || d.Verdict != usage.Deny || !d.Tier.Leased()) && d.Filter.Match(req.Model, req.Route, req.Method) && !req.Unused.Has(d.Meter)
}

// graver returns b only when it is graver than a: of equals the one nearer to the
// leaf stays.
func graver(a, b *usage.Decision) *usage.Decision {
	if a == nil || b != nil && compare(b, a) < 0 {
		return b
	}
	return a
}

// compare orders decisions by gravity: denies before warnings, what only money
// mends before what time mends too, the longer block before the shorter, the
// smaller amount before the larger; then by account and limit, so that all
// gateways choose the same.
func compare(a, b *usage.Decision) int {
	return cmp.Or(
		cmp.Compare(b.Verdict, a.Verdict),
		cmp.Compare(rank(a.Code), rank(b.Code)),
		cmp.Compare(end(b), end(a)),
		cmp.Compare(a.Amount, b.Amount),
		cmp.Compare(a.LimitID, b.LimitID),
	)
}

// rank: 402 first, because a client that is told to wait while it has to pay
// waits for ever.
func rank(c usage.Code) int {
	switch c {
	case usage.PaymentFailed:
		return 0
	case usage.SubscriptionExpired:
		return 1
	case usage.TrialEnded:
		return 2
	case usage.PlanRequired:
		return 3
	case usage.CreditsDepleted:
		return 4
	case usage.CreditsInsufficient:
		return 5
	case usage.SpendCapReached:
		return 6
	case usage.QuotaExceeded:
		return 7
	case usage.CostExceedsLimit:
		return 8
	case usage.RateLimited:
		return 9
	}
	return 10
}

func end(d *usage.Decision) usage.Micros {
	if d.PeriodEnd == 0 {
		return 1<<63 - 1
	}
	return d.PeriodEnd
}

// pass takes one call from what every account of the path may still pass in this
// episode, or nothing.
func (r *record) pass(episode, max uint32) bool {
	for i := range int(r.n) + len(r.rest) {
		if !r.at(i).take(episode, max) {
			for j := range i {
				r.at(j).giveBack(episode)
			}
			return false
		}
	}
	return true
}

func (r *record) at(i int) *Account {
	if i < int(r.n) {
		return r.path[i]
	}
	return r.rest[i-int(r.n)]
}

func (a *Account) take(episode, max uint32) bool {
	for {
		old := a.unknown.Load()
		n := uint32(old)
		if uint32(old>>32) != episode {
			n = 0
		}
		if n >= max {
			return false
		}
		if a.unknown.CompareAndSwap(old, uint64(episode)<<32|uint64(n+1)) {
			return true
		}
	}
}

func (a *Account) giveBack(episode uint32) {
	for {
		old := a.unknown.Load()
		if uint32(old>>32) != episode || uint32(old) == 0 || a.unknown.CompareAndSwap(old, old-1) {
			return
		}
	}
}
