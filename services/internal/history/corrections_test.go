package history

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
)

func correction(sequence uint64, id, account string, at usage.Micros) CorrectionRow {
	row := CorrectionRow{
		Position: Position{Sequence: sequence, Time: noon + 3_600_000_000}, Shard: 3, ID: id, Author: "ada", CreatedAt: noon + 3_599_000_000,
		Account: account, At: at, Model: account, Route: "chat", Method: "POST", Reason: "sent twice", Reference: "batch/17",
		Custom: []usage.Quantity{{Meter: "images", Value: 4}, {Meter: "pages", Value: -5}},
	}
	row.BuiltIn[usage.CallsIndex] = -2
	if i, ok := usage.OutputTokens.Index(); ok {
		row.BuiltIn[i] = -700
	}
	return row
}

func TestUsageTellsWhatWasReportedAndWhatWasCorrected(t *testing.T) {
	t.Parallel()
	h := open(t)
	account := unique(t)
	var calls []usage.Call
	for range 5 {
		c := usage.Call{Time: noon, Account: account, Status: 200, Model: account}
		c.Quantities.Set(usage.OutputTokens, 400)
		calls = append(calls, c)
	}
	insert(t, h, block(t, 70_000_000, noon, ksuid.New(), calls...), unique(t))
	// The second entry repeats the first act.
	rows := []CorrectionRow{correction(70_000_001, account+"-1", account, noon+1_000_000), correction(70_000_002, account+"-1", account, noon+1_000_000), correction(70_000_003, account+"-2", account, noon+7_200_000_000)}
	for _, p := range h.CorrectionParts(rows, 70_000_001, 70_000_003) {
		for range 2 { // the token keeps it from being there twice
			if err := p.Insert(t.Context(), account); err != nil {
				t.Fatal(err)
			}
		}
		if there, err := p.Present(t.Context()); err != nil || !there {
			t.Errorf("present: %t, %v", there, err)
		}
	}
	for view, where := range map[string]string{
		"v_usage_hourly":   "account = '" + account + "'",
		"v_usage_minute":   "account = '" + account + "'",
		"v_traffic_minute": "model = '" + account + "'",
	} {
		var attempts, refused uint64
		var got struct{ Calls, Output, AdjustedCalls, AdjustedOutput int64 }
		q := "SELECT sum(attempts), sum(refused), sum(calls), sum(output_tokens), sum(adjusted_calls), sum(adjusted_output_tokens) FROM " + view + " WHERE " + where
		if err := h.conn.QueryRow(t.Context(), q).Scan(&attempts, &refused, &got.Calls, &got.Output, &got.AdjustedCalls, &got.AdjustedOutput); err != nil {
			t.Fatalf("%s: %v", view, err)
		}
		want := struct{ Calls, Output, AdjustedCalls, AdjustedOutput int64 }{5, 2000, -4, -1400}
		if diff := cmp.Diff(want, got); diff != "" || attempts != 5 || refused != 0 {
			t.Errorf("%s: %d attempts, %d refused: %s", view, attempts, refused, diff)
		}
	}
	// A correction of the time at which the usage was is in its row.
	var rowsAt uint64
	if err := h.conn.QueryRow(t.Context(), "SELECT count() FROM v_usage_hourly WHERE account = ? AND model != '' AND code = '' AND calls = 5 AND adjusted_calls = -2", account).Scan(&rowsAt); err != nil || rowsAt != 1 {
		t.Errorf("%d rows have both, %v", rowsAt, err)
	}

	got, err := h.Corrections(t.Context(), CorrectionsQuery{Account: account, Limit: 10})
	if err != nil || len(got) != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	want := PastCorrection{
		Sequence: 70_000_001, StreamTime: noon + 3_600_000_000, Shard: 3, ID: account + "-1", Author: "ada", CreatedAt: noon + 3_599_000_000, Account: account,
		Time: noon + 1_000_000, Model: account, Route: "chat", Method: "POST", Adjustments: map[string]int64{"calls": -2, "output_tokens": -700, "images": 4, "pages": -5},
		Reason: "sent twice", Reference: "batch/17",
	}
	if diff := cmp.Diff(want, got[1]); diff != "" || got[0].Sequence != 70_000_003 {
		t.Errorf("%d first: %s", got[0].Sequence, diff)
	}
	if got, err := h.Corrections(t.Context(), CorrectionsQuery{Before: 70_000_003, Account: account, Limit: 10}); err != nil || len(got) != 1 || got[0].Sequence != 70_000_001 {
		t.Errorf("before the newest: %+v, %v", got, err)
	}
	if got, err := h.Corrections(t.Context(), CorrectionsQuery{Account: "nobody's", Limit: 10}); err != nil || len(got) != 0 {
		t.Errorf("of nobody: %+v, %v", got, err)
	}
}

// What one account asks for must not read what all of them did.
func TestTheViewsOfUsageStillReadOneAccountOnly(t *testing.T) {
	t.Parallel()
	h := open(t)
	for view, table := range map[string]string{"v_usage_hourly": "usage_hourly", "v_usage_minute": "calls"} {
		rows, err := h.conn.Query(t.Context(), "EXPLAIN indexes = 1 SELECT sum(calls) FROM "+view+" WHERE account = 'one'")
		if err != nil {
			t.Fatal(err)
		}
		plan := ""
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				t.Fatal(err)
			}
			plan += line + "\n"
		}
		if err := closeRows(rows, nil); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(plan, "ReadFromMergeTree ("+embedclickhouse.Database+"."+table+")") || !strings.Contains(plan, "(account in ['one', 'one'])") {
			t.Errorf("%s does not use the key of %s:\n%s", view, table, plan)
		}
	}
}
