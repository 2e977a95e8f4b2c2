package explain

import (
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

// fedRow is a call that fed the counter.
type fedRow struct {
	position
	adds, after int64
}

// row is a call of the entry at hand.
type row struct {
	index int32
	adds  int64
}

// maxUnder bounds what is remembered of who is below the account.
const maxUnder = 1 << 17

// trace follows one counter through a replay of its shard. It is a fold: no
// clock, no I/O.
type trace struct {
	b       *base
	target  *usage.Decision
	below   position // calls from there on are not indexed
	decoder fold.Decoder
	probe   *probe

	tracking bool
	used     int64 // the counter
	fed      Fed
	rows     ring
	entries  uint64

	under   map[string]bool
	flags   []bool // by entry of the account dictionary
	scratch []row

	// Of the entry that led to the decision:
	decided   *usage.Decision // nil: the replay made none
	before    int64
	planNew   bool
	periodNew bool
	crossing  row
	crossed   int64 // the counter with the crossing call; 0: none
}

func newTrace(b *base, target *usage.Decision, below position) *trace {
	return &trace{b: b, target: target, below: below, rows: ring{most: maxIndexed}, under: map[string]bool{}}
}

// apply folds an entry, up to the one that led to the decision.
func (t *trace) apply(m *ledger.Message) error {
	if m.Sequence <= t.b.state.Sequence() {
		return nil
	}
	state := t.b.state
	// What can't be decoded still lets time pass.
	e, kind, _ := t.decoder.Decode(m)
	t.entries++
	last := m.Sequence == t.target.Revision
	if !t.tracking && (last || t.target.PeriodEnd == 0 || max(e.Time, state.Now()) >= t.target.PeriodStart) {
		t.begin(e, last)
	}
	version := state.PlanVersion()
	fx := state.Apply(e)
	planNew := state.PlanVersion() != version
	if kind == ledger.KindControl && t.decoder.Control.GetAccountSet() != nil {
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
		rows = t.counted(e.Batch, &t.decoder.Frame, e.Time, repeated)
	}
	if len(rows) == 0 && kind != ledger.KindControl && !planNew && !last {
		return nil
	}
	after, ok := t.lookup()
	before := t.used
	if last {
		t.planNew = planNew
		for i := range fx.Decisions {
			if d := fx.Decisions[i]; d.Account == t.target.Account && d.LimitID == t.target.LimitID {
				t.decided, after, ok = &d, d.Used, true
			}
		}
	}
	if !ok {
		// There is no such limit here: nothing before this counts.
		t.forget(m.Sequence + 1)
		return nil
	}
	before = t.move(m.Sequence, before, after, rows, kind, planNew)
	if last {
		t.before = before
		t.findCrossing(rows)
	}
	t.used = after
	return nil
}

// begin takes note of where the counter stands when its window begins, or the
// replay does within it.
func (t *trace) begin(e quota.Entry, last bool) {
	rolled := t.b.state.Now() < t.target.PeriodStart
	t.tracking, t.periodNew = true, rolled && last
	t.fed.Since = e.Sequence
	if t.b.snapshot == "" || rolled {
		return
	}
	if used, ok := t.lookup(); ok {
		t.used, t.fed.Carried = used, used
	}
}

// lookup returns the counter's value; false when the account has no such limit.
// A limit of another plan that has the same name and counts the same is the
// same counter: it goes on when the account changes plans.
func (t *trace) lookup() (int64, bool) {
	u, ok := t.b.state.Account(t.target.Account)
	if !ok {
		return 0, false
	}
	var match *quota.LimitUse
	for i := range u.Limits {
		l := &u.Limits[i]
		if l.Meter != t.target.Meter || l.Window != t.target.Window {
			continue
		}
		if l.LimitID == t.target.LimitID {
			match = l
			break
		}
		if name, ok := strings.CutPrefix(l.LimitID, u.Plan); ok && strings.HasSuffix(t.target.LimitID, name) {
			match = l
		}
	}
	if match == nil || match.PeriodStart != t.target.PeriodStart {
		return 0, false
	}
	return match.Used, true
}

// forget says that nothing before a sequence is in the counter.
func (t *trace) forget(sequence uint64) {
	t.used, t.fed = 0, Fed{Since: sequence}
	t.rows.clear()
}

// move accounts for a change of the counter and returns where it began: at 0
// when it is another one than before.
func (t *trace) move(sequence uint64, before, after int64, rows []row, kind ledger.Kind, planNew bool) int64 {
	sum := int64(0)
	for _, r := range rows {
		sum += r.adds
	}
	change := planNew || t.decoder.Control.GetAccountSet() != nil && kind == ledger.KindControl
	switch {
	case change && after == sum:
		// The counter begins anew: what fed it before does not count.
		t.forget(sequence)
		before = 0
	case after-before == sum:
	case change && after == before:
		rows, sum = nil, 0 // the limit was lifted before the calls were counted
	case kind == ledger.KindControl:
		rows, sum = []row{{index: -1, adds: after - before}}, 0
		t.fed.Adjusted += after - before
	default:
		t.fed.Unexplained += after - before - sum
	}
	t.fed.Used += sum
	running := before
	for _, r := range rows {
		running += r.adds
		if r.index >= 0 {
			t.fed.Calls++
		}
		if p := (position{sequence, r.index}); p.less(t.below) {
			t.rows.add(fedRow{p, r.adds, running})
		}
	}
	return before
}

// counted returns the calls of a batch that the core counted for the target.
func (t *trace) counted(b *quota.Batch, f *ledger.Frame, at usage.Micros, repeated []bool) []row {
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
	d := t.target
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
		if d.PeriodEnd != 0 && min(usage.Micros(f.Time.At(i)), at) < d.PeriodStart {
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
func (t *trace) isUnder(id string) bool {
	under := false
	for at, depth := id, 0; at != "" && depth <= quota.MaxDepth; depth++ {
		if at == t.target.Account {
			under = true
			break
		}
		u, ok := t.b.state.Account(at)
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
func (t *trace) findCrossing(rows []row) {
	if t.decided == nil || t.decided.Verdict == usage.Allow {
		return
	}
	most := threshold(t.decided)
	used := t.decided.Used
	for _, r := range rows {
		used -= r.adds
	}
	if used >= most {
		return
	}
	for _, r := range rows {
		if used += r.adds; used >= most {
			t.crossing, t.crossed = r, used
			return
		}
	}
}

// repeated says which foreign events of a batch were seen before. The core
// tells only how many: a second state is asked about each event by itself.
func (t *trace) repeated(e *quota.Entry) ([]bool, error) {
	if t.probe == nil {
		state, err := t.b.again()
		if err != nil {
			return nil, err
		}
		t.probe = &probe{state: state, sequence: state.Sequence()}
	}
	return t.probe.ask(e.Batch, t.b.state.Now()), nil
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
	rows    []fedRow
	next    int  // where the next one goes, once it is full
	dropped bool // older ones were
}

func (r *ring) add(row fedRow) {
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
func (r *ring) all() []fedRow {
	return append(append(make([]fedRow, 0, len(r.rows)), r.rows[r.next:]...), r.rows[:r.next]...)
}
