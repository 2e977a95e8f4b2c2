package simulation

import (
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

// natsServer is a NATS server whose acknowledgements are on disk: what a kill
// takes is what was on its way.
type natsServer struct {
	w         *world
	proc      *proc
	ledger    stream
	decisions stream
	objects   map[string][]byte
	journal   []byte
	revision  uint64 // of the journal
}

type stream struct {
	messages []ledger.Message
	last     map[string]uint64
	readers  []*reader
}

func (s *stream) end() uint64 { return uint64(len(s.messages)) }

// publish stores a message if what it expects is so, and returns its sequence, 0
// when it is refused.
func (n *natsServer) publish(s *stream, m *nats.Msg) uint64 {
	return n.publishBatch(s, []*nats.Msg{m})
}

// publishBatch stores all of the messages or none.
func (n *natsServer) publishBatch(s *stream, msgs []*nats.Msg) uint64 {
	for _, m := range msgs {
		expected := m.Header.Get(jetstream.ExpectedLastSubjSeqHeader)
		if expected == "" {
			continue
		}
		subject := m.Header.Get(jetstream.ExpectedLastSubjSeqSubjHeader)
		if subject == "" {
			subject = m.Subject
		}
		if at, err := strconv.ParseUint(expected, 10, 64); err != nil || s.last[subject] != at {
			return 0
		}
	}
	for _, m := range msgs {
		s.messages = append(s.messages, ledger.Message{
			Subject: m.Subject, Header: m.Header, Data: append([]byte(nil), m.Data...),
			Sequence: s.end() + 1, Time: time.UnixMicro(int64(n.w.now)).UTC(),
		})
		s.last[m.Subject] = s.end()
	}
	for _, r := range s.readers {
		r.stir()
	}
	return s.end()
}

// lastOf returns the newest message whose subject has a prefix.
func (s *stream) lastOf(prefix string) (ledger.Message, bool) {
	for i := len(s.messages) - 1; i >= 0; i-- {
		if strings.HasPrefix(s.messages[i].Subject, prefix) {
			return s.messages[i], true
		}
	}
	return ledger.Message{}, false
}

// position is what an aggregator reads of a shard in the decisions' stream.
func (n *natsServer) position(shard uint32) publish.Position {
	var at publish.Position
	if sequence := n.decisions.last[publish.CheckpointSubject(shard)]; sequence > 0 {
		m := n.decisions.messages[sequence-1]
		found, err := publish.ReadCheckpoint(shard, m.Header, m.Data)
		if err != nil {
			n.w.fail("%v", err)
		}
		at.Revision, at.Found = sequence, found
	}
	if m, ok := n.decisions.lastOf(strings.TrimSuffix(publish.DecisionsSubject(shard), ">")); ok {
		d, err := ledger.UnmarshalDecision(m.Data)
		if err != nil {
			n.w.fail("%v", err)
		}
		at.Newest, at.NewestAt = publish.ToldBy(&d), m.Sequence
	}
	return at
}

// reader reads a stream from a position on, in order.
type reader struct {
	p      *proc
	life   int
	s      *stream
	next   uint64
	most   int // messages at a time
	take   func(m ledger.Message, pending uint64) bool
	astir  bool
	closed bool
}

func (p *proc) read(s *stream, from uint64, most int, take func(m ledger.Message, pending uint64) bool) *reader {
	r := &reader{p: p, life: p.life, s: s, next: from, most: most, take: take}
	kept := s.readers[:0]
	for _, old := range s.readers {
		if !old.closed && old.life == old.p.life {
			kept = append(kept, old)
		}
	}
	s.readers = append(kept, r)
	r.stir()
	return r
}

// stir lets the reader look at the stream soon.
func (r *reader) stir() {
	if r.astir || r.closed || !r.p.up || r.life != r.p.life {
		return
	}
	r.astir = true
	d := r.p.w.delay()
	r.p.after(d, func() {
		r.astir = false
		w := r.p.w
		if r.closed {
			return
		}
		if r.p.cut || !w.nats.proc.up || w.nats.proc.stopped || w.lost() {
			r.p.after(50_000, r.stir)
			return
		}
		for range 1 + w.r.IntN(r.most) {
			if r.closed || r.next > r.s.end() {
				return
			}
			if !r.take(r.s.messages[r.next-1], r.s.end()-r.next) {
				r.p.after(20_000, r.stir)
				return
			}
			r.next++
		}
		if r.next <= r.s.end() {
			r.stir()
		}
	})
}

// entryTime of a message, as the fold sees it.
func entryTime(m *ledger.Message) usage.Micros { return usage.At(m.Time) }
