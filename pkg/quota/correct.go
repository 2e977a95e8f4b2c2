package quota

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// adjustmentKey is where the sum of corrections belongs.
type adjustmentKey struct {
	account, meter uint32
	of             sumKind
}

// sumKind says of which sum.
type sumKind uint8

const (
	ofOwn   sumKind = iota // an account's own calls
	ofBelow                // those of its descendants
	ofAll                  // all of the shard's; the account is 0
)

// maxAdjusted bounds the sum of corrections.
const maxAdjusted = math.MaxInt64 / 4

// maxHorizon of foreign events: beyond it nothing is gained and sums of times
// would leave their range.
const maxHorizon = usage.Micros(math.MaxInt64 / 4)

// NewerError says that a shard's ledger is folded by rules that this program does not
// know. By those it knows it would count something else than a newer program, so it
// stops before.
type NewerError struct {
	Shard uint32
	// Sequence of the entry that says so; 0: a state says it that is folded further.
	Sequence uint64
	Version  uint32
}

// Error implements error.
func (e *NewerError) Error() string {
	where := fmt.Sprintf("from entry %d on", e.Sequence)
	if e.Sequence == 0 {
		where = "already"
	}
	return fmt.Sprintf("shard %d of the ledger is folded by version %d of the rules %s, and this program knows version %d: it goes no further there, nothing is lost; run a newer version of it", e.Shard, e.Version, where, CoreVersion)
}

// Newer says that an entry of a shard's ledger, or a state (sequence 0), is of rules
// that this program does not know; nil: it knows them.
func Newer(shard uint32, sequence uint64, version uint32) *NewerError {
	if version <= CoreVersion {
		return nil
	}
	return &NewerError{Shard: shard, Sequence: sequence, Version: version}
}

// Check says why a core of a known version can't be folded by; nil: it can.
func (c *Core) Check() *usage.InvalidError {
	switch {
	case c.Version == 0:
		return invalid(usage.ReasonMalformed, "the version of the rules is missing")
	case c.Horizon <= 0 || c.Horizon > maxHorizon:
		return invalid(usage.ReasonMalformed, "a horizon of foreign events of %d microseconds: it must be positive and at most %d", c.Horizon, maxHorizon)
	}
	return nil
}

// Core returns by which rules the shard folds. Before a control entry has said
// it the version is 0, and the horizon the one it was made with.
func (s *Shard) Core() Core { return Core{Version: s.core.Version, Horizon: s.dedup.Horizon()} }

func (s *Shard) checkCorrection(c *Correction) *usage.InvalidError {
	switch {
	case c.Account == "" || len(c.Account) > usage.MaxIDBytes:
		return invalid(usage.ReasonMalformed, "the correction names no account, or one of more than %d bytes", usage.MaxIDBytes)
	case c.Account == OverflowAccount:
		return invalid(usage.ReasonMalformed, "%q is where calls of too many unknown accounts are counted: whose they were nobody can tell", OverflowAccount)
	case c.Time < 0:
		return invalid(usage.ReasonMalformed, "the time of what is corrected is before 1970: %d", c.Time)
	case len(c.Adjustments) == 0 || len(c.Adjustments) > MaxAdjustments:
		return invalid(usage.ReasonMalformed, "a correction of %d meters: 1 to %d are possible", len(c.Adjustments), MaxAdjustments)
	}
	more := 0
	for i, q := range c.Adjustments {
		switch {
		case !q.Meter.Valid():
			return invalid(usage.ReasonMalformed, "%q cannot name a meter", q.Meter)
		case q.Value == 0 || q.Value > usage.MaxQuantity || q.Value < -usage.MaxQuantity:
			return invalid(usage.ReasonMalformed, "an adjustment of %s by %d: by 1 to %d either way are possible", q.Meter, q.Value, usage.MaxQuantity)
		}
		for _, before := range c.Adjustments[:i] {
			if before.Meter == q.Meter {
				return invalid(usage.ReasonMalformed, "the meter %s is adjusted twice", q.Meter)
			}
		}
		if _, known := s.meterIDs[q.Meter]; !known {
			more++
		}
	}
	if len(s.meters)+more > 2*MaxMeters {
		return invalid(usage.ReasonOversized, "more than %d different meters in one shard", 2*MaxMeters)
	}
	return nil
}

// adjusted is a sum that a correction has changed; it does not fall below 0.
func adjusted(sum, by int64) int64 {
	if by < 0 {
		return max(0, sum+by)
	}
	return saturated(sum, by)
}

// correct changes the sums of an account and of those above it, and the
// counters of the limits that what is corrected belongs to.
func (s *Shard) correct(c *Correction) {
	s.effects.Corrected = true
	at := c.Time
	if at == 0 || at > s.now {
		at = s.now
	}
	leaf := s.payer([]byte(c.Account), 0)
	late := false
	for _, q := range c.Adjustments {
		meter := s.meter(q.Meter)
		s.adjust(&s.total.sums, adjustmentKey{0, meter, ofAll}, q.Value)
		s.adjust(&s.accounts[leaf].sums, adjustmentKey{leaf, meter, ofOwn}, q.Value)
		for p := int32(leaf); p >= 0; p = s.accounts[p].parent {
			a := &s.accounts[p]
			s.soil(uint32(p))
			a.flags |= corrected
			if p != int32(leaf) {
				s.adjust(&s.rollups[a.rollup].sums, adjustmentKey{uint32(p), meter, ofBelow}, q.Value)
			}
			def := s.plans.defs[a.plan]
			for k := range def.n {
				l := &s.plans.limits[def.first+k]
				if l.meter == meter && l.Filter.Match(c.Model, c.Route, c.Method) {
					late = s.adjustLimit(touch{uint32(p), k}, l, at, q.Value) || late
				}
			}
			if a.flags&retires != 0 {
				late = s.correctRetired(uint32(p), meter, c, at, q.Value) || late
			}
		}
	}
	if late {
		s.effects.Late++
	}
}

// adjustLimit reports whether what is corrected is older than what is kept.
func (s *Shard) adjustLimit(t touch, l *limit, at usage.Micros, by int64) (late bool) {
	w := &s.windows[l.kind]
	_, c, _ := s.limitOf(t)
	c.roll(w.number)
	switch {
	case at < w.before:
		return true
	case at < w.at:
		c.prev = adjusted(c.prev, by)
		return false
	}
	before := c.cur
	s.correctOpen(t, before, by)
	c.cur = adjusted(c.cur, by)
	if l.leased {
		if x := s.allowances[allowanceKey{t.account, t.limit, w.number}]; x != nil {
			x.entry.Outside += c.cur - before
			s.stir(x)
		}
	}
	s.touch(t.account, t.limit, false)
	return false
}

// adjust changes a sum of readings and keeps by how much. Calls are no readings:
// of them only the latter is kept.
func (s *Shard) adjust(at *uint32, key adjustmentKey, by int64) {
	if key.meter != uint32(usage.CallsIndex) {
		n := s.reading(at, key.meter)
		before := *n
		*n = adjusted(before, by)
		by = *n - before
	}
	// Bounded either way, so that sums of them do not leave their range.
	s.adjusted[key] = min(max(s.adjusted[key]+by, -maxAdjusted), maxAdjusted)
}

// reading returns the sum of a meter, which is known from then on.
func (s *Shard) reading(at *uint32, meter uint32) *int64 {
	if *at == 0 {
		*at = uint32(len(s.sums))
		s.sums = append(s.sums, sums{})
	}
	x := &s.sums[*at]
	if meter < usage.NumBuiltIn {
		x.known |= 1 << meter
		return &x.values[meter]
	}
	if x.custom == 0 {
		x.custom = uint32(len(s.customs))
		s.customs = append(s.customs, nil)
	}
	list := &s.customs[x.custom]
	for k := range *list {
		if (*list)[k].meter == meter {
			return &(*list)[k].value
		}
	}
	*list = append(*list, customSum{meter: meter})
	return &(*list)[len(*list)-1].value
}

// appendAdjusted appends the corrections of one sum, in the order of meters.
func (s *Shard) appendAdjusted(out []byte, key adjustmentKey) []byte {
	n := uint64(0)
	var list []byte
	if len(s.adjusted) > 0 {
		for m := range uint32(len(s.meters)) {
			key.meter = m
			if v, ok := s.adjusted[key]; ok {
				n++
				list = binary.AppendUvarint(list, uint64(m))
				list = binary.AppendVarint(list, v)
			}
		}
	}
	out = binary.AppendUvarint(out, n)
	return append(out, list...)
}

func (s *Shard) readAdjusted(r *reader, key adjustmentKey) {
	for n := r.count(); n > 0; n-- {
		m, v := r.uvarint(), r.varint()
		if m >= uint64(len(s.meters)) {
			r.fail()
			return
		}
		key.meter = uint32(m)
		s.adjusted[key] = v
	}
}
