package explain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
)

// base is the state that a replay begins with.
type base struct {
	state    *quota.Shard
	snapshot string // name; empty: the ledger's beginning
	data     []byte // of the snapshot
	horizon  usage.Micros
	currency string // of the ledger's costs
}

// again returns the same state once more.
func (b *base) again() (*quota.Shard, error) {
	if b.snapshot != "" {
		return quota.Read(b.data)
	}
	return quota.New(quota.Options{Shard: b.state.Number(), Horizon: b.horizon}), nil
}

// trace returns the options of a trace that begins there.
func (b *base) trace(d *usage.Decision, below trace.Position) trace.Options {
	return trace.Options{State: b.state, Snapshot: b.snapshot != "", Again: b.again, Target: d, Below: below, Currency: b.currency, Most: maxIndexed}
}

// listTimeout bounds the looking for snapshots: who may not read them is not
// answered.
const listTimeout = 5 * time.Second

type snapshot struct {
	name string
	at   uint64
}

// base returns where a replay to entries before the sequence `before` begins:
// at the newest snapshot from before the sequence `all`, from which on nothing
// may be missing, else at the ledger's beginning, else, when that is gone, at
// the newest snapshot before `before`. It returns nil when there is none.
func (x *Explainer) base(ctx context.Context, shard uint32, all, before uint64) (*base, error) {
	geometry, err := ledger.ReadGeometry(ctx, x.o.JS)
	if err != nil {
		return nil, err
	}
	b, err := x.begin(ctx, shard, all, before)
	if b != nil {
		b.currency = geometry.Currency
	}
	return b, err
}

func (x *Explainer) begin(ctx context.Context, shard uint32, all, before uint64) (*base, error) {
	_, state, err := x.ledger(ctx)
	if err != nil {
		return nil, err
	}
	horizon := usage.Micros(x.o.Horizon.Microseconds())
	beginning := &base{state: quota.New(quota.Options{Shard: shard, Horizon: horizon}), horizon: horizon}
	if all <= 1 && state.FirstSeq <= 1 {
		return beginning, nil
	}
	list, store, err := x.snapshots(ctx, shard)
	switch {
	case err == nil:
	case state.FirstSeq <= 1 && ctx.Err() == nil:
		// Without the right to read them, or while they are away, it takes longer.
		return beginning, nil
	default:
		return nil, err
	}
	first := func(usable func(snapshot) bool) (*base, error) {
		for _, s := range list {
			if s.at >= before || s.at+1 < state.FirstSeq || !usable(s) {
				continue
			}
			b, err := load(ctx, store, shard, s)
			if err == nil {
				b.horizon = horizon
				return b, nil
			}
			if ctx.Err() != nil {
				return nil, err
			}
			// It was replaced meanwhile, or is damaged: another will do.
		}
		return nil, nil
	}
	if b, err := first(func(s snapshot) bool { return s.at < all }); b != nil || err != nil {
		return b, err
	}
	if state.FirstSeq <= 1 {
		return beginning, nil
	}
	return first(func(s snapshot) bool { return s.at >= all })
}

// snapshots returns those of a shard, newest first. Without the bucket there is
// none.
func (x *Explainer) snapshots(ctx context.Context, shard uint32) ([]snapshot, jetstream.ObjectStore, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	store, err := x.o.JS.ObjectStore(ctx, ledger.SnapshotsBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
	}
	objects, err := store.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, nil, fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
	}
	var list []snapshot
	prefix := fmt.Sprintf("shard-%d/", shard)
	for _, o := range objects {
		var at, epoch uint64
		rest, ours := strings.CutPrefix(o.Name, prefix)
		if n, err := fmt.Sscanf(rest, "%d-%d", &at, &epoch); ours && err == nil && n == 2 {
			list = append(list, snapshot{o.Name, at})
		}
	}
	slices.SortFunc(list, func(a, b snapshot) int { return cmp.Compare(b.at, a.at) })
	return list, store, nil
}

func load(ctx context.Context, store jetstream.ObjectStore, shard uint32, s snapshot) (*base, error) {
	data, err := store.GetBytes(ctx, s.name)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", s.name, err)
	}
	state, err := quota.Read(data)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", s.name, err)
	}
	if state.Number() != shard || state.Sequence() != s.at {
		return nil, fmt.Errorf("snapshot %s is of shard %d at %d", s.name, state.Number(), state.Sequence())
	}
	return &base{state: state, snapshot: s.name, data: data}, nil
}
