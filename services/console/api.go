package console

import (
	"fmt"
	"net/http"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/corrected"
	"github.com/tollkeeper/tollkeeper/services/console/internal/counters"
	"github.com/tollkeeper/tollkeeper/services/console/internal/explained"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/console/internal/limits"
	"github.com/tollkeeper/tollkeeper/services/console/internal/plansapi"
	"github.com/tollkeeper/tollkeeper/services/console/internal/series"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Bounds of what one request may ask for.
const (
	defaultPage = 100
	maxPage     = 1000
	askedUsage  = 200
)

// listed tells a person where the routes are.
const listed = "/openapi.yaml lists what there is"

func (c *console) handler() http.Handler { return c.routes().Handler(listed) }

// routes are those of /openapi.yaml, and the page's.
func (c *console) routes() problem.Routes {
	plansDoor := &plansapi.Door{Applier: c.applier, Now: c.appliedNow, Changed: c.plansChanged, Log: c.log}
	routes := problem.Routes{}
	for pattern, h := range map[string]http.HandlerFunc{
		"GET /v1/accounts":               c.getAccounts,
		"GET /v1/accounts/{id...}":       c.getAccount,
		"GET /v1/usage":                  c.getUsage,
		"GET /v1/plans":                  plansDoor.Get,
		"PUT /v1/plans":                  plansDoor.Put,
		"GET /v1/decisions":              c.getDecisions,
		"GET /v1/decisions/history":      c.getDecisionHistory,
		"GET /v1/decisions/{id}/explain": explained.Handler(c.explainer, c.log),
		"GET /v1/requests/{id}/explain":  explained.Handler(c.explainer, c.log),
		"GET /v1/corrections":            corrected.Get(c.o.History, c.historyFreshness),
		"POST /v1/corrections":           corrected.Post(c.corrector, c.log),
		"GET /v1/history/calls":          c.getCallHistory,
		"GET /v1/alerts":                 c.getAlerts,
		"GET /v1/deadletters":            c.getDeadLetters,
		"GET /v1/audit":                  c.audit.Handler,
		"GET /v1/health":                 func(w http.ResponseWriter, _ *http.Request) { front.WriteJSON(w, c.health(time.Now())) },
		front.LivePattern:                c.handleLive,
	} {
		routes[pattern] = h
	}
	routes.Add(commonRoutes(c.o))
	return routes
}

// commonRoutes are there before NATS is.
func commonRoutes(o Options) problem.Routes {
	routes := problem.Routes{"GET /openapi.yaml": openapi.Handler(openapi.Console)}
	routes.Add(telemetry.Routes(telemetry.HandlerOptions{Gatherer: o.Registry, Readiness: o.Readiness}))
	routes.Add(front.PageRoutes(o.Web))
	return routes
}

// waitingHandler answers while NATS was not reached yet.
func waitingHandler(o Options) http.Handler {
	routes := commonRoutes(o)
	routes["/v1/"] = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		front.Unavailable("the console has not reached NATS yet: /readyz says why").Write(w)
	})
	return routes.Handler(listed)
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

// States of an account.
const (
	statusOpen    = "open"    // the plans name it
	statusRemoved = "removed" // they did: its keys are refused
	statusUnnamed = "unnamed" // only calls name it: no plan limits it
)

// accountLine is an account.
type accountLine struct {
	ID     string `json:"id"`
	Parent string `json:"parent,omitempty"`
	Plan   string `json:"plan,omitempty"`
	Root   string `json:"root"`
	Shard  uint32 `json:"shard"`
	Status string `json:"status"`
	// Verdict is the severest that gateways hold along its path; deny of an account
	// that was removed.
	Verdict string `json:"verdict"`
	Keys    int    `json:"keys"`
}

// line describes an account; whether the plans name it, or did, says its status.
func (c *console) line(b *book, id string, now usage.Micros) accountLine {
	root, named := b.applied.Root(b.index, id)
	l := accountLine{ID: id, Root: root, Shard: ledger.ShardOf(root, c.shards), Status: statusUnnamed, Verdict: c.state.decisions.Worst(id, now).String()}
	a, open := b.index.Account(id)
	switch {
	case open:
		worst := usage.Allow
		for _, step := range b.index.Path(id) {
			worst = max(worst, c.state.decisions.Worst(step, now))
		}
		l.Parent, l.Plan, l.Status, l.Verdict, l.Keys = a.Parent, a.Plan, statusOpen, worst.String(), len(a.Keys)
	case named:
		l.Status, l.Verdict = statusRemoved, usage.Deny.String()
	}
	return l
}

// settle makes an account's limits what a refusal of this moment would say.
func (c *console) settle(u *ledger.AccountUsage, now usage.Micros) {
	for i := range u.Limits {
		l := &u.Limits[i]
		if d, held := c.state.decisions.Held(u.ID, l.LimitID); held {
			limits.Settle(l, &d, now)
		} else {
			limits.Settle(l, nil, now)
		}
	}
}

// settleAll makes the counters of shards what they are now, and says how current.
func (c *console) settleAll(a *counters.Answer, now time.Time) {
	at := c.now()
	for i := range a.Accounts {
		c.settle(&a.Accounts[i].AccountUsage, at)
	}
	shards := c.health(now).Shards
	parts := []freshness.Freshness{freshness.Now(now)}
	for i := range a.Shards {
		s := &a.Shards[i]
		s.Freshness = shards[s.Shard].Fresh(s.Error, now)
		parts = append(parts, s.Freshness)
	}
	a.Freshness = freshness.Worst(parts...)
}

func (c *console) getAccounts(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	b, named, err := c.book(r.Context())
	if err != nil {
		front.Unavailable("the plans can't be read: " + err.Error()).Write(w)
		return
	}
	query := r.URL.Query()
	cursor, part, plan, parent := query.Get("cursor"), query.Get("q"), query.Get("plan"), query.Get("parent")
	if usage.CleanText(cursor) != cursor {
		front.BadRequest(front.NoCursor).Write(w)
		return
	}
	now := c.now()
	answer := struct {
		Accounts  []accountLine       `json:"accounts"`
		Next      string              `json:"next_cursor"`
		Total     int                 `json:"total"`
		Freshness freshness.Freshness `json:"freshness"`
	}{Accounts: []accountLine{}, Total: len(b.ids), Freshness: freshness.Worst(named, c.fresh(&c.state.decisions, time.Now()))}
	at := sort.SearchStrings(b.ids, cursor)
	for _, id := range b.ids[at:] {
		if id == cursor && cursor != "" {
			continue
		}
		if part != "" && !strings.Contains(id, part) {
			continue
		}
		l := c.line(b, id, now)
		if plan != "" && l.Plan != plan || parent != "" && l.Parent != parent {
			continue
		}
		if len(answer.Accounts) == n {
			answer.Next = answer.Accounts[n-1].ID
			break
		}
		answer.Accounts = append(answer.Accounts, l)
	}
	front.WriteJSON(w, answer)
}

// keyLine is a key without its hash.
type keyLine struct {
	ID string `json:"id"`
}

func (c *console) getAccount(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	b, named, err := c.book(r.Context())
	if err != nil {
		front.Unavailable("the plans can't be read: " + err.Error()).Write(w)
		return
	}
	now := c.now()
	l := c.line(b, id, now)
	open := l.Status == statusOpen
	answer := struct {
		accountLine
		// Known says that the plans name it.
		Known     bool                `json:"known"`
		Path      []string            `json:"path"`
		KeyIDs    []keyLine           `json:"key_ids"`
		Usage     *counters.Account   `json:"usage"`
		UsageWhy  string              `json:"usage_error,omitempty"`
		Decisions []decisionLine      `json:"decisions"`
		Freshness freshness.Freshness `json:"freshness"`
	}{accountLine: l, Known: open, Path: []string{id}, KeyIDs: []keyLine{}, Decisions: []decisionLine{}}
	if open {
		answer.Path = b.index.Path(id)
		a, _ := b.index.Account(id)
		for _, k := range a.Keys {
			answer.KeyIDs = append(answer.KeyIDs, keyLine{k.ID})
		}
	}
	reply, err := c.counters.Shard(r.Context(), l.Shard, ledger.UsageRequest{Accounts: []string{id}})
	if err != nil {
		answer.UsageWhy = err.Error()
	}
	for _, u := range reply.Accounts {
		if u.ID == id {
			c.settle(&u, now)
			answer.Usage = &counters.Account{Shard: l.Shard, AccountUsage: counters.Tidy(u)}
			if open {
				answer.Verdict = max(limits.Worst(u.Limits), c.worstAbove(answer.Path, now)).String()
			}
		}
	}
	for _, step := range answer.Path {
		for _, d := range c.state.decisions.Of(step) {
			answer.Decisions = append(answer.Decisions, views.LineOf(&d, now))
		}
	}
	if l.Status == statusUnnamed && answer.Usage == nil && answer.UsageWhy == "" && len(answer.Decisions) == 0 {
		front.Problem{Status: http.StatusNotFound, Code: front.CodeNotFound, Detail: fmt.Sprintf("neither the plans nor a call name the account %q", id)}.Write(w)
		return
	}
	at := time.Now()
	answer.Freshness = freshness.Worst(named, c.fresh(&c.state.decisions, at), c.health(at).Shards[l.Shard].Fresh(answer.UsageWhy, at))
	front.WriteJSON(w, answer)
}

// worstAbove is the severest verdict that gateways hold of the accounts above one.
func (c *console) worstAbove(path []string, now usage.Micros) usage.Verdict {
	worst := usage.Allow
	for _, step := range path[min(1, len(path)):] {
		worst = max(worst, c.state.decisions.Worst(step, now))
	}
	return worst
}

func (c *console) getUsage(w http.ResponseWriter, r *http.Request) {
	top, err := intParam(r, "top", 20, 1, ledger.MaxUsageAccounts)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	ids := r.URL.Query()["account"]
	if len(ids) > askedUsage {
		front.BadRequest(fmt.Sprintf("%d accounts are asked for, at most %d are possible", len(ids), askedUsage)).Write(w)
		return
	}
	if len(ids) == 0 {
		answer := c.counters.All(r.Context(), ledger.UsageRequest{Top: top})
		answer.Accounts = answer.Accounts[:min(top, len(answer.Accounts))]
		c.settleAll(&answer, time.Now())
		front.WriteJSON(w, answer)
		return
	}
	b, _, err := c.book(r.Context())
	if err != nil {
		front.Unavailable("the plans can't be read: " + err.Error()).Write(w)
		return
	}
	byShard := map[uint32][]string{}
	for _, id := range ids {
		root, _ := b.applied.Root(b.index, id)
		s := ledger.ShardOf(root, c.shards)
		byShard[s] = append(byShard[s], id)
	}
	answer := c.counters.Each(r.Context(), func(s uint32) (ledger.UsageRequest, bool) {
		return ledger.UsageRequest{Accounts: byShard[s]}, len(byShard[s]) > 0
	})
	c.settleAll(&answer, time.Now())
	front.WriteJSON(w, answer)
}

type decisionLine = views.DecisionLine

func (c *console) getDecisions(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	verdict, ok := verdictParam(r)
	if !ok {
		front.BadRequest("verdict is allow, warn or deny").Write(w)
		return
	}
	cursor := r.URL.Query().Get("cursor")
	if cursor != "" && !views.IsCursor(cursor, c.shards) {
		front.BadRequest(front.NoCursor).Write(w)
		return
	}
	if !c.state.decisions.Loaded() {
		front.Unavailable("the decisions were not read yet").Write(w)
		return
	}
	now := c.now()
	account := r.URL.Query().Get("account")
	page, next := c.state.decisions.Page(cursor, n, func(d *usage.Decision) bool {
		return (account == "" || d.Account == account) && (verdict == "" || views.LineOf(d, now).Effective == verdict)
	})
	answer := struct {
		Decisions []decisionLine      `json:"decisions"`
		Next      string              `json:"next_cursor"`
		Freshness freshness.Freshness `json:"freshness"`
	}{Decisions: []decisionLine{}, Next: next, Freshness: c.fresh(&c.state.decisions, time.Now())}
	for i := range page {
		answer.Decisions = append(answer.Decisions, views.LineOf(&page[i], now))
	}
	front.WriteJSON(w, answer)
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
		front.BadRequest(err.Error()).Write(w)
		return
	}
	verdict, ok := verdictParam(r)
	if !ok {
		front.BadRequest("verdict is allow, warn or deny").Write(w)
		return
	}
	before, err := front.Before(r)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	if c.o.History == nil {
		front.Unavailable("the console has no address of ClickHouse").Write(w)
		return
	}
	found, err := c.o.History.Decisions(r.Context(), history.DecisionsQuery{Account: r.URL.Query().Get("account"), Verdict: verdict, Before: before, Limit: n})
	if err != nil {
		front.Unavailable("ClickHouse does not answer: " + health.FirstSentence(err.Error())).Write(w)
		return
	}
	answer := struct {
		Decisions []decisionLine      `json:"decisions"`
		Next      string              `json:"next_cursor"`
		Freshness freshness.Freshness `json:"freshness"`
	}{Decisions: []decisionLine{}, Freshness: c.historyFreshness(time.Now())}
	now := c.now()
	for i := range found {
		l := views.LineOf(&found[i].Decision, now)
		l.Sequence = found[i].Sequence
		answer.Decisions = append(answer.Decisions, l)
	}
	if len(found) == n {
		answer.Next = strconv.FormatUint(found[n-1].Sequence, 10)
	}
	front.WriteJSON(w, answer)
}

func (c *console) getAlerts(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	front.WriteJSON(w, struct {
		Episodes  []usage.Alert       `json:"episodes"`
		Freshness freshness.Freshness `json:"freshness"`
	}{c.state.alerts.Newest(n), c.fresh(&c.state.alertsReader, time.Now())})
}

func (c *console) getDeadLetters(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, 50)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	letters, counted, reasons := c.state.dead.Newest(n)
	c.state.mu.Lock()
	total := c.state.watch.deadTotal
	c.state.mu.Unlock()
	front.WriteJSON(w, struct {
		// Total that are kept, as of a moment ago, Counted of them by reason (the newest).
		Total   uint64        `json:"total"`
		Counted int64         `json:"counted"`
		Reasons []reasonCount `json:"by_reason"`
		Newest  any           `json:"newest"`

		Freshness freshness.Freshness `json:"freshness"`
	}{max(total, uint64(counted)), counted, reasons, letters, c.fresh(&c.state.deadReader, time.Now())})
}

func (c *console) getCallHistory(w http.ResponseWriter, r *http.Request) {
	q, err := series.Query(r.URL.Query(), time.Now())
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	if c.o.History == nil {
		front.Unavailable("the console has no address of ClickHouse").Write(w)
		return
	}
	points, err := c.o.History.Calls(r.Context(), q)
	if err != nil {
		front.Unavailable("ClickHouse does not answer: " + health.FirstSentence(err.Error())).Write(w)
		return
	}
	steps := int((q.To.Sub(q.From) + q.Step - 1) / q.Step)
	front.WriteJSON(w, struct {
		From   int64          `json:"from_unix_seconds"`
		Step   int64          `json:"step_seconds"`
		Steps  int            `json:"steps"`
		Group  history.Group  `json:"group"`
		Series []series.Calls `json:"series"`

		Freshness freshness.Freshness `json:"freshness"`
	}{q.From.Unix(), int64(q.Step / time.Second), steps, q.Group, series.Dense(points, steps), c.historyFreshness(time.Now())})
}
