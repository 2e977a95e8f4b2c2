// Package usage holds the words of metering: account, call, meter, limit,
// decision, code. It depends on the standard library only and knows no wire,
// no storage and no clock.
//
// All times are microseconds since the Unix epoch (Micros), all quantities
// and money are integers. Values of this package are plain data: safe to copy,
// not safe for concurrent mutation.
package usage

import (
	"fmt"
	"math/bits"
	"strings"
	"time"
	"unicode/utf8"
)

// Micros is a point in time, microseconds since the Unix epoch.
type Micros int64

// At returns t in microseconds since the Unix epoch.
func At(t time.Time) Micros { return Micros(t.UnixMicro()) }

// Time returns m as a time in UTC.
func (m Micros) Time() time.Time { return time.UnixMicro(int64(m)).UTC() }

// Meter names what is counted. Besides the built-in meters a user may have
// any of their own: ASCII letters, digits, '_' , '.' and '-', at most 64.
type Meter string

// The built-in meters. Cost is in nano-units of the call's currency.
const (
	Calls             Meter = "calls"
	InputTokens       Meter = "input_tokens"
	OutputTokens      Meter = "output_tokens"
	CachedInputTokens Meter = "cached_input_tokens"
	ReasoningTokens   Meter = "reasoning_tokens"
	Cost              Meter = "cost"
	Bytes             Meter = "bytes"
)

// BuiltIn is the index of a built-in meter; the wire and the columns of
// history use it. The order never changes, new ones are appended.
type BuiltIn int

// NumBuiltIn is how many built-in meters there are.
const NumBuiltIn = 7

// Indexes of the built-in meters.
const (
	CallsIndex BuiltIn = iota
	InputTokensIndex
	OutputTokensIndex
	CachedInputTokensIndex
	ReasoningTokensIndex
	CostIndex
	BytesIndex
)

// BuiltInMeters returns the built-in meters in index order.
func BuiltInMeters() [NumBuiltIn]Meter {
	return [NumBuiltIn]Meter{Calls, InputTokens, OutputTokens, CachedInputTokens, ReasoningTokens, Cost, Bytes}
}

// Index returns the index of a built-in meter, false for a user's own.
func (m Meter) Index() (BuiltIn, bool) {
	for i, b := range BuiltInMeters() {
		if b == m {
			return BuiltIn(i), true
		}
	}
	return 0, false
}

// Valid reports whether m can be a meter's name.
func (m Meter) Valid() bool {
	if m == "" || len(m) > 64 {
		return false
	}
	for _, r := range m {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.', r == '-':
		default:
			return false
		}
	}
	return true
}

// Quantity is the reading of a user's own meter.
type Quantity struct {
	Meter Meter
	Value int64
}

// Quantities are the readings of one call. A meter that was not reported is
// unknown, which is not 0. The zero value knows nothing.
type Quantities struct {
	known  uint32
	values [NumBuiltIn]int64
	custom []Quantity
}

// Set stores the reading of meter m.
func (q *Quantities) Set(m Meter, v int64) {
	if i, ok := m.Index(); ok {
		q.SetBuiltIn(i, v)
		return
	}
	for i := range q.custom {
		if q.custom[i].Meter == m {
			q.custom = append([]Quantity(nil), q.custom...)
			q.custom[i].Value = v
			return
		}
	}
	// Kept in order of names: what is known is the same, in whatever order it
	// was learned. Appended to a copy: calls are copied, and share the slice.
	at := 0
	for at < len(q.custom) && q.custom[at].Meter < m {
		at++
	}
	custom := make([]Quantity, 0, len(q.custom)+1)
	custom = append(append(custom, q.custom[:at]...), Quantity{m, v})
	q.custom = append(custom, q.custom[at:]...)
}

// SetBuiltIn stores the reading of a built-in meter.
func (q *Quantities) SetBuiltIn(i BuiltIn, v int64) {
	q.known |= 1 << i
	q.values[i] = v
}

// Get returns the reading of m; false means unknown.
func (q *Quantities) Get(m Meter) (int64, bool) {
	if i, ok := m.Index(); ok {
		return q.BuiltIn(i)
	}
	for _, c := range q.custom {
		if c.Meter == m {
			return c.Value, true
		}
	}
	return 0, false
}

// BuiltIn returns the reading of a built-in meter; false means unknown.
func (q *Quantities) BuiltIn(i BuiltIn) (int64, bool) {
	return q.values[i], q.known&(1<<i) != 0
}

// Custom returns the readings of the user's own meters, in the order of their
// names. The slice must not be changed.
func (q *Quantities) Custom() []Quantity { return q.custom }

// Len returns how many meters are known.
func (q *Quantities) Len() int { return bits.OnesCount32(q.known) + len(q.custom) }

// Flags mark what a reader of a call should know about it.
type Flags uint32

// The flags of a call.
const (
	// AdmittedUnknown: admitted under an explicit policy while the gateway
	// could not know the verdict (law 5).
	AdmittedUnknown Flags = 1 << iota
	// Estimated: some quantities are estimates, not readings.
	Estimated
	// FutureTime: the event time was ahead of the ledger and was clamped.
	FutureTime
	// FromLease: the units were taken from leases of the frame's producer.
	FromLease
)

// Ending is how an admitted call came to its end.
type Ending uint8

// The endings; the wire and the columns of history use the numbers.
const (
	// EndingUnknown: it was not told, as by other producers, or the call was refused.
	EndingUnknown Ending = iota
	// Finished: the client was sent the whole answer, whatever its status.
	Finished
	// ClientLeft: the client went before it had the whole answer.
	ClientLeft
	// UpstreamFailed: the upstream did not answer, or its answer broke off.
	UpstreamFailed
	numEndings
)

// NewestEnding is the greatest that is known here.
const NewestEnding = numEndings - 1

// String is the ending's name in history and APIs; empty for one that was not told.
func (e Ending) String() string {
	switch e {
	case EndingUnknown:
		return ""
	case Finished:
		return "finished"
	case ClientLeft:
		return "client_left"
	case UpstreamFailed:
		return "upstream_failed"
	}
	return fmt.Sprintf("ending(%d)", uint8(e))
}

// Call is the record of one finished attempt at a gateway. It never carries a
// key, a header or a body.
type Call struct {
	// Time the attempt began by the gateway's clock, not clamped.
	Time Micros
	// Account that pays: the leaf of its path.
	Account string
	// KeyID is a short public id of the API key.
	KeyID      string
	RequestID  string
	TraceID    [16]byte
	SpanID     [8]byte
	TraceFlags byte
	Method     string
	Route      string
	Model      string
	Region     string
	// Status is the HTTP status that the client got.
	Status uint16
	// Code of a refusal; empty when the call was admitted. A refused attempt
	// feeds no usage meter.
	Code Code
	// DecisionID of the decision that refused it.
	DecisionID string
	// Duration from the request's first byte to the answer's last, microseconds.
	Duration int64
	Flags    Flags
	// Ending of an admitted call.
	Ending Ending
	// Source and EventID identify the event of a foreign producer (CloudEvents);
	// both are empty for our own gateways.
	Source  string
	EventID string
	// PriceVersion is the price list the cost was rated with.
	PriceVersion string
	// Currency of the cost meter (ISO 4217). A call that reports a cost says in which.
	Currency   string
	Quantities Quantities
}

// Admitted reports whether the call was let through.
func (c *Call) Admitted() bool { return c.Code == "" }

// Usage returns what the call adds to meter m and whether that is known.
// Refused calls add nothing to any meter; an admitted call adds 1 to Calls
// unless it reports another number.
func (c *Call) Usage(m Meter) (int64, bool) {
	if !c.Admitted() {
		return 0, false
	}
	v, ok := c.Quantities.Get(m)
	if !ok && m == Calls {
		return 1, true
	}
	return v, ok
}

// Bounds of what a call may say of itself. An event outside of them is
// dead-lettered with the reason, never counted and never dropped.
const (
	MaxIDBytes       = 256 // account, key, request, decision, source and event ids
	MaxNameBytes     = 256 // method, route, model, region
	MaxCustomMeters  = 16
	MaxQuantity      = int64(1) << 53 // exact in every JSON reader
	MaxFuture        = 24 * time.Hour
	MaxStatus        = 999
	OldestTimeMicros = Micros(946684800_000000)      // 2000-01-01
	NewestTimeMicros = Micros(7258118400_000000 - 1) // the last of 2199: every store can hold it
)

// InvalidError says why an event cannot be counted. Reason is a machine code
// (bounded set), the message is for people.
type InvalidError struct {
	Reason  string
	Message string
}

func (e *InvalidError) Error() string { return e.Message }

// Reasons of an InvalidError, also used for what can't be decoded at all.
const (
	ReasonMalformed      = "malformed"
	ReasonOversized      = "oversized"
	ReasonUnknownSchema  = "unknown_schema"
	ReasonAbsurdTime     = "absurd_time"
	ReasonNegativeCount  = "negative_count"
	ReasonUnknownAccount = "unknown_account"
	ReasonChecksum       = "checksum"
	ReasonWrongShard     = "wrong_shard"
	ReasonMisplaced      = "misplaced" // it stands where such entries are not taken
	ReasonWrongCurrency  = "wrong_currency"
)

// Validate reports, as an *InvalidError, what makes the call uncountable at
// the time now.
func (c *Call) Validate(now Micros) error {
	if c.Account == "" {
		return &InvalidError{ReasonMalformed, "the event names no account"}
	}
	for _, f := range [...]struct{ name, value string }{
		{"account", c.Account}, {"key id", c.KeyID}, {"request id", c.RequestID},
		{"decision id", c.DecisionID}, {"source", c.Source}, {"event id", c.EventID},
		{"method", c.Method}, {"route", c.Route}, {"model", c.Model}, {"region", c.Region},
		{"price version", c.PriceVersion}, {"currency", c.Currency}, {"code", string(c.Code)},
	} {
		if len(f.value) > MaxIDBytes {
			return &InvalidError{ReasonOversized, fmt.Sprintf("%s is %d bytes long, at most %d are allowed", f.name, len(f.value), MaxIDBytes)}
		}
		if !validText(f.value) {
			return &InvalidError{ReasonMalformed, fmt.Sprintf("%s is not UTF-8 or contains a zero byte", f.name)}
		}
	}
	if c.Source != "" && c.EventID == "" {
		return &InvalidError{ReasonMalformed, "the event has a source and no id: all of that source would be one event"}
	}
	if c.Time < OldestTimeMicros {
		return &InvalidError{ReasonAbsurdTime, fmt.Sprintf("the event time %s is before the year 2000", c.Time.Time().Format(time.RFC3339))}
	}
	if c.Time > NewestTimeMicros || c.Time-now > Micros(MaxFuture.Microseconds()) {
		return &InvalidError{ReasonAbsurdTime, fmt.Sprintf("the event time %s is more than %s in the future", c.Time.Time().Format(time.RFC3339), MaxFuture)}
	}
	if len(c.Quantities.custom) > MaxCustomMeters {
		return &InvalidError{ReasonOversized, fmt.Sprintf("the event reports %d own meters, at most %d are allowed", len(c.Quantities.custom), MaxCustomMeters)}
	}
	if c.Duration < 0 {
		return &InvalidError{ReasonNegativeCount, fmt.Sprintf("the duration is %d", c.Duration)}
	}
	if c.Duration > MaxQuantity {
		return &InvalidError{ReasonOversized, fmt.Sprintf("the duration is %d microseconds, at most %d is allowed", c.Duration, MaxQuantity)}
	}
	if c.Ending > NewestEnding {
		return &InvalidError{ReasonMalformed, fmt.Sprintf("%d is not an ending", c.Ending)}
	}
	if c.Status > MaxStatus {
		return &InvalidError{ReasonMalformed, fmt.Sprintf("%d is not an HTTP status", c.Status)}
	}
	for i, m := range BuiltInMeters() {
		if v, ok := c.Quantities.BuiltIn(BuiltIn(i)); ok {
			if err := validQuantity(m, v); err != nil {
				return err
			}
		}
	}
	for _, q := range c.Quantities.custom {
		if !q.Meter.Valid() {
			return &InvalidError{ReasonMalformed, fmt.Sprintf("%q cannot name a meter: use letters, digits, '_', '.', '-', at most 64", q.Meter)}
		}
		if err := validQuantity(q.Meter, q.Value); err != nil {
			return err
		}
	}
	return c.validMoney()
}

func validText(s string) bool { return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0 }

// CleanText returns what of s an event may carry: valid UTF-8 without zero
// bytes, at most MaxIDBytes. For texts that only describe a call and come from
// outside (a request id, a model): they must not make it uncountable.
func CleanText(s string) string {
	if len(s) <= MaxIDBytes && validText(s) {
		return s
	}
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	if len(s) > MaxIDBytes {
		end := MaxIDBytes
		for !utf8.RuneStart(s[end]) {
			end--
		}
		s = s[:end]
	}
	return s
}

func validQuantity(m Meter, v int64) error {
	if v < 0 {
		return &InvalidError{ReasonNegativeCount, fmt.Sprintf("%s is %d: counts are not negative, a correction is an entry of its own", m, v)}
	}
	if v > MaxQuantity {
		return &InvalidError{ReasonOversized, fmt.Sprintf("%s is %d, at most %d is allowed in one event", m, v, MaxQuantity)}
	}
	return nil
}

// MeterSet is a set of built-in meters. The zero value is empty.
type MeterSet uint32

// SetOf returns the set of these meters; a user's own are left out.
func SetOf(meters ...Meter) MeterSet {
	var s MeterSet
	for _, m := range meters {
		if i, ok := m.Index(); ok {
			s |= 1 << i
		}
	}
	return s
}

// Has reports whether m is in the set. It does not allocate.
func (s MeterSet) Has(m Meter) bool {
	if s == 0 {
		return false
	}
	i, ok := m.Index()
	return ok && s&(1<<i) != 0
}
