package plans

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	ledgerfold "github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"
)

// drawDocument draws a document of which Check finds nothing wrong: two roots with
// accounts as deep below them as may be.
func drawDocument(t *rapid.T, name string) *Document {
	doc := &Document{Version: 1, Plans: []Plan{{ID: "p"}, {ID: "q"}}}
	depth := map[string]int{}
	for root := range 2 {
		ids := []string{fmt.Sprint("root-", root)}
		depth[ids[0]] = 1
		doc.Accounts = append(doc.Accounts, Account{ID: ids[0]})
		for _, n := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}).Draw(t, name+" order") {
			if rapid.IntRange(0, 5).Draw(t, name+" left out") == 0 {
				continue
			}
			// Mostly below the one before: chains, whose ends are deep.
			parent := ids[len(ids)-1]
			if depth[parent] >= planfile.MaxDepth || rapid.IntRange(0, 7).Draw(t, name+" elsewhere") == 0 {
				parent = rapid.SampledFrom(ids).Draw(t, name+" parent")
			}
			if depth[parent] >= planfile.MaxDepth {
				continue
			}
			id := fmt.Sprintf("%d-%d", root, n)
			depth[id] = depth[parent] + 1
			ids = append(ids, id)
			doc.Accounts = append(doc.Accounts, Account{ID: id, Parent: parent, Plan: rapid.SampledFrom([]string{"", "p", "q"}).Draw(t, name+" plan")})
		}
	}
	return doc
}

func TestTheCoreTakesWhateverAnActWrites(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const shards = 2
		state := make([]*quota.Shard, shards)
		for s := range state {
			state[s] = quota.New(quota.Options{Shard: uint32(s)})
		}
		var decoder ledgerfold.Decoder
		var before *Document
		sequence := uint64(0)
		for n := range 3 {
			next := drawDocument(t, fmt.Sprint("document ", n))
			if err := Check(next); err != nil {
				t.Fatal(err)
			}
			if err := planfile.CheckMove(before, nil, next); err != nil {
				t.Fatal(err)
			}
			for _, e := range entries(act{ID: fmt.Sprint("act ", n), CreatedAt: 1_700_000_000_000_000}, before, next, shards) {
				m, err := ledger.ControlMessage(e.shard, e.entry)
				if err != nil {
					t.Fatal(err)
				}
				sequence++
				core, _, err := decoder.Decode(&ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: sequence})
				if err != nil {
					t.Fatal(err)
				}
				if fx := state[e.shard].Apply(core); fx.Invalid != nil || fx.Repeated {
					t.Fatalf("the shard refuses an entry of act %d: %v (repeated: %t)", n, fx.Invalid, fx.Repeated)
				}
			}
			index := NewIndex(next)
			for _, a := range next.Accounts {
				got, ok := state[ledger.ShardOf(index.Root(a.ID), shards)].Account(a.ID)
				if !ok || got.Parent != a.Parent || got.Plan != a.Plan {
					t.Fatalf("account %s is %+v, wanted %+v", a.ID, got, a)
				}
			}
			before = next
		}
	})
}
