package replay

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/drive"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// Report is the end of a replay.
type Report struct {
	Seen *drive.Seen
	// The four points of the conservation check, and what the clients saw.
	Clients, Gateway, Ledger, Counters, History Totals
	// GatewayUnknown: the gateway is not the replay's own, or it was killed, and
	// nobody says what it has sent. Then three points are compared.
	GatewayUnknown bool
	Fold           LedgerFold
	Limits         []LimitResult
	// Refused are the refused rows, in the trace's order.
	Refused []Refused
	// Fingerprint of which rows were refused, and with which codes.
	Fingerprint string
	// Rows of the trace; fewer were sent when the replay was Interrupted.
	Rows        int
	Interrupted bool
	// Unreported is how many admitted calls reported no reading of a meter that the
	// trace has for others, by meter, as the clients know it.
	Unreported map[usage.Meter]int64
}

// Refused is a row that was refused.
type Refused struct {
	Row     int
	File    string
	Line    int
	Time    time.Time
	Account string
	Code    usage.Code
}

// RowOf says whose a row is, and with which key it was sent.
type RowOf struct{ Account, Key int32 }

// NewReport begins a report with what the clients saw.
func NewReport(rows []trace.Row, of []RowOf, seen *drive.Seen) *Report {
	r := &Report{}
	r.note(&traffic{rows: rows, of: of, seen: seen})
	return r
}

// Check adds how a limit was kept.
func (r *Report) Check(rows []trace.Row, of []RowOf, l Limit, latency Latencies) {
	r.Limits = append(r.Limits, (&traffic{rows: rows, of: of, seen: r.Seen}).check(l, latency))
}

func (r *Report) note(t *traffic) {
	r.Seen, r.Rows, r.Clients, r.Unreported = t.seen, len(t.rows), newTotals(), map[usage.Meter]int64{}
	hash := sha256.New()
	var b []byte
	reported := map[usage.Meter]int64{}
	for i := range t.rows {
		row := &t.rows[i]
		switch t.seen.Outcomes[i] {
		case drive.NotSent, drive.Failed:
			continue
		case drive.Admitted:
			r.Clients.Admitted++
			for _, q := range row.Meters {
				r.Clients.Meters[q.Meter] += q.Value
				reported[q.Meter]++
			}
			continue
		}
		code := t.seen.Code(i)
		r.Clients.Refused++
		r.Refused = append(r.Refused, refusedRow(row, i, code))
		b = binary.AppendUvarint(b[:0], uint64(i))
		_, _ = hash.Write(append(append(b, code...), 0)) // a hash takes everything
	}
	r.Fingerprint = hex.EncodeToString(hash.Sum(nil)[:8])
	for m, n := range reported {
		if n < r.Clients.Admitted {
			r.Unreported[m] = r.Clients.Admitted - n
		}
	}
}

func refusedRow(row *trace.Row, i int, code usage.Code) Refused {
	return Refused{Row: i, File: row.File, Line: row.Line, Time: row.Time, Account: row.Account, Code: code}
}

// Agree reports whether the points that are known agree.
func (r *Report) Agree() bool {
	return (r.GatewayUnknown || r.Gateway.Equal(r.Ledger)) && r.Ledger.Equal(r.Counters) && r.Counters.Equal(r.History)
}

// Err is nil when the points agree, every answered call is in them, and every limit
// was kept as its tier states.
func (r *Report) Err() error {
	if !r.Agree() {
		return fmt.Errorf("conservation: gateway, ledger, counters and ClickHouse do not agree: see the table")
	}
	if r.Seen.Failures == 0 && !r.Clients.within(r.Ledger, r.estimates()) {
		return fmt.Errorf("conservation: every call was answered, but clients and ledger do not agree: see the table")
	}
	for _, l := range r.Limits {
		if w := l.Broken; w != nil {
			return fmt.Errorf("limit %s (%s): account %s used %d of %d%s, %d over; the tier's bound is %d", l.ID, l.Tier, w.Account, w.Used, l.Amount, during(l.Window, w.Start), w.Used-l.Amount, w.Bound)
		}
	}
	return nil
}

// estimates are the meters of which the ledger may hold more than was reported: calls
// that reported none are settled as estimates where a limit counts them.
func (r *Report) estimates() map[usage.Meter]bool {
	all := map[usage.Meter]bool{}
	for m := range r.Unreported {
		all[m] = r.Fold.Estimated > 0 || m == usage.Bytes // which gateways measure themselves
	}
	return all
}

func during(k window.Kind, start usage.Micros) string {
	if k == window.Lifetime {
		return ""
	}
	return fmt.Sprintf(" in the %s from %s", k.Name(), start.Time().Format("2006-01-02 15:04 UTC"))
}

// points of the table, in order.
var points = [...]string{"clients saw", "gateway sent", "ledger", "counters", "ClickHouse"}

const ledgerPoint = 2

// Write prints the report for a person.
func (r *Report) Write(w io.Writer) error {
	p := &printer{w: w}
	calls := r.Clients.Admitted + r.Clients.Refused
	rate := float64(calls) / max(r.Seen.Took.Seconds(), 1e-9)
	p.printf("\n%s calls answered in %s (%s a second), slowest answer %s", number(calls), r.Seen.Took.Round(10*time.Millisecond), number(int64(rate)), r.Seen.Longest.Round(10*time.Microsecond))
	if r.Seen.Failures > 0 {
		p.printf(", %s without an answer (last: %v)", number(r.Seen.Failures), r.Seen.LastError)
	}
	if r.Interrupted {
		p.printf("; INTERRUPTED: %s of %s rows were not sent", number(int64(r.Rows)-calls-r.Seen.Failures), number(int64(r.Rows)))
	}
	p.printf("\n\n")
	if p.err == nil {
		p.err = r.table(w)
	}
	verdict := "the four points agree"
	if r.GatewayUnknown {
		verdict = "ledger, counters and ClickHouse agree; how much the gateway sent is not known"
	}
	if !r.Agree() {
		verdict = "THE POINTS DO NOT AGREE"
	}
	p.printf("\nconservation: %s (%s frames in the ledger, %d duplicates, %d gaps)\n", verdict, number(r.Fold.Frames), r.Fold.Duplicates, r.Fold.Gaps)
	for _, m := range slices.Sorted(maps.Keys(r.Unreported)) {
		if m == usage.Bytes {
			p.printf("%s of %s admitted calls reported no %s: the gateway measured them\n", number(r.Unreported[m]), number(r.Clients.Admitted), m)
			continue
		}
		p.printf("%s of %s admitted calls reported no %s: unknown, not 0\n", number(r.Unreported[m]), number(r.Clients.Admitted), m)
	}
	r.refusals(p)
	for i := range r.Limits {
		r.Limits[i].write(p)
	}
	return p.err
}

func (r *Report) table(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	t := &printer{w: tw}
	for _, name := range points {
		t.printf("\t%s", name)
	}
	t.printf("\t\t\n")
	all := []Totals{r.Clients, r.Gateway, r.Ledger, r.Counters, r.History}
	estimates := r.estimates()
	row := func(name string, get func(Totals) (int64, bool), estimated bool) {
		t.printf("%s\t", name)
		want, _ := get(all[ledgerPoint])
		var differ []string
		for i, pt := range all {
			v, known := get(pt)
			if i == 0 && !known || i == 1 && r.GatewayUnknown {
				t.printf("-\t") // clients know only what is in the trace
				continue
			}
			t.printf("%s\t", number(v))
			if v != want && !(i == 0 && (estimated || r.Seen.Failures > 0)) {
				differ = append(differ, points[i])
			}
		}
		switch clients, known := get(all[0]); {
		case len(differ) > 0:
			t.printf("DIFFER from the ledger: %s\t\n", strings.Join(differ, ", "))
		case known && clients != want:
			t.printf("= but for what clients do not know\t\n")
		default:
			t.printf("=\t\n")
		}
	}
	row("calls", func(t Totals) (int64, bool) { return t.Admitted + t.Refused, true }, false)
	row("admitted", func(t Totals) (int64, bool) { return t.Admitted, true }, false)
	row("refused", func(t Totals) (int64, bool) { return t.Refused, true }, false)
	meters := map[usage.Meter]bool{}
	for _, pt := range all {
		for m := range pt.Meters {
			meters[m] = m != usage.Calls && (meters[m] || pt.Meters[m] != 0)
		}
	}
	for m := range r.Clients.Meters {
		meters[m] = true // reported, be it as 0
	}
	for _, m := range slices.Sorted(maps.Keys(meters)) {
		if meters[m] {
			row(string(m), func(t Totals) (int64, bool) { v, ok := t.Meters[m]; return v, ok }, estimates[m])
		}
	}
	if t.err == nil {
		t.err = tw.Flush()
	}
	if t.err != nil {
		return fmt.Errorf("print report: %w", t.err)
	}
	return nil
}

func (r *Report) refusals(p *printer) {
	if len(r.Refused) == 0 {
		return
	}
	codes := map[usage.Code]int64{}
	for _, x := range r.Refused {
		codes[x.Code]++
	}
	for _, c := range slices.Sorted(maps.Keys(codes)) {
		p.printf("%d %s: %s\n", c.Status(), c, number(codes[c]))
	}
	if n := codes[usage.BillingStateUnknown]; n > 0 {
		p.printf("%s calls got no answer about their limit in time: which rows these are is chance, and so is the fingerprint\n", number(n))
	}
	f := r.Refused[0]
	p.printf("first refusal: %s:%d, account %s, %s\nrefused rows: fingerprint %s\n", f.File, f.Line, f.Account, f.Time.UTC().Format(time.RFC3339Nano), r.Fingerprint)
}

func (l *LimitResult) write(p *printer) {
	p.printf("limit %s (%s, %s %s): reached in %s windows of accounts", l.ID, l.Tier, number(l.Amount), l.Meter, number(int64(l.Windows)))
	if l.Over == 0 {
		p.printf(", overshoot 0\n")
		return
	}
	w := l.Worst
	p.printf(", exceeded in %s, by %s in all; at worst %s used %s%s: %s over", number(int64(l.Over)), number(l.OverUnits), w.Account, number(w.Used), during(l.Window, w.Start), number(w.Used-l.Amount))
	switch l.Tier {
	case usage.TierExact:
		p.printf("; NOTHING IS ALLOWED\n")
	case usage.TierLeased:
		p.printf("; bound %s = the exposure\n", number(w.Bound))
	default:
		p.printf("; bound %s = the most within %s (%s until counted + %s until the decision was held)\n", number(w.Bound),
			(w.CountLatency + w.DecisionLatency).Round(time.Microsecond), w.CountLatency.Round(time.Microsecond), w.DecisionLatency.Round(time.Microsecond))
	}
}

// printer keeps the first error of many prints.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

// number writes n with thousands separated by commas.
func number(n int64) string {
	s := fmt.Sprint(n)
	sign := ""
	if n < 0 {
		sign, s = "-", s[1:]
	}
	var b strings.Builder
	for i, d := range s {
		if i > 0 && (len(s)-i)%3 == 0 {
			b.WriteByte(',')
		}
		b.WriteRune(d)
	}
	return sign + b.String()
}
