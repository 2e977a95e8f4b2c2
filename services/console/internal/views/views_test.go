package views

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

func change(t *testing.T, d usage.Decision) ledger.Change {
	t.Helper()
	data, err := ledger.MarshalDecision(&d)
	if err != nil {
		t.Fatal(err)
	}
	return ledger.Change{Key: ledger.DecisionKey(d.Shard, d.Account, d.LimitID), Value: data}
}

func TestAnOlderRevisionNeverReplacesANewerOne(t *testing.T) {
	t.Parallel()
	var d Decisions
	deny := usage.Decision{Account: "a", LimitID: "p/l", Verdict: usage.Deny, Revision: 8, PeriodEnd: 1000}
	allow := usage.Decision{Account: "a", LimitID: "p/l", Verdict: usage.Allow, Revision: 7}
	d.Reset([]ledger.Change{change(t, deny), {Key: "checkpoint.0", Value: []byte("x")}})
	d.Apply(change(t, allow))
	if v := d.Worst("a", 10); v != usage.Deny {
		t.Errorf("got %v", v)
	}
	if v := d.Worst("a", 1000); v != usage.Allow {
		t.Errorf("a period's end unblocks by itself, got %v", v)
	}
	if all, denied, _ := d.Counts(10); all != 1 || denied != 1 {
		t.Errorf("%d decisions, %d denied", all, denied)
	}
	d.Apply(ledger.Change{Key: ledger.DecisionKey(0, "a", "p/l")})
	if all, _, _ := d.Counts(10); all != 0 || len(d.Of("a")) != 0 || len(d.account) != 0 {
		t.Errorf("a deleted decision is still there")
	}
}

func TestPagesAreCompleteAndInOrder(t *testing.T) {
	t.Parallel()
	var d Decisions
	d.Reset(nil)
	for i := range 25 {
		d.Apply(change(t, usage.Decision{Account: fmt.Sprintf("a%02d", i), LimitID: "p/=l.é", Verdict: usage.Verdict(1 + i%3)}))
	}
	var got []string
	for cursor, pages := "", 0; ; pages++ {
		page, next := d.Page(cursor, 4, func(d *usage.Decision) bool { return d.Verdict == usage.Deny })
		for _, p := range page {
			got = append(got, p.Account)
		}
		if next != "" && (!IsCursor(next, 1) || IsCursor(next, 0)) {
			t.Errorf("%q is the cursor of the next page", next)
		}
		if cursor = next; cursor == "" || pages > 10 {
			break
		}
	}
	if diff := cmp.Diff([]string{"a02", "a05", "a08", "a11", "a14", "a17", "a20", "a23"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestABeaconOfAReplacedOwnerIsIgnored(t *testing.T) {
	t.Parallel()
	var b Beacons
	now := time.Unix(100, 0)
	hear := func(epoch, seq uint64, at time.Time) {
		data, err := proto.Marshal(&tollkeeperv1.Beacon{Shard: 1, Epoch: epoch, LedgerSequence: seq})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Hear(data, at); err != nil {
			t.Fatal(err)
		}
	}
	hear(2, 50, now)
	hear(1, 60, now.Add(time.Second))
	want := []Beacon{{Shard: 1, Epoch: 2, Sequence: 50, Age: 3 * time.Second}}
	if diff := cmp.Diff(want, b.All(now.Add(3*time.Second))); diff != "" {
		t.Error(diff)
	}
	if err := b.Hear([]byte("\xff"), now); err == nil {
		t.Error("what is no beacon was taken for one")
	}
}

func TestEpisodesAreShownByTheirNewestTransition(t *testing.T) {
	t.Parallel()
	var a Alerts
	hear := func(id string, n int, tr usage.AlertTransition, at usage.Micros) {
		data, err := json.Marshal(usage.Alert{EpisodeID: id, N: n, Transition: tr, At: at})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Hear(data); err != nil {
			t.Fatal(err)
		}
	}
	hear("old", 1, usage.AlertFiring, 1)
	hear("done", 1, usage.AlertFiring, 2)
	hear("done", 2, usage.AlertResolved, 5)
	hear("done", 1, usage.AlertFiring, 2) // again
	hear("new", 1, usage.AlertFiring, 4)
	var got []string
	for _, e := range a.Newest(10) {
		got = append(got, e.EpisodeID+" "+string(e.Transition))
	}
	if diff := cmp.Diff([]string{"new firing", "old firing", "done resolved"}, got); diff != "" {
		t.Error(diff)
	}
	for i := range 2 * MaxEpisodes {
		hear(fmt.Sprint(i), 1, usage.AlertFiring, usage.Micros(i))
	}
	if n := len(a.Newest(10 * MaxEpisodes)); n != MaxEpisodes {
		t.Errorf("%d episodes are kept", n)
	}
}

func TestDeadLettersAreCountedByReason(t *testing.T) {
	t.Parallel()
	var d DeadLetters
	for i := range 300 {
		m := ledger.Message{Sequence: uint64(i + 1), Header: nats.Header{ledger.ReasonHeader: {fmt.Sprint("r", i%2)}}, Data: []byte("abc")}
		d.Hear(&m)
	}
	letters, counted, reasons := d.Newest(3)
	if counted != 300 || len(letters) != 3 || letters[0].Sequence != 300 || letters[0].Bytes != 3 {
		t.Errorf("%d counted, newest %+v", counted, letters)
	}
	if diff := cmp.Diff([]ReasonCount{{"r0", 150}, {"r1", 150}}, reasons); diff != "" {
		t.Error(diff)
	}
	for i := range 100 {
		m := ledger.Message{Header: nats.Header{ledger.ReasonHeader: {fmt.Sprint("x", i)}}}
		d.Hear(&m)
	}
	if letters, _, reasons := d.Newest(1000); len(reasons) > maxReasons+1 || len(letters) != MaxDeadLetters {
		t.Errorf("%d reasons, %d letters", len(reasons), len(letters))
	}
}
