package quota

import (
	"hash/maphash"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// account holds no pointers, so that millions of them cost the garbage
// collector nothing.
type account struct {
	admitted, refused int64  // of its own calls
	hash              uint64 // of them (pkg/audit)
	id                uint32
	idLen             uint16
	flags             accountFlags
	parent            int32 // -1: none
	plan              uint32
	first             uint32 // of its counters
	sums              uint32 // of its own calls; 0: nothing was reported
	rollup            uint32 // of its descendants' calls; 0: it has none
}

type accountFlags uint8

const (
	known     accountFlags = 1 << iota // an AccountSet named it
	closed                             // it has no verdicts
	dirty                              // its hash is not in the sum
	corrected                          // its sums were, or those below it
	retires                            // it has retired counters
)

// sums are what was reported, meter by meter.
type sums struct {
	known  uint8 // bit m: built-in meter m
	custom uint32
	values [usage.NumBuiltIn]int64
}

type customSum struct {
	meter uint32
	value int64
}

type rollup struct {
	admitted, refused int64
	sums              uint32
}

// index finds accounts by id: open addressing, half of the id's hash beside
// the account's number. It is not part of the state.
type index struct {
	seed  maphash.Seed
	slots []slot
	used  int
}

type slot struct {
	tag     uint32
	account uint32 // + 1; 0: free
}

func (s *Shard) idOf(a *account) []byte { return s.ids[a.id : a.id+uint32(a.idLen)] }

func (s *Shard) name(i uint32) string { return string(s.idOf(&s.accounts[i])) }

// find returns the account of that id, or false.
func (s *Shard) find(id []byte) (uint32, bool) {
	if len(s.index.slots) == 0 {
		return 0, false
	}
	return s.lookup(id, maphash.Bytes(s.index.seed, id))
}

func (s *Shard) lookup(id []byte, h uint64) (uint32, bool) {
	mask := uint64(len(s.index.slots) - 1)
	tag := uint32(h >> 32)
	for at := h & mask; ; at = (at + 1) & mask {
		sl := s.index.slots[at]
		if sl.account == 0 {
			return 0, false
		}
		if sl.tag == tag {
			a := &s.accounts[sl.account-1]
			if string(s.ids[a.id:a.id+uint32(a.idLen)]) == string(id) {
				return sl.account - 1, true
			}
		}
	}
}

// payer returns the account that calls are counted at.
func (s *Shard) payer(id []byte, calls int64) uint32 {
	if s.unknown >= MaxUnknown {
		if a, ok := s.find(id); ok {
			return a
		}
		s.effects.Unplaced += int(calls)
		id = []byte(OverflowAccount)
	}
	return s.resolve(id)
}

// resolve returns the account of that id and makes it when it is new.
func (s *Shard) resolve(id []byte) uint32 {
	h := maphash.Bytes(s.index.seed, id)
	if len(s.index.slots) > 0 {
		if a, ok := s.lookup(id, h); ok {
			return a
		}
	}
	n := uint32(len(s.accounts))
	s.accounts = append(s.accounts, account{id: uint32(len(s.ids)), idLen: uint16(len(id)), parent: -1})
	s.ids = append(s.ids, id...)
	if 4*(s.index.used+1) > 3*len(s.index.slots) {
		s.grow()
	} else {
		s.index.put(h, n)
	}
	s.effects.NewAccounts++
	s.unknown++
	s.soil(n)
	return n
}

func (x *index) put(h uint64, account uint32) {
	mask := uint64(len(x.slots) - 1)
	at := h & mask
	for x.slots[at].account != 0 {
		at = (at + 1) & mask
	}
	x.slots[at] = slot{tag: uint32(h >> 32), account: account + 1}
	x.used++
}

// grow makes the index anew, twice as large, with all accounts in it.
func (s *Shard) grow() {
	s.index.slots = make([]slot, max(64, 2*len(s.index.slots)))
	s.index.used = 0
	for i := range s.accounts {
		s.index.put(maphash.Bytes(s.index.seed, s.idOf(&s.accounts[i])), uint32(i))
	}
}

// soil says that an account's part of the hash is to be computed anew.
func (s *Shard) soil(i uint32) {
	a := &s.accounts[i]
	if a.flags&dirty != 0 {
		return
	}
	a.flags |= dirty
	s.dirty = append(s.dirty, i)
}

// checkAccounts refuses paths that are circles or too long.
func (s *Shard) checkAccounts(set []usage.Account) *usage.InvalidError {
	if len(set) == 0 {
		return nil
	}
	parents := make(map[string]string, len(set))
	for i := range set {
		a := &set[i]
		if a.ID == "" || len(a.ID) > usage.MaxIDBytes || len(a.Parent) > usage.MaxIDBytes || len(a.Plan) > usage.MaxIDBytes {
			return invalid(usage.ReasonMalformed, "account %d has no id, or an id, parent or plan of more than %d bytes", i, usage.MaxIDBytes)
		}
		if a.ID == OverflowAccount || a.Parent == OverflowAccount {
			return invalid(usage.ReasonMalformed, "%q is where calls of too many unknown accounts are counted: it is no account to set", OverflowAccount)
		}
		if _, twice := parents[a.ID]; twice {
			return invalid(usage.ReasonMalformed, "account %q appears twice", a.ID)
		}
		parents[a.ID] = a.Parent
	}
	for i := range set {
		id := set[i].ID
		for depth := 1; id != ""; depth++ {
			if depth > MaxDepth {
				return invalid(usage.ReasonMalformed, "the path of account %q is a circle or longer than %d accounts", set[i].ID, MaxDepth)
			}
			parent, ok := parents[id]
			if !ok {
				if a, found := s.find([]byte(id)); found && s.accounts[a].parent >= 0 {
					parent = s.name(uint32(s.accounts[a].parent))
				}
			}
			id = parent
		}
	}
	return nil
}

// setAccount adds or changes an account. A closed one keeps its plan and its
// counters, which go on counting, so that opening it again is no free refill;
// it has no verdicts.
func (s *Shard) setAccount(in *usage.Account) {
	i := s.resolve([]byte(in.ID))
	parent := int32(-1)
	if in.Parent != "" {
		p := s.resolve([]byte(in.Parent))
		parent = int32(p)
		if s.accounts[p].rollup == 0 {
			s.accounts[p].rollup = uint32(len(s.rollups))
			s.rollups = append(s.rollups, rollup{})
			s.soil(p)
		}
	}
	a := &s.accounts[i]
	s.soil(i)
	a.parent = parent
	if a.flags&known == 0 {
		a.flags |= known
		s.unknown--
	}
	if in.Closed {
		a.flags |= closed
	} else {
		a.flags &^= closed
		if plan := s.plans.number(in.Plan); plan != a.plan {
			s.changePlan(i, plan)
		}
	}
	def := s.plans.defs[a.plan]
	for k := range def.n {
		s.touch(i, k, false)
	}
}

// block returns the first of n free counters, all zero.
func (s *Shard) block(n uint32) uint32 {
	if n == 0 {
		return 0
	}
	if int(n) < len(s.free) {
		if list := s.free[n]; len(list) > 0 {
			first := list[len(list)-1]
			s.free[n] = list[:len(list)-1]
			clear(s.counters[first : first+n])
			return first
		}
	}
	first := uint32(len(s.counters))
	s.counters = append(s.counters, make([]counter, n)...)
	return first
}

func (s *Shard) release(first, n uint32) {
	if n == 0 {
		return
	}
	for int(n) >= len(s.free) {
		s.free = append(s.free, nil)
	}
	s.free[n] = append(s.free[n], first)
}
