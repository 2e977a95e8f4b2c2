package replay

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/drive"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

func TestTheBoundIsTheBusiestSpan(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		span := time.Duration(rapid.IntRange(0, 200).Draw(t, "span"))
		var uses []use
		at := time.Duration(0)
		for _, g := range rapid.SliceOfN(rapid.IntRange(0, 50), 0, 60).Draw(t, "gaps") {
			at += time.Duration(g)
			uses = append(uses, use{at, int64(rapid.IntRange(0, 9).Draw(t, "units"))})
		}
		want := int64(0)
		for i, from := range uses {
			n := int64(0)
			for _, x := range uses[i:] {
				if x.sent-from.sent <= span {
					n += x.units
				}
			}
			want = max(want, n)
		}
		if got := mostWithin(uses, span); got != want {
			t.Fatalf("mostWithin = %d, counted are %d", got, want)
		}
	})
}

func totals(admitted, refused, tokens int64) Totals {
	return Totals{Admitted: admitted, Refused: refused, Meters: map[usage.Meter]int64{usage.InputTokens: tokens, usage.Cost: 0}}
}

func agreeing() *Report {
	return &Report{
		Seen: &drive.Seen{Took: time.Second}, Rows: 10, Refused: []Refused{{File: "x.csv", Line: 8, Code: usage.QuotaExceeded}, {Code: usage.QuotaExceeded}, {Code: usage.QuotaExceeded}},
		Clients: totals(7, 3, 70), Gateway: totals(7, 3, 70), Ledger: totals(7, 3, 70), Counters: totals(7, 3, 70), History: totals(7, 3, 70),
	}
}

func TestAnyDisagreementIsAnError(t *testing.T) {
	t.Parallel()
	if err := agreeing().Err(); err != nil {
		t.Fatalf("all agree: %v", err)
	}
	for name, spoil := range map[string]func(*Report){
		"a call lost at the ledger":    func(r *Report) { r.Ledger.Admitted-- },
		"a call doubled in ClickHouse": func(r *Report) { r.History.Admitted++ },
		"a refusal counted as usage":   func(r *Report) { r.Counters.Refused--; r.Counters.Admitted++ },
		"a token lost":                 func(r *Report) { r.Counters.Meters = map[usage.Meter]int64{usage.InputTokens: 69} },
		"an own meter lost":            func(r *Report) { r.Gateway.Meters = map[usage.Meter]int64{usage.InputTokens: 70, "gpu_ms": 1} },
		"an answered call missing":     func(r *Report) { r.Clients.Admitted++ },
		"tokens that nobody reported": func(r *Report) {
			r.Clients.Meters = map[usage.Meter]int64{usage.InputTokens: 60}
			r.Unreported = map[usage.Meter]int64{usage.InputTokens: 1}
		},
		"fewer tokens than were reported": func(r *Report) {
			r.Clients.Meters = map[usage.Meter]int64{usage.InputTokens: 71}
			r.Unreported, r.Fold.Estimated = map[usage.Meter]int64{usage.InputTokens: 1}, 1
		},
		"a limit beyond its bound": func(r *Report) {
			r.Limits = []LimitResult{{Broken: &WindowUse{Account: "a", Used: 7, Bound: 1}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := agreeing()
			spoil(r)
			if r.Err() == nil {
				t.Error("nothing was noticed")
			}
		})
	}
	unanswered := agreeing()
	unanswered.Clients.Admitted--
	unanswered.Seen.Failures = 1
	if err := unanswered.Err(); err != nil {
		t.Errorf("a call without an answer may have been counted: %v", err)
	}
	estimated := agreeing()
	estimated.Clients.Meters = map[usage.Meter]int64{usage.InputTokens: 60}
	estimated.Unreported, estimated.Fold.Estimated = map[usage.Meter]int64{usage.InputTokens: 1}, 1
	if err := estimated.Err(); err != nil {
		t.Errorf("clients do not know the estimates for calls that reported nothing: %v", err)
	}
}

func line(t *testing.T, text, of string) string {
	t.Helper()
	for l := range strings.Lines(text) {
		if f := strings.Fields(l); len(f) > 0 && f[0] == of {
			return strings.Join(f, " ")
		}
	}
	t.Errorf("the report has no line %q:\n%s", of, text)
	return ""
}

func TestTheReportNamesWhatDiffers(t *testing.T) {
	t.Parallel()
	r := agreeing()
	r.History.Admitted = 1234567
	r.Clients.Meters = map[usage.Meter]int64{usage.InputTokens: 71}
	var out bytes.Buffer
	if err := r.Write(&out); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{"THE POINTS DO NOT AGREE", "402 QUOTA_EXCEEDED: 3", "10 calls answered", "first refusal: x.csv:8"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	for of, want := range map[string]string{
		"admitted":     "admitted 7 7 7 7 1,234,567 DIFFER from the ledger: ClickHouse",
		"refused":      "refused 3 3 3 3 3 =",
		"input_tokens": "input_tokens 71 70 70 70 70 DIFFER from the ledger: clients saw",
	} {
		if got := line(t, text, of); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if strings.Contains(text, "output_tokens") {
		t.Errorf("the report has a meter that nobody reported:\n%s", text)
	}
}

func TestAnEqualSignStandsBesideEqualNumbersOnly(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r := agreeing()
		for _, p := range []*Totals{&r.Clients, &r.Gateway, &r.Ledger, &r.Counters, &r.History} {
			*p = totals(int64(rapid.IntRange(6, 7).Draw(t, "admitted")), 3, int64(rapid.IntRange(70, 71).Draw(t, "tokens")))
		}
		var out bytes.Buffer
		if err := r.Write(&out); err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(out.String()) {
			f := strings.Fields(l)
			if len(f) >= 7 && f[6] == "=" && (f[1] != f[2] || f[2] != f[3] || f[3] != f[4] || f[4] != f[5]) {
				t.Fatalf("not equal: %q", l)
			}
			if len(f) >= 7 && f[6] == "DIFFER" && f[1] == f[2] && f[2] == f[3] && f[3] == f[4] && f[4] == f[5] {
				t.Fatalf("equal: %q", l)
			}
		}
	})
}

// One line says how a limit was kept, however many accounts there are.
func TestALimitIsSummedUpInOneLine(t *testing.T) {
	t.Parallel()
	day := time.Date(2024, 2, 29, 23, 59, 0, 0, time.UTC)
	seen := &drive.Seen{Codes: []usage.Code{usage.QuotaExceeded}}
	var rows []trace.Row
	var of []RowOf
	add := func(account int32, at time.Time, o drive.Outcome) {
		rows, of = append(rows, trace.Row{Account: string(rune('a' + account)), Time: at}), append(of, RowOf{Account: account})
		seen.Outcomes, seen.Sent = append(seen.Outcomes, o), append(seen.Sent, time.Duration(len(rows))*time.Millisecond)
	}
	for range 5 {
		add(0, day, drive.Admitted) // 3 over
		add(1, day, drive.Failed)
	}
	add(0, day, 3)
	add(0, day.Add(2*time.Minute), drive.Admitted) // the next day
	add(2, day, drive.Admitted)
	add(2, day, drive.Admitted) // reached, not exceeded
	r := NewReport(rows, of, seen)
	limit := Limit{ID: "calls-day", Meter: usage.Calls, Window: window.Day, Amount: 2}
	for tier, want := range map[usage.Tier]struct {
		broken bool
		text   string
	}{
		usage.TierEventual: {false, "limit calls-day (eventual, 2 calls): reached in 2 windows of accounts, exceeded in 1, by 3 in all; at worst a used 5 in the day from 2024-02-29 00:00 UTC: 3 over; bound 6 = the most within 1s (900ms until counted + 100ms until the decision was held)\n"},
		usage.TierExact:    {true, "limit calls-day (exact, 2 calls): reached in 2 windows of accounts, exceeded in 1, by 3 in all; at worst a used 5 in the day from 2024-02-29 00:00 UTC: 3 over; NOTHING IS ALLOWED\n"},
		usage.TierLeased:   {true, "limit calls-day (leased, 2 calls): reached in 2 windows of accounts, exceeded in 1, by 3 in all; at worst a used 5 in the day from 2024-02-29 00:00 UTC: 3 over; bound 2 = the exposure\n"},
	} {
		limit.Tier, limit.MaxExposure = tier, 2
		r.Limits = nil
		r.Check(rows, of, limit, func(int) (time.Duration, time.Duration) { return 900 * time.Millisecond, 100 * time.Millisecond })
		var out bytes.Buffer
		r.Limits[0].write(&printer{w: &out})
		if out.String() != want.text || (r.Limits[0].Broken != nil) != want.broken {
			t.Errorf("%s: got %q, broken %v", tier, out.String(), r.Limits[0].Broken)
		}
	}
	limit.Amount = 5
	r.Limits = nil
	r.Check(rows, of, limit, nil)
	var out bytes.Buffer
	r.Limits[0].write(&printer{w: &out})
	if !strings.Contains(out.String(), "overshoot 0") {
		t.Error(out.String())
	}
}

func TestTheFingerprintTellsWhichRowsWereRefused(t *testing.T) {
	t.Parallel()
	rows := make([]trace.Row, 4)
	report := func(codes []usage.Code, outcomes ...drive.Outcome) *Report {
		return NewReport(rows, make([]RowOf, 4), &drive.Seen{Codes: codes, Outcomes: outcomes, Sent: make([]time.Duration, 4)})
	}
	both := []usage.Code{usage.QuotaExceeded, usage.RateLimited}
	want := report(both, 1, 3, 1, 4)
	// Which code came first at the clients is chance.
	if got := report([]usage.Code{usage.RateLimited, usage.QuotaExceeded}, 1, 4, 1, 3); got.Fingerprint != want.Fingerprint {
		t.Error("the same rows have another fingerprint")
	}
	for _, other := range []*Report{report(both, 3, 1, 1, 4), report(both, 1, 4, 1, 3), report(both, 1, 3, 1, 1)} {
		if other.Fingerprint == want.Fingerprint {
			t.Error("other rows have the same fingerprint")
		}
	}
}

func TestProgressSaysWhatIsLeft(t *testing.T) {
	t.Parallel()
	for want, got := range map[string]string{
		"  [........................]   0 %  0 of 1,000 calls":                                                     progressLine(0, 1000, time.Second),
		"  [############............]  50 %  500,000 of 1,000,000 calls, 20,000 a second; 500,000 calls left, 25s": progressLine(500_000, 1_000_000, 25*time.Second),
		"  [########################] 100 %  1,000 of 1,000 calls, 1,000 a second; 0 calls left, 0s":               progressLine(1000, 1000, time.Second),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
