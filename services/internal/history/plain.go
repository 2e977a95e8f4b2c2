package history

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// callRow is a call as clickhouse-go's own batch insert takes it: what the
// historian's way is measured against.
type callRow struct {
	Account         string           `ch:"account"`
	Time            time.Time        `ch:"time"`
	Sequence        uint64           `ch:"sequence"`
	Row             uint16           `ch:"row"`
	StreamTime      time.Time        `ch:"stream_time"`
	Shard           uint16           `ch:"shard"`
	Producer        string           `ch:"producer"`
	Frame           uint64           `ch:"frame"`
	Gateway         string           `ch:"gateway"`
	KeyID           string           `ch:"key_id"`
	RequestID       string           `ch:"request_id"`
	TraceID         string           `ch:"trace_id"`
	SpanID          string           `ch:"span_id"`
	TraceFlags      uint8            `ch:"trace_flags"`
	Method          string           `ch:"method"`
	Route           string           `ch:"route"`
	Model           string           `ch:"model"`
	Region          string           `ch:"region"`
	Status          uint16           `ch:"status"`
	Code            string           `ch:"code"`
	DecisionID      string           `ch:"decision_id"`
	Duration        uint64           `ch:"duration_micros"`
	Flags           uint32           `ch:"flags"`
	Late            uint8            `ch:"late"`
	Source          string           `ch:"source"`
	EventID         string           `ch:"event_id"`
	PriceVersion    string           `ch:"price_version"`
	Currency        string           `ch:"currency"`
	Known           uint32           `ch:"known"`
	Calls           int64            `ch:"calls"`
	InputTokens     int64            `ch:"input_tokens"`
	OutputTokens    int64            `ch:"output_tokens"`
	CachedTokens    int64            `ch:"cached_input_tokens"`
	ReasoningTokens int64            `ch:"reasoning_tokens"`
	Cost            int64            `ch:"cost"`
	Bytes           int64            `ch:"bytes"`
	Custom          map[string]int64 `ch:"custom"`
	Ending          uint8            `ch:"ending"`
}

// plainRow makes row i of a frame.
func plainRow(f *ledger.Frame, i int, e Entry) callRow {
	c := f.Call(i)
	r := callRow{
		Account: c.Account, Time: c.Time.Time(), Sequence: e.Sequence, Row: uint16(i), StreamTime: e.Time.Time(), Shard: uint16(f.Shard),
		Producer: f.Producer.String(), Frame: f.Number, Gateway: f.Gateway, KeyID: c.KeyID, RequestID: c.RequestID, TraceID: string(c.TraceID[:]), SpanID: string(c.SpanID[:]),
		TraceFlags: c.TraceFlags, Method: c.Method, Route: c.Route, Model: c.Model, Region: c.Region, Status: c.Status, Code: string(c.Code), DecisionID: c.DecisionID,
		Duration: uint64(c.Duration), Flags: uint32(c.Flags), Source: c.Source, EventID: c.EventID, PriceVersion: c.PriceVersion, Currency: c.Currency, Custom: map[string]int64{}, Ending: uint8(c.Ending),
	}
	for m := range usage.BuiltIn(usage.NumBuiltIn) {
		if v, ok := c.Quantities.BuiltIn(m); ok {
			r.Known |= 1 << m
			*[]*int64{&r.Calls, &r.InputTokens, &r.OutputTokens, &r.CachedTokens, &r.ReasoningTokens, &r.Cost, &r.Bytes}[m] = v
		}
	}
	return r
}

// appendRow is clickhouse-go's faster row form.
func appendRow(b interface{ Append(...any) error }, r *callRow) error {
	return b.Append(r.Account, r.Time, r.Sequence, r.Row, r.StreamTime, r.Shard, r.Producer, r.Frame, r.Gateway, r.KeyID, r.RequestID, r.TraceID, r.SpanID, r.TraceFlags,
		r.Method, r.Route, r.Model, r.Region, r.Status, r.Code, r.DecisionID, r.Duration, r.Flags, r.Late, r.Source, r.EventID, r.PriceVersion, r.Currency, r.Known,
		r.Calls, r.InputTokens, r.OutputTokens, r.CachedTokens, r.ReasoningTokens, r.Cost, r.Bytes, r.Custom, r.Ending)
}

// Plain inserts calls as a program would that knows clickhouse-go and nothing
// else: the raw limit that the bench puts beside the historian. Its table has the
// shape of calls and is dropped by Close.
type Plain struct {
	h    *History
	rows []callRow
}

const plainTable = "calls_plain"

// plainColumns are those of a callRow, in the order of appendRow.
const plainColumns = "account, time, sequence, row, stream_time, shard, producer, frame, gateway, key_id, request_id, trace_id, span_id, trace_flags, " +
	"method, route, model, region, status, code, decision_id, duration_micros, flags, late, source, event_id, price_version, currency, known, " +
	"calls, input_tokens, output_tokens, cached_input_tokens, reasoning_tokens, cost, bytes, custom, ending"

// NewPlain makes the table.
func (h *History) NewPlain(ctx context.Context) (*Plain, error) {
	p := &Plain{h: h}
	if err := errors.Join(h.conn.Exec(ctx, "DROP TABLE IF EXISTS "+plainTable), h.conn.Exec(ctx, "CREATE TABLE "+plainTable+" AS calls")); err != nil {
		return nil, fmt.Errorf("make the table of the plain insert: %w", err)
	}
	return p, nil
}

// Load reads frames into rows, which is not a part of what is measured.
func (p *Plain) Load(f *ledger.Frame, e Entry) {
	for i := range f.N {
		p.rows = append(p.rows, plainRow(f, i, e))
	}
}

// Insert inserts what was loaded, in batches of size rows, and forgets it.
func (p *Plain) Insert(ctx context.Context, token string, size int) error {
	for n := 0; n*size < len(p.rows); n++ {
		settings := clickhouse.Settings{"insert_deduplication_token": fmt.Sprint(token, n), "async_insert": 0}
		batch, err := p.h.conn.PrepareBatch(clickhouse.Context(ctx, clickhouse.WithSettings(settings)), "INSERT INTO "+plainTable+" ("+plainColumns+")")
		if err != nil {
			return fmt.Errorf("plain insert: %w", err)
		}
		for i := n * size; i < min((n+1)*size, len(p.rows)); i++ {
			if err := appendRow(batch, &p.rows[i]); err != nil {
				return fmt.Errorf("plain insert: %w", err)
			}
		}
		if err := batch.Send(); err != nil {
			return fmt.Errorf("plain insert: %w", err)
		}
	}
	p.rows = p.rows[:0]
	return nil
}

// Close drops the table.
func (p *Plain) Close(ctx context.Context) error {
	return p.h.conn.Exec(ctx, "DROP TABLE IF EXISTS "+plainTable)
}
