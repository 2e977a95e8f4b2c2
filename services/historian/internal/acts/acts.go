// Package acts reads control entries of the ledger as rows of the history.
package acts

import (
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// Correction is the row of a correction; nil for what counting refuses.
func Correction(m *ledger.Message, row *history.ControlRow, c *tollkeeperv1.Correction) *history.CorrectionRow {
	var decoder fold.Decoder
	e, _, err := decoder.Decode(m)
	if err != nil || quota.New(quota.Options{Shard: row.Shard}).Apply(e).Invalid != nil {
		return nil
	}
	out := &history.CorrectionRow{
		Position: row.Position, Shard: row.Shard, ID: row.ID, Author: row.Author, CreatedAt: row.CreatedAt, Account: c.GetAccount(),
		At: usage.Micros(c.GetTimeUnixMicros()), Model: c.GetModel(), Route: c.GetRoute(), Method: c.GetMethod(), Reason: c.GetReason(), Reference: c.GetReference(),
	}
	// As it is counted: not after the entry.
	if out.At == 0 || out.At > row.Time {
		out.At = row.Time
	}
	for _, q := range c.GetAdjustments() {
		m := usage.Meter(q.GetMeter())
		if i, ok := m.Index(); ok {
			out.BuiltIn[i] += q.GetValue()
			continue
		}
		out.Custom = append(out.Custom, usage.Quantity{Meter: m, Value: q.GetValue()})
	}
	return out
}
