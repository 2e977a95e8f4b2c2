package auditor

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/gate/claims"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

const testShards = 2

// world is a real NATS with a ledger, a gateway's outbox, and counters that do
// what the test says.
type world struct {
	t   *testing.T
	url string
	nc  *nats.Conn
	js  jetstream.JetStream

	mu       sync.Mutex
	counters []*quota.Shard // as of the ledger's entry
	folded   uint64
	lie      map[string]func(*ledger.Totals) // what they say wrongly of an account

	overdue time.Duration // of the auditor's options
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, url: s.ClientURL(), lie: map[string]func(*ledger.Totals){}}
	if w.nc, err = nats.Connect(w.url); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.nc.Close)
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
	w.anew()
	for shard := range uint32(testShards) {
		if _, err := w.nc.Subscribe(ledger.UsageSubject(shard), func(m *nats.Msg) { w.answer(shard, m) }); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// anew has the counters of an empty ledger.
func (w *world) anew() {
	w.counters, w.folded = nil, 0
	for shard := range uint32(testShards) {
		w.counters = append(w.counters, quota.New(quota.Options{Shard: shard}))
	}
}

// count folds what is new in the ledger.
func (w *world) count(ctx context.Context) error {
	stream, err := w.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return err
	}
	var d fold.Decoder
	for last := stream.CachedInfo().State.LastSeq; w.folded < last; {
		m, err := stream.GetMsg(ctx, w.folded+1)
		if err != nil {
			return err
		}
		w.folded++
		_, shard, err := ledger.ParseSubject(m.Subject)
		if err != nil {
			return err
		}
		e, _, err := d.Decode(&ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: m.Sequence, Time: m.Time})
		if err != nil {
			return err
		}
		w.counters[shard].Apply(e)
	}
	return nil
}

func (w *world) answer(shard uint32, m *nats.Msg) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var q ledger.UsageRequest
	if err := json.Unmarshal(m.Data, &q); err != nil || !q.TotalsOnly {
		w.t.Errorf("asked for %s: %v", m.Data, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.count(ctx); err != nil {
		return // the test is over, or makes the ledger anew
	}
	told := func(t quota.Totals) ledger.Totals {
		return ledger.Totals{Admitted: t.Admitted, Refused: t.Refused, Meters: t.Meters, Adjusted: t.Adjusted, Hash: t.Hash}
	}
	r := ledger.UsageReply{Shard: shard, Sequence: w.folded, Total: told(w.counters[shard].Total())}
	for id, lie := range w.lie {
		if _, known := w.counters[shard].Account(id); known {
			lie(&r.Total)
		}
	}
	for _, id := range q.Accounts {
		u, known := w.counters[shard].Account(id)
		if !known {
			continue
		}
		own := told(u.Own)
		if lie := w.lie[id]; lie != nil {
			lie(&own)
		}
		r.Accounts = append(r.Accounts, ledger.AccountUsage{ID: id, Own: own})
	}
	data, err := json.Marshal(&r)
	if err != nil {
		w.t.Error(err)
	}
	_ = m.Respond(data) // the test may be over
}

// call adds calls to an outbox and waits until the ledger has them.
func (w *world) call(box *claims.Outbox, shard uint32, accounts ...string) {
	w.t.Helper()
	for _, id := range accounts {
		if err := box.Add(w.t.Context(), shard, &usage.Call{Time: usage.At(time.Now()), Account: id, Status: 200}); err != nil {
			w.t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	if err := box.Flush(ctx); err != nil {
		w.t.Fatal(err)
	}
}

// lies has the counters say something wrong of an account; nil: the truth.
func (w *world) lies(account string, lie func(*ledger.Totals)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.lie, account)
	if lie != nil {
		w.lie[account] = lie
	}
}

// outbox opens a gateway's outbox; close closes it.
func (w *world) outbox(dir string) (box *claims.Outbox, end func()) {
	w.t.Helper()
	box, err := claims.Open(outbox.Options{NATS: w.nc, Shards: testShards, Gateway: "gw", SpoolDir: dir, Logger: zerolog.Nop()},
		claims.Options{JetStream: w.js, Every: 50 * time.Millisecond})
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- box.Run(context.Background()) }()
	return box, func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := box.Close(ctx); err != nil {
			w.t.Error(err)
		}
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

func (w *world) start() (registry *prometheus.Registry, stop func()) {
	registry = telemetry.NewRegistry()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{
			NATS: natsconn.Options{URL: w.url}, Logger: zerolog.New(zerolog.NewTestWriter(w.t)).Level(zerolog.WarnLevel), Registerer: registry,
			Every: 50 * time.Millisecond, Unclaimed: 2 * time.Second, Overdue: w.overdue, SaveEvery: 100 * time.Millisecond,
		})
	}()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				w.t.Errorf("auditor: %v", err)
			}
		})
	}
	w.t.Cleanup(stop)
	return registry, stop
}

func (w *world) until(what string, ok func(*Status) bool) *Status {
	w.t.Helper()
	end := time.After(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var s Status
	for {
		kv, err := w.js.KeyValue(w.t.Context(), ledger.AuditBucket)
		if err != nil {
			w.t.Fatal(err)
		}
		if e, err := kv.Get(w.t.Context(), ledger.AuditStatusKey); err == nil {
			s = Status{}
			if err := json.Unmarshal(e.Value(), &s); err != nil {
				w.t.Fatal(err)
			}
			if ok(&s) {
				return &s
			}
		}
		select {
		case <-tick.C:
		case <-end:
			text, _ := json.Marshal(s)
			w.t.Fatalf("not within 20 s: %s; last: %s", what, text)
		}
	}
}

// Counters that have too many calls of an account are found, with the minute, told
// in metrics, and healed when they agree again; the auditor is restarted in the
// middle of it.
func TestCountersThatLieAreFound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	box, end := w.outbox("")
	defer end()
	w.call(box, 0, "acme", "globex", "acme")
	w.call(box, 1, "initech")
	_, stop := w.start()
	s := w.until("all is compared and agrees", func(s *Status) bool { return s.CheckedAccounts >= 3 && s.Claimed == 4 })
	if s.Open != 0 || s.Unclaimed != 0 {
		t.Fatalf("healthy calls: %+v", s)
	}
	stop()

	minute := audit.MinuteOf(usage.At(time.Now()))
	w.call(box, 0, "globex")
	w.lies("globex", func(t *ledger.Totals) { t.Admitted++ })
	registry, _ := w.start()
	s = w.until("the finding", func(s *Status) bool { return s.Open == 1 })
	f := s.Findings[0]
	if f.Pair != "ledger-counters" || f.Kind != audit.Double || f.Account != "globex" || f.Minute/60-int64(minute) > 1 || !strings.Contains(f.Text, "+1 calls") {
		t.Errorf("found: %+v", f)
	}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(`# HELP tollkeeper_audit_finding 1 for each of the few newest findings that hold now; the others are only counted.
# TYPE tollkeeper_audit_finding gauge
tollkeeper_audit_finding{account="globex",kind="double",minute="`+f.MinuteText+`",pair="ledger-counters"} 1
`), "tollkeeper_audit_finding"); err != nil {
		t.Error(err)
	}
	w.lies("globex", nil)
	w.call(box, 0, "globex")
	w.until("it heals", func(s *Status) bool { return s.Open == 0 && len(s.Findings) == 1 && !s.Findings[0].Open() })
	// Of an account that does not call it is found too.
	w.lies("initech", func(t *ledger.Totals) { t.Admitted-- })
	s = w.until("the other finding", func(s *Status) bool { return s.Open == 1 })
	if f := s.Findings[0]; f.Account != "initech" || f.Kind != audit.Gap {
		t.Errorf("found: %+v", f)
	}
	w.lies("initech", nil)
	w.until("that heals, too", func(s *Status) bool { return s.Open == 0 })
	// As many calls with the same sums may be others: only the hash tells.
	w.lies("acme", func(t *ledger.Totals) { t.Hash++ })
	s = w.until("the finding of other calls", func(s *Status) bool { return s.Open == 1 })
	if f := s.Findings[0]; f.Account != "acme" || f.Kind != audit.Other || f.Pair != "ledger-counters" || !strings.Contains(f.Text, "the same number and sums of other calls") {
		t.Errorf("found: %+v", f)
	}
}

// A gateway that is killed leaves its spool: the next one sends and claims what
// was in it. What it had sent and not claimed is unclaimed, nothing is a gap.
func TestAKilledGatewaysSpoolIsClaimedByTheNext(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	dir := t.TempDir()
	w.start()
	first, end := w.outbox(dir)
	w.call(first, 0, "acme")
	end()
	// A second one writes to its spool while its connection is away, and dies.
	away, err := nats.Connect(w.url)
	if err != nil {
		t.Fatal(err)
	}
	away.Close()
	js, err := jetstream.New(away)
	if err != nil {
		t.Fatal(err)
	}
	dead, err := claims.Open(outbox.Options{NATS: w.nc, Shards: testShards, SpoolDir: dir, Logger: zerolog.Nop()}, claims.Options{JetStream: js})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := dead.Add(t.Context(), 0, &usage.Call{Time: usage.At(time.Now()), Account: "globex", Status: 200}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // it may only spool
	if err := dead.Close(ctx); err != nil {
		t.Fatal(err)
	}
	_, end = w.outbox(dir)
	defer end()
	s := w.until("what was spooled is sent and claimed", func(s *Status) bool { return s.Calls == 4 && s.Claimed == 4 })
	if s.Open != 0 || s.Unclaimed != 0 || s.LateClaims != 0 {
		t.Errorf("%+v", s)
	}
}

// A gap that was told heals by the frame that comes while the auditor is away, also where
// the books from before it are what is left.
func TestATellingThatOutlivesTheBooksHeals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.overdue = 100 * time.Millisecond
	p := ksuid.New()
	call := usage.Call{Time: usage.At(time.Now()), Account: "acme", Status: 200}
	var b ledger.Builder
	b.Add(&call)
	sealed := usage.At(time.Now())
	frame := b.Seal(ledger.Header{Producer: p, Shard: 1, Number: 1, SealedAt: sealed})
	lane := audit.NewLane(p.String(), 1, 100)
	lane.Add(1, &call)
	lane.Seal(sealed)
	for _, data := range audit.Encode(dedup.Producer(p), 1, lane.Take()) {
		if _, err := w.js.Publish(t.Context(), ledger.ClaimSubject(p.String()), data); err != nil {
			t.Fatal(err)
		}
	}
	_, stop := w.start()
	w.until("the frame is missing", func(s *Status) bool { return s.Open == 1 })
	stop()
	objects, err := w.js.ObjectStore(t.Context(), ledger.BooksBucket)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"books.0", "books.1"} {
		if err := objects.Delete(t.Context(), name); err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
			t.Fatal(err)
		}
	}
	if _, err := w.js.PublishMsg(t.Context(), ledger.FrameMessage(1, frame)); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.until("it came", func(s *Status) bool { return s.Open == 0 && s.Claimed == 1 })
}

// Somebody sends frames and claims nothing: they are told, and are no finding.
func TestFramesThatNobodyClaimsAreToldAndNoFinding(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start()
	p := ksuid.New()
	var b ledger.Builder
	b.Add(&usage.Call{Time: usage.At(time.Now()), Account: "acme", Status: 200})
	if _, err := w.js.PublishMsg(t.Context(), ledger.FrameMessage(1, b.Seal(ledger.Header{Producer: p, Shard: 1, Number: 1, SealedAt: usage.At(time.Now())}))); err != nil {
		t.Fatal(err)
	}
	s := w.until("it is unclaimed", func(s *Status) bool { return s.Unclaimed == 1 })
	if s.Open != 0 || s.Calls != 1 {
		t.Errorf("%+v", s)
	}
}

// The ledger is made anew, and grows again: the books are too.
func TestALedgerThatIsMadeAnewIsAuditedFromItsBeginning(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	box, end := w.outbox("")
	w.call(box, 0, "acme", "acme", "globex")
	w.start()
	w.until("it is audited", func(s *Status) bool { return s.CheckedAccounts >= 2 })
	end()
	if err := w.js.DeleteStream(t.Context(), ledger.Stream); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.anew()
	w.mu.Unlock()
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
	box, end = w.outbox("")
	defer end()
	w.call(box, 0, "initech")
	s := w.until("the new one is audited", func(s *Status) bool { return s.Calls == 1 && s.Claimed == 1 && s.CheckedAccounts >= 1 })
	if !s.Whole || s.Position == 0 {
		t.Errorf("%+v", s)
	}
}

// What other rules count is not compared by ours, neither for agreement nor for a gap;
// a restart comes no further.
func TestTheAuditEndsWhereNewerRulesBegin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	box, end := w.outbox(t.TempDir())
	defer end()
	w.call(box, 0, "acme", "acme")
	_, stop := w.start()
	w.until("it is audited", func(s *Status) bool { return s.Calls == 2 && s.Claimed == 2 && s.CheckedAccounts >= 1 })
	rules, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Id: "upgrade", Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: quota.CoreVersion + 1, ForeignHorizonMicros: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	ack, err := w.js.PublishMsg(t.Context(), rules)
	if err != nil {
		t.Fatal(err)
	}
	w.call(box, 0, "acme")
	over := func(s *Status) bool {
		for _, p := range s.Points {
			if p.OK || !strings.Contains(p.Detail, "run a newer version") {
				return false
			}
		}
		return len(s.Points) == 3
	}
	for range 2 {
		s := w.until("it says to run a newer version", over)
		if s.Position >= ack.Sequence || s.Calls != 2 || s.Open != 0 {
			t.Errorf("%+v", s)
		}
		stop()
		kv, err := w.js.KeyValue(t.Context(), ledger.AuditBucket)
		if err != nil {
			t.Fatal(err)
		}
		if err := kv.Purge(t.Context(), ledger.AuditStatusKey); err != nil {
			t.Fatal(err)
		}
		_, stop = w.start()
	}
}
