package reply

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// An operator sees of a limit that gateways share who has what of it.
func TestASharedLimitSaysWhatIsWithGateways(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		state *lease.State
		want  *ledger.LeaseUsage
	}{
		"nobody has asked": {},
		"three gateways, one of them silent": {
			&lease.State{Amount: 100, Settled: 60, Outstanding: 30, Dead: 12, Exposure: 5, Leases: 3, Waits: 1, Counts: lease.Counts{Grants: 9, Recalls: 2, DeniedEarly: 4, DeniedFinal: 1}},
			&ledger.LeaseUsage{Settled: 60, Outstanding: 30, Dead: 12, Free: 10, Exposure: 5, Gateways: 3, Waiting: 1, Grants: 9, Recalls: 2, DeniedEarly: 4, DeniedFinal: 1},
		},
		"overdrawn": {&lease.State{Amount: 100, Settled: 103, Outstanding: 4, Overdraft: 3, Leases: 1}, &ledger.LeaseUsage{Settled: 103, Outstanding: 4, Overdraft: 3, Gateways: 1}},
	} {
		u := usageOf(&quota.AccountUse{ID: "acme", Limits: []quota.LimitUse{{LimitID: "plan/limit", Tier: usage.TierExact, Lease: c.state}, {LimitID: "plan/other"}}})
		if got := u.Limits[0]; got.Tier != usage.TierExact || !reflect.DeepEqual(got.Lease, c.want) {
			t.Errorf("%s: %+v", name, got.Lease)
		}
		if other := u.Limits[1]; other.Tier != usage.TierEventual || other.Lease != nil {
			t.Errorf("%s: a limit without a tier is told as %+v", name, other)
		}
	}
}

// The conservation audit asks for totals only, and needs the hash of the calls to
// the last bit: beyond 2^53 a JSON number is not read as what it was by everybody.
func TestTotalsSayWhichCallsTheySum(t *testing.T) {
	t.Parallel()
	s := quota.New(quota.Options{Shard: 3})
	b := &quota.Batch{Producer: dedup.Producer{1}, Number: 1, N: 3, Time: []int64{1, 2, 3}}
	b.Account = quota.Strings{Dict: [][]byte{[]byte("acme"), []byte("hooli")}, Index: []uint32{0, 1, 0}}
	b.Code = quota.Strings{Dict: [][]byte{nil, []byte("QUOTA_EXCEEDED")}, Index: []uint32{0, 0, 1}}
	if fx := s.Apply(quota.Entry{Sequence: 1, Time: 5, Batch: b}); fx.Invalid != nil || fx.Admitted != 2 || fx.Refused != 1 {
		t.Fatalf("%+v", fx)
	}
	data, err := Usage(s, 9, []byte(`{"totals_only":true,"accounts":["acme","hooli","nobody"]}`))
	if err != nil {
		t.Fatal(err)
	}
	var r ledger.UsageReply
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Accounts) != 2 || r.StateHash != "" || r.Epoch != 9 {
		t.Fatalf("%s", data)
	}
	sum := uint64(0)
	for i := range r.Accounts {
		a := &r.Accounts[i]
		u, _ := s.Account(a.ID)
		if a.Own.Hash == 0 || a.Own.Hash != u.Own.Hash || a.Totals.Hash != 0 {
			t.Errorf("%s: own %d, want %d; with its children %d", a.ID, a.Own.Hash, u.Own.Hash, a.Totals.Hash)
		}
		sum += a.Own.Hash
	}
	if r.Total.Hash != sum || r.Total.Admitted != 2 || r.Total.Refused != 1 {
		t.Errorf("%+v, want hash %d", r.Total, sum)
	}
	var text struct {
		Total struct {
			Hash any `json:"hash"`
		} `json:"total"`
	}
	if err := json.Unmarshal(data, &text); err != nil {
		t.Fatal(err)
	}
	if _, isText := text.Total.Hash.(string); !isText {
		t.Errorf("the hash is written as %T", text.Total.Hash)
	}
}
