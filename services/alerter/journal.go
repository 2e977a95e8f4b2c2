package alerter

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// The journal makes transitions durable, each exactly once, whatever dies
// between any two of its steps and however many alerters do the same:
//
//  1. settle: if the state in KV says a transition whose append is not
//     confirmed, append it now (steps 3 and 4 of somebody who died).
//  2. write the new state, which holds the whole transition, to KV by
//     compare-and-swap. From here on it has happened.
//  3. append the transition to ALERTS on alerts.<episode>, on the condition
//     that the subject's newest message is the one that was just looked at and
//     has a smaller number.
//  4. note the append's sequence in KV.
//
// A crash before 2: nothing has happened, and the fold of the ledger, which
// goes on from a position saved before, comes to the same transition again with
// the same identity. Between 2 and 3: step 1 of the next start, or of any other
// alerter, appends what KV holds, byte for byte. Between 3 and 4: step 1 looks
// at the subject's newest message, finds the number, and only notes it. After
// 4: the fold's repetition meets a state that has this transition and does
// nothing. KV holds one transition a rule and scope, and 1 comes before every
// 2, so that no transition is overwritten before it is in ALERTS. The condition
// of 3 holds for ever; Nats-Msg-Id helps inside of its window, and nothing
// rests on it. What dies in the middle of 3 has appended or has not: both are
// handled.
type journal struct {
	kv  stateStore
	log transitionLog
}

// stateStore is what the journal needs of the KV bucket.
type stateStore interface {
	Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error)
	Create(ctx context.Context, key string, value []byte, opts ...jetstream.KVCreateOpt) (uint64, error)
	Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error)
}

// transitionLog is what the journal needs of the ALERTS stream.
type transitionLog interface {
	// Last returns the number and sequence of the newest transition of an
	// episode; 0, 0 when there is none.
	Last(ctx context.Context, episode string) (n int, sequence uint64, err error)
	// Append stores a message when the newest of its subject has the sequence
	// expected.
	Append(ctx context.Context, m *nats.Msg, expected uint64) (sequence uint64, err error)
}

// episodeState is the value of a state's key.
type episodeState struct {
	// Alert is the newest transition.
	Alert usage.Alert `json:"alert"`
	// Appended is its sequence in ALERTS; 0: not known to be there.
	Appended uint64 `json:"appended_sequence,omitempty"`

	revision uint64 // 0: there is no state
}

func (s *episodeState) firing() bool {
	return s.revision != 0 && s.Alert.Transition == usage.AlertFiring
}

// errConflict says that another alerter was faster: look again.
var errConflict = errors.New("another alerter has changed the episode's state")

func stateKey(rule, scope string) string {
	return "state." + ledger.KeyToken(rule) + "." + ledger.KeyToken(scope)
}

func alertSubject(episode string) string { return "alerts." + episode }

// episodeID is the same whoever computes it.
func episodeID(rule, scope string, started usage.Micros) string {
	h := sha256.New()
	var n [8]byte
	for _, part := range []string{rule, scope} {
		binary.BigEndian.PutUint64(n[:], uint64(len(part)))
		_, _ = h.Write(n[:]) // hash.Hash never fails
		_, _ = h.Write([]byte(part))
	}
	binary.BigEndian.PutUint64(n[:], uint64(started))
	_, _ = h.Write(n[:])
	id, err := ksuid.FromParts(started.Time(), h.Sum(nil)[:16])
	if err != nil {
		panic(err) // only a payload that is not 16 bytes long
	}
	return id.String()
}

// load returns the state of a rule and scope; one with revision 0 when there
// is none.
func (j *journal) load(ctx context.Context, rule, scope string) (episodeState, error) {
	e, err := j.kv.Get(ctx, stateKey(rule, scope))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return episodeState{}, nil
	}
	if err != nil {
		return episodeState{}, fmt.Errorf("read the episode's state: %w", err)
	}
	s := episodeState{}
	if err := json.Unmarshal(e.Value(), &s); err != nil {
		return episodeState{}, fmt.Errorf("key %s of bucket %s is not an episode's state (delete it to begin anew): %w", e.Key(), ledger.AlerterBucket, err)
	}
	s.revision = e.Revision()
	return s, nil
}

// recover finishes what a dead alerter left half done and returns the state.
func (j *journal) recover(ctx context.Context, rule, scope string) (episodeState, error) {
	s, err := j.load(ctx, rule, scope)
	if err != nil || s.revision == 0 || s.Appended != 0 {
		return s, err
	}
	return j.settle(ctx, s)
}

// commit makes a transition durable, or finds that it is, or that another
// alerter's state makes it obsolete. It returns the state that holds now, and
// whether this call made it. After an error it is to be called again.
func (j *journal) commit(ctx context.Context, a usage.Alert) (s episodeState, made bool, err error) {
	s, err = j.recover(ctx, a.Rule, a.Scope)
	if err != nil {
		return s, false, err
	}
	a.EpisodeID = episodeID(a.Rule, a.Scope, a.StartedAt)
	switch {
	case a.Transition == usage.AlertFiring:
		// What began before the newest transition belongs to that episode,
		// whoever saw it begin; but a new wave begins with the end of the one before.
		before := a.At < s.Alert.At || a.At == s.Alert.At && s.Alert.Reason != usage.ResolvedNewWave
		if s.firing() || s.revision != 0 && (s.Alert.EpisodeID == a.EpisodeID || before) {
			return s, false, nil
		}
		a.N = 1
	case !s.firing() || s.Alert.EpisodeID != a.EpisodeID:
		return s, false, nil
	default:
		a.N = s.Alert.N + 1
	}
	next := episodeState{Alert: a}
	value, err := json.Marshal(&next)
	if err != nil {
		return s, false, fmt.Errorf("write the episode's state: %w", err)
	}
	key := stateKey(a.Rule, a.Scope)
	if s.revision == 0 {
		next.revision, err = j.kv.Create(ctx, key, value)
	} else {
		next.revision, err = j.kv.Update(ctx, key, value, s.revision)
	}
	if err != nil {
		if wrongSequence(err) {
			err = errConflict
		}
		return s, false, fmt.Errorf("write the episode's state: %w", err)
	}
	s, err = j.settle(ctx, next)
	return s, true, err
}

// settle appends the state's transition unless it is there, and notes it.
func (j *journal) settle(ctx context.Context, s episodeState) (episodeState, error) {
	n, seq, err := j.log.Last(ctx, s.Alert.EpisodeID)
	if err != nil {
		return s, fmt.Errorf("look at the newest transition of episode %s: %w", s.Alert.EpisodeID, err)
	}
	if n < s.Alert.N {
		data, err := json.Marshal(&s.Alert)
		if err != nil {
			return s, fmt.Errorf("append to %s: %w", ledger.AlertsStream, err)
		}
		m := &nats.Msg{Subject: alertSubject(s.Alert.EpisodeID), Header: nats.Header{jetstream.MsgIDHeader: {s.Alert.TransitionID()}}, Data: data}
		if seq, err = j.log.Append(ctx, m, seq); err != nil {
			if wrongSequence(err) {
				err = errConflict
			}
			return s, fmt.Errorf("append to %s: %w", ledger.AlertsStream, err)
		}
	}
	s.Appended = seq
	value, err := json.Marshal(&s)
	if err != nil {
		return s, fmt.Errorf("note the append: %w", err)
	}
	rev, err := j.kv.Update(ctx, stateKey(s.Alert.Rule, s.Alert.Scope), value, s.revision)
	if err != nil {
		if wrongSequence(err) {
			err = errConflict
		}
		return s, fmt.Errorf("note the append: %w", err)
	}
	s.revision = rev
	return s, nil
}

// wrongSequence reports that a condition on the newest sequence did not hold.
func wrongSequence(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) || errors.As(err, &api) &&
		(api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// alertsLog is the ALERTS stream as the journal's log.
type alertsLog struct {
	js jetstream.JetStream
}

func (l alertsLog) Last(ctx context.Context, episode string) (int, uint64, error) {
	stream, err := l.js.Stream(ctx, ledger.AlertsStream)
	if err != nil {
		return 0, 0, err
	}
	m, err := stream.GetLastMsgForSubject(ctx, alertSubject(episode))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	var a usage.Alert
	if err := json.Unmarshal(m.Data, &a); err != nil {
		return 0, 0, fmt.Errorf("entry %d is not an alert: %w", m.Sequence, err)
	}
	return a.N, m.Sequence, nil
}

func (l alertsLog) Append(ctx context.Context, m *nats.Msg, expected uint64) (uint64, error) {
	ack, err := l.js.PublishMsg(ctx, m, jetstream.WithExpectLastSequencePerSubject(expected))
	if err != nil {
		return 0, err
	}
	return ack.Sequence, nil
}
