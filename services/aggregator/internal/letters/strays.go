package letters

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Strays finds the entries on subjects of no shard, which no shard reads, and keeps
// them. It asks the stream what subjects there are, so that it reads nothing but
// them, and nobody who counts waits for it. Not safe for concurrent use; several
// may be at work at the same time, in other processes.
type Strays struct {
	JS     jetstream.JetStream
	Shards int
	Log    zerolog.Logger
	// Kept is called for each entry that was not kept before.
	Kept func()

	loaded bool
	upTo   place
	at     map[string]uint64 // newest that was kept, by subject, in a search that goes on
	counts map[string]uint64 // entries of a subject when all of them were kept
}

// place is up to where all strays of a ledger are kept, as it stands in the bucket of
// the ledger's configuration.
type place struct {
	Ledger   int64  `json:"ledger"` // when it was made, Unix nanoseconds: another begins anew
	Sequence uint64 `json:"sequence"`
}

const (
	placeKey = "ledger.strays"
	// most entries are kept at once.
	most = 256
	// seekEvery is how often it is looked for strays if none was read, lookEvery
	// whether there is a reason to, and seekTimeout how long at once.
	seekEvery   = 10 * time.Second
	lookEvery   = 250 * time.Millisecond
	seekTimeout = 30 * time.Second
)

// Run keeps strays until ctx is done, while ours says that it is for us to do, soon
// after one was read and from time to time.
func (s *Strays) Run(ctx context.Context, ours func() bool, read <-chan struct{}) error {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	next := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		}
		if !ours() || len(read) == 0 && time.Now().Before(next) {
			continue
		}
		select {
		case <-read:
		default: // it is only time
		}
		begun := time.Now()
		once, cancel := context.WithTimeout(ctx, seekTimeout)
		more, err := s.Seek(once)
		cancel()
		if err != nil && ctx.Err() == nil {
			s.Log.Warn().Err(err).Msg("entries of no shard could not be kept yet")
		}
		// Where there are very many subjects even looking takes its time.
		next = time.Now().Add(max(seekEvery, 20*time.Since(begun)))
		if more && err == nil {
			next = time.Now()
		}
	}
}

// Seek keeps strays that are not kept yet; more says that there are others, or that
// it is not clear.
func (s *Strays) Seek(ctx context.Context) (more bool, err error) {
	stream, err := s.JS.Stream(ctx, ledger.Stream)
	if err != nil {
		return true, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return true, fmt.Errorf("the subjects of stream %s: %w", ledger.Stream, err)
	}
	head, found := info.State.LastSeq, 0
	if !s.loaded || s.upTo.Ledger != info.Created.UnixNano() || s.upTo.Sequence > head {
		*s = Strays{JS: s.JS, Shards: s.Shards, Log: s.Log, Kept: s.Kept, at: map[string]uint64{}, counts: map[string]uint64{}}
	}
	for _, subject := range slices.Sorted(maps.Keys(info.State.Subjects)) {
		if _, shard, err := ledger.ParseSubject(subject); err == nil && int(shard) < s.Shards || s.counts[subject] == info.State.Subjects[subject] {
			continue
		}
		if err := s.begin(ctx, info.Created, head); err != nil {
			return true, err
		}
		all, n, err := s.keep(ctx, stream, subject, head, most-found)
		if found += n; err != nil || !all {
			return true, err
		}
		s.counts[subject] = info.State.Subjects[subject]
	}
	if len(s.at) == 0 {
		return false, nil
	}
	s.upTo.Sequence = head
	clear(s.at)
	return false, s.store(ctx)
}

// begin finds out where an earlier search came to its end.
func (s *Strays) begin(ctx context.Context, made time.Time, head uint64) error {
	if s.loaded {
		return nil
	}
	kv, err := s.JS.KeyValue(ctx, ledger.ConfigBucket)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", ledger.ConfigBucket, err)
	}
	e, err := kv.Get(ctx, placeKey)
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
	case err != nil:
		return fmt.Errorf("read %s: %w", placeKey, err)
	default:
		// What can't be read, or is of another ledger, is no place: all are looked at
		// again, and found among the letters.
		if json.Unmarshal(e.Value(), &s.upTo) != nil || s.upTo.Ledger != made.UnixNano() || s.upTo.Sequence > head {
			s.upTo = place{}
		}
	}
	s.upTo.Ledger, s.loaded = made.UnixNano(), true
	return nil
}

func (s *Strays) store(ctx context.Context) error {
	data, err := json.Marshal(s.upTo)
	if err != nil {
		return fmt.Errorf("write %s: %w", placeKey, err)
	}
	kv, err := s.JS.KeyValue(ctx, ledger.ConfigBucket)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", ledger.ConfigBucket, err)
	}
	if _, err := kv.Put(ctx, placeKey, data); err != nil {
		return fmt.Errorf("write %s: %w", placeKey, err)
	}
	return nil
}

// keep keeps up to n entries of a subject and says whether that is all of them up to
// head, and how many they were.
func (s *Strays) keep(ctx context.Context, stream jetstream.Stream, subject string, head uint64, n int) (all bool, found int, err error) {
	at := max(s.at[subject], s.upTo.Sequence)
	// The leader knows the last one; who answers below may not have it yet.
	last, ok, err := ledger.LastMessage(ctx, s.JS, ledger.Stream, subject)
	if err != nil || !ok {
		return !ok, 0, err
	}
	for at < min(last.Sequence, head) {
		if found == n {
			return false, found, nil
		}
		m, err := stream.GetMsg(ctx, at+1, jetstream.WithGetMsgSubject(subject))
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			return false, found, nil
		case err != nil:
			return false, found, fmt.Errorf("%s after entry %d: %w", subject, at, err)
		case m.Sequence > head:
			return true, found, nil // for the next search
		}
		detail := fmt.Sprintf("%q is a subject of no shard: the ledger has %d", subject, s.Shards)
		stored, err := Keep(ctx, s.JS, Message(0, m.Sequence, subject, usage.ReasonWrongShard, detail, m.Header, m.Data))
		if err != nil {
			return false, found, fmt.Errorf("keep entry %d: %w", m.Sequence, err)
		}
		if stored {
			s.Kept()
			s.Log.Error().Str("subject", Readable(subject)).Uint64("sequence", m.Sequence).Str("reason", usage.ReasonWrongShard).
				Msg("an entry of the ledger is of no shard: it is kept in the dead letters")
		}
		at = m.Sequence
		s.at[subject] = at
		found++
	}
	return true, found, nil
}
