package ledger

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// bornKey is the entry of the ledger stream's metadata that makes its clock a test
// clock: the time, in microseconds, at which that stands before the first advance.
// It is written when the stream is made and never after.
const bornKey = "tollkeeper.test_clock_born"

// ErrRealClock says that the ledger's time is the server's, which nobody advances.
var ErrRealClock = errors.New("the ledger has no test clock: only one that was born with it can be advanced")

// born returns where the test clock of a stream stands before its first advance;
// false: the stream has none.
func born(cfg *jetstream.StreamConfig) (usage.Micros, bool, error) {
	s, ok := cfg.Metadata[bornKey]
	if !ok {
		return 0, false, nil
	}
	at, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("stream %s: its %s is %q, which is not a time in microseconds", cfg.Name, bornKey, s)
	}
	return usage.Micros(at), true, nil
}

// HasTestClock reports whether a stream's entries have the time of a test clock.
func HasTestClock(stream jetstream.Stream) bool {
	_, ok := stream.CachedInfo().Config.Metadata[bornKey]
	return ok
}

// dial shows the time of a stream's entries, read in order: the server's, or that
// of a test clock. It is not safe for concurrent use.
type dial struct {
	test bool
	born usage.Micros
	at   map[uint32]usage.Micros // by shard; absent: born
}

// stamp gives an entry its time. An advance has the time that it advances to; one
// that goes back changes nothing.
func (d *dial) stamp(m *Message) {
	m.StoredAt = m.Time
	if !d.test {
		return
	}
	m.TestClock = true
	at := d.born
	if kind, shard, err := ParseSubject(m.Subject); err == nil {
		if t, ok := d.at[shard]; ok {
			at = t
		}
		if kind == KindControl {
			if e, err := DecodeControl(m.Header, m.Data); err == nil {
				if a := e.GetClockAdvance(); a != nil && usage.Micros(a.GetToUnixMicros()) > at {
					at = usage.Micros(a.GetToUnixMicros())
					d.at[shard] = at
				}
			}
		}
	}
	m.Time = at.Time()
}

// wind sets the dial to where the clock of every shard stands before an entry.
func (d *dial) wind(ctx context.Context, js jetstream.JetStream, stream jetstream.Stream, before uint64) error {
	b, test, err := born(&stream.CachedInfo().Config)
	if err != nil || !test {
		return err
	}
	d.test, d.born, d.at = true, b, make(map[uint32]usage.Micros)
	if before <= 1 || stream.CachedInfo().State.Msgs == 0 {
		return nil
	}
	in, err := openIterator(ctx, js, stream, jetstream.ConsumerConfig{FilterSubjects: []string{"control.*"}, DeliverPolicy: jetstream.DeliverAllPolicy})
	if err != nil {
		return err
	}
	defer in.close()
	for pending := in.pending; pending > 0; {
		m, err := in.next(ctx)
		if err != nil {
			return err
		}
		if m.Sequence >= before {
			return nil
		}
		d.stamp(&m)
		pending = m.Pending
	}
	return nil
}

// ReadTestClock returns where the test clock of the ledger stands: at its latest
// advance. ErrRealClock says that the ledger has none.
func ReadTestClock(ctx context.Context, js jetstream.JetStream) (usage.Micros, error) {
	stream, err := js.Stream(ctx, Stream)
	if err != nil {
		return 0, fmt.Errorf("stream %s: %w", Stream, err)
	}
	var d dial
	if err := d.wind(ctx, js, stream, stream.CachedInfo().State.LastSeq+1); err != nil {
		return 0, fmt.Errorf("read the test clock: %w", err)
	}
	if !d.test {
		return 0, ErrRealClock
	}
	at := d.born
	for _, t := range d.at {
		at = max(at, t)
	}
	return at, nil
}
