package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// counted publishes the frames to the ledger while an aggregator counts, and
// returns calls a second from the first publish until every shard says that it
// has counted its last frame.
func counted(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, shards uint32, frames []encoded) (float64, error) {
	_, calls := bytesOf(frames)
	start := time.Now()
	if err := publish(ctx, js, ledger.CallsSubject, frames); err != nil {
		return 0, err
	}
	stream, err := js.Stream(ctx, ledger.Stream)
	if err != nil {
		return 0, fmt.Errorf("ledger: %w", err)
	}
	for shard := range shards {
		last, err := stream.GetLastMsgForSubject(ctx, ledger.CallsSubject(shard))
		if err != nil {
			return 0, fmt.Errorf("ledger, shard %d: %w", shard, err)
		}
		if err := waitCounted(ctx, nc, shard, last.Sequence); err != nil {
			return 0, err
		}
	}
	return float64(calls) / time.Since(start).Seconds(), nil
}

// waitCounted asks the owner of a shard until it has counted up to a sequence.
func waitCounted(ctx context.Context, nc *nats.Conn, shard uint32, sequence uint64) error {
	ask, err := json.Marshal(ledger.UsageRequest{Top: 1})
	if err != nil {
		return fmt.Errorf("marshal usage request: %w", err)
	}
	for {
		msg, err := question(ctx, nc, shard, ask)
		if err == nil && msg.Header.Get(ledger.ErrorHeader) == "" { // else it is to be asked again
			var reply ledger.UsageReply
			if err := json.Unmarshal(msg.Data, &reply); err != nil {
				return fmt.Errorf("aggregator, shard %d: %w", shard, err)
			}
			if reply.Sequence >= sequence {
				return nil
			}
		} else if ctx.Err() != nil {
			return fmt.Errorf("aggregator, shard %d: %w", shard, ctx.Err())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// answersWithin is far more than an owner needs. A question that comes while the
// shard changes hands, as it does where the machine is so busy that a session
// lapses, is never answered: who waited for that answer only would wait for ever.
const answersWithin = time.Second

func question(ctx context.Context, nc *nats.Conn, shard uint32, ask []byte) (*nats.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, answersWithin)
	defer cancel()
	return nc.RequestWithContext(ctx, ledger.UsageSubject(shard), ask)
}
