package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// plainBatch is the batch of the plain insert: as large as the historian's.
const plainBatch = 100_000

// awaitTables waits until the historian has made the tables.
func awaitTables(ctx context.Context, h *history.History) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := h.Migrated(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the historian has made no tables: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// plainInsert returns rows a second of clickhouse-go's own insert; making the
// rows is not timed.
func plainInsert(ctx context.Context, p *history.Plain, frames []encoded, token string) (float64, error) {
	var f ledger.Frame
	for i, e := range frames {
		if err := f.Decode(e.data); err != nil {
			return 0, err
		}
		p.Load(&f, history.Entry{Sequence: uint64(i + 1), Time: usage.At(time.Now())})
	}
	_, calls := bytesOf(frames)
	start := time.Now()
	if err := p.Insert(ctx, token, plainBatch); err != nil {
		return 0, err
	}
	return float64(calls) / time.Since(start).Seconds(), nil
}

// durable publishes the frames while the historian runs and returns calls a
// second from the first publish until the history has the last.
func durable(ctx context.Context, s *System, frames []encoded) (float64, error) {
	_, calls := bytesOf(frames)
	start := time.Now()
	if err := publish(ctx, s.JS, ledger.CallsSubject, frames); err != nil {
		return 0, err
	}
	stream, err := s.JS.Stream(ctx, ledger.Stream)
	if err != nil {
		return 0, fmt.Errorf("ledger: %w", err)
	}
	last := stream.CachedInfo().State.LastSeq
	for {
		at, err := s.History.Position(ctx)
		if err != nil {
			return 0, err
		}
		if at >= last {
			return float64(calls) / time.Since(start).Seconds(), nil
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// loadBurst is how many frames a load publishes at once, loadFrames how many it
// has: made before anything is timed.
const (
	loadBurst  = 8
	loadFrames = 8192
)

// load publishes frames at no more than a number of calls a second until ctx is
// done, and says in reached how many a second it was.
func load(ctx context.Context, js jetstream.JetStream, frames []encoded, callsPerSecond float64, started func(), reached *float64) error {
	every := time.Duration(float64(loadBurst*frameCalls) / callsPerSecond * float64(time.Second))
	start, sent := time.Now(), 0
	defer func() { *reached = float64(sent) / time.Since(start).Seconds() }()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for at := 0; at+loadBurst <= len(frames); at += loadBurst {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := publish(ctx, js, ledger.CallsSubject, frames[at:at+loadBurst]); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("load: %w", err)
		}
		sent += loadBurst * frameCalls
		started()
	}
	<-ctx.Done() // frames that run out before the crossings lower what was reached
	return nil
}
