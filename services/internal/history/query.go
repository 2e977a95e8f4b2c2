package history

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Bounds of an answer and of the time it may take. A question whose context has
// no nearer deadline gets QueryTimeout.
const (
	QueryTimeout = 15 * time.Second
	MaxRows      = 10_000 // of a list
	MaxPoints    = 5_000  // steps of a series
	MaxGroups    = 50
	MaxAccounts  = 10_000 // named in a question
)

// ErrQuestion is wrapped by errors about what was asked, not about the answer.
var ErrQuestion = errors.New("the question cannot be answered")

// Group is by what a series is split.
type Group string

// The groups.
const (
	ByCode    Group = "code"
	ByAccount Group = "account"
	ByModel   Group = "model"
)

// CallsQuery asks for calls with a counted time in [From, To), in steps counted
// from From.
type CallsQuery struct {
	From, To time.Time
	Step     time.Duration // whole seconds
	Group    Group
	// Account restricts it to one account when not empty.
	Account string
	// Top is how many groups are told apart, those with the most attempts; the
	// others are one named "". At most MaxGroups, which is also what 0 means.
	Top int
}

// CallsPoint is a step of a group.
type CallsPoint struct {
	// Step counts from 0.
	Step int
	// Name of the group: code (empty: admitted), account or model.
	Name string
	// Other says that it is the sum of the groups that are not told apart.
	Other                     bool
	Admitted, Refused         int64
	InputTokens, OutputTokens int64
}

// table returns the source that answers a question in the least time: a rollup
// where its steps fit into the question's, else the calls themselves.
func (q *CallsQuery) table() (table, at string) {
	whole := func(unit time.Duration) bool {
		return q.Step%unit == 0 && q.From.Truncate(unit).Equal(q.From) && q.To.Truncate(unit).Equal(q.To)
	}
	switch byAccount := q.Account != "" || q.Group == ByAccount; {
	case !byAccount && whole(time.Minute):
		return "traffic_minute", "minute"
	case whole(time.Hour):
		return "usage_hourly", "hour"
	}
	return "calls", ""
}

// Calls returns the points that are not empty, in no order. A question with
// steps of whole minutes on whole minutes (for accounts: hours) is answered out
// of rollups.
func (h *History) Calls(ctx context.Context, q CallsQuery) (out []CallsPoint, err error) {
	if q.Top <= 0 || q.Top > MaxGroups {
		q.Top = MaxGroups
	}
	switch {
	case q.Group != ByCode && q.Group != ByAccount && q.Group != ByModel:
		return nil, fmt.Errorf("%w: calls can be grouped by code, account or model, not by %q", ErrQuestion, q.Group)
	case q.Step < time.Second || q.Step%time.Second != 0:
		return nil, fmt.Errorf("%w: a step of %s: choose whole seconds", ErrQuestion, q.Step)
	case !q.From.Before(q.To) || q.To.Sub(q.From)/q.Step > MaxPoints:
		return nil, fmt.Errorf("%w: %s to %s in steps of %s: choose 1 to %d steps", ErrQuestion, q.From.UTC().Format(time.RFC3339), q.To.UTC().Format(time.RFC3339), q.Step, MaxPoints)
	}
	table, bucket := q.table()
	// The identifiers are ours, the values are parameters.
	var source string
	if table == "calls" {
		// Counted since From is what both times are since: that spares the server
		// older parts, and older rows of an account.
		source = fmt.Sprintf(`SELECT intDiv(toUnixTimestamp(toDateTime(least(c.time, toDateTime64(c.stream_time, 6, 'UTC')), 'UTC')) - {from:Int64}, {step:Int64}) AS step, toString(c.%s) AS name,
			count() AS attempts, countIf(c.code != '') AS refused, sumIf(c.input_tokens, c.code = '') AS input, sumIf(c.output_tokens, c.code = '') AS output
			FROM calls AS c
			WHERE c.stream_time >= toDateTime({from:Int64}, 'UTC') AND c.time >= toDateTime({from:Int64}, 'UTC')
				AND toDateTime(least(c.time, toDateTime64(c.stream_time, 6, 'UTC')), 'UTC') < toDateTime({to:Int64}, 'UTC')
				AND ({account:String} = '' OR c.account = {account:String})
			GROUP BY step, name`, q.Group)
	} else {
		account := ""
		if table == "usage_hourly" {
			account = "AND ({account:String} = '' OR account = {account:String})"
		}
		source = fmt.Sprintf(`SELECT intDiv(toUnixTimestamp(r.%[2]s) - {from:Int64}, {step:Int64}) AS step, toString(r.%[1]s) AS name,
			sum(r.attempts) AS attempts, sum(r.refused) AS refused, sum(r.input_tokens) AS input, sum(r.output_tokens) AS output
			FROM %[3]s AS r
			WHERE r.%[2]s >= toDateTime({from:Int64}, 'UTC') AND r.%[2]s < toDateTime({to:Int64}, 'UTC') %[4]s
			GROUP BY step, name`, q.Group, bucket, table, account)
	}
	query := `WITH s AS (` + source + `),
		top AS (SELECT name FROM s GROUP BY name ORDER BY sum(attempts) DESC, name LIMIT {top:UInt32})
		SELECT toInt64(step), if(name IN top, name, '') AS shown, name NOT IN top AS other,
			toInt64(sum(attempts) - sum(refused)), toInt64(sum(refused)), sum(input), sum(output)
		FROM s GROUP BY step, shown, other
		LIMIT {limit:UInt32}`
	// A time before a step's second belongs to the step: To may have a fraction.
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var p CallsPoint
		var step int64
		var other uint8
		if err := rows.Scan(&step, &p.Name, &other, &p.Admitted, &p.Refused, &p.InputTokens, &p.OutputTokens); err != nil {
			return err
		}
		p.Step, p.Other = int(step), other != 0
		out = append(out, p)
		return nil
	}, named("from", q.From.Unix()), named("to", q.To.Unix()), named("step", int64(q.Step/time.Second)), named("account", q.Account),
		named("top", q.Top), named("limit", MaxPoints*(MaxGroups+1)))
	if err != nil {
		return nil, fmt.Errorf("calls over time: %w", err)
	}
	return out, nil
}

// UsageQuery asks for one meter over time, in steps counted from From.
type UsageQuery struct {
	From, To time.Time
	Step     time.Duration // whole seconds
	Meter    usage.Meter
	Accounts []string // empty: all
}

// UsagePoint is a step's sum.
type UsagePoint struct {
	Step  int
	Value int64
}

// Usage returns the steps in which something was used, in order. Whole hours on
// whole hours are answered out of the rollup.
func (h *History) Usage(ctx context.Context, q UsageQuery) (out []UsagePoint, err error) {
	switch {
	case !q.Meter.Valid():
		return nil, fmt.Errorf("%w: %q cannot name a meter", ErrQuestion, q.Meter)
	case q.Step < time.Second || q.Step%time.Second != 0:
		return nil, fmt.Errorf("%w: a step of %s: choose whole seconds", ErrQuestion, q.Step)
	case !q.From.Before(q.To) || q.To.Sub(q.From)/q.Step > MaxPoints:
		return nil, fmt.Errorf("%w: choose 1 to %d steps", ErrQuestion, MaxPoints)
	case len(q.Accounts) > MaxAccounts:
		return nil, fmt.Errorf("%w: %d accounts, at most %d can be named", ErrQuestion, len(q.Accounts), MaxAccounts)
	}
	calls := CallsQuery{From: q.From, To: q.To, Step: q.Step, Group: ByAccount}
	var query string
	if table, bucket := calls.table(); table != "calls" {
		query = fmt.Sprintf(`SELECT toInt64(intDiv(toUnixTimestamp(r.%[1]s) - {from:Int64}, {step:Int64})) AS step, sum(%[2]s) AS value
			FROM %[3]s AS r
			WHERE r.%[1]s >= toDateTime({from:Int64}, 'UTC') AND r.%[1]s < toDateTime({to:Int64}, 'UTC') AND (empty({accounts:Array(String)}) OR r.account IN {accounts:Array(String)})
			GROUP BY step HAVING value != 0 ORDER BY step`, bucket, meterColumn("r", q.Meter), table)
	} else {
		query = fmt.Sprintf(`SELECT toInt64(intDiv(toUnixTimestamp(toDateTime(least(c.time, toDateTime64(c.stream_time, 6, 'UTC')), 'UTC')) - {from:Int64}, {step:Int64})) AS step, sumIf(%s, c.code = '') AS value
			FROM calls AS c
			WHERE c.stream_time >= toDateTime({from:Int64}, 'UTC') AND c.time >= toDateTime({from:Int64}, 'UTC')
				AND toDateTime(least(c.time, toDateTime64(c.stream_time, 6, 'UTC')), 'UTC') < toDateTime({to:Int64}, 'UTC')
				AND (empty({accounts:Array(String)}) OR c.account IN {accounts:Array(String)})
			GROUP BY step HAVING value != 0 ORDER BY step`, rawMeter("c", q.Meter))
	}
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var p UsagePoint
		var step int64
		if err := rows.Scan(&step, &p.Value); err != nil {
			return err
		}
		p.Step = int(step)
		out = append(out, p)
		return nil
	}, named("from", q.From.Unix()), named("to", q.To.Unix()), named("step", int64(q.Step/time.Second)), named("accounts", accounts(q.Accounts)), named("meter", string(q.Meter)))
	if err != nil {
		return nil, fmt.Errorf("usage over time: %w", err)
	}
	return out, nil
}

// meterColumn is where a meter stands: a column, or the map of the user's own,
// whose name is a parameter.
func meterColumn(table string, m usage.Meter) string {
	if _, ok := m.Index(); ok {
		return table + "." + string(m)
	}
	return table + ".custom[{meter:String}]"
}

// rawMeter is what an admitted call adds to a meter.
func rawMeter(table string, m usage.Meter) string {
	if m == usage.Calls {
		return "if(bitTest(" + table + ".known, 0), " + table + ".calls, 1)"
	}
	return meterColumn(table, m)
}

// Totals are sums over calls. A meter that nobody reported is absent, but for
// the built-in ones, which are 0 then.
type Totals struct {
	Account  string // empty in a sum over several
	Admitted int64
	Refused  int64
	// ByCode counts refusals.
	ByCode map[string]int64
	Meters map[usage.Meter]int64
	// LastSequence is the newest ledger position among them.
	LastSequence uint64
}

// TotalsQuery asks for totals of calls that count for the account itself, not
// for those below it.
type TotalsQuery struct {
	// Accounts by id; empty: all of them.
	Accounts []string
	// From and To bound the counted time, [From, To); zero: not at all. The
	// rollup has whole hours.
	From, To time.Time
	// Rollup answers out of the hourly sums instead of the calls: faster, and
	// the same if the history is right.
	Rollup bool
}

// Totals returns one sum over all accounts that are asked for: history's side of
// the conservation check.
func (h *History) Totals(ctx context.Context, q TotalsQuery) (Totals, error) {
	list, err := h.totals(ctx, q, "''", 1)
	if err != nil || len(list) == 0 {
		return Totals{ByCode: map[string]int64{}, Meters: map[usage.Meter]int64{}}, err
	}
	return list[0], nil
}

// AccountTotals returns a sum for each account, by id, at most MaxRows of them.
// An account without calls is absent.
func (h *History) AccountTotals(ctx context.Context, q TotalsQuery) ([]Totals, error) {
	return h.totals(ctx, q, "account", MaxRows)
}

func (h *History) totals(ctx context.Context, q TotalsQuery, group string, limit int) (out []Totals, err error) {
	if len(q.Accounts) > MaxAccounts {
		return nil, fmt.Errorf("%w: %d accounts, at most %d can be named", ErrQuestion, len(q.Accounts), MaxAccounts)
	}
	var b strings.Builder
	meters := usage.BuiltInMeters()
	if q.Rollup {
		b.WriteString("SELECT " + group + " AS a, toString(t.code) AS k, sum(t.attempts) AS attempts, max(t.last_sequence)")
		for _, m := range meters {
			b.WriteString(", sum(t." + string(m) + ")")
		}
		b.WriteString(`, sumMap(t.custom) FROM usage_hourly AS t
			WHERE (empty({accounts:Array(String)}) OR t.account IN {accounts:Array(String)})
				AND ({from:Int64} = 0 OR t.hour >= toDateTime({from:Int64}, 'UTC')) AND ({to:Int64} = 0 OR t.hour < toDateTime({to:Int64}, 'UTC'))`)
	} else {
		b.WriteString("SELECT " + group + " AS a, toString(t.code) AS k, count() AS attempts, max(t.sequence)")
		for _, m := range meters {
			b.WriteString(", sumIf(" + rawMeter("t", m) + ", t.code = '')")
		}
		b.WriteString(`, sumMapIf(t.custom, t.code = '') FROM calls AS t
			WHERE (empty({accounts:Array(String)}) OR t.account IN {accounts:Array(String)})
				AND ({from:Int64} = 0 OR toDateTime(least(t.time, toDateTime64(t.stream_time, 6, 'UTC')), 'UTC') >= toDateTime({from:Int64}, 'UTC'))
				AND ({to:Int64} = 0 OR toDateTime(least(t.time, toDateTime64(t.stream_time, 6, 'UTC')), 'UTC') < toDateTime({to:Int64}, 'UTC'))`)
	}
	b.WriteString(" GROUP BY a, k ORDER BY a, k LIMIT {limit:UInt32} BY k")
	err = h.read(ctx, b.String(), func(rows driver.Rows) error {
		var account, code string
		var attempts, last uint64
		var sums [usage.NumBuiltIn]int64
		custom := map[string]int64{}
		dest := []any{&account, &code, &attempts, &last}
		for i := range sums {
			dest = append(dest, &sums[i])
		}
		if err := rows.Scan(append(dest, &custom)...); err != nil {
			return err
		}
		if n := len(out); n == 0 || out[n-1].Account != account {
			if n == limit {
				return nil
			}
			out = append(out, Totals{Account: account, ByCode: map[string]int64{}, Meters: map[usage.Meter]int64{}})
			for _, m := range meters {
				out[n].Meters[m] = 0
			}
		}
		t := &out[len(out)-1]
		t.LastSequence = max(t.LastSequence, last)
		if code != "" {
			t.Refused += int64(attempts)
			t.ByCode[code] += int64(attempts)
			return nil
		}
		t.Admitted += int64(attempts)
		for i, m := range meters {
			t.Meters[m] += sums[i]
		}
		for m, v := range custom {
			t.Meters[usage.Meter(m)] += v
		}
		return nil
	}, named("accounts", accounts(q.Accounts)), named("from", unixOr0(q.From)), named("to", unixOr0(q.To)), named("limit", limit))
	if err != nil {
		return nil, fmt.Errorf("totals: %w", err)
	}
	return out, nil
}

// AccountSum is an account's part in something.
type AccountSum struct {
	Account           string
	Admitted, Refused int64
	Value             int64 // of the meter asked for
}

// TopAccounts returns the accounts that used most of a meter in [from, to),
// whole hours, at most limit (MaxRows at most).
func (h *History) TopAccounts(ctx context.Context, from, to time.Time, m usage.Meter, limit int) (out []AccountSum, err error) {
	if !m.Valid() || limit <= 0 {
		return nil, fmt.Errorf("%w: meter %q, %d accounts", ErrQuestion, m, limit)
	}
	query := `SELECT t.account, toInt64(sum(t.attempts) - sum(t.refused)), toInt64(sum(t.refused)), sum(` + meterColumn("t", m) + `) AS value
		FROM usage_hourly AS t
		WHERE t.hour >= toDateTime({from:Int64}, 'UTC') AND t.hour < toDateTime({to:Int64}, 'UTC')
		GROUP BY t.account ORDER BY value DESC, t.account LIMIT {limit:UInt32}`
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var a AccountSum
		if err := rows.Scan(&a.Account, &a.Admitted, &a.Refused, &a.Value); err != nil {
			return err
		}
		out = append(out, a)
		return nil
	}, named("from", from.Truncate(time.Hour).Unix()), named("to", to.Unix()), named("limit", min(limit, MaxRows)), named("meter", string(m)))
	if err != nil {
		return nil, fmt.Errorf("top accounts: %w", err)
	}
	return out, nil
}

// Refusal is a call that was not let through.
type Refusal struct {
	Time       usage.Micros
	Sequence   uint64
	Row        uint16
	Shard      uint16
	Gateway    string
	Account    string
	KeyID      string
	RequestID  string
	Method     string
	Route      string
	Model      string
	Status     uint16
	Code       usage.Code
	DecisionID string
}

// Refusals returns the newest refusals that entered the ledger since, newest
// first, of one account or (empty) of all, at most limit (MaxRows at most).
func (h *History) Refusals(ctx context.Context, account string, since time.Time, limit int) (out []Refusal, err error) {
	if limit <= 0 {
		return nil, fmt.Errorf("%w: %d refusals", ErrQuestion, limit)
	}
	const query = `SELECT toUnixTimestamp64Micro(t.time), t.sequence, t.row, t.shard, toString(t.gateway), t.account, toString(t.key_id), t.request_id,
			toString(t.method), toString(t.route), toString(t.model), t.status, toString(t.code), t.decision_id
		FROM calls AS t
		WHERE t.code != '' AND t.stream_time >= toDateTime({since:Int64}, 'UTC') AND ({account:String} = '' OR t.account = {account:String})
		ORDER BY t.sequence DESC, t.row DESC LIMIT {limit:UInt32}`
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var r Refusal
		var at int64
		var code string
		if err := rows.Scan(&at, &r.Sequence, &r.Row, &r.Shard, &r.Gateway, &r.Account, &r.KeyID, &r.RequestID, &r.Method, &r.Route, &r.Model, &r.Status, &code, &r.DecisionID); err != nil {
			return err
		}
		r.Time, r.Code = usage.Micros(at), usage.Code(code)
		out = append(out, r)
		return nil
	}, named("since", unixOr0(since)), named("account", account), named("limit", min(limit, MaxRows)))
	if err != nil {
		return nil, fmt.Errorf("refusals: %w", err)
	}
	return out, nil
}

// DecisionsQuery asks for decisions, newest first.
type DecisionsQuery struct {
	Account string // empty: of all
	Verdict string // allow, warn, deny; empty: any
	// ID of one decision; empty: any.
	ID string
	// Before is the sequence in the decisions' stream before which to begin; 0:
	// at the newest.
	Before uint64
	Limit  int
}

// PastDecision is a revision of a decision. Its filter, action URL and warn
// percent are not kept.
type PastDecision struct {
	// Sequence in the decisions' stream.
	Sequence uint64
	usage.Decision
}

// Decisions returns at most q.Limit decisions (MaxRows at most), newest first.
func (h *History) Decisions(ctx context.Context, q DecisionsQuery) (out []PastDecision, err error) {
	if q.Limit <= 0 {
		return nil, fmt.Errorf("%w: %d decisions", ErrQuestion, q.Limit)
	}
	const query = `SELECT sequence, id, account, toString(limit_id), toString(meter), toString(verdict), toString(code), revision, shard, epoch, used, amount,
			toString(window), toUnixTimestamp64Micro(period_start), toUnixTimestamp64Micro(period_end), toString(plan_version),
			toUnixTimestamp64Micro(decided_at), toUnixTimestamp64Micro(cause)
		FROM decisions
		WHERE ({account:String} = '' OR account = {account:String}) AND ({verdict:String} = '' OR verdict = {verdict:String})
			AND ({id:String} = '' OR id = {id:String}) AND ({before:UInt64} = 0 OR sequence < {before:UInt64})
		ORDER BY sequence DESC LIMIT {limit:UInt32}`
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var d PastDecision
		var meter, verdict, code, window string
		var shard uint16
		var start, end, decided, cause int64
		if err := rows.Scan(&d.Sequence, &d.ID, &d.Account, &d.LimitID, &meter, &verdict, &code, &d.Revision, &shard, &d.Epoch, &d.Used, &d.Amount,
			&window, &start, &end, &d.PlanVersion, &decided, &cause); err != nil {
			return err
		}
		d.Meter, d.Code, d.Shard, d.Window = usage.Meter(meter), usage.Code(code), uint32(shard), usage.WindowKind(window)
		d.PeriodStart, d.PeriodEnd, d.DecidedAt, d.Cause = usage.Micros(start), usage.Micros(end), usage.Micros(decided), usage.Micros(cause)
		for _, v := range []usage.Verdict{usage.Allow, usage.Warn, usage.Deny} {
			if v.String() == verdict {
				d.Verdict = v
			}
		}
		out = append(out, d)
		return nil
	}, named("account", q.Account), named("verdict", q.Verdict), named("id", q.ID), named("before", q.Before), named("limit", min(q.Limit, MaxRows)))
	if err != nil {
		return nil, fmt.Errorf("decisions: %w", err)
	}
	return out, nil
}

// CorrectionsQuery asks for corrections, newest first.
type CorrectionsQuery struct {
	Account string // empty: of all accounts
	// Before is the ledger sequence before which to begin; 0: at the newest.
	Before uint64
	Limit  int
}

// PastCorrection is a correction that is in the ledger.
type PastCorrection struct {
	Sequence   uint64       `json:"ledger_sequence"`
	StreamTime usage.Micros `json:"stream_time_unix_micros"`
	Shard      uint32       `json:"shard"`
	ID         string       `json:"id"`
	Author     string       `json:"author"`
	CreatedAt  usage.Micros `json:"created_at_unix_micros"`
	Account    string       `json:"account"`
	Time       usage.Micros `json:"time_unix_micros"`
	Model      string       `json:"model,omitempty"`
	Route      string       `json:"route,omitempty"`
	Method     string       `json:"method,omitempty"`
	// Adjustments by meter, signed; a meter that is not corrected is absent.
	Adjustments map[string]int64 `json:"adjustments"`
	Reason      string           `json:"reason"`
	Reference   string           `json:"reference,omitempty"`
}

// Corrections returns at most q.Limit corrections (MaxRows at most), newest first,
// each act once.
func (h *History) Corrections(ctx context.Context, q CorrectionsQuery) (out []PastCorrection, err error) {
	if q.Limit <= 0 {
		return nil, fmt.Errorf("%w: %d corrections", ErrQuestion, q.Limit)
	}
	// An act and its repetition are of one account: each side has both or none.
	const query = `SELECT sequence, toUnixTimestamp64Micro(stream_time), shard, id, toString(author), toUnixTimestamp64Micro(created_at), account,
			toUnixTimestamp64Micro(time), toString(model), toString(route), toString(method),
			[calls, input_tokens, output_tokens, cached_input_tokens, reasoning_tokens, cost, bytes],
			arrayMap(x -> toString(x), mapKeys(custom)), mapValues(custom), reason, reference
		FROM (SELECT * FROM corrections WHERE {account:String} = '' OR account = {account:String} ORDER BY sequence LIMIT 1 BY shard, id)
		WHERE {before:UInt64} = 0 OR sequence < {before:UInt64}
		ORDER BY sequence DESC LIMIT {limit:UInt32}`
	err = h.read(ctx, query, func(rows driver.Rows) error {
		c := PastCorrection{Adjustments: map[string]int64{}}
		var shard uint16
		var at, created, time int64
		var builtIn, own []int64
		var names []string
		if err := rows.Scan(&c.Sequence, &at, &shard, &c.ID, &c.Author, &created, &c.Account, &time, &c.Model, &c.Route, &c.Method, &builtIn, &names, &own, &c.Reason, &c.Reference); err != nil {
			return err
		}
		c.StreamTime, c.Shard, c.CreatedAt, c.Time = usage.Micros(at), uint32(shard), usage.Micros(created), usage.Micros(time)
		for m, name := range usage.BuiltInMeters() {
			if builtIn[m] != 0 {
				c.Adjustments[string(name)] = builtIn[m]
			}
		}
		for i, name := range names {
			c.Adjustments[name] = own[i]
		}
		out = append(out, c)
		return nil
	}, named("account", q.Account), named("before", q.Before), named("limit", min(q.Limit, MaxRows)))
	if err != nil {
		return nil, fmt.Errorf("corrections: %w", err)
	}
	return out, nil
}

// PastAlert is a transition of an episode, whole, as JSON.
type PastAlert struct {
	Sequence  uint64 // in the alerts' stream
	EpisodeID string
	Body      []byte
}

// Alerts returns at most limit transitions (MaxRows at most), newest first;
// before is the sequence before which to begin, 0: at the newest.
func (h *History) Alerts(ctx context.Context, before uint64, limit int) (out []PastAlert, err error) {
	if limit <= 0 {
		return nil, fmt.Errorf("%w: %d alerts", ErrQuestion, limit)
	}
	const query = `SELECT sequence, episode_id, body FROM alerts
		WHERE {before:UInt64} = 0 OR sequence < {before:UInt64}
		ORDER BY sequence DESC LIMIT {limit:UInt32}`
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var a PastAlert
		var body string
		if err := rows.Scan(&a.Sequence, &a.EpisodeID, &body); err != nil {
			return err
		}
		a.Body = []byte(body)
		out = append(out, a)
		return nil
	}, named("before", before), named("limit", min(limit, MaxRows)))
	if err != nil {
		return nil, fmt.Errorf("alerts: %w", err)
	}
	return out, nil
}

// Position returns the newest ledger entry of which calls are in history; 0 for
// none.
func (h *History) Position(ctx context.Context) (last uint64, err error) {
	// The rollup is small, has a row a minute, and its parts are in order.
	err = h.read(ctx, "SELECT max(last_sequence) FROM traffic_minute", func(rows driver.Rows) error { return rows.Scan(&last) })
	if err != nil {
		return 0, fmt.Errorf("position of the history: %w", err)
	}
	return last, nil
}

// TableStatus is how large a table is.
type TableStatus struct {
	Table string
	Rows  uint64
	Bytes uint64 // on disk, compressed
	Parts uint64
}

// Status is how the history is.
type Status struct {
	Version  string // of the server
	Position uint64 // newest ledger entry with calls
	Tables   []TableStatus
}

// Status returns the state of the tables, by name.
func (h *History) Status(ctx context.Context) (s Status, err error) {
	if s.Position, err = h.Position(ctx); err != nil {
		return s, err
	}
	err = h.read(ctx, "SELECT version()", func(rows driver.Rows) error { return rows.Scan(&s.Version) })
	if err != nil {
		return s, fmt.Errorf("version of ClickHouse: %w", err)
	}
	const query = `SELECT name, ifNull(total_rows, 0), ifNull(total_bytes, 0), ifNull(parts, 0) FROM system.tables
		WHERE database = currentDatabase() AND engine LIKE '%MergeTree' ORDER BY name LIMIT 100`
	err = h.read(ctx, query, func(rows driver.Rows) error {
		var t TableStatus
		if err := rows.Scan(&t.Table, &t.Rows, &t.Bytes, &t.Parts); err != nil {
			return err
		}
		s.Tables = append(s.Tables, t)
		return nil
	})
	if err != nil {
		return s, fmt.Errorf("status of the tables: %w", err)
	}
	return s, nil
}

func named(name string, v any) any { return clickhouse.Named(name, v) }

func accounts(list []string) []string { return slices.Concat([]string{}, list) }

func unixOr0(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// read asks and hands over the rows. It never writes, and is bounded in time and
// memory also at the server.
func (h *History) read(ctx context.Context, query string, row func(driver.Rows) error, args ...any) (err error) {
	ctx, cancel := context.WithTimeout(ctx, QueryTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	ctx = clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{
		"readonly":           2,
		"max_execution_time": max(1, int(time.Until(deadline).Seconds())+1),
		"max_memory_usage":   uint64(2 << 30),
	}))
	rows, err := h.conn.Query(ctx, query, args...)
	if err != nil {
		return err
	}
	defer func() { err = closeRows(rows, err) }()
	for rows.Next() {
		if err := row(rows); err != nil {
			return err
		}
	}
	return nil
}
