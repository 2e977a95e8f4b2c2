// Package ledgertest holds the tests of pkg/ledger that need a real
// nats-server, which pkg itself must not depend on.
package ledgertest

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// engine is a NATS server that can be stopped and started again on the same
// files and port.
type engine struct {
	t  *testing.T
	o  embednats.Options
	mu sync.Mutex
	s  *embednats.Server
}

func newEngine(t *testing.T, o embednats.Options) *engine {
	t.Helper()
	o.Logger = zerolog.Nop()
	if o.StoreDir == "" {
		o.StoreDir = t.TempDir()
	}
	if o.MaxFile == 0 {
		o.MaxFile = 100 << 30
	}
	if o.Sync == 0 {
		o.Sync = time.Minute
	}
	e := &engine{t: t, o: o}
	e.start()
	t.Cleanup(e.stop)
	return e
}

func (e *engine) start() {
	e.t.Helper()
	s, err := embednats.Start(context.Background(), e.o)
	if err != nil {
		e.t.Fatal(err)
	}
	e.mu.Lock()
	e.s = s
	e.mu.Unlock()
	// The next start takes the same port, so that clients find it again.
	if tcp := s.Addr().String(); e.o.Port == 0 {
		e.o.Port = portOf(e.t, tcp)
	}
}

func (e *engine) stop() {
	e.t.Helper()
	e.mu.Lock()
	s := e.s
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		e.t.Error(err)
	}
}

// connect returns a client that reconnects at once and for ever.
func (e *engine) connect() (*nats.Conn, jetstream.JetStream) {
	e.t.Helper()
	e.mu.Lock()
	url := e.s.ClientURL()
	e.mu.Unlock()
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0))
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		e.t.Fatal(err)
	}
	return nc, js
}

// provisioned returns a client of an engine with all streams.
func provisioned(t *testing.T) (*engine, *nats.Conn, jetstream.JetStream) {
	t.Helper()
	e := newEngine(t, embednats.Options{})
	nc, js := e.connect()
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil {
		t.Fatal(err)
	}
	return e, nc, js
}

// eventually waits for a condition that only the server can make true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("in 10 s it did not happen that %s", what)
		}
	}
}
