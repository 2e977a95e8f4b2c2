package direct

import (
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// watched knows whether it was closed.
type watched struct {
	net.Conn
	closed bool
}

func (w *watched) Close() error {
	w.closed = true
	return nil
}

func TestConnectionsThatNobodyNeedsAreClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := &pool{timeout: time.Minute, limit: 2}
		put := func(addr string) *watched {
			w := &watched{}
			p.put(newConnection(w, addr))
			return w
		}
		first := put("a")
		time.Sleep(30 * time.Second)
		second, other := put("a"), put("b")
		if third := put("a"); !third.closed {
			t.Error("a host keeps more than its limit")
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if !first.closed || second.closed || other.closed {
			t.Errorf("after a minute: %v, %v, %v", first.closed, second.closed, other.closed)
		}
		if c, ok := p.take("a"); !ok || c.conn != second {
			t.Error("the newest is not taken")
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if !other.closed || second.closed {
			t.Errorf("after another: %v, %v", other.closed, second.closed)
		}
		last := put("a")
		p.close()
		if after := put("a"); !last.closed || !after.closed {
			t.Errorf("after the end: %v, %v", last.closed, after.closed)
		}
	})
}
