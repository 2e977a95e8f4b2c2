package aggregator

import (
	"testing"
	"time"

	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

func monthly(amount int64, tier usage.Tier) usage.Limit {
	return usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: amount, Tier: tier}
}

// used waits until an account's limit has used that much by the owner's answer.
func (w *world) used(account, limit string, want int64) {
	w.t.Helper()
	var last int64
	eventually(w.t, "the limit has what was used before it", func() bool {
		for _, a := range w.usage(w.shardOf(account), account).Accounts {
			for _, l := range a.Limits {
				if l.LimitID == limit {
					last = l.Used
				}
			}
		}
		return last >= want
	})
	if last != want {
		w.t.Errorf("%s of %s: %d are used, want %d", limit, account, last, want)
	}
}

// A limit that is new in the middle of a window starts from what the ledger holds of it,
// also for the organisation above, and whoever is killed meanwhile.
func TestANewLimitStartsFromWhatTheLedgerHolds(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{abandon: true})
	w.plans("v1")
	w.control(0, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{
		Accounts: []*tollkeeperv1.Account{{Id: "org"}, {Id: "team", Parent: "org"}},
	}}})
	p := ksuid.New()
	w.send(p, calls("team", 4))
	w.counted(0, w.send(p, calls("org", 3)))
	// The limit comes and its owner dies before it can have counted anything.
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	w.plans("v2", monthly(7, usage.TierEventual))
	w.account("org", "free")
	w.send(p, calls("team", 1))
	r = w.run(Options{})
	w.used("org", "free/calls", 8)
	if d := w.decided("org", "free/calls", usage.Deny); d.Used != 8 {
		t.Errorf("%+v", d)
	}
	// Another window and the tier exact: what a gateway asks for is of what is left.
	day := monthly(10, usage.TierExact)
	day.Window = usage.Day
	w.plans("v3", day)
	start, _ := window.Bounds(usage.Day, usage.At(time.Now()))
	gateway := ksuid.New()
	answers, err := w.nc.SubscribeSync(ledger.AnswersSubject(gateway))
	if err != nil {
		t.Fatal(err)
	}
	for seq := uint64(1); ; seq++ {
		m, err := ledger.LeaseMessage(0, &tollkeeperv1.LeaseEntry{Gateway: gateway.Bytes(), Asks: []*tollkeeperv1.LeaseAsk{
			{Account: "org", Limit: "free/calls", WindowStartUnixMicros: int64(start), Seq: seq, SentUnixMicros: time.Now().UnixMicro(), Need: 1, Want: 100},
		}})
		if err != nil {
			t.Fatal(err)
		}
		w.publish(m)
		if got, err := answers.NextMsg(100 * time.Millisecond); err == nil {
			var said tollkeeperv1.LeaseAnswers
			if err := proto.Unmarshal(got.Data, &said); err != nil {
				t.Fatal(err)
			}
			granted := said.GetAnswers()[0].GetGranted()
			if granted == 0 || granted > 2 {
				t.Errorf("of 10, 8 are used, and %d were handed out", granted)
			}
			break
		}
		if seq == 100 {
			t.Fatal("a gateway that asks is never answered")
		}
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// To and fro: nothing is read anew, and nothing is forgotten.
func TestAPlanThatChangesToAndFroForgetsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{})
	limit := ledger.PlanToProto(&usage.Plan{ID: "free", Limits: []usage.Limit{monthly(3, usage.TierEventual)}})
	w.control(0, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &tollkeeperv1.PlanSet{Version: "v1", Plans: []*tollkeeperv1.Plan{limit, {Id: "pro"}}}}})
	p := ksuid.New()
	w.account("acme", "free")
	w.send(p, calls("acme", 2))
	for range 3 {
		w.account("acme", "pro")
		w.account("acme", "free")
	}
	w.account("acme", "pro")
	w.send(p, calls("acme", 2))
	w.account("acme", "free")
	if d := w.decided("acme", "free/calls", usage.Deny); d.Used != 4 {
		t.Errorf("%+v", d)
	}
	w.account("acme", "pro")
	w.decided("acme", "free/calls", usage.Allow)
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}
