// Package wiretest gives tests a way to a server that can go dead without anybody
// being told, as when a cable is cut or the server's process is stopped.
package wiretest

import (
	"io"
	"net"
	"sync"
	"testing"
)

// Wire carries connections to one server until it is cut. It is safe for
// concurrent use.
type Wire struct {
	l    net.Listener
	cut  chan struct{}
	once sync.Once
	over chan struct{}
	wg   sync.WaitGroup
}

// New returns a wire to the server at host:port; it ends with the test.
func New(t testing.TB, to string) *Wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &Wire{l: l, cut: make(chan struct{}), over: make(chan struct{})}
	w.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			w.closeAtEnd(in)
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			w.closeAtEnd(out)
			w.wg.Go(func() { w.carry(out, in) })
			w.wg.Go(func() { w.carry(in, out) })
		}
	})
	t.Cleanup(func() {
		close(w.over)
		_ = l.Close()
		w.wg.Wait()
	})
	return w
}

// Addr is host:port of this end.
func (w *Wire) Addr() string { return w.l.Addr().String() }

// Cut makes the wire dead for good: new connections are accepted, and nothing is
// carried, answered or closed any more.
func (w *Wire) Cut() { w.once.Do(func() { close(w.cut) }) }

func (w *Wire) closeAtEnd(c io.Closer) {
	w.wg.Go(func() {
		<-w.over
		_ = c.Close()
	})
}

func (w *Wire) carry(to io.WriteCloser, from io.ReadCloser) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		select {
		case <-w.cut:
			return
		default:
		}
		if err == nil {
			_, err = to.Write(buf[:n])
		}
		if err != nil {
			_, _ = to.Close(), from.Close()
			return
		}
	}
}
