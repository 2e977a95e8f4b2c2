package explain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
)

// ErrNotRefused says that a request was found, and that no decision refused it.
var ErrNotRefused = errors.New("no decision refused the request")

// Bounds of a search for a request.
const (
	// maxSearched entries of the ledger are looked at, the newest first, searchStep at
	// a time.
	maxSearched = 1 << 18
	searchStep  = 1 << 11
	// maxNear entries are looked at from the second on that the request's own id names,
	// when a gateway has made it.
	maxNear = 1 << 13
)

// requestID reports whether an id can be that of a request.
func requestID(id string) bool {
	if id == "" || len(id) > usage.MaxIDBytes || !utf8.ValidString(id) {
		return false
	}
	for _, r := range id {
		if unicode.IsControl(r) || r == ' ' {
			return false
		}
	}
	return true
}

// search is a search for the calls of a request.
type search struct {
	id    []byte
	frame ledger.Frame
	// Of the newest call that a decision refused, else of the newest call:
	call    *Call
	code    usage.Code
	decided string
}

// look looks at an entry.
func (s *search) look(m *ledger.Message) {
	if kind, _, err := ledger.ParseSubject(m.Subject); err != nil || kind != ledger.KindCalls {
		return
	}
	f := &s.frame
	if ledger.DecodeCalls(f, m.Subject, m.Header, m.Data) != nil {
		return // it is a dead letter: its calls are counted nowhere
	}
	for i := range f.N {
		if !bytes.Equal(f.RequestID.At(i), s.id) {
			continue
		}
		decided := string(f.DecisionID.At(i))
		if s.call != nil && s.decided != "" && decided == "" {
			continue // a client may give the id to several; the refused one is meant
		}
		c := callOf(f, trace.Row{Position: trace.Position{Sequence: m.Sequence, Index: int32(i)}}, usage.At(m.Time))
		s.call, s.code, s.decided = &c, usage.Code(f.Code.At(i)), decided
	}
}

// refused is a request's call and the decision that refused it.
type refused struct {
	call     *Call
	decision ksuid.KSUID
}

// result says what the search has found; false: nothing.
func (s *search) result() (refused, bool, error) {
	if s.call == nil {
		return refused{}, false, nil
	}
	id, err := ksuid.Parse(s.decided)
	switch {
	case s.decided != "" && err == nil:
		return refused{s.call, id}, true, nil
	case s.code == "":
		return refused{}, false, fmt.Errorf("request %s of account %s passed with status %d (entry %d): %w", s.id, s.call.Account, s.call.Status, s.call.Sequence, ErrNotRefused)
	}
	return refused{}, false, fmt.Errorf("request %s of account %s was refused with %s (entry %d), which rests on no decision: %w", s.id, s.call.Account, s.code, s.call.Sequence, ErrNotRefused)
}

// requestNear looks for a request whose id a gateway has made, from its second on.
func (x *Explainer) requestNear(ctx context.Context, id ksuid.KSUID, p *progress) (refused, bool, error) {
	stream, state, err := x.ledger(ctx)
	if err != nil || state.Msgs == 0 {
		return refused{}, false, err
	}
	from, err := sequenceAt(ctx, stream, state, id.Time().Add(-clockSlack))
	if err != nil {
		return refused{}, false, err
	}
	s := search{id: []byte(id.String())}
	if err := x.searched(ctx, &s, from, min(from+maxNear-1, state.LastSeq), p); err != nil {
		return refused{}, false, err
	}
	if s.call != nil && s.call.Time.Time().Sub(id.Time()).Abs() > clockSlack {
		return refused{}, false, nil // its client has chosen the id, perhaps that of a decision
	}
	return s.result()
}

// requestNewest looks for a request among the newest entries.
func (x *Explainer) requestNewest(ctx context.Context, id string, p *progress) (refused, error) {
	_, state, err := x.ledger(ctx)
	if err != nil {
		return refused{}, err
	}
	s := search{id: []byte(id)}
	for to, left := state.LastSeq, maxSearched; to >= state.FirstSeq && to > 0 && left > 0 && s.call == nil && state.Msgs > 0; left -= searchStep {
		from := max(state.FirstSeq, to-min(to, searchStep)+1)
		if err := x.searched(ctx, &s, from, to, p); err != nil {
			return refused{}, err
		}
		to = from - 1
	}
	switch r, ok, err := s.result(); {
	case err != nil:
		return refused{}, err
	case ok:
		return r, nil
	}
	return refused{}, fmt.Errorf("%s: %w, and the newest %d entries of the ledger have no such request", id, ErrUnknown, min(maxSearched, state.LastSeq-min(state.LastSeq, state.FirstSeq)+1))
}

// searched looks at the entries from one to another, which the ledger has or had.
func (x *Explainer) searched(ctx context.Context, s *search, from, to uint64, p *progress) error {
	err := x.read(ctx, ledger.Stream, nil, from, to, func(m *ledger.Message) error {
		p.at("looking for the request", m.Sequence-from, to-from+1)
		s.look(m)
		return nil
	})
	if errors.Is(err, ledger.ErrPurged) || errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil // what is left of it was looked at
	}
	return err
}
