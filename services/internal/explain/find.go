package explain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

const (
	decisionsStream  = "KV_" + ledger.DecisionsBucket
	checkpointPrefix = "$KV." + ledger.DecisionsBucket + ".checkpoint."
	// clockSlack is by how much the clocks of two streams' leaders may differ.
	clockSlack = 30 * time.Second
	// maxScanned published decisions are looked at; the log has the rest.
	maxScanned = 1 << 20
)

// found is a decision and whether it is the published copy.
type found struct {
	usage.Decision
	published bool
	request   *Call // that it has refused, when that was asked for
}

// stretch is the part of the ledger that can have led to a decision: an id
// holds the second of its stream time.
type stretch struct {
	from, to uint64            // [from, to)
	shards   []uint32          // that have entries there, in order of appearance
	last     map[uint32]uint64 // newest of each
	// cut is why it may not be the whole of it; nil: it is.
	cut error
}

// find looks for a decision: among the published ones, of which 64 revisions a
// limit are kept, then in the ledger itself, where replaying makes it again.
func (x *Explainer) find(ctx context.Context, id ksuid.KSUID, p *progress) (found, error) {
	return x.findOr(ctx, id, p, true)
}

// findOr is find; with request also the decision that has refused a request of that id.
func (x *Explainer) findOr(ctx context.Context, id ksuid.KSUID, p *progress, request bool) (found, error) {
	s, err := x.stretchOf(ctx, id)
	if err != nil {
		return found{}, err
	}
	d, ok, err := x.findPublished(ctx, id, s, p)
	if err != nil {
		return found{}, err
	}
	if ok {
		return found{Decision: d, published: true}, nil
	}
	if request {
		// Gateways make the ids of requests as those of decisions are made. To look for
		// one costs less than to replay.
		r, ok, err := x.requestNear(ctx, id, p)
		if err != nil {
			return found{}, err
		}
		if ok {
			f, err := x.findOr(ctx, r.decision, p, false)
			f.request = r.call
			return f, err
		}
	}
	for _, shard := range s.shards {
		if d, ok, err = x.findInShard(ctx, id, shard, s, p); err != nil {
			return found{}, err
		}
		if ok {
			return found{Decision: d}, nil
		}
	}
	if s.cut != nil {
		return found{}, s.cut
	}
	return found{}, fmt.Errorf("%s: %w: nothing that the ledger holds of %s led to it", id, ErrUnknown, id.Time().UTC().Format(time.RFC3339))
}

func (x *Explainer) ledger(ctx context.Context) (jetstream.Stream, jetstream.StreamState, error) {
	return x.stream(ctx, ledger.Stream)
}

func (x *Explainer) stream(ctx context.Context, name string) (jetstream.Stream, jetstream.StreamState, error) {
	stream, err := x.o.JS.Stream(ctx, name)
	if err != nil {
		return nil, jetstream.StreamState{}, fmt.Errorf("stream %s: %w", name, err)
	}
	return stream, stream.CachedInfo().State, nil
}

// stretchOf returns what can have led to a decision of that id.
func (x *Explainer) stretchOf(ctx context.Context, id ksuid.KSUID) (stretch, error) {
	stream, state, err := x.ledger(ctx)
	if err != nil {
		return stretch{}, err
	}
	second := id.Time()
	next := second.Add(time.Second)
	unknown := fmt.Errorf("%s: %w: the ledger has no entry of %s", id, ErrUnknown, second.UTC().Format(time.RFC3339))
	if state.Msgs == 0 || second.After(state.LastTime) {
		return stretch{}, unknown
	}
	s := stretch{last: map[uint32]uint64{}}
	if state.FirstSeq > 1 && second.Before(state.FirstTime) {
		s.cut = fmt.Errorf("%s is of %s, and the ledger begins at entry %d of %s: it is older than what can be explained: %w",
			id, second.UTC().Format(time.RFC3339), state.FirstSeq, state.FirstTime.UTC().Format(time.RFC3339), ledger.ErrPurged)
	}
	if s.from, err = sequenceAt(ctx, stream, state, second); err != nil {
		return stretch{}, err
	}
	if s.to, err = sequenceAt(ctx, stream, state, next); err != nil {
		return stretch{}, err
	}
	if s.from >= s.to {
		if s.cut == nil {
			return stretch{}, unknown
		}
		return s, nil
	}
	err = x.read(ctx, ledger.Stream, nil, s.from, s.to-1, func(m *ledger.Message) error {
		if _, shard, err := ledger.ParseSubject(m.Subject); err == nil {
			if s.last[shard] == 0 {
				s.shards = append(s.shards, shard)
			}
			s.last[shard] = m.Sequence
		}
		return nil
	})
	return s, err
}

// sequenceAt returns the first sequence of a stream whose time is not before t;
// one after the last when there is none.
func sequenceAt(ctx context.Context, stream jetstream.Stream, state jetstream.StreamState, t time.Time) (uint64, error) {
	lo, hi := max(state.FirstSeq, 1), state.LastSeq+1
	if ledger.HasTestClock(stream) {
		return lo, nil // the server's time says nothing of the ledger's
	}
	for lo < hi {
		mid := lo + (hi-lo)/2
		// The stream may have holes: whatever comes next stands for them.
		m, err := stream.GetMsg(ctx, mid, jetstream.WithGetMsgSubject(">"))
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			hi = mid
		case err != nil:
			return 0, fmt.Errorf("stream %s: %w", stream.CachedInfo().Config.Name, err)
		case m.Time.Before(t):
			lo = m.Sequence + 1
		default:
			hi = mid
		}
	}
	return lo, nil
}

// errStop ends a reading.
var errStop = errors.New("that was all")

// read hands over a stream's entries from one sequence to another. The caller
// knows that there is an entry of the subjects at or after the last.
func (x *Explainer) read(ctx context.Context, name string, subjects []string, from, to uint64, handle func(*ledger.Message) error) error {
	if from > to {
		return nil
	}
	var lately error
	err := ledger.Read(ctx, x.o.JS, ledger.ReadOptions{Stream: name, Subjects: subjects, From: from, OnError: func(err error) { lately = err }}, func(m ledger.Message) error {
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
		return errors.Join(fmt.Errorf("read %s: %w", name, ctx.Err()), lately)
	}
	return err
}

// findPublished looks among the decisions that were published since.
func (x *Explainer) findPublished(ctx context.Context, id ksuid.KSUID, s stretch, p *progress) (usage.Decision, bool, error) {
	stream, state, err := x.stream(ctx, decisionsStream)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return usage.Decision{}, false, nil // the log is the truth
	case err != nil:
		return usage.Decision{}, false, err
	case state.Msgs == 0:
		return usage.Decision{}, false, nil
	}
	from, err := sequenceAt(ctx, stream, state, id.Time().Add(-clockSlack))
	if err != nil {
		return usage.Decision{}, false, err
	}
	var d usage.Decision
	ok := false
	scan := scan{open: map[uint32]bool{}, to: s.to}
	for _, shard := range s.shards {
		scan.open[shard] = true
	}
	if s.cut != nil {
		scan.open[ledger.MaxShards] = true // it can be of any shard: nothing ends the scan
	}
	text := []byte(id.String())
	n := 0
	err = x.read(ctx, decisionsStream, nil, from, state.LastSeq, func(m *ledger.Message) error {
		p.at("looking among the published decisions", m.Sequence-from, state.LastSeq-from+1)
		if bytes.Contains(m.Data, text) {
			if d, err = ledger.UnmarshalDecision(m.Data); err == nil && d.ID == id.String() {
				ok = true
				return errStop
			}
		}
		if n++; n == maxScanned || scan.over(m) {
			return errStop
		}
		return nil
	})
	if errors.Is(err, ledger.ErrPurged) {
		return usage.Decision{}, false, nil // the bucket has dropped what came next
	}
	return d, ok, err
}

// scan knows of which shards a decision may yet come: they are published in the
// order of the ledger.
type scan struct {
	open map[uint32]bool
	to   uint64
}

// over reports whether every shard has published more than the stretch.
func (s *scan) over(m *ledger.Message) bool {
	if strings.HasPrefix(m.Subject, checkpointPrefix) {
		var c tollkeeperv1.Checkpoint
		if proto.Unmarshal(m.Data, &c) == nil && c.GetLedgerSequence()+1 >= s.to {
			delete(s.open, c.GetShard())
		}
	} else if d, err := ledger.UnmarshalDecision(m.Data); err == nil && d.Revision >= s.to {
		delete(s.open, d.Shard)
	}
	return len(s.open) == 0
}

// findInShard replays a shard to see whether it makes the decision.
func (x *Explainer) findInShard(ctx context.Context, id ksuid.KSUID, shard uint32, s stretch, p *progress) (usage.Decision, bool, error) {
	b, err := x.base(ctx, shard, s.from, s.from)
	if err != nil {
		return usage.Decision{}, false, err
	}
	if b == nil {
		_, state, err := x.ledger(ctx)
		if err != nil {
			return usage.Decision{}, false, err
		}
		return usage.Decision{}, false, fmt.Errorf("no published copy of %s is kept, and the ledger begins at entry %d of %s without a snapshot before the decision: it is older than what can be explained: %w",
			id, state.FirstSeq, state.FirstTime.UTC().Format(time.RFC3339), ledger.ErrPurged)
	}
	var d usage.Decision
	ok := false
	text := id.String()
	decoder := fold.Decoder{Frame: ledger.Frame{CostsIn: b.currency}}
	from, to := b.state.Sequence()+1, s.last[shard]
	err = x.read(ctx, ledger.Stream, ledger.ShardSubjects(shard), from, to, func(m *ledger.Message) error {
		p.at("looking in the ledger", m.Sequence-from, to-from+1)
		// What can't be decoded still lets time pass.
		e, _, _ := decoder.Decode(m)
		fx := b.state.Apply(e)
		if fx.Newer != nil {
			return fx.Newer
		}
		if i := indexOf(fx, text); i >= 0 {
			d, ok = fx.Decisions[i], true
			return errStop
		}
		return nil
	})
	return d, ok, err
}

func indexOf(fx *quota.Effects, id string) int {
	for i := range fx.Decisions {
		if fx.Decisions[i].ID == id {
			return i
		}
	}
	return -1
}
