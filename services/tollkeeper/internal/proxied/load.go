package proxied

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// result of a load.
type result struct {
	calls int
	took  time.Duration
	p50   time.Duration // of a call; only for one caller
}

// drive sends calls of a kind over keep-alive connections, each with an API key of
// its own and one call at a time, for as long as it is told.
func drive(ctx context.Context, addr string, kind Kind, keys []string, d time.Duration) (result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		mu    sync.Mutex
		total result
		all   sync.WaitGroup
	)
	open := make([]net.Conn, 0, len(keys))
	defer func() {
		for _, c := range open {
			_ = c.Close() // its answers are whole, or there is an error already
		}
	}()
	for range keys {
		var dialer net.Dialer
		conn, err := dialer.DialContext(ctx, "tcp", addr)
		if err != nil {
			return total, err
		}
		open = append(open, conn)
		stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
		defer stop()
	}
	start := time.Now()
	deadline := start.Add(d)
	for i, key := range keys {
		all.Go(func() {
			one, err := call(open[i], kind.request(addr, key), deadline, len(keys) == 1)
			mu.Lock()
			defer mu.Unlock()
			total.calls += one.calls
			total.p50 = one.p50
			if err != nil {
				cancel(err)
			}
		})
	}
	all.Wait()
	total.took = time.Since(start)
	if err := context.Cause(ctx); err != nil {
		return total, fmt.Errorf("load on %s: %w", addr, err)
	}
	return total, nil
}

// call is one caller. It stops between two calls when the deadline is over.
func call(conn net.Conn, request []byte, deadline time.Time, timed bool) (out result, err error) {
	if err := conn.SetDeadline(deadline.Add(stuckAfter)); err != nil {
		return out, err
	}
	r := bufio.NewReaderSize(conn, maxHeader)
	var took []time.Duration
	for now := time.Now(); now.Before(deadline); {
		if _, err := conn.Write(request); err != nil {
			return out, err
		}
		head, err := header(r)
		if err != nil {
			return out, err
		}
		if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
			return out, fmt.Errorf("the answer is %q", head[:bytes.IndexByte(head, '\r')])
		}
		length, err := framed(head)
		if err != nil {
			return out, err
		}
		if err := skip(r, length); err != nil {
			return out, err
		}
		then := now
		if now = time.Now(); timed {
			took = append(took, now.Sub(then))
		}
		out.calls++
	}
	if len(took) > 0 {
		slices.Sort(took)
		out.p50 = took[len(took)/2]
	}
	return out, nil
}

// stuckAfter is longer than any call of a bench takes.
const stuckAfter = 10 * time.Second
