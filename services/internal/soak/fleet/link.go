package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Link is a way from one process to another that can be cut: while it is, bytes
// that were sent stay under way and nobody is told, as when a cable is pulled.
// Safe for concurrent use.
type Link struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	open  chan struct{} // closed while the link is whole
	conns map[net.Conn]struct{}
	over  bool
	wg    sync.WaitGroup
}

// NewLink listens on loopback and carries to target.
func NewLink(target string) (*Link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("a link to %s: %w", target, err)
	}
	k := &Link{listener: l, target: target, open: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	close(k.open)
	k.wg.Go(k.accept)
	return k, nil
}

// Addr is where the link begins.
func (k *Link) Addr() string { return k.listener.Addr().String() }

// Cut holds everything back until Mend.
func (k *Link) Cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.open:
		k.open = make(chan struct{})
	default:
	}
	past := time.Unix(1, 0)
	for c := range k.conns {
		_ = c.SetReadDeadline(past) // so that the copiers look up; a closed one has ended already
	}
}

// Mend lets everything through again, what was held back included.
func (k *Link) Mend() {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.open:
	default:
		for c := range k.conns {
			_ = c.SetReadDeadline(time.Time{}) // as above
		}
		close(k.open)
	}
}

// Close ends the link and what it carries.
func (k *Link) Close() error {
	err := k.listener.Close()
	k.Mend()
	k.mu.Lock()
	k.over = true
	for c := range k.conns {
		_ = c.Close() // what was under way is lost, which is meant
	}
	k.mu.Unlock()
	k.wg.Wait()
	return err
}

func (k *Link) whole() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.open
}

func (k *Link) accept() {
	for {
		c, err := k.listener.Accept()
		if err != nil {
			return
		}
		k.wg.Go(func() { k.carry(c) })
	}
}

// carry connects and copies both ways until either end is gone.
func (k *Link) carry(from net.Conn) {
	defer func() { _ = from.Close() }() // the other side learns of it
	if !k.add(from) {
		return
	}
	defer k.remove(from)
	<-k.whole()
	dial, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	to, err := (&net.Dialer{}).DialContext(dial, "tcp", k.target)
	if err != nil {
		return // nobody listens there; the other end sees the close
	}
	defer func() { _ = to.Close() }() // as above
	if !k.add(to) {
		return
	}
	defer k.remove(to)
	var both sync.WaitGroup
	both.Go(func() { k.copy(to, from) })
	both.Go(func() { k.copy(from, to) })
	both.Wait()
}

func (k *Link) copy(to, from net.Conn) {
	for {
		_, err := io.Copy(to, from)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			<-k.whole()
			continue
		}
		// One direction is over: so is the other.
		_, _ = to.Close(), from.Close()
		return
	}
}

func (k *Link) add(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over {
		return false
	}
	k.conns[c] = struct{}{}
	select {
	case <-k.open:
	default:
		_ = c.SetReadDeadline(time.Unix(1, 0)) // it was opened while the link is cut
	}
	return true
}

func (k *Link) remove(c net.Conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.conns, c)
}
