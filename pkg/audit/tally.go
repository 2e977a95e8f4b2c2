package audit

import (
	"fmt"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Own is the place of the sum over all of the users' own meters in Tally.Sums.
const Own = usage.NumBuiltIn

// NumSums is how many sums a tally has: the built-in meters, and Own.
const NumSums = usage.NumBuiltIn + 1

// Tally sums up calls. Sums are modulo 2^64.
type Tally struct {
	// Count of all calls, Refused of those that were refused: they feed no sum.
	Count   int64 `json:"count"`
	Refused int64 `json:"refused"`
	// Sums by usage.BuiltIn, then Own.
	Sums [NumSums]int64 `json:"sums"`
	Hash uint64         `json:"hash,string"`
}

// Add counts a call.
func (t *Tally) Add(c *usage.Call, hash uint64) {
	t.Count++
	t.Hash += hash
	if !c.Admitted() {
		t.Refused++
		return
	}
	for i := range usage.BuiltIn(usage.NumBuiltIn) {
		if v, ok := c.Quantities.BuiltIn(i); ok {
			t.Sums[i] += v
		} else if i == usage.CallsIndex {
			t.Sums[i]++
		}
	}
	for _, q := range c.Quantities.Custom() {
		t.Sums[Own] += q.Value
	}
}

// Plus adds what another has counted.
func (t *Tally) Plus(o *Tally) {
	t.Count += o.Count
	t.Refused += o.Refused
	for i := range t.Sums {
		t.Sums[i] += o.Sums[i]
	}
	t.Hash += o.Hash
}

// Minus takes away what another has counted.
func (t *Tally) Minus(o *Tally) {
	t.Count -= o.Count
	t.Refused -= o.Refused
	for i := range t.Sums {
		t.Sums[i] -= o.Sums[i]
	}
	t.Hash -= o.Hash
}

// Minute is a minute since the Unix epoch.
type Minute int64

// MinuteOf a time.
func MinuteOf(at usage.Micros) Minute {
	m := int64(at) / 60_000_000
	if int64(at)%60_000_000 < 0 {
		m--
	}
	return Minute(m)
}

// newest is the last time that a ClickHouse DateTime can hold.
const newest = usage.Micros(1<<32-1) * 1_000_000

// FrameMinute is the minute of a frame's calls: of its sealing, or, where that is
// not known (0) or absurd, of the ledger's time, which never goes back.
func FrameMinute(sealedAt, ledgerTime usage.Micros) Minute {
	if sealedAt <= 0 || sealedAt > newest {
		sealedAt = min(max(ledgerTime, 0), newest)
	}
	return MinuteOf(sealedAt)
}

// Time at which the minute begins.
func (m Minute) Time() time.Time { return time.Unix(int64(m)*60, 0).UTC() }

// String is the minute for people: 2026-01-02 15:04 UTC.
func (m Minute) String() string { return m.Time().Format("2006-01-02 15:04 UTC") }

// Kind of a difference, by what the second point has in relation to the first.
type Kind string

// The kinds.
const (
	// Gap: it has fewer calls.
	Gap Kind = "gap"
	// Double: it has more.
	Double Kind = "double"
	// Other: it has as many, but others, or with other quantities.
	Other Kind = "sum"
)

// KindOf the difference between two tallies that are not equal.
func KindOf(want, got *Tally) Kind {
	switch {
	case got.Count < want.Count:
		return Gap
	case got.Count > want.Count:
		return Double
	}
	return Other
}

// Describe says for people what got has other than want.
func Describe(want, got *Tally) string {
	d := *got
	d.Minus(want)
	var parts []string
	if d.Count != 0 {
		parts = append(parts, fmt.Sprintf("%+d calls", d.Count))
	}
	if d.Refused != 0 {
		parts = append(parts, fmt.Sprintf("%+d refused", d.Refused))
	}
	meters := usage.BuiltInMeters()
	for i, v := range d.Sums {
		switch {
		case v == 0:
		case i == Own:
			parts = append(parts, fmt.Sprintf("own meters %+d", v))
		default:
			parts = append(parts, fmt.Sprintf("%s %+d", meters[i], v))
		}
	}
	if len(parts) == 0 {
		return "the same number and sums of other calls"
	}
	return strings.Join(parts, ", ")
}
