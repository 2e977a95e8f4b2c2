package quota

import (
	"fmt"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// everyKind is a limit of each window, tier, amount and warning.
func everyKind(amounts ...int64) []usage.Limit {
	var limits []usage.Limit
	for kind := window.Minute; kind < window.NumKinds; kind++ {
		for _, tier := range []usage.Tier{usage.TierEventual, usage.TierExact, usage.TierLeased} {
			for _, warn := range []uint32{0, 80} {
				for _, amount := range amounts {
					l := usage.Limit{
						ID: fmt.Sprint(kind.Name(), "-", tier, "-", warn, "-", amount), Meter: usage.Calls, Window: kind.Name(), Amount: amount, Tier: tier, WarnPercent: warn,
					}
					if tier == usage.TierLeased {
						l.Lease = usage.LeaseTerms{ReleaseAfter: usage.MaxLeaseSpan, MaxExposure: 3}
					}
					limits = append(limits, l)
				}
			}
		}
	}
	return limits
}

// quiet appends the entries that time asks for until it asks for none any more, and
// returns how many there were.
func (d *desk) quiet(most int) int {
	d.t.Helper()
	for entries := 0; ; entries++ {
		at, due := d.s.NextTimer()
		if leases, ok := d.s.NextLease(); ok && leases < at {
			d.t.Fatalf("an allowance is due at %d, the shard at %d", leases, at)
		}
		if !due {
			return entries
		}
		if at <= d.s.Now() || at > d.s.Now()+62*24*3600*second {
			d.t.Fatalf("after %d entries the next is due at %d, now is %d", entries, at, d.s.Now())
		}
		if entries == most {
			d.t.Fatalf("after %d entries the shard still asks for one, at %s", entries, at.Time())
		}
		d.now = at
		if entries%16 == 0 {
			d.apply(Entry{Control: &Control{}})
		} else {
			d.teller.apply(at, Entry{Control: &Control{}})
		}
	}
}

// A shard that nobody uses asks for an entry when a window ends in which something was
// warned of or denied, and when a lease does; then for none. Each kind of limit is
// used, in part or wholly, or not at all; by accounts that nest; leases are out; plans
// were changed, usage corrected, accounts closed.
func TestAQuietShardAsksForNoEntryAnyMore(t *testing.T) {
	t.Parallel()
	d := newLeaseDesk(t)
	d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
	limits := everyKind(0, 2, 1000)
	d.plans("all", limits...)
	d.accounts(
		usage.Account{ID: "acme", Plan: "free"}, usage.Account{ID: "team", Parent: "acme", Plan: "free"}, usage.Account{ID: "closed", Plan: "free"},
		usage.Account{ID: "unused", Plan: "free"}, usage.Account{ID: "asks", Plan: "free"},
	)
	ask := func(account string, g lease.Gateway, seq uint64, m lease.Ask) {
		for _, l := range limits {
			if !l.Tier.Leased() {
				continue
			}
			m.Gateway, m.Seq, m.Sent = g, seq, lease.Micros(d.now)
			kind, _ := window.Parse(l.Window)
			start, _ := kind.Bounds(d.now)
			d.teller.apply(d.now, Entry{Asks: []LeaseAsk{{Account: account, LimitID: "free/" + l.ID, WindowStart: start, Ask: m}}})
		}
	}
	ask("acme", anna, 1, lease.Ask{Need: 1})
	ask("asks", anna, 1, lease.Ask{Need: 1})
	ask("asks", bert, 1, lease.Ask{Need: 900})
	d.leased(anna, 1, 1)
	d.calls(d.now, append(n("team", d.now, 5), n("closed", d.now, 5)...)...)
	d.apply(Entry{Control: &Control{Correction: &Correction{Account: "team", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: -1}}}}})
	d.accounts(usage.Account{ID: "closed", Closed: true})
	for i := range limits {
		limits[i].Amount += limits[i].Amount / 2
	}
	d.plans("raised", limits...)
	// Of minutes, hours, days, weeks and months each ends once; the leases of each
	// limit wait, lapse and are given up.
	first := d.quiet(400)
	if first == 0 {
		t.Error("nothing ever happened")
	}
	d.now += 40 * 24 * 3600 * second
	d.apply(Entry{Control: &Control{}})
	if again := d.quiet(0); again != 0 {
		t.Errorf("%d entries for nothing", again)
	}
}

// What is used of a lifetime never ends, so no entry must come for it.
func TestAUsedExactLifetimeLimitAsksForNoEntry(t *testing.T) {
	t.Parallel()
	l := exactly(10)
	l.Window = usage.Lifetime
	d := newLeaseDesk(t, l)
	d.apply(Entry{Asks: []LeaseAsk{{Account: "acme", LimitID: "free/rpm", Ask: lease.Ask{Gateway: anna, Seq: 1, Need: 2, Sent: lease.Micros(d.now)}}}})
	d.now += 3600 * second
	d.apply(Entry{Control: &Control{}})
	if d.s.Allowances() != 1 {
		t.Fatal("there is no allowance")
	}
	if at, due := d.s.NextLease(); due {
		t.Errorf("an allowance asks for an entry at %d", at)
	}
	if at, due := d.s.NextTimer(); due {
		t.Errorf("the shard asks for an entry at %d", at)
	}
}

// A limit of 0 is no less spent in the next window: its denial has no end, so that
// nothing has to be decided when the window ends.
func TestADenialOfALimitOfNothingHasNoEnd(t *testing.T) {
	t.Parallel()
	for _, tier := range []usage.Tier{usage.TierEventual, usage.TierExact} {
		l := perMinute(0)
		l.Tier = tier
		d := newLeaseDesk(t, l)
		// By earlier rules it is denied minute by minute.
		if at, due := d.s.NextTimer(); !due || at != noon+60*second {
			t.Fatalf("the timer is at %d, %t", at, due)
		}
		fx := d.apply(Entry{Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 3600 * second}}})
		if len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Deny || fx.Decisions[0].PeriodEnd != 0 || fx.Decisions[0].PeriodStart != 0 {
			t.Fatalf("%s: the block that ended by itself has to be replaced: %+v", tier, fx.Decisions)
		}
		d.quiet(1)
		d.now += 3600 * second
		if fx := d.apply(Entry{Control: &Control{}}); len(fx.Decisions) != 0 {
			t.Errorf("%s: decided again: %+v", tier, fx.Decisions)
		}
		l.Amount = 5
		if fx := d.plans("v2", l); len(fx.Decisions) != 1 || fx.Decisions[0].Verdict != usage.Allow || fx.Decisions[0].PeriodEnd == 0 {
			t.Errorf("%s: a raise was not told: %+v", tier, fx.Decisions)
		}
	}
}
