package history

import (
	"context"
	"fmt"

	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// AuditQuery asks for tallies of the calls of a stretch of the ledger.
type AuditQuery struct {
	// From and To are ledger positions, both included; Since and Until the
	// ledger's time of that stretch, which spares the server from looking
	// everywhere.
	From, To     uint64
	Since, Until usage.Micros
	// Accounts by id; empty: all.
	Accounts []string
	// Limit bounds the cells of the answer.
	Limit int
}

// Audit returns the tallies of the calls that the history has of a stretch of
// the ledger, by the minute stamped in their frames and account. The hashes are
// those of pkg/audit, and ClickHouse computes them.
func (h *History) Audit(ctx context.Context, q AuditQuery) (*audit.Cells, error) {
	cells := audit.NewCells(q.Limit)
	err := h.read(ctx, auditSQL, func(rows driver.Rows) error {
		var x audit.Cell
		var minute int64
		dest := []any{&minute, &x.Account, &x.Tally.Count, &x.Tally.Refused}
		for i := range x.Tally.Sums {
			dest = append(dest, &x.Tally.Sums[i])
		}
		if err := rows.Scan(append(dest, &x.Tally.Hash)...); err != nil {
			return err
		}
		x.Minute = audit.Minute(minute)
		cells.Add(&x)
		return nil
	}, named("from", q.From), named("to", q.To), named("since", int64(q.Since)/1_000_000), named("until", int64(q.Until)/1_000_000), named("accounts", accounts(q.Accounts)))
	if err != nil {
		return nil, fmt.Errorf("tallies of ledger entries %d to %d: %w", q.From, q.To, err)
	}
	return cells, nil
}

// auditSQL asks for calls of producers and foreign events apart: only the latter
// need hashes of texts. An account and minute may have an answer of both.
var auditSQL = auditPart(`producer != ''`,
	// producer is a LowCardinality: its hash is computed once a dictionary entry.
	`intHash64(intHash64(intHash64(reinterpretAsUInt64(substring(SHA256(producer), 1, 8)) + shard) + frame) + row)`) +
	" UNION ALL " + auditPart(`producer = ''`,
	`reinterpretAsUInt64(substring(SHA256(concat(
		reinterpretAsFixedString(byteSwap(toUInt64(length(account)))), account,
		reinterpretAsFixedString(byteSwap(toUInt64(length(source)))), toString(source),
		reinterpretAsFixedString(byteSwap(toUInt64(length(event_id)))), event_id)), 1, 8))`)

func auditPart(which, hash string) string {
	return `SELECT toInt64(intDiv(toUnixTimestamp(frame_minute), 60)) AS minute, account, toInt64(count()), toInt64(countIf(code != '')),
			sumIf(if(bitTest(known, 0), c.calls, 1), code = ''),
			sumIf(c.input_tokens, code = ''), sumIf(c.output_tokens, code = ''), sumIf(c.cached_input_tokens, code = ''),
			sumIf(c.reasoning_tokens, code = ''), sumIf(c.cost, code = ''), sumIf(c.bytes, code = ''),
			sumIf(arraySum(mapValues(c.custom)), code = ''),
			sumWithOverflow(` + hash + `)
		FROM calls AS c
		WHERE ` + which + ` AND sequence BETWEEN {from:UInt64} AND {to:UInt64}
			AND stream_time BETWEEN toDateTime({since:Int64}, 'UTC') AND toDateTime({until:Int64}, 'UTC')
			AND (empty({accounts:Array(String)}) OR account IN {accounts:Array(String)})
		GROUP BY minute, account`
}

// AuditFrom returns the newest ledger position of a call that was written before
// the history kept the minutes of frames; 0 when there is none.
func (h *History) AuditFrom(ctx context.Context) (last uint64, err error) {
	err = h.read(ctx, "SELECT max(sequence) FROM calls WHERE frame_minute = toDateTime(0, 'UTC')", func(rows driver.Rows) error { return rows.Scan(&last) })
	if err != nil {
		return 0, fmt.Errorf("from where the history can be audited: %w", err)
	}
	return last, nil
}
