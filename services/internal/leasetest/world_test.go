// Package leasetest checks how gateways share exact limits: gates of pkg/gate and an
// owner that folds with the protocol's core, over a real NATS server.
package leasetest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

const shards = 2

// world is a ledger, a directory, and somebody who owns all shards.
type world struct {
	t    testing.TB
	srv  *embednats.Server
	nc   *nats.Conn
	js   jetstream.JetStream
	kv   jetstream.KeyValue
	mu   sync.Mutex
	lims map[string]usage.Limit // by "<account> <plan>/<limit>"
	own  *owner
}

func newWorld(t testing.TB) *world {
	t.Helper()
	srv, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := srv.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, srv: srv, lims: make(map[string]usage.Limit)}
	w.nc = w.connect()
	if w.js, err = jetstream.New(w.nc); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), w.js, ledger.ProvisionOptions{Shards: shards}); err != nil {
		t.Fatal(err)
	}
	if w.kv, err = w.js.KeyValue(t.Context(), ledger.DirectoryBucket); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) connect() *nats.Conn {
	w.t.Helper()
	nc, err := nats.Connect(w.srv.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectBufSize(-1))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	return nc
}

// account writes a record of the directory; the limits are the account's own.
func (w *world) account(path []string, limits ...usage.Limit) {
	w.t.Helper()
	r := &tollkeeperv1.AccountRecord{Id: path[0], Path: path, Plan: "pro"}
	w.mu.Lock()
	for i := range limits {
		r.Limits = append(r.Limits, &tollkeeperv1.AccountLimit{Account: path[len(path)-1], Plan: "pro", Limit: ledger.LimitToProto(&limits[i])})
		w.lims[path[len(path)-1]+" pro/"+limits[i].ID] = limits[i]
	}
	w.mu.Unlock()
	data, err := proto.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.kv.Put(w.t.Context(), ledger.DirectoryAccount(path[0]), data); err != nil {
		w.t.Fatal(err)
	}
}

// node is a gateway.
type node struct {
	*gate.Gate
	t      testing.TB
	out    *outbox.Outbox
	reg    *prometheus.Registry
	cancel context.CancelFunc
	done   chan error
	once   sync.Once
}

func (w *world) gate(edit ...func(*gate.Options)) *node {
	w.t.Helper()
	n := &node{t: w.t, reg: prometheus.NewRegistry(), done: make(chan error, 1)}
	o := gate.Options{
		Conn: w.connect(), Shards: shards, Registerer: n.reg, Logger: zerolog.New(os.Stderr).Level(zerolog.ErrorLevel),
		OpenOutbox: func(nc *nats.Conn, _ jetstream.JetStream, shards uint32) (gate.Outbox, error) {
			var err error
			n.out, err = outbox.Open(outbox.Options{NATS: nc, Shards: shards, Gateway: "test"})
			return n.out, err
		},
	}
	for _, e := range edit {
		e(&o)
	}
	var err error
	if n.Gate, err = gate.New(o); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	go func() { n.done <- n.Run(ctx) }()
	w.t.Cleanup(n.stop)
	return n
}

func (n *node) stop() {
	n.once.Do(func() {
		n.cancel()
		if err := <-n.done; err != nil {
			n.t.Error(err)
		}
	})
}

// find waits until the directory has come.
func (n *node) find(id string) *gate.Account {
	n.t.Helper()
	var a *gate.Account
	until(n.t, "the directory has "+id, func() bool {
		var found gate.Lookup
		a, found = n.AccountByID(id)
		return found == gate.Found
	})
	return a
}

func (n *node) metric(name string, labels ...string) float64 {
	n.t.Helper()
	families, err := n.reg.Gather()
	if err != nil {
		n.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metric:
		for _, m := range f.GetMetric() {
			for _, want := range labels {
				has := false
				for _, l := range m.GetLabel() {
					has = has || l.GetName()+"="+l.GetValue() == want
				}
				if !has {
					continue metric
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("never: %s", what)
		}
	}
}

// owner folds the lease entries of all shards and answers.
type owner struct {
	w       *world
	mu      sync.Mutex
	escrows map[string]*lease.Escrow
	seq     uint64
	away    bool
	beacons bool
	asks    int
	ahead   time.Duration // of its clock
	cancel  context.CancelFunc
	done    sync.WaitGroup
}

func (w *world) owner() *owner {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	o := &owner{w: w, escrows: make(map[string]*lease.Escrow), beacons: true, cancel: cancel}
	consumer, err := w.js.OrderedConsumer(ctx, ledger.Stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{"leases.*"}})
	if err != nil {
		w.t.Fatal(err)
	}
	running, err := consumer.Consume(func(m jetstream.Msg) { o.entry(m) })
	if err != nil {
		w.t.Fatal(err)
	}
	o.done.Go(func() {
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				o.tick()
			}
		}
	})
	w.t.Cleanup(func() {
		running.Stop()
		cancel()
		o.done.Wait()
	})
	w.own = o
	return o
}

func (o *owner) leave(away bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.away = away
}

func (o *owner) id(account, limit string, start int64) string {
	return fmt.Sprint(account, " ", limit, " ", start)
}

func (o *owner) entry(m jetstream.Msg) {
	e, err := ledger.DecodeLease(m.Headers(), m.Data())
	if err != nil {
		o.w.t.Error(err)
		return
	}
	_, shard, err := ledger.ParseSubject(m.Subject())
	if err != nil {
		o.w.t.Error(err)
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	now := lease.Micros(o.now())
	o.asks += len(e.GetAsks())
	for _, a := range e.GetAsks() {
		k := o.id(a.GetAccount(), a.GetLimit(), a.GetWindowStartUnixMicros())
		x := o.escrows[k]
		o.w.mu.Lock()
		l, known := o.w.lims[a.GetAccount()+" "+a.GetLimit()]
		o.w.mu.Unlock()
		if x == nil {
			if !known {
				continue
			}
			x = lease.NewEscrow(l.Amount, terms(&l, a.GetWindowStartUnixMicros()))
			o.escrows[k] = x
		}
		o.seq++
		ask := lease.Ask{
			Gateway: lease.Gateway(e.GetGateway()), Seq: a.GetSeq(), Sent: lease.Micros(a.GetSentUnixMicros()), Seen: a.GetSeen(), Known: a.GetKnown(), Used: a.GetUsed(),
			Returned: a.GetReturned(), Over: a.GetOver(), Held: a.GetHeld(), Need: a.GetNeed(), Want: a.GetWant(), Renew: a.GetRenew(), Closing: a.GetClosing(),
		}
		fx := x.Apply(lease.Entry{Sequence: o.seq, Time: now, Ask: &ask})
		if fx.Invalid != "" {
			o.w.t.Errorf("%s: %+v", fx.Invalid, ask)
		}
		o.say(shard, a.GetAccount(), a.GetLimit(), a.GetWindowStartUnixMicros(), &l, fx.Answers)
	}
}

func terms(l *usage.Limit, start int64) lease.Terms {
	t := lease.Terms{Term: lease.Micros(l.Lease.Term), Patience: lease.Micros(l.Lease.Patience), Horizon: 60_000_000, MaxLeases: 64}
	if t.Term == 0 {
		t.Term = lease.Micros(usage.DefaultLeaseTerm)
	}
	if t.Patience == 0 {
		t.Patience = lease.Micros(usage.DefaultLeasePatience)
	}
	if l.Window != usage.Lifetime {
		s, e := window.Bounds(l.Window, usage.Micros(start))
		t.Start, t.End = lease.Micros(s), lease.Micros(e)
	}
	return t
}

func (o *owner) say(shard uint32, account, limit string, start int64, l *usage.Limit, answers []lease.Answer) {
	if o.away {
		return
	}
	for _, a := range answers {
		p := &tollkeeperv1.LeaseAnswer{
			Account: account, Limit: limit, WindowStartUnixMicros: start, Revision: a.Revision, Seq: a.Seq, Granted: a.Granted, ExpiryUnixMicros: int64(a.Expiry),
			Standing: tollkeeperv1.LeaseAnswer_Standing(a.Verdict), Room: a.Room, Recall: a.Recall,
		}
		if a.Verdict == lease.DeniedEarly || a.Verdict == lease.DeniedFinal {
			d := usage.Decision{ID: ksuid.New().String(), Account: account, LimitID: limit, Meter: l.Meter, Verdict: usage.Deny, Code: l.RefusalCode(), Revision: a.Revision, Amount: l.Amount, Used: l.Amount - a.Room, Room: a.Room, Tier: l.Tier, Window: l.Window, PeriodStart: usage.Micros(start)}
			_, d.PeriodEnd = window.Bounds(l.Window, usage.Micros(start))
			data, err := ledger.MarshalDecision(&d)
			if err != nil {
				o.w.t.Error(err)
			}
			p.Decision = data
		}
		data, err := proto.Marshal(&tollkeeperv1.LeaseAnswers{Shard: shard, Epoch: 1, Answers: []*tollkeeperv1.LeaseAnswer{p}})
		if err != nil {
			o.w.t.Error(err)
			continue
		}
		_ = o.w.nc.Publish(ledger.AnswersSubject(ksuid.KSUID(a.Gateway)), data) // NATS may be away
	}
}

func (o *owner) now() int64 { return time.Now().Add(o.ahead).UnixMicro() }

func (o *owner) shift(by time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ahead = by
}

// tick lets time pass, as a shard's ticks do, and beacons.
func (o *owner) tick() {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.now()
	if o.away {
		return
	}
	for k, x := range o.escrows {
		if due, ok := x.Due(); ok && due <= lease.Micros(now) {
			o.seq++
			fx := x.Apply(lease.Entry{Sequence: o.seq, Time: lease.Micros(now)})
			var account, limit string
			var start int64
			if _, err := fmt.Sscan(k, &account, &limit, &start); err != nil {
				o.w.t.Error(err)
			}
			o.w.mu.Lock()
			l := o.w.lims[account+" "+limit]
			o.w.mu.Unlock()
			o.say(ledger.ShardOf(account, shards), account, limit, start, &l, fx.Answers)
		}
	}
	for s := range uint32(shards) {
		data, err := proto.Marshal(&tollkeeperv1.Beacon{Shard: s, Epoch: 1, StreamTimeUnixMicros: now, SentAtUnixMicros: now})
		if err != nil {
			o.w.t.Error(err)
		}
		_ = o.w.nc.Publish(ledger.BeaconSubject(s), data)
	}
}

// state of the escrow of an account's limit in the window of start.
func (o *owner) state(account, limit string, start int64) lease.State {
	o.mu.Lock()
	defer o.mu.Unlock()
	if x := o.escrows[o.id(account, limit, start)]; x != nil {
		return x.State()
	}
	return lease.State{}
}
