package console

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/conservation"
	"github.com/tollkeeper/tollkeeper/services/console/internal/counters"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/console/internal/plansapi"
	"github.com/tollkeeper/tollkeeper/services/console/internal/series"
	"github.com/tollkeeper/tollkeeper/services/internal/contracttest"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// contract checks a console's exchanges.
type contract struct {
	*contracttest.Contract
	base string
}

func newContract(t *testing.T, base string) *contract {
	t.Helper()
	return &contract{contracttest.New(t, openapi.Console), base}
}

type exchange struct {
	method, path string
	header       map[string]string
	body         string
	status       int
}

func (c *contract) do(e exchange) []byte {
	return c.Do(c.base, contracttest.Exchange{Method: e.method, Path: e.path, Header: e.header, Body: e.body, Status: e.status})
}

func TestEveryAnswerIsWhatTheContractSays(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	ctx, cancel := context.WithCancel(t.Context())
	owner := make(chan struct{})
	go func() { defer close(owner); w.own(ctx) }()
	defer func() { cancel(); <-owner }()
	now := time.Now()
	minute := usage.At(now.Truncate(time.Minute).Add(time.Minute))
	deny := usage.Decision{ID: decisionID("acme/search"), Account: "acme/search", LimitID: "free/calls-per-minute", Meter: usage.Calls, Verdict: usage.Deny, Code: usage.QuotaExceeded,
		Revision: 9, Used: 100, Amount: 100, Window: usage.Minute, PeriodStart: minute - 60_000_000, PeriodEnd: minute + 3600_000_000, PlanVersion: "v", DecidedAt: usage.At(now), Cause: usage.At(now), ActionURL: "https://example.com/upgrade"}
	w.decide(deny)
	w.alert(usage.Alert{EpisodeID: "e1", Transition: usage.AlertFiring, N: 1, Rule: "refused-accounts", Scope: "global", Severity: "page", At: usage.At(now), Value: .4, Threshold: .2, Summary: "40 % of accounts are refused"})
	w.deadLetter(usage.ReasonMalformed, "it is not a CloudEvent in JSON", "gateway-1")
	w.publish(okCall("acme/search", 10, 20), okCall("hooli", 5, 5), refusedCall("acme/search", usage.QuotaExceeded))

	h := &fakeHistory{
		calls:    []history.CallsPoint{{Step: 0, Admitted: 3, InputTokens: 7}, {Step: 1, Name: "QUOTA_EXCEEDED", Refused: 2}, {Step: 1, Other: true, Refused: 1}, {Step: 99999, Name: "outside"}},
		position: 3,
	}
	for n := range uint64(3) {
		h.decisions = append(h.decisions, history.PastDecision{Sequence: 30 - n, Decision: deny})
	}
	base := w.start(Options{History: h, Peers: []Peer{{Name: "alerter", URL: "http://127.0.0.1:1/readyz"}}})
	c := newContract(t, base)

	// Beacons, dead letters and alerts arrive by themselves.
	w.until("everything was heard", func() bool {
		hl := get[health.Health](t, base+"/v1/health")
		dead := get[struct{ Total uint64 }](t, base+"/v1/deadletters")
		return len(hl.Shards) == testShards && hl.Parts[1].State == health.StateOK && hl.Historian.Known && dead.Total == 1
	})

	var accounts struct {
		Accounts []accountLine `json:"accounts"`
		Next     string        `json:"next_cursor"`
	}
	decode(t, c.do(exchange{path: "/v1/accounts?limit=2"}), &accounts)
	if len(accounts.Accounts) != 2 || accounts.Next != "acme/search" || accounts.Accounts[1].Verdict != "deny" || accounts.Accounts[1].Root != "acme" {
		t.Errorf("accounts: %+v", accounts)
	}
	decode(t, c.do(exchange{path: "/v1/accounts?limit=2&cursor=acme/search"}), &accounts)
	if accounts.Accounts[0].ID != "acme/support-bot" {
		t.Errorf("the next page begins with %s", accounts.Accounts[0].ID)
	}
	var account struct {
		Path      []string
		Usage     *counters.Account
		Decisions []decisionLine
	}
	decode(t, c.do(exchange{path: "/v1/accounts/acme%2Fsearch"}), &account)
	if diff := cmp.Diff([]string{"acme/search", "acme"}, account.Path); diff != "" {
		t.Error(diff)
	}
	if account.Usage == nil || account.Usage.Own.Admitted != 1 || account.Usage.Own.Refused != 1 || len(account.Decisions) != 1 {
		t.Errorf("account: %+v", account)
	}
	c.do(exchange{path: "/v1/accounts/nobody", status: 404})
	c.do(exchange{path: "/v1/accounts?limit=0", status: 400})

	var u counters.Answer
	decode(t, c.do(exchange{path: "/v1/usage"}), &u)
	if !u.Complete || u.Total.Admitted != 2 || u.Total.Refused != 1 || u.Total.Meters[usage.OutputTokens] != 25 {
		t.Errorf("usage: %+v", u)
	}
	u = counters.Answer{}
	decode(t, c.do(exchange{path: "/v1/usage?account=hooli&account=acme/search"}), &u)
	if len(u.Accounts) != 2 || u.Total.Admitted != 2 {
		t.Errorf("usage of two: %+v", u)
	}

	c.do(exchange{path: "/v1/plans"})
	asYAML := c.do(exchange{path: "/v1/plans", header: map[string]string{"Accept": "application/yaml"}})
	if doc, err := plans.Parse("answer.yaml", asYAML); err != nil || plans.Version(doc) != plans.Version(demoPlans()) {
		t.Errorf("what is given as YAML can't be applied again: %v\n%s", err, asYAML)
	}

	var ds struct{ Decisions []decisionLine }
	decode(t, c.do(exchange{path: "/v1/decisions?verdict=deny&account=acme/search"}), &ds)
	if len(ds.Decisions) != 1 || ds.Decisions[0].Effective != "deny" {
		t.Errorf("decisions: %+v", ds)
	}
	c.do(exchange{path: "/v1/decisions?verdict=maybe", status: 400})
	for _, path := range []string{
		"/v1/decisions?cursor=nonsense", "/v1/decisions?cursor=99.acme.x", "/v1/decisions?cursor=0.acme", "/v1/decisions?cursor=0.ac=me.x",
		"/v1/decisions/history?cursor=nonsense", "/v1/decisions/history?cursor=0", "/v1/decisions/history?cursor=-1",
		"/v1/accounts?cursor=%00", "/v1/accounts?cursor=" + strings.Repeat("a", usage.MaxIDBytes+1),
	} {
		var p front.Problem
		decode(t, c.do(exchange{path: path, status: 400}), &p)
		if p.Code != front.CodeBadRequest || p.Detail != front.NoCursor {
			t.Errorf("%s: %+v", path, p)
		}
	}
	decode(t, c.do(exchange{path: "/v1/decisions?cursor=" + ledger.DecisionKey(0, "acme/gone", "free/calls")}), &ds)
	c.do(exchange{path: "/v1/decisions/" + deny.ID + "/explain", status: 404})
	var past struct {
		Decisions []decisionLine
		Next      string `json:"next_cursor"`
	}
	decode(t, c.do(exchange{path: "/v1/decisions/history?limit=2"}), &past)
	if len(past.Decisions) != 2 || past.Next != "29" {
		t.Errorf("past decisions: %+v", past)
	}
	decode(t, c.do(exchange{path: "/v1/decisions/history?limit=2&cursor=29"}), &past)
	if len(past.Decisions) != 1 || past.Next != "" {
		t.Errorf("the last page: %+v", past)
	}

	var calls struct {
		Steps  int
		Series []series.Calls
	}
	decode(t, c.do(exchange{path: "/v1/history/calls?from=2026-01-01T00:00:07Z&to=2026-01-01T00:02:00Z&step=60&group=model"}), &calls)
	if want := []series.Calls{
		{Name: "", Admitted: []int64{3, 0}, Refused: []int64{0, 0}, Input: []int64{7, 0}, Output: []int64{0, 0}},
		{Name: "QUOTA_EXCEEDED", Admitted: []int64{0, 0}, Refused: []int64{0, 2}, Input: []int64{0, 0}, Output: []int64{0, 0}},
		{Name: "", Other: true, Admitted: []int64{0, 0}, Refused: []int64{0, 1}, Input: []int64{0, 0}, Output: []int64{0, 0}},
	}; cmp.Diff(want, calls.Series) != "" || calls.Steps != 2 {
		t.Errorf("history: %d steps, %s", calls.Steps, cmp.Diff(want, calls.Series))
	}
	if h.asked.From.Second() != 0 || h.asked.Group != history.ByModel || h.asked.Top != series.Top {
		t.Errorf("asked %+v", h.asked)
	}
	for _, bad := range []string{"from=yesterday", "group=shoe", "step=0", "from=2020-01-01T00:00:00Z&step=1", "from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z"} {
		c.do(exchange{path: "/v1/history/calls?" + bad, status: 400})
	}

	var conserved conservation.Answer
	decode(t, c.do(exchange{path: "/v1/audit"}), &conserved)
	if conserved.State != "unknown" {
		t.Errorf("before an auditor has said anything: %+v", conserved)
	}
	bucket, err := w.js.KeyValue(t.Context(), ledger.AuditBucket)
	if err == nil {
		_, err = bucket.Put(t.Context(), ledger.AuditStatusKey, fmt.Appendf(nil, `{"at_unix_micros":%d,"whole":true,"calls":7,"points":[{"pair":"ledger-history","ok":true,"lag_seconds":0.5,"detail":"d","open":1}],"open":1,
		"findings":[{"id":"ledger-history-1-ab","pair":"ledger-history","kind":"gap","minute_unix":60,"minute":"1970-01-01 00:01 UTC","account":"acme","text":"t","first_seen_unix_micros":1,"last_seen_unix_micros":2,
			"parts":[{"origin":"3-4","from":3,"to":4,"since_unix_micros":5,"want":{"count":2,"refused":0,"sums":[2,0,0,0,0,0,0,0],"hash":"18446744073709551615"},"got":{"count":1,"refused":0,"sums":[1,0,0,0,0,0,0,0],"hash":"1"}}]},
			{"id":"x","pair":"gateway-ledger","kind":"double","minute_unix":60,"minute":"m","account":"","others":true,"text":"t","parts":null,"first_seen_unix_micros":1,"last_seen_unix_micros":2,"resolved_at_unix_micros":2}]}`, usage.At(time.Now())))
	}
	if err != nil {
		t.Fatal(err)
	}
	w.until("the audit's finding is shown", func() bool {
		decode(t, c.do(exchange{path: "/v1/audit?open=true&limit=9"}), &conserved)
		return conserved.State == "down"
	})
	if f := conserved.Findings; len(f) != 1 || f[0].Account != "acme" || f[0].Parts[0].Want.Hash != "18446744073709551615" || conserved.Calls != 7 {
		t.Errorf("the audit: %+v", conserved)
	}
	decode(t, c.do(exchange{path: "/v1/audit"}), &conserved)
	if len(conserved.Findings) != 2 {
		t.Errorf("the audit: %+v", conserved)
	}
	for _, bad := range []string{"limit=0", "limit=x", "open=maybe"} {
		c.do(exchange{path: "/v1/audit?" + bad, status: 400})
	}
	c.do(exchange{path: "/v1/alerts"})
	var dead struct {
		Newest []struct{ Reason, Detail, Origin string }
	}
	decode(t, c.do(exchange{path: "/v1/deadletters"}), &dead)
	if len(dead.Newest) != 1 || dead.Newest[0].Reason != usage.ReasonMalformed || dead.Newest[0].Origin != "gateway-1" {
		t.Errorf("dead letters: %+v", dead)
	}
	var hl health.Health
	w.until("the auditor was heard", func() bool {
		decode(t, c.do(exchange{path: "/v1/health"}), &hl)
		return hl.Parts[4].State == health.StateOK
	})
	states := map[string]string{}
	for _, p := range hl.Parts {
		states[p.Name] = p.State
	}
	if diff := cmp.Diff(map[string]string{"gateway": "ok", "aggregator": "ok", "historian": "ok", "alerter": "down", "auditor": "ok", "nats": "ok", "clickhouse": "ok"}, states); diff != "" {
		t.Error(diff)
	}
	c.do(exchange{path: "/healthz"})
	c.do(exchange{path: "/readyz"})
}

func decode(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
}

func TestPlansAreAppliedOverHTTP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newContract(t, w.start(Options{}))
	yamlHeader := map[string]string{"Content-Type": "application/yaml", "If-Match": "*"}
	const first = "version: 1\nplans: [{id: free, limits: [{id: a, meter: calls, window: day, amount: 5}]}]\naccounts: [{id: x, plan: free}]\n"

	var d struct {
		DryRun bool `json:"dry_run"`
		Text   string
		plans.Diff
	}
	decode(t, c.do(exchange{method: "PUT", path: "/v1/plans?dry_run=true", header: yamlHeader, body: first}), &d)
	if !d.DryRun || len(d.Diff.Plans) != 1 || !strings.Contains(d.Text, "+ account x") {
		t.Errorf("dry run: %+v", d)
	}
	version := func() string {
		var p struct{ Version string }
		decode(t, c.do(exchange{path: "/v1/plans"}), &p)
		return p.Version
	}
	if v := version(); v != "" {
		t.Fatalf("a dry run applied %s", v)
	}
	c.do(exchange{method: "PUT", path: "/v1/plans", header: yamlHeader, body: first})
	applied := version()
	if applied != d.To {
		t.Errorf("applied %s, planned %s", applied, d.To)
	}

	var bad front.Problem
	decode(t, c.do(exchange{method: "PUT", path: "/v1/plans", header: yamlHeader, status: 422, body: strings.Replace(first, "amount: 5", "amount: -5", 1)}), &bad)
	if want := []plans.Problem{{File: "plans.yaml", Line: 2, Column: 72, Pointer: "/plans/0/limits/0/amount", Reason: "amount is below 1", Do: "write a number from 1 on"}}; cmp.Diff(want, bad.Problems) != "" {
		t.Error(cmp.Diff(want, bad.Problems))
	}
	decode(t, c.do(exchange{method: "PUT", path: "/v1/plans", header: map[string]string{"Content-Type": "application/json", "If-Match": "*"}, status: 422, body: "{\n"}), &bad)
	c.do(exchange{method: "PUT", path: "/v1/plans", header: map[string]string{"Content-Type": "text/plain"}, status: 415, body: first})
	c.do(exchange{method: "PUT", path: "/v1/plans", status: 415, body: first})
	c.do(exchange{method: "PUT", path: "/v1/plans?dry_run=perhaps", header: yamlHeader, status: 400, body: first})
	c.do(exchange{method: "PUT", path: "/v1/plans", header: yamlHeader, status: 413, body: strings.Repeat("#", plansapi.MaxBody+1)})
	if v := version(); v != applied {
		t.Errorf("refused plans changed what holds to %s", v)
	}
}

func TestAnotherSiteCanChangeNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base := w.start(Options{})
	own := strings.TrimPrefix(base, "http://")
	for name, h := range map[string]struct {
		header map[string]string
		status int
	}{
		"a program":           {nil, 200},
		"the page":            {map[string]string{"Sec-Fetch-Site": "same-origin", "Origin": base}, 200},
		"another site":        {map[string]string{"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403},
		"another port":        {map[string]string{"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"}, 403},
		"an old browser":      {map[string]string{"Origin": "https://evil.example"}, 403},
		"no origin":           {map[string]string{"Origin": "null"}, 403},
		"a name pointed here": {map[string]string{"Host": "evil.example"}, 403},
		"the name localhost":  {map[string]string{"Host": "localhost:" + own[strings.LastIndex(own, ":")+1:]}, 200},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, base+"/v1/plans?dry_run=true", strings.NewReader("version: 1\n"))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/yaml")
			for k, v := range h.header {
				req.Header.Set(k, v)
				if k == "Host" {
					req.Host = v
				}
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if res.StatusCode != h.status {
				t.Errorf("%s, want %d", res.Status, h.status)
			}
		})
	}
}

func TestOtherMachinesNeedAToken(t *testing.T) {
	t.Parallel()
	err := Run(t.Context(), Options{Listen: "0.0.0.0:0", Flag: "console-listen"})
	var listen *telemetry.ListenError
	if !errors.As(err, &listen) || !errors.Is(err, telemetry.ErrNotLoopback) || listen.Flag != "console-listen" {
		t.Errorf("got %v", err)
	}
}

func TestTheConsoleWaitsForNATS(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	addr := make(chan string, 1)
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{Listen: "127.0.0.1:0", NATS: natsconn.Options{URL: "nats://127.0.0.1:1"}, Ready: func(a net.Addr) { addr <- a.String() }})
	}()
	base := "http://" + <-addr
	for path, want := range map[string]int{"/readyz": 503, "/healthz": 200, "/v1/usage": 503} {
		res, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %s, want %d", path, res.Status, want)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAPageThatWasNotBuiltSaysHow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base := w.start(Options{Web: fstest.MapFS{}})
	res, err := http.Get(base + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || !bytes.Contains(body, []byte("go tool task setup")) {
		t.Errorf("%v: %s", err, body)
	}
}

// events reads messages of the live stream.
func events(t *testing.T, ctx context.Context, base string) (next func() liveMessage, status int) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1/live", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	scan := bufio.NewScanner(res.Body)
	scan.Buffer(nil, 1<<20)
	return func() liveMessage {
		t.Helper()
		for scan.Scan() {
			if data, ok := strings.CutPrefix(scan.Text(), "data: "); ok {
				var m liveMessage
				decode(t, []byte(data), &m)
				return m
			}
		}
		t.Fatalf("the stream ended: %v", scan.Err())
		return liveMessage{}
	}, res.StatusCode
}

func TestTheLiveStreamMoves(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	ctx, cancel := context.WithCancel(t.Context())
	owner := make(chan struct{})
	go func() { defer close(owner); w.own(ctx) }()
	defer func() { cancel(); <-owner }()
	base := w.start(Options{MaxStreams: 2})
	c := newContract(t, base)

	stream, stop := context.WithCancel(t.Context())
	next, _ := events(t, stream, base)
	first := next()
	if !first.Reset || len(first.Seconds) < 200 {
		t.Errorf("the first message: reset %v, %d seconds", first.Reset, len(first.Seconds))
	}
	for range 30 {
		w.publish(okCall("acme/search", 10, 20), refusedCall("initech", usage.QuotaExceeded), okCall("hooli", 1, 1))
	}
	var m liveMessage
	var admitted, refused int64
	for try := 0; try < 10 && (admitted < 60 || len(m.Top) == 0); try++ {
		m = next()
		admitted, refused = 0, 0
		for _, s := range m.Seconds {
			admitted += s.Admitted
			refused += s.RefusedTotal()
		}
	}
	if m.Reset || len(m.Seconds) != liveRecent || admitted != 60 || refused != 30 {
		t.Errorf("after 60 calls and 30 refusals: %d admitted, %d refused in %d seconds", admitted, refused, len(m.Seconds))
	}
	byID := map[string]topAccount{}
	for _, a := range m.Top {
		byID[a.ID] = a
	}
	if a := byID["acme/search"]; a.Admitted != 30 || len(a.Limits) != 2 || a.Limits[0].Used != 30 || a.Limits[0].Remaining != 70 || a.Limits[1].Account != "acme" {
		t.Errorf("acme/search: %+v", a)
	}
	if a := byID["acme"]; a.Admitted != 30 || len(a.Limits) != 1 || a.Limits[0].Used != 600 {
		t.Errorf("what is above an account is shown with it: %+v", a)
	}
	if len(m.Refusals) == 0 || m.Refusals[0].Account != "initech" || m.Refusals[0].DecisionID != decisionID("initech") {
		t.Errorf("refusals: %+v", m.Refusals)
	}
	// A message is what the contract says.
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var value any
	decode(t, body, &value)
	if err := c.Doc.Components.Schemas["LiveMessage"].Value.VisitJSON(value); err != nil {
		t.Error(err)
	}

	// Clients are bounded, and one that goes makes room.
	if _, status := events(t, t.Context(), base); status != 200 {
		t.Errorf("the second client got %d", status)
	}
	if _, status := events(t, t.Context(), base); status != 503 {
		t.Errorf("the third client got %d", status)
	}
	stop()
	w.until("there is room again", func() bool {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_, status := events(t, ctx, base)
		return status == 200
	})
}

func TestWithoutAnAggregatorTheAnswerSaysSo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	base := w.start(Options{})
	u := get[counters.Answer](t, base+"/v1/usage")
	if u.Complete || !strings.Contains(u.Shards[0].Error, "is an aggregator running?") {
		t.Errorf("got %+v", u)
	}
	h := get[health.Health](t, base+"/v1/health")
	if h.State != health.StateDown || h.Shards[0].BeaconAge != -1 {
		t.Errorf("got %+v", h)
	}
	account := get[struct {
		Usage *counters.Account
		Why   string `json:"usage_error"`
	}](t, base+"/v1/accounts/"+url.PathEscape("acme/search"))
	if account.Usage != nil || account.Why == "" {
		t.Errorf("got %+v", account)
	}
}

// A shard that is silent, or is being counted anew by who took it over, has not said that
// an account has used nothing.
func TestCountersThatAreNotThereAreNotNoUsage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	base := w.start(Options{})
	for what, want := range map[string]string{"silent": "has not answered within", "counting": "still being counted"} {
		subs := make([]*nats.Subscription, 0, testShards)
		for s := range uint32(testShards) {
			sub, err := w.nc.Subscribe(ledger.UsageSubject(s), func(m *nats.Msg) {
				if what == "silent" {
					return
				}
				data, err := json.Marshal(ledger.UsageReply{Shard: s, Epoch: 2, Sequence: 3, Accounts: []ledger.AccountUsage{}})
				if err == nil {
					err = m.RespondMsg(&nats.Msg{Data: data, Header: nats.Header{"Tollkeeper-Counting-To": {"9"}}})
				}
				if err != nil {
					t.Error(err)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			subs = append(subs, sub)
		}
		if err := w.nc.Flush(); err != nil {
			t.Fatal(err)
		}
		u := get[counters.Answer](t, base+"/v1/usage?account=acme/search")
		shard := w.shard("acme/search")
		if u.Complete || len(u.Accounts) != 0 || u.Shards[shard].OK || !strings.Contains(u.Shards[shard].Error, want) {
			t.Errorf("%s: got %+v", what, u)
		}
		account := get[struct {
			Usage *counters.Account
			Why   string `json:"usage_error"`
		}](t, base+"/v1/accounts/"+url.PathEscape("hooli"))
		if account.Usage != nil || !strings.Contains(account.Why, want) {
			t.Errorf("%s: got %+v", what, account)
		}
		for _, sub := range subs {
			if err := sub.Unsubscribe(); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.nc.Flush(); err != nil {
			t.Fatal(err)
		}
	}
}
