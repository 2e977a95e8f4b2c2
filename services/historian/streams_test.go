package historian

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/wiretest"
)

func (w *world) publish(subject string, header nats.Header, data []byte) uint64 {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ack, err := w.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Header: header, Data: data})
	if err != nil {
		w.t.Fatal(err)
	}
	return ack.Sequence
}

func TestDecisionsAlertsAndActsAreInTheHistory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	decision := usage.Decision{ID: "d1", Account: "a", LimitID: "free/tokens", Meter: usage.InputTokens, Verdict: usage.Deny, Code: usage.QuotaExceeded, Revision: 41, Shard: 2, Used: 120, Amount: 100,
		Window: usage.Minute, PeriodStart: 1_763_370_000_000_000, PeriodEnd: 1_763_370_060_000_000, PlanVersion: "v1", DecidedAt: 1_763_370_001_000_000, Cause: 1_763_370_000_900_000, Epoch: 3}
	send := func(d usage.Decision) {
		data, err := ledger.MarshalDecision(&d)
		if err != nil {
			t.Fatal(err)
		}
		w.publish("$KV.decisions."+ledger.DecisionKey(d.Shard, d.Account, d.LimitID), nil, data)
	}
	send(decision)
	w.publish("$KV.decisions."+ledger.CheckpointKey(2), nil, []byte("a checkpoint"))
	w.publish("$KV.decisions.2.a.b", nil, []byte("no protobuf\xff"))

	alert := usage.Alert{EpisodeID: "e1", Transition: usage.AlertFiring, N: 1, Rule: "refusals", Scope: "global", Severity: "page", StartedAt: 1_763_370_000_000_000, At: 1_763_370_002_000_000, Value: 0.5, Threshold: 0.2, Refused: 3, Active: 6, Summary: "half of them"}
	body, err := json.Marshal(alert)
	if err != nil {
		t.Fatal(err)
	}
	w.publish("alerts.e1", nil, body)

	act, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Id: "act-1", Author: "somebody", CreatedAtUnixMicros: 1_763_370_000_000_000, Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{Accounts: []*tollkeeperv1.Account{{Id: "a", Plan: "free"}}}}})
	if err != nil {
		t.Fatal(err)
	}
	tick, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	correction, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Id: "act-2", Author: "somebody", CreatedAtUnixMicros: 1_763_370_000_000_000, Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{
		Account: "a", TimeUnixMicros: 1_763_360_000_000_000, Model: "m", Reason: "twice", Reference: "r",
		Adjustments: []*tollkeeperv1.Quantity{{Meter: "calls", Value: -3}, {Meter: "images", Value: 2}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	w.publish(tick.Subject, tick.Header, tick.Data)
	w.publish(act.Subject, act.Header, act.Data)
	refused, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Id: "act-3", Author: "somebody", Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{Account: "a", Reason: "counting refuses it"}}})
	if err != nil {
		t.Fatal(err)
	}
	w.publish(refused.Subject, refused.Header, refused.Data)
	ended := ksuid.New()
	closing, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Id: ended.String(), Author: "gateway", Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: ended.Bytes()}}})
	if err != nil {
		t.Fatal(err)
	}
	closing = ledger.ClosingMessage(1, closing.Data)
	w.publish(closing.Subject, closing.Header, closing.Data)
	// What a gateway may not do is no act either.
	forged := ledger.ClosingMessage(1, correction.Data)
	w.publish(forged.Subject, forged.Header, forged.Data)
	corrected := w.publish(correction.Subject, correction.Header, correction.Data)

	stop := w.start(w.options(), seams{})
	decision.Verdict, decision.Code, decision.Revision, decision.ID = usage.Allow, "", 42, "d2"
	send(decision)
	rows := func(table string) (n uint64) {
		s, err := w.h.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, tab := range s.Tables {
			if tab.Table == table {
				n = tab.Rows
			}
		}
		return n
	}
	for table, want := range map[string]uint64{"decisions": 2, "alerts": 1, "control": 4, "corrections": 1} {
		eventually(t, table+" has "+strconv.FormatUint(want, 10)+" rows", 15*time.Second, func() bool { return rows(table) >= want })
	}
	// A restart brings none of them again.
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	w.start(w.options(), seams{})
	c := newClients(w, 9)
	c.agree()
	for table, want := range map[string]uint64{"decisions": 2, "alerts": 1, "control": 4, "corrections": 1} {
		if n := rows(table); n != want {
			t.Errorf("%s has %d rows, wanted %d", table, n, want)
		}
	}
	got, err := w.h.Decisions(t.Context(), history.DecisionsQuery{Account: "a", Limit: 10})
	if err != nil || len(got) != 2 {
		t.Fatalf("decisions: %v, %v", got, err)
	}
	if got[0].ID != "d2" || got[0].Verdict != usage.Allow || got[1].ID != "d1" || got[1].Verdict != usage.Deny || got[1].Used != 120 || got[1].Cause != 1_763_370_000_900_000 || got[1].PeriodEnd != decision.PeriodEnd {
		t.Errorf("decisions came back as %+v", got)
	}
	corrections, err := w.h.Corrections(t.Context(), history.CorrectionsQuery{Account: "a", Limit: 10})
	if err != nil || len(corrections) != 1 || corrections[0].Sequence != corrected || corrections[0].Time != 1_763_360_000_000_000 || corrections[0].Adjustments["calls"] != -3 || corrections[0].Adjustments["images"] != 2 {
		t.Errorf("corrections came back as %+v, %v", corrections, err)
	}
	alerts, err := w.h.Alerts(t.Context(), 0, 10)
	if err != nil || len(alerts) != 1 || string(alerts[0].Body) != string(body) {
		t.Errorf("alerts came back as %+v, %v", alerts, err)
	}
}

func TestNATSMayGoAndComeBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 10)
	o := w.options()
	w.start(o, seams{})
	for range 2 {
		c.some(15)
		addr, ok := w.nats.Addr().(*net.TCPAddr)
		if !ok {
			t.Fatal(errors.New("no TCP address"))
		}
		w.stopping("NATS", w.nats.Stop)
		eventually(t, "the historian says that NATS is away", 15*time.Second, func() bool { return !o.Readiness.Status().Ready })
		var err error
		if w.nats, err = embednats.Start(t.Context(), embednats.Options{StoreDir: w.dir, Port: addr.Port, Logger: zerolog.Nop()}); err != nil {
			t.Fatal(err)
		}
		again := w.nats
		t.Cleanup(func() { w.stopping("NATS", again.Stop) })
		if w.nc, err = nats.Connect(w.nats.ClientURL()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.nc.Close)
		if w.js, err = jetstream.New(w.nc); err != nil {
			t.Fatal(err)
		}
	}
	c.some(15)
	c.agree()
	eventually(t, "the historian is ready again", 10*time.Second, func() bool { return o.Readiness.Status().Ready })
}

func TestAnotherLedgersHistoryIsNotMixedIn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 11)
	c.some(3)
	stop := w.start(w.options(), seams{})
	c.agree()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	// The ledger is lost and made anew; ClickHouse is the same.
	for name := range w.js.StreamNames(t.Context()).Name() {
		if err := w.js.DeleteStream(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	var fatal *fatalError
	if err := run(t.Context(), w.options(), seams{}); !errors.As(err, &fatal) {
		t.Errorf("a historian began to write a second ledger's history into the first one's tables: %v", err)
	}
}

func TestALedgerThatHasLostItsEndIsNotTakenForTheOldOne(t *testing.T) {
	t.Parallel()
	for name, tear := range map[string]func(b *boundary){
		"it ends before the history does": func(b *boundary) { b.From, b.To = b.To+1, b.To+10 },
		"it has grown again":              func(b *boundary) { b.At -= 1_000_000 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			c := newClients(w, 2)
			c.some(10)
			stop := w.start(w.options(), seams{})
			c.agree()
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			kv, err := w.js.KeyValue(t.Context(), ledger.HistorianBucket)
			if err != nil {
				t.Fatal(err)
			}
			e, err := kv.Get(t.Context(), "calls")
			if err != nil {
				t.Fatal(err)
			}
			var b boundary
			if err := json.Unmarshal(e.Value(), &b); err != nil {
				t.Fatal(err)
			}
			tear(&b)
			data, err := json.Marshal(b)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := kv.Put(t.Context(), "calls", data); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := run(ctx, w.options(), seams{}); !errors.Is(err, ledger.ErrRewound) {
				t.Errorf("the historian says: %v", err)
			}
		})
	}
}

func TestAClickHouseThatIsAwayIsToldThoughNothingIsToBeWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	o := w.options()
	w.start(o, seams{})
	eventually(t, "ready", 20*time.Second, func() bool {
		s := o.Readiness.Status()
		return s.Ready && len(s.Components) > 0
	})
	w.stopping("ClickHouse", w.ch.Stop)
	eventually(t, "it says that ClickHouse is away", 20*time.Second, func() bool { return !o.Readiness.Status().Ready })
}

func TestAStopWhileNATSOrClickHouseSaysNothingTakesLessThanFiveSeconds(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(nats, clickhouse *wiretest.Wire){
		"NATS":       func(n, _ *wiretest.Wire) { n.Cut() },
		"ClickHouse": func(_, c *wiretest.Wire) { c.Cut() },
		"both":       func(n, c *wiretest.Wire) { n.Cut(); c.Cut() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			toNATS, toClickHouse := wiretest.New(t, w.nats.Addr().String()), wiretest.New(t, w.ch.Addr())
			o := w.options()
			o.NATS.URL, o.ClickHouse.Addrs = "nats://"+toNATS.Addr(), []string{toClickHouse.Addr()}
			sent := make(chan struct{}, 100)
			stop := w.start(o, seams{part: func(p part) part { return announced{p, sent} }})
			c := newClients(w, 2)
			c.some(10)
			c.agree()
			cut(toNATS, toClickHouse)
			for len(sent) > 0 {
				<-sent
			}
			c.some(2)
			if name == "ClickHouse" {
				select { // in the middle of an insert
				case <-sent:
				case <-time.After(10 * time.Second):
					t.Error("nothing was sent")
				}
			}
			began := time.Now()
			if err := stop(); err != nil {
				t.Errorf("it stopped with: %v", err)
			}
			if took := time.Since(began); took > 4500*time.Millisecond {
				t.Errorf("the stop took %s", took)
			}
		})
	}
}

// announced tells of every part before it is sent.
type announced struct {
	part
	sent chan struct{}
}

func (a announced) Insert(ctx context.Context, token string) error {
	select {
	case a.sent <- struct{}{}:
	default:
	}
	return a.part.Insert(ctx, token)
}

// One that is reading when the ledger loses what was read says what to do, and says it
// again, more exactly, when that was done.
func TestALedgerThatIsLostWhileItIsReadEndsTheHistory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 2)
	c.some(10)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- run(ctx, w.options(), seams{}) }()
	c.agree()
	if err := w.js.DeleteStream(t.Context(), ledger.Stream); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if !errors.Is(err, ledger.ErrRewound) || !strings.Contains(err.Error(), "start the historian again") {
			t.Errorf("it says: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on")
	}
	if err := run(ctx, w.options(), seams{}); err == nil || !strings.Contains(err.Error(), "to write it anew, or bring back the stream") {
		t.Errorf("started again it says: %v", err)
	}
}
