package history

import (
	"context"
	"fmt"
	"time"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/history/columnar"
)

// What the historian fills and Parts sends.
type (
	Block       = columnar.Block
	Entry       = columnar.Entry
	Position    = columnar.Position
	DecisionRow = columnar.DecisionRow
	ControlRow  = columnar.ControlRow
	AlertRow    = columnar.AlertRow
	// CorrectionRow is what a control entry corrects.
	CorrectionRow = columnar.CorrectionRow
)

// NewBlock returns an empty block.
func NewBlock() *Block { return columnar.NewBlock() }

// Month returns the month of a time as the tables' partitions have it, in UTC:
// 202511.
func Month(t usage.Micros) uint32 { return columnar.Month(t) }

// DecisionParts returns the part of a block of decisions; from and to are the
// block's stretch of the stream.
func (h *History) DecisionParts(rows []DecisionRow, from, to uint64) []Part {
	return h.streamPart(targetDecisions, len(rows), from, to, func() proto.Input { return columnar.Decisions(rows) })
}

// ControlParts returns the part of a block of control entries.
func (h *History) ControlParts(rows []ControlRow, from, to uint64) []Part {
	return h.streamPart(targetControl, len(rows), from, to, func() proto.Input { return columnar.Control(rows) })
}

// CorrectionParts returns the part of a block of control entries that are
// corrections.
func (h *History) CorrectionParts(rows []CorrectionRow, from, to uint64) []Part {
	return h.streamPart(targetCorrections, len(rows), from, to, func() proto.Input { return columnar.Corrections(rows) })
}

// AlertParts returns the part of a block of alert transitions.
func (h *History) AlertParts(rows []AlertRow, from, to uint64) []Part {
	return h.streamPart(targetAlerts, len(rows), from, to, func() proto.Input { return columnar.Alerts(rows) })
}

// streamPart makes a part of a small table that is sorted by stream position.
// An insert is kept whole or not at all, so any row of the stretch says that all
// of them are there.
func (h *History) streamPart(t target, rows int, from, to uint64, input func() proto.Input) []Part {
	if rows == 0 {
		return nil
	}
	return []Part{{
		h: h, target: t, rows: rows,
		input: input,
		present: func(ctx context.Context) (bool, error) {
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			var n uint64
			if err := h.conn.QueryRow(ctx, "SELECT count() FROM "+t.String()+" WHERE sequence BETWEEN ? AND ?", from, to).Scan(&n); err != nil {
				return false, fmt.Errorf("count the rows of %s from %d to %d: %w", t, from, to, err)
			}
			return n > 0, nil
		},
	}}
}
