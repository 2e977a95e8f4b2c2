package alert

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
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

	m     Memory
	stats Stats
}

type account struct {
	seen, refused int64 // step of the newest call, the newest 402 (none: never)
	begin         int64 // step in which it began to be refused
	refusals      int64 // since then
	code          usage.Code
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
		accounts: map[string]*account{}, seen: ring(), refused: ring(), begin: ring(),
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

// Adopt takes over what the episode's state says, which another alerter may
// have changed: since stream time at it is firing (having begun at started) or
// not.
func (r *Ratio) Adopt(firing bool, started, at usage.Micros) {
	if r.m.Firing != firing || r.m.Started != started {
		r.m.Pending, r.m.Clear = 0, 0
	}
	r.m.Firing, r.m.Started = firing, started
	r.m.EvaluatedTo = max(r.m.EvaluatedTo, at)
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
	settled := r.n + int64(max(r.rule.For, r.rule.ResolveAfter, r.rule.NoTrafficAfter)/r.rule.Step) + 2
	var out []usage.Alert
	for walked := int64(0); r.cur < target; walked++ {
		if walked == settled && target-r.cur > 1 {
			clear(r.seen)
			clear(r.refused)
			clear(r.begin)
			r.cur = target - 1
		}
		boundary := r.cur + 1
		if at := usage.Micros(boundary * r.step); at > r.m.EvaluatedTo {
			r.m.EvaluatedTo = at
			if a, ok := r.evaluate(at, lag); ok {
				out = append(out, a)
			}
		}
		r.cur = boundary
		slot := boundary % (r.n + 1)
		r.seen[slot], r.refused[slot], r.begin[slot] = 0, 0, 0
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
		return true
	}
	if a.refused == never || step-a.refused > r.quiet {
		r.move(r.begin, a.begin, step)
		a.begin, a.refusals, a.code = step, 0, code
	}
	a.refusals++
	if step > a.refused {
		r.move(r.refused, a.refused, step)
		a.refused = step
	}
	return true
}

// move takes an account from the ring's old step, if it is still there, to new.
func (r *Ratio) move(ring []int32, old, to int64) {
	if old >= r.cur-r.n {
		ring[old%(r.n+1)]--
	}
	ring[to%(r.n+1)]++
}

func (r *Ratio) evaluate(at, lag usage.Micros) (usage.Alert, bool) {
	var active, begun, still int
	for s := r.cur + 1 - r.n; s <= r.cur; s++ {
		if s >= 0 {
			slot := s % (r.n + 1)
			active += int(r.seen[slot])
			begun += int(r.begin[slot])
			still += int(r.refused[slot])
		}
	}
	active, begun, still = active<<r.shift, begun<<r.shift, still<<r.shift
	r.stats.Active, r.stats.Refused, r.stats.StillRefused, r.stats.Held = active, begun, still, false

	if !r.m.Firing {
		if active == 0 || begun < r.rule.MinAccounts || float64(begun) < r.rule.Threshold*float64(active) {
			r.m.Pending = 0
			return usage.Alert{}, false
		}
		if r.m.Pending == 0 {
			r.m.Pending = at
		}
		if at-r.m.Pending < usage.Micros(r.rule.For.Microseconds()) {
			return usage.Alert{}, false
		}
		r.m.Firing, r.m.Started, r.m.Pending, r.m.Clear = true, r.m.Pending, 0, 0
		return r.alert(usage.AlertFiring, "", at, lag), true
	}

	reason := ""
	low := 1 - r.rule.Hysteresis
	switch {
	case active == 0:
		// No traffic is not healthy.
		r.m.Clear = 0
		if r.m.LastCall == 0 {
			r.m.LastCall = at
		}
		if after := usage.Micros(r.rule.NoTrafficAfter.Microseconds()); after > 0 && at-r.m.LastCall >= after {
			reason = usage.ResolvedNoTraffic
		}
	case float64(begun) < low*r.rule.Threshold*float64(active), float64(begun) < low*float64(r.rule.MinAccounts):
		if r.m.Clear == 0 {
			r.m.Clear = at
		}
		if at-r.m.Clear >= usage.Micros(r.rule.ResolveAfter.Microseconds()) {
			reason = usage.ResolvedRecovered
		}
	default:
		r.m.Clear = 0
	}
	if reason == "" {
		return usage.Alert{}, false
	}
	if lag > usage.Micros(r.rule.MaxLag.Microseconds()) {
		// What is read now is old: it may be breached again by now.
		r.stats.Held = true
		return usage.Alert{}, false
	}
	a := r.alert(usage.AlertResolved, reason, at, lag)
	r.m.Firing, r.m.Started, r.m.Pending, r.m.Clear = false, 0, 0, 0
	return a, true
}

func (r *Ratio) alert(t usage.AlertTransition, reason string, at, lag usage.Micros) usage.Alert {
	a := usage.Alert{
		Transition: t, Rule: r.rule.Name, Scope: r.scope, Severity: r.rule.Severity,
		StartedAt: r.m.Started, At: at, Threshold: r.rule.Threshold, WindowSeconds: int64(r.rule.Window / time.Second),
		Refused: r.stats.Refused, Active: r.stats.Active, StillRefused: r.stats.StillRefused,
		Reason: reason, LagSeconds: float64(lag) / 1e6, Estimated: r.shift > 0,
	}
	if a.Active > 0 {
		a.Value = float64(a.Refused) / float64(a.Active)
	}
	a.Accounts, a.Codes = r.top()
	a.Summary = r.summary(&a)
	return a
}

// top names the accounts that began to be refused within the window.
func (r *Ratio) top() ([]usage.AlertAccount, []usage.AlertCode) {
	accounts, codes := []usage.AlertAccount{}, []usage.AlertCode{}
	byCode := map[usage.Code]int{}
	for id, a := range r.accounts {
		if a.begin >= r.cur+1-r.n {
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

func (r *Ratio) summary(a *usage.Alert) string {
	var b strings.Builder
	about := ""
	if a.Estimated {
		about = "about "
	}
	switch {
	case a.Transition == usage.AlertFiring:
		fmt.Fprintf(&b, "%s%d of %d active accounts (%s) began to be refused with 402 within %s, the threshold is %s", about, a.Refused, a.Active, percent(a.Value), span(r.rule.Window), percent(a.Threshold))
		for i, c := range a.Codes[:min(len(a.Codes), 3)] {
			b.WriteString([]string{"; codes: ", ", ", ", "}[i])
			fmt.Fprintf(&b, "%s %d", c.Code, c.Accounts)
		}
	case a.Reason == usage.ResolvedNoTraffic:
		fmt.Fprintf(&b, "no calls for %s: nobody can say whether accounts are still refused", span(r.rule.NoTrafficAfter))
	default:
		fmt.Fprintf(&b, "%s%d of %d active accounts (%s) began to be refused with 402 within %s; %d still get 402s", about, a.Refused, a.Active, percent(a.Value), span(r.rule.Window), a.StillRefused)
	}
	if a.LagSeconds > r.rule.MaxLag.Seconds() {
		fmt.Fprintf(&b, "; the pipeline is %.0f s behind", a.LagSeconds)
	}
	return b.String()
}

// span writes 1m0s as 1m.
func span(d time.Duration) string {
	s := d.String()
	for _, none := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, none) {
			s = s[:len(s)-2]
		}
	}
	return s
}

func percent(v float64) string { return strconv.FormatFloat(v*100, 'f', 0, 64) + "%" }

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
