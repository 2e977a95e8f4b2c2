package aggregator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/anchor"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

// published returns every decision ever published, by id, with how often.
func (w *world) published() map[string]int {
	w.t.Helper()
	out := map[string]int{}
	stream, err := w.js.Stream(w.t.Context(), "KV_"+ledger.DecisionsBucket)
	if err != nil {
		w.t.Fatal(err)
	}
	info := stream.CachedInfo().State
	for seq := info.FirstSeq; seq <= info.LastSeq; seq++ {
		m, err := stream.GetMsg(w.t.Context(), seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			w.t.Fatal(err)
		}
		if strings.HasPrefix(m.Subject, "$KV.decisions.checkpoint.") {
			continue
		}
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			w.t.Fatal(err)
		}
		out[d.ID]++
	}
	return out
}

func (w *world) checkpoint(shard uint32) publish.Checkpoint {
	w.t.Helper()
	at, err := (&anchor.Stores{JS: w.js, Log: zerolog.Nop()}).Position(w.t.Context(), shard)
	if err != nil {
		w.t.Fatal(err)
	}
	return at.Found
}

// traffic sends n frames of calls of many accounts and returns the last
// sequence of each shard and how many calls it was.
func (w *world) traffic(p ksuid.KSUID, accounts, n int, seed uint64) (last map[uint32]uint64, sent int) {
	w.t.Helper()
	last = map[uint32]uint64{}
	r := rand.New(rand.NewPCG(seed, 0))
	for range n {
		cs := calls(fmt.Sprintf("account-%d", r.IntN(accounts)), 1+r.IntN(5))
		last[w.shardOf(cs[0].Account)] = w.send(p, cs)
		sent += len(cs)
	}
	return last, sent
}

func (w *world) accounts(n int) {
	w.t.Helper()
	for i := range n {
		w.account(fmt.Sprintf("account-%d", i), "free")
	}
}

func once(t *testing.T, published map[string]int) {
	t.Helper()
	for id, times := range published {
		if times != 1 {
			t.Errorf("decision %s was published %d times", id, times)
		}
	}
}

func TestARestartFromSnapshotOrFromTheBeginningGivesTheSameStateAndPublishesNothingTwice(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	w.plans("v1", lifetimeLimit(20))
	w.accounts(10)
	p := ksuid.New()
	first := w.run(Options{SnapshotEntries: 50})
	last, _ := w.traffic(p, 10, 120, 1)
	hashes, epochs := map[uint32]string{}, map[uint32]uint64{}
	for shard, seq := range last {
		w.counted(shard, seq)
	}
	for shard := range w.shards {
		u := w.usage(shard)
		hashes[shard], epochs[shard] = u.StateHash, u.Epoch
	}
	if err := first.stop(t); err != nil {
		t.Fatal(err)
	}
	before := w.published()
	once(t, before)
	if len(before) == 0 {
		t.Fatal("nobody was denied: the test says nothing")
	}
	for shard := range w.shards {
		if c := w.checkpoint(shard); c.Snapshot == "" || c.Epoch == 0 {
			t.Errorf("shard %d was stopped cleanly: %+v", shard, c)
		}
	}
	// From the snapshots that the clean stop left.
	second := w.run(Options{})
	for shard := range w.shards {
		if got := w.usage(shard); got.StateHash != hashes[shard] || got.Epoch <= epochs[shard] {
			t.Errorf("shard %d from its snapshot: %s at epoch %d, was %s", shard, got.StateHash, got.Epoch, hashes[shard])
		}
	}
	if err := second.stop(t); err != nil {
		t.Fatal(err)
	}
	// From the ledger's beginning.
	store, err := w.js.ObjectStore(t.Context(), ledger.SnapshotsBucket)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := store.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(objects) != int(w.shards) {
		t.Errorf("%d snapshots are kept of %d shards", len(objects), w.shards)
	}
	for _, o := range objects {
		if err := store.Delete(t.Context(), o.Name); err != nil {
			t.Fatal(err)
		}
	}
	third := w.run(Options{})
	for shard := range w.shards {
		if got := w.usage(shard); got.StateHash != hashes[shard] || got.Epoch <= epochs[shard] {
			t.Errorf("shard %d from the beginning: %s at epoch %d, was %s", shard, got.StateHash, got.Epoch, hashes[shard])
		}
	}
	if err := third.stop(t); err != nil {
		t.Fatal(err)
	}
	if after := w.published(); len(after) != len(before) {
		t.Errorf("%d decisions after the restarts, %d before", len(after), len(before))
	}
	once(t, w.published())
}

func TestACrashBetweenBatchAndSnapshotLosesAndDoublesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	w.plans("v1", lifetimeLimit(15))
	w.accounts(12)
	p := ksuid.New()
	sent := 0
	for round := range 4 {
		r := w.run(Options{SnapshotEntries: 30, abandon: true})
		last, n := w.traffic(p, 12, 40, uint64(round))
		sent += n
		if round%2 == 0 {
			for shard, seq := range last {
				w.counted(shard, seq)
			}
		}
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
	}
	r := w.run(Options{})
	total := int64(0)
	for shard := range w.shards {
		total += w.usage(shard).Total.Admitted
	}
	if total != int64(sent) {
		t.Errorf("counted %d calls, sent %d", total, sent)
	}
	// Every account that has used its quota up was denied once, all others not.
	denied := 0
	for shard := range w.shards {
		var reply ledger.UsageReply
		m, err := w.nc.Request(ledger.UsageSubject(shard), []byte(`{"top":1000}`), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(m.Data, &reply); err != nil {
			t.Fatal(err)
		}
		for _, a := range reply.Accounts {
			if a.Limits[0].Used >= 15 {
				denied++
				w.decided(a.ID, "free/calls", usage.Deny)
			}
		}
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	published := w.published()
	once(t, published)
	if denied == 0 || len(published) != denied {
		t.Errorf("%d accounts are over their quota, %d decisions were published", denied, len(published))
	}
}

func TestWhatCannotBeCountedIsKeptOnceWithItsReason(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	p := ksuid.New()
	broken := w.frame(p, 0, 1, calls("acme", 3))
	broken.Data[len(broken.Data)-9] ^= 1
	bad := map[uint64]string{w.publish(broken): usage.ReasonChecksum}
	unknown := w.frame(p, 0, 1, calls("acme", 3))
	unknown.Header.Set(ledger.CodecHeader, "parchment.v1")
	bad[w.publish(unknown)] = usage.ReasonUnknownSchema
	bad[w.publish(w.frame(p, 0, 1, []usage.Call{{Time: 5, Account: "acme"}}))] = usage.ReasonAbsurdTime
	bad[w.control(0, &tollkeeperv1.ControlEntry{})] = usage.ReasonUnknownSchema
	bad[w.control(0, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{
		Accounts: []*tollkeeperv1.Account{{Id: "x", Parent: "x"}},
	}}})] = usage.ReasonMalformed
	// Two currencies are not added: one would come to 20e9.
	event := func(currency string) *nats.Msg {
		data := fmt.Sprintf(`{"specversion":"1.0","type":%q,"source":"rater","id":%q,"subject":"acme","time":%q,"data":{"meters":{"cost":10000000000},"currency":%q}}`,
			ledger.CloudEventType, currency, time.Now().UTC().Format(time.RFC3339), currency)
		return &nats.Msg{Subject: ledger.CallsSubject(0), Header: nats.Header{ledger.CodecHeader: {ledger.CodecCloudEvent}}, Data: []byte(data)}
	}
	w.publish(event("USD"))
	bad[w.publish(event("EUR"))] = usage.ReasonWrongCurrency
	good := w.send(p, calls("acme", 3))
	for range 2 { // the second time from the beginning, because of the crash
		r := w.run(Options{abandon: true})
		if u := w.counted(0, good); u.Total.Admitted != 4 || u.Total.Meters[usage.Cost] != 10_000_000_000 {
			t.Errorf("counted %d calls, a cost of %d", u.Total.Admitted, u.Total.Meters[usage.Cost])
		}
		stream, err := w.js.Stream(t.Context(), ledger.DeadLetterStream)
		if err != nil {
			t.Fatal(err)
		}
		for seq, reason := range bad {
			var m *jetstream.RawStreamMsg
			eventually(t, fmt.Sprintf("entry %d is kept", seq), func() bool {
				m, err = stream.GetLastMsgForSubject(t.Context(), ledger.DeadLetterSubject(0, seq))
				return err == nil
			})
			if got := m.Header.Get(ledger.ReasonHeader); got != reason || m.Header.Get(ledger.DetailHeader) == "" {
				t.Errorf("entry %d: reason %q, want %q; %v", seq, got, reason, m.Header)
			}
		}
		info, err := stream.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if info.State.Msgs != uint64(len(bad)) || info.State.LastSeq != uint64(len(bad)) {
			t.Errorf("%d dead letters, %d written, want %d", info.State.Msgs, info.State.LastSeq, len(bad))
		}
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFrameThatIsSentTwiceIsCountedOnceAndAGapIsSeen(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{})
	p := ksuid.New()
	w.publish(w.frame(p, 0, 1, calls("acme", 3)))
	w.publish(w.frame(p, 0, 1, calls("acme", 3)))
	foreign := calls("acme", 1)
	foreign[0].Source, foreign[0].EventID = "https://example.com/app", "42"
	w.publish(w.frame(ksuid.Nil, 0, 0, foreign))
	w.publish(w.frame(ksuid.Nil, 0, 0, foreign))
	last := w.publish(w.frame(p, 0, 4, calls("acme", 5)))
	if u := w.counted(0, last); u.Total.Admitted != 9 {
		t.Errorf("counted %d calls, want 9", u.Total.Admitted)
	}
	r.counts(t, `
# HELP tollkeeper_aggregator_events_total Calls by what became of them: admitted and refused are counted, duplicate was counted before.
# TYPE tollkeeper_aggregator_events_total counter
tollkeeper_aggregator_events_total{outcome="admitted"} 9
tollkeeper_aggregator_events_total{outcome="duplicate"} 4
tollkeeper_aggregator_events_total{outcome="refused"} 0
# HELP tollkeeper_aggregator_skipped_frames_total Frame numbers that a producer has used and that never came.
# TYPE tollkeeper_aggregator_skipped_frames_total counter
tollkeeper_aggregator_skipped_frames_total 2
`, "tollkeeper_aggregator_events_total", "tollkeeper_aggregator_skipped_frames_total")
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

func (r *running) counts(t *testing.T, want string, names ...string) {
	t.Helper()
	var err error
	defer func() {
		if t.Failed() {
			t.Log(err)
		}
	}()
	eventually(t, "the metrics say so", func() bool {
		err = testutil.GatherAndCompare(r.registry, strings.NewReader(want), names...)
		return err == nil
	})
}

func TestBeaconsSayHowFarTheShardIs(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	beacons := make(chan *nats.Msg, 64)
	sub, err := w.nc.ChanSubscribe(ledger.AllBeacons, beacons)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	w.plans("v1", lifetimeLimit(1))
	w.account("acme", "free")
	r := w.run(Options{})
	seq := w.send(ksuid.New(), calls("acme", 1))
	deadline := time.After(10 * time.Second)
	for {
		var b tollkeeperv1.Beacon
		select {
		case m := <-beacons:
			if err := proto.Unmarshal(m.Data, &b); err != nil {
				t.Fatal(err)
			}
		case <-deadline:
			t.Fatal("no beacon has it")
		}
		stream, err := w.js.Stream(t.Context(), "KV_"+ledger.DecisionsBucket)
		if err != nil {
			t.Fatal(err)
		}
		if b.GetLedgerSequence() >= seq && b.GetDecisionsSequence() == stream.CachedInfo().State.LastSeq {
			if b.GetEpoch() != w.checkpoint(0).Epoch || b.GetStreamTimeUnixMicros() == 0 {
				t.Errorf("got %v", &b)
			}
			break
		}
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// What is due at a moment happens without traffic: the owner lets time pass.
func TestATimerIsDueWithoutTraffic(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	w.plans("v1", lifetimeLimit(10))
	w.account("acme", "free")
	w.send(ksuid.New(), calls("acme", 5))
	r := w.run(Options{})
	at := usage.At(time.Now().Add(300 * time.Millisecond))
	plan := ledger.PlanToProto(&usage.Plan{ID: "free", Limits: []usage.Limit{lifetimeLimit(5)}})
	w.control(0, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &tollkeeperv1.PlanSet{
		Version: "v2", EffectiveAtUnixMicros: int64(at), Plans: []*tollkeeperv1.Plan{plan},
	}}})
	d := w.decided("acme", "free/calls", usage.Deny)
	if d.DecidedAt < at || d.DecidedAt > at+1_500_000 || d.PlanVersion != "v2" || d.Cause != 0 {
		t.Errorf("due at %d, decided %+v", at, d)
	}
	r.counts(t, `
# HELP tollkeeper_aggregator_ticks_total Entries appended so that time passes without traffic.
# TYPE tollkeeper_aggregator_ticks_total counter
tollkeeper_aggregator_ticks_total 1
`, "tollkeeper_aggregator_ticks_total")
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

const childEnv, memberEnv = "TOLLKEEPER_TEST_AGGREGATOR", "TOLLKEEPER_TEST_MEMBER"

// quick is a fleet that shares soon; how it finds out who is dead is as it is.
var quick = fleet.Timing{Settle: 100 * time.Millisecond, Dwell: 200 * time.Millisecond}

func TestMain(m *testing.M) {
	if url := os.Getenv(childEnv); url != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		o := Options{
			NATS: natsconn.Options{URL: url, Logger: zerolog.Nop()}, Member: "alone", Sole: true, SnapshotEntries: 40, Registerer: prometheus.NewRegistry(),
			Logger: zerolog.New(os.Stderr).With().Timestamp().Logger(), timing: quick,
		}
		if member := os.Getenv(memberEnv); member != "" {
			o.Member, o.Sole = member, false
		}
		if err := Run(ctx, o); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	leakFree(m)
}

func TestKilledAtAnyMomentItCountsEveryCallOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	w.plans("v1", lifetimeLimit(40))
	w.accounts(8)
	p := ksuid.New()
	sent, last := 0, map[uint32]uint64{}
	for round := range 5 {
		before := w.checkpoint(1).Epoch
		child := exec.CommandContext(t.Context(), os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+w.server.ClientURL())
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		// Killed while it counts what it finds, or what is sent to it.
		if round > 0 {
			eventually(t, "the child owns the shards", func() bool { return w.checkpoint(1).Epoch > before })
		}
		l, n := w.traffic(p, 8, 30+10*round, uint64(round))
		sent += n
		for shard, seq := range l {
			last[shard] = seq
		}
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait() // killed, which is what was wanted
	}
	r := w.run(Options{})
	total := int64(0)
	for shard := range w.shards {
		total += w.counted(shard, last[shard]).Total.Admitted
	}
	if total != int64(sent) {
		t.Errorf("counted %d calls, sent %d", total, sent)
	}
	for i := range 8 {
		id := fmt.Sprintf("account-%d", i)
		if u := w.usage(w.shardOf(id), id); u.Accounts[0].Limits[0].Used >= 40 {
			w.decided(id, "free/calls", usage.Deny)
		}
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	once(t, w.published())
}

func TestAnEntryThatDeniesThousandsIsPublishedInSeveralBatches(t *testing.T) {
	t.Parallel()
	const n = 2500
	w := newWorld(t, 1, time.Minute)
	var accounts []*tollkeeperv1.Account
	for i := range n {
		accounts = append(accounts, &tollkeeperv1.Account{Id: fmt.Sprintf("account-%d", i), Plan: "free"})
	}
	w.control(0, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{Accounts: accounts}}})
	r := w.run(Options{})
	w.plans("v1", lifetimeLimit(0))
	w.decided("account-2499", "free/calls", usage.Deny)
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	published := w.published()
	if len(published) != n {
		t.Errorf("%d decisions of %d", len(published), n)
	}
	once(t, published)
	// Accounts, the version of the rules, and the plans.
	if c := w.checkpoint(0); c.Sequence != 3 {
		t.Errorf("got %+v", c)
	}
}

func TestNATSGoesAwayAndComesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	w.plans("v1", lifetimeLimit(10))
	w.account("acme", "free")
	r := w.run(Options{SnapshotEntries: 3})
	p := ksuid.New()
	w.counted(0, w.send(p, calls("acme", 9)))
	for range 2 {
		w.restartServer()
	}
	// IsConnected would be true also as long as the end of the old connection is not noticed.
	eventually(t, "the test is connected again", func() bool { return w.nc.FlushTimeout(time.Second) == nil })
	seq := w.send(p, calls("acme", 3))
	if d := w.decided("acme", "free/calls", usage.Deny); d.Used != 12 || d.Revision != seq {
		t.Errorf("got %+v", d)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	once(t, w.published())
}

func TestADeadLetterThatIsTooLargeIsKeptInPart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{})
	m := &nats.Msg{Subject: ledger.CallsSubject(0), Data: bytes.Repeat([]byte("x"), 1<<20-40), Header: nats.Header{}}
	m.Header.Set("A", "b")
	seq := w.publish(m)
	stream, err := w.js.Stream(t.Context(), ledger.DeadLetterStream)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is kept", func() bool {
		d, err := stream.GetLastMsgForSubject(t.Context(), ledger.DeadLetterSubject(0, seq))
		return err == nil && len(d.Data) > 1<<18 && d.Header.Get("Tollkeeper-Truncated") == strconv.Itoa(1<<20-40)
	})
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

func TestALedgerThatHasLostWhatWasCountedIsNotCountedOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	last := w.send(ksuid.New(), calls("acme", 3))
	r := w.run(Options{})
	w.counted(0, last)
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	if err := w.js.DeleteStream(t.Context(), ledger.Stream); err != nil {
		t.Fatal(err)
	}
	err := Run(t.Context(), Options{NATS: natsconn.Options{URL: w.server.ClientURL(), Logger: zerolog.Nop()}})
	if !errors.Is(err, ledger.ErrRewound) {
		t.Errorf("got %v", err)
	}
	w.remedied(err)
}

// One that is counting when the ledger is lost says the same.
func TestALedgerThatIsLostWhileItIsCountedEndsTheCounting(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	last := w.send(ksuid.New(), calls("acme", 3))
	r := w.run(Options{})
	w.counted(0, last)
	if err := w.js.DeleteStream(t.Context(), ledger.Stream); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: 1}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-r.done:
		if !errors.Is(err, ledger.ErrRewound) {
			t.Errorf("got %v", err)
		}
		w.remedied(err)
	case <-time.After(20 * time.Second):
		t.Fatal("it counts on")
	}
}

// remedied does what the error says, and sees that it is counted again.
func (w *world) remedied(err error) {
	t := w.t
	t.Helper()
	if !strings.Contains(err.Error(), "delete the key-value bucket decisions and the object bucket snapshots and start again") {
		t.Fatalf("it does not say what to do: %v", err)
	}
	if err := w.js.DeleteKeyValue(t.Context(), ledger.DecisionsBucket); err != nil {
		t.Fatal(err)
	}
	if err := w.js.DeleteObjectStore(t.Context(), ledger.SnapshotsBucket); err != nil {
		t.Fatal(err)
	}
	r := w.run(Options{})
	w.counted(0, w.send(ksuid.New(), calls("acme", 2)))
	if u := w.usage(0, "acme"); len(u.Accounts) != 1 || u.Total.Admitted != 2 {
		t.Errorf("counted anew: %+v", u)
	}
	if err := r.stop(w.t); err != nil {
		t.Error(err)
	}
}

func TestItStopsInTimeAlthoughNATSIsAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, time.Minute)
	w.plans("v1", lifetimeLimit(10))
	r := w.run(Options{StopTimeout: 300 * time.Millisecond})
	w.counted(0, w.usage(0).Sequence)
	w.stopServer()
	begin := time.Now()
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestUsageQueriesSayWhatIsWrongWithThem(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	r := w.run(Options{})
	for _, q := range []string{"{", `{"top":1001}`, `{"top":-1}`} {
		m, err := w.nc.Request(ledger.UsageSubject(0), []byte(q), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if m.Header.Get(ledger.ErrorCodeHeader) != "400" || m.Header.Get(ledger.ErrorHeader) == "" {
			t.Errorf("%s: %v", q, m.Header)
		}
	}
	if u := w.usage(0, "nobody"); len(u.Accounts) != 0 || u.StateHash == "" || u.Total.Meters == nil {
		t.Errorf("got %+v", u)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}
