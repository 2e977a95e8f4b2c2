package outboxtest

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
)

// proxy passes bytes on until it is frozen: then the peer neither answers nor
// closes, like a machine that vanished from the network.
type proxy struct {
	l    net.Listener
	mu   sync.RWMutex // held while frozen
	open sync.Map
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l}
	t.Cleanup(p.cut)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				_ = in.Close()
				continue
			}
			p.open.Store(in, out)
			go p.pass(in, out)
			go p.pass(out, in)
		}
	}()
	return p
}

func (p *proxy) pass(from, to net.Conn) {
	defer func() { _, _ = from.Close(), to.Close() }()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.RLock()
		_, err = to.Write(buf[:n])
		p.mu.RUnlock()
		if err != nil {
			return
		}
	}
}

// cut breaks every connection.
func (p *proxy) cut() {
	p.open.Range(func(in, out any) bool {
		_, _ = in.(io.Closer).Close(), out.(io.Closer).Close()
		p.open.Delete(in)
		return true
	})
}

func TestAConnectionThatHangsDoesNotStopTheSpool(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := newProxy(t, r.s.Addr().String())
	nc, err := nats.Connect("nats://"+p.l.Addr().String(), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1),
		nats.CustomReconnectDelay(func(int) time.Duration { return 20 * time.Millisecond }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	b := open(t, outbox.Options{NATS: nc, SpoolDir: t.TempDir(), AckTimeout: 50 * time.Millisecond})
	stop := run(t, b)
	if err := b.Add(t.Context(), 0, bulky(0)); err != nil {
		t.Fatal(err)
	}
	flush(t, b)
	p.mu.Lock() // frozen
	const n = 20_000
	for i := 1; i < n; i++ {
		if err := b.Add(t.Context(), uint32(i%shards), bulky(i)); err != nil {
			t.Fatal(err)
		}
	}
	// Spooling is often done before the first acknowledgement is overdue.
	until(t, "everything is spooled and frames are sent again", func() bool {
		st := b.Stats()
		return st.Sent.Admitted == n && st.Resent > 0
	})
	if st := b.Stats(); st.Acked != 1 {
		t.Errorf("stats: %+v", st)
	}
	p.cut()
	p.mu.Unlock()
	flush(t, b)
	stop()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := b.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if got := r.read(t); len(got.calls) != n || got.gaps != 0 || len(got.closed) != shards {
		t.Errorf("%d calls, %d gaps, closed %v", len(got.calls), got.gaps, got.closed)
	}
}
