package aggregator

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
)

// snapshot writes the state; the checkpoint names it when every decision up to
// its position is published.
func (o *owner) snapshot(io context.Context) {
	begin := time.Now()
	data := o.state.AppendBinary(make([]byte, 0, o.snapshotSize+o.snapshotSize/8))
	// Whoever folds the same log comes to the same: tollkeeper audit compares.
	told := o.log.Debug()
	if told.Enabled() {
		hash := o.state.Hash()
		told = told.Hex("state_hash", hash[:])
	}
	o.snapshotSize = len(data)
	at := o.state.Sequence()
	name := fmt.Sprintf("%s%d/%d-%d", snapshotPrefix, o.shard, at, o.pub.Last().Epoch)
	o.snapshotting, o.entries, o.lastSnapshot = true, 0, begin
	o.do(io, snapshotTimeout, func(ctx context.Context) func() error {
		_, err := o.objects.PutBytes(ctx, name, data)
		return func() error {
			o.snapshotting = false
			if err != nil {
				// The old one stands, and the log with it: the next try will do.
				o.m.snapshots.WithLabelValues("failed").Inc()
				o.log.Warn().Err(err).Msg("a snapshot could not be stored")
				return nil
			}
			o.m.snapshots.WithLabelValues("stored").Inc()
			o.m.snapshotSeconds.Observe(time.Since(begin).Seconds())
			o.m.snapshotBytes.Set(float64(len(data)))
			told.Uint64("sequence", at).Msg("snapshot stored")
			o.pub.Offer(name, at)
			return nil
		}
	})
}

// forget deletes a snapshot that no checkpoint names any more.
func (o *owner) forget(io context.Context, name string) {
	o.do(io, ioTimeout, func(ctx context.Context) func() error {
		err := o.objects.Delete(ctx, name)
		return func() error {
			if err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
				o.log.Warn().Err(err).Str("snapshot", name).Msg("an old snapshot could not be deleted")
			}
			return nil
		}
	})
}

// sweepAfter is how long it is waited for more shards that were taken over.
const sweepAfter = 200 * time.Millisecond

// sweeper removes the snapshots that former owners of the shards that came to us
// have left behind.
func (s *service) sweeper(ctx context.Context) error {
	for {
		taken := map[string]taking{}
		add := func(o *owner, at taking) { taken[fmt.Sprintf("%s%d", snapshotPrefix, o.shard)] = at }
		select {
		case t := <-s.unswept:
			add(t.o, t)
		case <-ctx.Done():
			return nil
		}
		more := time.NewTimer(sweepAfter)
	gather:
		for {
			select {
			case t := <-s.unswept:
				add(t.o, t)
			case <-more.C:
				break gather
			case <-ctx.Done():
				more.Stop()
				return nil
			}
		}
		if err := s.sweep(ctx, taken); err != nil && ctx.Err() == nil {
			s.log.Warn().Err(err).Msg("old snapshots could not be removed: the next take-over tries again")
		}
	}
}

// taking is a shard that came to us, and the snapshot that its checkpoint named.
type taking struct {
	o        *owner
	epoch    uint64
	snapshot string
}

// sweep deletes snapshots that former owners have stored and that no checkpoint
// named: they were killed before. Those of our epoch, and of later ones if the
// shard is not ours any more by now, stay.
func (s *service) sweep(ctx context.Context, taken map[string]taking) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	all, err := s.objects.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, object := range all {
		shard, _, _ := strings.Cut(object.Name, "/")
		_, epoch, _ := strings.Cut(object.Name, "-")
		_, epoch, _ = strings.Cut(epoch, "-")
		t, ours := taken[shard]
		if n, err := strconv.ParseUint(epoch, 10, 64); !ours || err != nil || n >= t.epoch || object.Name == t.snapshot {
			continue
		}
		if err := s.objects.Delete(ctx, object.Name); err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
			return fmt.Errorf("delete snapshot %s: %w", object.Name, err)
		}
	}
	return nil
}

// snapshotPrefix, then the shard's number, a slash and what tells its snapshots
// apart.
const snapshotPrefix = "shard-"

var errLags = errors.New("the replica that answered does not know it yet")

// load returns the state that the checkpoint names, or an empty one.
func (s *service) load(ctx context.Context, shard uint32, name string) (*quota.Shard, error) {
	if name == "" {
		return quota.New(quota.Options{Shard: shard, Horizon: s.horizon()}), nil
	}
	data, err := s.objects.GetBytes(ctx, name)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		// The store asks any replica; the leader knows whether it is there.
		m, found, askErr := ledger.LastMessage(ctx, s.js, "OBJ_"+ledger.SnapshotsBucket, "$O."+ledger.SnapshotsBucket+".M."+base64.URLEncoding.EncodeToString([]byte(name)))
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
