package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// inFlightFrames bounds the unacknowledged frames of a load.
const inFlightFrames = 256

// publish appends frames to their shards' subjects, with a bounded number of
// them unacknowledged, and returns when every one is acknowledged.
func publish(ctx context.Context, js jetstream.JetStream, subject func(shard uint32) string, frames []encoded) error {
	futures := make([]jetstream.PubAckFuture, 0, len(frames))
	wait := func(f jetstream.PubAckFuture) error {
		select {
		case <-f.Ok():
			return nil
		case err := <-f.Err():
			return fmt.Errorf("publish: %w", err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for i, f := range frames {
		if i >= inFlightFrames {
			if err := wait(futures[i-inFlightFrames]); err != nil {
				return err
			}
		}
		fut, err := js.PublishMsgAsync(&nats.Msg{Subject: subject(f.shard), Header: nats.Header{ledger.CodecHeader: {ledger.CodecColumnar}}, Data: f.data})
		if err != nil {
			return fmt.Errorf("publish: %w", err)
		}
		futures = append(futures, fut)
	}
	for _, f := range futures[max(0, len(futures)-inFlightFrames):] {
		if err := wait(f); err != nil {
			return err
		}
	}
	return nil
}

// bareJetStream publishes the frames into a stream of its own while a plain
// consumer reads and decodes them, and returns calls a second from the first
// publish to the last decoded frame.
func bareJetStream(ctx context.Context, js jetstream.JetStream, frames []encoded) (float64, error) {
	name := "BENCH_" + ksuid.New().String()
	stream, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{name + ".*"}, Storage: jetstream.FileStorage, Duplicates: 100 * time.Millisecond})
	if err != nil {
		return 0, fmt.Errorf("create stream: %w", err)
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = js.DeleteStream(clean, name) // the whole store is thrown away after the bench
	}()
	cons, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return 0, fmt.Errorf("consumer: %w", err)
	}
	it, err := cons.Messages(jetstream.PullMaxBytes(16<<20), jetstream.PullExpiry(4*time.Second), jetstream.PullHeartbeat(time.Second))
	if err != nil {
		return 0, fmt.Errorf("consumer: %w", err)
	}
	defer it.Stop()
	_, want := bytesOf(frames)
	start := time.Now()
	published := make(chan error, 1)
	go func() {
		published <- publish(ctx, js, func(shard uint32) string { return fmt.Sprintf("%s.%d", name, shard) }, frames)
	}()
	var frame ledger.Frame
	got := 0
	for got < want {
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return 0, errors.Join(fmt.Errorf("read: %w", err), <-published)
		}
		if err := frame.Decode(m.Data()); err != nil {
			return 0, err
		}
		got += frame.N
	}
	took := time.Since(start)
	if err := <-published; err != nil {
		return 0, err
	}
	return float64(got) / took.Seconds(), nil
}
