package corrections

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

const shards = 4

// world is a ledger, plans, and somebody who answers what acme has used.
type world struct {
	t  *testing.T
	nc *nats.Conn
	js jetstream.JetStream
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
	w := &world{t: t, nc: nc, js: js}
	w.apply("acme", "acme/search", "gone")
	return w
}

func (w *world) apply(accounts ...string) {
	w.t.Helper()
	doc := &plans.Document{Version: 1, Plans: []plans.Plan{{ID: "free", Limits: []plans.Limit{{ID: "pages", Meter: "pages", Window: "day", Amount: 10}}}}}
	for _, id := range accounts {
		a := plans.Account{ID: id, Plan: "free"}
		if parent, _, below := strings.Cut(id, "/"); below {
			a.Parent = parent
		}
		doc.Accounts = append(doc.Accounts, a)
	}
	if _, err := (&plans.Applier{JS: w.js, NC: w.nc}).Apply(w.t.Context(), doc, "test"); err != nil {
		w.t.Fatal(err)
	}
}

// count answers for every shard: who has used 10 calls and 1,000 tokens, and that
// all of the ledger is counted.
func (w *world) count(who ...string) {
	w.t.Helper()
	for s := range uint32(shards) {
		sub, err := w.nc.Subscribe(ledger.UsageSubject(s), func(m *nats.Msg) {
			var q ledger.UsageRequest
			if err := json.Unmarshal(m.Data, &q); err != nil {
				w.t.Error(err)
			}
			r := ledger.UsageReply{Shard: s}
			if last, found, err := ledger.LastMessage(context.Background(), w.js, ledger.Stream, ledger.ControlSubject(s)); err == nil && found {
				r.Sequence = last.Sequence
			}
			for _, id := range q.Accounts {
				for _, known := range who {
					if id == known {
						own := ledger.Totals{Admitted: 10, Meters: map[usage.Meter]int64{usage.OutputTokens: 1000, "images": 3}}
						r.Accounts = append(r.Accounts, ledger.AccountUsage{ID: id, Own: own, Totals: own})
					}
				}
			}
			data, err := json.Marshal(r)
			if err != nil {
				w.t.Error(err)
			}
			if err := m.Respond(data); err != nil {
				w.t.Error(err)
			}
		})
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { _ = sub.Unsubscribe() })
	}
	if err := w.nc.Flush(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) submitter() *Submitter { return &Submitter{JS: w.js, NC: w.nc, Shards: shards} }

// acts returns the corrections in the ledger.
func (w *world) acts() (list []*tollkeeperv1.ControlEntry) {
	w.t.Helper()
	stream, err := w.js.Stream(w.t.Context(), ledger.Stream)
	if err != nil {
		w.t.Fatal(err)
	}
	for seq := range stream.CachedInfo().State.LastSeq {
		m, err := stream.GetMsg(w.t.Context(), seq+1)
		if err != nil {
			w.t.Fatal(err)
		}
		if e, err := ledger.DecodeControl(m.Header, m.Data); err == nil && e.GetCorrection() != nil {
			list = append(list, e)
		}
	}
	return list
}

func act(account string) Act {
	return Act{Author: "ada", Account: account, Adjustments: map[usage.Meter]int64{usage.Calls: -3, usage.OutputTokens: 40}, Reason: "sent twice", Reference: "batch/17"}
}

func TestACorrectionStandsInTheShardOfTheRoot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.count("acme/search", "stranger")
	at := time.Now().Add(-time.Hour).Truncate(time.Microsecond)
	a := act("acme/search")
	a.Time, a.Model = at, "large"
	r, err := w.submitter().Submit(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	if r.Root != "acme" || r.Shard != ledger.ShardOf("acme", shards) || r.Repeated || !r.Counted || r.Usage == nil || r.At == 0 {
		t.Errorf("got %+v", r)
	}
	list := w.acts()
	if len(list) != 1 {
		t.Fatalf("the ledger has %v", list)
	}
	e, c := list[0], list[0].GetCorrection()
	if e.GetId() != r.ID || e.GetAuthor() != "ada" || e.GetCreatedAtUnixMicros() == 0 || c.GetAccount() != "acme/search" || c.GetTimeUnixMicros() != at.UnixMicro() ||
		c.GetModel() != "large" || c.GetReason() != "sent twice" || c.GetReference() != "batch/17" || len(c.GetAdjustments()) != 2 {
		t.Errorf("the ledger has %v", e)
	}
	// Whom only calls have named is a root.
	if r, err = w.submitter().Submit(t.Context(), act("stranger")); err != nil || r.Root != "stranger" || r.Shard != ledger.ShardOf("stranger", shards) {
		t.Errorf("got %+v, %v", r, err)
	}
}

func TestTheSameActTwiceIsOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.count("acme")
	a := act("acme")
	a.ID = ksuid.New()
	var mu sync.Mutex
	var group sync.WaitGroup
	fresh, repeated, sequences := 0, 0, map[uint64]bool{}
	for range 8 { // at once
		group.Go(func() {
			r, err := w.submitter().Submit(t.Context(), a)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			if sequences[r.Sequence] = true; r.Repeated {
				repeated++
			} else {
				fresh++
			}
		})
	}
	group.Wait()
	if fresh != 1 || repeated != 7 || len(sequences) != 1 || len(w.acts()) != 1 {
		t.Errorf("%d made it, %d repeated it, at %v; the ledger has %d", fresh, repeated, sequences, len(w.acts()))
	}
	other := a
	other.Reason = "for another reason"
	var refused *Error
	if _, err := w.submitter().Submit(t.Context(), other); !errors.As(err, &refused) || refused.Code != CodeConflict {
		t.Errorf("another act under the same id: %v", err)
	}
	if len(w.acts()) != 1 {
		t.Error("it was made all the same")
	}
}

func TestARepetitionIsFoundBehindManyOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.count("acme")
	a := act("acme")
	a.ID = ksuid.New()
	first, err := w.submitter().Submit(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	tick, err := ledger.ControlMessage(first.Shard, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		if _, err := w.js.PublishMsgAsync(&nats.Msg{Subject: tick.Subject, Header: tick.Header, Data: tick.Data}); err != nil {
			t.Fatal(err)
		}
	}
	<-w.js.PublishAsyncComplete()
	r, err := w.submitter().Submit(t.Context(), a)
	if err != nil || !r.Repeated || r.Sequence != first.Sequence {
		t.Errorf("got %+v, %v", r, err)
	}
}

func TestWhatDoesNotFitIsRefusedAndNothingIsWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.count("acme")
	now := time.Now()
	for name, c := range map[string]struct {
		change func(a *Act)
		code   string
		say    string
	}{
		"no account":        {func(a *Act) { a.Account = "" }, CodeInvalid, "say whose usage"},
		"unknown account":   {func(a *Act) { a.Account = "nobody" }, CodeUnknownAccount, `"nobody"`},
		"the overflow":      {func(a *Act) { a.Account = "(overflow)" }, CodeUnknownAccount, "nobody can tell"},
		"no author":         {func(a *Act) { a.Author = " " }, CodeInvalid, "say who"},
		"no reason":         {func(a *Act) { a.Reason = "" }, CodeInvalid, "say why"},
		"a long reason":     {func(a *Act) { a.Reason = strings.Repeat("x", 1025) }, CodeInvalid, "at most 1024"},
		"two lines":         {func(a *Act) { a.Reason = "a\nb" }, CodeInvalid, "one line"},
		"nothing":           {func(a *Act) { a.Adjustments = nil }, CodeInvalid, "changes no meter"},
		"by nothing":        {func(a *Act) { a.Adjustments = map[usage.Meter]int64{usage.Calls: 0} }, CodeInvalid, "by 0"},
		"no meter":          {func(a *Act) { a.Adjustments = map[usage.Meter]int64{"a b": 1} }, CodeUnknownMeter, `"a b"`},
		"unknown meter":     {func(a *Act) { a.Adjustments = map[usage.Meter]int64{"imagse": 1} }, CodeUnknownMeter, `"imagse"`},
		"too many meters":   {func(a *Act) { a.Adjustments = many(17) }, CodeInvalid, "at most 16"},
		"more calls":        {func(a *Act) { a.Adjustments = map[usage.Meter]int64{usage.Calls: -11} }, CodeTooLarge, "has used 10 itself"},
		"more tokens":       {func(a *Act) { a.Adjustments = map[usage.Meter]int64{usage.OutputTokens: -1001} }, CodeTooLarge, "has used 1000"},
		"never used":        {func(a *Act) { a.Account, a.Adjustments = "gone", map[usage.Meter]int64{usage.Calls: -1} }, CodeTooLarge, "has used 0"},
		"beyond all bounds": {func(a *Act) { a.Adjustments = map[usage.Meter]int64{usage.Calls: MaxAmount + 1} }, CodeTooLarge, "at most"},
		"the future":        {func(a *Act) { a.Time = now.Add(time.Hour) }, CodeInvalid, "in the future"},
		"before all time":   {func(a *Act) { a.Time = time.Unix(1, 0) }, CodeInvalid, "not before 2000"},
		"an old id":         {func(a *Act) { a.ID = idOf(t, now.Add(-25*time.Hour)) }, CodeInvalid, "use a new id"},
		"an id of tomorrow": {func(a *Act) { a.ID = idOf(t, now.Add(time.Hour)) }, CodeInvalid, "in the future"},
	} {
		a := act("acme")
		c.change(&a)
		var refused *Error
		if _, err := w.submitter().Submit(t.Context(), a); !errors.As(err, &refused) || refused.Code != c.code || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a plan or a call has named can be added to.
	for _, m := range []usage.Meter{"pages", "images", usage.Cost} {
		a := act("acme")
		a.Adjustments = map[usage.Meter]int64{m: 5}
		if _, err := w.submitter().Submit(t.Context(), a); err != nil {
			t.Errorf("%s: %v", m, err)
		}
	}
	if n := len(w.acts()); n != 3 {
		t.Errorf("the ledger has %d corrections, wanted are 3", n)
	}
}

// TestOfTwoActsThatTakeOffTheSameUsageOneIsRefused: whoever counts may be an act
// behind when the second is asked for, or another act may come while it answers.
func TestOfTwoActsThatTakeOffTheSameUsageOneIsRefused(t *testing.T) {
	t.Parallel()
	for name, meanwhile := range map[string]bool{"counted late": false, "between question and act": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			shard := ledger.ShardOf("acme", shards)
			other := func() {
				e := act("acme")
				e.ID, e.Time, e.Adjustments = ksuid.New(), time.Now(), map[usage.Meter]int64{usage.Calls: -6}
				m, err := ledger.ControlMessage(shard, e.entry(time.Now()))
				if err == nil {
					_, err = w.js.PublishMsg(context.Background(), m)
				}
				if err != nil {
					t.Error(err)
				}
			}
			last := func() uint64 {
				m, _, err := ledger.LastMessage(context.Background(), w.js, ledger.Stream, ledger.ControlSubject(shard))
				if err != nil {
					t.Error(err)
				}
				return m.Sequence
			}
			before := last()
			if !meanwhile {
				other()
			}
			asked := 0
			sub, err := w.nc.Subscribe(ledger.UsageSubject(shard), func(m *nats.Msg) {
				own := ledger.Totals{Admitted: 10}
				r := ledger.UsageReply{Shard: shard, Sequence: before}
				if asked++; asked > 1 {
					r.Sequence, own.Adjusted = last(), map[usage.Meter]int64{usage.Calls: -6}
				} else if meanwhile {
					other()
				}
				r.Accounts = []ledger.AccountUsage{{ID: "acme", Own: own, Totals: own}}
				data, err := json.Marshal(r)
				if err == nil {
					err = m.Respond(data)
				}
				if err != nil {
					t.Error(err)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = sub.Unsubscribe() })
			a := act("acme")
			a.Adjustments = map[usage.Meter]int64{usage.Calls: -5}
			var refused *Error
			if r, err := w.submitter().Submit(t.Context(), a); !errors.As(err, &refused) || refused.Code != CodeTooLarge || !strings.Contains(err.Error(), "has used 4 itself") {
				t.Errorf("got %+v, %v", r, err)
			}
			if n := len(w.acts()); n != 1 {
				t.Errorf("the ledger has %d corrections", n)
			}
		})
	}
}

func TestWithoutCountersNothingIsCorrectedButARepetitionIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.submitter().Submit(t.Context(), act("acme")); !errors.Is(err, ErrCounting) || !strings.Contains(err.Error(), "is an aggregator running?") {
		t.Fatalf("got %v", err)
	}
	if n := len(w.acts()); n != 0 {
		t.Fatalf("the ledger has %d corrections", n)
	}
	w.count("acme")
	a := act("acme")
	a.ID = ksuid.New()
	if _, err := w.submitter().Submit(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	impatient := w.submitter()
	impatient.Wait = -1
	r, err := impatient.Submit(t.Context(), a)
	if err != nil || !r.Repeated || r.Counted {
		t.Errorf("got %+v, %v", r, err)
	}
}

func TestARemovedAccountKeepsItsPlace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.count("acme/search")
	w.apply("gone")
	r, err := w.submitter().Submit(t.Context(), act("acme/search"))
	if err != nil || r.Root != "acme" {
		t.Errorf("got %+v, %v", r, err)
	}
}

func many(n int) map[usage.Meter]int64 {
	m := map[usage.Meter]int64{}
	for i := range n {
		m[usage.Meter(fmt.Sprint("m", i))] = 1
	}
	return m
}

func idOf(t *testing.T, at time.Time) ksuid.KSUID {
	t.Helper()
	id, err := ksuid.NewRandomWithTime(at)
	if err != nil {
		t.Fatal(err)
	}
	return id
}
