package plans

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"
)

// Bounds of one ledger entry of accounts.
const (
	maxEntryAccounts = 5000
	maxEntryBytes    = 256 << 10
)

// act is one applying of a document: what every entry of it has in common.
type act struct {
	ID          string `json:"id"` // ksuid
	Author      string `json:"author"`
	CreatedAt   int64  `json:"created_at_unix_micros"`
	EffectiveAt int64  `json:"effective_at_unix_micros"`
}

// actID derives the id of an act from what it does: the same act done again has
// the same id.
func actID(appliedRevision uint64, from, to string, createdAt usage.Micros) string {
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%d\x00%s\x00%s\x00%d", appliedRevision, from, to, createdAt) // hash.Hash never fails
	return partID(createdAt, h.Sum(nil))
}

func partID(at usage.Micros, sum []byte) string {
	// FromParts fails on a payload that is not 16 bytes long.
	id, err := ksuid.FromParts(at.Time(), sum[:16])
	if err != nil {
		panic(fmt.Sprintf("plans: %v", err))
	}
	return id.String()
}

// entryID is the id of an act's n-th entry in a shard. They differ within a
// shard, because a shard takes an id once; the plans (n = 0) have one id in all
// shards.
func (a act) entryID(n int) string {
	h := sha256.New()
	_, _ = h.Write([]byte(a.ID))
	_ = binary.Write(h, binary.BigEndian, uint64(n))
	return partID(usage.Micros(a.CreatedAt), h.Sum(nil))
}

func (a act) entry(n int) *tollkeeperv1.ControlEntry {
	return &tollkeeperv1.ControlEntry{Id: a.entryID(n), Author: a.Author, CreatedAtUnixMicros: a.CreatedAt}
}

// shardEntry is a control entry and the shard it belongs to.
type shardEntry struct {
	shard uint32
	entry *tollkeeperv1.ControlEntry
}

// entries are the control entries that make next of before, shard by shard:
// plans first, then accounts from roots to leaves, closed ones last.
func entries(a act, before, next *Document, shards uint32) []shardEntry {
	old, now := &Document{}, NewIndex(next)
	if before != nil {
		old = before
	}
	oldIndex := NewIndex(old)
	plansChanged := PlansVersion(old) != PlansVersion(next)
	type placed struct {
		*tollkeeperv1.Account
		depth int
	}
	byShard := make([][]placed, shards)
	put := func(root string, depth int, acc usage.Account) {
		s := ledger.ShardOf(root, shards)
		byShard[s] = append(byShard[s], placed{ledger.AccountToProto(&acc), depth})
	}
	for i := range next.Accounts {
		n := &next.Accounts[i]
		if o, ok := oldIndex.Account(n.ID); ok && o.Parent == n.Parent && o.Plan == n.Plan {
			continue
		}
		path := now.Path(n.ID)
		put(path[len(path)-1], len(path), usage.Account{ID: n.ID, Parent: n.Parent, Plan: n.Plan})
	}
	for i := range old.Accounts {
		o := &old.Accounts[i]
		if _, ok := now.Account(o.ID); ok {
			continue
		}
		closed := usage.Account{ID: o.ID, Parent: o.Parent, Closed: true}
		root := oldIndex.Root(o.ID)
		if closedDepth(oldIndex, now, o.ID) > planfile.MaxDepth {
			// Those above it went deeper than it can follow. A shard would refuse
			// the entry, with all that stands in it.
			closed.Parent = root
		}
		put(root, planfile.MaxDepth+1, closed)
	}
	var out []shardEntry
	for s := range shards {
		n := 0
		if plansChanged {
			set := planfile.PlanSet(next)
			set.EffectiveAtUnixMicros = a.EffectiveAt
			e := a.entry(n)
			e.Body = &tollkeeperv1.ControlEntry_PlanSet{PlanSet: set}
			out = append(out, shardEntry{s, e})
		}
		n++
		accounts := byShard[s]
		slices.SortFunc(accounts, func(x, y placed) int {
			return cmp.Or(cmp.Compare(x.depth, y.depth), cmp.Compare(x.GetId(), y.GetId()))
		})
		for len(accounts) > 0 {
			set, bytes := &tollkeeperv1.AccountSet{}, 0
			for len(accounts) > 0 && len(set.Accounts) < maxEntryAccounts {
				size := proto.Size(accounts[0].Account) + 4
				if bytes += size; bytes > maxEntryBytes && len(set.Accounts) > 0 {
					break
				}
				set.Accounts = append(set.Accounts, accounts[0].Account)
				accounts = accounts[1:]
			}
			e := a.entry(n)
			e.Body = &tollkeeperv1.ControlEntry_AccountSet{AccountSet: set}
			out = append(out, shardEntry{s, e})
			n++
		}
	}
	return out
}

// closedDepth is how many accounts there are on the path of one that old has and
// now has not, itself among them, as the act leaves it.
func closedDepth(old, now Index, id string) int {
	for depth := 1; ; depth++ {
		a, ok := now.Account(id)
		if !ok {
			a, ok = old.Account(id)
		}
		if !ok || a.Parent == "" || depth > planfile.MaxDepth {
			return depth
		}
		id = a.Parent
	}
}

// micros is the time in the words of the ledger.
func micros(t time.Time) usage.Micros { return usage.At(t) }
