package aggregator

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// However far ahead a time is that something waits for, it is not due now.
func TestWhatIsDueInTheFarFutureIsNotDueNow(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	at := usage.At(now)
	for _, due := range []usage.Micros{
		at + 60_000_000, at + 300*366*24*3600*1_000_000, usage.NewestTimeMicros, usage.At(time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)), math.MaxInt64 - 1, math.MaxInt64,
	} {
		for _, now := range []time.Time{now, time.Unix(0, 0), usage.NewestTimeMicros.Time().Add(-time.Hour)} {
			if due <= usage.At(now) {
				continue
			}
			o := newOwner(&service{log: zerolog.Nop()}, 0)
			o.state = quota.New(quota.Options{})
			o.state.Apply(quota.Entry{Sequence: 1, Time: usage.At(now), Control: &quota.Control{PlanSet: &quota.PlanSet{Version: "later", EffectiveAt: due}}})
			if wait, waits := o.tickIn(now); !waits || wait < time.Minute {
				t.Errorf("at %s, what is due at %d is due in %s", now, due, wait)
			}
		}
	}
	o := newOwner(&service{log: zerolog.Nop()}, 0)
	o.state = quota.New(quota.Options{})
	o.state.Apply(quota.Entry{Sequence: 1, Time: at, Control: &quota.Control{PlanSet: &quota.PlanSet{Version: "soon", EffectiveAt: at + 1_000_000}}})
	if wait, _ := o.tickIn(now.Add(1000 * time.Hour)); wait > 0 {
		t.Errorf("what was due long ago is due in %s", wait)
	}
}

// eachKind is a limit of each window and tier, small and large.
func eachKind() []usage.Limit {
	var limits []usage.Limit
	for kind := window.Minute; kind < window.NumKinds; kind++ {
		for _, tier := range []usage.Tier{usage.TierEventual, usage.TierExact, usage.TierLeased} {
			for _, amount := range []int64{0, 2, 1000} {
				l := usage.Limit{ID: fmt.Sprint(kind.Name(), "-", tier, "-", amount), Meter: usage.Calls, Window: kind.Name(), Amount: amount, Tier: tier, WarnPercent: 50}
				if tier.Leased() {
					l.Lease.Term, l.Lease.Patience = 100_000, 50_000
				}
				if tier == usage.TierLeased {
					l.Lease.ReleaseAfter, l.Lease.MaxExposure = 100_000, 3
				}
				limits = append(limits, l)
			}
		}
	}
	return limits
}

// An idle ledger does not grow: not for limits that are used, warned of, denied,
// leased, changed or corrected. What is stated: one entry in a shard when a window
// ends in which something was warned of or denied.
func TestAnIdleLedgerDoesNotGrow(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	limits := eachKind()
	w.plans("v1", limits...)
	w.account("acme", "free")
	w.account("unused", "free")
	w.control(w.shardOf("acme"), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{
		Accounts: []*tollkeeperv1.Account{{Id: "team", Parent: "acme", Plan: "free"}},
	}}})
	r := w.run(Options{})
	gateway := ksuid.New()
	var asks []*tollkeeperv1.LeaseAsk
	for _, l := range limits {
		if l.Tier.Leased() {
			start, _ := window.Bounds(l.Window, usage.At(time.Now()))
			asks = append(asks, &tollkeeperv1.LeaseAsk{Account: "acme", Limit: "free/" + l.ID, WindowStartUnixMicros: int64(start), Seq: 1, SentUnixMicros: time.Now().UnixMicro(), Need: 1})
		}
	}
	m, err := ledger.LeaseMessage(w.shardOf("acme"), &tollkeeperv1.LeaseEntry{Gateway: gateway.Bytes(), Asks: asks})
	if err != nil {
		t.Fatal(err)
	}
	w.publish(m)
	w.send(gateway, calls("acme", 5))
	w.control(w.shardOf("acme"), &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{
		Account: "acme", Reason: "test", Adjustments: []*tollkeeperv1.Quantity{{Meter: "calls", Value: -1}},
	}}})
	for i := range limits {
		limits[i].Amount *= 2
	}
	w.plans("v2", limits...)
	w.control(0, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &tollkeeperv1.PlanSet{
		Version: "v3", EffectiveAtUnixMicros: math.MaxInt64, Plans: []*tollkeeperv1.Plan{ledger.PlanToProto(&usage.Plan{ID: "free"})},
	}}})
	w.decided("acme", "free/lifetime-exact-2", usage.Deny)

	last := func() uint64 {
		stream, err := w.js.Stream(t.Context(), ledger.Stream)
		if err != nil {
			t.Fatal(err)
		}
		return stream.CachedInfo().State.LastSeq
	}
	beacons, err := w.nc.SubscribeSync(ledger.BeaconSubject(w.shardOf("acme")))
	if err != nil {
		t.Fatal(err)
	}
	// The stream's time by the shard's own beacons, so that a span is one of the
	// owner's life.
	span := func(beats int) (entries uint64, turned bool) {
		from, begin := last(), time.Now()
		for range beats {
			m, err := beacons.NextMsg(5 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if err := proto.Unmarshal(m.Data, &tollkeeperv1.Beacon{}); err != nil {
				t.Fatal(err)
			}
		}
		return last() - from, begin.Truncate(time.Minute) != time.Now().Truncate(time.Minute)
	}
	eventually(t, "its leases are over and the ledger stands still", func() bool {
		entries, _ := span(3)
		return entries == 0
	})
	entries, turned := span(8)
	if entries > 0 && !turned || entries > 2*uint64(w.shards) {
		t.Errorf("%d entries in 2 s in which nothing happened (a minute ended: %t)", entries, turned)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

func TestAHorizonThatIsNoneIsRefusedAtTheStart(t *testing.T) {
	t.Parallel()
	if err := Run(t.Context(), Options{Horizon: -time.Second}); err == nil {
		t.Error("it would append the same invalid entry every second")
	}
}
