package columnar

import (
	"github.com/ClickHouse/ch-go/proto"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// latestTime is the last microsecond that DateTime64(6) holds, 2299-12-31.
const latestTime = int64(10413791999_999999)

// Position is where a row stands in its stream.
type Position struct {
	Sequence uint64
	Time     usage.Micros // the stream's time
}

// DecisionRow is one revision of a decision.
type DecisionRow struct {
	Position
	usage.Decision
}

// ControlRow is one control entry.
type ControlRow struct {
	Position
	Shard     uint32
	ID        string
	Author    string
	CreatedAt usage.Micros
	Kind      string // plan_set, account_set, producer_closed
	Body      string // JSON
}

// CorrectionRow is one correction: what it adds to each meter, signed.
type CorrectionRow struct {
	Position
	Shard                uint32
	ID, Author           string
	CreatedAt            usage.Micros
	Account              string
	At                   usage.Micros // of the corrected usage
	Model, Route, Method string
	BuiltIn              [usage.NumBuiltIn]int64
	Custom               []usage.Quantity
	Reason, Reference    string
}

// AlertRow is one transition of an episode. Body is the whole of it, JSON.
type AlertRow struct {
	Position
	usage.Alert
	Body string
}

// Decisions returns the columns of decisions.
func Decisions(rows []DecisionRow) proto.Input {
	var c rowColumns
	for i := range rows {
		r := &rows[i]
		c.position(r.Position)
		c.text("id", r.ID)
		c.text("account", r.Account)
		c.low("limit_id", r.LimitID)
		c.low("meter", string(r.Meter))
		c.low("verdict", r.Verdict.String())
		c.low("code", string(r.Code))
		c.uint64("revision", r.Revision)
		c.uint16("shard", uint16(r.Shard))
		c.uint64("epoch", r.Epoch)
		c.int64("used", r.Used)
		c.int64("amount", r.Amount)
		c.low("window", string(r.Window))
		c.time("period_start", r.PeriodStart)
		c.time("period_end", r.PeriodEnd)
		c.low("plan_version", r.PlanVersion)
		c.time("decided_at", r.DecidedAt)
		c.time("cause", r.Cause)
	}
	return c.in
}

// Control returns the columns of control entries.
func Control(rows []ControlRow) proto.Input {
	var c rowColumns
	for i := range rows {
		r := &rows[i]
		c.position(r.Position)
		c.uint16("shard", uint16(r.Shard))
		c.text("id", r.ID)
		c.low("author", r.Author)
		c.time("created_at", r.CreatedAt)
		c.low("kind", r.Kind)
		c.text("body", r.Body)
	}
	return c.in
}

// Corrections returns the columns of corrections.
func Corrections(rows []CorrectionRow) proto.Input {
	var c rowColumns
	for i := range rows {
		r := &rows[i]
		c.position(r.Position)
		c.uint16("shard", uint16(r.Shard))
		c.text("id", r.ID)
		c.low("author", r.Author)
		c.time("created_at", r.CreatedAt)
		c.text("account", r.Account)
		c.time("time", r.At)
		c.low("model", r.Model)
		c.low("route", r.Route)
		c.low("method", r.Method)
		for m, name := range usage.BuiltInMeters() {
			c.int64(string(name), r.BuiltIn[m])
		}
		c.readings("custom", r.Custom)
		c.text("reason", r.Reason)
		c.text("reference", r.Reference)
	}
	return c.in
}

// Alerts returns the columns of transitions of alerts.
func Alerts(rows []AlertRow) proto.Input {
	var c rowColumns
	for i := range rows {
		r := &rows[i]
		c.position(r.Position)
		c.text("episode_id", r.EpisodeID)
		c.low("transition", string(r.Transition))
		c.int64("n", int64(r.N))
		c.low("rule", r.Rule)
		c.text("scope", r.Scope)
		c.low("severity", r.Severity)
		c.time("started_at", r.StartedAt)
		c.time("at", r.At)
		c.float64("value", r.Value)
		c.float64("threshold", r.Threshold)
		c.int64("refused_accounts", int64(r.Refused))
		c.int64("active_accounts", int64(r.Active))
		c.text("reason", r.Reason)
		c.text("summary", r.Summary)
		c.text("body", r.Body)
	}
	return c.in
}

// rowColumns gathers rows of a small table value by value; a column appears with
// its first value.
type rowColumns struct {
	in proto.Input
	at int // next column of the row
}

func column[T proto.ColInput](c *rowColumns, name string, make func() T) T {
	if c.at == len(c.in) || c.in[c.at].Name != name {
		if c.at == len(c.in) && (c.at == 0 || c.in[0].Name != name) {
			c.in = append(c.in, proto.InputColumn{Name: name, Data: make()})
		} else {
			c.at = 0 // the next row begins
		}
	}
	data := c.in[c.at].Data.(T)
	c.at++
	return data
}

func (c *rowColumns) position(p Position) {
	c.uint64("sequence", p.Sequence)
	c.time("stream_time", p.Time)
}

func (c *rowColumns) text(name, v string) {
	column(c, name, func() *texts { return new(texts) }).append([]byte(v))
}

func (c *rowColumns) low(name, v string) {
	l := column(c, name, func() low { return low{new(words)} })
	l.appendKey(l.id([]byte(v)))
}

func (c *rowColumns) readings(name string, list []usage.Quantity) {
	r := column(c, name, func() *readings { return new(readings) })
	for _, q := range list {
		r.meters.appendKey(r.meters.id([]byte(q.Meter)))
		r.values = append(r.values, q.Value)
	}
	r.ends = append(r.ends, uint64(len(r.values)))
}

func (c *rowColumns) uint16(name string, v uint16) {
	column(c, name, func() *proto.ColUInt16 { return new(proto.ColUInt16) }).Append(v)
}

func (c *rowColumns) uint64(name string, v uint64) {
	column(c, name, func() *proto.ColUInt64 { return new(proto.ColUInt64) }).Append(v)
}

func (c *rowColumns) int64(name string, v int64) {
	column(c, name, func() *proto.ColInt64 { return new(proto.ColInt64) }).Append(v)
}

func (c *rowColumns) float64(name string, v float64) {
	column(c, name, func() *proto.ColFloat64 { return new(proto.ColFloat64) }).Append(v)
}

func (c *rowColumns) time(name string, v usage.Micros) {
	b := column(c, name, func() bits { return bits{new(int64s), proto.ColumnTypeDateTime64.With("6", "'UTC'")} })
	b.Append(min(int64(v), latestTime))
}
