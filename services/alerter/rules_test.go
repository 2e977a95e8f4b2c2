package alerter

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// told keeps what readiness was told last.
type told struct{ reason string }

func (r *told) OK()                    { r.reason = "" }
func (r *told) NotReady(reason string) { r.reason = reason }

// folding is an evaluator that a test hands entries of shard 0, at stream time began+at.
type folding struct {
	t     *testing.T
	e     *evaluator
	ready *told
	began time.Time
	next  uint64
}

func newFolding(t *testing.T) *folding {
	t.Helper()
	o := Options{Logger: zerolog.Nop()}
	o.setDefaults()
	m, err := newMetrics(newRegistry())
	if err != nil {
		t.Fatal(err)
	}
	f := &folding{t: t, ready: &told{}, began: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), next: 1}
	f.e = newEvaluator(&o, nil, m, f.ready)
	return f
}

func (f *folding) hand(at time.Duration, m ledger.Message) {
	f.t.Helper()
	m.Time, m.Sequence = f.began.Add(at), f.next
	f.next++
	if err := f.e.handle(f.t.Context(), m); err != nil {
		f.t.Fatal(err)
	}
}

// rules states the rules of the shard.
func (f *folding) rules(at time.Duration, version uint32, horizon time.Duration) {
	f.t.Helper()
	m, err := ledger.ControlMessage(0, &tollkeeperv1.ControlEntry{Id: fmt.Sprint("rules ", f.next), Body: &tollkeeperv1.ControlEntry_CoreVersion{
		CoreVersion: &tollkeeperv1.CoreVersion{Version: version, ForeignHorizonMicros: horizon.Microseconds()},
	}})
	if err != nil {
		f.t.Fatal(err)
	}
	f.hand(at, ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data})
}

// event is a refused call of a foreign gateway, stamped anew whenever it is sent.
func (f *folding) event(at time.Duration, id, account string) {
	f.t.Helper()
	text := fmt.Sprintf(`{"specversion":"1.0","id":%q,"source":"s","type":%q,"subject":%q,"time":%q,"data":{"code":"QUOTA_EXCEEDED"}}`,
		id, ledger.CloudEventType, account, f.began.Add(at).Format(time.RFC3339Nano))
	f.hand(at, ledger.Message{Subject: ledger.CallsSubject(0), Header: map[string][]string{ledger.CodecHeader: {ledger.CodecCloudEvent}}, Data: []byte(text)})
}

// refused is how many accounts began to be refused within the last minute.
func (f *folding) refused(at time.Duration) int {
	d := f.e.detectors[0]
	now := usage.At(f.began.Add(at))
	d.Advance(now, now)
	return d.Stats().Refused
}

// An event that is sent again within the ledger's horizon is the same event, however
// short the windows of the rules are.
func TestADuplicateIsOneForAsLongAsTheLedgerSays(t *testing.T) {
	t.Parallel()
	f := newFolding(t)
	f.rules(0, quota.CoreVersion, time.Hour)
	f.event(time.Second, "1", "a")
	if n := f.refused(3 * time.Second); n != 1 {
		t.Errorf("%d accounts", n)
	}
	f.event(30*time.Minute, "1", "a")
	if n := f.refused(30*time.Minute + 2*time.Second); n != 0 {
		t.Errorf("%d accounts by a duplicate after half an hour, the ledger remembers one", n)
	}
	f.event(3*time.Hour, "1", "a")
	if n := f.refused(3*time.Hour + 2*time.Second); n != 1 {
		t.Errorf("%d accounts by what is no duplicate any more", n)
	}
}

func TestOfRulesThatANewerProgramKnowsNothingIsFolded(t *testing.T) {
	t.Parallel()
	f := newFolding(t)
	f.event(time.Second, "1", "a")
	f.rules(2*time.Second, quota.CoreVersion+1, time.Hour)
	f.event(3*time.Second, "2", "b")
	if n := f.refused(5 * time.Second); n != 1 {
		t.Errorf("%d accounts, of which one is of older rules", n)
	}
	if len(f.e.stopped) != 1 {
		t.Errorf("%d shards are stopped", len(f.e.stopped))
	}

	// After a restart the entry that said so is not read again.
	again := newFolding(t)
	for shard, r := range f.e.rules {
		again.e.foldAct(shard, 0, again.e.seen.Pass(shard, 0), r.entry())
	}
	again.event(6*time.Second, "3", "c")
	if n := again.refused(8 * time.Second); n != 0 {
		t.Errorf("%d accounts after a restart", n)
	}
	if newer := again.e.stopped[0]; newer == nil || !strings.Contains(newer.Error(), "newer") {
		t.Errorf("%v", newer)
	}
}
