// Package books is the auditor's own fold of the ledger: what it has by account
// and minute, beside what gateways claim, what counters say and what the history
// holds. It shares no code with those who count: frames are told apart by its
// own set of what was seen, and summed up by its own sums.
//
// It is pure: entries, claims, answers and the time go in, findings come out.
package books

import (
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Options bound the books. Zero values are the defaults.
type Options struct {
	// Horizon of foreign events (pkg/dedup), microseconds.
	Horizon usage.Micros
	// Cells bounds the accounts and minutes that are told apart in what waits to
	// be compared with the history, and in what waits for a claim or a frame.
	Cells int
	// Accounts bounds those whose lifetime is kept.
	Accounts int
	// Unclaimed is how long frames wait for a claim, Overdue how long a claim
	// waits for frames before that is a gap.
	Unclaimed, Overdue time.Duration
}

func (o *Options) setDefaults() {
	if o.Cells <= 0 {
		o.Cells = 500_000
	}
	if o.Accounts <= 0 {
		o.Accounts = 1_000_000
	}
	if o.Unclaimed <= 0 {
		o.Unclaimed = 2 * time.Minute
	}
	if o.Overdue <= 0 {
		o.Overdue = 10 * time.Minute
	}
}

// Pair names two points that are compared; the first is what is right.
type Pair string

// The pairs.
const (
	GatewayLedger  Pair = "gateway-ledger"
	LedgerCounters Pair = "ledger-counters"
	LedgerHistory  Pair = "ledger-history"
)

// Outcome of a comparison of one stretch: no differences say that it agrees.
type Outcome struct {
	Pair Pair
	// Origin is the stretch that was compared: another outcome of the same one
	// replaces it.
	Origin string
	// From and To are ledger positions and Since and Until the ledger's time of
	// it, where the pair has such.
	From, To     uint64
	Since, Until usage.Micros
	// Only, if set, is the finding that was looked at again: the outcome says
	// nothing of others.
	Only        string
	Differences []audit.Difference
}

// Stats are sums since the books were opened, and what they hold now.
type Stats struct {
	Calls, Frames      int64
	Duplicates         int64 // frames and foreign events seen before
	Undecodable        int64
	Unclaimed          int64 // calls that nobody has claimed in time
	Claimed            int64 // calls that were compared with a claim
	LateClaims         int64 // claims of frames that were given up as unclaimed
	Held, Waiting      int   // cells of frames without a claim, and of claims without their frames
	OldestWaiting      time.Time
	Accounts, Open     int // accounts known, cells of the open round
	Beyond             int64
	CheckedCalls       int64
	CheckedCells       int64
	CheckedAccounts    int64
	SkippedComparisons int64
}

// Books are described at the package. Not safe for concurrent use.
type Books struct {
	o Options

	// Position is the newest ledger entry that was folded, ClaimsPosition the
	// newest message of claims.
	Position, ClaimsPosition uint64
	// Whole: the ledger was read from its beginning, so that lifetimes are whole.
	Whole bool
	// Floor is up to where the history can't be compared.
	Floor uint64

	high      usage.Micros
	shards    map[uint32]*shard
	lanes     map[laneKey]*lane
	producers map[dedup.Producer]newest
	round     *Round
	accounts  int
	held      int
	waiting   int
	heard     Heard           // since the books were opened
	told      map[string]bool // origins of open findings, beside those that are waiting

	stats    Stats
	out      []Outcome
	scratch  scratch
	hashOf   ksuid.KSUID
	producer uint64
}

type shard struct {
	set      *dedup.Set
	high     usage.Micros
	last     uint64 // newest entry that changed a total
	version  uint32 // of the rules, by the ledger's word; 0: it has said none
	total    Life
	accounts map[string]*Life
	dirty    []string
	// wrong are those that the counters did not agree about when they were last asked.
	wrong map[string]bool
}

// Life is what an account has used since the ledger began.
type Life struct {
	audit.Tally
	// Reported is what calls said of the meter calls.
	Reported int64
	// First and Last are the minutes of what was counted since the counters
	// agreed; both 0 when nothing was.
	First, Last audit.Minute
	Dirty       bool
}

func (l *Life) plus(t *audit.Tally, reported int64, m audit.Minute) {
	l.Plus(t)
	l.Reported += reported
	if l.First == 0 || m < l.First {
		l.First = m
	}
	l.Last = max(l.Last, m)
}

// Round is a stretch of the ledger to be compared with the history.
type Round struct {
	From, To     uint64
	Since, Until usage.Micros
	Cells        *audit.Cells
}

// scratch is the memory of folding one frame.
type scratch struct {
	counted, repeated []audit.Tally // by entry of the account dictionary
	reported          []int64
	row               []rowState
	seen              []bool
}

type rowState uint8

const (
	admitted rowState = iota
	refused
	again // seen before: not counted
	againRefused
)

// New returns empty books.
func New(o Options) *Books {
	o.setDefaults()
	return &Books{o: o, shards: map[uint32]*shard{}, lanes: map[laneKey]*lane{}, producers: map[dedup.Producer]newest{}}
}

// Out returns the outcomes since it was called last.
func (b *Books) Out() []Outcome {
	out := b.out
	b.out = nil
	return out
}

// Stats returns the numbers.
func (b *Books) Stats() Stats {
	s := b.stats
	s.Held, s.Waiting, s.Accounts = b.held, b.waiting, b.accounts
	if b.round != nil {
		s.Open = b.round.Cells.Len()
	}
	for _, l := range b.lanes {
		for _, w := range l.waiting {
			if s.OldestWaiting.IsZero() || w.since.Before(s.OldestWaiting) {
				s.OldestWaiting = w.since
			}
		}
	}
	return s
}

// High is the ledger's time: the highest that was seen.
func (b *Books) High() usage.Micros { return b.high }

// Full reports whether claims should wait for the ledger.
func (b *Books) Full() bool { return b.waiting >= b.o.Cells }

// pass lets the ledger's time pass with an entry.
func (b *Books) pass(n uint32, sequence uint64, at usage.Micros) *shard {
	if b.Position == 0 {
		b.Whole = sequence == 1
	}
	b.Position = sequence
	b.high = max(b.high, at)
	s := b.shards[n]
	if s == nil {
		s = &shard{set: dedup.New(b.o.Horizon), accounts: map[string]*Life{}}
		b.shards[n] = s
	}
	s.high = max(s.high, at)
	return s
}

// Other folds an entry that says nothing to the books but that time has passed.
func (b *Books) Other(n uint32, sequence uint64, at usage.Micros) { b.pass(n, sequence, at) }

// Undecodable takes note of an entry that nobody can read.
func (b *Books) Undecodable(n uint32, sequence uint64, at usage.Micros) {
	b.pass(n, sequence, at)
	b.stats.Undecodable++
}

// Control folds a control entry. What it returns says that the entry begins a stretch
// whose rules a newer program knows: then it is not folded, and nothing after it may be.
func (b *Books) Control(n uint32, sequence uint64, at usage.Micros, e *tollkeeperv1.ControlEntry, now time.Time) *quota.NewerError {
	c := e.GetCoreVersion()
	if newer := quota.Newer(n, sequence, c.GetVersion()); newer != nil {
		return newer
	}
	s := b.pass(n, sequence, at)
	if id := e.GetId(); id != "" && !s.set.Foreign(dedup.ForeignID(nil, []byte("control"), []byte(id)), s.high) {
		return nil
	}
	if closed := e.GetProducerClosed(); closed != nil && len(closed.GetProducer()) == len(dedup.Producer{}) {
		p := dedup.Producer(closed.GetProducer())
		s.set.Close(p, s.high)
		if l := b.lanes[laneKey{p, n}]; l != nil {
			l.closed = now
		}
	}
	if c != nil {
		core := quota.Core{Version: c.GetVersion(), Horizon: usage.Micros(c.GetForeignHorizonMicros())}
		if core.Check() == nil {
			s.version = core.Version
			s.set.SetHorizon(core.Horizon, s.high)
		}
	}
	return nil
}

// Calls folds a frame, by the rules that everybody counts by: a frame of a
// producer once by its number; in it, or without a producer, a row with a source
// and an event id once by these; a frame that names no account somewhere not at
// all.
func (b *Books) Calls(sequence uint64, at usage.Micros, f *ledger.Frame, now time.Time) {
	s := b.pass(f.Shard, sequence, at)
	own := f.Producer != ksuid.Nil
	if own {
		if v, _ := s.set.Frame(dedup.Producer(f.Producer), f.Number); v == dedup.Duplicate {
			b.stats.Duplicates++
			return
		}
	}
	for _, account := range f.Account.Dict {
		if len(account) == 0 {
			b.stats.Undecodable++
			return
		}
	}
	b.stats.Frames++
	minute := audit.FrameMinute(f.SealedAt, b.high)
	repeated := b.tally(s, f, own)
	for d, account := range f.Account.Dict {
		if t := &b.scratch.counted[d]; t.Count > 0 {
			b.count(s, sequence, minute, account, t, b.scratch.reported[d])
		}
	}
	if own {
		b.arrived(s, f, minute, repeated, now)
	}
}

// count adds what a frame has of an account.
func (b *Books) count(s *shard, sequence uint64, minute audit.Minute, account []byte, t *audit.Tally, reported int64) {
	b.stats.Calls += t.Count
	s.last = sequence
	s.total.plus(t, reported, minute)
	life := s.accounts[string(account)]
	if life == nil && b.accounts < b.o.Accounts {
		life = &Life{}
		s.accounts[string(account)] = life
		b.accounts++
	}
	if life == nil {
		b.stats.Beyond += t.Count
	} else {
		life.plus(t, reported, minute)
		if !life.Dirty {
			life.Dirty = true
			s.dirty = append(s.dirty, string(account))
		}
	}
	if sequence <= b.Floor {
		return
	}
	if b.round == nil {
		b.round = &Round{From: sequence, Since: b.high, Cells: audit.NewCells(b.o.Cells)}
	}
	b.round.To, b.round.Until = sequence, b.high
	b.round.Cells.At(minute, account).Plus(t)
}

// Cut ends the open round and returns it; nil when it is empty.
func (b *Books) Cut() *Round {
	r := b.round
	b.round = nil
	return r
}

// OpenFrom returns where the open round begins, and how many cells it has.
func (b *Books) OpenFrom() (from uint64, cells int) {
	if b.round == nil {
		return b.Position + 1, 0
	}
	return b.round.From, b.round.Cells.Len()
}

func sized[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n, max(n, 1024))
	}
	s = s[:n]
	clear(s)
	return s
}

// tally sums up a frame by account: what counts, and what was seen before; it
// reports whether there is any of the latter.
func (b *Books) tally(s *shard, f *ledger.Frame, own bool) (repeated bool) {
	x := &b.scratch
	entries := len(f.Account.Dict)
	x.counted, x.repeated, x.reported = sized(x.counted, entries), sized(x.repeated, entries), sized(x.reported, entries)
	x.row = sized(x.row, f.N)
	frame := uint64(0)
	if own {
		if f.Producer != b.hashOf {
			b.hashOf, b.producer = f.Producer, audit.ProducerHash(f.Producer.String())
		}
		frame = audit.FrameHash(b.producer, f.Shard, f.Number)
	}
	foreign := !f.Source.Absent() && !f.EventID.Absent()
	codes := !f.Code.Absent()
	for i := range f.N {
		d := f.Account.ID(i)
		to := &x.counted[d]
		hash := audit.RowHash(frame, i)
		if foreign {
			if source, id := f.Source.At(i), f.EventID.At(i); len(source) > 0 && len(id) > 0 {
				event := dedup.ForeignID(f.Account.At(i), source, id)
				if !own {
					hash = audit.ForeignIDHash(event)
				}
				if !s.set.Foreign(event, s.high) {
					to, x.row[i], repeated = &x.repeated[d], again, true
					b.stats.Duplicates++
				}
			}
		}
		to.Count++
		to.Hash += hash
		if codes && len(f.Code.At(i)) > 0 {
			to.Refused++
			x.row[i]++ // refused, or againRefused
		}
	}
	for m := range f.Meters {
		b.sum(f, &f.Meters[m], m)
	}
	for k := range f.Custom {
		b.sum(f, &f.Custom[k].Ints, audit.Own)
	}
	return repeated
}

// sum adds a column to the sums of its meter.
func (b *Books) sum(f *ledger.Frame, c *ledger.Ints, m int) {
	calls := m == int(usage.CallsIndex)
	if c.Absent() && !calls {
		return
	}
	x := &b.scratch
	for i := range f.N {
		v, ok := c.Get(i)
		if !ok {
			if !calls {
				continue
			}
			v = 1
		}
		switch d := f.Account.ID(i); x.row[i] {
		case admitted:
			x.counted[d].Sums[m] += v
			if calls && ok {
				x.reported[d] += v
			}
		case again:
			x.repeated[d].Sums[m] += v
		case refused, againRefused:
		}
	}
}
