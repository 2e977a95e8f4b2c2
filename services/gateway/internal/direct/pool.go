package direct

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"
)

// pool keeps connections between calls. The newest is taken first, so that those that are
// not needed grow old.
type pool struct {
	timeout time.Duration
	limit   int // of a host

	mu     sync.Mutex
	idle   map[string][]*connection // by address, oldest first
	sweep  *time.Timer              // nil: nothing is idle
	closed bool
}

// take returns a connection on which an upstream waits for a call.
func (p *pool) take(addr string) (*connection, bool) {
	for {
		c := p.pop(addr)
		if c == nil {
			return nil, false
		}
		if c.probe.quiet() {
			return c, true
		}
		_ = c.conn.Close() // the upstream has closed it, or speaks unasked
	}
}

func (p *pool) pop(addr string) *connection {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.idle[addr]
	if len(list) == 0 {
		return nil
	}
	c := list[len(list)-1]
	list[len(list)-1] = nil
	p.idle[addr] = list[:len(list)-1]
	return c
}

// put keeps a connection for the next call, or closes it.
func (p *pool) put(c *connection) {
	c.since = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle[c.addr]) >= p.limit {
		_ = c.conn.Close() // nothing is lost with it
		return
	}
	if p.idle == nil {
		p.idle = make(map[string][]*connection)
	}
	p.idle[c.addr] = append(p.idle[c.addr], c)
	if p.sweep == nil {
		p.sweep = time.AfterFunc(p.timeout, p.sweepOld)
	}
}

// sweepOld closes what has been idle for too long, and comes again while there is more.
func (p *pool) sweepOld() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	now, next := time.Now(), time.Duration(0)
	for addr, list := range p.idle {
		old := 0
		for old < len(list) && now.Sub(list[old].since) >= p.timeout {
			_ = list[old].conn.Close() // nothing is lost with it
			old++
		}
		if old == len(list) {
			delete(p.idle, addr)
			continue
		}
		p.idle[addr] = append([]*connection(nil), list[old:]...)
		if left := p.timeout - now.Sub(list[old].since); next == 0 || left < next {
			next = left
		}
	}
	if p.sweep = nil; next > 0 {
		p.sweep = time.AfterFunc(next, p.sweepOld)
	}
}

// close closes what is idle, and from now on all that becomes so.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.sweep != nil {
		p.sweep.Stop()
	}
	for _, list := range p.idle {
		for _, c := range list {
			_ = c.conn.Close() // nothing is lost with it
		}
	}
	p.idle = nil
}

// probe looks whether an idle connection has something to read, without waiting: the end
// that the upstream has made of it, or bytes that answer nothing.
type probe struct {
	raw   syscall.RawConn // nil: can't be looked at
	read  func(fd uintptr)
	byte  [1]byte
	state error
}

func newProbe(conn net.Conn) *probe {
	p := &probe{}
	if s, ok := conn.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			p.raw = raw
		}
	}
	p.read = func(fd uintptr) {
		n, err := syscall.Read(int(fd), p.byte[:])
		switch {
		case err != nil:
			p.state = err
		case n > 0:
			p.state = errUnasked
		default:
			p.state = net.ErrClosed
		}
	}
	return p
}

var errUnasked = errors.New("the upstream speaks unasked")

// quiet reports that there is nothing to read and no end.
func (p *probe) quiet() bool {
	if p.raw == nil {
		return true
	}
	p.state = nil
	// Not Read, which has the deadline of the last call's answer.
	if err := p.raw.Control(p.read); err != nil {
		return false
	}
	return errors.Is(p.state, syscall.EAGAIN)
}
