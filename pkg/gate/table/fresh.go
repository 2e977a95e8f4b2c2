package table

import "github.com/tollkeeper/tollkeeper/pkg/usage"

// Beacon is what the owner of a shard says several times a second.
type Beacon struct {
	Shard uint32
	Epoch uint64
	// StreamTime up to which the shard is counted.
	StreamTime usage.Micros
	// SentAt by the owner's clock.
	SentAt usage.Micros
}

// Hear takes a beacon that arrived at the own time now and reports whether it
// counts: one of an owner that has been replaced does not.
func (t *Table) Hear(b Beacon, now usage.Micros) bool {
	if b.Shard >= uint32(len(t.shards)) {
		return false
	}
	s := &t.shards[b.Shard]
	if b.Epoch < s.epoch {
		return false
	}
	s.epoch, s.heard, s.everHeard = b.Epoch, now, true
	if b.StreamTime > s.streamTime {
		s.streamTime = b.StreamTime
		t.clock.observe(b.StreamTime, b.SentAt, now)
		t.offset.Store(t.clock.offset())
	}
	t.tickShard(s, now)
	return true
}

// Tick lets time pass: what was not heard of for too long becomes unknown. Call
// it several times within StaleAfter, and after a Reset.
func (t *Table) Tick(now usage.Micros) {
	t.directory.Store(t.directoryMirror.current(now, t.policy.StaleAfter))
	for i := range t.shards {
		t.tickShard(&t.shards[i], now)
	}
}

func (t *Table) tickShard(s *shard, now usage.Micros) {
	known := s.everHeard && now-s.heard <= t.policy.StaleAfter && t.decisionsMirror.current(now, t.policy.StaleAfter)
	if was := s.known.Load(); was && !known {
		s.episode.Add(1) // before known: a reader that sees it unknown counts anew
	}
	s.known.Store(known)
}

// Freshness is how current the table is, for readiness and metrics.
type Freshness struct {
	DirectoryLoaded, DirectoryCurrent bool
	DecisionsLoaded, DecisionsCurrent bool
	// Shards and how many of them are known, that is: both beacons and
	// decisions are current.
	Shards, Known int
	// Silent is the lowest shard without a current beacon; -1 when all have one.
	Silent int
}

// Freshness reports how current the table is at the own time now. It is a
// writer's method.
func (t *Table) Freshness(now usage.Micros) Freshness {
	f := Freshness{
		DirectoryLoaded: t.directoryMirror.loaded, DirectoryCurrent: t.directoryMirror.current(now, t.policy.StaleAfter),
		DecisionsLoaded: t.decisionsMirror.loaded, DecisionsCurrent: t.decisionsMirror.current(now, t.policy.StaleAfter),
		Shards: len(t.shards), Silent: -1,
	}
	for i := range t.shards {
		s := &t.shards[i]
		if s.known.Load() {
			f.Known++
		}
		if f.Silent < 0 && (!s.everHeard || now-s.heard > t.policy.StaleAfter) {
			f.Silent = i
		}
	}
	return f
}

// Size is what the table holds.
type Size struct {
	Accounts, Keys int64
	// Exceptional accounts have at least one deny or warning against them.
	Exceptional int64
}

// Size may be asked by any goroutine.
func (t *Table) Size() Size {
	return Size{t.accounts.Load(), t.keyCount.Load(), t.exceptional.Load()}
}
