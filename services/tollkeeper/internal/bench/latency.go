package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// gates are two gateways: the first sends, the second is watched.
type gates struct {
	first, second *gate.Gate
	run           *errgroup.Group
	stop          context.CancelFunc
}

func startGates(ctx context.Context, connect func(ctx context.Context, name string) (*nats.Conn, error), log zerolog.Logger) (*gates, error) {
	ctx, stop := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	s := &gates{run: g, stop: stop}
	for i, p := range []**gate.Gate{&s.first, &s.second} {
		name := "bench-" + strconv.Itoa(i+1)
		gt, err := gate.New(gate.Options{
			Connect: func(ctx context.Context) (*nats.Conn, error) { return connect(ctx, name) },
			OpenOutbox: func(nc *nats.Conn, js jetstream.JetStream, shards uint32) (gate.Outbox, error) {
				return outbox.Open(outbox.Options{NATS: nc, Shards: shards, Gateway: name, Logger: log})
			},
			Logger: log,
		})
		if err != nil {
			stop()
			return nil, err
		}
		*p = gt
		g.Go(func() error { return gt.Run(ctx) })
	}
	return s, nil
}

func (s *gates) end() error {
	s.stop()
	return s.run.Wait()
}

// ready waits until both gateways know an account.
func (s *gates) ready(ctx context.Context, account string) error {
	for _, g := range [...]*gate.Gate{s.first, s.second} {
		for {
			if _, found := g.AccountByID(account); found == gate.Found && g.Ready() == nil {
				break
			}
			select {
			case <-ctx.Done():
				return errors.Join(fmt.Errorf("a gateway does not know account %s", account), g.Ready())
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return nil
}

// crossing sends the call that uses up the allowance of each account at the
// first gateway, and measures how long after it was handed over the second
// answers 402. Accounts have a limit of one call. pause stands between two of
// them, so that each is measured on its own.
func (s *gates) crossing(ctx context.Context, accounts []string, pause time.Duration) ([]time.Duration, error) {
	out := make([]time.Duration, 0, len(accounts))
	req := gate.Request{Method: "POST", Route: "chat", Model: "m"}
	for _, id := range accounts {
		a, found := s.second.AccountByID(id)
		if found != gate.Found {
			return nil, fmt.Errorf("the second gateway does not know account %s", id)
		}
		c := usage.Call{Time: usage.At(time.Now()), Account: id, Method: "POST", Route: "chat", Model: "m", Status: 200}
		start := time.Now()
		if err := s.first.Settle(ctx, c); err != nil {
			return nil, fmt.Errorf("settle: %w", err)
		}
		for s.second.Admit(a, req).Allowed {
			if time.Since(start) > 10*time.Second || ctx.Err() != nil {
				return nil, fmt.Errorf("account %s is not refused 10 s after it used up its allowance", id)
			}
			// Spinning would take the core that the decision needs; a sleep of a
			// few microseconds is far below what is measured.
			runtime.Gosched()
			time.Sleep(20 * time.Microsecond)
		}
		out = append(out, time.Since(start))
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
	}
	return out, nil
}
