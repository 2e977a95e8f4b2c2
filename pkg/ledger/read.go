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
	// Time is the ledger's time of the entry: the server's when it was stored, or
	// where the test clock of the entry's shard stood.
	Time time.Time
	// StoredAt is the server's time in any case.
	StoredAt time.Time
	// TestClock: the stream was born with a test clock.
	TestClock bool
	// Pending is how many more entries the stream had when this one was sent.
	Pending uint64
}

// ReadOptions say what to read.
type ReadOptions struct {
	Stream string
	// Subjects filter the stream; empty reads all of it.
	Subjects []string
	// From is the first sequence to read; 0 and 1 read from the beginning,
	// wherever the stream begins by now.
	From uint64
	// OnError is told of every interruption before the reader tries again;
	// may be nil. Called from the reader's goroutine.
	OnError func(error)
	// Watchdog is how often the reader asks the stream whether it has missed
	// something; 2 s when 0.
	Watchdog time.Duration
}

// ErrPurged says that entries which the reader still needs are gone from the
// stream.
var ErrPurged = errors.New("entries that are still needed are gone from the stream")

// ErrRewound says that the stream has lost entries that were read, by a power
// cut without sync or by being made anew: what was derived from them is not
// derived from the stream any more.
var ErrRewound = errors.New("the stream has lost entries that were read")

// Read calls handle for every entry in order, for ever, through reconnections,
// restarts of the server and lost consumers; it never skips and never repeats
// an entry. It returns nil when ctx is done, the handler's error, ErrPurged or
// ErrRewound. The handler runs in the caller's goroutine; when ctx ends, Read
// waits for it, and at most a quarter of a second more.
//
// One purge can go unnoticed: one that overtakes a reader of some subjects (or
// of a stream that has holes by its own rules) while it is reading, within
// purgeLook of its last look.
func Read(ctx context.Context, js jetstream.JetStream, o ReadOptions, handle func(Message) error) error {
	if o.Watchdog <= 0 {
		o.Watchdog = 2 * time.Second
	}
	r := &streamReader{js: js, o: o, next: max(o.From, 1), handle: handle}
	backoff := minBackoff
	for ctx.Err() == nil {
		before := r.next
		err := r.run(ctx)
		var fatal *handlerError
		switch {
		case errors.As(err, &fatal):
			return fatal.err
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrPurged), errors.Is(err, ErrRewound):
			return err
		}
		if o.OnError != nil {
			o.OnError(err)
		}
		if r.next > before {
			backoff = minBackoff
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

// minBackoff is the first pause before another try.
const minBackoff = 20 * time.Millisecond

// purgeLook is how old the knowledge of where the stream begins may be when an
// entry follows that leaves out others.
const purgeLook = 100 * time.Millisecond

type handlerError struct{ err error }

func (e *handlerError) Error() string { return e.err.Error() }

type streamReader struct {
	js     jetstream.JetStream
	o      ReadOptions
	next   uint64
	handle func(Message) error

	// clear is up to where, from next on, the stream has nothing for us: to
	// purge that is no loss.
	clear uint64
	// lastTime is the server's time of entry next-1 if that was handled here.
	lastTime time.Time
	looked   time.Time // when the stream was last asked where it begins
	holes    bool      // it had entries removed from its midst
	dial     dial
	wound    bool // the dial is set to where it stood before entry next
}

func (r *streamReader) run(ctx context.Context) (err error) {
	setup, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// Before all else: a reconnection while this is set up must not be missed.
	ctx, lost := untilReconnected(ctx, r.js.Conn())
	defer lost()
	stream, err := findStream(setup, r.js, r.o.Stream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", r.o.Stream, err)
	}
	if err := r.compare(stream.CachedInfo().State); err != nil {
		return err
	}
	if err := r.compareLast(setup, stream); err != nil {
		return err
	}
	if !r.wound {
		if err := r.dial.wind(setup, r.js, stream, r.next); err != nil {
			return fmt.Errorf("read the clock of %s: %w", r.o.Stream, err)
		}
		r.wound = true
	}
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	in, err := openIterator(opening, r.js, stream, jetstream.ConsumerConfig{
		FilterSubjects: r.o.Subjects,
		DeliverPolicy:  jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:    r.next,
	})
	if err != nil {
		return fmt.Errorf("read %s: %w", r.o.Stream, err)
	}
	defer in.close()
	for {
		quiet, err := r.stretch(ctx, stream, in, r.o.Watchdog)
		if err != nil {
			return err
		}
		state, err := r.state(ctx, stream)
		if err != nil {
			return err
		}
		if err := r.compare(state); err != nil {
			return err
		}
		if !quiet || state.LastSeq < r.next {
			continue
		}
		overdue, err := r.overdue(ctx, stream, state)
		if err != nil {
			return err
		}
		if !overdue {
			continue
		}
		// It may have been appended just now.
		if quiet, err = r.stretch(ctx, stream, in, silentGrace); err != nil {
			return err
		}
		if quiet {
			return fmt.Errorf("read %s: silent although the stream has entries from %d on", r.o.Stream, r.next)
		}
	}
}

// openTimeout bounds the making of a consumer. It is far more than the short tries
// for an election take together: what is left is for a server that is slow at it,
// which would otherwise never be read from.
const openTimeout = 30 * time.Second

// findStream looks a stream up. While nobody leads it the servers answer nothing at
// all, and whoever waits longer for that answer is late when there is a leader.
func findStream(ctx context.Context, js jetstream.JetStream, name string) (jetstream.Stream, error) {
	ask, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return js.Stream(ask, name)
}

// silentGrace is how long an entry may be on its way.
const silentGrace = 200 * time.Millisecond

// stretch handles entries for some time and reports whether there were none.
func (r *streamReader) stretch(ctx context.Context, stream jetstream.Stream, in *iterator, d time.Duration) (quiet bool, err error) {
	// One timer for the whole rather than one for each entry.
	interval, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	quiet = true
	for {
		m, err := in.next(interval)
		switch {
		case ctx.Err() != nil:
			return quiet, context.Cause(ctx)
		case err != nil && interval.Err() != nil:
			return quiet, nil
		case err != nil:
			return quiet, fmt.Errorf("read %s: %w", r.o.Stream, err)
		case m.Sequence < r.next:
			continue
		}
		if m.Sequence > r.next {
			if err := r.skip(ctx, stream, m.Sequence); err != nil {
				return quiet, err
			}
		}
		r.dial.stamp(&m)
		if err := r.handle(m); err != nil {
			return quiet, &handlerError{err}
		}
		r.next, r.lastTime, quiet = m.Sequence+1, m.StoredAt, false
	}
}

// skip is asked whether the entries from next up to this one may be left out:
// they are of other subjects, or were purged.
func (r *streamReader) skip(ctx context.Context, stream jetstream.Stream, to uint64) error {
	if (len(r.o.Subjects) > 0 || r.holes) && time.Since(r.looked) < purgeLook {
		return nil
	}
	state, err := r.state(ctx, stream)
	if err != nil {
		return err
	}
	if r.next == 1 {
		// Nothing was read yet: the stream begins where it begins.
		return nil
	}
	if err := r.compare(state); err != nil {
		return err
	}
	if len(r.o.Subjects) == 0 && state.NumDeleted == 0 && state.FirstSeq <= r.next {
		return fmt.Errorf("read %s: after %d came %d", r.o.Stream, r.next-1, to)
	}
	return nil
}

func (r *streamReader) state(ctx context.Context, stream jetstream.Stream) (jetstream.StreamState, error) {
	ask, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	asked := time.Now()
	info, err := stream.Info(ask)
	if err != nil {
		return jetstream.StreamState{}, fmt.Errorf("stream %s: %w", r.o.Stream, err)
	}
	r.looked, r.holes = asked, info.State.NumDeleted > 0
	return info.State, nil
}

// compare compares what is wanted with what the stream has.
func (r *streamReader) compare(s jetstream.StreamState) error {
	if r.next > 1 && s.FirstSeq > max(r.next, r.clear) {
		return fmt.Errorf("stream %s begins at %d, wanted is %d: %w", r.o.Stream, s.FirstSeq, r.next, ErrPurged)
	}
	if s.LastSeq+1 < r.next {
		return fmt.Errorf("stream %s ends at %d, %d were read: %w", r.o.Stream, s.LastSeq, r.next-1, ErrRewound)
	}
	return nil
}

// compareLast compares the entry that was read last with the one that the
// stream has in its place: a stream that has lost its end may have grown again
// by now.
func (r *streamReader) compareLast(ctx context.Context, stream jetstream.Stream) error {
	if r.lastTime.IsZero() {
		return nil
	}
	m, err := stream.GetMsg(ctx, r.next-1)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound): // purged since, or not yet at the replica that answered
		return nil
	case err != nil:
		return fmt.Errorf("stream %s: %w", r.o.Stream, err)
	case !m.Time.Equal(r.lastTime):
		return fmt.Errorf("stream %s: entry %d is of %s, what was read was of %s: %w", r.o.Stream, r.next-1, m.Time.Format(time.RFC3339Nano), r.lastTime.Format(time.RFC3339Nano), ErrRewound)
	}
	return nil
}

// overdue reports, of a stream that has entries from next on, whether any of
// them should have come.
func (r *streamReader) overdue(ctx context.Context, stream jetstream.Stream, s jetstream.StreamState) (bool, error) {
	if len(r.o.Subjects) == 0 {
		return true, nil
	}
	ask, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for _, subject := range r.o.Subjects {
		m, err := stream.GetLastMsgForSubject(ask, subject)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return false, fmt.Errorf("stream %s: %w", r.o.Stream, err)
		case m.Sequence >= r.next:
			return true, nil
		}
	}
	// All up to there is of others.
	r.clear = s.LastSeq + 1
	return false, nil
}
