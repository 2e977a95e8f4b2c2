// Package anchor is what of a shard stands in NATS beside the ledger: the
// checkpoint with which its owner begins and fences off the one before, and the
// snapshots of its state.
package anchor

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

// Stores are where it stands. Safe for concurrent use.
type Stores struct {
	NC      *nats.Conn
	JS      jetstream.JetStream
	Objects jetstream.ObjectStore
	// Owner is who fences.
	Owner string
	// Horizon of shards that are begun; 0: the default.
	Horizon usage.Micros
	Log     zerolog.Logger
}

// ErrForGood says that trying again cannot help.
var ErrForGood = errors.New("waiting does not help")

// askTimeout bounds what NATS may not answer at all, such as while a stream has
// no leader: then it is asked again.
const askTimeout = time.Second

// Warmed is a state of which every decision is published, and where to read on.
type Warmed struct {
	State *quota.Shard
	At    publish.Position
	From  uint64
}

// Warm loads a shard's state. A *quota.NewerError says that a newer program wrote it,
// and that only such a one can go on.
func (s *Stores) Warm(ctx context.Context, shard uint32) (w Warmed, err error) {
	for {
		if w.At, err = s.Position(ctx, shard); err != nil {
			return w, err
		}
		w.State, err = s.load(ctx, shard, w.At.Found.Snapshot)
		if err == nil {
			break
		}
		if errors.As(err, new(*quota.NewerError)) {
			return w, err
		}
		if ctx.Err() != nil || errors.Is(err, errLags) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, context.DeadlineExceeded) {
			return w, err
		}
		// Its owner may have removed it, for a newer one.
		if at, askErr := s.Position(ctx, shard); askErr != nil {
			return w, askErr
		} else if at.Found.Snapshot != w.At.Found.Snapshot {
			continue
		}
		// The log is the truth; reading it from the beginning is slower, and
		// ends with ErrPurged where the beginning is gone.
		s.Log.Error().Err(err).Uint32("shard", shard).Msg("the snapshot cannot be used: the shard is counted anew from the ledger's beginning")
		if w.State, err = s.load(ctx, shard, ""); err != nil {
			return w, err
		}
		break
	}
	end, err := s.Ends(ctx, shard, w.State.Sequence(), w.At)
	if err != nil {
		return w, err
	}
	w.From = w.State.Sequence() + 1
	if end.Shard <= w.State.Sequence() {
		// A shard at rest must not make the others' entries be read again.
		w.From = max(w.From, end.Stream+1)
	}
	return w, nil
}

// Ending is how far the ledger goes.
type Ending struct {
	Stream  uint64
	Shard   uint64 // its newest entry
	Control uint64 // of its control subject
}

// Lost adds to an error that wraps ledger.ErrRewound what is to be done. Starting again
// is not enough: entries that take the numbers of those that were lost would count as
// counted.
func Lost(err error) error {
	return fmt.Errorf("%w: restore the ledger; or, if it still begins at entry 1, stop every aggregator, delete the key-value bucket %s and the object bucket %s and start again: what the ledger holds is counted anew",
		err, ledger.DecisionsBucket, ledger.SnapshotsBucket)
}

// Ends returns how far the ledger goes, if it holds what a shard with such a
// state and such decisions needs.
func (s *Stores) Ends(ctx context.Context, shard uint32, folded uint64, at publish.Position) (e Ending, err error) {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	stream, err := s.JS.Stream(ask, ledger.Stream)
	if err != nil {
		return e, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	// Decisions on entries that are gone would hide those on the entries that
	// take their numbers.
	e.Stream = stream.CachedInfo().State.LastSeq
	if told := max(folded, at.Found.Sequence, at.Newest.Revision); told > e.Stream {
		return e, Lost(fmt.Errorf("shard %d is counted up to entry %d, but the ledger ends at %d: %w", shard, told, e.Stream, ledger.ErrRewound))
	}
	if first := stream.CachedInfo().State.FirstSeq; folded == 0 && first > 1 {
		return e, fmt.Errorf("shard %d: the ledger begins at %d and there is no snapshot: restore the ledger's beginning, or the shard's snapshot (bucket %s): %w", shard, first, ledger.SnapshotsBucket, ledger.ErrPurged)
	}
	for _, subject := range ledger.ShardSubjects(shard) {
		m, found, err := s.last(ctx, ledger.Stream, subject)
		if err != nil {
			return e, err
		}
		if !found {
			continue
		}
		e.Shard = max(e.Shard, m.Sequence)
		if subject == ledger.ControlSubject(shard) {
			e.Control = m.Sequence
		}
	}
	return e, nil
}

// Fence makes a claim the shard's owner: nobody else's batch is taken from then
// on, and what was published before is what it returns.
func (s *Stores) Fence(ctx context.Context, shard uint32, token uint64) (publish.Position, error) {
	before, err := s.Position(ctx, shard)
	if err != nil {
		return publish.Position{}, err
	}
	next := before.Found
	next.Epoch, next.Owner = token, s.Owner
	switch {
	case before.Found == next:
		return before, nil // an earlier try
	case before.Found.Epoch >= token:
		return publish.Position{}, fmt.Errorf("shard %d is at epoch %d, this claim is %d: %w", shard, before.Found.Epoch, token, ledger.ErrStale)
	}
	m, err := next.Message(shard)
	if err != nil {
		return publish.Position{}, err
	}
	ledger.ExpectLast(m, before.Revision)
	send, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if _, err := ledger.PublishBatch(send, s.NC, []*nats.Msg{m}); err != nil && !errors.Is(err, ledger.ErrStale) {
		s.Log.Debug().Err(err).Uint32("shard", shard).Msg("it is not clear whether the shard is taken over")
	}
	// Whatever the answer was: what stands there now is ours or not.
	// Nobody else publishes from there on, so the newest decision is too.
	at, err := s.Position(ctx, shard)
	if err == nil && at.Found != next {
		err = fmt.Errorf("shard %d: its checkpoint has moved to epoch %d meanwhile", shard, at.Found.Epoch)
	}
	return at, err
}

// last asks the leader of a stream for the newest message on a subject.
func (s *Stores) last(ctx context.Context, stream, subject string) (ledger.Message, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return ledger.LastMessage(ctx, s.JS, stream, subject)
}

// Position returns how a shard stands in the decisions' stream.
func (s *Stores) Position(ctx context.Context, shard uint32) (publish.Position, error) {
	var at publish.Position
	const stream = "KV_" + ledger.DecisionsBucket
	m, ok, err := s.last(ctx, stream, publish.CheckpointSubject(shard))
	if err != nil {
		return at, fmt.Errorf("checkpoint of shard %d: %w", shard, err)
	}
	if ok {
		at.Revision = m.Sequence
		if at.Found, err = publish.ReadCheckpoint(shard, m.Header, m.Data); err != nil {
			return at, fmt.Errorf("%w: %w", ErrForGood, err)
		}
	}
	m, ok, err = s.last(ctx, stream, publish.DecisionsSubject(shard))
	switch {
	case err != nil:
		return at, fmt.Errorf("newest decision of shard %d: %w", shard, err)
	case !ok:
	case len(m.Data) == 0:
		// Somebody has deleted a key by hand. What was published after the
		// checkpoint is published again: the same, under the same ids.
		s.Log.Warn().Uint32("shard", shard).Str("key", m.Subject).Msg("the newest decision was deleted by hand")
	default:
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			return at, fmt.Errorf("%w: newest decision of shard %d: %w", ErrForGood, shard, err)
		}
		at.Newest, at.NewestAt = publish.ToldBy(&d), m.Sequence
	}
	return at, nil
}

// Taking is a shard that came to us, and the snapshot that its checkpoint named.
type Taking struct {
	Shard    uint32
	Epoch    uint64
	Snapshot string
}

// Sweep deletes snapshots that former owners have stored and that no checkpoint
// named: they were killed before. Those of our epoch, and of later ones if the
// shard is not ours any more by now, stay.
func (s *Stores) Sweep(ctx context.Context, all []Taking) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	taken := make(map[string]Taking, len(all))
	for _, t := range all {
		taken[snapshotPrefix+strconv.FormatUint(uint64(t.Shard), 10)] = t
	}
	objects, err := s.Objects.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, object := range objects {
		shard, _, _ := strings.Cut(object.Name, "/")
		_, epoch, _ := strings.Cut(object.Name, "-")
		_, epoch, _ = strings.Cut(epoch, "-")
		t, ours := taken[shard]
		if n, err := strconv.ParseUint(epoch, 10, 64); !ours || err != nil || n >= t.Epoch || object.Name == t.Snapshot {
			continue
		}
		if err := s.Objects.Delete(ctx, object.Name); err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
			return fmt.Errorf("delete snapshot %s: %w", object.Name, err)
		}
	}
	return nil
}

// SnapshotName names the state of a shard after an entry, kept by the owner of an
// epoch.
func SnapshotName(shard uint32, at, epoch uint64) string {
	return fmt.Sprintf("%s%d/%d-%d", snapshotPrefix, shard, at, epoch)
}

// snapshotPrefix, then the shard's number, a slash and what tells its snapshots
// apart.
const snapshotPrefix = "shard-"

var errLags = errors.New("the replica that answered does not know it yet")

// load returns the state that the checkpoint names, or an empty one.
func (s *Stores) load(ctx context.Context, shard uint32, name string) (*quota.Shard, error) {
	if name == "" {
		return quota.New(quota.Options{Shard: shard, Horizon: s.Horizon}), nil
	}
	data, err := s.Objects.GetBytes(ctx, name)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		// The store asks any replica; the leader knows whether it is there.
		m, found, askErr := ledger.LastMessage(ctx, s.JS, "OBJ_"+ledger.SnapshotsBucket, "$O."+ledger.SnapshotsBucket+".M."+base64.URLEncoding.EncodeToString([]byte(name)))
		var info struct {
			Deleted bool `json:"deleted"`
		}
		if askErr == nil && found {
			askErr = json.Unmarshal(m.Data, &info)
		}
		if askErr != nil {
			return nil, fmt.Errorf("snapshot %s: %w: %w", name, errLags, askErr)
		}
		if found && !info.Deleted {
			return nil, fmt.Errorf("snapshot %s: %w", name, errLags)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", name, err)
	}
	state, err := quota.Read(data)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", name, err)
	}
	if state.Number() != shard {
		return nil, fmt.Errorf("snapshot %s is of shard %d", name, state.Number())
	}
	return state, nil
}

// SnapshotAt is the position that a snapshot's name tells, 0 without one.
func SnapshotAt(name string) uint64 {
	_, rest, _ := strings.Cut(name, "/")
	at, _, _ := strings.Cut(rest, "-")
	n, err := strconv.ParseUint(at, 10, 64)
	if err != nil {
		return 0 // of another version: it is behind everything
	}
	return n
}
