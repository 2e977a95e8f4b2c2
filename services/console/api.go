package console

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Bounds of what one request may ask for.
const (
	defaultPage  = 100
	maxPage      = 1000
	maxSteps     = 2000
	historyTop   = 10
	askedUsage   = 200
	plansMaxBody = 16 << 20
)

func (c *console) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", telemetry.NewHandler(telemetry.HandlerOptions{Gatherer: c.o.Registry, Readiness: c.o.Readiness}))
	page := pageHandler(c.o.Web)
	mux.Handle("GET /{$}", page)
	mux.Handle("GET /assets/", page)
	mux.Handle("GET /favicon.svg", page)
	mux.HandleFunc("GET /v1/accounts", c.getAccounts)
	mux.HandleFunc("GET /v1/accounts/{id...}", c.getAccount)
	mux.HandleFunc("GET /v1/usage", c.getUsage)
	mux.HandleFunc("GET /v1/plans", c.getPlans)
	mux.HandleFunc("PUT /v1/plans", c.putPlans)
	mux.HandleFunc("GET /v1/decisions", c.getDecisions)
	mux.HandleFunc("GET /v1/decisions/history", c.getDecisionHistory)
	mux.HandleFunc("GET /v1/history/calls", c.getCallHistory)
	mux.HandleFunc("GET /v1/alerts", c.getAlerts)
	mux.HandleFunc("GET /v1/deadletters", c.getDeadLetters)
	mux.HandleFunc("GET /v1/health", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, c.health(time.Now())) })
	mux.HandleFunc(livePattern, c.handleLive)
	mux.HandleFunc("/v1/", func(w http.ResponseWriter, r *http.Request) {
		problem{Status: http.StatusNotFound, Code: codeNotFound, Detail: fmt.Sprintf("there is no %s %s: schemas/openapi.yaml lists what there is", r.Method, r.URL.Path)}.write(w)
	})
	return mux
}

// pageSize reads ?limit.
func pageSize(r *http.Request, standard int) (int, error) {
	return intParam(r, "limit", standard, 1, maxPage)
}

func intParam(r *http.Request, name string, standard, least, most int) (int, error) {
	s := r.URL.Query().Get(name)
	if s == "" {
		return standard, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("%s must be a whole number from %d to %d", name, least, most)
	}
	return n, nil
}

// accountLine is an account of the plans.
type accountLine struct {
	ID      string `json:"id"`
	Parent  string `json:"parent,omitempty"`
	Plan    string `json:"plan,omitempty"`
	Root    string `json:"root"`
	Shard   uint32 `json:"shard"`
	Verdict string `json:"verdict"`
	Keys    int    `json:"keys"`
}

func (c *console) line(b *book, id string, now usage.Micros) (accountLine, bool) {
	a, ok := b.index.Account(id)
	if !ok {
		return accountLine{}, false
	}
	root := b.index.Root(id)
	worst := usage.Allow
	for _, step := range b.index.Path(id) {
		worst = max(worst, c.state.decisions.Worst(step, now))
	}
	return accountLine{ID: id, Parent: a.Parent, Plan: a.Plan, Root: root, Shard: ledger.ShardOf(root, c.shards), Verdict: worst.String(), Keys: len(a.Keys)}, true
}

func (c *console) getAccounts(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		badRequest(err.Error()).write(w)
		return
	}
	b, err := c.book(r.Context())
	if err != nil {
		unavailable("the plans can't be read: " + err.Error()).write(w)
		return
	}
	query := r.URL.Query()
	cursor, part, plan, parent := query.Get("cursor"), query.Get("q"), query.Get("plan"), query.Get("parent")
	now := micros(time.Now())
	answer := struct {
		Accounts []accountLine `json:"accounts"`
		Next     string        `json:"next_cursor"`
		Total    int           `json:"total"`
	}{Accounts: []accountLine{}, Total: len(b.ids)}
	at := sort.SearchStrings(b.ids, cursor)
	for _, id := range b.ids[at:] {
		if id == cursor && cursor != "" {
			continue
		}
		if part != "" && !strings.Contains(id, part) {
			continue
		}
		l, ok := c.line(b, id, now)
		if !ok || plan != "" && l.Plan != plan || parent != "" && l.Parent != parent {
			continue
		}
		if len(answer.Accounts) == n {
			answer.Next = answer.Accounts[n-1].ID
			break
		}
		answer.Accounts = append(answer.Accounts, l)
	}
	writeJSON(w, answer)
}

// keyLine is a key without its hash.
type keyLine struct {
	ID string `json:"id"`
}

func (c *console) getAccount(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	b, err := c.book(r.Context())
	if err != nil {
		unavailable("the plans can't be read: " + err.Error()).write(w)
		return
	}
	now := micros(time.Now())
	l, known := c.line(b, id, now)
	if !known {
		// An account that only calls have named.
		l = accountLine{ID: id, Root: id, Shard: ledger.ShardOf(id, c.shards), Verdict: c.state.decisions.Worst(id, now).String()}
	}
	answer := struct {
		accountLine
		// Known says that the plans name it.
		Known     bool           `json:"known"`
		Path      []string       `json:"path"`
		KeyIDs    []keyLine      `json:"key_ids"`
		Usage     *accountAnswer `json:"usage"`
		UsageWhy  string         `json:"usage_error,omitempty"`
		Decisions []decisionLine `json:"decisions"`
	}{accountLine: l, Known: known, Path: []string{id}, KeyIDs: []keyLine{}, Decisions: []decisionLine{}}
	if known {
		answer.Path = b.index.Path(id)
		a, _ := b.index.Account(id)
		for _, k := range a.Keys {
			answer.KeyIDs = append(answer.KeyIDs, keyLine{k.ID})
		}
	}
	reply, err := c.askShard(r.Context(), l.Shard, ledger.UsageRequest{Accounts: []string{id}})
	switch {
	case err != nil:
		answer.UsageWhy = err.Error()
	default:
		for _, u := range reply.Accounts {
			if u.ID == id {
				answer.Usage = &accountAnswer{l.Shard, tidy(u)}
			}
		}
	}
	for _, step := range answer.Path {
		for _, d := range c.state.decisions.Of(step) {
			answer.Decisions = append(answer.Decisions, lineOf(&d, now))
		}
	}
	if !known && answer.Usage == nil && answer.UsageWhy == "" && len(answer.Decisions) == 0 {
		problem{Status: http.StatusNotFound, Code: codeNotFound, Detail: fmt.Sprintf("neither the plans nor a call name the account %q", id)}.write(w)
		return
	}
	writeJSON(w, answer)
}

func (c *console) getUsage(w http.ResponseWriter, r *http.Request) {
	top, err := intParam(r, "top", 20, 1, ledger.MaxUsageAccounts)
	if err != nil {
		badRequest(err.Error()).write(w)
		return
	}
	ids := r.URL.Query()["account"]
	if len(ids) > askedUsage {
		badRequest(fmt.Sprintf("%d accounts are asked for, at most %d are possible", len(ids), askedUsage)).write(w)
		return
	}
	if len(ids) == 0 {
		answer := c.askAll(r.Context(), ledger.UsageRequest{Top: top})
		answer.Accounts = answer.Accounts[:min(top, len(answer.Accounts))]
		writeJSON(w, answer)
		return
	}
	b, err := c.book(r.Context())
	if err != nil {
		unavailable("the plans can't be read: " + err.Error()).write(w)
		return
	}
	byShard := map[uint32][]string{}
	for _, id := range ids {
		s := ledger.ShardOf(b.index.Root(id), c.shards)
		byShard[s] = append(byShard[s], id)
	}
	writeJSON(w, c.askShards(r.Context(), func(s uint32) (ledger.UsageRequest, bool) {
		return ledger.UsageRequest{Accounts: byShard[s]}, len(byShard[s]) > 0
	}))
}

func (c *console) getPlans(w http.ResponseWriter, r *http.Request) {
	b, err := c.book(r.Context())
	if err != nil {
		unavailable("the plans can't be read: " + err.Error()).write(w)
		return
	}
	w.Header().Set("Vary", "Accept")
	if strings.Contains(r.Header.Get("Accept"), "yaml") {
		data, err := yaml.MarshalWithOptions(b.applied.Document, yaml.UseJSONMarshaler())
		if err != nil {
			unavailable("the plans can't be written as YAML: " + err.Error()).write(w)
			return
		}
		w.Header().Set("Content-Type", "application/yaml")
		w.Header().Set("Cache-Control", "no-store")
		// An error here is the client's going away.
		_, _ = w.Write(data)
		return
	}
	list := b.applied.Document.Plans
	if list == nil {
		list = []plans.Plan{}
	}
	writeJSON(w, struct {
		Version      string       `json:"version"`
		PlansVersion string       `json:"plans_version"`
		Author       string       `json:"author"`
		AppliedAt    usage.Micros `json:"applied_at_unix_micros"`
		Unfinished   string       `json:"unfinished,omitempty"`
		Accounts     int          `json:"account_count"`
		Plans        []plans.Plan `json:"plans"`
	}{b.applied.Version, b.applied.PlansVersion, b.applied.Author, b.applied.AppliedAt, b.applied.Unfinished, len(b.ids), list})
}

// applyTimeout bounds one applying of plans.
const applyTimeout = 5 * time.Minute

func (c *console) putPlans(w http.ResponseWriter, r *http.Request) {
	name := "plans.yaml"
	switch mediaType(r) {
	case "application/yaml":
	case "application/json":
		name = "plans.json"
	default:
		problem{Status: http.StatusUnsupportedMediaType, Code: codeMediaType, Detail: "send the plans with Content-Type application/yaml or application/json"}.write(w)
		return
	}
	dryRun := false
	switch r.URL.Query().Get("dry_run") {
	case "", "false":
	case "true":
		dryRun = true
	default:
		badRequest("dry_run is true or false").write(w)
		return
	}
	author := r.URL.Query().Get("author")
	if author == "" {
		author = "console"
	}
	if len(author) > usage.MaxIDBytes {
		badRequest(fmt.Sprintf("author has at most %d bytes", usage.MaxIDBytes)).write(w)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, plansMaxBody))
	if err != nil {
		var big *http.MaxBytesError
		if errors.As(err, &big) {
			problem{Status: http.StatusRequestEntityTooLarge, Code: codeTooLarge, Detail: fmt.Sprintf("the plans have more than %d bytes: apply them with tollkeeper apply", plansMaxBody)}.write(w)
			return
		}
		badRequest("the body could not be read").write(w)
		return
	}
	doc, err := plans.Parse(name, body)
	if err != nil {
		plansProblem(err).write(w)
		return
	}
	// A client that goes away must not leave half of it undone until the next.
	ctx, cancel := contextWithTimeout(r, applyTimeout)
	defer cancel()
	var diff plans.Diff
	if dryRun {
		diff, err = c.applier.Plan(ctx, doc)
	} else {
		diff, err = c.applier.Apply(ctx, doc, author)
	}
	if err != nil {
		plansProblem(err).write(w)
		return
	}
	if !dryRun {
		c.log.Info().Str("author", author).Str("version", diff.To).Msg("plans applied")
		c.state.mu.Lock()
		c.state.bookAt = time.Time{}
		c.state.mu.Unlock()
	}
	writeJSON(w, struct {
		DryRun bool `json:"dry_run"`
		plans.Diff
		Text string `json:"text"`
	}{dryRun, diff, diff.String()})
}

func plansProblem(err error) problem {
	var bad *plans.Error
	var busy *plans.BusyError
	switch {
	case errors.As(err, &bad):
		return problem{Status: http.StatusUnprocessableEntity, Code: codeBadPlans, Title: "The plans can't be used", Detail: "nothing was changed; " + bad.Problems[0].String(), Problems: bad.Problems, More: bad.More}
	case errors.As(err, &busy):
		return problem{Status: http.StatusConflict, Code: codeBusy, Detail: err.Error()}
	case errors.Is(err, plans.ErrConflict):
		return problem{Status: http.StatusConflict, Code: codeConflict, Detail: err.Error()}
	}
	return unavailable("the plans may be applied in part, apply them again: " + err.Error())
}

// decisionLine is a decision.
type decisionLine struct {
	ID      string `json:"id"`
	Account string `json:"account"`
	LimitID string `json:"limit_id"`
	Meter   string `json:"meter"`
	// Verdict as it was decided, Effective as it holds now: what a period said
	// ends with it.
	Verdict     string       `json:"verdict"`
	Effective   string       `json:"effective_verdict"`
	Code        string       `json:"code,omitempty"`
	Revision    uint64       `json:"revision"`
	Shard       uint32       `json:"shard"`
	Used        int64        `json:"used"`
	Amount      int64        `json:"amount"`
	Window      string       `json:"window"`
	PeriodStart usage.Micros `json:"period_start_unix_micros"`
	PeriodEnd   usage.Micros `json:"period_end_unix_micros"`
	PlanVersion string       `json:"plan_version"`
	DecidedAt   usage.Micros `json:"decided_at_unix_micros"`
	Cause       usage.Micros `json:"cause_unix_micros"`
	ActionURL   string       `json:"action_url,omitempty"`
	Sequence    uint64       `json:"sequence,omitempty"`
}

func (c *console) getDecisions(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		badRequest(err.Error()).write(w)
		return
	}
	verdict, ok := verdictParam(r)
	if !ok {
		badRequest("verdict is allow, warn or deny").write(w)
		return
	}
	loaded, stale := c.state.decisions.Status()
	if !loaded {
		unavailable("the decisions were not read yet").write(w)
		return
	}
	now := micros(time.Now())
	account := r.URL.Query().Get("account")
	page, next := c.state.decisions.Page(r.URL.Query().Get("cursor"), n, func(d *usage.Decision) bool {
		return (account == "" || d.Account == account) && (verdict == "" || lineOf(d, now).Effective == verdict)
	})
	answer := struct {
		Decisions []decisionLine `json:"decisions"`
		Next      string         `json:"next_cursor"`
		Stale     string         `json:"stale,omitempty"`
	}{Decisions: []decisionLine{}, Next: next}
	if stale != nil {
		answer.Stale = stale.Error()
	}
	for i := range page {
		answer.Decisions = append(answer.Decisions, lineOf(&page[i], now))
	}
	writeJSON(w, answer)
}

func verdictParam(r *http.Request) (string, bool) {
	switch v := r.URL.Query().Get("verdict"); v {
	case "", "allow", "warn", "deny":
		return v, true
	}
	return "", false
}

func (c *console) getDecisionHistory(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		badRequest(err.Error()).write(w)
		return
	}
	verdict, ok := verdictParam(r)
	if !ok {
		badRequest("verdict is allow, warn or deny").write(w)
		return
	}
	var before uint64
	if s := r.URL.Query().Get("cursor"); s != "" {
		if before, err = strconv.ParseUint(s, 10, 64); err != nil {
			badRequest("cursor is the next_cursor of the page before").write(w)
			return
		}
	}
	if c.o.History == nil {
		unavailable("the console has no address of ClickHouse").write(w)
		return
	}
	found, err := c.o.History.Decisions(r.Context(), history.DecisionsQuery{Account: r.URL.Query().Get("account"), Verdict: verdict, Before: before, Limit: n})
	if err != nil {
		unavailable("ClickHouse does not answer: " + firstSentence(err.Error())).write(w)
		return
	}
	answer := struct {
		Decisions []decisionLine `json:"decisions"`
		Next      string         `json:"next_cursor"`
	}{Decisions: []decisionLine{}}
	now := micros(time.Now())
	for i := range found {
		l := lineOf(&found[i].Decision, now)
		l.Sequence = found[i].Sequence
		answer.Decisions = append(answer.Decisions, l)
	}
	if len(found) == n {
		answer.Next = strconv.FormatUint(found[n-1].Sequence, 10)
	}
	writeJSON(w, answer)
}

func (c *console) getAlerts(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		badRequest(err.Error()).write(w)
		return
	}
	writeJSON(w, struct {
		Episodes []usage.Alert `json:"episodes"`
	}{c.state.alerts.Newest(n)})
}

func (c *console) getDeadLetters(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, 50)
	if err != nil {
		badRequest(err.Error()).write(w)
		return
	}
	letters, counted, reasons := c.state.dead.Newest(n)
	c.state.mu.Lock()
	total := c.state.watch.deadTotal
	c.state.mu.Unlock()
	writeJSON(w, struct {
		// Total that are kept, Counted of them by reason (the newest).
		Total   uint64        `json:"total"`
		Counted int64         `json:"counted"`
		Reasons []reasonCount `json:"by_reason"`
		Newest  any           `json:"newest"`
	}{total, counted, reasons, letters})
}

// callSeries is one line of the history chart; its lists have a value a step.
type callSeries struct {
	Name   string  `json:"name"`
	Other  bool    `json:"other"`
	Admit  []int64 `json:"admitted"`
	Refuse []int64 `json:"refused"`
	Input  []int64 `json:"input_tokens"`
	Output []int64 `json:"output_tokens"`
}

func (c *console) getCallHistory(w http.ResponseWriter, r *http.Request) {
	q, p := callsQuery(r, time.Now())
	if p != nil {
		p.write(w)
		return
	}
	if c.o.History == nil {
		unavailable("the console has no address of ClickHouse").write(w)
		return
	}
	points, err := c.o.History.Calls(r.Context(), q)
	if err != nil {
		unavailable("ClickHouse does not answer: " + firstSentence(err.Error())).write(w)
		return
	}
	steps := int((q.To.Sub(q.From) + q.Step - 1) / q.Step)
	writeJSON(w, struct {
		From   int64         `json:"from_unix_seconds"`
		Step   int64         `json:"step_seconds"`
		Steps  int           `json:"steps"`
		Group  history.Group `json:"group"`
		Series []callSeries  `json:"series"`
	}{q.From.Unix(), int64(q.Step / time.Second), steps, q.Group, dense(points, steps)})
}

// callsQuery reads the range: from and to as RFC 3339, step in seconds.
func callsQuery(r *http.Request, now time.Time) (history.CallsQuery, *problem) {
	q := history.CallsQuery{To: now, Group: history.ByCode, Account: r.URL.Query().Get("account"), Top: historyTop}
	bad := func(detail string) *problem { p := badRequest(detail); return &p }
	values := r.URL.Query()
	var err error
	if s := values.Get("to"); s != "" {
		if q.To, err = time.Parse(time.RFC3339, s); err != nil {
			return q, bad("to is a time like 2026-01-02T15:04:05Z")
		}
	}
	q.From = q.To.Add(-15 * time.Minute)
	if s := values.Get("from"); s != "" {
		if q.From, err = time.Parse(time.RFC3339, s); err != nil {
			return q, bad("from is a time like 2026-01-02T15:04:05Z")
		}
	}
	if q.From.Unix() < 0 || !q.From.Before(q.To) || q.To.Sub(q.From) > 400*24*time.Hour {
		return q, bad("from must be before to, by at most 400 days, and after 1970")
	}
	switch g := history.Group(values.Get("group")); g {
	case "":
	case history.ByCode, history.ByAccount, history.ByModel:
		q.Group = g
	default:
		return q, bad("group is code, account or model")
	}
	span := q.To.Sub(q.From)
	q.Step = stepFor(span)
	if s := values.Get("step"); s != "" {
		n, err := strconv.ParseInt(s, 10, 32)
		if err != nil || n < 1 {
			return q, bad("step is a number of seconds from 1 on")
		}
		q.Step = time.Duration(n) * time.Second
	}
	if span/q.Step > maxSteps {
		return q, bad(fmt.Sprintf("that makes more than %d steps: choose a larger step or a shorter range", maxSteps))
	}
	// Steps begin at multiples of the step, so that the same moment stands in
	// the same step of every answer.
	q.From = q.From.Truncate(q.Step)
	if t := q.To.Truncate(q.Step); t.Before(q.To) {
		q.To = t.Add(q.Step)
	}
	return q, nil
}

// stepFor gives about 150 to 200 steps.
func stepFor(span time.Duration) time.Duration {
	for _, s := range []time.Duration{
		time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute,
		30 * time.Minute, time.Hour, 3 * time.Hour, 6 * time.Hour,
	} {
		if span/s <= 200 {
			return s
		}
	}
	return 24 * time.Hour
}

// dense makes a list with a value for every step of every group: admitted
// first, then by name, the others last.
func dense(points []history.CallsPoint, steps int) []callSeries {
	type key struct {
		name  string
		other bool
	}
	at := map[key]int{}
	out := []callSeries{}
	for _, p := range points {
		if p.Step < 0 || p.Step >= steps {
			continue
		}
		k := key{p.Name, p.Other}
		i, ok := at[k]
		if !ok {
			i = len(out)
			at[k] = i
			out = append(out, callSeries{Name: p.Name, Other: p.Other, Admit: make([]int64, steps), Refuse: make([]int64, steps), Input: make([]int64, steps), Output: make([]int64, steps)})
		}
		s := &out[i]
		s.Admit[p.Step] += p.Admitted
		s.Refuse[p.Step] += p.Refused
		s.Input[p.Step] += p.InputTokens
		s.Output[p.Step] += p.OutputTokens
	}
	slices.SortFunc(out, func(a, b callSeries) int {
		if a.Other != b.Other {
			if a.Other {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.Name, b.Name)
	})
	return out
}

func lineOf(d *usage.Decision, now usage.Micros) decisionLine {
	return decisionLine{
		ID: d.ID, Account: d.Account, LimitID: d.LimitID, Meter: string(d.Meter), Verdict: d.Verdict.String(), Effective: effective(d, now),
		Code: string(d.Code), Revision: d.Revision, Shard: d.Shard, Used: d.Used, Amount: d.Amount, Window: string(d.Window),
		PeriodStart: d.PeriodStart, PeriodEnd: d.PeriodEnd, PlanVersion: d.PlanVersion, DecidedAt: d.DecidedAt, Cause: d.Cause, ActionURL: d.ActionURL,
	}
}
