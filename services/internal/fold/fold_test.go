package fold

import (
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

func entry(m *nats.Msg) *ledger.Message {
	return &ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: 7, Time: time.UnixMicro(1_700_000_000_000_123)}
}

func control(t *testing.T, e *tollkeeperv1.ControlEntry) *ledger.Message {
	t.Helper()
	m, err := ledger.ControlMessage(3, e)
	if err != nil {
		t.Fatal(err)
	}
	return entry(m)
}

func TestAFrameBecomesABatchWithItsIdentity(t *testing.T) {
	t.Parallel()
	p := ksuid.New()
	var b ledger.Builder
	for _, account := range []string{"acme", "hooli", "acme"} {
		c := usage.Call{Time: 1_700_000_000_000_000, Account: account, Model: "large"}
		c.Quantities.Set("pages", 4)
		if account == "hooli" {
			c.Flags = usage.FromLease
		}
		b.Add(&c)
	}
	var d Decoder
	e, kind, err := d.Decode(entry(ledger.FrameMessage(3, b.Seal(ledger.Header{Producer: p, Shard: 3, Number: 9}))))
	if err != nil || kind != ledger.KindCalls || e.Sequence != 7 || e.Time != 1_700_000_000_000_123 || e.Control != nil {
		t.Fatalf("%+v, kind %d, %v", e, kind, err)
	}
	if e.Batch.Producer != dedup.Producer(p) || e.Batch.Number != 9 || e.Batch.N != 3 || string(e.Batch.Account.At(1)) != "hooli" || len(e.Batch.Custom) != 1 {
		t.Errorf("%+v", e.Batch)
	}
	if f := e.Batch.Flags; len(f.Values) != 3 || f.Values[0] != 0 || usage.Flags(f.Values[1]) != usage.FromLease {
		t.Errorf("flags %+v", f)
	}
	// A frame that can't be read still lets time pass, and brings nothing of
	// the one before.
	e, kind, err = d.Decode(entry(ledger.FrameMessage(3, []byte("no frame"))))
	var invalid *usage.InvalidError
	if !errors.As(err, &invalid) || kind != ledger.KindCalls || e.Batch != nil || e.Time == 0 {
		t.Errorf("%+v, kind %d, %v", e, kind, err)
	}
}

func TestControlEntriesAreTranslatedOrRefused(t *testing.T) {
	t.Parallel()
	p := ksuid.New()
	var d Decoder
	e, kind, err := d.Decode(control(t, &tollkeeperv1.ControlEntry{Id: "a", Body: &tollkeeperv1.ControlEntry_PlanSet{
		PlanSet: &tollkeeperv1.PlanSet{Version: "v1", EffectiveAtUnixMicros: 5, Plans: []*tollkeeperv1.Plan{{Id: "free"}}},
	}}))
	if err != nil || kind != ledger.KindControl || e.Control.ID != "a" || e.Control.PlanSet.Version != "v1" || e.Control.PlanSet.EffectiveAt != 5 || len(e.Control.PlanSet.Plans) != 1 {
		t.Errorf("%+v, %v", e.Control, err)
	}
	if e, _, err = d.Decode(control(t, &tollkeeperv1.ControlEntry{Id: "b", Body: &tollkeeperv1.ControlEntry_AccountSet{
		AccountSet: &tollkeeperv1.AccountSet{Accounts: []*tollkeeperv1.Account{{Id: "acme", Parent: "org", Plan: "free"}}},
	}})); err != nil || len(e.Control.Accounts) != 1 || e.Control.Accounts[0].Parent != "org" {
		t.Errorf("%+v, %v", e.Control, err)
	}
	if e, _, err = d.Decode(control(t, &tollkeeperv1.ControlEntry{Id: "c", Body: &tollkeeperv1.ControlEntry_ProducerClosed{
		ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: p[:], Leases: &tollkeeperv1.LeaseMarks{Marks: []*tollkeeperv1.LeaseMark{
			{Account: "acme", Limit: "free/rpm", WindowStartUnixMicros: 5, UsedAtMost: 7},
		}}},
	}})); err != nil || *e.Control.Closed != dedup.Producer(p) || e.Control.Complete || len(e.Control.Marks.Marks) != 1 ||
		e.Control.Marks.Marks[0] != (quota.LeaseMark{Account: "acme", LimitID: "free/rpm", WindowStart: 5, UsedAtMost: 7}) {
		t.Errorf("%+v, %v", e.Control, err)
	}
	// Two owners' ticks may have one id: neither is a repetition of the other.
	if e, _, err = d.Decode(control(t, &tollkeeperv1.ControlEntry{Id: "d", Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{}}})); err != nil || e.Control.ID != "" {
		t.Errorf("%+v, %v", e.Control, err)
	}
	for name, m := range map[string]*ledger.Message{
		"a kind that is not known":      control(t, &tollkeeperv1.ControlEntry{Id: "e"}),
		"a producer that is none":       control(t, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: []byte{1}}}}),
		"a control entry without codec": {Subject: ledger.ControlSubject(3), Sequence: 7},
	} {
		var invalid *usage.InvalidError
		if e, kind, err := d.Decode(m); !errors.As(err, &invalid) || e.Control != nil || e.Sequence != 7 || kind != ledger.KindControl {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
	closing := func(e *tollkeeperv1.ControlEntry) *ledger.Message {
		return entry(ledger.ClosingMessage(3, control(t, e).Data))
	}
	if e, kind, err := d.Decode(closing(&tollkeeperv1.ControlEntry{Id: p.String(), Body: &tollkeeperv1.ControlEntry_ProducerClosed{
		ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: p[:], LastNumber: 3, Complete: true},
	}})); err != nil || kind != ledger.KindClosing || *e.Control.Closed != dedup.Producer(p) || e.Control.ClosedAt != 3 || !e.Control.Complete {
		t.Errorf("a closing: %+v, kind %d, %v", e.Control, kind, err)
	}
	// Whoever may close may not change what is counted.
	var misplaced *usage.InvalidError
	if e, kind, err := d.Decode(closing(&tollkeeperv1.ControlEntry{Id: p.String(), Body: &tollkeeperv1.ControlEntry_Correction{
		Correction: &tollkeeperv1.Correction{Account: "acme"},
	}})); !errors.As(err, &misplaced) || misplaced.Reason != usage.ReasonMisplaced || e.Control != nil || kind != ledger.KindClosing {
		t.Errorf("a correction where producers are retired: %+v, kind %d, %v", e.Control, kind, err)
	}
	if _, kind, err := d.Decode(&ledger.Message{Subject: "elsewhere"}); err == nil || kind != 0 {
		t.Errorf("a subject of nobody: kind %d, %v", kind, err)
	}
	lease := func(e *tollkeeperv1.LeaseEntry) *ledger.Message {
		m, err := ledger.LeaseMessage(3, e)
		if err != nil {
			t.Fatal(err)
		}
		return entry(m)
	}
	asks := []*tollkeeperv1.LeaseAsk{{Account: "acme", Limit: "free/calls", WindowStartUnixMicros: 60_000_000, Seq: 2, Known: 9, Used: 4, Returned: 1, Held: 2, Need: 1, Want: 30, Renew: true}}
	if e, kind, err := d.Decode(lease(&tollkeeperv1.LeaseEntry{Gateway: p[:], Asks: asks})); err != nil || kind != ledger.KindLease || len(e.Asks) != 1 ||
		e.Asks[0].Gateway != [20]byte(p) || e.Asks[0].LimitID != "free/calls" || e.Asks[0].WindowStart != 60_000_000 || e.Asks[0].Used != 4 || e.Asks[0].Want != 30 || !e.Asks[0].Renew {
		t.Errorf("a lease: %+v, %v", e, err)
	}
	for name, m := range map[string]*ledger.Message{
		"a gateway that is none": lease(&tollkeeperv1.LeaseEntry{Gateway: []byte{1}, Asks: asks}),
		"a lease without asks":   lease(&tollkeeperv1.LeaseEntry{Gateway: p[:]}),
		"a lease without codec":  {Subject: ledger.LeasesSubject(3), Sequence: 7},
	} {
		var invalid *usage.InvalidError
		if e, kind, err := d.Decode(m); !errors.As(err, &invalid) || e.Asks != nil || e.Sequence != 7 || kind != ledger.KindLease {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
}
