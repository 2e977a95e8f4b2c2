package aggregator

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/anchor"
)

// snapshot writes the state; the checkpoint names it when every decision up to
// its position is published. What is cut off leaves its beginning in the bucket for
// a while (tidy), so an end of the tenure does not: the whole nobody names, and the
// next who takes the shard over removes it.
func (o *owner) snapshot() {
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
	name := anchor.SnapshotName(o.shard, at, o.pub.Last().Epoch)
	o.snapshotting, o.entries, o.lastSnapshot = true, 0, begin
	o.do(o.alive, snapshotTimeout, func(ctx context.Context) func() error {
		_, err := o.objects.PutBytes(ctx, name, data)
		return func() error {
			o.snapshotting = false
			if err != nil {
				// The old one stands, and the log with it: the next try will do.
				o.m.Snapshots.WithLabelValues("failed").Inc()
				o.log.Warn().Err(err).Msg("a snapshot could not be stored")
				return nil
			}
			o.m.Snapshots.WithLabelValues("stored").Inc()
			o.m.SnapshotSeconds.Observe(time.Since(begin).Seconds())
			o.m.SnapshotBytes.Set(float64(len(data)))
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
