package reply

import (
	"encoding/json"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const noon = usage.Micros(1_700_000_000_000_000)

// shard is a state machine with one account, which two gateways serve.
type shard struct {
	t      *testing.T
	state  *quota.Shard
	now    usage.Micros
	number uint64
	said   map[lease.Gateway]quota.LeaseAnswer
	used   map[lease.Gateway]int64
	asks   uint64
}

func newShard(t *testing.T, tier usage.Tier, amount int64) *shard {
	s := &shard{t: t, state: quota.New(quota.Options{Shard: 3}), now: noon, said: map[lease.Gateway]quota.LeaseAnswer{}, used: map[lease.Gateway]int64{}}
	s.plans(tier, amount)
	s.apply(quota.Entry{Control: &quota.Control{Accounts: []usage.Account{{ID: "acme", Plan: "free"}}}})
	return s
}

func (s *shard) plans(tier usage.Tier, amount int64) {
	l := usage.Limit{ID: "rpm", Meter: usage.Calls, Window: usage.Minute, Amount: amount, Tier: tier, WarnPercent: 80}
	s.apply(quota.Entry{Control: &quota.Control{PlanSet: &quota.PlanSet{Version: "v", Plans: []usage.Plan{{ID: "free", Limits: []usage.Limit{l}}}}}})
}

// usage as a client is told.
func (s *shard) usage() ledger.AccountUsage {
	s.t.Helper()
	data, err := Usage(s.state, 1, []byte(`{"accounts":["acme"]}`))
	if err != nil {
		s.t.Fatal(err)
	}
	var r ledger.UsageReply
	if err := json.Unmarshal(data, &r); err != nil || len(r.Accounts) != 1 {
		s.t.Fatalf("%v: %s", err, data)
	}
	return r.Accounts[0]
}

// apply folds an entry and holds what is told of the limit against the decisions.
func (s *shard) apply(e quota.Entry) {
	s.t.Helper()
	e.Sequence, e.Time = s.state.Sequence()+1, s.now
	fx := s.state.Apply(e)
	for _, a := range fx.Answers {
		s.said[a.Gateway] = a
	}
	if s.state.Accounts() == 0 {
		return
	}
	u := s.usage()
	for i := range u.Limits {
		l := &u.Limits[i]
		for _, d := range fx.Decisions {
			if d.LimitID == l.LimitID && (d.Used != l.Used || d.Amount != l.Amount || d.Verdict.String() != l.Verdict || d.Room != l.Room || d.ID != l.DecisionID) {
				s.t.Fatalf("entry %d: the decision says used %d of %d, %s, room %d; the usage says %+v %+v", e.Sequence, d.Used, d.Amount, d.Verdict, d.Room, *l, l.Lease)
			}
		}
		switch {
		case l.Remaining < 0 || l.Used+l.Remaining > max(l.Amount, l.Used):
			s.t.Fatalf("entry %d: used and remaining are more than there is: %+v %+v", e.Sequence, *l, l.Lease)
		case l.Verdict == "deny" && l.Room == 0 && l.Remaining != 0:
			s.t.Fatalf("entry %d: every call is denied, and %d remain: %+v %+v", e.Sequence, l.Remaining, *l, l.Lease)
		case l.Verdict != "deny" && l.Used >= l.Amount:
			s.t.Fatalf("entry %d: all is used, and the verdict is %s: %+v %+v", e.Sequence, l.Verdict, *l, l.Lease)
		}
	}
}

// ask says what a gateway used of its lease, and asks for more.
func (s *shard) ask(g lease.Gateway, used, need int64) {
	s.asks++
	a := s.said[g]
	s.used[g] = min(s.used[g]+used, a.Granted)
	start := s.now - s.now%60_000_000
	s.apply(quota.Entry{Asks: []quota.LeaseAsk{{Account: "acme", LimitID: "free/rpm", WindowStart: start, Ask: lease.Ask{
		Gateway: g, Seq: s.asks, Sent: lease.Micros(s.now), Seen: a.Revision, Known: a.Granted, Used: s.used[g], Need: need, Want: need}}}})
}

func (s *shard) calls(g lease.Gateway, n int, flags usage.Flags) {
	s.number++
	b := &quota.Batch{Producer: dedup.Producer(g), Number: s.number, N: n}
	b.Account = quota.Strings{Dict: [][]byte{[]byte("acme")}}
	for range n {
		b.Time = append(b.Time, int64(s.now))
		b.Flags.Values = append(b.Flags.Values, int64(flags))
	}
	s.apply(quota.Entry{Batch: b})
}

// The 402 said "1000 of 1000" while the API said used 0, remaining 1000, deny: the
// gateway had reported all of its lease as used, and its frames were on their way.
func TestUnitsThatAGatewayReportedAsUsedAreUsed(t *testing.T) {
	t.Parallel()
	s := newShard(t, usage.TierExact, 1000)
	g := lease.Gateway{1}
	for range 40 {
		s.ask(g, 0, 1000)
		s.ask(g, 1000, 1)
		s.now += 1000
	}
	l := s.usage().Limits[0]
	if l.Used != 1000 || l.Remaining != 0 || l.Verdict != "deny" {
		t.Errorf("used %d, remaining %d, %s: %+v", l.Used, l.Remaining, l.Verdict, l.Lease)
	}
}

// Units that gateways hold may yet be used, those in dead leases may not.
func TestWhatGatewaysHoldRemainsAndWhatIsDeadDoesNot(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		state     lease.State
		amount    int64
		remaining int64
	}{
		"held":    {lease.State{Amount: 100, Settled: 10, Outstanding: 80}, 100, 90},
		"dead":    {lease.State{Amount: 100, Settled: 10, Outstanding: 80, Dead: 30}, 100, 60},
		"lowered": {lease.State{Amount: 20, Settled: 15, Outstanding: 40}, 20, 5},
		"over":    {lease.State{Amount: 20, Settled: 25, Outstanding: 4}, 20, 0},
	} {
		if got := limitOf(&quota.LimitUse{Amount: c.amount, Used: 1, Lease: &c.state}); got.Remaining != c.remaining || got.Used != c.state.Settled {
			t.Errorf("%s: used %d, remaining %d, want %d and %d", name, got.Used, got.Remaining, c.state.Settled, c.remaining)
		}
	}
}

// Whatever gateways ask, report, count, and whatever becomes of plan and time.
func TestTheUsageOfALimitSaysWhatItsDecisionsSay(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	tiers := []usage.Tier{usage.TierEventual, usage.TierExact, usage.TierLeased}
	for range 60 {
		s := newShard(t, tiers[r.IntN(3)], 1+r.Int64N(200))
		gateways := []lease.Gateway{{1}, {2}}
		for range 80 {
			g := gateways[r.IntN(2)]
			switch r.IntN(12) {
			case 0, 1, 2, 3, 4:
				s.ask(g, r.Int64N(60), r.Int64N(40))
			case 5, 6, 7:
				s.calls(g, 1+r.IntN(20), usage.FromLease)
			case 8:
				s.calls(g, 1+r.IntN(5), 0)
			case 9:
				s.plans(tiers[r.IntN(3)], 1+r.Int64N(200))
			case 10:
				s.now += usage.Micros(r.Int64N(20_000_000))
			case 11:
				s.apply(quota.Entry{Control: &quota.Control{Accounts: []usage.Account{{ID: "acme", Plan: "free"}}}})
			}
		}
	}
}
