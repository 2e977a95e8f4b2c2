package history

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// What no call reported is unknown in the sums, not 0, and of what some reported the sums
// say how many did not.
func TestUnknownStaysUnknownInSums(t *testing.T) {
	t.Parallel()
	h := open(t)
	account := unique(t)
	call := func(model string, code usage.Code, tokens ...int64) usage.Call {
		c := usage.Call{Time: noon, Account: account, Status: 200, Model: account + model, Code: code}
		for _, n := range tokens {
			c.Quantities.Set(usage.InputTokens, n)
		}
		return c
	}
	insert(t, h, block(t, 80_000_000, noon, ksuid.New(),
		call("-none", ""), call("-none", ""),
		call("-mixed", "", 7), call("-mixed", "", 0), call("-mixed", ""),
		call("-zero", "", 0),
		call("-refused", usage.QuotaExceeded, 5)), unique(t))
	insert(t, h, block(t, 80_000_001, noon+1, ksuid.New(), call("-mixed", "", 3), call("-none", "")), unique(t))
	type sums struct {
		Admitted int64
		Tokens   *int64
		Unknown  int64
	}
	n := func(v int64) *int64 { return &v }
	want := map[string]sums{"-none": {3, nil, 3}, "-mixed": {4, n(10), 1}, "-zero": {1, n(0), 0}, "-refused": {0, nil, 0}}
	for _, view := range []string{"v_usage_hourly", "v_usage_minute", "v_traffic_minute"} {
		for model, w := range want {
			var got sums
			q := "SELECT toInt64(admitted), input_tokens, toInt64(unknown_input_tokens) FROM " + view + " WHERE model = ?"
			if err := h.conn.QueryRow(t.Context(), q, account+model).Scan(&got.Admitted, &got.Tokens, &got.Unknown); err != nil {
				t.Fatalf("%s: %v", view, err)
			}
			if diff := cmp.Diff(w, got); diff != "" {
				t.Errorf("%s %s: %s", view, model, diff)
			}
		}
	}
	var got sums
	if err := h.conn.QueryRow(t.Context(), "SELECT toInt64(admitted), input_tokens, toInt64(unknown_input_tokens) FROM v_conservation WHERE account = ? AND code = ''", account).Scan(&got.Admitted, &got.Tokens, &got.Unknown); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sums{8, n(10), 4}, got); diff != "" {
		t.Errorf("v_conservation: %s", diff)
	}
}

// A person who looks at a table or view is told what each column is.
func TestEveryColumnOfEveryTableAndViewHasAComment(t *testing.T) {
	t.Parallel()
	h := open(t)
	rows, err := h.conn.Query(t.Context(), "SELECT table, name, comment FROM system.columns WHERE database = currentDatabase() ORDER BY table, position")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for rows.Next() {
		var table, name, comment string
		if err := rows.Scan(&table, &name, &comment); err != nil {
			t.Fatal(err)
		}
		seen[table]++
		if comment == "" {
			t.Errorf("%s.%s has no comment", table, name)
		}
	}
	if err := closeRows(rows, nil); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"calls", "usage_hourly", "v_calls", "v_usage_hourly", "v_usage_minute", "v_traffic_minute", "v_refusals", "v_decisions", "v_control", "v_corrections", "v_alerts", "v_conservation"} {
		if seen[table] < 5 {
			t.Errorf("%s has %d columns", table, seen[table])
		}
	}
}
