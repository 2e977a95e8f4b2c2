package aggregator

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
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

// sweep deletes snapshots of the shards that no checkpoint names: whoever stored
// them was killed before. It is for when the shards are owned and not yet run.
func (s *service) sweep(ctx context.Context, owners []*owner) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	all, err := s.objects.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil
	}
	if err != nil {
		return err
	}
	named := make(map[string]string, len(owners))
	for _, o := range owners {
		named[fmt.Sprintf("%s%d", snapshotPrefix, o.shard)] = o.pub.Last().Snapshot
	}
	for _, object := range all {
		shard, _, _ := strings.Cut(object.Name, "/")
		if name, ours := named[shard]; !ours || name == object.Name {
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
