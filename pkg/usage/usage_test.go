package usage

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"pgregory.net/rapid"
)

func valid() Call {
	c := Call{Time: At(time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)), Account: "acct", KeyID: "k", Method: "POST", Route: "/v1", Model: "m", Status: 200}
	c.Quantities.Set(InputTokens, 5)
	return c
}

func TestWhatACallMaySayOfItself(t *testing.T) {
	t.Parallel()
	now := valid().Time
	long := strings.Repeat("x", MaxIDBytes+1)
	for name, c := range map[string]struct {
		edit   func(c *Call)
		reason string // empty: valid
	}{
		"an ordinary call":            {func(*Call) {}, ""},
		"nothing but an account":      {func(c *Call) { *c = Call{Time: now, Account: "a"} }, ""},
		"the longest account":         {func(c *Call) { c.Account = long[1:] }, ""},
		"the greatest quantity":       {func(c *Call) { c.Currency = "USD"; c.Quantities.Set(Cost, MaxQuantity) }, ""},
		"as much future as there may": {func(c *Call) { c.Time = now + Micros(MaxFuture.Microseconds()) }, ""},
		"the oldest time":             {func(c *Call) { c.Time = OldestTimeMicros }, ""},
		"letters of any script":       {func(c *Call) { c.Account = "konto-äöü-語" }, ""},
		"no account":                  {func(c *Call) { c.Account = "" }, ReasonMalformed},
		"too long an account":         {func(c *Call) { c.Account = long }, ReasonOversized},
		"too long a route":            {func(c *Call) { c.Route = long }, ReasonOversized},
		"too long a code":             {func(c *Call) { c.Code = Code(long) }, ReasonOversized},
		"a zero byte":                 {func(c *Call) { c.Model = "a\x00" }, ReasonMalformed},
		"bytes that are no text":      {func(c *Call) { c.RequestID = "\xff\xfe" }, ReasonMalformed},
		"a time before 2000":          {func(c *Call) { c.Time = OldestTimeMicros - 1 }, ReasonAbsurdTime},
		"the least time":              {func(c *Call) { c.Time = math.MinInt64 }, ReasonAbsurdTime},
		"too far in the future":       {func(c *Call) { c.Time = now + Micros(MaxFuture.Microseconds()) + 1 }, ReasonAbsurdTime},
		"the greatest time":           {func(c *Call) { c.Time = math.MaxInt64 }, ReasonAbsurdTime},
		"a negative quantity":         {func(c *Call) { c.Quantities.Set(InputTokens, -1) }, ReasonNegativeCount},
		"too great a quantity":        {func(c *Call) { c.Quantities.Set(InputTokens, MaxQuantity+1) }, ReasonOversized},
		"a negative own meter":        {func(c *Call) { c.Quantities.Set("pages", -1) }, ReasonNegativeCount},
		"an own meter with a space":   {func(c *Call) { c.Quantities.Set("my pages", 1) }, ReasonMalformed},
		"an own meter without a name": {func(c *Call) { c.Quantities.Set("", 1) }, ReasonMalformed},
		"a negative duration":         {func(c *Call) { c.Duration = -1 }, ReasonNegativeCount},
		"an endless duration":         {func(c *Call) { c.Duration = math.MaxInt64 }, ReasonOversized},
		"a status of four digits":     {func(c *Call) { c.Status = 1000 }, ReasonMalformed},
		"17 own meters": {func(c *Call) {
			for i := range MaxCustomMeters + 1 {
				c.Quantities.Set(Meter(strings.Repeat("m", i+1)), 1)
			}
		}, ReasonOversized},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			call := valid()
			c.edit(&call)
			err := call.Validate(now)
			var invalid *InvalidError
			switch {
			case c.reason == "" && err != nil:
				t.Errorf("it is refused: %v", err)
			case c.reason != "" && (!errors.As(err, &invalid) || invalid.Reason != c.reason || invalid.Message == ""):
				t.Errorf("got %v; want an InvalidError with the reason %s", err, c.reason)
			}
		})
	}
}

func TestARefusedCallFeedsNoMeterAndAnAdmittedOneCountsOnce(t *testing.T) {
	t.Parallel()
	c := valid()
	if v, known := c.Usage(Calls); v != 1 || !known {
		t.Errorf("an admitted call is %d calls, %v", v, known)
	}
	if v, known := c.Usage(InputTokens); v != 5 || !known {
		t.Errorf("input tokens: %d, %v", v, known)
	}
	if v, known := c.Usage(OutputTokens); v != 0 || known {
		t.Errorf("what was not reported is %d, %v; want unknown", v, known)
	}
	c.Quantities.Set(Calls, 7)
	if v, _ := c.Usage(Calls); v != 7 {
		t.Errorf("a call that reports 7 calls is %d", v)
	}
	c.Code = QuotaExceeded
	for _, m := range []Meter{Calls, InputTokens, "pages"} {
		if v, known := c.Usage(m); v != 0 || known {
			t.Errorf("a refused call adds %d to %s, %v", v, m, known)
		}
	}
}

// Quantities against a map.
func TestQuantitiesKnowWhatWasSetAndNothingElse(t *testing.T) {
	t.Parallel()
	builtIn := BuiltInMeters()
	names := append(builtIn[:], "own", "b", "a", "zz")
	rapid.Check(t, func(t *rapid.T) {
		var q Quantities
		model := map[Meter]int64{}
		for range rapid.IntRange(0, 30).Draw(t, "readings") {
			m, v := rapid.SampledFrom(names).Draw(t, "meter"), rapid.Int64().Draw(t, "value")
			before, kept := q, len(q.Custom())
			q.Set(m, v)
			model[m] = v
			if before.Len() > q.Len() || len(before.Custom()) != kept {
				t.Fatal("setting a reading changed a copy")
			}
		}
		if q.Len() != len(model) {
			t.Fatalf("%d are known, want %d", q.Len(), len(model))
		}
		for _, m := range names {
			v, known := q.Get(m)
			if want, ok := model[m]; v != want || known != ok {
				t.Fatalf("%s is %d, %v; want %d, %v", m, v, known, want, ok)
			}
		}
		if !slices.IsSortedFunc(q.Custom(), func(a, b Quantity) int { return strings.Compare(string(a.Meter), string(b.Meter)) }) {
			t.Fatalf("own meters are not in order: %v", q.Custom())
		}
	})
}

func TestACopyOfACallKeepsItsOwnReadings(t *testing.T) {
	t.Parallel()
	a := valid()
	a.Quantities.Set("m", 1)
	b := a
	b.Quantities.Set("m", 2)
	b.Quantities.Set("a", 3)
	if v, _ := a.Quantities.Get("m"); v != 1 {
		t.Errorf("the copy's reading of %d is in the original", v)
	}
	if _, known := a.Quantities.Get("a"); known {
		t.Error("the copy's meter is in the original")
	}
}

func TestACleanedTextIsOneThatAnEventMayCarry(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		raw := string(rapid.SliceOfN(rapid.Byte(), 0, 600).Draw(t, "bytes"))
		got := CleanText(raw)
		if len(got) > MaxIDBytes || !validText(got) {
			t.Fatalf("%q became %q", raw, got)
		}
		if len(raw) <= MaxIDBytes && validText(raw) && got != raw {
			t.Fatalf("a good text was changed: %q became %q", raw, got)
		}
		text := rapid.StringOfN(rapid.Rune(), 0, 200, -1).Draw(t, "text")
		if got := CleanText(text); !strings.Contains(text, "\x00") && utf8.ValidString(text) && !strings.HasPrefix(text, got) {
			t.Fatalf("a long text %q was not cut but changed: %q", text, got)
		}
	})
}

func TestAMetersNameIsAsciiWithoutSeparators(t *testing.T) {
	t.Parallel()
	for m, want := range map[Meter]bool{
		"calls": true, "My.own-meter_2": true, Meter(strings.Repeat("m", 64)): true,
		"": false, "a b": false, "ä": false, "a/b": false, "a*": false, "\xff": false, Meter(strings.Repeat("m", 65)): false,
	} {
		if m.Valid() != want {
			t.Errorf("%q: valid should be %v", m, want)
		}
	}
	for i, m := range BuiltInMeters() {
		if at, ok := m.Index(); !ok || at != BuiltIn(i) || !m.Valid() {
			t.Errorf("%s has the index %d, %v", m, at, ok)
		}
	}
}

func TestEveryCodeAnswersItsStatus(t *testing.T) {
	t.Parallel()
	for status, codes := range map[int][]Code{
		402: {QuotaExceeded, SpendCapReached, CreditsDepleted, CreditsInsufficient, SubscriptionExpired, TrialEnded, PaymentFailed, PlanRequired},
		429: {RateLimited}, 403: {CostExceedsLimit}, 503: {BillingStateUnknown}, 0: {"", "SOMETHING"},
	} {
		for _, c := range codes {
			if c.Status() != status {
				t.Errorf("%s answers %d, want %d", c, c.Status(), status)
			}
		}
	}
}

func TestAFilterMatchesWhatItListsOrEverything(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		f    Filter
		want bool
	}{
		{Filter{}, true},
		{Filter{Models: []string{"x", "m"}}, true},
		{Filter{Models: []string{"x"}}, false},
		{Filter{Models: []string{"m"}, Routes: []string{"/r"}, Methods: []string{"GET"}}, true},
		{Filter{Models: []string{"m"}, Routes: []string{"/r"}, Methods: []string{"PUT"}}, false},
		{Filter{Models: []string{""}}, false},
	} {
		if got := c.f.Match("m", "/r", "GET"); got != c.want {
			t.Errorf("%+v matches: %v", c.f, got)
		}
		if c.f.Empty() != (len(c.f.Models)+len(c.f.Routes)+len(c.f.Methods) == 0) {
			t.Errorf("%+v is empty: %v", c.f, c.f.Empty())
		}
	}
}
