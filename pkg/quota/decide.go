package quota

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"slices"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// DecisionID returns the identity of the decision that the entry at sequence,
// of stream time at, leads to for an account and limit ("<plan>/<limit>").
func DecisionID(at usage.Micros, shard uint32, sequence uint64, account, limitID string) string {
	h := sha256.New()
	var n [8]byte
	number := func(v uint64) {
		binary.BigEndian.PutUint64(n[:], v)
		_, _ = h.Write(n[:]) // hash.Hash never fails
	}
	number(uint64(shard))
	number(sequence)
	for _, part := range [...]string{account, limitID} {
		number(uint64(len(part)))
		_, _ = h.Write([]byte(part))
	}
	id, err := ksuid.FromParts(time.Unix(int64(at)/1_000_000, 0), h.Sum(nil)[:16])
	if err != nil {
		// Only a payload of another length than 16 bytes is an error.
		panic("quota: " + err.Error())
	}
	return id.String()
}

// touch is a counter that is to be looked at when the entry is folded.
type touch struct{ account, limit uint32 }

type touchName struct{ account, limit string }

// timerBucket holds the counters whose windows end at the same moment.
type timerBucket struct {
	end   usage.Micros
	items []touch
}

func (s *Shard) touch(account, limit uint32, forced bool) {
	c := &s.counters[s.accounts[account].first+limit]
	if forced {
		c.flags |= isForced
	}
	if c.flags&isTouched == 0 {
		c.flags |= isTouched
		s.touched = append(s.touched, touch{account, limit})
	}
}

// limitOf returns an account's limit and counter, false when it has none of
// that number any more.
func (s *Shard) limitOf(t touch) (*limit, *counter, bool) {
	a := &s.accounts[t.account]
	def := s.plans.defs[a.plan]
	if t.limit >= def.n {
		return nil, nil, false
	}
	return &s.plans.limits[def.first+t.limit], &s.counters[a.first+t.limit], true
}

// fire touches the counters whose window has ended while they warned or
// denied, in the order of time, account, limit.
func (s *Shard) fire() {
	for len(s.timers) > 0 && s.timers[0].end <= s.now {
		items := s.timers[0].items
		s.queued -= len(items)
		copy(s.timers, s.timers[1:])
		s.timers[len(s.timers)-1] = timerBucket{}
		s.timers = s.timers[:len(s.timers)-1]
		items = slices.DeleteFunc(items, func(t touch) bool {
			l, c, ok := s.limitOf(t)
			return !ok || c.verdict <= uint8(usage.Allow) || c.published == s.windows[l.kind].number || s.endless(l)
		})
		slices.SortFunc(items, s.byName)
		for _, t := range items {
			s.soil(t.account)
			s.touch(t.account, t.limit, false)
		}
	}
}

func (s *Shard) byName(x, y touch) int {
	if c := bytes.Compare(s.idOf(&s.accounts[x.account]), s.idOf(&s.accounts[y.account])); c != 0 {
		return c
	}
	lx, _, okx := s.limitOf(x)
	ly, _, oky := s.limitOf(y)
	if !okx || !oky {
		return cmp.Compare(x.limit, y.limit)
	}
	return cmp.Compare(lx.fullID, ly.fullID)
}

func (s *Shard) setTimer(t touch, end usage.Micros) {
	i, found := slices.BinarySearchFunc(s.timers, end, func(b timerBucket, end usage.Micros) int { return cmp.Compare(b.end, end) })
	if !found {
		s.timers = slices.Insert(s.timers, i, timerBucket{end: end})
	}
	s.timers[i].items = append(s.timers[i].items, t)
	s.queued++
}

// rebuildTimers sets the timers anew from the counters.
func (s *Shard) rebuildTimers() {
	s.timers, s.queued = nil, 0
	for i := range s.accounts {
		def := s.plans.defs[s.accounts[i].plan]
		for k := range def.n {
			t := touch{uint32(i), k}
			l, c, _ := s.limitOf(t)
			if c.verdict > uint8(usage.Allow) && !s.endless(l) {
				// What was decided of a window that is over is decided again in this entry.
				if end := l.kind.End(int64(c.published)); end > s.now {
					s.setTimer(t, end)
				}
			}
		}
	}
}

// decide makes the decisions on all touched counters.
func (s *Shard) decide(b *Batch) {
	// An entry that brings several plan sets into effect may lift a limit and
	// bring it back: the last word counts.
	var lifted map[touchName]int
	if n := len(s.effects.Decisions); n > 0 && len(s.touched) > 0 {
		lifted = make(map[touchName]int, n)
		for i := range s.effects.Decisions {
			lifted[touchName{s.effects.Decisions[i].Account, s.effects.Decisions[i].LimitID}] = i
		}
	}
	for _, t := range s.touched {
		l, c, ok := s.limitOf(t)
		if !ok || c.flags&isTouched == 0 {
			continue // its block has moved, and the new one was touched by itself
		}
		forced := c.flags&isForced != 0
		roomy := c.flags & isRoomy
		c.flags = 0
		c.roll(s.windows[l.kind].number)
		verdict, last := usage.Allow, max(usage.Verdict(c.verdict), usage.Allow)
		if s.accounts[t.account].flags&closed == 0 {
			var room bool
			if verdict, room = s.standing(t, l, c); room {
				c.flags = isRoomy
			}
		}
		if verdict == last && c.flags == roomy && (verdict == usage.Allow || (!forced && (c.published == c.number || s.endless(l)))) {
			continue
		}
		s.soil(t.account)
		c.verdict, c.published = uint8(verdict), c.number
		d := s.decision(t, c, l, s.plans.version)
		if b != nil && s.f.b != nil && verdict > usage.Allow {
			d.Cause = s.cause(t, l, c, verdict)
		}
		if verdict > usage.Allow && !s.endless(l) {
			s.setTimer(t, s.windows[l.kind].end)
		}
		if i, ok := lifted[touchName{d.Account, d.LimitID}]; ok {
			s.effects.Decisions[i] = d
			continue
		}
		s.effects.Decisions = append(s.effects.Decisions, d)
	}
	s.touched = s.touched[:0]
	s.f.endFrame()
	// In one order, whether the state was built entry by entry or read from a
	// snapshot: who publishes them says with one of them how far it is.
	if len(s.effects.Decisions) > 1 {
		slices.SortFunc(s.effects.Decisions, func(x, y usage.Decision) int {
			return cmp.Or(cmp.Compare(x.Account, y.Account), cmp.Compare(x.LimitID, y.LimitID))
		})
	}
}

// lift ends the warning or denial of a limit that the account has no more.
func (s *Shard) lift(account uint32, c *counter, l *limit, version string) {
	c.roll(s.windows[l.kind].number)
	c.verdict = uint8(usage.Allow)
	c.flags &^= isRoomy
	s.effects.Decisions = append(s.effects.Decisions, s.decision(touch{account, noLimit}, c, l, version))
}

// noLimit is the number of a limit that the account has no more.
const noLimit = math.MaxUint32

// decision says what the counter's verdict is, as of this entry.
func (s *Shard) decision(t touch, c *counter, l *limit, version string) usage.Decision {
	c.revision, c.decidedAt = s.sequence, uint32(s.now/1_000_000)
	return s.describe(t, c, l, version, s.sequence, s.now)
}

// describe says what the counter's verdict is, which the entry at a revision and
// time led to.
func (s *Shard) describe(t touch, c *counter, l *limit, version string, revision uint64, at usage.Micros) usage.Decision {
	id := s.name(t.account)
	d := usage.Decision{
		ID: DecisionID(at, s.shard, revision, id, l.fullID), Account: id, LimitID: l.fullID, Meter: l.Meter,
		Verdict: usage.Verdict(c.verdict), Revision: revision, Shard: s.shard, Used: s.settled(t, l, c), Amount: l.Amount, Window: l.Window,
		Filter: l.Filter, PlanVersion: version, DecidedAt: at, ActionURL: l.ActionURL, WarnPercent: l.WarnPercent,
	}
	if l.leased {
		d.Tier = l.Tier
	}
	if c.flags&isRoomy != 0 {
		d.Room = max(1, l.Amount-d.Used)
	}
	if d.Verdict == usage.Deny {
		d.Code = l.RefusalCode()
	}
	if l.kind != window.Lifetime && (d.Verdict == usage.Allow || !s.endless(l)) {
		d.PeriodStart, d.PeriodEnd = s.windows[l.kind].at, s.windows[l.kind].end
	}
	return d
}

// endless says whether a verdict on a limit other than Allow outlives every window:
// nothing is allowed in the next one either.
func (s *Shard) endless(l *limit) bool {
	return l.kind == window.Lifetime || l.Amount == 0 && s.core.Version >= deniesForGood
}

// denyForGood replaces the denials of limits of 0, of which gateways believe to end with
// their window what does not, when the rules of that change.
func (s *Shard) denyForGood() {
	for i := range s.accounts {
		def := s.plans.defs[s.accounts[i].plan]
		for k := range def.n {
			if s.plans.limits[def.first+k].Amount == 0 {
				s.touch(uint32(i), k, true)
			}
		}
	}
	s.rebuildTimers()
}

// cause returns the event time of the call with which the counter reached the
// verdict; 0 when it stood there before this batch.
func (s *Shard) cause(t touch, l *limit, c *counter, verdict usage.Verdict) usage.Micros {
	f := &s.f
	threshold := l.Amount
	if verdict == usage.Warn {
		threshold = l.warnAt
	}
	w := &s.windows[l.kind]
	rows := s.rowsUnder(t.account)
	use := func(i uint32) int64 {
		if min(f.b.Time[i], f.now) < int64(w.at) {
			return 0
		}
		v, _ := s.uses(int(i), l)
		return v
	}
	// What this batch added is taken off again, then put back call by call.
	used := c.cur
	for _, i := range rows {
		used -= use(i)
	}
	if used >= threshold {
		return 0
	}
	for _, i := range rows {
		if used += use(i); used >= threshold {
			return usage.Micros(f.b.Time[i])
		}
	}
	return 0
}

// rowsUnder returns the batch's rows, in order, that count for an account.
func (s *Shard) rowsUnder(account uint32) []uint32 {
	f := &s.f
	if s.accounts[account].rollup == 0 {
		entries, entry := 0, 0
		for d, a := range f.accounts {
			if a == account && f.admitted[d] > 0 {
				entries, entry = entries+1, d
			}
		}
		if entries == 1 {
			return f.rowsOf(entry)
		}
	}
	f.under = resized(f.under, len(f.b.Account.Dict))
	f.rowsBelow = f.rowsBelow[:0]
	for i, d := range f.index() {
		if s.under(d, account) {
			f.rowsBelow = append(f.rowsBelow, uint32(i))
		}
	}
	return f.rowsBelow
}

// under says whether the account of dictionary entry d is the given one or a
// descendant of it.
func (s *Shard) under(d, account uint32) bool {
	f := &s.f
	if f.under[d] == 0 {
		f.under[d] = -1
		if f.admitted[d] > 0 {
			for p := int32(f.accounts[d]); p >= 0; p = s.accounts[p].parent {
				if uint32(p) == account {
					f.under[d] = 1
					break
				}
			}
		}
	}
	return f.under[d] > 0
}
