package drive

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

func TestMain(m *testing.M) {
	// fasthttp's pool looks every ten seconds whether it was stopped.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"), goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"))
}

func rowsOf(n int, change func(i int, r *trace.Row)) []trace.Row {
	rows := make([]trace.Row, n)
	for i := range rows {
		rows[i] = trace.Row{Account: "a", Time: time.Unix(1_700_000_000+int64(i), 0).UTC(), File: "t.csv", Line: i + 2}
		if change != nil {
			change(i, &rows[i])
		}
	}
	return rows
}

func options(srv *httptest.Server, rows []trace.Row) Options {
	return Options{
		Rows: rows, Account: func(i int) int { return int(rows[i].Account[0] - 'a') }, Concurrency: 4, Host: strings.TrimPrefix(srv.URL, "http://"),
		Key: func(i int) string { return "k-" + rows[i].Account }, Path: func(int) string { return "/v1/chat/completions" }, Answered: new(atomic.Int64),
	}
}

// Clients count what they were answered: admitted calls, refusals by code, and what
// got no answer apart. None is sent twice.
func TestDriveCountsWhatClientsSawAndSendsEachRowOnce(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
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
		}
	}))
	t.Cleanup(srv.Close)
	// A GET could be tried again by a client that does not count.
	seen, err := Run(t.Context(), options(srv, rowsOf(100, func(i int, r *trace.Row) { r.Method = []string{"POST", "GET"}[i%2] })))
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for i, o := range seen.Outcomes {
		count[fmt.Sprint(o, seen.Code(i))]++
	}
	if n.Load() != 100 || count["1"] != 50 || count["2"] != 25 || count["3QUOTA_EXCEEDED"] != 25 || seen.Failures != 25 {
		t.Errorf("the gateway had %d calls, the clients saw %v, %d without an answer", n.Load(), count, seen.Failures)
	}
	if seen.LastError == nil || !strings.Contains(seen.LastError.Error(), "t.csv:") {
		t.Errorf("the error does not name the row: %v", seen.LastError)
	}
}

// An answer to HEAD has no body: the code is in a header.
func TestARefusedHEADIsARefusal(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		r := refusal.Refusal{Code: usage.QuotaExceeded, RequestID: "r-1"}
		if err := r.Write(w, refusal.Problem); err != nil && !errors.Is(err, http.ErrBodyNotAllowed) {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	seen, err := Run(t.Context(), options(srv, rowsOf(10, func(_ int, r *trace.Row) { r.Method = "HEAD" })))
	if err != nil {
		t.Fatal(err)
	}
	for i := range seen.Outcomes {
		if code := seen.Code(i); code != usage.QuotaExceeded {
			t.Errorf("row %d: outcome %d, code %q (%v)", i, seen.Outcomes[i], code, seen.LastError)
		}
	}
}

func TestAnAccountsCallsAreSentInOrderEachAfterTheAnswerBefore(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	got, flying := map[string][]string{}, map[string]int{}
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		key, at := r.Header.Get("Authorization"), r.Header.Get(EventTimeHeader)
		mu.Lock()
		defer mu.Unlock()
		if flying[key]++; flying[key] > 1 {
			t.Errorf("two calls of %s are in flight", key)
		}
		got[key] = append(got[key], at)
		flying[key]--
	}))
	t.Cleanup(srv.Close)
	rows := rowsOf(300, func(i int, r *trace.Row) { r.Account = string(rune('a' + i*7%5)) })
	o := options(srv, rows)
	o.Ordered, o.KeepTime = true, true
	if _, err := Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{}
	for _, r := range rows {
		want["Bearer k-"+r.Account] = append(want["Bearer k-"+r.Account], r.Time.Format(time.RFC3339Nano))
	}
	for key := range want {
		if fmt.Sprint(got[key]) != fmt.Sprint(want[key]) {
			t.Errorf("%s: sent at %v, want %v", key, got[key], want[key])
		}
	}
}

func TestADriveThatIsBrokenOffKeepsWhatWasAnswered(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(srv.Close)
	o := options(srv, rowsOf(20_000, nil))
	o.Half = cancel
	seen, err := Run(ctx, o)
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("err = %v", err)
	}
	admitted, unsent := 0, 0
	for _, o := range seen.Outcomes {
		switch o {
		case Admitted:
			admitted++
		case NotSent:
			unsent++
		}
	}
	if admitted < 10_000 || unsent == 0 || admitted+unsent != 20_000 {
		t.Errorf("%d admitted, %d not sent of 20,000: every row that was sent has its answer", admitted, unsent)
	}
}

// What a row needs of the ledger's clock, whatever the trace is like: the time has come,
// its windows are the row's, and nothing of an older window is under way.
func TestTheClockIsInEveryRowsWindowsWhenItIsSent(t *testing.T) {
	t.Parallel()
	kinds := []window.Kind{window.Minute, window.Hour, window.Day, window.Week, window.Month}
	rapid.Check(t, func(t *rapid.T) {
		at := time.Date(2024, time.Month(rapid.IntRange(1, 12).Draw(t, "month")), 28, 23, 59, 50, 0, time.UTC)
		var rows []trace.Row
		for range rapid.IntRange(1, 200).Draw(t, "rows") {
			gap := rapid.SampledFrom([]time.Duration{0, 1, time.Microsecond, 3 * time.Second, 10 * time.Second, time.Minute, time.Hour, 40 * 24 * time.Hour}).Draw(t, "gap")
			if rapid.Bool().Draw(t, "to the end of the minute") {
				gap = at.Truncate(time.Minute).Add(time.Minute - time.Microsecond).Sub(at)
			}
			at = at.Add(gap)
			rows = append(rows, trace.Row{Time: at})
		}
		clock, quiet, settled := usage.Micros(0), false, 0
		used := rapid.SliceOfDistinct(rapid.SampledFrom(kinds), rapid.ID[window.Kind]).Draw(t, "windows")
		s := &Steps{Windows: append(used, window.Lifetime), Advance: func(_ context.Context, to usage.Micros) error {
			if to <= clock {
				t.Fatalf("the clock goes from %d to %d", clock, to)
			}
			if !quiet {
				t.Fatal("calls are in flight while the clock moves: which time they meet is chance")
			}
			clock = to
			return nil
		}, Settled: func(context.Context) error {
			if !quiet {
				t.Fatal("calls are in flight where a window ends")
			}
			settled++
			return nil
		}}
		upTo, ends := 0, 0
		for i := range rows {
			if i == upTo {
				var err error
				if upTo, err = s.take(context.Background(), rows, i, func() { quiet = true }); err != nil {
					t.Fatal(err)
				}
			}
			quiet = false
			at := usage.At(rows[i].Time)
			if at-clock > beforeEnd {
				t.Fatalf("row %d of %s is sent at %s", i, rows[i].Time, clock.Time())
			}
			differs := false
			for _, k := range used {
				if k.Number(at) != k.Number(clock) {
					t.Fatalf("row %d of %s is sent in another %s: %s", i, rows[i].Time, k.Name(), clock.Time())
				}
				if i > 0 {
					differs = differs || k.Number(at) != k.Number(usage.At(rows[i-1].Time))
				}
			}
			if differs {
				ends++
			}
		}
		if settled != ends {
			t.Fatalf("%d times everything was settled, windows ended %d times", settled, ends)
		}
	})
}

func serve(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ServeUpstream(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

// What a trace does not report is not made up (law 9).
func TestTheUpstreamReportsWhatWasRecordedAndNothingElse(t *testing.T) {
	t.Parallel()
	url := serve(t)
	in, out := usage.Quantity{Meter: usage.InputTokens, Value: 3}, usage.Quantity{Meter: usage.OutputTokens, Value: 0}
	images := usage.Quantity{Meter: "images", Value: 2}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for name, c := range map[string]struct {
		row           trace.Row
		method        string
		status        int
		usage, header string
	}{
		"nothing":       {trace.Row{}, "POST", 200, "", ""},
		"both":          {trace.Row{Meters: []usage.Quantity{in, out}}, "POST", 200, `{"completion_tokens":0,"prompt_tokens":3,"total_tokens":3}`, ""},
		"input alone":   {trace.Row{Meters: []usage.Quantity{in}}, "POST", 200, `{"prompt_tokens":3}`, ""},
		"output alone":  {trace.Row{Meters: []usage.Quantity{out}}, "POST", 200, `{"completion_tokens":0}`, ""},
		"own meter":     {trace.Row{Meters: []usage.Quantity{images}}, "POST", 200, "", "images=2"},
		"failed":        {trace.Row{Status: 503, Meters: []usage.Quantity{in}}, "POST", 503, "", "input_tokens=3"},
		"without body":  {trace.Row{Status: 204, Meters: []usage.Quantity{in}}, "POST", 204, "", "input_tokens=3"},
		"a HEAD":        {trace.Row{Meters: []usage.Quantity{images, in}}, "HEAD", 200, "", "images=2, input_tokens=3"},
		"not modified":  {trace.Row{Status: 304}, "GET", 304, "", ""},
		"partial":       {trace.Row{Status: 206, Meters: []usage.Quantity{{Meter: usage.Bytes, Value: 9}}}, "GET", 206, "", "bytes=9"},
		"redirected":    {trace.Row{Status: 301}, "GET", 301, "", ""},
		"teapot denied": {trace.Row{Status: 404}, "GET", 404, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), c.method, url, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set(answerHeader, string(appendAnswer(nil, &c.row)))
			resp, err := client.Transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			var body struct {
				Usage map[string]any `json:"usage"`
			}
			text, _ := io.ReadAll(resp.Body)
			if len(text) > 0 {
				if err := json.Unmarshal(text, &body); err != nil {
					t.Errorf("the answer is not JSON: %q", text)
				}
			}
			got := ""
			if body.Usage != nil {
				b, _ := json.Marshal(body.Usage)
				got = string(b)
			}
			if resp.StatusCode != c.status || got != c.usage || resp.Header.Get(modelserver.MetersHeader) != c.header {
				t.Errorf("got %d, usage %q, header %q; want %d, %q, %q", resp.StatusCode, got, resp.Header.Get(modelserver.MetersHeader), c.status, c.usage, c.header)
			}
		})
	}
}
