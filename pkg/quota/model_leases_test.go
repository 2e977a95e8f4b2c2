package quota

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// A window's turn changes nothing of an account that nothing else has touched: what
// is compared with who read it from a snapshot has the same hash.
func TestTheHashOfAnAllowanceThatWaitsForItsWindowStaysWhenItBegins(t *testing.T) {
	t.Parallel()
	tl := newTeller(t, exactly(10))
	tl.accounts(usage.Account{ID: "acme", Plan: "free"}, usage.Account{ID: "other", Plan: "free"})
	at := noon + 59*second
	tl.apply(at, Entry{Asks: []LeaseAsk{{"acme", "free/rpm", noon + 60*second, lease.Ask{Gateway: anna, Seq: 1, Want: 4, Sent: lease.Micros(at)}}}})
	for _, at := range []usage.Micros{at, noon + 60*second, noon + 61*second} {
		tl.calls(at, n("other", at, 1)...)
		was := tl.s.Hash()
		read, err := Read(tl.s.AppendBinary(nil))
		if err != nil {
			t.Fatal(err)
		}
		if read.Hash() != was || read.Allowances() != 1 {
			t.Errorf("after %d s: another hash, %d allowances", (at-noon)/second, read.Allowances())
		}
	}
}

// modelAllowance knows what is settled of an allowance, and nothing of what is
// handed out.
type modelAllowance struct {
	outside int64
	leases  map[lease.Gateway]*modelLease
}

// modelLease has two totals of the same thing: what its gateway says that it used,
// and what was counted of it.
type modelLease struct {
	seq           uint64
	said, counted int64
	closed        bool
	heard         usage.Micros
}

// of returns a gateway's lease that is remembered.
func (x *modelAllowance) of(g lease.Gateway, now usage.Micros) *modelLease {
	l := x.leases[g]
	const horizon = usage.Micros(leaseHorizon)
	if l != nil && l.closed && now-l.heard > horizon && (l.counted >= l.said || (now-l.heard)/32 > horizon) {
		x.outside += max(l.said, l.counted)
		delete(x.leases, g)
		return nil
	}
	return l
}

// settled is what is spent for certain in a window.
func (l *modelLimit) settled(period int64) int64 {
	x := l.leases[period]
	if x == nil {
		return l.used[period]
	}
	n := x.outside
	for _, of := range x.leases {
		n += max(of.said, of.counted)
	}
	return n
}

// count adds what row i of a batch used.
func (l *modelLimit) count(period, v int64, b *Batch, i int, now usage.Micros) {
	x := l.leases[period]
	if x == nil {
		return
	}
	if b.Flags.Values != nil && usage.Flags(b.Flags.Values[i])&usage.FromLease != 0 && b.Producer != (dedup.Producer{}) {
		if of := x.of(lease.Gateway(b.Producer), now); of != nil {
			of.counted += v
			return
		}
	}
	x.outside += v
}

// ask takes in what an honest gateway says.
func (m *model) ask(a *LeaseAsk) {
	acc := m.accounts[a.Account]
	if acc == nil {
		return
	}
	plan, id, _ := strings.Cut(a.LimitID, "/")
	l := acc.limits[id]
	if l == nil || l.plan != plan || !l.Tier.Leased() {
		return
	}
	kind, _ := window.Parse(l.Window)
	n, present := kind.Number(a.WindowStart), kind.Number(m.now)
	if a.WindowStart != kind.Start(n) || n != present && (n != present+1 || a.WindowStart-m.now > aheadAtMost) {
		return
	}
	x := l.leases[n]
	wants, ended := a.Need > 0 || a.Want > 0, m.ended[dedup.Producer(a.Gateway)]
	if x == nil {
		if !wants || a.Known != 0 || acc.closed || ended {
			return
		}
		x = &modelAllowance{leases: map[lease.Gateway]*modelLease{}}
		if n == present {
			x.outside = l.used[n]
		}
		l.leases[n] = x
	}
	of := x.of(a.Gateway, m.now)
	switch {
	case wants && ended && (of == nil || of.closed):
		return
	case of == nil && a.Known|a.Used|a.Returned|a.Over != 0:
		return // it speaks of a lease that is gone
	case of == nil:
		of = &modelLease{}
		x.leases[a.Gateway] = of
	case a.Seq <= of.seq:
		return
	}
	of.seq, of.said, of.heard = a.Seq, max(of.said, a.Used+a.Over), m.now
	of.closed = of.closed || a.Closing
}

// end closes the leases of calls of a producer all of whose calls are counted.
func (m *model) end(c *Control) {
	last, known := m.numbers[*c.Closed]
	if known {
		m.ended[*c.Closed] = true
	}
	if !c.Complete || c.ClosedAt > last {
		return
	}
	for _, a := range m.accounts {
		for _, l := range a.limits {
			for _, x := range l.leases {
				if of := x.of(lease.Gateway(*c.Closed), m.now); of != nil && !of.closed && l.Meter == usage.Calls {
					of.closed, of.heard = true, m.now
				}
			}
		}
	}
}

// escrow returns the shard's of a limit and window; nil: there is none.
func escrow(s *Shard, account, limitID string, period int64) *lease.Escrow {
	i, ok := s.find([]byte(account))
	if !ok {
		return nil
	}
	def := s.plans.defs[s.accounts[i].plan]
	k := slices.IndexFunc(s.plans.limits[def.first:def.first+def.n], func(l limit) bool { return l.fullID == limitID })
	if k < 0 {
		return nil
	}
	if x := s.allowances[allowanceKey{i, uint32(k), int32(period)}]; x != nil {
		return x.escrow
	}
	return nil
}

func (m *model) refused(account string, l *modelLimit, period int64) bool {
	e := escrow(m.shard, account, l.plan+"/"+l.ID, period)
	return e != nil && e.Denied()
}

// compare holds the counters of every account to the model's.
func (m *model) compare(t *rapid.T, s *Shard) {
	for id, want := range m.accounts {
		got, ok := s.Account(id)
		if !ok {
			t.Fatalf("account %s is not known", id)
		}
		if len(got.Limits) != len(want.limits) {
			t.Fatalf("account %s has %d limits, want %d", id, len(got.Limits), len(want.limits))
		}
		for _, l := range got.Limits {
			_, lid, _ := strings.Cut(l.LimitID, "/")
			w := want.limits[lid]
			kind, _ := window.Parse(w.Window)
			n := kind.Number(m.now)
			if l.Used != w.used[n] || (kind != window.Lifetime && l.Previous != w.used[n-1]) || l.Verdict != w.verdict {
				t.Fatalf("account %s, %s: used %d, before %d, %s; want %d, %d, %s", id, lid, l.Used, l.Previous, l.Verdict, w.used[n], w.used[n-1], w.verdict)
			}
			if (l.Lease != nil) != (w.leases[n] != nil) {
				t.Fatalf("account %s, %s: an allowance %+v, want one: %t", id, lid, l.Lease, w.leases[n] != nil)
			}
			if l.Lease != nil && l.Lease.Settled != w.settled(n) {
				t.Fatalf("account %s, %s: %d are settled, want %d", id, lid, l.Lease.Settled, w.settled(n))
			}
		}
	}
}

// leased has gateways, which are the producers 1 and 2, take part in the story.
func (st *story) leased(t *rapid.T, e step, s *Shard, m *model) step {
	if b := e.Batch; b != nil && b.Producer != (dedup.Producer{}) {
		for range b.N {
			flags := int64(0)
			if rapid.Bool().Draw(t, "of a lease") {
				flags = int64(usage.FromLease)
			}
			b.Flags.Values = append(b.Flags.Values, flags)
		}
	}
	p := dedup.Producer{rapid.SampledFrom([]byte{1, 2}).Draw(t, "gateway")}
	none := step{Entry: Entry{Sequence: e.Sequence, Time: e.Time}}
	switch rapid.SampledFrom([]string{"as it is", "as it is", "asks", "asks", "asks", "end"}).Draw(t, "who") {
	case "asks":
		none.Asks = honest(t, lease.Gateway(p), s, max(m.now, e.Time))
		return none
	case "end":
		if rapid.Bool().Draw(t, "really") {
			none.Control = &Control{Closed: &p, ClosedAt: m.numbers[p], Complete: rapid.Bool().Draw(t, "complete")}
			return none
		}
	}
	return e
}

// honest asks of a gateway: it knows what it was granted, and its words cover what
// was counted of it, and maybe more.
func honest(t *rapid.T, g lease.Gateway, s *Shard, now usage.Micros) []LeaseAsk {
	var asks []LeaseAsk
	for _, id := range accountIDs {
		u, ok := s.Account(id)
		if !ok {
			continue
		}
		for _, l := range u.Limits {
			if !l.Tier.Leased() || !rapid.Bool().Draw(t, "about "+id+" "+l.LimitID) {
				continue
			}
			kind, _ := window.Parse(l.Window)
			n := kind.Number(now)
			if kind != window.Lifetime && rapid.IntRange(0, 9).Draw(t, "ahead") == 0 {
				n++
			}
			ask := LeaseAsk{Account: id, LimitID: l.LimitID, WindowStart: kind.Start(n), Ask: lease.Ask{
				Gateway: g, Seq: s.Sequence() + 1, Sent: lease.Micros(now), Need: rapid.Int64Range(0, 6).Draw(t, "need"), Want: rapid.Int64Range(0, 9).Draw(t, "want"),
			}}
			var has lease.Holding
			if e := escrow(s, id, l.LimitID, n); e != nil {
				all := e.Holdings()
				if i := slices.IndexFunc(all, func(h lease.Holding) bool { return h.Gateway == g }); i >= 0 {
					has = all[i]
				}
			}
			if has.Closed {
				continue // it has said its last word, or somebody has for it
			}
			free := has.Granted - has.Returned
			ask.Known, ask.Over = has.Granted, has.Over
			ask.Used = rapid.Int64Range(min(has.Used, free), free).Draw(t, "used")
			ask.Returned = has.Returned + rapid.Int64Range(0, free-ask.Used).Draw(t, "returned")
			if has.Gateway == g && ask.Used == free {
				ask.Over += rapid.Int64Range(0, 2).Draw(t, "over")
			}
			if has.Gateway != g && rapid.IntRange(0, 9).Draw(t, "of a lease that is gone") == 0 {
				ask.Known, ask.Used = 5, 2
			}
			if rapid.IntRange(0, 9).Draw(t, "closing") == 0 {
				ask.Closing, ask.Need, ask.Want = true, 0, 0
			}
			asks = append(asks, ask)
		}
	}
	return asks
}
