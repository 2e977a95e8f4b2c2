package ledger

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

func TestASubjectsShardIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	for _, shard := range []uint32{0, 1, 9, 10, 63, MaxShards - 1} {
		for kind, subject := range map[Kind]string{KindCalls: CallsSubject(shard), KindControl: ControlSubject(shard), KindLease: LeasesSubject(shard), KindClosing: ClosingsSubject(shard)} {
			if k, s, err := ParseSubject(subject); err != nil || k != kind || s != shard {
				t.Errorf("%s is read as kind %d, shard %d, %v", subject, k, s, err)
			}
		}
	}
	for _, wrong := range []string{"", "calls", "calls.", "calls.x", "calls.-1", "calls.+1", "calls.01", "calls.00", "calls.1.2", "calls.1024", "calls.99999999999999999999", "other.1", "Calls.1", "beacon.1"} {
		if _, _, err := ParseSubject(wrong); err == nil {
			t.Errorf("%q is taken for a subject of the ledger", wrong)
		}
	}
}

// The shard of an account must never change: these are written down.
func TestTheShardOfARootAccountNeverChanges(t *testing.T) {
	t.Parallel()
	for root, want := range map[string]uint32{"": 37, "a": 12, "acme": 15, "konto-ä": 62} {
		if got := ShardOf(root, 64); got != want {
			t.Errorf("the shard of %q is %d, it was %d", root, got, want)
		}
	}
}

func TestKeyTokensAreOneTokenAndDiffer(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.String().Draw(t, "id")
		token := KeyToken(id)
		for _, c := range token {
			ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '='
			if !ok {
				t.Fatalf("%q has %q in its token %s", id, c, token)
			}
		}
		if other, known := seen[token]; known && other != id {
			t.Fatalf("%q and %q have the token %s", id, other, token)
		}
		seen[token] = id
	})
}

func TestADecisionIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	d := usage.Decision{
		ID: "d", Account: "a", LimitID: "p/l", Meter: usage.Cost, Verdict: usage.Deny, Code: usage.SpendCapReached, Revision: 9, Shard: 3,
		Used: 11, Amount: 10, Window: usage.Day, PeriodStart: 1, PeriodEnd: 2, Filter: usage.Filter{Models: []string{"m"}, Routes: []string{"r"}, Methods: []string{"GET"}},
		PlanVersion: "v", DecidedAt: 4, Cause: 5, ActionURL: "u", WarnPercent: 80, Epoch: 7,
	}
	data, err := MarshalDecision(&d)
	if err != nil {
		t.Fatal(err)
	}
	got, err := UnmarshalDecision(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(d, got); diff != "" {
		t.Error(diff)
	}
	_, err = UnmarshalDecision([]byte{0xff})
	invalid(t, err, usage.ReasonMalformed)
}

func TestPlansAndAccountsAreReadAsTheyWereWritten(t *testing.T) {
	t.Parallel()
	plan := usage.Plan{ID: "p", Limits: []usage.Limit{
		{ID: "l", Meter: usage.Calls, Window: usage.Minute, Amount: 5, Tier: usage.TierEventual},
		{ID: "m", Meter: "own", Filter: usage.Filter{Routes: []string{"r"}}, Window: usage.Lifetime, Amount: 6, WarnPercent: 90, Code: usage.RateLimited, ActionURL: "u"},
	}}
	if diff := cmp.Diff(plan, PlanFromProto(PlanToProto(&plan))); diff != "" {
		t.Error(diff)
	}
	account := usage.Account{ID: "a", Parent: "b", Plan: "p", Closed: true}
	if diff := cmp.Diff(account, AccountFromProto(AccountToProto(&account))); diff != "" {
		t.Error(diff)
	}
}

func TestAControlEntryIsReadAsItWasWritten(t *testing.T) {
	t.Parallel()
	e := &tollkeeperv1.ControlEntry{Id: "1", Author: "me", Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: 4}}}
	m, err := ControlMessage(7, e)
	if err != nil {
		t.Fatal(err)
	}
	if m.Subject != "control.7" {
		t.Errorf("it is for %s", m.Subject)
	}
	got, err := DecodeControl(m.Header, m.Data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	_, err = DecodeControl(m.Header, []byte{0xff})
	invalid(t, err, usage.ReasonMalformed)
	_, err = DecodeControl(nats.Header{}, m.Data)
	invalid(t, err, usage.ReasonUnknownSchema)
}

// Every gateway may write there, so nothing else may be done by it.
func TestAClosingsSubjectTakesTheEndOfAProducerAndNothingElse(t *testing.T) {
	t.Parallel()
	p := ksuid.New()
	closing := func(id string, marks int) *tollkeeperv1.ControlEntry {
		c := &tollkeeperv1.ProducerClosed{Producer: p.Bytes(), LastNumber: 4, Complete: true, Leases: &tollkeeperv1.LeaseMarks{}}
		for range marks {
			c.Leases.Marks = append(c.Leases.Marks, &tollkeeperv1.LeaseMark{Account: "a"})
		}
		return &tollkeeperv1.ControlEntry{Id: id, Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: c}}
	}
	write := func(e *tollkeeperv1.ControlEntry) *nats.Msg {
		data, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return ClosingMessage(7, data)
	}
	good := closing(p.String(), MaxLeaseMarks)
	m := write(good)
	if m.Subject != "closings.7" {
		t.Errorf("it is for %s", m.Subject)
	}
	got, err := DecodeAct(KindClosing, m.Header, m.Data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(good, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	// A ledger from before there were closings is folded to the same.
	if _, err := DecodeAct(KindControl, m.Header, m.Data); err != nil {
		t.Error(err)
	}
	another := &tollkeeperv1.ProducerClosed{Producer: []byte{1}}
	for reason, list := range map[string][]*tollkeeperv1.ControlEntry{
		usage.ReasonMisplaced: {
			{Id: p.String()},
			{Id: p.String(), Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{}}},
			{Id: p.String(), Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: 9}}},
			{Id: p.String(), Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &tollkeeperv1.PlanSet{Version: "v"}}},
			{Id: p.String(), Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{}}},
			{Id: p.String(), Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{Account: "a"}}},
			closing("of-another-act", 0), closing("", 0),
		},
		usage.ReasonOversized: {closing(p.String(), MaxLeaseMarks+1)},
		usage.ReasonMalformed: {{Id: p.String(), Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: another}}},
	} {
		for _, e := range list {
			m := write(e)
			_, err := DecodeAct(KindClosing, m.Header, m.Data)
			invalid(t, err, reason)
		}
	}
	_, err = DecodeClosing(nats.Header{}, m.Data)
	invalid(t, err, usage.ReasonUnknownSchema)
}
