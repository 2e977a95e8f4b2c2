// Package trace follows one counter of a shard through its ledger: which calls
// fed it, what it was before and after the entry that led to a decision, and
// which call crossed the threshold. It is a fold beside that of pkg/quota, which
// it checks itself against entry by entry: no clock, no I/O.
package trace

import (
	"errors"
	"math"
	"math/bits"
	"strconv"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

// ErrPosition is of a text that is no position.
var ErrPosition = errors.New("it is not a position")

// Position of a call in the ledger: its entry and index in there; -1 is the
// entry as a whole.
type Position struct {
	Sequence uint64
	Index    int32
}

// Newest is after every call.
var Newest = Position{Sequence: math.MaxUint64}

// Less reports whether p is before o.
func (p Position) Less(o Position) bool {
	return p.Sequence < o.Sequence || p.Sequence == o.Sequence && p.Index < o.Index
}

func (p Position) String() string {
	return strconv.FormatUint(p.Sequence, 10) + "." + strconv.Itoa(int(p.Index))
}

// ParsePosition reads what String wrote. Its error is ErrPosition.
func ParsePosition(s string) (Position, error) {
	sequence, index, ok := strings.Cut(s, ".")
	n, err := strconv.ParseUint(sequence, 10, 64)
	i, err2 := strconv.ParseInt(index, 10, 32)
	if !ok || err != nil || err2 != nil || i < -1 {
		return Position{}, ErrPosition
	}
	return Position{n, int32(i)}, nil
}

// Row is a call that fed the counter.
type Row struct {
	Position
	// Adds is what it added, After the counter with it.
	Adds, After int64
}

// Fed is what the counter is made of: Carried + Used + Adjusted + Reported +
// Unexplained is its value.
type Fed struct {
	// Calls that fed it, and what they used together.
	Calls int64 `json:"calls"`
	Used  int64 `json:"used"`
	// Carried is what a snapshot brought along of calls before it, whose entries
	// the ledger does not hold any more.
	Carried int64 `json:"carried"`
	// Adjusted by control entries.
	Adjusted int64 `json:"adjusted"`
	// Reported is what gateways had said was used of their leases, beside the
	// calls that were counted. Tiers exact and leased only.
	Reported int64 `json:"reported,omitempty"`
	// Unexplained must be 0.
	Unexplained int64 `json:"unexplained"`
	// Since is the ledger sequence of the first entry that can have fed it: the
	// window's first, or that of the plan change with which it began at 0.
	Since uint64 `json:"since_sequence"`
}

// row is a call of the entry at hand.
type row struct {
	index int32
	adds  int64
}

// maxUnder bounds what is remembered of who is below the account.
const maxUnder = 1 << 17

// Options of a trace.
type Options struct {
	// State to begin with; it is folded further.
	State *quota.Shard
	// Snapshot says that the state is not that before the ledger's first entry.
	Snapshot bool
	// Again returns the same state once more. It is asked at most once.
	Again func() (*quota.Shard, error)
	// Target is the decision that is to be explained.
	Target *usage.Decision
	// Below bounds the rows that are kept, Most of them: the newest before it.
	Below Position
	Most  int
	// Currency of the ledger's costs.
	Currency string
}

// Trace is a replay of a shard up to a decision. Not safe for concurrent use.
type Trace struct {
	// Decided is what the replay made of the target; nil: nothing.
	Decided *usage.Decision
	// Before and After are the counter around the entry that led to it.
	Before, After int64
	// PlanNew, PeriodNew: other plans took effect, or a period began, with it.
	PlanNew, PeriodNew bool
	// Crossing is the call of it that reached the threshold; nil: none did.
	Crossing *Row
	// Fed is what the counter is made of.
	Fed Fed
	// Allowance is how what is handed out stood after the entry, and Holdings what
	// each gateway had of it; nil in the tier eventual, and while none had asked.
	Allowance *lease.State
	Holdings  []lease.Holding
	// Entries that were folded.
	Entries uint64
	// Decoder holds the last entry.
	Decoder fold.Decoder

	o          Options
	start, end usage.Micros // of the target's window; 0 for lifetime
	probe      *probe
	tracking   bool
	within     bool // it began with a snapshot of the window: what fed it before was not seen
	rows       ring
	earlier    earlier
	under      map[string]bool
	flags      []bool // by entry of the account dictionary
	scratch    []row
}

// New returns a trace before its first entry.
func New(o Options) *Trace {
	t := &Trace{o: o, rows: ring{most: o.Most}, earlier: earlier{rows: ring{most: o.Most}}, under: map[string]bool{}, Decoder: fold.Decoder{Frame: ledger.Frame{CostsIn: o.Currency}}}
	t.start, t.end = Window(o.Target)
	return t
}

// Window is what a decision counts in: its period, or, of a denial that has no end
// though its limit has windows, that of its time; 0 and 0 for lifetime.
func Window(d *usage.Decision) (start, end usage.Micros) {
	if d.PeriodEnd != 0 {
		return d.PeriodStart, d.PeriodEnd
	}
	return window.Bounds(d.Window, d.DecidedAt)
}

// Rows returns the calls that fed the counter, oldest first, and whether there
// are older ones that were not kept.
func (t *Trace) Rows() (rows []Row, dropped bool) { return t.rows.all(), t.rows.dropped }

// Apply folds an entry; the last is the one that led to the decision. A
// *quota.NewerError says that only a newer program can go on.
func (t *Trace) Apply(m *ledger.Message) error {
	if m.Sequence <= t.o.State.Sequence() {
		return nil
	}
	state := t.o.State
	// What can't be decoded still lets time pass.
	e, kind, _ := t.Decoder.Decode(m)
	if kind == ledger.KindClosing {
		kind = ledger.KindControl // it is one, on a subject of its own
	}
	t.Entries++
	last := m.Sequence == t.o.Target.Revision
	if !t.tracking && (last || t.end == 0 || max(e.Time, state.Now()) >= t.start) {
		t.begin(e, last)
	}
	version := state.PlanVersion()
	fx := state.Apply(e)
	if fx.Newer != nil {
		return fx.Newer
	}
	planNew := state.PlanVersion() != version
	if kind == ledger.KindControl && t.Decoder.Control.GetAccountSet() != nil {
		clear(t.under) // somebody may have another parent
	}
	counted := e.Batch != nil && fx.Invalid == nil && fx.Frame != dedup.Duplicate
	var repeated []bool
	if counted && len(e.Batch.Source.Dict) > 0 {
		var err error
		if repeated, err = t.repeated(&e); err != nil {
			return err
		}
	}
	if !t.tracking {
		return nil
	}
	var rows []row
	if counted {
		rows = t.counted(e.Batch, &t.Decoder.Frame, e.Time, repeated)
	}
	if len(rows) == 0 && kind != ledger.KindControl && !planNew && !last {
		return nil
	}
	after, ok := t.lookup()
	before := t.After
	if last {
		t.PlanNew = planNew
		t.hold()
		for i := range fx.Decisions {
			if d := fx.Decisions[i]; d.Account == t.o.Target.Account && d.LimitID == t.o.Target.LimitID {
				t.Decided = &d
				// Where gateways hold some of it, more may be known to be used than is
				// counted.
				if t.Allowance == nil {
					after, ok = d.Used, true
				}
				t.Fed.Reported = d.Used - after
			}
		}
	}
	if !ok {
		// There is no such limit here: nothing before this counts yet.
		t.forget(m.Sequence + 1)
		t.noteEarlier(m.Sequence, rows, t.correction(e.Time))
		return nil
	}
	reported := t.Fed.Reported
	before = t.move(m.Sequence, before, after, rows, kind, planNew, t.correction(e.Time))
	if last {
		t.Before, t.Fed.Reported = before, reported
		t.findCrossing(m.Sequence, rows, after)
	}
	t.After = after
	return nil
}

// begin takes note of where the counter stands when its window begins, or the
// replay does within it.
func (t *Trace) begin(e quota.Entry, last bool) {
	rolled := t.o.State.Now() < t.start
	t.tracking, t.PeriodNew = true, rolled && last
	t.Fed.Since = e.Sequence
	if !t.o.Snapshot || rolled {
		return
	}
	t.within = true
	if used, ok := t.lookup(); ok {
		t.After, t.Fed.Carried = used, used
	}
}

// lookup returns the counter's value; false when nothing counts that. What counts the
// same is the same counter, whatever the limit is called and while there is none.
func (t *Trace) lookup() (int64, bool) {
	d := t.o.Target
	if t.o.State.Core().Version < 3 {
		return t.lookupByName()
	}
	used, begin, ok := t.o.State.Counted(d.Account, d.LimitID, d.Meter, d.Window, &d.Filter)
	return used, ok && begin == t.start
}

// lookupByName is lookup by the rules before version 3: a limit of another plan that has
// the same name and counts the same is the same counter.
func (t *Trace) lookupByName() (int64, bool) {
	u, ok := t.o.State.Account(t.o.Target.Account)
	if !ok {
		return 0, false
	}
	var match *quota.LimitUse
	for i := range u.Limits {
		l := &u.Limits[i]
		if l.Meter != t.o.Target.Meter || l.Window != t.o.Target.Window {
			continue
		}
		if l.LimitID == t.o.Target.LimitID {
			match = l
			break
		}
		if name, ok := strings.CutPrefix(l.LimitID, u.Plan); ok && strings.HasSuffix(t.o.Target.LimitID, name) {
			match = l
		}
	}
	if match == nil || match.PeriodStart != t.start {
		return 0, false
	}
	return match.Used, true
}

// hold takes note of how the allowance stands.
func (t *Trace) hold() {
	u, ok := t.o.State.Account(t.o.Target.Account)
	if !ok {
		return
	}
	for i := range u.Limits {
		if u.Limits[i].LimitID == t.o.Target.LimitID {
			t.Allowance = u.Limits[i].Lease
		}
	}
	t.Holdings = t.o.State.Holdings(t.o.Target.Account, t.o.Target.LimitID)
}

// forget says that nothing before a sequence is in the counter.
func (t *Trace) forget(sequence uint64) {
	t.setAside()
	t.After, t.Fed = 0, Fed{Since: sequence}
	t.rows.clear()
}

// move accounts for a change of the counter and returns where it began: at 0
// when it is another one than before.
func (t *Trace) move(sequence uint64, before, after int64, rows []row, kind ledger.Kind, planNew bool, correction int64) int64 {
	sum := int64(0)
	for _, r := range rows {
		sum += r.adds
	}
	change := planNew || t.Decoder.Control.GetAccountSet() != nil && kind == ledger.KindControl
	taken := int64(0)
	if found := after - before - sum; found > 0 && (change || kind == ledger.KindControl && t.Decoder.Control.GetOpenings() != nil) && t.takeEarlier(found) {
		// The counter starts from what was used before.
		taken = found
		before += taken
	}
	switch {
	case change && after == sum:
		// The counter begins anew: what fed it before does not count.
		t.forget(sequence)
		before = 0
	case change && correction != 0 && after == max(0, correction):
		// It begins anew at an entry that corrects it, too.
		t.forget(sequence)
		before = 0
		rows, sum = []row{{index: -1, adds: after}}, 0
		t.Fed.Adjusted = after
	case after-before == sum:
	case change && after == before:
		rows, sum = nil, 0 // the limit was lifted before the calls were counted
	case kind == ledger.KindControl:
		rows, sum = []row{{index: -1, adds: after - before}}, 0
		t.Fed.Adjusted += after - before
	case change:
		// The limit is new, and its sum was known.
		found := after - before - sum
		rows = append([]row{{index: -1, adds: found}}, rows...)
		t.Fed.Adjusted += found
		t.Fed.Used -= found
		sum += found
	default:
		t.Fed.Unexplained += after - before - sum
	}
	t.Fed.Used += sum
	running := before
	for _, r := range rows {
		running += r.adds
		if r.index >= 0 {
			t.Fed.Calls++
		}
		if p := (Position{sequence, r.index}); p.Less(t.o.Below) {
			t.rows.add(Row{p, r.adds, running})
		}
	}
	return before - taken
}

// correction returns what the entry at hand is to add to the target; 0 when it is
// no correction, or of something else.
func (t *Trace) correction(at usage.Micros) int64 {
	c := t.Decoder.Control.GetCorrection()
	if c == nil {
		return 0
	}
	d := t.o.Target
	when := usage.Micros(c.GetTimeUnixMicros())
	if when == 0 || when > at {
		when = at
	}
	f := &d.Filter
	if t.end != 0 && when < t.start || !t.isUnder(c.GetAccount()) || !f.Match(c.GetModel(), c.GetRoute(), c.GetMethod()) {
		return 0
	}
	for _, q := range c.GetAdjustments() {
		if usage.Meter(q.GetMeter()) == d.Meter {
			return q.GetValue()
		}
	}
	return 0
}

// counted returns the calls of a batch that the core counted for the target.
func (t *Trace) counted(b *quota.Batch, f *ledger.Frame, at usage.Micros, repeated []bool) []row {
	t.flags = t.flags[:0]
	any := false
	for _, id := range b.Account.Dict {
		below, known := t.under[string(id)]
		if !known {
			below = t.isUnder(string(id))
		}
		t.flags = append(t.flags, below)
		any = any || below
	}
	if !any {
		return nil
	}
	d := t.o.Target
	var column *ledger.Ints
	if i, ok := d.Meter.Index(); ok {
		column = &f.Meters[i]
	} else {
		for k := range f.Custom {
			if f.Custom[k].Meter == d.Meter {
				column = &f.Custom[k].Ints
			}
		}
	}
	rows := t.scratch[:0]
	for i := range f.N {
		if !t.flags[f.Account.ID(i)] || !f.Admitted(i) || repeated != nil && repeated[i] {
			continue
		}
		if t.end != 0 && min(usage.Micros(f.Time.At(i)), at) < t.start {
			continue
		}
		if !d.Filter.Empty() && !matches(&d.Filter, f, i) {
			continue
		}
		adds, known := int64(0), false
		if column != nil {
			adds, known = column.Get(i)
		}
		if !known && d.Meter == usage.Calls {
			adds, known = 1, true
		}
		if known {
			rows = append(rows, row{int32(i), adds})
		}
	}
	t.scratch = rows
	return rows
}

func matches(filter *usage.Filter, f *ledger.Frame, i int) bool {
	return oneOf(filter.Models, f.Model.At(i)) && oneOf(filter.Routes, f.Route.At(i)) && oneOf(filter.Methods, f.Method.At(i))
}

func oneOf(list []string, v []byte) bool {
	if len(list) == 0 {
		return true
	}
	for _, l := range list {
		if l == string(v) {
			return true
		}
	}
	return false
}

// isUnder reports whether an account's calls count for the target.
func (t *Trace) isUnder(id string) bool {
	under := false
	for at, depth := id, 0; at != "" && depth <= quota.MaxDepth; depth++ {
		if at == t.o.Target.Account {
			under = true
			break
		}
		u, ok := t.o.State.Account(at)
		if !ok {
			break
		}
		at = u.Parent
	}
	if len(t.under) >= maxUnder {
		clear(t.under)
	}
	t.under[id] = under
	return under
}

// findCrossing finds the call with which the counter reached the threshold.
func (t *Trace) findCrossing(sequence uint64, rows []row, used int64) {
	if t.Decided == nil || t.Decided.Verdict == usage.Allow {
		return
	}
	most := Threshold(t.Decided)
	for _, r := range rows {
		used -= r.adds
	}
	if used >= most {
		return
	}
	for _, r := range rows {
		if used += r.adds; used >= most {
			t.Crossing = &Row{Position{sequence, r.index}, r.adds, used}
			return
		}
	}
}

// repeated says which foreign events of a batch were seen before. The core
// tells only how many: a second state is asked about each event by itself.
func (t *Trace) repeated(e *quota.Entry) ([]bool, error) {
	if t.probe == nil {
		state, err := t.o.Again()
		if err != nil {
			return nil, err
		}
		t.probe = &probe{state: state, sequence: state.Sequence()}
	}
	return t.probe.ask(e.Batch, t.o.State.Now()), nil
}

// probe is a shard that sees nothing but foreign events, one an entry.
type probe struct {
	state    *quota.Shard
	sequence uint64
	batch    quota.Batch
	at       [1]int64
	dicts    [3][1][]byte
	repeated []bool
}

// refusedCode keeps the probe from counting.
var refusedCode = [][]byte{[]byte("PROBE")}

func (p *probe) ask(b *quota.Batch, now usage.Micros) []bool {
	p.repeated = append(p.repeated[:0], make([]bool, b.N)...)
	for i := range b.N {
		source := b.Source.At(i)
		if len(source) == 0 {
			continue
		}
		p.sequence++
		p.at[0] = b.Time[i]
		p.dicts[0][0], p.dicts[1][0], p.dicts[2][0] = b.Account.At(i), source, b.EventID.At(i)
		p.batch = quota.Batch{N: 1, Time: p.at[:], Code: quota.Strings{Dict: refusedCode}}
		p.batch.Account.Dict, p.batch.Source.Dict, p.batch.EventID.Dict = p.dicts[0][:], p.dicts[1][:], p.dicts[2][:]
		fx := p.state.Apply(quota.Entry{Sequence: p.sequence, Time: now, Batch: &p.batch})
		p.repeated[i] = fx.Duplicates > 0
	}
	return p.repeated
}

// ring keeps the newest rows.
type ring struct {
	most    int
	rows    []Row
	next    int  // where the next one goes, once it is full
	dropped bool // older ones were
}

func (r *ring) add(row Row) {
	if len(r.rows) < r.most {
		r.rows = append(r.rows, row)
		return
	}
	r.rows[r.next] = row
	r.next = (r.next + 1) % r.most
	r.dropped = true
}

func (r *ring) clear() { r.rows, r.next, r.dropped = r.rows[:0], 0, false }

// all returns the rows, oldest first.
func (r *ring) all() []Row {
	return append(append(make([]Row, 0, len(r.rows)), r.rows[r.next:]...), r.rows[:r.next]...)
}

// Threshold is the use at which the decision's verdict begins; 0 for Allow.
func Threshold(d *usage.Decision) int64 {
	switch d.Verdict {
	case usage.Deny:
		return d.Amount
	case usage.Warn:
		return WarnAt(d)
	}
	return 0
}

// WarnAt is the least use of which the hundredfold is at least the amount times
// the percentage; 0: the limit does not warn.
func WarnAt(d *usage.Decision) int64 {
	if d.WarnPercent == 0 || d.WarnPercent > 100 || d.Amount < 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(d.Amount), uint64(d.WarnPercent))
	q, rest := bits.Div64(hi, lo, 100)
	if rest > 0 {
		q++
	}
	return int64(q)
}
