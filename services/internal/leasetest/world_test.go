package leasetest

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

const shards = 2

// world is a ledger, a directory, and somebody who owns all shards.
type world struct {
	t   testing.TB
	srv *embednats.Server
	nc  *nats.Conn
	js  jetstream.JetStream
	kv  jetstream.KeyValue
	own owner
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
	if err := Tell(w.t.Context(), w.js, shards, limits, parents); err != nil {
		w.t.Fatal(err)
	}
}

// key gives an account an API key.
func (w *world) key(key, account string) {
	w.t.Helper()
	if err := PutKey(w.t.Context(), w.kv, directory.Key{Hash: gate.HashKey(key), ID: "k-" + account, Account: account}); err != nil {
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

// owner has all shards until the test ends.
type owner struct{ *Owner }

func (w *world) owner() owner {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.own = owner{NewOwner(w.nc, w.js, shards, func(err error) { w.t.Error(err) })}
	done := make(chan error, 1)
	go func() { done <- w.own.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	return w.own
}

// limit is how an account's limit stands, and state what is out of it.
func (o owner) limit(account, id string) (quota.LimitUse, lease.State) {
	l := o.Limit(account, "of-"+account+"/"+id)
	if l.Lease == nil {
		return l, lease.State{}
	}
	return l, *l.Lease
}

func (o owner) state(account, id string) lease.State {
	_, s := o.limit(account, id)
	return s
}
