// Package leasetest checks how gateways share exact limits: gates of pkg/gate and an
// owner that folds with the protocol's core, over a real NATS server.
package leasetest

import (
	"context"
	"encoding/hex"
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
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

const shards = 2

// world is a ledger, a directory, and somebody who owns all shards.
type world struct {
	t   testing.TB
	srv *embednats.Server
	nc  *nats.Conn
	js  jetstream.JetStream
	kv  jetstream.KeyValue
	own *owner
}

func newWorld(t testing.TB) *world {
	t.Helper()
	srv, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, srv: srv}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := w.srv.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
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

// account puts an account with limits of its own into the directory and the ledger.
func (w *world) account(id string, limits ...usage.Limit) {
	w.t.Helper()
	w.tree(map[string][]usage.Limit{id: limits}, nil)
}

// tree does so with accounts that nest.
func (w *world) tree(limits map[string][]usage.Limit, parents map[string]string) {
	w.t.Helper()
	w.plans(limits, parents)
	for id := range limits {
		r := &tollkeeperv1.AccountRecord{Id: id, Plan: "of-" + id}
		for at := id; at != ""; at = parents[at] {
			r.Path = append(r.Path, at)
			for i := range limits[at] {
				r.Limits = append(r.Limits, &tollkeeperv1.AccountLimit{Account: at, Plan: "of-" + at, Limit: ledger.LimitToProto(&limits[at][i])})
			}
		}
		data, err := proto.Marshal(r)
		if err != nil {
			w.t.Fatal(err)
		}
		if _, err := w.kv.Put(w.t.Context(), ledger.DirectoryAccount(id), data); err != nil {
			w.t.Fatal(err)
		}
	}
}

// key gives an account an API key.
func (w *world) key(key, account string) {
	w.t.Helper()
	h := gate.HashKey(key)
	data, err := proto.Marshal(&tollkeeperv1.KeyRecord{KeyId: "k-" + account, Account: account})
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.kv.Put(w.t.Context(), ledger.DirectoryKey(hex.EncodeToString(h[:])), data); err != nil {
		w.t.Fatal(err)
	}
}

// restart stops the server and starts it in its place.
func (w *world) restart() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	o := w.srv.Options()
	if err := w.srv.Stop(ctx); err != nil {
		w.t.Fatal(err)
	}
	var err error
	if w.srv, err = embednats.Start(w.t.Context(), o); err != nil {
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

// owner folds the ledger with the core, and answers.
type owner struct {
	w      *world
	mu     sync.Mutex
	states []*quota.Shard
	ahead  time.Duration // of its time
	away   bool
}

func (w *world) owner() *owner {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	o := &owner{w: w}
	for s := range uint32(shards) {
		o.states = append(o.states, quota.New(quota.Options{Shard: s}))
	}
	var done sync.WaitGroup
	done.Go(func() {
		var d fold.Decoder
		err := ledger.Read(ctx, w.js, ledger.ReadOptions{Stream: ledger.Stream}, func(m ledger.Message) error { return o.entry(&d, &m) })
		if err != nil && ctx.Err() == nil {
			w.t.Error(err)
		}
	})
	done.Go(func() {
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
		cancel()
		done.Wait()
	})
	w.own = o
	return o
}

// plans puts the limits that accounts have into the ledger.
func (w *world) plans(limits map[string][]usage.Limit, parents map[string]string) {
	w.t.Helper()
	var set tollkeeperv1.PlanSet
	var accounts [shards]tollkeeperv1.AccountSet
	for account, l := range limits {
		plan := usage.Plan{ID: "of-" + account, Limits: l}
		set.Plans = append(set.Plans, ledger.PlanToProto(&plan))
		root := account
		for parents[root] != "" {
			root = parents[root]
		}
		of := &accounts[ledger.ShardOf(root, shards)]
		of.Accounts = append(of.Accounts, &tollkeeperv1.Account{Id: account, Parent: parents[account], Plan: plan.ID})
	}
	set.Version = ksuid.New().String()
	for s := range uint32(shards) {
		for _, e := range []*tollkeeperv1.ControlEntry{
			{Id: ksuid.New().String(), Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &set}},
			{Id: ksuid.New().String(), Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &accounts[s]}},
		} {
			w.control(s, e)
		}
	}
}

func (w *world) control(shard uint32, e *tollkeeperv1.ControlEntry) {
	w.t.Helper()
	m, err := ledger.ControlMessage(shard, e)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.js.PublishMsg(w.t.Context(), m); err != nil {
		w.t.Fatal(err)
	}
}

func (o *owner) leave(away bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.away = away
}

// shift moves the ledger's time.
func (o *owner) shift(by time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ahead = by
}

func (o *owner) entry(d *fold.Decoder, m *ledger.Message) error {
	_, shard, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		return err
	}
	e, _, err := d.Decode(m)
	if err != nil {
		o.w.t.Errorf("%s: %v", m.Subject, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	e.Time += usage.Micros(o.ahead.Microseconds())
	fx := o.states[shard].Apply(e)
	if fx.Invalid != nil {
		o.w.t.Errorf("%s: %v", m.Subject, fx.Invalid)
	}
	if o.away {
		return nil
	}
	for i := range fx.Answers {
		a := &fx.Answers[i]
		p := &tollkeeperv1.LeaseAnswer{
			Account: a.Account, Limit: a.LimitID, WindowStartUnixMicros: int64(a.WindowStart), WindowEndUnixMicros: int64(a.WindowEnd), Revision: a.Revision, Seq: a.Seq,
			Granted: a.Granted, ExpiryUnixMicros: int64(a.Expiry), Standing: tollkeeperv1.LeaseAnswer_Standing(a.Verdict), Room: a.Room, Recall: a.Recall,
		}
		if a.Decision != nil {
			if p.Decision, err = ledger.MarshalDecision(a.Decision); err != nil {
				return err
			}
		}
		data, err := proto.Marshal(&tollkeeperv1.LeaseAnswers{Shard: shard, Epoch: 1, Answers: []*tollkeeperv1.LeaseAnswer{p}})
		if err != nil {
			return err
		}
		_ = o.w.nc.Publish(ledger.AnswersSubject(ksuid.KSUID(a.Gateway)), data) // NATS may be away
	}
	return nil
}

// tick lets time pass in the shards where something is due, and beacons.
func (o *owner) tick() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.away {
		return
	}
	now := time.Now().Add(o.ahead).UnixMicro()
	for s, state := range o.states {
		if due, ok := state.NextTimer(); ok && due <= usage.Micros(now) {
			m, err := ledger.ControlMessage(uint32(s), &tollkeeperv1.ControlEntry{Id: ksuid.New().String(), Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: 1}}})
			if err != nil {
				o.w.t.Error(err)
				return
			}
			_ = o.w.nc.PublishMsg(m)
		}
		data, err := proto.Marshal(&tollkeeperv1.Beacon{Shard: uint32(s), Epoch: 1, StreamTimeUnixMicros: now, SentAtUnixMicros: now})
		if err != nil {
			o.w.t.Error(err)
			return
		}
		_ = o.w.nc.Publish(ledger.BeaconSubject(uint32(s)), data)
	}
}

// limit is how an account's limit stands.
func (o *owner) limit(account, id string) (quota.LimitUse, lease.State) {
	o.w.t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.states {
		use, ok := s.Account(account)
		if !ok {
			continue
		}
		for _, l := range use.Limits {
			if l.LimitID == "of-"+account+"/"+id {
				if l.Lease != nil {
					return l, *l.Lease
				}
				return l, lease.State{}
			}
		}
	}
	return quota.LimitUse{}, lease.State{}
}

func (o *owner) state(account, id string) lease.State {
	_, s := o.limit(account, id)
	return s
}
