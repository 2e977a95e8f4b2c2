package replay

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Report is the end of a replay.
type Report struct {
	Seen *Seen
	// The four points of the conservation check, and what the clients saw.
	Clients, Gateway, Ledger, Counters, History Totals
	// GatewayUnknown: the gateway is not the replay's own, or it was killed, and
	// nobody says what it has sent. Then three points are compared.
	GatewayUnknown bool
	Fold           LedgerFold
	Overshoots     []Overshoot
}

// Overshoot is by how much the eventual tier let an account go over a lifetime
// limit of calls, beside the bound that it states.
type Overshoot struct {
	Account string
	Limit   int64
	// Admitted as the clients saw it.
	Admitted int64
	// CountLatency is the longest time from a call's beginning until it was in
	// the ledger, DecisionLatency from there until the decision was held by
	// another process.
	CountLatency, DecisionLatency time.Duration
	// Bound is the most calls admitted within any span of both latencies.
	Bound int
}

// Over returns admitted - limit, not below 0.
func (o Overshoot) Over() int64 { return max(o.Admitted-o.Limit, 0) }

// Agree reports whether the points that are known agree.
func (r *Report) Agree() bool {
	return (r.GatewayUnknown || r.Gateway.Equal(r.Ledger)) && r.Ledger.Equal(r.Counters) && r.Counters.Equal(r.History)
}

// Err is nil when the four points agree and every answered call is in them.
func (r *Report) Err() error {
	if !r.Agree() {
		return fmt.Errorf("conservation: gateway, ledger, counters and ClickHouse do not agree: see the table")
	}
	if r.Seen.Failed == 0 && !r.Clients.within(r.Ledger) {
		return fmt.Errorf("conservation: every call was answered, but clients and ledger do not agree: see the table")
	}
	for _, o := range r.Overshoots {
		if o.Over() > int64(o.Bound) {
			return fmt.Errorf("overshoot: account %s went %d over its limit, the stated bound is %d", o.Account, o.Over(), o.Bound)
		}
	}
	return nil
}

// Write prints the report for a person.
func (r *Report) Write(w io.Writer) error {
	p := &printer{w: w}
	var calls int64
	for _, t := range r.Seen.Accounts {
		calls += t.Admitted + t.Refusals()
	}
	rate := float64(calls) / max(r.Seen.Took.Seconds(), 1e-9)
	p.printf("\n%s calls answered in %s (%s a second), slowest answer %s", number(calls), r.Seen.Took.Round(10*time.Millisecond), number(int64(rate)), r.Seen.Longest.Round(10*time.Microsecond))
	if r.Seen.Failed > 0 {
		p.printf(", %s without an answer (last: %v)", number(r.Seen.Failed), r.Seen.LastError)
	}
	p.printf("\n\n")

	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	t := &printer{w: tw}
	t.printf("\tclients saw\tgateway sent\tledger\tcounters\tClickHouse\t\t\n")
	points := []Totals{r.Clients, r.Gateway, r.Ledger, r.Counters, r.History}
	row := func(name string, get func(Totals) (int64, bool)) {
		t.printf("%s\t", name)
		same := true
		want, _ := get(points[2])
		for i, pt := range points {
			v, known := get(pt)
			if i == 0 && !known || i == 1 && r.GatewayUnknown {
				t.printf("-\t") // clients know only what is in the trace
				continue
			}
			t.printf("%s\t", number(v))
			same = same && (i == 0 || v == want)
		}
		if same {
			t.printf("=\t\n")
		} else {
			t.printf("DIFFER\t\n")
		}
	}
	row("calls", func(t Totals) (int64, bool) { return t.Admitted + t.Refused, true })
	row("admitted", func(t Totals) (int64, bool) { return t.Admitted, true })
	row("refused", func(t Totals) (int64, bool) { return t.Refused, true })
	meters := map[usage.Meter]bool{usage.InputTokens: true, usage.OutputTokens: true}
	for _, pt := range points {
		for m := range nonZero(pt.Meters) {
			meters[m] = true
		}
	}
	for _, m := range slices.Sorted(maps.Keys(meters)) {
		row(string(m), func(t Totals) (int64, bool) { v, ok := t.Meters[m]; return v, ok })
	}
	if t.err == nil {
		t.err = tw.Flush()
	}
	verdict := "the four points agree"
	if r.GatewayUnknown {
		verdict = "ledger, counters and ClickHouse agree; what the gateway sent is not known"
	}
	if !r.Agree() {
		verdict = "THE POINTS DO NOT AGREE"
	}
	p.printf("\nconservation: %s (%s frames in the ledger, %d duplicates, %d gaps)\n", verdict, number(r.Fold.Frames), r.Fold.Duplicates, r.Fold.Gaps)

	codes := map[usage.Code]int64{}
	for _, t := range r.Seen.Accounts {
		for c, n := range t.Refused {
			codes[c] += n
		}
	}
	for _, c := range slices.Sorted(maps.Keys(codes)) {
		p.printf("%d %s: %s\n", c.Status(), c, number(codes[c]))
	}
	for _, o := range r.Overshoots {
		p.printf("overshoot of the eventual tier: %s admitted %s of %s: %s over; bound %s = most calls within %s (%s until counted + %s until the decision was held)\n",
			o.Account, number(o.Admitted), number(o.Limit), number(o.Over()), number(int64(o.Bound)),
			(o.CountLatency + o.DecisionLatency).Round(time.Microsecond), o.CountLatency.Round(time.Microsecond), o.DecisionLatency.Round(time.Microsecond))
	}
	if t.err != nil {
		return fmt.Errorf("print report: %w", t.err)
	}
	return p.err
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
