package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Message is one entry of a stream as a reader gets it.
type Message struct {
	Subject string
	Header  nats.Header
	Data    []byte
	// Sequence is the position in the stream.
	Sequence uint64
	// Time is the stream's own time of the entry.
	Time time.Time
	// Pending is how many more entries the stream had when this one was sent.
	Pending uint64
}

// ReadOptions say what to read.
type ReadOptions struct {
	Stream string
	// Subjects filter the stream; empty reads all of it.
	Subjects []string
	// From is the first sequence to read; 0 and 1 read from the beginning.
	From uint64
	// OnError is told of every interruption before the reader tries again;
	// may be nil. Called from the reader's goroutine.
	OnError func(error)
	// Watchdog is how long silence may last before the reader asks the stream
	// whether it has missed something; 2 s when 0.
	Watchdog time.Duration
}

// ErrPurged says that entries which the reader still needs are gone from the
// stream.
var ErrPurged = errors.New("entries that are still needed are gone from the stream")

// Read calls handle for every entry in order, for ever, through reconnections,
// restarts of the server and lost consumers; it never skips and never repeats
// an entry. It returns nil when ctx is done, the handler's error, or ErrPurged.
// The handler runs in the caller's goroutine.
func Read(ctx context.Context, js jetstream.JetStream, o ReadOptions, handle func(Message) error) error {
	if o.Watchdog <= 0 {
		o.Watchdog = 2 * time.Second
	}
	r := &streamReader{js: js, o: o, next: max(o.From, 1), handle: handle}
	backoff := 50 * time.Millisecond
	for ctx.Err() == nil {
		before := r.next
		err := r.run(ctx)
		var fatal *handlerError
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &fatal):
			return fatal.err
		case errors.Is(err, ErrPurged):
			return err
		}
		if o.OnError != nil && err != nil {
			o.OnError(err)
		}
		if r.next > before {
			backoff = 50 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(backoff):
		}
		backoff = min(backoff*2, time.Second)
	}
	return nil
}

type handlerError struct{ err error }

func (e *handlerError) Error() string { return e.err.Error() }

type streamReader struct {
	js     jetstream.JetStream
	o      ReadOptions
	next   uint64
	handle func(Message) error
}

func (r *streamReader) run(ctx context.Context) error {
	setup, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	stream, err := r.js.Stream(setup, r.o.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", r.o.Stream, err)
	}
	if first := stream.CachedInfo().State.FirstSeq; r.next > 1 && first > r.next && stream.CachedInfo().State.Msgs > 0 {
		return fmt.Errorf("stream %s begins at %d, wanted is %d: %w", r.o.Stream, first, r.next, ErrPurged)
	}
	cons, err := stream.OrderedConsumer(setup, jetstream.OrderedConsumerConfig{
		FilterSubjects:    r.o.Subjects,
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       r.next,
		InactiveThreshold: 30 * time.Second,
		MaxResetAttempts:  1, // our own loop recreates from the last handled entry
	})
	if err != nil {
		return fmt.Errorf("consumer on %s: %w", r.o.Stream, err)
	}
	// Bounded by bytes: batches past the server's 64 MiB buffer are lost silently.
	it, err := cons.Messages(jetstream.PullMaxBytes(16<<20), jetstream.PullExpiry(4*time.Second), jetstream.PullHeartbeat(time.Second))
	if err != nil {
		return fmt.Errorf("read %s: %w", r.o.Stream, err)
	}
	defer it.Stop()
	defer context.AfterFunc(ctx, it.Stop)()
	for {
		msg, err := it.Next(jetstream.NextMaxWait(r.o.Watchdog))
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) {
				missed, err := r.missed(ctx, stream)
				if err != nil {
					return err
				}
				if missed {
					return fmt.Errorf("read %s: silent although the stream has entries from %d on", r.o.Stream, r.next)
				}
				continue
			}
			return fmt.Errorf("read %s: %w", r.o.Stream, err)
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("read %s: %w", r.o.Stream, err)
		}
		if meta.Sequence.Stream < r.next {
			continue
		}
		m := Message{Subject: msg.Subject(), Header: msg.Headers(), Data: msg.Data(), Sequence: meta.Sequence.Stream, Time: meta.Timestamp, Pending: meta.NumPending}
		if err := r.handle(m); err != nil {
			return &handlerError{err}
		}
		r.next = meta.Sequence.Stream + 1
	}
}

// missed asks whether the stream holds an entry that should have come.
func (r *streamReader) missed(ctx context.Context, stream jetstream.Stream) (bool, error) {
	ask, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if len(r.o.Subjects) == 0 {
		info, err := stream.Info(ask)
		if err != nil {
			return false, fmt.Errorf("stream %s: %w", r.o.Stream, err)
		}
		return info.State.LastSeq >= r.next, nil
	}
	for _, s := range r.o.Subjects {
		m, err := stream.GetLastMsgForSubject(ask, s)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return false, fmt.Errorf("stream %s: %w", r.o.Stream, err)
		case m.Sequence >= r.next:
			return true, nil
		}
	}
	return false, nil
}
