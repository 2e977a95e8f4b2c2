package quota

import (
	"bytes"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func exactly(amount int64) usage.Limit {
	return usage.Limit{ID: "rpm", Meter: usage.Calls, Window: usage.Minute, Amount: amount, Tier: usage.TierExact, WarnPercent: 80}
}

var (
	anna = lease.Gateway{11}
	bert = lease.Gateway{12}
)

// desk tells a shard with the account acme and what gateways ask of it.
type desk struct {
	*teller
	now  usage.Micros
	said map[lease.Gateway]LeaseAnswer
}

func newLeaseDesk(t *testing.T, limits ...usage.Limit) *desk {
	d := &desk{teller: newTeller(t, limits...), now: noon, said: map[lease.Gateway]LeaseAnswer{}}
	d.accounts(usage.Account{ID: "acme", Plan: "free"})
	return d
}

// apply folds an entry, and goes on with what a snapshot of it gives.
func (d *desk) apply(e Entry) *Effects {
	d.t.Helper()
	fx := *d.teller.apply(d.now, e)
	for _, a := range fx.Answers {
		d.said[a.Gateway] = a
	}
	data := d.s.AppendBinary(nil)
	read, err := Read(data)
	if err != nil || !bytes.Equal(read.AppendBinary(nil), data) || read.Hash() != d.s.Hash() {
		d.t.Fatalf("a snapshot is read as something else: %v", err)
	}
	a, okA := read.NextTimer()
	b, okB := d.s.NextTimer()
	if a != b || okA != okB {
		d.t.Fatalf("the timer is at %d, %t, read again %d, %t", b, okB, a, okA)
	}
	d.s = read
	return &fx
}

func (d *desk) ask(m lease.Ask) (LeaseAnswer, *Effects) {
	d.t.Helper()
	m.Sent = lease.Micros(d.now)
	start := d.s.windows[0].at
	fx := d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: "free/rpm", WindowStart: start, Ask: m}}})
	return d.said[m.Gateway], fx
}

// leased calls of acme in a frame of the gateway.
func (d *desk) leased(g lease.Gateway, number uint64, calls int) *Effects {
	d.t.Helper()
	b := batchOf(1, number, n("acme", d.now, calls))
	b.Producer = dedup.Producer(g)
	b.Flags.Values = make([]int64, calls)
	for i := range b.Flags.Values {
		b.Flags.Values[i] = int64(usage.FromLease)
	}
	return d.apply(Entry{Batch: b})
}

func (d *desk) state() lease.State {
	d.t.Helper()
	u, _ := d.s.Account("acme")
	if u.Limits[0].Lease == nil {
		d.t.Fatal("there is no allowance")
	}
	return *u.Limits[0].Lease
}

func (d *desk) is(what string, got, want any) {
	d.t.Helper()
	if got != want {
		d.t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestALeaseIsGrantedOfWhatIsLeftAndItsCallsAreCountedOnce(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.now += 5 * second
	d.calls(d.now, n("acme", d.now, 2)...) // before anybody asked
	a, _ := d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 6})
	d.is("granted", a.Granted, int64(6))
	d.is("the window's end", a.WindowEnd, noon+60*second)
	d.is("settled", d.state().Settled, int64(2))
	d.leased(anna, 1, 3)
	d.is("settled by the count", d.state().Settled, int64(5))
	d.is("outstanding", d.state().Outstanding, int64(3))
	d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 6, Used: 5})
	d.is("settled by the gateway's word", d.state().Settled, int64(7))
	d.leased(anna, 2, 2)
	d.is("settled, told before it is counted", d.state().Settled, int64(7))
	b, fx := d.ask(lease.Ask{Gateway: bert, Seq: 1, Need: 4})
	d.is("bert", b.Verdict, lease.DeniedFinal)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Room != 3 || fx.Decisions[0].Tier != usage.TierExact || b.Decision == nil || b.Decision.ID != fx.Decisions[0].ID {
		t.Fatalf("a call of 4 was refused, one of 3 may pass: %+v, %+v", fx.Decisions, b.Decision)
	}
	first := fx.Decisions[0].ID
	d.now += second
	b, fx = d.ask(lease.Ask{Gateway: bert, Seq: 2, Need: 5})
	if len(fx.Decisions) != 0 || b.Decision == nil || b.Decision.ID != first {
		t.Fatalf("nothing has changed: %+v, %+v", fx.Decisions, b.Decision)
	}
	d.ask(lease.Ask{Gateway: bert, Seq: 3, Need: 2})
	fx = d.leased(anna, 3, 1)
	d.is("settled", d.state().Settled, int64(8))
	fx = d.leased(bert, 1, 2)
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].Room != 0 || fx.Decisions[0].Used != 10 {
		t.Fatalf("all is spent: %+v", fx.Decisions)
	}
}

func TestTheNextWindowHasAnAllowanceOfItsOwn(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.now = noon + 60*second - 300_000
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 10})
	ask := LeaseAsk{Account: "acme", LimitID: "free/rpm", WindowStart: noon + 60*second, Ask: lease.Ask{Gateway: bert, Seq: 1, Need: 4, Sent: lease.Micros(d.now)}}
	d.apply(Entry{Asks: []LeaseAsk{ask}})
	d.is("bert, whose clock is ahead", d.said[bert].Verdict, lease.Waiting)
	at, _ := d.s.NextTimer()
	d.is("the timer", at, noon+60*second)
	d.now = at
	d.apply(Entry{})
	d.is("bert at the window's begin", d.said[bert].Granted, int64(4))
	d.is("anna's window", d.state().Settled, int64(0))
	ask.WindowStart, ask.Gateway = noon, anna
	d.apply(Entry{Asks: []LeaseAsk{ask}})
	d.is("anna, who is late", d.said[anna].Verdict, lease.Ended)
	ask.WindowStart = noon + 180*second
	d.apply(Entry{Asks: []LeaseAsk{ask}})
	d.is("anna, who is early", d.said[anna].Verdict, lease.Ended)
}

func TestAProducersCompleteEndGivesItsLeasesBack(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 10})
	d.leased(anna, 1, 3)
	p := dedup.Producer(anna)
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 1}})
	d.is("outstanding after an end that is not complete", d.state().Outstanding, int64(7))
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 2, Complete: true}})
	d.is("outstanding while a frame is missing", d.state().Outstanding, int64(7))
	d.apply(Entry{Control: &Control{Closed: &p, ClosedAt: 1, Complete: true}})
	d.is("outstanding", d.state().Outstanding, int64(0))
	d.is("settled", d.state().Settled, int64(3))
	a, _ := d.ask(lease.Ask{Gateway: anna, Seq: 2, Known: 10, Need: 1})
	d.is("its word from before", a.Verdict, lease.Ended)
	d.leased(anna, 2, 1)
	d.is("a call that comes all the same", d.state().Settled, int64(4))
}

func TestACorrectionChangesSumsCountersAndALiveBlock(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t, exactly(10))
	d.accounts(usage.Account{ID: "acme", Plan: "free", Parent: "org"})
	d.ask(lease.Ask{Gateway: anna, Seq: 1, Need: 10})
	if fx := d.leased(anna, 1, 10); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny {
		t.Fatalf("got %+v", fx.Decisions)
	}
	c := &Control{ID: "act", Correction: &Correction{Account: "acme", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: -4}, {Meter: usage.InputTokens, Value: 7}}}}
	fx := d.apply(Entry{Control: c})
	if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].Used != 6 || !fx.Corrected {
		t.Fatalf("got %+v", fx)
	}
	if again := d.apply(Entry{Control: c}); !again.Repeated || again.Corrected {
		t.Fatalf("an act is done once: %+v", again)
	}
	d.is("settled", d.state().Settled, int64(6))
	u, _ := d.s.Account("acme")
	d.is("used", u.Limits[0].Used, int64(6))
	d.is("tokens", u.Own.Meters[usage.InputTokens], int64(7))
	d.is("adjusted tokens", u.Own.Adjusted[usage.InputTokens], int64(7))
	d.is("adjusted calls", u.Own.Adjusted[usage.Calls], int64(-4))
	d.is("admitted", u.Own.Admitted, int64(10))
	org, _ := d.s.Account("org")
	d.is("the organisation's own", org.Own.Adjusted[usage.Calls], int64(0))
	d.is("the organisation's all", org.All.Adjusted[usage.Calls], int64(-4))
	d.is("in total", d.s.Total().Adjusted[usage.Calls], int64(-4))
	a, _ := d.ask(lease.Ask{Gateway: bert, Seq: 1, Need: 4})
	d.is("bert", a.Granted, int64(4))
}
