package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
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
// And it asks for messages by itself: the client's own iterator has as many
// places as it asks for messages, but what the server says of a request needs
// places too, so that a reader that is slow for some seconds loses messages.
type iterator struct {
	js       jetstream.JetStream
	stream   string
	consumer string
	sub      *nats.Subscription
	arrived  chan *nats.Msg
	// asked is how many messages the server still owes.
	asked   int
	request []byte
	to      string // where requests go
	// delivered is the consumer's number of the last message.
	delivered uint64
	// pending is how many messages the consumer had when it was made.
	pending uint64
	// silent ends when nothing has come for too long, not even a heartbeat;
	// heardLately says that it has to begin anew before the next wait.
	silent      *time.Timer
	heardLately bool
}

// Bounds of what is on its way from the server to one iterator. All that waits
// for a connection must stay below the 64 MiB that the server keeps for it, or
// the connection is cut; one message of the greatest size must fit.
const (
	// pullMessages and pullBytes are what one request asks for. The next is
	// sent when the server owes less than that: two are open at most.
	pullMessages = 128
	pullBytes    = 2 << 20
	// A request ends after pullExpiry, and says each pullHeartbeat that it is
	// there while nothing comes.
	pullExpiry    = 4 * time.Second
	pullHeartbeat = time.Second
	pullSilence   = 3 * pullHeartbeat
	// arrivedPlaces: two requests' messages, and what the server says of them:
	// heartbeats until they expire, and how they ended.
	arrivedPlaces = 2*pullMessages + 2*(int(pullExpiry/pullHeartbeat)+2)
)

var (
	errGap    = errors.New("messages were lost on the way")
	errSilent = errors.New("the server has gone silent")
)

func openIterator(ctx context.Context, js jetstream.JetStream, stream jetstream.Stream, cfg jetstream.ConsumerConfig) (_ *iterator, err error) {
	cfg.AckPolicy = jetstream.AckNonePolicy
	cfg.MemoryStorage = true
	cfg.Replicas = 1
	// For when the server could not be told to delete it.
	cfg.InactiveThreshold = 30 * time.Second
	// Nor is this answered while nobody leads: it is asked again, for as long as an
	// election takes. Then it may be that a large stream is slow to count what is
	// pending, and all the time there is is given to it.
	var cons jetstream.Consumer
	for tries := 0; ; tries++ {
		wait := 1500 * time.Millisecond
		if tries >= 6 {
			wait = time.Minute
		}
		// One of its own each time: what the server makes of the same one twice is
		// not known, and one that nobody asks it removes.
		cfg.Name = "tollkeeper-" + ksuid.New().String()
		try, cancel := context.WithTimeout(ctx, wait)
		cons, err = stream.CreateConsumer(try, cfg)
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return nil, fmt.Errorf("create consumer: %w", err)
		}
	}
	in := &iterator{
		js: js, stream: stream.CachedInfo().Config.Name, consumer: cfg.Name, pending: cons.CachedInfo().NumPending,
		arrived: make(chan *nats.Msg, arrivedPlaces), silent: time.NewTimer(pullSilence),
	}
	in.to = apiSubject(js, "CONSUMER.MSG.NEXT."+in.stream+"."+in.consumer)
	in.request, err = json.Marshal(map[string]int64{
		"batch": pullMessages, "max_bytes": pullBytes, "expires": int64(pullExpiry), "idle_heartbeat": int64(pullHeartbeat),
	})
	if err == nil {
		in.sub, err = js.Conn().ChanSubscribe(js.Conn().NewInbox(), in.arrived)
	}
	if err == nil {
		err = in.ask()
	}
	if err != nil {
		in.close()
		return nil, fmt.Errorf("consume: %w", err)
	}
	return in, nil
}

// ask asks for more when less than a request's messages are owed.
func (in *iterator) ask() error {
	if in.asked >= pullMessages {
		return nil
	}
	if err := in.js.Conn().PublishRequest(in.to, in.sub.Subject, in.request); err != nil {
		return err
	}
	in.asked += pullMessages
	return nil
}

// next waits for a message until ctx is done. After an error the iterator is
// of no use unless the error is ctx's own.
func (in *iterator) next(ctx context.Context) (Message, error) {
	for {
		m, err := in.receive(ctx)
		if err != nil {
			return Message{}, err
		}
		if m.Reply == "" {
			if err := in.heard(m.Header); err != nil {
				return Message{}, err
			}
			continue
		}
		in.asked--
		if err := in.ask(); err != nil {
			return Message{}, err
		}
		meta, err := m.Metadata()
		if err != nil {
			return Message{}, err
		}
		if meta.Sequence.Consumer != in.delivered+1 {
			return Message{}, errGap
		}
		in.delivered++
		return Message{
			Subject: m.Subject, Header: m.Header, Data: m.Data,
			Sequence: meta.Sequence.Stream, Time: meta.Timestamp, Pending: meta.NumPending,
		}, nil
	}
}

func (in *iterator) receive(ctx context.Context) (*nats.Msg, error) {
	select {
	case m, open := <-in.arrived:
		in.heardLately = true
		return m, closedUnless(open)
	default:
	}
	if in.heardLately {
		in.silent.Reset(pullSilence)
		in.heardLately = false
	}
	select {
	case m, open := <-in.arrived:
		in.heardLately = true
		return m, closedUnless(open)
	case <-in.silent.C:
		return nil, errSilent
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func closedUnless(open bool) error {
	if open {
		return nil
	}
	return nats.ErrConnectionClosed
}

// Statuses of what the server says of a request.
const (
	statusHeartbeat = "100"
	statusNotFound  = "404"
	statusTimeout   = "408"
	statusConflict  = "409"
)

// The conflicts that are only the end of a request: what comes next is larger
// than the bytes that are left of it, or bytes are left but no messages.
const (
	bytesUsedUp    = "Message Size Exceeds MaxBytes"
	messagesUsedUp = "Batch Completed"
)

// heard takes note of what the server says of a request.
func (in *iterator) heard(h nats.Header) error {
	status, text := h.Get("Status"), h.Get("Description")
	switch {
	case status == statusHeartbeat:
		return nil
	case status == statusTimeout, status == statusNotFound, status == statusConflict && (text == bytesUsedUp || text == messagesUsedUp):
		left, err := strconv.Atoi(h.Get("Nats-Pending-Messages"))
		if err != nil || left < 0 || left > in.asked {
			return fmt.Errorf("a request ended with %q, which does not say what is left of it", text)
		}
		in.asked -= left
		return in.ask()
	}
	return fmt.Errorf("a request was answered %s %s", status, text)
}

func (in *iterator) close() {
	in.silent.Stop()
	if in.sub != nil {
		_ = in.sub.Unsubscribe() // the connection may be gone, and with it the subscription
	}
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
