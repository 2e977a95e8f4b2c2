package replay

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

func TestTheBoundIsTheBusiestSpan(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		gaps := rapid.SliceOfN(rapid.IntRange(0, 50), 0, 60).Draw(t, "gaps")
		span := time.Duration(rapid.IntRange(0, 200).Draw(t, "span"))
		var times []time.Time
		at := time.Unix(0, 0)
		for _, g := range gaps {
			at = at.Add(time.Duration(g))
			times = append(times, at)
		}
		want := 0
		for i, from := range times {
			n := 0
			for _, x := range times[i:] {
				if x.Sub(from) <= span {
					n++
				}
			}
			want = max(want, n)
		}
		if got := MostWithin(times, span); got != want {
			t.Fatalf("MostWithin = %d, counted are %d", got, want)
		}
	})
}

func totals(admitted, refused, tokens int64) Totals {
	return Totals{Admitted: admitted, Refused: refused, Meters: map[usage.Meter]int64{usage.InputTokens: tokens, usage.Cost: 0}}
}

func agreeing() *Report {
	return &Report{
		Seen:    &Seen{Accounts: map[string]*Tally{"a": {Admitted: 7, Refused: map[usage.Code]int64{usage.QuotaExceeded: 3}}}, Took: time.Second},
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
		"an overshoot beyond its bound": func(r *Report) {
			r.Overshoots = []Overshoot{{Account: "a", Limit: 5, Admitted: 7, Bound: 1}}
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
	unanswered.Seen.Failed = 1
	if err := unanswered.Err(); err != nil {
		t.Errorf("a call without an answer may have been counted: %v", err)
	}
}

func TestTheReportNamesWhatDiffers(t *testing.T) {
	t.Parallel()
	r := agreeing()
	r.History.Admitted = 1234567
	var out bytes.Buffer
	if err := r.Write(&out); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{"1,234,567   DIFFER", "THE POINTS DO NOT AGREE", "402 QUOTA_EXCEEDED: 3", "10 calls answered"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
}

// Clients count what they were answered: admitted calls with what the trace says
// they used, refusals by code, and what got no answer apart.
func TestDriveCountsWhatClientsSaw(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	model := modelserver.Handler(modelserver.Options{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer k-a" {
			t.Errorf("the key is %q", r.Header.Get("Authorization"))
		}
		switch n.Add(1) % 4 {
		case 0:
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(http.StatusPaymentRequired)
			_, _ = io.WriteString(w, `{"code":"QUOTA_EXCEEDED"}`)
		case 1:
			panic(http.ErrAbortHandler)
		default:
			model.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	rows := make([]trace.Row, 100)
	for i := range rows {
		rows[i] = trace.Row{Account: "a", Time: time.Unix(int64(i), 0), Meters: []usage.Quantity{{Meter: usage.InputTokens, Value: 2}}}
	}
	seen, err := Drive(t.Context(), DriveOptions{
		Rows: rows, URL: srv.URL, Concurrency: 4,
		Key: func(r trace.Row) string { return "k-" + r.Account }, Path: func(trace.Row) string { return "/v1/chat/completions" },
	})
	if err != nil {
		t.Fatal(err)
	}
	a := seen.Accounts["a"]
	// A client of Go tries a broken POST again only when nothing was sent.
	if a.Refused[usage.QuotaExceeded] != 25 || a.Admitted != 50 || seen.Failed != 25 || a.Meters[usage.InputTokens] != 100 {
		t.Errorf("admitted %d, refused %v, failed %d, tokens %v", a.Admitted, a.Refused, seen.Failed, a.Meters)
	}
}

func TestTheModelServerReportsWhatItIsAsked(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(modelserver.Handler(modelserver.Options{}))
	t.Cleanup(srv.Close)
	ask := func(method string, row trace.Row) *http.Response {
		body, err := json.Marshal(request(row))
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), method, srv.URL, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}
	meters := []usage.Quantity{{Meter: usage.InputTokens, Value: 3}, {Meter: "images", Value: 2}}
	resp := ask(http.MethodPost, trace.Row{Meters: meters})
	var answer struct {
		Usage map[string]any `json:"usage"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	if answer.Usage["prompt_tokens"] != 3.0 || resp.Header.Get(modelserver.MetersHeader) != "images=2" {
		t.Errorf("usage %v, header %q", answer.Usage, resp.Header.Get(modelserver.MetersHeader))
	}
	// An answer without a body can report in its header only.
	resp = ask(http.MethodHead, trace.Row{Method: http.MethodHead, Meters: meters})
	if got := resp.Header.Get(modelserver.MetersHeader); got != "images=2, input_tokens=3" {
		t.Errorf("HEAD: header %q", got)
	}
	if resp = ask(http.MethodPost, trace.Row{Status: 503, Meters: meters}); resp.StatusCode != 503 {
		t.Errorf("status %d", resp.StatusCode)
	}
}
