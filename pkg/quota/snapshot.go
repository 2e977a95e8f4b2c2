package quota

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const snapshotMagic = "TKQ5"

// AppendBinary appends the whole state: counters, plans, identities that were
// seen, position. Accounts stand in the order in which the log named them, so
// the same log gives the same bytes.
func (s *Shard) AppendBinary(out []byte) []byte {
	begin := len(out)
	out = append(out, snapshotMagic...)
	out = s.appendGlobal(out)
	out = binary.AppendUvarint(out, uint64(len(s.accounts)))
	for i := range s.accounts {
		out = s.appendAccount(out, uint32(i))
	}
	sum := sha256.Sum256(out[begin:])
	return append(out, sum[:]...)
}

// Hash returns a hash of the whole state. Two shards that folded the same
// entries have the same; it takes time in proportion to the accounts that
// changed since it was last asked for.
func (s *Shard) Hash() [32]byte {
	var buf []byte
	for _, i := range s.dirty {
		a := &s.accounts[i]
		a.flags &^= dirty
		buf = s.appendAccount(buf[:0], i)
		h := sha256.Sum256(buf)
		x, y := binary.LittleEndian.Uint64(h[:8]), binary.LittleEndian.Uint64(h[8:])
		if int(i) < len(s.hashes) {
			s.hash[0] -= s.hashes[i][0]
			s.hash[1] -= s.hashes[i][1]
		}
		for int(i) >= len(s.hashes) {
			s.hashes = append(s.hashes, [2]uint64{})
		}
		s.hashes[i] = [2]uint64{x, y}
		s.hash[0] += x
		s.hash[1] += y
	}
	s.dirty = s.dirty[:0]
	buf = s.appendGlobal(buf[:0])
	buf = binary.LittleEndian.AppendUint64(buf, s.hash[0])
	buf = binary.LittleEndian.AppendUint64(buf, s.hash[1])
	return sha256.Sum256(buf)
}

func (s *Shard) appendGlobal(out []byte) []byte {
	out = binary.AppendUvarint(out, uint64(s.shard))
	out = binary.AppendUvarint(out, s.sequence)
	out = binary.AppendVarint(out, int64(s.now))
	own := s.meters[usage.NumBuiltIn:]
	out = binary.AppendUvarint(out, uint64(len(own)))
	for _, m := range own {
		out = appendString(out, string(m))
	}
	names := s.plans.names[1:]
	out = binary.AppendUvarint(out, uint64(len(names)))
	for _, n := range names {
		out = appendString(out, n)
	}
	out = appendPlanSet(out, &PlanSet{Version: s.plans.version, Plans: s.plans.plans})
	out = binary.AppendUvarint(out, uint64(len(s.pending)))
	for i := range s.pending {
		out = appendPlanSet(out, &s.pending[i])
	}
	out = binary.AppendVarint(out, s.total.admitted)
	out = binary.AppendVarint(out, s.total.refused)
	out = binary.LittleEndian.AppendUint64(out, s.calls)
	out = s.appendSums(out, s.total.sums)
	out = s.appendAdjusted(out, adjustmentKey{of: ofAll})
	out = binary.AppendUvarint(out, uint64(s.core.Version))
	out = binary.AppendVarint(out, int64(s.core.Horizon))
	return s.dedup.AppendBinary(out)
}

func (s *Shard) appendAccount(out []byte, i uint32) []byte {
	a := &s.accounts[i]
	out = appendString(out, string(s.idOf(a)))
	out = append(out, byte(a.flags&^dirty))
	out = binary.AppendUvarint(out, uint64(a.parent+1))
	out = binary.AppendUvarint(out, uint64(a.plan))
	out = binary.AppendVarint(out, a.admitted)
	out = binary.AppendVarint(out, a.refused)
	if a.admitted|a.refused != 0 {
		out = binary.LittleEndian.AppendUint64(out, a.hash)
	}
	out = s.appendSums(out, a.sums)
	if a.rollup == 0 {
		out = append(out, 0)
	} else {
		r := &s.rollups[a.rollup]
		out = append(out, 1)
		out = binary.AppendVarint(out, r.admitted)
		out = binary.AppendVarint(out, r.refused)
		out = s.appendSums(out, r.sums)
	}
	n := s.plans.defs[a.plan].n
	out = binary.AppendUvarint(out, uint64(n))
	for k := range n {
		c := &s.counters[a.first+k]
		out = binary.AppendVarint(out, c.cur)
		out = binary.AppendVarint(out, c.prev)
		out = binary.AppendVarint(out, int64(c.number))
		verdict := c.verdict
		if c.flags&isRoomy != 0 {
			verdict |= roomyVerdict
		}
		open := s.opens[openKey{i, k}]
		if open.since != 0 {
			verdict |= openVerdict
		}
		out = append(out, verdict)
		if open.since != 0 {
			out = binary.AppendUvarint(out, open.since)
			out = binary.AppendVarint(out, open.owed)
		}
		out = binary.AppendUvarint(out, c.revision)
		if c.revision != 0 {
			out = binary.AppendVarint(out, int64(c.published))
			out = binary.AppendUvarint(out, uint64(c.decidedAt))
		}
		out = s.appendAllowances(out, touch{i, k})
	}
	if a.flags&corrected != 0 {
		out = s.appendAdjusted(out, adjustmentKey{i, 0, ofOwn})
		out = s.appendAdjusted(out, adjustmentKey{i, 0, ofBelow})
	}
	if a.flags&retires != 0 {
		out = s.appendRetired(out, i)
	}
	return out
}

// Marks of a verdict in a snapshot: a denial that said that there is room, and a
// counter that is open.
const (
	roomyVerdict = 1 << 4
	openVerdict  = 1 << 5
)

func (s *Shard) appendSums(out []byte, at uint32) []byte {
	x := &s.sums[at]
	out = append(out, x.known)
	for m := range x.values {
		if x.known&(1<<m) != 0 {
			out = binary.AppendVarint(out, x.values[m])
		}
	}
	list := s.customs[x.custom]
	out = binary.AppendUvarint(out, uint64(len(list)))
	for _, c := range list {
		out = binary.AppendUvarint(out, uint64(c.meter))
		out = binary.AppendVarint(out, c.value)
	}
	return out
}

func appendString(out []byte, s string) []byte {
	out = binary.AppendUvarint(out, uint64(len(s)))
	return append(out, s...)
}

func appendStrings(out []byte, list []string) []byte {
	out = binary.AppendUvarint(out, uint64(len(list)))
	for _, s := range list {
		out = appendString(out, s)
	}
	return out
}

func appendPlanSet(out []byte, p *PlanSet) []byte {
	out = appendString(out, p.Version)
	out = binary.AppendVarint(out, int64(p.EffectiveAt))
	out = binary.AppendUvarint(out, uint64(len(p.Plans)))
	for i := range p.Plans {
		out = appendString(out, p.Plans[i].ID)
		out = binary.AppendUvarint(out, uint64(len(p.Plans[i].Limits)))
		for k := range p.Plans[i].Limits {
			out = appendLimit(out, &p.Plans[i].Limits[k])
		}
	}
	return out
}

func appendLimit(out []byte, l *usage.Limit) []byte {
	out = appendString(out, l.ID)
	out = appendString(out, string(l.Meter))
	out = appendStrings(out, l.Filter.Models)
	out = appendStrings(out, l.Filter.Routes)
	out = appendStrings(out, l.Filter.Methods)
	out = appendString(out, string(l.Window))
	out = binary.AppendVarint(out, l.Amount)
	out = appendString(out, string(l.Tier))
	out = binary.AppendUvarint(out, uint64(l.WarnPercent))
	out = appendString(out, string(l.Code))
	out = appendString(out, l.ActionURL)
	if l.Tier.Leased() {
		out = binary.AppendVarint(out, int64(l.Lease.Term))
		out = binary.AppendVarint(out, int64(l.Lease.Patience))
		out = binary.AppendVarint(out, int64(l.Lease.ReleaseAfter))
		out = binary.AppendVarint(out, l.Lease.MaxExposure)
	}
	return out
}

var errSnapshot = errors.New("the snapshot is cut off or not one of this program")

// minAccountBytes is what an account takes in a snapshot at least.
const minAccountBytes = 11

// Read returns the state that AppendBinary wrote. Whatever data holds, it takes
// memory in proportion to its length, and what it returns can be folded on. A
// *NewerError says that a newer program wrote it.
func Read(data []byte) (*Shard, error) {
	if len(data) < len(snapshotMagic)+sha256.Size || string(data[:len(snapshotMagic)]) != snapshotMagic {
		return nil, errSnapshot
	}
	body, sum := data[:len(data)-sha256.Size], data[len(data)-sha256.Size:]
	if sha256.Sum256(body) != [sha256.Size]byte(sum) {
		return nil, fmt.Errorf("%w: its hash does not match its content", errSnapshot)
	}
	r := reader{b: body[len(snapshotMagic):]}
	s := &Shard{}
	s.shard = uint32(r.uvarint())
	s.init()
	s.sequence = r.uvarint()
	s.now = usage.Micros(r.varint())
	s.advance(s.now)
	for n := r.count(); n > 0 && !r.bad; n-- {
		if before := len(s.meters); int(s.meter(usage.Meter(r.string()))) != before {
			r.fail() // it has its number already
		}
	}
	for n := r.count(); n > 0 && !r.bad; n-- {
		if before := len(s.plans.names); int(s.plans.number(r.string())) != before {
			r.fail()
		}
	}
	set := r.planSet()
	for n := r.count(); n > 0 && !r.bad; n-- {
		s.pending = append(s.pending, r.planSet())
	}
	if r.bad || len(s.pending) > MaxPendingPlans {
		return nil, errSnapshot
	}
	for i := range s.pending {
		// Its meters were counted when it came.
		if err := checkPlanSet(&s.pending[i]); err != nil {
			return nil, fmt.Errorf("%w: %w", errSnapshot, err)
		}
	}
	s.plans.version, s.plans.plans = set.Version, set.Plans
	if err := checkPlanSet(&set); err != nil {
		return nil, fmt.Errorf("%w: %w", errSnapshot, err)
	}
	s.plans.limits, s.plans.defs = s.compile(set.Plans)
	s.total.admitted, s.total.refused, s.calls = r.varint(), r.varint(), r.uint64()
	s.total.sums = s.readSums(&r)
	s.readAdjusted(&r, adjustmentKey{of: ofAll})
	s.core = Core{Version: uint32(r.uvarint()), Horizon: usage.Micros(r.varint())}
	if newer := Newer(s.shard, 0, s.core.Version); newer != nil {
		return nil, newer
	}
	var err error
	if s.dedup, r.b, err = dedup.Read(r.b); err != nil {
		return nil, fmt.Errorf("%w: %w", errSnapshot, err)
	}
	n := r.count()
	if n > len(r.b)/minAccountBytes {
		return nil, errSnapshot
	}
	s.accounts = make([]account, 0, n)
	shared := map[string]*limit{} // of what is retired
	for range n {
		if !s.readAccount(&r, n, shared) {
			return nil, errSnapshot
		}
	}
	if r.bad || len(r.b) != 0 || !s.pathsEnd() {
		return nil, errSnapshot
	}
	slots := 64
	for 3*slots < 4*len(s.accounts)+4 {
		slots *= 2
	}
	s.index.slots = make([]slot, slots/2)
	s.grow()
	s.rebuildTimers()
	s.settlePurged()
	s.effects = Effects{}
	return s, nil
}

// pathsEnd says whether every account's path ends, and leads over accounts that
// can sum up what is below them.
func (s *Shard) pathsEnd() bool {
	walk := make([]uint32, len(s.accounts)) // in which the account was met; 0: none
	for i := range s.accounts {
		n := uint32(i) + 1
		for at := int32(i); walk[at] == 0; {
			walk[at] = n
			parent := s.accounts[at].parent
			if parent < 0 {
				break
			}
			if walk[parent] == n || s.accounts[parent].rollup == 0 {
				return false
			}
			at = parent
		}
	}
	return true
}

func (s *Shard) readAccount(r *reader, accounts int, shared map[string]*limit) bool {
	id := r.bytes()
	if len(id) == 0 || len(id) > usage.MaxIDBytes {
		return false
	}
	i := uint32(len(s.accounts))
	a := account{id: uint32(len(s.ids)), idLen: uint16(len(id))}
	s.ids = append(s.ids, id...)
	if a.flags = accountFlags(r.byte()); a.flags&^(known|closed|corrected|retires) != 0 {
		return false
	}
	if a.flags&known == 0 {
		s.unknown++
	}
	parent, plan := r.uvarint(), r.uvarint()
	if r.bad || parent > uint64(accounts) || plan >= uint64(len(s.plans.defs)) {
		return false
	}
	a.parent, a.plan = int32(parent)-1, uint32(plan)
	a.admitted, a.refused = r.varint(), r.varint()
	if a.admitted|a.refused != 0 {
		a.hash = r.uint64()
	}
	a.sums = s.readSums(r)
	if r.byte() != 0 {
		a.rollup = uint32(len(s.rollups))
		s.rollups = append(s.rollups, rollup{admitted: r.varint(), refused: r.varint(), sums: s.readSums(r)})
	}
	n := s.plans.defs[a.plan].n
	if r.uvarint() != uint64(n) {
		return false
	}
	a.first = s.block(n)
	for k := range n {
		c := &s.counters[a.first+k]
		c.cur, c.prev, c.number = r.varint(), r.varint(), int32(r.varint())
		c.verdict = r.byte()
		if c.verdict&openVerdict != 0 {
			c.verdict &^= openVerdict
			open := opened{since: r.uvarint(), owed: r.varint()}
			if open.since == 0 || open.since > s.sequence || open.owed < 0 {
				return false
			}
			s.opens[openKey{i, k}] = open
		}
		if c.verdict&roomyVerdict != 0 {
			c.verdict, c.flags = c.verdict&^roomyVerdict, isRoomy
		}
		if c.verdict > uint8(usage.Deny) {
			return false
		}
		if c.revision = r.uvarint(); c.revision != 0 {
			c.published, c.decidedAt = int32(r.varint()), uint32(r.uvarint())
		}
		if !s.readAllowances(r, touch{i, k}, &s.plans.limits[s.plans.defs[a.plan].first+k]) {
			return false
		}
	}
	if a.flags&corrected != 0 {
		s.readAdjusted(r, adjustmentKey{i, 0, ofOwn})
		s.readAdjusted(r, adjustmentKey{i, 0, ofBelow})
	}
	s.accounts = append(s.accounts, a)
	s.soil(i)
	if a.flags&retires != 0 && !s.readRetired(r, i, shared) {
		return false
	}
	return !r.bad
}

func (s *Shard) readSums(r *reader) uint32 {
	var x sums
	x.known = r.byte()
	for m := range x.values {
		if x.known&(1<<m) != 0 {
			x.values[m] = r.varint()
		}
	}
	if n := r.count(); n > 0 {
		x.custom = uint32(len(s.customs))
		list := make([]customSum, 0, n)
		for range n {
			c := customSum{meter: uint32(r.uvarint()), value: r.varint()}
			if int(c.meter) >= len(s.meters) {
				r.fail()
				return 0
			}
			list = append(list, c)
		}
		s.customs = append(s.customs, list)
	}
	if x.known == 0 && x.custom == 0 {
		return 0
	}
	s.sums = append(s.sums, x)
	return uint32(len(s.sums) - 1)
}

// reader takes values off a snapshot; after the first failure bad is set and
// everything it returns is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) fail() { r.b, r.bad = nil, true }

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) uint64() uint64 {
	if len(r.b) < 8 {
		r.fail()
		return 0
	}
	v := binary.LittleEndian.Uint64(r.b)
	r.b = r.b[8:]
	return v
}

// count returns how many items follow, each of a byte at least.
func (r *reader) count() int {
	n := r.uvarint()
	if n > uint64(len(r.b)) {
		r.fail()
		return 0
	}
	return int(n)
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.fail()
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) bytes() []byte {
	n := r.count()
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) string() string { return strings.Clone(string(r.bytes())) }

func (r *reader) strings() []string {
	n := r.count()
	if n == 0 {
		return nil
	}
	list := make([]string, 0, n)
	for range n {
		list = append(list, r.string())
	}
	return list
}

func (r *reader) planSet() PlanSet {
	p := PlanSet{Version: r.string(), EffectiveAt: usage.Micros(r.varint())}
	for n := r.count(); n > 0 && !r.bad; n-- {
		plan := usage.Plan{ID: r.string()}
		for k := r.count(); k > 0 && !r.bad; k-- {
			plan.Limits = append(plan.Limits, r.limit())
		}
		p.Plans = append(p.Plans, plan)
	}
	return p
}

func (r *reader) limit() usage.Limit {
	l := usage.Limit{
		ID: r.string(), Meter: usage.Meter(r.string()),
		Filter: usage.Filter{Models: r.strings(), Routes: r.strings(), Methods: r.strings()},
		Window: usage.WindowKind(r.string()), Amount: r.varint(), Tier: usage.Tier(r.string()),
		WarnPercent: uint32(r.uvarint()), Code: usage.Code(r.string()), ActionURL: r.string(),
	}
	if l.Tier.Leased() {
		l.Lease = usage.LeaseTerms{Term: usage.Micros(r.varint()), Patience: usage.Micros(r.varint()), ReleaseAfter: usage.Micros(r.varint()), MaxExposure: r.varint()}
	}
	return l
}
