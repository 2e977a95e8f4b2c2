// Package report says what a run of soak did to Tollkeeper, and what came of it, to
// machines and to people.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/soak/points"
)

// Report of a run: what was done to Tollkeeper, and what came of it.
type Report struct {
	Seed      uint64     `json:"seed"`
	Started   time.Time  `json:"started"`
	Seconds   float64    `json:"seconds"`
	Scenarios []*Outcome `json:"scenarios"`
}

// Outcome of one scenario.
type Outcome struct {
	Scenario string  `json:"scenario"`
	Seed     uint64  `json:"seed"`
	Rounds   int     `json:"rounds"`
	Seconds  float64 `json:"seconds"`
	// Faults by act and process. A kill of several at once counts for each;
	// Kills is how many kills there were.
	Faults map[string]int `json:"faults,omitempty"`
	Kills  int            `json:"kills"`
	AtOnce int            `json:"kills_of_everything"`
	// ByItself is how often a process ended although nobody had ended it; it was
	// started again.
	ByItself map[string]int `json:"ended_by_itself,omitempty"`
	// Check compares all points at the end.
	Check *points.Check `json:"check,omitempty"`
	// Audit is what Tollkeeper's own audit says at the end.
	Audit *points.Audit `json:"audit,omitempty"`
	// Loss is what killed gateways took with them, without spool-before-answer.
	Loss *points.Loss `json:"loss,omitempty"`
	// Quotas are the rounds of a shared quota.
	Quotas []Quota `json:"quotas,omitempty"`
	// Figures are measured values, with a target where the design has one.
	Figures []Figure `json:"figures,omitempty"`
	// Notes are what else there is to tell.
	Notes []string `json:"notes,omitempty"`
	// NoAnswers are the kinds of what clients heard instead of an answer.
	NoAnswers map[string]int `json:"no_answers,omitempty"`
	// Broken are laws that were broken, Missed figures that were missed.
	Broken []string `json:"broken,omitempty"`
	Missed []string `json:"missed,omitempty"`
	// Skipped says why the scenario could not be run here.
	Skipped string `json:"skipped,omitempty"`
}

// Quota is a round in which gateways shared one limit.
type Quota struct {
	Kind  string `json:"kind"` // calls or tokens
	Limit int64  `json:"limit"`
	// Admitted is what clients saw as not refused, in the limit's units; Served
	// what the upstream served, which knows also of answers that were lost.
	Admitted int64 `json:"admitted"`
	Served   int64 `json:"served"`
	Refused  int64 `json:"refused"`
	Unknown  int64 `json:"unknown_503"`
	// Unanswered got another answer than these, or none.
	Unanswered int64 `json:"unanswered"`
	// Early are refusals before the limit was used up.
	Early   int64   `json:"early_denials"`
	Faults  int     `json:"faults"`
	Seconds float64 `json:"seconds"`
}

// Figure is a distribution of durations or one value, in milliseconds.
type Figure struct {
	Name   string  `json:"name"`
	N      int     `json:"n"`
	P50    float64 `json:"p50_ms"`
	P99    float64 `json:"p99_ms"`
	Max    float64 `json:"max_ms"`
	Target float64 `json:"target_ms,omitempty"`
}

// Durations sums durations up; target 0 is none.
func Durations(name string, target time.Duration, all []time.Duration) Figure {
	f := Figure{Name: name, N: len(all), Target: Milliseconds(target)}
	if len(all) == 0 {
		return f
	}
	sorted := slices.Sorted(slices.Values(all))
	f.P50, f.P99, f.Max = Milliseconds(sorted[len(sorted)/2]), Milliseconds(sorted[min(len(sorted)*99/100, len(sorted)-1)]), Milliseconds(sorted[len(sorted)-1])
	return f
}

// Milliseconds of a duration.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Breaks notes that a law was broken.
func (o *Outcome) Breaks(format string, args ...any) {
	if len(o.Broken) < 50 {
		o.Broken = append(o.Broken, fmt.Sprintf(format, args...))
	}
}

// Measure adds a figure; one whose worst is beyond the target is missed.
func (o *Outcome) Measure(f Figure) {
	o.Figures = append(o.Figures, f)
	if f.Target > 0 && f.P99 > f.Target {
		o.Missed = append(o.Missed, fmt.Sprintf("%s: p99 %.1f ms, the target is %.0f ms", f.Name, f.P99, f.Target))
	}
}

// Broken returns all laws that were broken, with their scenario and seed.
func (r *Report) Broken() []string {
	var out []string
	for _, o := range r.Scenarios {
		for _, b := range o.Broken {
			out = append(out, fmt.Sprintf("%s (seed %d): %s", o.Scenario, o.Seed, b))
		}
	}
	return out
}

// WriteJSON writes it for machines.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteText writes it for people.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "soak: seed %d, %.0f s\n", r.Seed, r.Seconds)
	for _, o := range r.Scenarios {
		o.text(&b)
	}
	if broken := r.Broken(); len(broken) > 0 {
		fmt.Fprintf(&b, "\nLAWS BROKEN: %d\n", len(broken))
	} else {
		b.WriteString("\nno law was broken\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (o *Outcome) text(b *strings.Builder) {
	fmt.Fprintf(b, "\n%s (seed %d, %.0f s)\n", o.Scenario, o.Seed, o.Seconds)
	if o.Skipped != "" {
		fmt.Fprintf(b, "  NOT RUN: %s\n", o.Skipped)
		return
	}
	fmt.Fprintf(b, "  rounds %d, kills %d (%d of everything at once)\n", o.Rounds, o.Kills, o.AtOnce)
	for _, k := range slices.Sorted(maps.Keys(o.Faults)) {
		fmt.Fprintf(b, "    %-24s %d\n", k, o.Faults[k])
	}
	for _, k := range slices.Sorted(maps.Keys(o.ByItself)) {
		fmt.Fprintf(b, "    %-24s %d times ended by itself\n", k, o.ByItself[k])
	}
	if c := o.Check; c != nil {
		fmt.Fprintf(b, "  clients: %d sent, %d passed, %d refused, %d unknown (503), %d other, %d without an answer\n", c.Sent, c.Passed, c.Refused, c.Unknown, c.Other, c.Nothing)
		fmt.Fprintf(b, "  calls in: ledger %d, counters %d, ClickHouse %d, its rollup %d; %d frames came twice\n", c.Ledger, c.Counters, c.History, c.Rollups, c.Redelivered)
		fmt.Fprintf(b, "  lost %d, lost refusals %d, doubled %d, misjudged %d\n", c.Lost, c.LostRefusals, c.Doubled, c.Misjudged)
	}
	if a := o.Audit; a != nil {
		fmt.Fprintf(b, "  the audit: %d calls, %d claimed by gateways, %d not, %d findings open\n", a.Calls, a.Claimed, a.Unclaimed, a.Open)
	}
	if l := o.Loss; l != nil {
		fmt.Fprintf(b, "  killed gateways took %d answered calls with them in %d kills, at most %d in one, answered at most %.1f ms before\n", l.Calls, l.Kills, l.Most, Milliseconds(l.Oldest))
	}
	o.quotas(b)
	for _, f := range o.Figures {
		fmt.Fprintf(b, "  %-44s n %d  p50 %.1f  p99 %.1f  max %.1f ms", f.Name, f.N, f.P50, f.P99, f.Max)
		if f.Target > 0 {
			fmt.Fprintf(b, " (target %.0f)", f.Target)
		}
		b.WriteString("\n")
	}
	for _, n := range o.Notes {
		fmt.Fprintf(b, "  %s\n", n)
	}
	for _, k := range slices.Sorted(maps.Keys(o.NoAnswers)) {
		fmt.Fprintf(b, "    no answer: %s: %d\n", k, o.NoAnswers[k])
	}
	for _, m := range o.Missed {
		fmt.Fprintf(b, "  MISSED %s\n", m)
	}
	for _, m := range o.Broken {
		fmt.Fprintf(b, "  BROKEN %s\n", m)
	}
}

func (o *Outcome) quotas(b *strings.Builder) {
	for i, q := range o.Quotas {
		fmt.Fprintf(b, "  round %d (%s): limit %d, admitted %d, served %d, refused %d (%d early), unknown %d, faults %d, %.1f s\n",
			i+1, q.Kind, q.Limit, q.Admitted, q.Served, q.Refused, q.Early, q.Unknown, q.Faults, q.Seconds)
	}
}
