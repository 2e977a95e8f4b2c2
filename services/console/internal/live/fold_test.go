package live

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const second = usage.Micros(1_000_000)

var t0 = usage.Micros(1_700_000_000_000_000)

func frame(t *testing.T, calls ...usage.Call) *ledger.Frame {
	t.Helper()
	var b ledger.Builder
	for i := range calls {
		if calls[i].Time == 0 {
			calls[i].Time = t0
		}
		b.Add(&calls[i])
	}
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.New(), Shard: 3, Number: 1, Gateway: "gw-1", SealedAt: t0})); err != nil {
		t.Fatal(err)
	}
	return &f
}

func call(account string, in, out int64) usage.Call {
	c := usage.Call{Account: account, Status: 200}
	c.Quantities.Set(usage.InputTokens, in)
	c.Quantities.Set(usage.OutputTokens, out)
	return c
}

func refusal(account string, code usage.Code) usage.Call {
	return usage.Call{Account: account, Status: 402, Code: code, DecisionID: "d-" + account}
}

func TestCallsAreCountedInTheSecondOfTheLedger(t *testing.T) {
	t.Parallel()
	var f Fold
	f.Apply(frame(t, call("a", 10, 2), call("b", 5, 1), refusal("a", usage.QuotaExceeded)), 1, t0)
	f.Apply(frame(t, refusal("a", usage.RateLimited), refusal("a", usage.RateLimited)), 2, t0+2*second)
	got := f.Seconds(t0+4*second, 5)
	at := int64(t0 / second)
	want := []Second{
		{At: at - 1, Refused: map[string]int64{}},
		{At: at, Admitted: 2, Refused: map[string]int64{"QUOTA_EXCEEDED": 1}, Input: 15, Output: 3},
		{At: at + 1, Refused: map[string]int64{}},
		{At: at + 2, Refused: map[string]int64{"RATE_LIMITED": 2}},
		{At: at + 3, Refused: map[string]int64{}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if seq, st := f.Position(); seq != 2 || st != t0+2*second {
		t.Errorf("position %d at %d", seq, st)
	}
	if n := len(f.Seconds(t0+4*second, 10_000)); n != Window-1 {
		t.Errorf("%d seconds", n)
	}
}

func TestAPauseLeavesNoOldCounts(t *testing.T) {
	t.Parallel()
	var f Fold
	f.Apply(frame(t, call("a", 1, 1)), 1, t0)
	for _, s := range f.Seconds(t0+10_000*second, Window) {
		if s.Admitted != 0 || s.Refused == nil {
			t.Fatalf("%+v", s)
		}
	}
}

func TestTheBusiestAccountsOfLateComeFirst(t *testing.T) {
	t.Parallel()
	var f Fold
	f.Apply(frame(t, call("old", 1, 1), call("old", 1, 1), call("old", 1, 1), call("old", 1, 1)), 1, t0)
	f.Apply(frame(t, call("new", 1, 1), call("new", 1, 1), refusal("new", usage.QuotaExceeded)), 2, t0+150*second)
	got := f.Busiest(t0+150*second, 5)
	want := []Busy{{Account: "new", Shard: 3, Admitted: 2, Refused: 1}, {Account: "old", Shard: 3, Admitted: 1}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if left := f.Busiest(t0+10_000*second, 5); len(left) != 0 {
		t.Errorf("what is long ago stays: %v", left)
	}
}

func TestRefusalsAreFoldedByAccountAndSecond(t *testing.T) {
	t.Parallel()
	var f Fold
	f.Apply(frame(t, refusal("a", usage.QuotaExceeded), refusal("b", usage.QuotaExceeded), refusal("a", usage.QuotaExceeded)), 7, t0)
	got := f.Refusals(10)
	want := []Refusal{
		{Time: t0, Account: "b", Code: "QUOTA_EXCEEDED", Status: 402, DecisionID: "d-b", Gateway: "gw-1", Sequence: 7, Count: 1},
		{Time: t0, Account: "a", Code: "QUOTA_EXCEEDED", Status: 402, DecisionID: "d-a", Gateway: "gw-1", Sequence: 7, Count: 2},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEverythingIsBounded(t *testing.T) {
	t.Parallel()
	var f Fold
	for n := range 12 {
		var calls []usage.Call
		for i := range 1000 {
			id := fmt.Sprint(n, "-", i)
			calls = append(calls, usage.Call{Account: id, Status: 402, Code: usage.Code(fmt.Sprint("C", i%100))})
		}
		fr := frame(t, calls...)
		fr.Gateway = fmt.Sprint("gw", n)
		for k := range 20 {
			fr.Gateway = fmt.Sprint("gw", n, k)
			f.Apply(fr, uint64(n+1), t0+usage.Micros(n)*second)
		}
	}
	if n := len(f.accounts); n > maxAccounts {
		t.Errorf("%d accounts", n)
	}
	if n := len(f.Refusals(1000)); n > maxRefusals {
		t.Errorf("%d refusals", n)
	}
	if n := len(f.Gateways()); n > maxGateways {
		t.Errorf("%d gateways", n)
	}
	if n := len(f.seconds[(int64(t0/second))%Window].Refused); n > maxCodes+1 {
		t.Errorf("%d codes", n)
	}
}
