// Package fleet is the state machine of one member of a fleet that shares
// shards: time and what was seen come in, writes and what to begin or end go out.
// No goroutine, clock or I/O. Package ownership describes the protocol.
package fleet

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// Config is what a machine is started with.
type Config struct {
	Member string
	Shards int
	Timing Timing        // complete and checked
	NewID  func() string // of sessions; never the same twice
	// Sole: nobody else can be alive under this name, so that what a session of
	// it holds is free at once.
	Sole bool
}

// phase is what a shard is to this member.
type phase uint8

const (
	away      phase = iota // not ours
	claiming               // the claim is on its way
	held                   // ours: the callback runs
	draining               // the callback runs and was asked to hand over
	ending                 // the callback's context is cancelled; it has not returned
	releasing              // the release is on its way
)

func (p phase) tenure() bool { return p == held || p == draining }

// slot is what is known of a shard.
type slot struct {
	revision uint64
	claim    claim
	free     bool
	freeAt   Instant // since when we know that it is free

	phase     phase
	token     uint64
	write     uint64 // the claim or release in flight; 0: none
	since     Instant
	drainAt   Instant
	to        string  // whom it is or should be handed over to
	wanted    Instant // since when
	notBefore Instant // when it may be claimed (again)
	failures  int
	declined  bool
	refused   bool // it stays declined
}

// peer is a session as this member sees it, its own earlier ones included.
type peer struct {
	session
	revision uint64
	present  bool // in the newest reading, or seen since
	dead     bool // for good
	heard    bool // renewed since it was first seen
	first    Instant
	changed  Instant // when the newest revision was first seen
	fencing  uint64  // the write in flight
	retryAt  Instant
}

// beat is a renewal that was sent.
type beat struct {
	n  uint64
	at Instant
}

// maxBeats bounds the renewals whose answers are remembered.
const maxBeats = 16

// own is this member's session.
type own struct {
	id       string
	revision uint64
	beat     uint64
	sent     []beat
	write    uint64
	next     Instant // when to renew
	doubt    bool    // the revision may not be the newest
	asked    Instant // when doubt began
	ending   bool    // the write in flight is the last
}

type loss struct {
	count int
	last  Instant
}

// Write is a key to be stored if its newest revision is still expect.
type Write struct {
	ID     uint64
	Kind   WriteKind
	Key    string
	Value  []byte
	Expect uint64
	TTL    time.Duration // 0: it stays
}

// WriteKind is what a write is for.
type WriteKind uint8

// Kinds of writes. A session's must not wait for others.
const (
	WriteSession WriteKind = iota // creates, renews or ends the member's own
	WriteFence                    // ends another's
	WriteClaim
	WriteRelease
)

// Outcome is what became of a write.
type Outcome uint8

// Outcomes of a write.
const (
	Stored   Outcome = iota
	Conflict         // certainly not stored
	Unknown          // perhaps stored, perhaps later
)

// Tenure is a shard that this member owns from now on, with its fencing token.
type Tenure struct {
	Shard uint32
	Token uint64
}

// Handover is a shard that this member should give up; To is who is to take it,
// empty: nobody is there.
type Handover struct {
	Shard uint32
	To    string
}

// Effects are what the shell is to do, revoking first.
type Effects struct {
	Writes  []Write  // each is answered with Wrote
	Poll    bool     // read the bucket, to be answered with Read
	Acquire []Tenure // begin to own; the end is told with Returned
	Drain   []Handover
	Revoke  []uint32 // these are not owned any more
	// Standby is set when StandbyChanged: the shards that would be ours if
	// their owner died.
	Standby        []uint32
	StandbyChanged bool
	Notes          []Note
}

// Note is for logs and metrics.
type Note struct {
	Kind   NoteKind
	Shard  uint32
	Member string
	Took   time.Duration
}

// NoteKind is what a note tells.
type NoteKind uint8

// Kinds of notes.
const (
	NoteLapsed NoteKind = iota // could not prove its session in time
	NoteLost                   // its session was ended by another
	NoteFenced                 // ended another's session
	NoteStuck                  // a callback does not return
	NoteDouble                 // somebody else lives under our name
	NoteFailed                 // a callback gave its shard up
)

// Machine decides for one member. It is pure: time and what was seen come in,
// effects go out. Every method that takes effects must be followed by Step, which
// does what is due. Not safe for concurrent use.
type Machine struct {
	Config
	own     own
	until   Instant // we may act until then
	lapsed  bool    // told
	proofs  int
	lastAck Instant
	flowing Instant // since when our renewals are stored without a pause

	peers  map[string]*peer
	losses map[string]loss
	slots  []slot
	writes map[uint64]pending
	lastID uint64

	started  Instant
	synced   bool    // the bucket was read once
	readAt   Instant // when the newest complete reading was asked for
	reading  bool
	nextRead Instant
	dirty    bool // the plan is to be made anew
	planned  planInput
	members  []string
	target   []string
	standby  []uint32
	doubled  bool // told
	leaving  bool
	done     bool
}

// pending is a write in flight.
type pending struct {
	kind  WriteKind
	shard uint32
	peer  string
	own   string // the session that it was written for
	to    string // whom a release names
	beat  beat
}

// New is a member that begins now.
func New(now Instant, c Config) *Machine {
	m := &Machine{
		Config: c, started: now, until: now, lapsed: true, lastAck: now, flowing: now, nextRead: now, dirty: true,
		peers: map[string]*peer{}, losses: map[string]loss{}, writes: map[uint64]pending{}, slots: make([]slot, c.Shards), target: make([]string, c.Shards),
	}
	m.own = own{id: c.NewID(), next: now}
	return m
}

// proven says whether this member may act.
func (m *Machine) proven(now Instant) bool { return now < m.until }

// believes says whether this member may act on a shard.
func (m *Machine) believes(now Instant, shard uint32) bool {
	return m.proven(now) && m.slots[shard].phase.tenure()
}

func (m *Machine) put(fx *Effects, p pending, w Write) uint64 {
	m.lastID++
	w.ID, w.Kind = m.lastID, p.kind
	p.own = m.own.id
	m.writes[w.ID] = p
	fx.Writes = append(fx.Writes, w)
	return w.ID
}

// Until is when this member may act no more, if nothing is renewed before.
func (m *Machine) Until() Instant { return m.until }

// Members is how many the shards are shared among, as this member sees it.
func (m *Machine) Members() int { return len(m.members) }

// Synced says whether the bucket was read once.
func (m *Machine) Synced() bool { return m.synced }

// Held is how many shards this member has.
func (m *Machine) Held() int {
	n := 0
	for i := range m.slots {
		if m.slots[i].phase.tenure() {
			n++
		}
	}
	return n
}

// Unowned is how many shards nobody has, as this member sees it: another's count
// as owned from when that one was heard of until it is known to be gone.
func (m *Machine) Unowned() int {
	if !m.synced {
		return m.Shards
	}
	n := 0
	for i := range m.slots {
		s := &m.slots[i]
		if s.phase.tenure() {
			continue
		}
		if p := m.peers[s.claim.Session]; m.isFree(s) || p == nil || !p.heard {
			n++
		}
	}
	return n
}

// Leaving says whether the orderly end has begun.
func (m *Machine) Leaving() bool { return m.leaving }

// Done says whether it is over: the session has ended.
func (m *Machine) Done() bool { return m.done }

// Step does what is due.
func (m *Machine) Step(now Instant, fx *Effects) {
	if m.done {
		return
	}
	if !m.proven(now) && !m.lapsed {
		m.lapsed = true
		fx.Notes = append(fx.Notes, Note{Kind: NoteLapsed, Took: now - m.until})
		m.revokeAll(now, fx)
	}
	m.keepSession(now, fx)
	if !m.reading && now >= m.nextRead {
		m.reading = true
		m.nextRead = now + m.Timing.Poll
		fx.Poll = true
	}
	if m.mayFence(now) {
		m.fenceSilent(now, fx)
		m.forget(now)
	}
	if m.dirty {
		m.dirty = false
		m.replan(now, fx)
	}
	m.act(now, fx)
	m.finish(now, fx)
}

// Next is when step is due again, if nothing happens before.
func (m *Machine) Next(now Instant) Instant {
	at := now + m.Timing.Poll
	if !m.reading {
		at = min(at, m.nextRead)
	}
	if m.own.write == 0 {
		at = min(at, m.renewAt())
	}
	if !m.lapsed {
		at = min(at, m.until)
	}
	if m.mayFence(now) {
		for _, p := range m.peers {
			if !p.dead && p.fencing == 0 {
				at = min(at, max(p.changed+m.Timing.TTL, m.flowing+m.Timing.TTL, p.retryAt))
			}
		}
	}
	for i := range m.slots {
		if s := &m.slots[i]; s.phase == away && s.write == 0 && s.notBefore > now {
			at = min(at, s.notBefore)
		}
	}
	return max(at, now+time.Millisecond)
}

// keepSession creates, renews and at last ends the session.
func (m *Machine) keepSession(now Instant, fx *Effects) {
	if m.own.write != 0 || now < m.renewAt() || m.leaving && m.unheard() {
		return
	}
	m.own.beat++
	s := session{Member: m.Member, State: stateAlive, Beat: m.own.beat}
	switch {
	case m.leaving && m.empty():
		s.State = stateEnded
		m.own.ending = true
	case m.leaving:
		s.State = stateLeaving
	}
	for i := range m.slots {
		if m.slots[i].declined {
			s.Declines = append(s.Declines, uint32(i))
		}
	}
	b := beat{n: m.own.beat, at: now}
	m.own.sent = append(m.own.sent, b)
	if len(m.own.sent) > maxBeats {
		m.own.sent = m.own.sent[1:]
	}
	m.own.next = now + m.Timing.Renew
	m.own.write = m.put(fx, pending{kind: WriteSession, beat: b}, Write{
		Key: sessionKey(m.own.id), Value: encode(s), Expect: m.own.revision, TTL: m.Timing.garbage(),
	})
}

// renewAt is when the session is to be renewed. In doubt a reading of the
// bucket should come first.
func (m *Machine) renewAt() Instant {
	if m.own.doubt {
		return max(m.own.next, m.own.asked+m.Timing.Renew)
	}
	return m.own.next
}

// unheard says whether nobody can know of this session.
func (m *Machine) unheard() bool { return m.own.revision == 0 && len(m.own.sent) == 0 }

// prove extends the time that we may act: the session was renewed by what was
// sent at a given time.
func (m *Machine) prove(now, sent Instant) {
	// After a pause of the store everybody's silence begins anew: the others'
	// renewals come back no sooner than ours.
	if m.proofs == 0 || now-m.lastAck > m.Timing.TTL/2 {
		m.flowing = now
	}
	m.proofs++
	m.lastAck = now
	m.until = max(m.until, sent+m.Timing.belief())
	if m.proven(now) {
		m.lapsed = false
	}
}

// lose gives the session up: everything that was held is over.
func (m *Machine) lose(now Instant, fx *Effects) {
	id := m.own.id
	m.until = min(m.until, now)
	m.lapsed = true
	m.revokeAll(now, fx)
	p := m.peer(now, id)
	p.dead = true
	m.own = own{id: m.NewID(), next: now}
	m.dirty = true
	if !m.leaving {
		fx.Notes = append(fx.Notes, Note{Kind: NoteLost})
	}
}

func (m *Machine) revokeAll(now Instant, fx *Effects) {
	for i := range m.slots {
		m.revoke(now, uint32(i), fx)
	}
}

func (m *Machine) revoke(now Instant, shard uint32, fx *Effects) {
	if s := &m.slots[shard]; s.phase.tenure() {
		s.phase = ending
		s.drainAt = now
		fx.Revoke = append(fx.Revoke, shard)
	}
}

// Wrote takes the outcome of a write.
func (m *Machine) Wrote(now Instant, id, revision uint64, result Outcome, fx *Effects) {
	p, ok := m.writes[id]
	if !ok {
		return
	}
	delete(m.writes, id)
	switch p.kind {
	case WriteSession:
		m.renewed(now, p, revision, result, fx)
	case WriteFence:
		m.fenced(now, p, revision, result, fx)
	case WriteClaim, WriteRelease:
		m.claimed(now, p, revision, result, fx)
	}
	if result == Conflict {
		m.nextRead = min(m.nextRead, now)
	}
}

func (m *Machine) renewed(now Instant, p pending, revision uint64, result Outcome, fx *Effects) {
	if p.own != m.own.id {
		return
	}
	m.own.write = 0
	if result != Stored && m.own.revision == 0 {
		// The creation may have been stored, or may be much later. A second one
		// could bring the session back after others have fenced it and the
		// server has removed the tombstone: one write only creates an id.
		m.own = own{id: m.NewID(), next: max(now, p.beat.at+m.Timing.retry())}
		return
	}
	switch result {
	case Stored:
		if m.own.ending {
			m.done = true
			return
		}
		if revision > m.own.revision {
			m.own.revision = revision
		}
		m.answered(p.beat.n)
		m.prove(now, p.beat.at)
	case Conflict:
		// An earlier renewal was stored whose answer was lost, or we were fenced.
		m.own.doubt, m.own.asked = true, now
		m.own.next = now
		m.own.ending = false
	case Unknown:
		m.own.next = min(m.own.next, max(now, p.beat.at+m.Timing.retry()))
		m.own.ending = false
	}
}

// answered forgets the renewals up to one, and returns when that was sent.
func (m *Machine) answered(n uint64) (at Instant, ok bool) {
	for len(m.own.sent) > 0 && m.own.sent[0].n <= n {
		at, ok = m.own.sent[0].at, m.own.sent[0].n == n
		m.own.sent = m.own.sent[1:]
	}
	return at, ok
}

func (m *Machine) fenced(now Instant, p pending, revision uint64, result Outcome, fx *Effects) {
	q := m.peers[p.peer]
	if q == nil {
		return
	}
	q.fencing = 0
	switch result {
	case Stored:
		q.revision, q.present = max(q.revision, revision), true
		fx.Notes = append(fx.Notes, Note{Kind: NoteFenced, Member: q.Member, Took: now - q.changed})
		m.bury(now, q, stateFenced)
	case Conflict:
		// It lives, or somebody else was faster: the reading that follows tells.
		q.changed = now
	case Unknown:
		q.retryAt = now + m.Timing.retry()
	}
}

func (m *Machine) claimed(now Instant, p pending, revision uint64, result Outcome, fx *Effects) {
	s := &m.slots[p.shard]
	s.write = 0
	was := s.phase
	if s.phase == claiming || s.phase == releasing {
		s.phase = away
	}
	m.dirty = true
	if result != Stored {
		if result == Unknown {
			s.notBefore = max(s.notBefore, now+m.Timing.retry())
			m.nextRead = min(m.nextRead, now)
		}
		return
	}
	if revision < s.revision {
		return // somebody has written since, and we saw it before this answer
	}
	s.revision, s.free = revision, false
	if p.kind == WriteRelease {
		s.claim = claim{Session: p.own, Member: m.Member, Released: true, To: p.to}
		return
	}
	s.claim = claim{Session: p.own, Member: m.Member}
	if was != claiming || p.own != m.own.id || !m.proven(now) || m.leaving {
		return // act releases or claims it again
	}
	s.phase, s.token, s.since = held, revision, now
	fx.Acquire = append(fx.Acquire, Tenure{p.shard, revision})
}

// Returned says that a shard's callback is over: with failed it had no reason
// to be, with cut its context was cancelled.
func (m *Machine) Returned(now Instant, shard uint32, failed, cut bool, fx *Effects) {
	s := &m.slots[shard]
	m.dirty = true
	asked := s.phase != held
	s.phase = away
	if failed && !asked && !cut {
		if now-s.since > maxCooldown {
			s.failures = 0
		}
		s.notBefore = now + min(minCooldown<<min(s.failures, 10), maxCooldown)
		s.failures++
		s.declined = true
		m.own.next = min(m.own.next, now)
		fx.Notes = append(fx.Notes, Note{Kind: NoteFailed, Shard: shard})
	} else if asked {
		s.failures = 0
	}
}

// Refuse says that this member can't have the shard, now and for as long as it runs:
// others are to own it, if they can.
func (m *Machine) Refuse(now Instant, shard uint32) {
	s := &m.slots[shard]
	if s.refused {
		return
	}
	s.refused, s.declined, m.dirty = true, true, true
	m.own.next = min(m.own.next, now)
}

// Leave begins the orderly end: everything is handed over, then done is set.
func (m *Machine) Leave(now Instant) {
	if !m.leaving {
		m.leaving, m.dirty = true, true
		m.own.next = min(m.own.next, now)
	}
}

// Cut cancels all callbacks: an orderly end takes too long.
func (m *Machine) Cut(now Instant, fx *Effects) { m.revokeAll(now, fx) }

// empty says whether the session is named by nothing that somebody may act on.
func (m *Machine) empty() bool {
	for i := range m.slots {
		if m.slots[i].phase != away || m.slots[i].write != 0 {
			return false
		}
	}
	return true
}

// finish ends the session as soon as nothing is held.
func (m *Machine) finish(now Instant, fx *Effects) {
	if !m.leaving || m.done || m.own.write != 0 || !m.empty() {
		return
	}
	if m.unheard() {
		m.done = true
		return
	}
	m.own.next = min(m.own.next, max(now, m.lastTry()+m.Timing.retry()))
	m.keepSession(now, fx)
}

func (m *Machine) lastTry() Instant {
	if n := len(m.own.sent); n > 0 {
		return m.own.sent[n-1].at
	}
	return -m.Timing.retry()
}

func (m *Machine) peer(now Instant, id string) *peer {
	p := m.peers[id]
	if p == nil {
		p = &peer{first: now, changed: now}
		m.peers[id] = p
	}
	return p
}

// Saw takes an entry that the bucket has or had. Older ones than known change
// nothing.
func (m *Machine) Saw(now Instant, e Entry, fx *Effects) {
	if id, ok := strings.CutPrefix(e.Key, SessionPrefix); ok {
		if p := m.peers[id]; p != nil && e.Revision <= p.revision {
			p.present = true
			return
		}
	}
	id, rec, shard, c, err := parse(e, m.Shards)
	switch {
	case err != nil:
	case c != nil:
		s := &m.slots[shard]
		if e.Revision <= s.revision {
			return
		}
		s.revision, s.claim, s.free = e.Revision, *c, false
		m.dirty = true
		if s.phase.tenure() && c.Session != m.own.id {
			// Cannot be, as long as everybody keeps to the protocol.
			m.revoke(now, shard, fx)
		}
		if c.Session != "" && c.Session != m.own.id && !c.Released && m.peers[c.Session] == nil {
			m.peer(now, c.Session).Member = c.Member
		}
	case id == m.own.id:
		if e.Revision <= m.own.revision {
			return
		}
		m.own.revision, m.own.doubt = e.Revision, false
		if rec.over() {
			if m.leaving && rec.is(stateEnded) {
				m.done = true
				return
			}
			m.lose(now, fx)
		} else if at, ok := m.answered(rec.Beat); ok {
			m.prove(now, at)
		}
	default:
		if m.peers[id] == nil && len(m.peers) >= maxSessions+m.Shards {
			return
		}
		p := m.peer(now, id)
		p.present = true
		if e.Revision <= p.revision {
			return
		}
		if p.State != rec.State || p.Member != rec.Member || !slices.Equal(p.Declines, rec.Declines) {
			m.dirty = true
		}
		p.heard = p.heard || p.revision > 0
		p.revision, p.changed = e.Revision, now
		if p.dead {
			return
		}
		p.session = *rec
		if rec.over() {
			m.bury(now, p, rec.State)
		}
	}
}

// bury: a session is over for good.
func (m *Machine) bury(now Instant, p *peer, state string) {
	if p.dead {
		return
	}
	p.dead, p.State = true, state
	m.dirty = true
	if state != stateFenced || p.Member == "" || p.Beat <= 1 {
		return // a creation whose member never learned of it is no loss
	}
	l := m.losses[p.Member]
	if now-l.last > 2*maxSettle {
		l.count = 0
	}
	m.losses[p.Member] = loss{count: l.count + 1, last: now}
	if len(m.losses) > maxSessions {
		maps.DeleteFunc(m.losses, func(_ string, l loss) bool { return now-l.last > maxSettle })
	}
	if len(m.losses) > maxSessions {
		clear(m.losses)
	}
}

// Read takes a complete reading of the bucket that was asked for at a given
// time; ok is false when it failed.
func (m *Machine) Read(now, asked Instant, all []Entry, ok bool, fx *Effects) {
	m.reading = false
	if !ok {
		m.nextRead = max(m.nextRead, now+m.Timing.retry())
		return
	}
	for _, p := range m.peers {
		p.present = false
	}
	id, here := m.own.id, false
	for _, e := range all {
		here = here || e.Key == sessionKey(id)
		m.Saw(now, e, fx)
	}
	m.readAt = asked
	m.synced = true
	// Time passes for the plan too: members settle.
	m.dirty = true
	if id != m.own.id || !m.own.doubt || asked < m.own.asked {
		return
	}
	m.own.doubt = false
	if !here && m.own.revision > 0 && !m.proven(now) {
		m.lose(now, fx) // the server has removed what was not renewed for long
	}
}

// mayFence says whether others' silence means anything: only to who can speak
// and hear, and not to who has just fallen silent too.
func (m *Machine) mayFence(now Instant) bool {
	spoke := m.until - m.Timing.belief()
	return m.proven(now) && m.synced && now-spoke <= m.Timing.Request() && now-m.readAt <= max(3*m.Timing.Poll, m.Timing.TTL)
}

// fenceSilent ends the sessions that were not renewed for a TTL.
func (m *Machine) fenceSilent(now Instant, fx *Effects) {
	var silent []string
	for id, p := range m.peers {
		over := m.Sole && p.Member == m.Member || now-max(p.changed, m.flowing) >= m.Timing.TTL
		if !p.dead && p.fencing == 0 && now >= p.retryAt && over {
			silent = append(silent, id)
		}
	}
	slices.Sort(silent)
	for _, id := range silent {
		p := m.peers[id]
		w := Write{Key: sessionKey(id), Expect: p.revision, TTL: m.Timing.garbage(), Value: encode(session{
			Member: p.Member, State: stateFenced, Beat: p.Beat, By: m.Member,
		})}
		if !p.present {
			w.Expect = 0
		}
		p.fencing = m.put(fx, pending{kind: WriteFence, peer: id}, w)
	}
}

// forget drops the sessions that nobody names any more.
func (m *Machine) forget(now Instant) {
	var named map[string]bool
	for id, p := range m.peers {
		if p.present || p.fencing != 0 || now-p.changed < m.Timing.TTL {
			continue
		}
		if named == nil {
			named = map[string]bool{}
			for i := range m.slots {
				if c := &m.slots[i].claim; !c.Released {
					named[c.Session] = true
				}
			}
		}
		if !named[id] {
			delete(m.peers, id)
		}
	}
}

// dead says whether nobody can act under a session any more.
func (m *Machine) dead(id string) bool {
	p := m.peers[id]
	return p != nil && p.dead
}

// isFree says whether a shard may be claimed.
func (m *Machine) isFree(s *slot) bool {
	c := &s.claim
	return s.revision == 0 || c.Released || c.Session == "" || c.Session == m.own.id || m.dead(c.Session)
}

// young: a fleet that starts together has no history to protect.
func (m *Machine) young(now Instant) bool { return now-m.started < m.Timing.Settle }

// settled says whether a peer was there for long enough to be given shards.
func (m *Machine) settled(now Instant, p *peer) bool {
	l := m.losses[p.Member]
	if now-l.last > 2*maxSettle {
		l.count = 0
	}
	return now-p.first >= min(m.Timing.Settle<<min(l.count, 16), max(maxSettle, m.Timing.Settle))
}

// replan says for every shard who is to own it, and for which we are next.
func (m *Machine) replan(now Instant, fx *Effects) {
	holds := map[string]bool{}
	for i := range m.slots {
		if c := &m.slots[i].claim; m.slots[i].revision > 0 && !c.Released {
			holds[c.Session] = true
		}
	}
	// One session a name: the one that came last.
	by := map[string]*peer{}
	double := false
	for _, id := range slices.Sorted(maps.Keys(m.peers)) {
		p := m.peers[id]
		if p.dead || p.revision == 0 {
			continue
		}
		if p.Member == m.Member {
			double = double || now-p.first > 2*m.Timing.TTL && now-p.changed < m.Timing.TTL
			continue
		}
		if !p.is(stateAlive) || !m.young(now) && !m.settled(now, p) && !holds[id] {
			continue
		}
		if q := by[p.Member]; q == nil || p.first >= q.first {
			by[p.Member] = p
		}
	}
	if double && !m.doubled {
		fx.Notes = append(fx.Notes, Note{Kind: NoteDouble, Member: m.Member})
	}
	m.doubled = double
	if !m.leaving {
		by[m.Member] = nil
	}
	m.members = slices.Sorted(maps.Keys(by))
	in := planInput{members: m.members, owner: m.owners(), declines: m.declines(by)}
	if in.equal(m.planned) {
		return
	}
	m.planned = in
	m.target = make([]string, m.Shards)
	var standby []uint32
	if len(m.members) > 0 {
		for s, t := range plan(in.owner, in.members, in.declined) {
			if t != nobody {
				m.target[s] = m.members[t]
			}
		}
		standby = m.inherit(in)
	}
	if !slices.Equal(standby, m.standby) {
		m.standby = standby
		fx.Standby, fx.StandbyChanged = standby, true
	}
}

// planInput is all that a plan depends on.
type planInput struct {
	members  []string
	owner    []int
	declines [][]uint32 // of every member, in order
}

func (in planInput) equal(other planInput) bool {
	return slices.Equal(in.members, other.members) && slices.Equal(in.owner, other.owner) &&
		slices.EqualFunc(in.declines, other.declines, slices.Equal[[]uint32])
}

func (in planInput) declined(member int, shard uint32) bool {
	_, ok := slices.BinarySearch(in.declines[member], shard)
	return ok
}

// owners maps every shard to the member that has it or is to take it. A member
// that was started again counts as the one it was.
func (m *Machine) owners() []int {
	owner := make([]int, m.Shards)
	for i := range m.slots {
		c := &m.slots[i].claim
		name := c.Member
		switch s := &m.slots[i]; {
		case s.phase == draining:
			// It will go there, also when balance comes about otherwise.
			name = s.to
		case c.Released:
			name = c.To
		}
		owner[i] = nobody
		if n, ok := slices.BinarySearch(m.members, name); ok && m.slots[i].revision > 0 {
			owner[i] = n
		}
	}
	return owner
}

func (m *Machine) declines(by map[string]*peer) [][]uint32 {
	all := make([][]uint32, len(m.members))
	for n, name := range m.members {
		if p := by[name]; p != nil {
			all[n] = p.Declines // in order: that is how they are written
			continue
		}
		for i := range m.slots {
			if m.slots[i].declined {
				all[n] = append(all[n], uint32(i))
			}
		}
	}
	return all
}

// inherit are the shards that would be planned for us without their owner.
func (m *Machine) inherit(in planInput) []uint32 {
	us, ok := slices.BinarySearch(m.members, m.Member)
	if !ok {
		return nil
	}
	var all []uint32
	for gone := range m.members {
		if gone == us {
			continue
		}
		others := slices.Delete(slices.Clone(m.members), gone, gone+1)
		at := func(n int) int {
			if n >= gone {
				return n + 1
			}
			return n
		}
		left := make([]int, len(in.owner))
		for s, o := range in.owner {
			switch {
			case o == gone || o == nobody:
				left[s] = nobody
			case o > gone:
				left[s] = o - 1
			default:
				left[s] = o
			}
		}
		for s, t := range plan(left, others, func(n int, shard uint32) bool { return in.declined(at(n), shard) }) {
			if in.owner[s] == gone && t != nobody && at(t) == us {
				all = append(all, uint32(s))
			}
		}
	}
	slices.Sort(all)
	return all
}

// act claims what is ours to claim and hands over what is not ours to keep.
func (m *Machine) act(now Instant, fx *Effects) {
	moving := 0
	for i := range m.slots {
		if m.slots[i].phase == draining {
			moving++
		}
	}
	for i := range m.slots {
		s, shard := &m.slots[i], uint32(i)
		mine := m.target[i] == m.Member && !m.leaving
		switch s.phase {
		case held:
			switch {
			case m.leaving:
				s.to = m.target[i]
			case mine || m.target[i] == "":
				s.to = ""
				continue
			case !m.mayMove(now, s, m.target[i]) || moving >= maxMoves:
				continue
			}
			moving++
			s.phase, s.drainAt = draining, now
			m.dirty = true
			fx.Drain = append(fx.Drain, Handover{shard, m.target[i]})
		case draining:
			if now-s.drainAt > m.Timing.Drain {
				m.revoke(now, shard, fx)
			}
		case ending:
			if now-s.drainAt > m.Timing.Drain {
				s.drainAt = now
				fx.Notes = append(fx.Notes, Note{Kind: NoteStuck, Shard: shard})
			}
		case away:
			m.seek(now, shard, mine, fx)
		}
	}
}

// mayMove says whether a shard may go for the sake of balance: not soon after
// it came, and only to somebody who is there.
func (m *Machine) mayMove(now Instant, s *slot, to string) bool {
	if s.to != to {
		s.to, s.wanted = to, now
	}
	// What others do at the same time is seen one by one: a plan that does not
	// last is no plan.
	if now-s.wanted < m.Timing.Poll || now-s.since < m.Timing.Dwell && !m.young(now) {
		return false
	}
	for _, p := range m.peers {
		if p.Member == to && !p.dead && p.is(stateAlive) && now-p.changed < m.Timing.TTL/2 {
			return true
		}
	}
	return false
}

// seek claims a shard that we do not hold, or releases what is left of ours.
func (m *Machine) seek(now Instant, shard uint32, mine bool, fx *Effects) {
	s := &m.slots[shard]
	if s.write != 0 {
		return
	}
	if s.declined && !s.refused && now >= s.notBefore {
		s.declined, m.dirty = false, true
	}
	free := m.synced && m.isFree(s)
	if free && !s.free {
		s.freeAt = now
	}
	s.free = free
	left := s.claim.Session == m.own.id && !s.claim.Released && s.revision > 0
	if !m.proven(now) || !free || now < s.notBefore && !(left && !mine) {
		return
	}
	if left && (m.leaving || s.refused || !mine && m.target[shard] != "") {
		m.release(shard, fx)
		return
	}
	if m.leaving || s.declined || !mine && !m.mayStep(now, s, shard) {
		return
	}
	s.phase = claiming
	s.write = m.put(fx, pending{kind: WriteClaim, shard: shard}, Write{
		Key: shardKey(shard), Value: encode(claim{Session: m.own.id, Member: m.Member}), Expect: s.revision,
	})
}

// mayStep: whom the plan names has not come for the shard, so the next may.
func (m *Machine) mayStep(now Instant, s *slot, shard uint32) bool {
	us, ok := slices.BinarySearch(m.members, m.Member)
	return ok && now-s.freeAt > 2*m.Timing.TTL+time.Duration(min(rank(us, m.members, shard), 4))*m.Timing.TTL/2
}

func (m *Machine) release(shard uint32, fx *Effects) {
	s := &m.slots[shard]
	s.phase = releasing
	to := m.target[shard]
	if to == m.Member {
		to = ""
	}
	s.write = m.put(fx, pending{kind: WriteRelease, to: to, shard: shard}, Write{
		Key: shardKey(shard), Value: encode(claim{Session: m.own.id, Member: m.Member, Released: true, To: to}), Expect: s.revision,
	})
}

// String names an outcome for metrics.
func (o Outcome) String() string { return [...]string{"stored", "conflict", "unknown"}[o] }
