// Package quota is the pure core of counting: the state machine of one shard
// of the ledger. Apply folds one entry into counters and returns the decisions
// that follow from it. There is no goroutine, no clock and no I/O in it, and
// nothing depends on the order of a map: the same entries give the same state
// and the same decisions, bit for bit, and Hash proves it.
//
// A Shard is not safe for concurrent use.
package quota

import (
	"fmt"
	"hash/maphash"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// Bounds of what a shard accepts. An entry beyond them is Invalid; a frame that
// was decoded never is, or its calls would be in history and not in the counters.
const (
	MaxRows         = 4096     // calls of a batch
	MaxDepth        = 16       // accounts on a path
	MaxPlanLimits   = 256      // limits of a plan
	MaxPlans        = 4096     // plans of a set
	MaxPendingPlans = 64       // plan sets that wait for their time
	MaxLimitBytes   = 32 << 10 // texts of a limit, which stand in each of its decisions
	MaxAsks         = 256      // asks of an entry
	MaxLeaseMarks   = 4096     // of a closed producer, in an entry
	MaxAdjustments  = 16       // meters of a correction
)

// CoreVersion is the newest version of the rules by which this program folds. Those
// before it hold where the ledger does not say this one, so that the same entries lead
// to the same decisions for ever:
//
//	0, 1  an account that comes to another plan has new allowances of the tiers exact
//	      and leased there; what gateways hold of the old ones is forgotten.
//	2     where the other plan has the same limit, what they hold is not handed out
//	      again before it was counted or has come back.
//	3     a limit that an account loses goes on counting until its window ends, and what
//	      it counted and gateways hold of it is there when a limit that counts the same
//	      comes, whatever its name; what nothing has counted is taken from the ledger,
//	      and is open until then; the denial of a limit of 0 has no end.
const CoreVersion = 3

// The first versions by which what is out outlives a change of plan, by which counters
// do, and by which the denial of a limit of 0 has no end.
const (
	carriesLeases = 2
	keepsCounters = 3
	deniesForGood = 3
)

// Bounds of what a shard learns from calls. What is beyond them is counted in
// part, and told.
const (
	// MaxMeters that calls may bring. Readings of further ones are not summed up.
	// Plans may name as many again.
	MaxMeters = 4096
	// MaxUnknown accounts that no control entry has named. Calls of further ones
	// are counted at OverflowAccount, and stay there.
	MaxUnknown = 1 << 16
)

// OverflowAccount takes the calls of unknown accounts when there are too many of
// them. It has no plan, and no control entry can name it.
const OverflowAccount = "(overflow)"

// Strings is a column of texts: a dictionary and, for each row, an index into
// it. Without an index every row is Dict[0], or empty when Dict is empty.
type Strings struct {
	Dict  [][]byte
	Index []uint32
}

// At returns the text of row i.
func (s *Strings) At(i int) []byte {
	switch {
	case s.Index != nil:
		return s.Dict[s.Index[i]]
	case len(s.Dict) != 0:
		return s.Dict[0]
	}
	return nil
}

// Ints is a column of integers. Values is nil when no row has one. Known is
// nil when every row has one, else row i has one when bit i%8 of byte i/8 is set.
type Ints struct {
	Values []int64
	Known  []byte
}

func (c *Ints) get(i int) (int64, bool) {
	if c.Values == nil || (c.Known != nil && c.Known[i>>3]&(1<<(i&7)) == 0) {
		return 0, false
	}
	return c.Values[i], true
}

// CustomMeter is the column of a user's own meter.
type CustomMeter struct {
	Meter usage.Meter
	Ints
}

// Batch is the part of a frame that counting looks at. Apply keeps nothing of
// it. Every index must be inside of its dictionary, and quantities must not be
// negative: the wire's decoder has checked both.
type Batch struct {
	// Producer and Number identify the frame; a zero Producer has no identity
	// of its own, its rows are then identified by Source and EventID.
	Producer dedup.Producer
	Number   uint64

	N        int
	Time     []int64 // event times, microseconds, not clamped
	Account  Strings
	Code     Strings // of a refusal; empty: admitted
	Model    Strings
	Route    Strings
	Method   Strings
	Source   Strings
	EventID  Strings
	Flags    Ints // usage.Flags
	BuiltIns [usage.NumBuiltIn]Ints
	Custom   []CustomMeter
}

// PlanSet replaces all plans of the shard.
type PlanSet struct {
	// Version is the identity of its content.
	Version string
	// EffectiveAt is the stream time from which it holds; 0 is at once.
	EffectiveAt usage.Micros
	Plans       []usage.Plan
}

// Control is an entry that is not a call. At most one of its bodies is set;
// one without a body only lets time pass.
type Control struct {
	// ID of the act; a second entry with the same ID changes nothing. Empty
	// has no identity.
	ID       string
	PlanSet  *PlanSet
	Accounts []usage.Account
	// Closed retires a producer, which says that ClosedAt was its last number.
	Closed   *dedup.Producer
	ClosedAt uint64
	// Complete says that every call the closed producer let through is in the log.
	Complete bool
	// Marks of the closed producer's leases in this shard; nil: it has none to tell.
	Marks *LeaseMarks
	// Correction of what was counted.
	Correction *Correction
	// Core says by which rules the entries after it are folded.
	Core *Core
	// Openings say what was used before counters began; not nil: it is such an entry.
	Openings []Opening
}

// Correction of an account's usage. Adjustments are signed; a sum does not fall
// below 0.
type Correction struct {
	Account              string
	Time                 usage.Micros // 0: the entry's
	Model, Route, Method string
	Adjustments          []usage.Quantity
}

// Core is a version of the rules, and the horizon of foreign events and control
// acts that goes with it, microseconds of stream time.
type Core struct {
	Version uint32
	Horizon usage.Micros
}

// LeaseMarks say how much of its leases a producer can have used at most. A lease
// that is not among them was not used.
type LeaseMarks struct {
	Marks []LeaseMark
}

// LeaseMark is that of one lease: a total since it began.
type LeaseMark struct {
	Account, LimitID string // "<plan>/<limit>"
	// WindowStart is 0 for lifetime.
	WindowStart usage.Micros
	UsedAtMost  int64
}

// LeaseAsk is what one gateway says about one allowance.
type LeaseAsk struct {
	Account, LimitID string // "<plan>/<limit>"
	// WindowStart is 0 for lifetime.
	WindowStart usage.Micros
	lease.Ask
}

// LeaseAnswer is what is to be said to a gateway.
type LeaseAnswer struct {
	Account, LimitID       string
	WindowStart, WindowEnd usage.Micros // both 0 for lifetime
	// Decision that a denial leads to; nil: none.
	Decision *usage.Decision
	lease.Answer
}

// Entry is one entry of the shard's ledger. With neither Batch nor Control it
// only lets time pass: an entry that can't be decoded, a lease.
type Entry struct {
	Sequence uint64
	// Time is the stream's own time of the entry.
	Time    usage.Micros
	Batch   *Batch
	Control *Control
	// Asks of one gateway about allowances of the tiers exact and leased. Of
	// several about one allowance the newest counts.
	Asks []LeaseAsk
}

// Effects of an entry.
type Effects struct {
	// Decisions are the shard's until the next Apply; their Epoch is the
	// owner's to fill in. At most one for an account and limit, in the order
	// of account, then limit.
	Decisions []usage.Decision
	// Answers to gateways, likewise; in the order of account, limit, gateway. An
	// owner sends them after it has read back what led to them; a lost one is
	// asked for again.
	Answers []LeaseAnswer
	// Invalid says why the entry was not folded (time passed nevertheless, and
	// a frame's number is taken, and what is wrong with one ask does not concern
	// the others): it belongs in the dead-letter stream.
	Invalid *usage.InvalidError
	// Old: the entry is not after the shard's position and was ignored.
	Old bool
	// Newer: this entry, or one before it, begins a stretch of the ledger that rules of
	// a later version fold. Nothing was folded and nothing will be: the shard stands
	// before that entry, until a program that knows the version reads on.
	Newer *NewerError
	// Frame is the verdict on a frame's number, 0 when the entry is no frame;
	// Skipped is how many numbers before it are missing.
	Frame   dedup.Verdict
	Skipped uint64
	// Lost is how many of a retired producer's last numbers never came.
	Lost uint64
	// Repeated control act, seen before.
	Repeated bool
	// Corrected: a correction was folded.
	Corrected bool
	// Leases is what happened to allowances of the tiers exact and leased.
	Leases lease.Counts

	Admitted, Refused int // calls counted
	Duplicates        int // foreign events seen before, not counted again
	Late              int // calls older than the previous window of a limit they belong to
	Future            int // calls ahead of the stream, counted at the entry's time
	Overflows         int // sums that reached the end of their range and stay there
	NewAccounts       int // accounts seen for the first time
	Unplaced          int // calls counted at OverflowAccount
	Unmetered         int // readings of meters beyond MaxMeters, in no sum
}

// Shard is the state of one shard. See New and Read.
type Shard struct {
	shard    uint32
	sequence uint64
	now      usage.Micros // highest stream time seen
	dedup    *dedup.Set
	windows  [window.NumKinds]span

	meters   []usage.Meter
	meterIDs map[usage.Meter]uint32

	plans   planBook
	pending []PlanSet // by EffectiveAt, then arrival

	accounts []account
	unknown  int    // accounts that no control entry has named
	ids      []byte // of all accounts, one after the other
	index    index
	counters []counter
	free     [][]uint32 // first counters of free blocks, by block length
	sums     []sums
	customs  [][]customSum
	rollups  []rollup
	total    rollup // of all accounts, each call once
	calls    uint64 // hash of all calls (pkg/audit)

	allowances map[allowanceKey]*allowance
	leaseTimes allowanceHeap
	// Counters that no limit of their account has, by account: see retired. How many
	// there are of each kind of window, and the window of which those that ended are
	// forgotten; neither is state.
	retired     map[uint32][]retired
	retirements [window.NumKinds]int
	purged      [window.NumKinds]int32
	opens       map[openKey]opened // counters of limits that lack what was used before
	stirred     []*allowance       // to be applied in this entry
	adjusted    map[adjustmentKey]int64
	core        Core
	newer       *NewerError // nothing is folded any more; not state: the entry is met again

	timers  []timerBucket
	queued  int
	touched []touch
	dirty   []uint32
	hash    [2]uint64   // sum of hashes
	hashes  [][2]uint64 // by account, as they are in the sum

	f       frame // scratch
	effects Effects
}

// span is a kind's current window and the begin of the one before.
type span struct {
	number          int32
	before, at, end usage.Micros
}

// Options of a new shard.
type Options struct {
	Shard uint32
	// Horizon of foreign events and control acts, microseconds of stream
	// time; dedup.DefaultHorizon when 0.
	Horizon usage.Micros
}

// New returns the state of a shard before its first entry.
func New(o Options) *Shard {
	s := &Shard{shard: o.Shard, dedup: dedup.New(o.Horizon)}
	s.init()
	return s
}

func (s *Shard) init() {
	s.index.seed = maphash.MakeSeed()
	s.meterIDs = make(map[usage.Meter]uint32)
	s.allowances = make(map[allowanceKey]*allowance)
	s.adjusted = make(map[adjustmentKey]int64)
	s.retired = make(map[uint32][]retired)
	s.opens = make(map[openKey]opened)
	for _, m := range usage.BuiltInMeters() {
		s.meter(m)
	}
	s.plans.init()
	// Position 0 of these means "none".
	s.sums = append(s.sums, sums{})
	s.customs = append(s.customs, nil)
	s.rollups = append(s.rollups, rollup{})
	s.advance(0)
}

// Number returns which shard it is.
func (s *Shard) Number() uint32 { return s.shard }

// Sequence returns the newest entry that is folded; 0 before the first.
func (s *Shard) Sequence() uint64 { return s.sequence }

// Now returns the highest stream time seen.
func (s *Shard) Now() usage.Micros { return s.now }

// Accounts returns how many accounts the shard knows.
func (s *Shard) Accounts() int { return len(s.accounts) }

// Unknown returns how many of the accounts no control entry has named.
func (s *Shard) Unknown() int { return s.unknown }

// Counters returns how many account-limits the shard holds.
func (s *Shard) Counters() int {
	n := len(s.counters)
	for length, blocks := range s.free {
		n -= length * len(blocks)
	}
	return n
}

// PlanVersion returns the version of the plans that hold now.
func (s *Shard) PlanVersion() string { return s.plans.version }

// Producers returns how many producers are remembered.
func (s *Shard) Producers() int { return s.dedup.Producers() }

// ForeignEvents returns how many foreign events are remembered.
func (s *Shard) ForeignEvents() int { return s.dedup.ForeignEvents() }

// Apply folds one entry. The effects are valid until the next call.
func (s *Shard) Apply(e Entry) *Effects {
	s.effects = Effects{Decisions: s.effects.Decisions[:0], Answers: s.effects.Answers[:0]}
	fx := &s.effects
	if e.Sequence <= s.sequence {
		fx.Old = true
		return fx
	}
	if s.newer == nil && e.Control != nil && e.Control.Core != nil {
		s.newer = Newer(s.shard, e.Sequence, e.Control.Core.Version)
	}
	if s.newer != nil {
		fx.Newer = s.newer
		return fx
	}
	s.sequence = e.Sequence
	if e.Time > s.now {
		s.now = e.Time
		s.advance(e.Time)
	}
	s.fire()
	s.fireLeases()
	if len(s.retired)+len(s.opens) > 0 {
		s.purge()
	}
	for len(s.pending) > 0 && s.pending[0].EffectiveAt <= s.now {
		set := s.pending[0]
		s.pending = append(s.pending[:0], s.pending[1:]...)
		s.setPlans(&set)
	}
	switch {
	case e.Batch != nil:
		s.frame(e.Batch, e.Time)
	case e.Control != nil:
		s.control(e.Control)
	case len(e.Asks) > 0:
		s.asks(e.Asks)
	}
	s.settleLeases()
	s.decide(e.Batch)
	s.finishAnswers()
	if s.queued > 2*len(s.counters)+1024 {
		s.rebuildTimers()
	}
	return fx
}

// advance moves the current windows to those of t, which does not go back.
func (s *Shard) advance(t usage.Micros) {
	for k := range s.windows {
		w, kind := &s.windows[k], window.Kind(k)
		if t < w.end || (kind == window.Lifetime && w.end != 0) {
			continue
		}
		n := kind.Number(t)
		w.number, w.before, w.at, w.end = int32(n), kind.Start(n-1), kind.Start(n), kind.End(n)
		if kind == window.Lifetime {
			// Every call belongs to it, however old.
			w.before, w.at, w.end = minMicros, minMicros, maxMicros
		}
	}
}

const (
	minMicros = usage.Micros(-1 << 63)
	maxMicros = usage.Micros(1<<63 - 1)
)

func (s *Shard) frame(b *Batch, at usage.Micros) {
	if b.Producer != (dedup.Producer{}) {
		s.effects.Frame, s.effects.Skipped = s.dedup.Frame(b.Producer, b.Number)
		if s.effects.Frame == dedup.Duplicate {
			return
		}
	} else {
		s.effects.Frame = dedup.Fresh
	}
	if err := s.check(b); err != nil {
		s.effects.Invalid = err
		return
	}
	s.count(b, at)
}

// check refuses what counting could not take.
func (s *Shard) check(b *Batch) *usage.InvalidError {
	if b.N <= 0 || b.N > MaxRows || len(b.Time) != b.N {
		return invalid(usage.ReasonMalformed, "a batch of %d calls: 1 to %d are counted", b.N, MaxRows)
	}
	if len(b.Account.Dict) == 0 {
		return invalid(usage.ReasonMalformed, "the calls name no account")
	}
	for _, id := range b.Account.Dict {
		if len(id) == 0 {
			return invalid(usage.ReasonMalformed, "a call names no account")
		}
		if len(id) > usage.MaxIDBytes {
			return invalid(usage.ReasonOversized, "an account's id of %d bytes, at most %d are counted", len(id), usage.MaxIDBytes)
		}
	}
	return nil
}

func invalid(reason, format string, args ...any) *usage.InvalidError {
	return &usage.InvalidError{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// meter returns the shard's number of a meter; the built-in ones have their own.
func (s *Shard) meter(m usage.Meter) uint32 {
	if id, ok := s.meterIDs[m]; ok {
		return id
	}
	id := uint32(len(s.meters))
	s.meters = append(s.meters, m)
	s.meterIDs[m] = id
	return id
}

func (s *Shard) control(c *Control) {
	if err := s.checkControl(c); err != nil {
		s.effects.Invalid = err
		return
	}
	if c.ID != "" && !s.dedup.Foreign(dedup.ForeignID(nil, []byte("control"), []byte(c.ID)), s.now) {
		s.effects.Repeated = true
		return
	}
	switch {
	case c.PlanSet != nil:
		if c.PlanSet.EffectiveAt <= s.now {
			s.setPlans(c.PlanSet)
			break
		}
		i := len(s.pending)
		for i > 0 && s.pending[i-1].EffectiveAt > c.PlanSet.EffectiveAt {
			i--
		}
		s.pending = append(s.pending, PlanSet{})
		copy(s.pending[i+1:], s.pending[i:])
		s.pending[i] = *c.PlanSet
	case c.Closed != nil:
		if last := s.dedup.Last(*c.Closed); c.ClosedAt > last {
			s.effects.Lost = c.ClosedAt - last
		}
		s.dedup.Close(*c.Closed, s.now)
		s.endLeases(lease.Gateway(*c.Closed), c.Complete && s.effects.Lost == 0, c.Marks)
	case c.Correction != nil:
		s.correct(c.Correction)
	case c.Openings != nil:
		s.takeOpenings(c.Openings)
	case c.Core != nil:
		before := s.core.Version
		s.core = *c.Core
		if (before < deniesForGood) != (s.core.Version < deniesForGood) {
			s.denyForGood()
		}
		s.dedup.SetHorizon(c.Core.Horizon, s.now)
	default:
		for i := range c.Accounts {
			s.setAccount(&c.Accounts[i])
		}
	}
}

// checkControl refuses an act as a whole: none of it is folded then.
func (s *Shard) checkControl(c *Control) *usage.InvalidError {
	if c.Marks != nil && len(c.Marks.Marks) > MaxLeaseMarks {
		return invalid(usage.ReasonOversized, "%d marks of leases, at most %d are folded", len(c.Marks.Marks), MaxLeaseMarks)
	}
	if p := c.PlanSet; p != nil {
		if p.EffectiveAt > s.now && len(s.pending) >= MaxPendingPlans {
			return invalid(usage.ReasonOversized, "%d plan sets wait for their time already", MaxPendingPlans)
		}
		return s.checkPlans(p)
	}
	if c.Correction != nil {
		return s.checkCorrection(c.Correction)
	}
	if c.Core != nil {
		return c.Core.Check()
	}
	if c.Openings != nil {
		return checkOpenings(c.Openings)
	}
	return s.checkAccounts(c.Accounts)
}
