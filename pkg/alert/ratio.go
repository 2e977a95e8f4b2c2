package alert

import (
	"cmp"
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Memory is what a detector needs beside the ledger's last Lookback to go on
// after a restart. All times are stream time.
type Memory struct {
	// EvaluatedTo is the last step that was evaluated; it is never evaluated again.
	EvaluatedTo usage.Micros `json:"evaluated_to_unix_micros"`
	// Pending is the first breach of one that has not fired yet, else 0.
	Pending usage.Micros `json:"pending_since_unix_micros,omitempty"`
	// Clear is since when a firing episode has been below the threshold, else 0.
	Clear usage.Micros `json:"clear_since_unix_micros,omitempty"`
	// LastCall is the step of the newest call.
	LastCall usage.Micros `json:"last_call_unix_micros,omitempty"`
	Firing   bool         `json:"firing,omitempty"`
	// Started is the first breach of the episode that is firing.
	Started usage.Micros `json:"started_at_unix_micros,omitempty"`
	// Before is how many accounts were refused before the episode: it is not about
	// them. Peak is how many more were at its height.
	Before int `json:"refused_before,omitempty"`
	Peak   int `json:"refused_at_peak,omitempty"`
	// Settled is since when few accounts begin to be refused while it is firing, else
	// 0; Trough is how few were refused since then.
	Settled usage.Micros `json:"settled_since_unix_micros,omitempty"`
	Trough  int          `json:"refused_at_trough,omitempty"`
	// Ended is when the newest episode ended, if it was not by a new wave: an account
	// that is refused again after that begins again.
	Ended usage.Micros `json:"ended_at_unix_micros,omitempty"`
	// Blind says that nothing is known of the time before: every account that is refused,
	// beside Before, counts as beginning, until there was one step without a breach.
	Blind bool `json:"blind,omitempty"`
}

// Stats are a detector's numbers at the last evaluated step.
type Stats struct {
	Active, Refused, StillRefused int
	// Tracked is how many accounts are remembered.
	Tracked int
	// Sampling is 1 as long as every account is kept, else one in Sampling is.
	Sampling int
	// Late is how many calls came too late for the window so far.
	Late uint64
	// Held says that a resolve is due and held back because of lag.
	Held bool
}

// Ratio is the state machine of a Rule. It is a pure fold: the same calls and
// times give the same alerts. Not safe for concurrent use.
type Ratio struct {
	rule  Rule
	scope string
	step  int64 // microseconds
	n     int64 // steps of the window
	quiet int64 // steps

	begun    bool
	stream   usage.Micros // highest stream time
	cur      int64        // step that stream time is in; every boundary up to it is evaluated
	accounts map[string]*account
	shift    uint // accounts are kept whose hash ends in shift zeros
	swept    int64

	// Rings over the steps [cur-n, cur], by step modulo their length: accounts
	// by the step of their newest call, of their newest 402, of their beginning
	// to be refused.
	seen, refused, begin []int32
	// stuck is a ring over [cur-quiet, cur]: accounts that were not admitted since
	// their newest 402, by its step. Clients that wait for long between two tries are
	// refused in between too.
	stuck []int32

	m     Memory
	stats Stats
}

type account struct {
	seen, refused int64 // step of the newest call, the newest 402 (none: never)
	begin         int64 // step in which it began to be refused
	refusals      int64 // since then
	code          usage.Code
	stuck         bool // not admitted since the newest 402
}

const never = int64(-1) << 62

// NewRatio returns the state machine of a valid rule.
func NewRatio(rule Rule, scope string) (*Ratio, error) {
	if err := rule.Validate(); err != nil {
		return nil, err
	}
	n := int64(rule.Window / rule.Step)
	ring := func() []int32 { return make([]int32, n+1) }
	return &Ratio{
		rule: rule, scope: scope, step: rule.Step.Microseconds(), n: n, quiet: int64(rule.Quiet / rule.Step),
		accounts: map[string]*account{}, seen: ring(), refused: ring(), begin: ring(), stuck: make([]int32, int64(rule.Quiet/rule.Step)+1),
	}, nil
}

// Rule returns the rule's name, Scope what it looks at.
func (r *Ratio) Rule() string { return r.rule.Name }

// Scope returns what the rule looks at.
func (r *Ratio) Scope() string { return r.scope }

// Memory returns what is to be kept over a restart.
func (r *Ratio) Memory() Memory { return r.m }

// Restore takes up the memory of an earlier run. The ledger is then to be read
// again from at least Lookback before Memory.EvaluatedTo.
func (r *Ratio) Restore(m Memory) { r.m = m }

// Adopt takes over what the episode's state says, which another alerter may have
// changed: the newest transition of the rule and scope, or nil when there was none.
func (r *Ratio) Adopt(newest *usage.Alert) {
	switch {
	case newest == nil:
		r.m = Memory{EvaluatedTo: r.m.EvaluatedTo, LastCall: r.m.LastCall, Pending: r.m.Pending, Blind: r.m.Blind}
		return
	case newest.Transition == usage.AlertFiring:
		if !r.m.Firing || r.m.Started != newest.StartedAt {
			r.fire(newest.StartedAt, newest.RefusedBefore, newest.StillRefused)
		}
	case r.m.Firing:
		r.end(newest)
		if newest.Reason == usage.ResolvedNewWave {
			// Its firing was to follow at once.
			r.m.Blind, r.m.Before = true, newest.RefusedBefore
		}
	}
	r.m.EvaluatedTo = max(r.m.EvaluatedTo, newest.At)
}

// fire begins an episode.
func (r *Ratio) fire(started usage.Micros, before, still int) {
	r.m.Firing, r.m.Started, r.m.Before, r.m.Peak = true, started, before, max(still-before, 0)
	r.m.Pending, r.m.Clear, r.m.Settled, r.m.Trough, r.m.Blind = 0, 0, 0, 0, false
}

// end ends the episode that is firing, as its resolve says.
func (r *Ratio) end(a *usage.Alert) {
	r.m.Firing, r.m.Started, r.m.Before, r.m.Peak = false, 0, 0, 0
	r.m.Pending, r.m.Clear, r.m.Settled, r.m.Trough, r.m.Blind = 0, 0, 0, 0, false
	if a.Reason != usage.ResolvedNewWave {
		r.m.Ended = a.At
		r.recovered()
	}
}

// recovered lets the accounts that are not refused any more begin again: their episode
// is over, and so the next one is news. Outside of episodes an account that is refused
// every few minutes (a limit by the minute) is no news.
func (r *Ratio) recovered() {
	for _, a := range r.accounts {
		if a.refused != never && !r.stillRefused(a) {
			a.refused, a.stuck = never, false // the rings do not hold it any more
		}
	}
}

// stillRefused reports whether an account got a 402 within the window, or got one within
// quiet and was not admitted since.
func (r *Ratio) stillRefused(a *account) bool {
	return a.refused >= r.cur+1-r.n || a.stuck && a.refused >= r.cur+1-r.quiet
}

// Stats returns the numbers at the last evaluated step.
func (r *Ratio) Stats() Stats {
	s := r.stats
	s.Tracked, s.Sampling = len(r.accounts), 1<<r.shift
	return s
}

// Advance takes stream time forward and evaluates the steps that are complete:
// every call with a stream time before it must have been observed. now is the
// time by the clock; how far stream time is behind it is the lag. The alerts,
// oldest first, lack what the core does not know: identity, number and links.
func (r *Ratio) Advance(stream, now usage.Micros) []usage.Alert {
	if !r.begun {
		r.begun, r.stream, r.cur = true, stream, int64(stream)/r.step
		r.swept = r.cur
		r.m.EvaluatedTo = max(r.m.EvaluatedTo, usage.Micros(r.cur*r.step))
		return nil
	}
	if stream <= r.stream {
		return nil
	}
	r.stream = stream
	lag := max(now-stream, 0)
	target := int64(stream) / r.step
	// After a gap without calls all windows are empty and all waits over, so
	// that the rest of it need not be walked through.
	settled := r.n + r.quiet + int64(max(r.rule.For, r.rule.ResolveAfter, r.rule.NoTrafficAfter)/r.rule.Step) + 2
	var out []usage.Alert
	for walked := int64(0); r.cur < target; walked++ {
		if walked == settled && target-r.cur > 1 {
			clear(r.seen)
			clear(r.refused)
			clear(r.begin)
			clear(r.stuck)
			r.cur = target - 1
		}
		boundary := r.cur + 1
		switch at := usage.Micros(boundary * r.step); {
		case at > r.m.EvaluatedTo:
			r.m.EvaluatedTo = at
			out = append(out, r.evaluate(at, lag)...)
		case at == r.m.Ended:
			r.recovered() // as it was when this was evaluated, before a restart
		}
		r.cur = boundary
		slot := boundary % (r.n + 1)
		r.seen[slot], r.refused[slot], r.begin[slot] = 0, 0, 0
		r.stuck[boundary%(r.quiet+1)] = 0
	}
	if r.cur-r.swept >= r.n {
		r.sweep()
	}
	return out
}

// Observe takes note of a call at its counting time, min(event time, stream
// time), in ledger order and after Advance to its stream time. code is empty
// when it was admitted. It reports false when the call is too late for the
// window. account is copied when it is kept.
func (r *Ratio) Observe(id []byte, code usage.Code, at usage.Micros) bool {
	if !r.begun {
		r.Advance(at, at)
	}
	step := min(int64(at)/r.step, r.cur)
	if step < r.cur+1-r.n {
		r.stats.Late++
		return false
	}
	r.m.LastCall = max(r.m.LastCall, usage.Micros((step+1)*r.step))
	if r.shift > 0 && !r.sampled(id) {
		return true
	}
	a := r.accounts[string(id)]
	if a == nil {
		if len(r.accounts) >= r.rule.MaxAccounts && !r.makeRoom(id) {
			return true
		}
		a = &account{seen: never, refused: never, begin: never}
		r.accounts[string(id)] = a
	}
	if step > a.seen {
		r.move(r.seen, a.seen, step)
		a.seen = step
	}
	if code.Status() != 402 {
		if code == "" && a.stuck && step > a.refused {
			r.unstick(a)
		}
		return true
	}
	if a.refused == never || step-a.refused > r.quiet {
		r.move(r.begin, a.begin, step)
		a.begin, a.refusals, a.code = step, 0, code
	}
	a.refusals++
	if step > a.refused {
		r.move(r.refused, a.refused, step)
		r.unstick(a)
		a.refused, a.stuck = step, true
		r.stuck[step%(r.quiet+1)]++
	}
	return true
}

// unstick takes an account from the ring of those that were not admitted since.
func (r *Ratio) unstick(a *account) {
	if a.stuck && a.refused >= r.cur-r.quiet {
		r.stuck[a.refused%(r.quiet+1)]--
	}
	a.stuck = false
}

// move takes an account from the ring's old step, if it is still there, to new.
func (r *Ratio) move(ring []int32, old, to int64) {
	if old >= r.cur-r.n {
		ring[old%(r.n+1)]--
	}
	ring[to%(r.n+1)]++
}

// counts are accounts at a boundary. seen are the active ones and those that are still
// refused and wait for longer than the window with their next try.
type counts struct{ active, seen, begun, still int }

func (r *Ratio) count() counts {
	var c counts
	for s := max(r.cur+1-r.n, 0); s <= r.cur; s++ {
		slot := s % (r.n + 1)
		c.active += int(r.seen[slot])
		c.begun += int(r.begin[slot])
		c.still += int(r.refused[slot])
	}
	c.seen = c.active
	for s := max(r.cur+1-r.quiet, 0); s < r.cur+1-r.n; s++ {
		waiting := int(r.stuck[s%(r.quiet+1)])
		c.still, c.seen = c.still+waiting, c.seen+waiting
	}
	return counts{c.active << r.shift, c.seen << r.shift, c.begun << r.shift, c.still << r.shift}
}

// breach says that so many accounts are an incident.
func (r *Ratio) breach(w wave) bool {
	return w.n >= r.rule.MinAccounts && float64(w.n) >= r.rule.Threshold*float64(w.of)
}

// few says that so many accounts are less than the hysteresis leaves of an incident.
func (r *Ratio) few(n, active int) bool {
	low := 1 - r.rule.Hysteresis
	return float64(n) < low*r.rule.Threshold*float64(active) || float64(n) < low*float64(r.rule.MinAccounts)
}

// leftover is the part of an episode's height that may still be refused at its end:
// clients that nobody mends. It does not keep an episode open for ever, and the resolve
// says who they are.
const leftover = 10

// over says that the accounts that are still refused are none, too few for an incident,
// or a small part of the episode's height.
func (r *Ratio) over(still int) bool {
	n := still - r.m.Before
	return float64(n) < (1-r.rule.Hysteresis)*float64(r.rule.MinAccounts) || n*leftover <= r.m.Peak
}

// lasts reports that a breach has lasted for long enough; pending is its beginning.
func (r *Ratio) lasts(breach bool, at usage.Micros) bool {
	if !breach {
		r.m.Pending = 0
		return false
	}
	if r.m.Pending == 0 {
		r.m.Pending = at
	}
	return at-r.m.Pending >= usage.Micros(r.rule.For.Microseconds())
}

func (r *Ratio) evaluate(at, lag usage.Micros) []usage.Alert {
	c := r.count()
	r.stats.Active, r.stats.Refused, r.stats.StillRefused, r.stats.Held = c.active, c.begun, c.still, false
	if r.m.Firing {
		return r.firing(c, at, lag)
	}
	w := wave{began, c.begun, c.active}
	if r.m.Blind && c.still-r.m.Before > c.begun {
		w = wave{found, c.still - r.m.Before, c.seen}
	}
	breach := c.active > 0 && r.breach(w)
	if !breach && c.active > 0 {
		r.m.Blind, r.m.Before = false, 0
	}
	if !r.lasts(breach, at) {
		return nil
	}
	r.fire(r.m.Pending, max(c.still-w.n, 0), c.still)
	return []usage.Alert{r.fired(w, c, at, lag)}
}

// wave is what an episode begins with: n accounts of so many.
type wave struct {
	kind  waveKind
	n, of int
}

type waveKind int

const (
	began waveKind = iota // they began to be refused
	again                 // they are more than were refused when the last wave was over
	found                 // they were refused already when the alerter began to watch
)

func (r *Ratio) fired(w wave, c counts, at, lag usage.Micros) usage.Alert {
	who := r.beginning
	if w.kind != began {
		who = r.stillRefused
	}
	c.begun, c.active = w.n, w.of
	a := r.alert(usage.AlertFiring, who, c, at, lag)
	a.Summary = r.firingText(&a, w.kind)
	return a
}

func (r *Ratio) resolved(reason string, c counts, at, lag usage.Micros) usage.Alert {
	a := r.alert(usage.AlertResolved, r.stillRefused, c, at, lag)
	a.Reason = reason
	a.Summary = r.resolveText(&a)
	return a
}

func (r *Ratio) beginning(a *account) bool { return a.begin >= r.cur+1-r.n }

// firing evaluates a step of an episode.
func (r *Ratio) firing(c counts, at, lag usage.Micros) []usage.Alert {
	r.m.Peak = max(r.m.Peak, c.still-r.m.Before)
	after := func(since usage.Micros, d time.Duration) bool {
		return since != 0 && at-since >= usage.Micros(d.Microseconds())
	}
	reason := ""
	few := r.few(c.begun, c.active)
	settled := after(r.m.Settled, r.rule.ResolveAfter)
	next := wave{began, c.begun, c.active}
	if !r.breach(next) {
		next = wave{again, c.still - r.m.Trough, c.seen}
	}
	switch {
	case c.active == 0:
		// No traffic is not healthy.
		r.m.Clear, r.m.Pending = 0, 0
		if r.m.LastCall == 0 {
			r.m.LastCall = at
		}
		if r.rule.NoTrafficAfter > 0 && after(r.m.LastCall, r.rule.NoTrafficAfter) {
			reason = usage.ResolvedNoTraffic
		}
	case settled && r.lasts(r.breach(next), at):
		return r.newWave(next, c, at, lag)
	case few && r.over(c.still):
		if r.m.Clear == 0 {
			r.m.Clear = at
		}
		if after(r.m.Clear, r.rule.ResolveAfter) {
			reason = usage.ResolvedRecovered
		}
	default:
		r.m.Clear = 0
	}
	switch {
	case c.active == 0 || settled:
	case !few:
		r.m.Settled = 0
	case r.m.Settled == 0:
		r.m.Settled, r.m.Trough = at, c.still
	}
	r.m.Trough = min(r.m.Trough, c.still)
	if reason == "" {
		return nil
	}
	if lag > usage.Micros(r.rule.MaxLag.Microseconds()) {
		// What is read now is old: it may be breached again by now.
		r.stats.Held = true
		return nil
	}
	a := r.resolved(reason, c, at, lag)
	r.end(&a)
	return []usage.Alert{a}
}

// newWave ends the episode whose wave is over, although accounts of it are still
// refused, and begins another: whoever has heard of the first has to hear of the second
// too. What was refused before the first is no part of the second either, but what is
// left of the first is, so that it does not end while those are refused.
func (r *Ratio) newWave(w wave, c counts, at, lag usage.Micros) []usage.Alert {
	started, before := r.m.Pending, r.m.Before
	over := r.resolved(usage.ResolvedNewWave, c, at, lag)
	r.end(&over)
	r.fire(started, before, c.still)
	return []usage.Alert{over, r.fired(w, c, at, lag)}
}

func (r *Ratio) alert(t usage.AlertTransition, who func(*account) bool, c counts, at, lag usage.Micros) usage.Alert {
	a := usage.Alert{
		Transition: t, Rule: r.rule.Name, Scope: r.scope, Severity: r.rule.Severity,
		StartedAt: r.m.Started, At: at, Threshold: r.rule.Threshold, WindowSeconds: int64(r.rule.Window / time.Second),
		Refused: c.begun, Active: c.active, StillRefused: c.still, RefusedBefore: r.m.Before, PeakRefused: r.m.Peak,
		LagSeconds: float64(lag) / 1e6, Estimated: r.shift > 0,
	}
	if a.Active > 0 {
		a.Value = float64(a.Refused) / float64(a.Active)
	}
	a.Accounts, a.Codes = r.top(who)
	return a
}

// top names the accounts that an alert is about.
func (r *Ratio) top(who func(*account) bool) ([]usage.AlertAccount, []usage.AlertCode) {
	accounts, codes := []usage.AlertAccount{}, []usage.AlertCode{}
	byCode := map[usage.Code]int{}
	for id, a := range r.accounts {
		if who(a) {
			accounts = append(accounts, usage.AlertAccount{Account: id, Code: a.code, Refusals: a.refusals})
			byCode[a.code]++
		}
	}
	slices.SortFunc(accounts, func(a, b usage.AlertAccount) int {
		return cmp.Or(cmp.Compare(b.Refusals, a.Refusals), cmp.Compare(a.Account, b.Account))
	})
	for code, n := range byCode {
		codes = append(codes, usage.AlertCode{Code: code, Accounts: n << r.shift})
	}
	slices.SortFunc(codes, func(a, b usage.AlertCode) int {
		return cmp.Or(cmp.Compare(b.Accounts, a.Accounts), cmp.Compare(a.Code, b.Code))
	})
	return slices.Clone(accounts[:min(len(accounts), r.rule.Top)]), codes[:min(len(codes), r.rule.Top)]
}

// sweep forgets the accounts that can't matter any more.
func (r *Ratio) sweep() {
	r.swept = r.cur
	for id, a := range r.accounts {
		// The next call may be as late as the window allows.
		if oldest := r.cur + 1 - r.n; a.seen < oldest-1 && (a.refused == never || oldest-a.refused > r.quiet) {
			delete(r.accounts, id)
		}
	}
	if len(r.accounts) == 0 {
		// Only an empty memory may widen its sample again: to an account that
		// it did not watch before, a retry would look like a beginning.
		r.shift = 0
	}
}

// makeRoom reports whether the account may be kept after all.
func (r *Ratio) makeRoom(id []byte) bool {
	if r.cur-r.swept > r.n/8 {
		r.sweep()
	}
	for len(r.accounts) >= r.rule.MaxAccounts && r.shift < 30 {
		r.shift++
		for id, a := range r.accounts {
			if !r.sampled([]byte(id)) {
				r.drop(a)
				delete(r.accounts, id)
			}
		}
	}
	return len(r.accounts) < r.rule.MaxAccounts && r.sampled(id)
}

func (r *Ratio) drop(a *account) {
	for _, at := range []struct {
		ring []int32
		step int64
	}{{r.seen, a.seen}, {r.refused, a.refused}, {r.begin, a.begin}} {
		if at.step >= r.cur-r.n {
			at.ring[at.step%(r.n+1)]--
		}
	}
	r.unstick(a)
}

// sampled says whether an account belongs to the sample: it depends on the
// account alone, so that the sample is even among refused and admitted ones.
func (r *Ratio) sampled(id []byte) bool {
	h := uint64(14695981039346656037)
	for _, c := range id {
		h = (h ^ uint64(c)) * 1099511628211
	}
	// FNV's low bits are weak; take them from a mix of all.
	h ^= h >> 32
	h *= 0x9E3779B97F4A7C15
	return (h>>33)&(1<<r.shift-1) == 0
}
