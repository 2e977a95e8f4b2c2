package quota

import (
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// newMovingDesk has acme under the first of two plans with the same limit.
func newMovingDesk(t *testing.T, version uint32) *desk {
	d := newLeaseDesk(t, exactly(10))
	d.apply(Entry{Control: &Control{Core: &Core{Version: version, Horizon: 3600 * second}}})
	d.apply(Entry{Control: &Control{PlanSet: &PlanSet{Version: "two", Plans: []usage.Plan{
		{ID: "free", Limits: []usage.Limit{exactly(10)}}, {ID: "pro", Limits: []usage.Limit{{ID: "else", Meter: usage.Calls, Window: usage.Minute, Amount: 99}, exactly(10)}},
	}}}})
	return d
}

func (d *desk) moveTo(plan string) *Effects {
	d.t.Helper()
	return d.apply(Entry{Control: &Control{Accounts: []usage.Account{{ID: "acme", Plan: plan}}}})
}

func (d *desk) askOf(limit string, m lease.Ask) LeaseAnswer {
	d.t.Helper()
	m.Sent = lease.Micros(d.now)
	d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: limit, WindowStart: d.s.windows[0].at, Ask: m}}})
	return d.said[m.Gateway]
}

func (d *desk) stateOf(limit string) lease.State {
	d.t.Helper()
	u, _ := d.s.Account("acme")
	for _, l := range u.Limits {
		if l.LimitID == limit && l.Lease != nil {
			return *l.Lease
		}
	}
	d.t.Fatalf("%s has no allowance", limit)
	return lease.State{}
}

func TestWhatIsOutOutlivesAChangeOfPlan(t *testing.T) {
	t.Parallel()
	d := newMovingDesk(t, CoreVersion)
	d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 6})
	d.leased(anna, 1, 1)
	fx := d.moveTo("pro")
	if len(fx.Answers) != 1 || fx.Answers[0].LimitID != "free/rpm" || fx.Answers[0].Verdict != lease.Ended {
		t.Fatalf("anna is to hear that it is over: %+v", fx.Answers)
	}
	if s := d.stateOf("pro/rpm"); s.Settled != 1 || s.Reserved != 5 || s.Outstanding != 0 {
		t.Fatalf("of 10, one was used and 5 may be: %+v", s)
	}
	d.is("bert", d.askOf("pro/rpm", lease.Ask{Gateway: bert, Seq: 1, Need: 5}).Verdict, lease.DeniedEarly)
	d.is("bert has what is left", d.askOf("pro/rpm", lease.Ask{Gateway: bert, Seq: 2, Need: 4}).Granted, int64(4))
	// Calls that anna had let through are counted, once.
	d.leased(anna, 2, 2)
	if s := d.stateOf("pro/rpm"); s.Settled != 3 || s.Reserved != 3 || s.Outstanding != 4 {
		t.Fatalf("%+v", s)
	}
	// It says that one more is used, and gives the others back: the one is not counted yet.
	a := d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 2, Known: 6, Used: 4, Returned: 2, Closing: true})
	d.is("its last word", a.Verdict, lease.Ended)
	d.is("is heard", a.Seq, uint64(2))
	d.is("under the name that it knows", a.LimitID, "free/rpm")
	if s := d.stateOf("pro/rpm"); s.Settled != 3 || s.Reserved != 1 || s.Outstanding != 4 {
		t.Fatalf("%+v", s)
	}
	d.is("anna, under the new name", d.askOf("pro/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 2}).Granted, int64(2))
	d.leased(anna, 3, 3)
	if s := d.stateOf("pro/rpm"); s.Settled != 6 || s.Reserved != 0 || s.Outstanding != 4 {
		t.Fatalf("all of it is counted: %+v", s)
	}
	d.is("nothing is left", d.askOf("pro/rpm", lease.Ask{Gateway: lease.Gateway{13}, Seq: 1, Need: 1}).Granted, int64(0))
}

// Calls of a new lease are taken to be of the former one as far as that goes; when it
// turns out that it was not used so far, they are not counted beside the gateway's
// word.
func TestWhatComesBackOfAFormerLeaseIsNotCountedTwice(t *testing.T) {
	t.Parallel()
	d := newMovingDesk(t, CoreVersion)
	d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 4})
	d.moveTo("pro")
	d.askOf("pro/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 4})
	d.leased(anna, 1, 3)
	d.askOf("pro/rpm", lease.Ask{Gateway: anna, Seq: 2, Known: 4, Used: 3})
	d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 2, Known: 4, Returned: 4, Closing: true})
	if s := d.stateOf("pro/rpm"); s.Settled != 3 || s.Reserved != 0 || s.Outstanding != 1 {
		t.Fatalf("3 were used, one is out: %+v", s)
	}
}

func TestAKilledGatewaysMarksAreOfTheNamesThatItKnew(t *testing.T) {
	t.Parallel()
	d := newMovingDesk(t, CoreVersion)
	d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 5})
	d.moveTo("pro")
	d.askOf("pro/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 4})
	p := dedup.Producer(anna)
	start := d.s.windows[0].at
	d.apply(Entry{Control: &Control{Closed: &p, Marks: &LeaseMarks{Marks: []LeaseMark{
		{Account: "acme", LimitID: "free/rpm", WindowStart: start, UsedAtMost: 3}, {Account: "acme", LimitID: "pro/rpm", WindowStart: start, UsedAtMost: 1},
	}}}})
	if s := d.stateOf("pro/rpm"); s.Settled != 0 || s.Reserved != 3 || s.Outstanding != 1 {
		t.Fatalf("3 of the one and one of the other may be used: %+v", s)
	}
	d.is("the rest is had again", d.askOf("pro/rpm", lease.Ask{Gateway: bert, Seq: 1, Need: 6}).Granted, int64(6))
}

// The same entries lead to the same decisions for ever: a ledger that was counted by
// earlier rules is replayed by them.
func TestByEarlierRulesWhatIsOutIsForgotten(t *testing.T) {
	t.Parallel()
	d := newMovingDesk(t, 1)
	d.askOf("free/rpm", lease.Ask{Gateway: anna, Seq: 1, Need: 6})
	d.moveTo("pro")
	d.is("bert", d.askOf("pro/rpm", lease.Ask{Gateway: bert, Seq: 1, Need: 10}).Granted, int64(10))
}

func TestFormerNamesAreBounded(t *testing.T) {
	t.Parallel()
	d := newMovingDesk(t, CoreVersion)
	for i := range byte(2*maxFormers + 2) {
		limit := [...]string{"free", "pro"}[i%2]
		d.moveTo(limit)
		if g := (lease.Gateway{100 + i}); i < 9 {
			d.is("granted", d.askOf(limit+"/rpm", lease.Ask{Gateway: g, Seq: 1, Need: 1}).Granted, int64(1))
		}
	}
	for _, x := range d.s.allowances {
		if len(x.formers) > maxFormers {
			t.Errorf("%d are remembered", len(x.formers))
		}
	}
	if s := d.stateOf("pro/rpm"); s.Reserved != 9 {
		t.Errorf("what was out is not reserved: %+v", s)
	}
	d.now += 61 * second
	d.apply(Entry{})
	if n := d.s.Allowances(); n != 0 {
		t.Errorf("%d outlive their window", n)
	}
}
