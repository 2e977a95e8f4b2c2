package statehash

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

const shards = 2

// world is a ledger with calls, and whoever counts it.
type world struct {
	t        *testing.T
	url      string
	nc       *nats.Conn
	js       jetstream.JetStream
	producer ksuid.KSUID
	numbers  map[uint32]uint64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s, err := embednats.Start(context.Background(), embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nc.Close()
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: shards}); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, url: s.ClientURL(), nc: nc, js: js, producer: ksuid.New(), numbers: map[uint32]uint64{}}
	doc := &plans.Document{Version: 1, Plans: []plans.Plan{{ID: "p", Limits: []plans.Limit{
		{ID: "calls", Meter: "calls", Window: "day", Amount: 5}, {ID: "exact", Meter: "calls", Window: "month", Amount: 50, Tier: "exact"}}}}}
	for i := range 20 {
		doc.Accounts = append(doc.Accounts, plans.Account{ID: fmt.Sprint("a", i), Plan: "p"})
	}
	if _, err := (&plans.Applier{JS: js, NC: nc}).Apply(t.Context(), doc, "test"); err != nil {
		t.Fatal(err)
	}
	return w
}

// call appends n calls of each account.
func (w *world) call(n int) {
	w.t.Helper()
	for i := range 20 * n {
		account := fmt.Sprint("a", i%20)
		shard := ledger.ShardOf(account, shards)
		var b ledger.Builder
		c := usage.Call{Time: usage.At(time.Now()), Account: account, Method: "POST", Route: "r", Status: 200}
		c.Quantities.Set(usage.OutputTokens, int64(i))
		b.Add(&c)
		w.numbers[shard]++
		data := b.Seal(ledger.Header{Producer: w.producer, Shard: shard, Number: w.numbers[shard], Gateway: "g", SealedAt: usage.At(time.Now())})
		if _, err := w.js.PublishMsg(w.t.Context(), ledger.FrameMessage(shard, data)); err != nil {
			w.t.Fatal(err)
		}
	}
}

// state folds a shard's ledger; edit, if set, may change what an entry is.
func (w *world) state(shard uint32, edit func(e *quota.Entry)) *quota.Shard {
	w.t.Helper()
	stream, err := w.js.Stream(w.t.Context(), ledger.Stream)
	if err != nil {
		w.t.Fatal(err)
	}
	s := quota.New(quota.Options{Shard: shard})
	var decoder fold.Decoder
	for seq := range stream.CachedInfo().State.LastSeq {
		m, err := stream.GetMsg(w.t.Context(), seq+1)
		if err != nil {
			w.t.Fatal(err)
		}
		if _, of, err := ledger.ParseSubject(m.Subject); err != nil || of != shard {
			continue
		}
		e, _, err := decoder.Decode(&ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: m.Sequence, Time: m.Time})
		if err != nil {
			w.t.Fatal(err)
		}
		if edit != nil {
			edit(&e)
		}
		s.Apply(e)
	}
	return s
}

func (w *world) snapshot(s *quota.Shard) string {
	w.t.Helper()
	store, err := w.js.ObjectStore(w.t.Context(), ledger.SnapshotsBucket)
	if err != nil {
		w.t.Fatal(err)
	}
	name := fmt.Sprintf("shard-%d/%d-1", s.Number(), s.Sequence())
	if _, err := store.PutBytes(w.t.Context(), name, s.AppendBinary(nil)); err != nil {
		w.t.Fatal(err)
	}
	return name
}

// count answers as an aggregator that has come to a state.
func (w *world) count(s *quota.Shard) {
	w.t.Helper()
	reply, err := json.Marshal(ledger.UsageReply{Shard: s.Number(), Epoch: 7, Sequence: s.Sequence(), StateHash: hashOf(s)})
	if err != nil {
		w.t.Fatal(err)
	}
	sub, err := w.nc.Subscribe(ledger.UsageSubject(s.Number()), func(m *nats.Msg) {
		if err := m.Respond(reply); err != nil {
			w.t.Error(err)
		}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = sub.Unsubscribe() })
	if err := w.nc.Flush(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) audit(asJSON bool, only ...uint32) (string, error) {
	w.t.Helper()
	var out bytes.Buffer
	err := Print(w.t.Context(), Options{NATS: natsconn.Options{URL: w.url}, JSON: asJSON, Only: only, Out: &out})
	return out.String(), err
}

func TestTheLedgerGivesTheStateThatWasCounted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.call(2)
	if text, err := w.audit(false); err != nil || !strings.Contains(text, "nothing to compare with") {
		t.Fatalf("%v\n%s", err, text)
	}
	for s := range uint32(shards) {
		w.snapshot(w.state(s, nil))
	}
	w.call(5) // the fifth is denied by day, and after
	for s := range uint32(shards) {
		w.count(w.state(s, nil))
	}
	w.call(1) // which nobody has counted yet
	text, err := w.audit(false)
	if err != nil || !strings.Contains(text, "the ledger gives the state that was counted") || !strings.Contains(text, "4 states compared") || strings.Contains(text, "DIFFERENT") {
		t.Errorf("%v\n%s", err, text)
	}
	text, err = w.audit(true)
	var r Report
	if err != nil || json.Unmarshal([]byte(text), &r) != nil || !r.Same || len(r.Shards) != shards {
		t.Fatalf("%v\n%s", err, text)
	}
	for _, s := range r.Shards {
		if s.StateHash != hashOf(w.state(s.Shard, nil)) || s.Entries == 0 || s.From != 1 || len(s.Compared) != 2 || s.Compared[0].With != WithSnapshot || s.Compared[1].Epoch != 7 {
			t.Errorf("shard %d: %+v", s.Shard, s)
		}
	}
}

func TestAShardThatIsNamedSeveralTimesIsAuditedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	text, err := w.audit(true, 1, 0, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	var r Report
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Shards) != 2 || r.Shards[0].Shard != 0 || r.Shards[1].Shard != 1 {
		t.Errorf("audited: %+v", r.Shards)
	}
}

func TestWhoCountedSomethingElseIsToldWithTheAccount(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.call(2)
	shard := ledger.ShardOf("a7", shards)
	doubled := false
	wrong := w.state(shard, func(e *quota.Entry) {
		if e.Batch == nil || string(e.Batch.Account.At(0)) != "a7" || doubled {
			return
		}
		doubled = true
		e.Batch.BuiltIns[0] = quota.Ints{Values: []int64{2}}
	})
	name := w.snapshot(wrong)
	w.count(wrong)
	text, err := w.audit(false)
	if !errors.Is(err, ErrDiffers) {
		t.Fatalf("%v\n%s", err, text)
	}
	for _, want := range []string{
		fmt.Sprintf("SHARD %d IS DIFFERENT: at entry %d snapshot %s has the state %s", shard, wrong.Sequence(), name, hashOf(wrong)),
		`account "a7": the ledger gives {"ID":"a7"`, "the running aggregator has the state", "The log is the truth",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("it does not say %q:\n%s", want, text)
		}
	}
}

// After an upgrade the kept snapshots are those of the version before.
func TestASnapshotThatCannotBeReadContradictsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.call(2)
	store, err := w.js.ObjectStore(t.Context(), ledger.SnapshotsBucket)
	if err != nil {
		t.Fatal(err)
	}
	for s := range uint32(shards) {
		state := w.state(s, nil)
		if _, err := store.PutBytes(t.Context(), fmt.Sprintf("shard-%d/%d-1", s, state.Sequence()), []byte("of another version")); err != nil {
			t.Fatal(err)
		}
		w.count(state)
	}
	text, err := w.audit(false)
	if err != nil || !strings.Contains(text, "can't be read: another version of this program wrote it") || !strings.Contains(text, fmt.Sprint(shards, " states compared")) ||
		!strings.Contains(text, "the ledger gives the state that was counted") || strings.Contains(text, "DIFFERENT") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestAnAggregatorThatIsAheadOfTheLedgerIsDifferent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.call(1)
	ahead := w.state(0, nil)
	ahead.Apply(quota.Entry{Sequence: ahead.Sequence() + 1000, Time: ahead.Now()})
	w.count(ahead)
	if text, err := w.audit(false); !errors.Is(err, ErrDiffers) || !strings.Contains(text, "the shard's ledger ends at") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestAPurgedLedgerIsAuditedFromItsSnapshot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.call(2)
	kept, purge := map[uint32]*quota.Shard{}, ^uint64(0)
	for s := range uint32(shards) {
		kept[s] = w.state(s, nil)
		purge = min(purge, kept[s].Sequence())
	}
	w.call(2)
	final := map[uint32]*quota.Shard{}
	for s := range uint32(shards) {
		final[s] = w.state(s, nil)
		w.count(final[s])
	}
	stream, err := w.js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context(), jetstream.WithPurgeSequence(purge+1)); err != nil {
		t.Fatal(err)
	}
	if text, err := w.audit(false); !errors.Is(err, ledger.ErrPurged) {
		t.Fatalf("without a snapshot: %v\n%s", err, text)
	}
	for s := range uint32(shards) {
		w.snapshot(kept[s])
	}
	text, err := w.audit(false)
	if err != nil || strings.Count(text, "the ledger's beginning is gone") != shards || !strings.Contains(text, "the ledger gives the state that was counted") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestWhatTakesLongIsTold(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	now := time.Unix(0, 0)
	tell := progress(&out, func() time.Time { now = now.Add(100 * time.Millisecond); return now }, 4)
	for i := range uint64(64 * 50) {
		tell(3, i, 64*50)
	}
	if n := strings.Count(out.String(), "\n"); n < 2 || n > 5 || !strings.HasPrefix(out.String(), "shard 3 of 4: ") {
		t.Errorf("in 5 seconds it told:\n%s", out.String())
	}
}
