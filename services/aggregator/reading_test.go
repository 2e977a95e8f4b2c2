package aggregator

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

func TestAShardThatDoesNotTakeItsEntriesDoesNotHoldUpTheOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	m, err := meter.New(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	g, ctx := errgroup.WithContext(ctx)
	s := &service{js: w.js, nc: w.nc, m: m, log: zerolog.Nop(), shards: 2, g: g}
	blocked, other := newOwner(s, 0), newOwner(s, 1)
	s.owners = []*owner{blocked, other}
	all := &reader{service: s, all: true}
	for _, o := range s.owners {
		at := newIntake(all)
		at.in = make(chan ledger.Message, 4)
		o.intake.Store(at)
	}
	var want []uint64
	for range 20 {
		want = append(want, w.control(0, &tollkeeperv1.ControlEntry{}))
	}
	last := w.control(1, &tollkeeperv1.ControlEntry{})
	want = append(want, w.control(0, &tollkeeperv1.ControlEntry{}))
	g.Go(func() error { return all.read(ctx, 1) })
	deadline := time.After(10 * time.Second)
	select {
	case got := <-other.intake.Load().in:
		if got.Sequence != last {
			t.Errorf("got entry %d, want %d", got.Sequence, last)
		}
	case <-deadline:
		t.Fatal("the other shard waits")
	}
	for _, seq := range want {
		select {
		case got := <-blocked.intake.Load().in:
			if got.Sequence != seq {
				t.Fatalf("got entry %d, want %d", got.Sequence, seq)
			}
		case <-deadline:
			t.Fatalf("entry %d does not come", seq)
		}
	}
	cancel()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if n := testutil.ToFloat64(m.Apart); n != 1 {
		t.Errorf("%v shards were put apart", n)
	}
}

// Whoever can append to the ledger can append where no shard reads.
func TestEntriesOfNoShardHoldUpNobody(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	m, err := meter.New(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	g, ctx := errgroup.WithContext(ctx)
	s := &service{js: w.js, nc: w.nc, m: m, log: zerolog.Nop(), shards: 2, g: g}
	s.owners = []*owner{newOwner(s, 0), newOwner(s, 1)}
	all := &reader{service: s, all: true}
	for _, o := range s.owners {
		o.intake.Store(newIntake(all))
	}
	// Nobody takes them: the owner of the first shard is busy, or somebody else.
	for range 3 * inputBuffer {
		w.publish(w.frame(ksuid.New(), 2, 1, calls("acme", 1)))
	}
	last := w.control(1, &tollkeeperv1.ControlEntry{})
	g.Go(func() error { return all.read(ctx, 1) })
	select {
	case got := <-s.owners[1].intake.Load().in:
		if got.Sequence != last {
			t.Errorf("got entry %d, want %d", got.Sequence, last)
		}
	case <-time.After(10 * time.Second):
		t.Errorf("entry %d does not come", last)
	}
	cancel()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestAnEntryOfAShardThatTheLedgerDoesNotHaveIsKeptInTheDeadLetters(t *testing.T) {
	t.Parallel()
	for name, standby := range map[string]int{"one reader of all shards": 0, "a reader for each shard": 1, "only for what is owned": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 2, time.Minute)
			// There may have been some before anybody could keep them.
			first := w.publish(w.frame(ksuid.New(), 2, 1, calls("acme", 1)))
			r := w.run(Options{Standby: standby})
			stray := w.publish(w.frame(ksuid.New(), 2, 2, calls("acme", 1)))
			odd := w.frame(ksuid.New(), 0, 1, calls("acme", 1))
			odd.Subject = "calls.first"
			nowhere := w.publish(odd)
			stream, err := w.js.Stream(t.Context(), ledger.DeadLetterStream)
			if err != nil {
				t.Fatal(err)
			}
			kept := func(seq uint64, origin string) {
				t.Helper()
				eventually(t, "it is kept", func() bool {
					m, err := stream.GetLastMsgForSubject(t.Context(), ledger.DeadLetterSubject(0, seq))
					return err == nil && m.Header.Get(ledger.ReasonHeader) == usage.ReasonWrongShard && m.Header.Get(ledger.OriginHeader) == fmt.Sprint(origin, " ", seq)
				})
			}
			for seq, origin := range map[uint64]string{first: "calls.2", stray: "calls.2", nowhere: "calls.first"} {
				kept(seq, origin)
			}
			r.counts(t, `
# HELP tollkeeper_aggregator_stray_entries_total Entries on subjects of no shard of this ledger: they are kept in the dead letters.
# TYPE tollkeeper_aggregator_stray_entries_total counter
tollkeeper_aggregator_stray_entries_total 3
`, "tollkeeper_aggregator_stray_entries_total")
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
			// The next owner keeps what comes after, and nothing twice.
			r = w.run(Options{Standby: standby})
			kept(w.publish(w.frame(ksuid.New(), 9, 1, calls("acme", 1))), "calls.9")
			r.counts(t, `
# HELP tollkeeper_aggregator_stray_entries_total Entries on subjects of no shard of this ledger: they are kept in the dead letters.
# TYPE tollkeeper_aggregator_stray_entries_total counter
tollkeeper_aggregator_stray_entries_total 1
`, "tollkeeper_aggregator_stray_entries_total")
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// What is counted may be removed from the ledger up to the oldest position of
// all shards: one without calls must not stay behind for ever.
func TestAShardWithoutCallsDoesNotStayBehind(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	r := w.run(Options{idleEntries: 10})
	p := ksuid.New()
	busy := "account-0"
	idle := 1 - w.shardOf(busy)
	last := uint64(0)
	for range 12 {
		last = w.send(p, calls(busy, 1))
	}
	if u := w.counted(idle, last+1); u.Sequence != last+1 {
		t.Errorf("the idle shard is at %d, a tick after %d was wanted", u.Sequence, last)
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	if c := w.checkpoint(idle); c.Sequence != last+1 || c.Snapshot == "" {
		t.Errorf("got %+v", c)
	}
}

// Who is killed between storing a snapshot and naming it leaves it behind.
func TestSnapshotsThatNobodyNamesAreRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	store, err := w.js.ObjectStore(t.Context(), ledger.SnapshotsBucket)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"shard-0/7-1", "shard-1/9-1", "historian/calls.0"} {
		if _, err := store.PutBytes(t.Context(), name, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	w.send(ksuid.New(), calls("acme", 1))
	for range 2 { // the second time there is one that is named
		r := w.run(Options{})
		eventually(t, "what nobody names is removed", func() bool {
			_, err := store.GetInfo(t.Context(), "shard-0/7-1")
			_, err2 := store.GetInfo(t.Context(), "shard-1/9-1")
			return errors.Is(err, jetstream.ErrObjectNotFound) && errors.Is(err2, jetstream.ErrObjectNotFound)
		})
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
	}
	objects, err := store.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, o := range objects {
		names = append(names, o.Name)
	}
	slices.Sort(names)
	if want := []string{"historian/calls.0", w.checkpoint(0).Snapshot, w.checkpoint(1).Snapshot}; !slices.Equal(names, want) {
		t.Errorf("kept are %v, want %v", names, want)
	}
}

// Who is killed in the middle of storing a snapshot leaves chunks without a name, and
// every snapshot that was replaced leaves the name: both would fill the bucket for ever.
func TestWhatBrokenUploadsAndOldSnapshotsLeaveBehindIsRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	const left = "$O.snapshots.C.left"
	for range 3 {
		if _, err := w.js.Publish(t.Context(), left, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	r := w.run(Options{tidyEvery: 20 * time.Millisecond, leftAfter: time.Nanosecond, abandon: true}) // it stores nothing itself
	stream, err := w.js.Stream(t.Context(), "OBJ_"+ledger.SnapshotsBucket)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "they are gone", func() bool {
		info, err := stream.Info(t.Context(), jetstream.WithSubjectFilter(left))
		return err == nil && info.State.Subjects[left] == 0
	})
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	store, err := w.js.ObjectStore(t.Context(), ledger.SnapshotsBucket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.PutBytes(t.Context(), "shard-0/7-1", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(t.Context(), "shard-0/7-1"); err != nil {
		t.Fatal(err)
	}
	r = w.run(Options{tidyEvery: 20 * time.Millisecond, leftAfter: time.Nanosecond, abandon: true}) // it stores nothing itself
	eventually(t, "the name of what was deleted is gone", func() bool {
		_, err := stream.GetLastMsgForSubject(t.Context(), "$O.snapshots.M."+base64.URLEncoding.EncodeToString([]byte("shard-0/7-1")))
		return errors.Is(err, jetstream.ErrMsgNotFound)
	})
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

func TestTheLostTailOfAProducerIsToldLikeAGap(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{})
	p := ksuid.New()
	w.send(p, calls("acme", 1))
	w.publish(closing(t, 0, &tollkeeperv1.ControlEntry{Id: p.String(), Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: p.Bytes(), LastNumber: 4}}}))
	r.counts(t, `
# HELP tollkeeper_aggregator_skipped_frames_total Frame numbers that a producer has used and that never came.
# TYPE tollkeeper_aggregator_skipped_frames_total counter
tollkeeper_aggregator_skipped_frames_total 3
`, "tollkeeper_aggregator_skipped_frames_total")
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// closing puts a control entry where gateways may write.
func closing(t *testing.T, shard uint32, e *tollkeeperv1.ControlEntry) *nats.Msg {
	t.Helper()
	data, err := proto.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return ledger.ClosingMessage(shard, data)
}

// A gateway that is mistaken, or somebody's, may close producers. It may not change
// what is counted, and must not stop a shard.
func TestWhatIsNoClosingChangesNothingWhereProducersAreClosed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{})
	p := ksuid.New()
	w.send(p, calls("acme", 1))
	forged := []*tollkeeperv1.ControlEntry{
		{Id: "1", Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: 99, ForeignHorizonMicros: 1}}},
		{Id: "2", Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{Account: "acme", Adjustments: []*tollkeeperv1.Quantity{{Meter: "input_tokens", Value: -10}}}}},
		{Id: "3", Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &tollkeeperv1.PlanSet{Version: "mine"}}},
		{Id: "4", Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: p.Bytes(), LastNumber: 9}}},
	}
	var kept []uint64
	for _, e := range forged {
		kept = append(kept, w.publish(closing(t, 0, e)))
	}
	w.send(p, calls("acme", 1))
	u := w.counted(0, kept[len(kept)-1]+1)
	if u.PlanVersion != "" || u.Total.Admitted != 2 || u.Total.Meters[usage.InputTokens] != 20 || u.Total.Adjusted[usage.InputTokens] != 0 {
		t.Errorf("counted is %+v", u)
	}
	stream, err := w.js.Stream(t.Context(), ledger.DeadLetterStream)
	if err != nil {
		t.Fatal(err)
	}
	for _, seq := range kept {
		eventually(t, "it is kept", func() bool {
			m, err := stream.GetLastMsgForSubject(t.Context(), ledger.DeadLetterSubject(0, seq))
			return err == nil && m.Header.Get(ledger.ReasonHeader) == usage.ReasonMisplaced && m.Header.Get(ledger.OriginHeader) == fmt.Sprint("closings.0 ", seq)
		})
	}
	r.counts(t, `
# HELP tollkeeper_aggregator_dead_letters_total Ledger entries that could not be counted, by reason.
# TYPE tollkeeper_aggregator_dead_letters_total counter
tollkeeper_aggregator_dead_letters_total{reason="misplaced"} 4
`, "tollkeeper_aggregator_dead_letters_total")
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

func TestByItselfItServesItsReadinessAndTheAgeOfItsBeaconsAsMetrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	registry := prometheus.NewRegistry()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{NATS: natsconn.Options{URL: w.server.ClientURL(), Logger: zerolog.Nop()}, Registerer: registry})
	}()
	ready := `
# HELP tollkeeper_component_ready 1 if the component can do its work now, 0 if not.
# TYPE tollkeeper_component_ready gauge
tollkeeper_component_ready{component="aggregator"} 1
tollkeeper_component_ready{component="nats"} 1
`
	eventually(t, "it is ready", func() bool {
		return testutil.GatherAndCompare(registry, strings.NewReader(ready), "tollkeeper_component_ready") == nil
	})
	eventually(t, "its beacons are young", func() bool {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "tollkeeper_aggregator_beacon_age_seconds" {
				return f.GetMetric()[0].GetGauge().GetValue() < 2
			}
		}
		return false
	})
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if families, err := registry.Gather(); err != nil || len(families) != 0 {
		t.Errorf("%d metrics are left, %v", len(families), err)
	}
}
