package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"
)

// iterator is a consumer of a stream of its own: never acknowledged, kept in
// memory, and gone with the first thing that is not as it should be.
//
// It stands in for jetstream.OrderedConsumer, which recreates its consumer by
// itself, in calls that no context ends, without looking whether the stream
// still has what comes next, and leaves it behind at the server when stopped.
type iterator struct {
	js       jetstream.JetStream
	stream   string
	consumer string
	messages jetstream.MessagesContext
	// delivered is the consumer's number of the last message.
	delivered uint64
	// pending is how many messages the consumer had when it was made.
	pending uint64
}

// Bounds of what is on its way from the server to one iterator. All that waits
// for a connection must stay below the 64 MiB that the server keeps for it, or
// the connection is cut; one message of the greatest size must fit.
const (
	pullMessages = 256
	pullBytes    = 4 << 20
)

var errGap = errors.New("messages were lost on the way")

func openIterator(ctx context.Context, js jetstream.JetStream, stream jetstream.Stream, cfg jetstream.ConsumerConfig) (*iterator, error) {
	cfg.Name = "tollkeeper-" + ksuid.New().String()
	cfg.AckPolicy = jetstream.AckNonePolicy
	cfg.MemoryStorage = true
	cfg.Replicas = 1
	// For when the server could not be told to delete it.
	cfg.InactiveThreshold = 30 * time.Second
	cons, err := stream.CreateConsumer(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("create consumer: %w", err)
	}
	in := &iterator{js: js, stream: stream.CachedInfo().Config.Name, consumer: cfg.Name, pending: cons.CachedInfo().NumPending}
	in.messages, err = cons.Messages(
		jetstream.PullMaxMessagesWithBytesLimit(pullMessages, pullBytes),
		jetstream.PullExpiry(4*time.Second), jetstream.PullHeartbeat(time.Second))
	if err != nil {
		in.delete()
		return nil, fmt.Errorf("consume: %w", err)
	}
	return in, nil
}

// next waits for a message until ctx is done. After an error the iterator is
// of no use unless the error is ctx's own.
func (in *iterator) next(ctx context.Context) (Message, error) {
	msg, err := in.messages.Next(jetstream.NextContext(ctx))
	if err != nil {
		return Message{}, err
	}
	meta, err := msg.Metadata()
	if err != nil {
		return Message{}, err
	}
	if meta.Sequence.Consumer != in.delivered+1 {
		return Message{}, errGap
	}
	in.delivered++
	return Message{
		Subject: msg.Subject(), Header: msg.Headers(), Data: msg.Data(),
		Sequence: meta.Sequence.Stream, Time: meta.Timestamp, Pending: meta.NumPending,
	}, nil
}

func (in *iterator) close() {
	in.messages.Stop()
	in.delete()
}

func (in *iterator) delete() {
	if !in.js.Conn().IsConnected() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 250*time.Millisecond)
	defer cancel()
	// Not to be reported: the server forgets an inactive consumer by itself.
	_ = in.js.DeleteConsumer(ctx, in.stream, in.consumer)
}

var errReconnected = errors.New("the connection was lost meanwhile")

// untilReconnected returns a context that ends, with errReconnected as its
// cause, when the connection comes back after it was lost: a consumer may be
// gone by then, and messages with it. stop must be called.
func untilReconnected(ctx context.Context, nc *nats.Conn) (_ context.Context, stop func()) {
	return untilStatus(ctx, nc, nats.CONNECTED)
}

// untilStatus returns a context that ends, with errReconnected as its cause,
// when the connection changes into one of the states.
func untilStatus(ctx context.Context, nc *nats.Conn, states ...nats.Status) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	changes := nc.StatusChanged(states...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, changed := <-changes; changed {
			cancel(errReconnected)
		}
	}()
	return ctx, func() {
		nc.RemoveStatusListener(changes) // closes it
		<-done
		cancel(context.Canceled)
	}
}
