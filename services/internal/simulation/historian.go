package simulation

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/blocks"
	"github.com/tollkeeper/tollkeeper/services/internal/seen"
)

// clickhouse keeps rows by block. It is asked for a block's rows by their
// stretch of the ledger, and remembers the tokens of the last blocks.
type clickhouse struct {
	w      *world
	proc   *proc
	rows   []row
	tokens []string
}

type row struct {
	sequence uint64
	id       string // of the request
}

// rememberedTokens is less than a server's (10,000), so that forgetting happens; more
// than are inserted while an insert of a historian that was killed is on its way,
// which is what they must outlast.
const rememberedTokens = 20

// insert stores a block's rows, once a token. A kill may keep the token alone, or
// the rows alone.
func (c *clickhouse) insert(token string, rows []row) bool {
	if !c.proc.up || c.proc.stopped {
		return false
	}
	for _, t := range c.tokens {
		if t == token {
			return true
		}
	}
	half := !c.w.calm && c.w.chance(c.w.o.Loss/2)
	keepToken, keepRows := true, true
	if half {
		keepToken = c.w.chance(0.5)
		keepRows = !keepToken
	}
	if keepToken {
		c.tokens = append(c.tokens, token)
		c.tokens = c.tokens[max(0, len(c.tokens)-rememberedTokens):]
	}
	if keepRows {
		c.rows = append(c.rows, rows...)
	}
	if half {
		c.proc.kill()
		c.w.after(c.w.between(100_000, 800_000), c.proc.rise)
		return false
	}
	return true
}

func (c *clickhouse) present(s blocks.Span) int {
	n := 0
	for i := range c.rows {
		if r := &c.rows[i]; r.sequence >= s.From && r.sequence <= s.To {
			n++
		}
	}
	return n
}

// boundary is the durable word on the newest block; as the historian's journal.
type boundary struct {
	From, To uint64
	Done     bool
	Token    string
}

func (b boundary) committed() uint64 {
	if b.Done {
		return b.To
	}
	return b.From - 1
}

// historian carries the ledger into ClickHouse: the protocol of the historian's
// lanes, over the planner and the fold that they use.
type historian struct {
	w        *world
	proc     *proc
	fold     *seen.Fold
	plan     *blocks.Planner
	frame    ledger.Frame
	rows     []row
	revision uint64 // of the journal, as it knows it

	committed uint64
	redo      string // token of the block that is repeated
	sealing   bool   // a block is on its way: nothing is read
	reader    *reader
}

func (w *world) newHistorian() *historian {
	h := &historian{w: w}
	h.proc = &proc{w: w, name: "historian", up: true, killed: func() {}}
	h.proc.start = h.begin
	return h
}

var blockLimits = blocks.Limits{Rows: 60, Bytes: 1 << 20, Entries: 40, Age: 200 * time.Millisecond, Stall: time.Second}

func (h *historian) begin() {
	w := h.w
	h.rows, h.redo, h.sealing, h.reader = nil, "", false, nil
	type journal struct {
		data     []byte
		revision uint64
	}
	h.proc.ask(func() any { return journal{w.nats.journal, w.nats.revision} }, func(result any, ok bool) {
		if !ok {
			h.proc.after(100_000, h.begin)
			return
		}
		stands := boundary{From: 1, Done: true}
		j := result.(journal)
		if j.revision > 0 {
			if err := json.Unmarshal(j.data, &stands); err != nil {
				w.fail("%v", err)
			}
		}
		h.revision = j.revision
		h.committed = stands.committed()
		h.plan = blocks.New(blockLimits, h.committed+1)
		if !stands.Done {
			h.plan.Force(stands.To)
			h.redo = stands.Token
		}
		h.fold = seen.New(dedup.DefaultHorizon)
		h.reader = h.proc.read(&w.nats.ledger, 1, 60, h.take)
		h.beat()
	})
}

func (h *historian) clock() time.Time { return h.w.now.Time() }

func (h *historian) beat() {
	if !h.sealing {
		if s, ok := h.plan.Due(h.clock()); ok {
			h.seal(s)
		}
	}
	h.proc.after(h.w.between(20_000, 80_000), h.beat)
}

func (h *historian) take(m ledger.Message, pending uint64) bool {
	if h.sealing {
		return false
	}
	kind, shard, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		h.w.fail("%v", err)
		return false
	}
	it := blocks.Item{Sequence: m.Sequence, Time: max(h.fold.High(), entryTime(&m)), Near: pending < 20}
	if kind == ledger.KindCalls {
		if err := ledger.DecodeCalls(&h.frame, m.Subject, m.Header, m.Data); err != nil {
			h.w.fail("entry %d: %v", m.Sequence, err)
			return false
		}
		it.Rows, it.Bytes = h.frame.N, len(m.Data)
	}
	keep := m.Sequence > h.committed
	if keep {
		if s, ok := h.plan.Before(it); ok {
			h.seal(s)
			return false // this entry comes again
		}
	}
	sh := h.fold.Pass(shard, entryTime(&m))
	switch kind {
	case ledger.KindControl, ledger.KindClosing:
		e, err := ledger.DecodeAct(kind, m.Header, m.Data)
		if err != nil {
			h.w.fail("entry %d: %v", m.Sequence, err)
			return false
		}
		if newer := seen.Beyond(shard, m.Sequence, e); newer != nil {
			h.w.fail("entry %d: %v", m.Sequence, newer)
			return false
		}
		sh.Control(e)
	case ledger.KindCalls:
		fresh := sh.Calls(&h.frame, nil)
		if keep && fresh.Verdict != dedup.Duplicate {
			for i := range h.frame.N {
				if fresh.Keep == nil || contains(fresh.Keep, uint32(i)) {
					h.rows = append(h.rows, row{m.Sequence, string(h.frame.RequestID.At(i))})
				}
			}
		}
	case ledger.KindLease:
	}
	if keep {
		h.plan.Add(it, h.clock())
		if s, ok := h.plan.Due(h.clock()); ok {
			h.seal(s)
		}
	}
	return true
}

func contains(list []uint32, x uint32) bool {
	for _, y := range list {
		if x == y {
			return true
		}
	}
	return false
}

// seal brings a block into ClickHouse: its boundary first.
func (h *historian) seal(s blocks.Span) {
	w := h.w
	rows := h.rows
	h.rows, h.sealing = nil, true
	b := boundary{From: s.From, To: s.To, Token: fmt.Sprintf("calls/%d-%d", s.From, s.To)}
	redo := h.redo != ""
	if redo {
		b.Token, h.redo = h.redo, ""
	}
	done := func() {
		b.Done = true
		h.save(b, func() {
			h.committed, h.sealing = s.To, false
			h.reader.stir()
		})
	}
	switch {
	case len(rows) == 0:
		done()
	case redo:
		w.report.RepeatedRows++
		h.insert(s, rows, b.Token, 0, true, done)
	default:
		w.report.Blocks++
		h.save(b, func() { h.insert(s, rows, b.Token, 0, false, done) })
	}
}

// save makes a boundary durable, however long that takes.
func (h *historian) save(b boundary, done func()) {
	w := h.w
	data, err := json.Marshal(b)
	if err != nil {
		w.fail("%v", err)
		return
	}
	expect := h.revision
	h.proc.ask(func() any {
		if w.nats.revision != expect && string(w.nats.journal) != string(data) {
			return uint64(0)
		}
		if w.nats.revision == expect {
			w.nats.journal = data
			w.nats.revision++
		}
		return w.nats.revision
	}, func(result any, ok bool) {
		switch {
		case !ok:
			h.save(b, done)
		case result.(uint64) == 0:
			// Its own word from before it was killed has arrived late: begin anew.
			w.trace("historian: the journal is of another revision")
			h.proc.kill()
			w.after(50_000, h.proc.rise)
		default:
			h.revision = result.(uint64)
			done()
		}
	})
}

// insert tries for ever; doubt says that an earlier try may have succeeded.
func (h *historian) insert(s blocks.Span, rows []row, token string, again int, doubt bool, done func()) {
	w := h.w
	retry := func(again int, doubt bool) {
		h.proc.after(w.between(20_000, 200_000), func() { h.insert(s, rows, token, again, doubt, done) })
	}
	arrived := func(ok bool) {
		if !ok || w.lost() {
			retry(again, true)
			return
		}
		if !doubt {
			done()
			return
		}
		switch n := w.clickhouse.present(s); {
		case !w.clickhouse.proc.up:
			retry(again, true)
		case n == len(rows):
			done()
		case n == 0:
			retry(again+1, true)
		default:
			w.fail("block %d-%d has %d of %d rows", s.From, s.To, n, len(rows))
		}
	}
	send := func() {
		use := token
		if again > 0 {
			use = fmt.Sprintf("%s/%d", token, again)
		}
		// An insert that is on its way outlives who sent it.
		life := h.proc.life
		w.after(w.delay(), func() {
			ok := w.clickhouse.insert(use, rows)
			w.after(w.delay(), func() { h.proc.act(life, func() { arrived(ok) }) })
		})
	}
	h.proc.after(w.delay(), func() {
		if doubt {
			if !w.clickhouse.proc.up || w.clickhouse.proc.stopped {
				retry(again, true)
				return
			}
			switch n := w.clickhouse.present(s); {
			case n == len(rows):
				done()
				return
			case n != 0:
				w.fail("block %d-%d has %d of %d rows", s.From, s.To, n, len(rows))
				return
			}
		}
		send()
	})
}
