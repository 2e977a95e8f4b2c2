package tollkeeper_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/auditor"
	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
)

// audited is a whole Tollkeeper in this process, under demo traffic, audited often.
type audited struct {
	t    *testing.T
	dir  string
	stop func()
	addr tollkeeper.Addresses
	nc   *nats.Conn
	js   jetstream.JetStream
	ch   driver.Conn
}

func startAudited(t *testing.T, dir string) *audited {
	t.Helper()
	w := &audited{t: t, dir: dir}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan tollkeeper.Addresses, 1), make(chan error, 1)
	go func() {
		done <- tollkeeper.Run(ctx, tollkeeper.Options{
			Engines:   engine.Options{DataDir: dir, NATSListen: "127.0.0.1:0", ClickHouseListen: "127.0.0.1:0", ClickHouseHTTPListen: "127.0.0.1:0", Logger: zerolog.Nop()},
			APIListen: "127.0.0.1:0", Gateway: &gateway.Options{Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0"},
			Auditor: auditor.Options{Every: 200 * time.Millisecond, Again: 5 * time.Second, Overdue: 2 * time.Second, Unclaimed: time.Minute, SaveEvery: 300 * time.Millisecond},
			Demo:    true, DemoSeed: 402, Logger: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.ErrorLevel), Ready: func(a tollkeeper.Addresses) { ready <- a },
		})
	}()
	stopped := false
	w.stop = func() {
		if stopped {
			return
		}
		stopped = true
		if w.nc != nil {
			w.nc.Close()
		}
		if w.ch != nil {
			_ = w.ch.Close()
		}
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("tollkeeper: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("tollkeeper did not stop")
		}
	}
	t.Cleanup(w.stop)
	select {
	case w.addr = <-ready:
	case err := <-done:
		done <- nil
		t.Fatalf("tollkeeper did not start: %v", err)
	case <-time.After(time.Minute):
		t.Fatal("tollkeeper did not start within a minute")
	}
	var err error
	if w.nc, err = nats.Connect(w.addr.NATS); err != nil {
		t.Fatal(err)
	}
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	o := w.addr.ClickHouseOptions
	if w.ch, err = clickhouse.Open(&clickhouse.Options{Addr: o.Addrs, Auth: clickhouse.Auth{Database: o.Database, Username: o.User, Password: o.Password}}); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *audited) status() (s auditor.Status) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	kv, err := w.js.KeyValue(ctx, ledger.AuditBucket)
	if err != nil {
		return s
	}
	e, err := kv.Get(ctx, ledger.AuditStatusKey)
	if err != nil {
		return s
	}
	if err := json.Unmarshal(e.Value(), &s); err != nil {
		w.t.Error(err)
	}
	return s
}

func (w *audited) until(what string, ok func(*auditor.Status) bool) auditor.Status {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var s auditor.Status
	eventually(ctx, w.t, what, func() (bool, string) {
		s = w.status()
		text, _ := json.Marshal(s)
		return ok(&s), string(text)
	})
	return s
}

// finds waits for an open finding and compares what it says.
func (w *audited) finds(pair, kind, account string, minute audit.Minute) string {
	w.t.Helper()
	id := ""
	w.until(fmt.Sprintf("a %s between %s for %s in %s", kind, pair, account, minute), func(s *auditor.Status) bool {
		for _, f := range s.Findings {
			if f.Open() && string(f.Pair) == pair && string(f.Kind) == kind && f.Account == account && f.Minute == int64(minute)*60 {
				if !strings.Contains(f.Text, account) || !strings.Contains(f.Text, minute.String()) {
					w.t.Errorf("its text is %q", f.Text)
				}
				id = f.ID
				return true
			}
		}
		return false
	})
	return id
}

func (w *audited) resolved(id string) {
	w.t.Helper()
	w.until("finding "+id+" is resolved", func(s *auditor.Status) bool {
		for _, f := range s.Findings {
			if f.ID == id {
				return !f.Open()
			}
		}
		return false
	})
}

func (w *audited) exec(sql string, args ...any) {
	w.t.Helper()
	if err := w.ch.Exec(w.t.Context(), sql, args...); err != nil {
		w.t.Fatal(err)
	}
}

// row returns the newest row of the history.
func (w *audited) row() (account string, minute audit.Minute, sequence uint64, row uint16) {
	w.t.Helper()
	var seconds uint32
	err := w.ch.QueryRow(w.t.Context(), "SELECT account, toUnixTimestamp(frame_minute), sequence, row FROM calls ORDER BY sequence DESC, row DESC LIMIT 1").Scan(&account, &seconds, &sequence, &row)
	if err != nil {
		w.t.Fatal(err)
	}
	return account, audit.Minute(seconds / 60), sequence, row
}

// frame sends a frame of a producer of the test's own.
func (w *audited) frame(p ksuid.KSUID, shard uint32, number uint64, at usage.Micros, accounts ...string) {
	w.t.Helper()
	var b ledger.Builder
	for _, a := range accounts {
		b.Add(&usage.Call{Time: at, Account: a, Status: 200})
	}
	if _, err := w.js.PublishMsg(w.t.Context(), ledger.FrameMessage(shard, b.Seal(ledger.Header{Producer: p, Shard: shard, Number: number, Gateway: "test", SealedAt: at}))); err != nil {
		w.t.Fatal(err)
	}
}

// claim claims frames of it; each account is a call in a frame of its own.
func (w *audited) claim(p ksuid.KSUID, message uint64, shard uint32, from uint64, at usage.Micros, accounts ...string) {
	w.t.Helper()
	l := audit.NewLane(p.String(), shard, 100)
	for i, a := range accounts {
		l.Add(from+uint64(i), &usage.Call{Time: at, Account: a, Status: 200})
		l.Seal(at)
	}
	for _, data := range audit.Encode(dedup.Producer(p), message, l.Take()) {
		if _, err := w.js.Publish(w.t.Context(), ledger.ClaimSubject(p.String()), data); err != nil {
			w.t.Fatal(err)
		}
	}
}

// Every hop loses and doubles calls on purpose, under healthy traffic, and the
// audit says where, which minute and which account; healthy traffic gives nothing.
func TestTheAuditFindsWhatIsLostOrDoubledAtEveryHop(t *testing.T) {
	t.Parallel()
	w := startAudited(t, t.TempDir())
	healthy := w.until("healthy traffic is compared at all points", func(s *auditor.Status) bool {
		return s.Claimed > 50 && s.CheckedCells > 50 && s.CheckedAccounts > 50 && s.CheckedMinutes > 5
	})
	if len(healthy.Findings) > 0 || healthy.Unclaimed > 0 || healthy.LateClaims > 0 {
		t.Fatalf("healthy traffic: %+v", healthy)
	}
	for _, p := range healthy.Points {
		if !p.OK {
			t.Errorf("not compared: %+v", p)
		}
	}

	// ClickHouse: a row is deleted, and heals when it comes back.
	account, minute, sequence, row := w.row()
	w.exec("CREATE TABLE lost ENGINE = Memory AS SELECT * FROM calls WHERE sequence = ? AND row = ?", sequence, row)
	w.exec("ALTER TABLE calls DELETE WHERE sequence = ? AND row = ? SETTINGS mutations_sync = 1", sequence, row)
	gap := w.finds("ledger-history", "gap", account, minute)
	w.exec("INSERT INTO calls SELECT * FROM lost")
	w.resolved(gap)
	// One is there twice; a new one, which is still to be compared again.
	account, minute, sequence, row = w.row()
	w.exec("INSERT INTO calls SELECT * FROM calls WHERE sequence = ? AND row = ? SETTINGS insert_deduplicate = 0", sequence, row)
	w.finds("ledger-history", "double", account, minute)

	// Gateway: a claimed frame does not come, and comes late after all.
	p, at := ksuid.New(), usage.At(time.Now().Add(-5*time.Minute))
	shard := uint32(1)
	w.claim(p, 1, shard, 1, at, "acme", "globex")
	w.frame(p, shard, 1, at, "acme")
	gap = w.finds("gateway-ledger", "gap", "globex", audit.MinuteOf(at))
	w.frame(p, shard, 2, at, "globex")
	w.resolved(gap)
	// A frame is left out for good.
	w.claim(p, 2, shard, 3, at, "initech", "acme")
	w.frame(p, shard, 4, at, "acme")
	w.finds("gateway-ledger", "gap", "initech", audit.MinuteOf(at))
	// The ledger has more than was claimed.
	w.claim(p, 3, shard, 5, at, "hooli")
	w.frame(p, shard, 5, at, "hooli", "hooli")
	w.finds("gateway-ledger", "double", "hooli", audit.MinuteOf(at))
	// It has the same number, of another account.
	w.claim(p, 4, shard, 6, at, "umbrella")
	w.frame(p, shard, 6, at, "wonka")
	w.finds("gateway-ledger", "gap", "umbrella", audit.MinuteOf(at))
	w.finds("gateway-ledger", "double", "wonka", audit.MinuteOf(at))
	// A copy of a frame is nothing: everybody counts it once.
	before := w.status()
	w.frame(p, shard, 6, at, "wonka")
	after := w.until("the copy is seen", func(s *auditor.Status) bool { return s.Duplicates > before.Duplicates })
	if after.Open != before.Open {
		t.Errorf("a copied frame changed %d findings to %d", before.Open, after.Open)
	}

	// A restart remembers, and finds nothing that is not so.
	w.stop()
	again := startAudited(t, w.dir)
	again.until("the audit goes on where it was", func(s *auditor.Status) bool {
		return s.Position > after.Position && s.CheckedCells > 20 && s.CheckedAccounts > after.CheckedAccounts
	})
	for _, f := range again.status().Findings {
		if f.Open() && f.FirstSeen > after.At {
			t.Errorf("found after a restart: %s", f.Text)
		}
	}
	if s := again.status(); s.Open != after.Open {
		t.Errorf("%d findings were open, %d are after a restart", after.Open, s.Open)
	}
}
