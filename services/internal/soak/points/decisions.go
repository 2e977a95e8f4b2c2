package points

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership"
)

// Decisions looks at every decision that was ever published and is kept, and
// returns how many there are and what is wrong with them: one that was published
// twice, or after a newer one about the same.
func Decisions(ctx context.Context, js jetstream.JetStream) (n int, wrong []string, err error) {
	stream, err := js.Stream(ctx, "KV_"+ledger.DecisionsBucket)
	if err != nil {
		return 0, nil, fmt.Errorf("decisions: %w", err)
	}
	state := stream.CachedInfo().State
	ids, newest := map[string]uint64{}, map[string]uint64{}
	for seq := state.FirstSeq; seq <= state.LastSeq; seq++ {
		m, err := stream.GetMsg(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue // a checkpoint that was replaced
		}
		if err != nil {
			return len(ids), wrong, fmt.Errorf("decision %d: %w", seq, err)
		}
		if len(m.Data) == 0 || strings.HasPrefix(m.Subject, "$KV."+ledger.DecisionsBucket+".checkpoint.") {
			continue
		}
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			return len(ids), wrong, fmt.Errorf("decision %d: %w", seq, err)
		}
		if before, twice := ids[d.ID]; twice {
			wrong = append(wrong, fmt.Sprintf("decision %s was published as %d and as %d", d.ID, before, seq))
		}
		if d.Revision < newest[m.Subject] {
			wrong = append(wrong, fmt.Sprintf("%s: revision %d was published after %d", m.Subject, d.Revision, newest[m.Subject]))
		}
		ids[d.ID], newest[m.Subject] = seq, d.Revision
	}
	return len(ids), wrong, nil
}

// Claims returns which of the members says to own which shards, and how many none
// of them does.
func Claims(ctx context.Context, js jetstream.JetStream, shards uint32, members []string) (owned map[string][]uint32, free int) {
	owned = map[string][]uint32{}
	kv, err := js.KeyValue(ctx, ownership.DefaultBucket)
	if err != nil {
		return owned, int(shards)
	}
	for shard := range shards {
		var claim struct {
			Member   string `json:"member"`
			Released bool   `json:"released"`
		}
		e, err := kv.Get(ctx, fmt.Sprintf("shard.%d", shard))
		if err != nil || json.Unmarshal(e.Value(), &claim) != nil || claim.Released || !slices.Contains(members, claim.Member) {
			free++
			continue
		}
		owned[claim.Member] = append(owned[claim.Member], shard)
	}
	return owned, free
}
