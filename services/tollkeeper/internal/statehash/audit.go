// Package statehash recomputes the state of the shards out of the ledger and
// compares its hash with what aggregators came to (law 1): what `tollkeeper audit`
// prints.
package statehash

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

// askTimeout bounds one question to an aggregator, and one look at the snapshots.
const askTimeout = 5 * time.Second

// Auditor recomputes. Not safe for concurrent use.
type Auditor struct {
	JS jetstream.JetStream
	NC *nats.Conn
	// Shards of the ledger.
	Shards uint32
	// Currency of the ledger's costs.
	Currency string
	// Horizon of foreign events before the ledger says one; 0 means a day.
	Horizon time.Duration
	// Progress, if set, is told of every entry.
	Progress func(shard uint32, done, total uint64)
}

// Shard is what one shard's ledger gives.
type Shard struct {
	Shard uint32 `json:"shard"`
	// Snapshot that the fold began with; empty: the ledger's beginning.
	Snapshot string `json:"from_snapshot,omitempty"`
	From     uint64 `json:"from_sequence"`
	// Entries of the shard that were folded, up to Sequence at StreamTime.
	Entries     uint64       `json:"entries"`
	Sequence    uint64       `json:"ledger_sequence"`
	StreamTime  usage.Micros `json:"stream_time_unix_micros"`
	StateHash   string       `json:"state_hash"`
	Accounts    int          `json:"account_count"`
	PlanVersion string       `json:"plan_version"`
	CoreVersion uint32       `json:"core_version"`
	// Took in microseconds.
	Took     int64        `json:"took_micros"`
	Compared []Comparison `json:"compared"`
}

// Same reports whether everybody came to the same.
func (s *Shard) Same() bool {
	for i := range s.Compared {
		if !s.Compared[i].Same && !s.Compared[i].Unreadable {
			return false
		}
	}
	return true
}

// What a shard's state is compared with.
const (
	WithSnapshot   = "snapshot"
	WithAggregator = "aggregator"
)

// Comparison of the ledger's state with another's at the same position.
type Comparison struct {
	With     string `json:"with"`           // WithSnapshot, WithAggregator
	Name     string `json:"name,omitempty"` // of the snapshot
	Epoch    uint64 `json:"epoch,omitempty"`
	Sequence uint64 `json:"ledger_sequence"`
	Hash     string `json:"state_hash"`
	// Replayed is the hash that the ledger gives there.
	Replayed string `json:"replayed_hash"`
	Same     bool   `json:"same"`
	// Unreadable: a snapshot that another version of this program wrote, or that is
	// damaged. Owners count from the ledger without it, so it contradicts nothing.
	Unreadable bool `json:"unreadable,omitempty"`
	// Difference says, for people, what differs first.
	Difference string `json:"difference,omitempty"`
}

// point is a position at which another's state is known.
type point struct {
	Comparison
	state *quota.Shard // nil: its hash only
}

// Audit folds a shard's ledger up to where it ends now. Its errors are NATS's,
// ctx's, ledger.ErrPurged (the beginning is gone and no snapshot is kept) and
// *quota.NewerError: only a newer program can fold all of it.
func (a *Auditor) Audit(ctx context.Context, shard uint32) (Shard, error) {
	began := time.Now()
	out := Shard{Shard: shard, Compared: []Comparison{}}
	points, err := a.points(ctx, shard)
	if err != nil {
		return out, err
	}
	end, err := a.end(ctx, shard)
	if err != nil {
		return out, err
	}
	state, rest, err := a.base(ctx, shard, points)
	if err != nil {
		return out, err
	}
	if len(rest) < len(points) {
		out.Snapshot = points[len(points)-len(rest)-1].Name
	}
	points = rest
	out.From = state.Sequence() + 1
	meet := func() {
		for len(points) > 0 && points[0].Sequence <= state.Sequence() {
			out.Compared = append(out.Compared, points[0].compare(state))
			points = points[1:]
		}
	}
	meet()
	decoder := fold.Decoder{Frame: ledger.Frame{CostsIn: a.Currency}}
	err = a.read(ctx, shard, out.From, max(end, lastOf(points)), func(m *ledger.Message) error {
		// What can't be decoded still lets time pass.
		e, _, _ := decoder.Decode(m)
		fx := state.Apply(e)
		if fx.Newer != nil {
			return fx.Newer
		}
		out.Entries++
		if a.Progress != nil {
			a.Progress(shard, m.Sequence-out.From+1, end-out.From+1)
		}
		meet()
		return nil
	})
	if err != nil {
		return out, err
	}
	for _, p := range points {
		// It counted what the ledger does not have.
		p.Difference = fmt.Sprintf("it stands at entry %d, and the shard's ledger ends at %d", p.Sequence, state.Sequence())
		out.Compared = append(out.Compared, p.Comparison)
	}
	out.Sequence, out.StreamTime, out.StateHash = state.Sequence(), state.Now(), hashOf(state)
	out.Accounts, out.PlanVersion, out.CoreVersion = state.Accounts(), state.PlanVersion(), state.Core().Version
	out.Took = time.Since(began).Microseconds()
	return out, nil
}

func lastOf(points []point) uint64 {
	if len(points) == 0 {
		return 0
	}
	return points[len(points)-1].Sequence
}

func hashOf(s *quota.Shard) string {
	h := s.Hash()
	return hex.EncodeToString(h[:])
}

// compare compares the state that the ledger gives at the point's position.
func (p *point) compare(replayed *quota.Shard) Comparison {
	c := p.Comparison
	c.Replayed = hashOf(replayed)
	switch {
	case c.Unreadable:
		c.Difference = "another version of this program wrote it, or it is damaged; owners count from the ledger without it, and the next snapshots replace it"
	case c.Sequence != replayed.Sequence():
		c.Difference = fmt.Sprintf("it stands at entry %d, which the shard's ledger does not have: the nearest is %d", c.Sequence, replayed.Sequence())
	case c.Hash == c.Replayed:
		c.Same = true
	case p.state != nil:
		c.Difference = difference(replayed, p.state)
	default:
		c.Difference = "only its hash is known: compare with its next snapshot to see which account differs"
	}
	return c
}

// points returns where others' states are known, in order of position.
func (a *Auditor) points(ctx context.Context, shard uint32) ([]point, error) {
	list, err := a.snapshots(ctx, shard)
	if err != nil {
		return nil, err
	}
	if p, ok, err := a.running(ctx, shard); err != nil {
		return nil, err
	} else if ok {
		list = append(list, p)
	}
	slices.SortStableFunc(list, func(x, y point) int { return cmp.Compare(x.Sequence, y.Sequence) })
	return list, nil
}

// running asks whoever counts the shard where it stands; false when nobody does.
func (a *Auditor) running(ctx context.Context, shard uint32) (point, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	m, err := a.NC.RequestWithContext(ctx, ledger.UsageSubject(shard), []byte("{}"))
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return point{}, false, nil
	case err != nil:
		return point{}, false, fmt.Errorf("ask the aggregator of shard %d: %w", shard, err)
	}
	if why := m.Header.Get(ledger.ErrorHeader); why != "" {
		return point{}, false, fmt.Errorf("ask the aggregator of shard %d: %s", shard, why)
	}
	var r ledger.UsageReply
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return point{}, false, fmt.Errorf("ask the aggregator of shard %d: the answer is not JSON: %w", shard, err)
	}
	return point{Comparison: Comparison{With: WithAggregator, Epoch: r.Epoch, Sequence: r.Sequence, Hash: r.StateHash}}, true, nil
}

// snapshots returns the stored states of a shard. One that was replaced meanwhile
// is left out; one that can't be read is told as different.
func (a *Auditor) snapshots(ctx context.Context, shard uint32) ([]point, error) {
	ctx, cancel := context.WithTimeout(ctx, 4*askTimeout)
	defer cancel()
	store, err := a.JS.ObjectStore(ctx, ledger.SnapshotsBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
	}
	objects, err := store.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
	}
	var list []point
	prefix := fmt.Sprintf("shard-%d/", shard)
	for _, o := range objects {
		var at, epoch uint64
		rest, ours := strings.CutPrefix(o.Name, prefix)
		if n, err := fmt.Sscanf(rest, "%d-%d", &at, &epoch); !ours || err != nil || n != 2 {
			continue
		}
		data, err := store.GetBytes(ctx, o.Name)
		if errors.Is(err, jetstream.ErrObjectNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", o.Name, err)
		}
		p := point{Comparison: Comparison{With: WithSnapshot, Name: o.Name, Epoch: epoch, Sequence: at}}
		switch state, err := quota.Read(data); {
		case err != nil:
			p.Unreadable = true
		case state.Number() != shard || state.Sequence() != at:
			return nil, fmt.Errorf("snapshot %s holds shard %d at %d", o.Name, state.Number(), state.Sequence())
		default:
			p.Hash, p.state = hashOf(state), state
		}
		list = append(list, p)
	}
	return list, nil
}

// base returns the state to begin with and the points that are still to be met:
// that before the ledger's first entry or, where that is gone, the oldest snapshot
// behind which nothing is missing.
func (a *Auditor) base(ctx context.Context, shard uint32, points []point) (*quota.Shard, []point, error) {
	stream, err := a.JS.Stream(ctx, ledger.Stream)
	if err != nil {
		return nil, nil, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	first := stream.CachedInfo().State.FirstSeq
	if first <= 1 {
		return quota.New(quota.Options{Shard: shard, Horizon: usage.Micros(a.Horizon.Microseconds())}), points, nil
	}
	for i, p := range points {
		if p.state != nil && p.Sequence+1 >= first {
			data := p.state.AppendBinary(nil) // a copy: the point's own is compared with
			state, err := quota.Read(data)
			return state, points[i+1:], err
		}
	}
	return nil, nil, fmt.Errorf("shard %d: the ledger begins at entry %d, and no snapshot from before it is kept: %w", shard, first, ledger.ErrPurged)
}

// end returns the newest entry of a shard; 0 when it has none.
func (a *Auditor) end(ctx context.Context, shard uint32) (uint64, error) {
	end := uint64(0)
	for _, subject := range ledger.ShardSubjects(shard) {
		m, found, err := ledger.LastMessage(ctx, a.JS, ledger.Stream, subject)
		if err != nil {
			return 0, err
		}
		if found {
			end = max(end, m.Sequence)
		}
	}
	return end, nil
}

// errStop ends a reading.
var errStop = errors.New("that was all")

// read hands over the shard's entries from one sequence to another; the last is
// there, or the shard's ledger ends before it.
func (a *Auditor) read(ctx context.Context, shard uint32, from, to uint64, handle func(*ledger.Message) error) error {
	if from > to {
		return nil
	}
	var lately error
	err := ledger.Read(ctx, a.JS, ledger.ReadOptions{Stream: ledger.Stream, Subjects: ledger.ShardSubjects(shard), From: from, OnError: func(err error) { lately = err }}, func(m ledger.Message) error {
		if m.Sequence > to {
			return errStop
		}
		if err := handle(&m); err != nil {
			return err
		}
		if m.Sequence == to || m.Pending == 0 {
			return errStop
		}
		return nil
	})
	switch {
	case errors.Is(err, errStop):
		return nil
	case err == nil: // ctx is done
		return errors.Join(fmt.Errorf("read shard %d: %w", shard, ctx.Err()), lately)
	}
	return err
}

// difference says which account differs first, by id.
func difference(replayed, other *quota.Shard) string {
	x, y := accounts(replayed), accounts(other)
	i, k := 0, 0
	for i < len(x) || k < len(y) {
		switch {
		case k == len(y) || i < len(x) && x[i].ID < y[k].ID:
			return fmt.Sprintf("account %q: the ledger has it, the other does not", x[i].ID)
		case i == len(x) || x[i].ID > y[k].ID:
			return fmt.Sprintf("account %q: the ledger does not have it, the other does", y[k].ID)
		}
		if a, b := text(&x[i]), text(&y[k]); a != b {
			return fmt.Sprintf("account %q: the ledger gives %s, the other has %s", x[i].ID, a, b)
		}
		i, k = i+1, k+1
	}
	for _, f := range [...]struct {
		name string
		a, b any
	}{
		{"the plans' version", replayed.PlanVersion(), other.PlanVersion()},
		{"the rules' version", replayed.Core(), other.Core()},
		{"the time", replayed.Now(), other.Now()},
		{"the number of producers that are remembered", replayed.Producers(), other.Producers()},
		{"the number of foreign events that are remembered", replayed.ForeignEvents(), other.ForeignEvents()},
	} {
		if f.a != f.b {
			return fmt.Sprintf("every account is equal; %s: the ledger gives %v, the other has %v", f.name, f.a, f.b)
		}
	}
	return "every account is equal; what is remembered of producers and events differs"
}

func accounts(s *quota.Shard) []quota.AccountUse {
	list := s.Top(s.Accounts())
	slices.SortFunc(list, func(x, y quota.AccountUse) int { return strings.Compare(x.ID, y.ID) })
	return list
}

// text writes everything about an account; maps in the order of their keys.
func text(u *quota.AccountUse) string {
	data, err := json.Marshal(u)
	if err != nil {
		return err.Error()
	}
	return string(data)
}
