package reply

import (
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

func TestEachGatewayIsToldItsAnswersInOrderAndInMessagesOfABoundedSize(t *testing.T) {
	t.Parallel()
	var all []quota.LeaseAnswer
	for i := range 600 {
		for g := range byte(2) {
			all = append(all, quota.LeaseAnswer{
				Account: fmt.Sprint("account-", i), LimitID: "free/calls", WindowStart: 5, WindowEnd: 9,
				Answer: lease.Answer{Gateway: lease.Gateway{g + 1}, Revision: uint64(i) + 1, Seq: 3, Granted: 7, Expiry: 8, Verdict: lease.DeniedEarly, Room: 4, Soon: int64(i) % 2, Recall: 2},
			})
		}
	}
	all[0].Decision = &usage.Decision{ID: "0ujsszwN8NRY24YaXiTIE2VWDTS", Account: "account-0", LimitID: "free/calls", Meter: usage.Calls, Verdict: usage.Deny, Revision: 1}
	parcels, err := Answers(3, 77, all)
	if err != nil {
		t.Fatal(err)
	}
	next := map[lease.Gateway]int{}
	for _, p := range parcels {
		var m tollkeeperv1.LeaseAnswers
		if err := proto.Unmarshal(p.Data, &m); err != nil {
			t.Fatal(err)
		}
		if m.GetShard() != 3 || m.GetEpoch() != 77 || len(m.GetAnswers()) != p.Answers || p.Answers > maxAnswers {
			t.Errorf("shard %d, epoch %d, %d answers", m.GetShard(), m.GetEpoch(), len(m.GetAnswers()))
		}
		for _, a := range m.GetAnswers() {
			want := all[2*next[p.Gateway]+int(p.Gateway[0])-1]
			next[p.Gateway]++
			if a.GetAccount() != want.Account || a.GetRevision() != want.Revision || a.GetSeq() != 3 || a.GetGranted() != 7 || a.GetExpiryUnixMicros() != 8 ||
				lease.Verdict(a.GetStanding()) != lease.DeniedEarly || a.GetRoom() != 4 || a.Soon == nil || a.GetSoon() != want.Soon || a.GetRecall() != 2 || a.GetWindowStartUnixMicros() != 5 || a.GetWindowEndUnixMicros() != 9 {
				t.Fatalf("told is %v, to be told was %+v", a, want)
			}
			if want.Decision != nil {
				d, err := ledger.UnmarshalDecision(a.GetDecision())
				if err != nil || d.Epoch != 77 || d.Verdict != usage.Deny {
					t.Errorf("decision %+v, %v", d, err)
				}
			}
		}
	}
	if len(parcels) != 6 || next[lease.Gateway{1}] != 600 || next[lease.Gateway{2}] != 600 {
		t.Errorf("%d messages, told are %v", len(parcels), next)
	}
}
