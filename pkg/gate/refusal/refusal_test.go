package refusal

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var update = flag.Bool("update", false, "write the golden files anew")

const second = usage.Micros(1_000_000)

var now = usage.Micros(1_767_225_600_000_000) // 2026-01-01T00:00:00Z

func quota() *usage.Decision {
	return &usage.Decision{
		ID: "37dVQnMkmXt5oDnBRaTm2rbfF3D", Account: "acme", LimitID: "pro/calls-day", Meter: usage.Calls, Verdict: usage.Deny, Code: usage.QuotaExceeded,
		Revision: 4711, Used: 10007, Amount: 10000, Window: usage.Day, PeriodStart: now - 3600*second, PeriodEnd: now + 82800*second,
		ActionURL: "https://pay.example/acme?plan=pro&x=1",
	}
}

func lifetimeTokens() *usage.Decision {
	return &usage.Decision{
		ID: "37dVQnMkmXt5oDnBRaTm2rbfF3E", Account: "acme", LimitID: "pro/tokens", Meter: usage.InputTokens, Verdict: usage.Deny, Code: usage.CreditsDepleted,
		Revision: 4712, Used: 5000, Amount: 5000, Window: usage.Lifetime,
	}
}

func rate() *usage.Decision {
	d := quota()
	d.LimitID, d.Code, d.Window, d.PeriodStart, d.PeriodEnd, d.ActionURL = "pro/rate", usage.RateLimited, usage.Minute, now-30*second, now+30*second-1, ""
	return d
}

// exact is a limit of which something is left, but not enough.
func exact(used, room int64) *usage.Decision {
	d := lifetimeTokens()
	d.LimitID, d.Code, d.Tier, d.Amount, d.Used, d.Room = "pro/out", usage.QuotaExceeded, usage.TierExact, 10_000, used, room
	return d
}

// terms are an exact limit's whose decision is not here yet.
func terms() *usage.Decision {
	d := exact(10_000, 0)
	d.ID, d.Revision = "", 0
	return d
}

// The bodies and headers are what clients parse: a change here is a change of the
// API.
func TestGolden(t *testing.T) {
	t.Parallel()
	cases := map[string]Refusal{
		"quota": {Code: usage.QuotaExceeded, Decision: quota(), Violated: []*usage.Decision{quota(), lifetimeTokens()}, Requested: 1},
		"life":  {Code: usage.CreditsDepleted, Decision: lifetimeTokens(), Requested: -1},
		"used":  {Code: usage.QuotaExceeded, Decision: exact(10_000, 0), Requested: 100},
		"short": {Code: usage.QuotaExceeded, Decision: exact(9_960, 40), Requested: 100},
		"early": {Code: usage.QuotaExceeded, Decision: exact(9_800, 200), Requested: 100},
		"terms": {Code: usage.QuotaExceeded, Decision: terms(), Requested: 100},
		"rate":  {Code: usage.RateLimited, Decision: rate(), Requested: 1},
		"state": {Code: usage.BillingStateUnknown, Requested: -1, Detail: "Whether this call is covered could not be found out in time."},
		"key":   {Code: Unauthenticated, Requested: -1, Detail: "There is no such API key."},
	}
	for name, r := range cases {
		for _, p := range []Profile{Problem, OpenAI, Anthropic, Flat} {
			t.Run(name+"/"+string(p), func(t *testing.T) {
				t.Parallel()
				r := r
				r.RequestID, r.Now = "req-1", now
				w := httptest.NewRecorder()
				if err := r.Write(w, p); err != nil {
					t.Fatal(err)
				}
				if !json.Valid(w.Body.Bytes()) {
					t.Fatalf("not JSON: %s", w.Body)
				}
				got := dump(t, w)
				file := filepath.Join("testdata", name+"."+string(p)+".golden")
				if *update {
					if err := os.WriteFile(file, got, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(string(want), string(got)); d != "" {
					t.Error(d)
				}
			})
		}
	}
}

func dump(t *testing.T, w *httptest.ResponseRecorder) []byte {
	t.Helper()
	var names []string
	for n := range w.Header() {
		names = append(names, n)
	}
	slices.Sort(names)
	out := fmt.Sprintf("%d %s\n", w.Code, http.StatusText(w.Code))
	for _, n := range names {
		out += n + ": " + strings.Join(w.Header().Values(n), " | ") + "\n"
	}
	var v any
	if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
		t.Fatal(err)
	}
	pretty, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return []byte(out + "\n" + string(pretty) + "\n")
}

func TestEveryCodeOfTheDesignAnswersItsStatus(t *testing.T) {
	t.Parallel()
	for code, want := range map[usage.Code]int{
		usage.QuotaExceeded: 402, usage.SpendCapReached: 402, usage.CreditsDepleted: 402, usage.CreditsInsufficient: 402, usage.SubscriptionExpired: 402,
		usage.TrialEnded: 402, usage.PaymentFailed: 402, usage.PlanRequired: 402, usage.RateLimited: 429, usage.CostExceedsLimit: 403, usage.BillingStateUnknown: 503,
		Unauthenticated: 401, BadRequest: 400, TooLarge: 413, NoRoute: 404, BadGateway: 502, GatewayTimeout: 504, MeteringUnavailable: 503,
	} {
		r := Refusal{Code: code}
		if got := r.HTTPStatus(); got != want {
			t.Errorf("%s: %d, want %d", code, got, want)
		}
		d := r.document()
		if d.Title == "" || d.Resolution == "" || d.Detail == "" || !strings.Contains(d.Type, "://") || d.Title == "Refused" {
			t.Errorf("%s: %+v", code, d)
		}
		// Only what passes by itself soon may be retried: a client that retries
		// a 402 does so for ever.
		if want := want == 429 || want >= 502; d.Retryable != want {
			t.Errorf("%s: retryable %v", code, d.Retryable)
		}
	}
}

func TestWhatComesFromAPlansFileCannotBreakHeaders(t *testing.T) {
	t.Parallel()
	d := quota()
	d.LimitID = "pl\"a\\n/ümlaut\r\nX-Evil: 1"
	d.ActionURL = "https://x.example/>; rel=evil"
	d.Amount = 1 << 60
	r := Refusal{Code: usage.QuotaExceeded, Decision: d, Now: now}
	w := httptest.NewRecorder()
	if err := r.Write(w, Problem); err != nil {
		t.Fatal(err)
	}
	if got := w.Header().Get("Link"); got != "" {
		t.Errorf("Link: %s", got)
	}
	if got, want := w.Header().Get("RateLimit-Policy"), `"pl\"a\\n/?mlaut??X-Evil: 1";q=999999999999999;w=86400`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for _, u := range []string{"javascript:alert(1)", "pay.example", "", "https://"} {
		if linkable(u) {
			t.Errorf("%q is linked", u)
		}
	}
}

func TestTheListOfViolatedPoliciesIsBounded(t *testing.T) {
	t.Parallel()
	var all []*usage.Decision
	for i := range 100 {
		d := quota()
		d.LimitID = fmt.Sprint("pro/", i/2)
		all = append(all, d)
	}
	r := Refusal{Code: usage.QuotaExceeded, Decision: all[0], Violated: all}
	got := r.document().ViolatedPolicies
	if len(got) != MaxViolated || got[0] != "pro/0" || got[1] != "pro/1" {
		t.Errorf("%v", got)
	}
}

// A person reads title, detail and resolution, or the message, as one text.
func TestNoRefusalSaysASentenceTwice(t *testing.T) {
	t.Parallel()
	var all []Refusal
	for _, code := range []usage.Code{
		usage.QuotaExceeded, usage.SpendCapReached, usage.CreditsDepleted, usage.CreditsInsufficient, usage.SubscriptionExpired, usage.TrialEnded, usage.PaymentFailed,
		usage.PlanRequired, usage.RateLimited, usage.CostExceedsLimit, usage.BillingStateUnknown, Unauthenticated, BadRequest, TooLarge, NoRoute, BadGateway, GatewayTimeout,
		MeteringUnavailable, "SOMETHING_NEW",
	} {
		all = append(all, Refusal{Code: code, Requested: -1}, Refusal{Code: code, Requested: -1, Detail: "This gateway has reached its bound of leases, and could not ask whether this call is paid for: try again later."})
		for _, d := range []*usage.Decision{quota(), lifetimeTokens(), rate(), exact(9_960, 40), exact(9_800, 200), terms()} {
			d.Code = code
			all = append(all, Refusal{Code: code, Decision: d, Requested: 100}, Refusal{Code: code, Decision: d, Requested: 1}, Refusal{Code: code, Decision: d, Requested: -1},
				Refusal{Code: code, Decision: d, Requested: 100, Detail: "This call may use up to 100 output_tokens, and limit pro/out is 40 in all: ask for less."})
		}
	}
	for _, r := range all {
		d := r.document()
		_, body := render(&d, OpenAI)
		for _, text := range []string{d.Title + ". " + d.Detail + " " + d.Resolution, body.(openAIBody).Error.Message} {
			seen := map[string]bool{}
			for _, sentence := range strings.FieldsFunc(strings.ToLower(text), func(r rune) bool { return r == '.' || r == ':' }) {
				if sentence = strings.TrimSpace(sentence); len(sentence) > 3 && seen[sentence] {
					t.Errorf("%s says %q twice: %s", r.Code, sentence, text)
				}
				seen[sentence] = true
			}
		}
	}
	for detail, want := range map[string][2]string{
		"It is so: do this.":                      {"It is so.", "Do this."},
		"It is so.":                               {"It is so.", ""},
		`The member "a: b" stands twice.`:         {`The member "a: b" stands twice.`, ""},
		`The member "a: b" is odd: leave it out.`: {`The member "a: b" is odd.`, "Leave it out."},
	} {
		if what, todo := divided(detail); what != want[0] || todo != want[1] {
			t.Errorf("%s: %q, %q", detail, what, todo)
		}
	}
}

// Whatever the form of a refusal: its headers lead to the request and to the decision.
func TestEveryRefusalCarriesItsIDsInHeaders(t *testing.T) {
	t.Parallel()
	for _, p := range []Profile{"", Problem, OpenAI, Anthropic, Flat} {
		for _, d := range []*usage.Decision{quota(), terms(), nil} {
			r := Refusal{Code: usage.QuotaExceeded, Decision: d, Requested: 1, RequestID: "req-1", Now: now}
			w := httptest.NewRecorder()
			if err := r.Write(w, p); err != nil {
				t.Fatal(err)
			}
			want := ""
			if d != nil {
				want = d.ID
			}
			if got := w.Header().Get("X-Tollkeeper-Decision-Id"); got != want || w.Header().Get("X-Request-Id") != "req-1" || (w.Header().Get("Request-Id") == "req-1") != (p == Anthropic) {
				t.Errorf("%s: %v", p, w.Header())
			}
		}
	}
}
