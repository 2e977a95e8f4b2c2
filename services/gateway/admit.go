package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/headers"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/target"
)

// Headers of an answer of /v1/admit.
const (
	StatusHeader     = "X-Tollkeeper-Status"
	CodeHeader       = refusal.CodeHeader
	DecisionIDHeader = refusal.DecisionIDHeader
	// UnknownHeader is set when the call passes under the policy for unknown
	// verdicts; the caller's event says so in admitted_unknown.
	UnknownHeader = "X-Tollkeeper-Admitted-Unknown"
	// EventIDHeader is the id that the call's event must have, with any source. It
	// says whether the call is recorded already: then the event adds the rest.
	EventIDHeader = "X-Tollkeeper-Event-Id"
	// RecordedHeader is set when the call's one unit came from leases: the gateway
	// has recorded the call, whether or not an event follows.
	RecordedHeader = "X-Tollkeeper-Recorded"
	// ModelHeader names the model of the call that is asked for.
	ModelHeader = "X-Tollkeeper-Model"
)

// admit answers GET /v1/admit, for proxies that ask before they forward
// (Caddy forward_auth, Traefik ForwardAuth, Envoy ext_authz, nginx auth_request).
//
// The API key is in the headers where the routes look for it. What is asked for is
// in X-Forwarded-Method, -Host and -Uri, with ?nginx=1 in X-Original-Method, -Host
// and -Uri (the others may be the client's own then), or in the query: method, host,
// uri, route, model, profile. Below /v1/admit/, where Envoy's path_prefix asks, it is
// the request itself: its method, host and the rest of its path; headers and query
// are the client's and say nothing. The route is the one named, else the one that the
// configuration has for host, path and method, else none. X-Tollkeeper-Model is
// believed: the caller sets it, or takes it off what its clients send.
//
// 200 admits; anything else is the whole answer for the client. ?nginx=1 is for
// auth_request, which knows 2xx, 401 and 403 only and makes 500 of the rest: what
// is not 401 is answered 403, and X-Tollkeeper-Status has the status that is meant.
//
// The caller posts an event for every call that it let through, whose id is the
// answer's X-Tollkeeper-Event-Id. Refusals are recorded here, and so is a call that
// limits of the tiers exact and leased concern: its unit was taken from leases of this
// gateway, and only this gateway's events can say so. The id says that, so that the
// caller's event counts what else the call has used, and not the call again, at
// whichever gateway and whenever it comes. Such limits on anything but calls can't be
// kept here, because the reservation would not be settled: those accounts are refused
// with 403.
type admit struct {
	gate   *gate.Gate
	proxy  *proxy
	key    func(*http.Request) string
	region string
	record func(r *http.Request, shard uint32, c *usage.Call) error
	now    func() usage.Micros
	asks   *prometheus.CounterVec
}

func newAsks(r prometheus.Registerer) (*prometheus.CounterVec, error) {
	asks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tollkeeper_gateway_admit_answers_total", Help: "Answers of /v1/admit: admitted, unknown (admitted under the policy for unknown verdicts), refused, unauthenticated.",
	}, []string{"outcome"})
	for _, o := range []string{"admitted", "unknown", "refused", "unauthenticated"} {
		asks.WithLabelValues(o)
	}
	return asks, r.Register(asks)
}

func (a *admit) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := a.now()
	id := gate.RequestID(r.Header.Get(gate.RequestIDHeader))
	w.Header().Set(gate.RequestIDHeader, id)
	req, profile, err := a.asked(r)
	if err != nil {
		f := *err
		f.RequestID = id
		a.refuse(w, r, profile, &f)
		return
	}
	key := a.key(r)
	if key == "" {
		a.refuse(w, r, profile, &refusal.Refusal{Code: refusal.Unauthenticated, Detail: "The request carries no API key.", RequestID: id})
		return
	}
	hash := gate.HashKey(key)
	caller, found := a.gate.Account(&hash)
	switch found {
	case gate.Found:
	case gate.NotFound:
		a.refuse(w, r, profile, &refusal.Refusal{Code: refusal.Unauthenticated, Detail: "There is no such API key.", RequestID: id})
		return
	default:
		a.refuse(w, r, profile, &refusal.Refusal{Code: usage.BillingStateUnknown, Detail: "The directory of accounts could not be read, so the API key can't be checked.", RequestID: id})
		return
	}
	keyID := ""
	if caller.KeyID != nil {
		keyID = *caller.KeyID
	}
	call := func() usage.Call {
		c := usage.Call{
			Time: began, Account: caller.Account.ID(), KeyID: keyID, RequestID: id, Method: req.Method, Route: req.Route, Model: req.Model,
			Region: a.region, Duration: max(int64(a.now()-began), 0),
		}
		c.TraceID, c.SpanID, c.TraceFlags, _ = gate.ParseTraceparent(r.Header.Get("Traceparent"))
		return c
	}
	_, shard, known := caller.Account.Root()
	if meters := a.gate.Measured(caller.Account, req); len(meters) > 0 {
		a.refuse(w, r, profile, &refusal.Refusal{Code: usage.CostExceedsLimit, RequestID: id, Detail: fmt.Sprintf(
			"The account has a limit on %s that is kept to the unit, which needs the gateway to see the call itself: send it through the gateway.", meters[0])})
		return
	}
	v, ticket := a.gate.Take(r.Context(), caller.Account, req, nil)
	event := ledger.AdmittedID(ticket.Leased())
	if v.Allowed && ticket.Leased() {
		c := call()
		c.EventID = event
		c.Status = http.StatusOK
		ticket.Stamp(&c)
		if err := a.record(r, shard, &c); err != nil || !known {
			a.refuse(w, r, profile, &refusal.Refusal{Code: refusal.MeteringUnavailable, RequestID: id})
			return
		}
		w.Header().Set(RecordedHeader, "1")
	}
	if v.Allowed {
		w.Header().Set(AccountHeader, headers.Safe(caller.Account.ID()))
		w.Header().Set(KeyIDHeader, headers.Safe(keyID))
		w.Header().Set(EventIDHeader, event)
		w.Header().Set("Cache-Control", "no-store")
		outcome := "admitted"
		if v.Unknown {
			outcome = "unknown"
			w.Header().Set(UnknownHeader, "1")
		}
		a.asks.WithLabelValues(outcome).Inc()
		w.WriteHeader(http.StatusOK)
		return
	}
	f := a.gate.Refusal(caller.Account, req, v, id)
	if known {
		c := call()
		c.Status, c.Code = uint16(f.HTTPStatus()), v.Code
		if v.Decision != nil {
			c.DecisionID = v.Decision.ID
		}
		_ = a.record(r, shard, &c) // told already
	}
	a.refuse(w, r, profile, f)
}

func (a *admit) refuse(w http.ResponseWriter, r *http.Request, p refusal.Profile, f *refusal.Refusal) {
	status := f.HTTPStatus()
	outcome := "refused"
	if status == http.StatusUnauthorized {
		outcome = "unauthenticated"
	}
	a.asks.WithLabelValues(outcome).Inc()
	w.Header().Set(StatusHeader, strconv.Itoa(status))
	w.Header().Set(CodeHeader, string(f.Code))
	if r.URL.Path == admitPath && r.URL.Query().Get("nginx") == "1" && status != http.StatusUnauthorized {
		f.SetHeaders(w.Header())
		if p == refusal.Anthropic {
			w.Header().Set("Request-Id", f.RequestID)
		}
		w.WriteHeader(http.StatusForbidden)
		return
	}
	a.proxy.answer(w, r, f, p)
}

const admitPath = "/v1/admit"

// asked is what the caller wants to know about, or why that can't be told.
func (a *admit) asked(r *http.Request) (req gate.Request, profile refusal.Profile, err *refusal.Refusal) {
	host, uri := r.Host, ""
	if _, ok := strings.CutPrefix(r.URL.Path, admitPath+"/"); ok {
		req = gate.Request{Method: r.Method, Model: r.Header.Get(ModelHeader)}
		if uri, ok = strings.CutPrefix(r.RequestURI, admitPath); !ok {
			return req, profile, badTarget("The path does not begin with " + admitPath + " as it is written here.")
		}
	} else {
		q := r.URL.Query()
		first := func(name, header string) string {
			if v := q.Get(name); v != "" {
				return v
			}
			return r.Header.Get(header)
		}
		from := "X-Forwarded-"
		if q.Get("nginx") == "1" {
			from = "X-Original-"
		}
		req = gate.Request{Method: first("method", from+"Method"), Model: first("model", ModelHeader), Route: q.Get("route")}
		host, uri = first("host", from+"Host"), cmp.Or(first("uri", from+"Uri"), "/")
		if profile = refusal.Profile(q.Get("profile")); !profile.Valid() {
			profile = refusal.Problem
		}
	}
	t, problem := target.Parse(req.Method, uri)
	if problem == "" && headers.OtherMethod(r.Header, req.Method) {
		problem = otherMethod
	}
	if problem != "" {
		return req, profile, badTarget(problem)
	}
	req.Method, req.Model, req.Route = usage.CleanText(req.Method), usage.CleanText(req.Model), usage.CleanText(req.Route)
	found := a.named(req.Route)
	if req.Route == "" {
		if found, problem = a.proxy.agreed(host, &t, req.Method); problem != "" {
			return req, profile, badTarget(problem)
		}
		if found != nil {
			req.Route = found.o.Name
		}
	}
	if found != nil {
		if profile == "" {
			profile = found.o.Profile
		}
		if req.Model == "" && found.o.Model.JSON == "" && found.model != nil {
			m, err := found.model(r)
			var told *refusal.Refusal
			if errors.As(err, &told) {
				return req, profile, told
			}
			req.Model = usage.CleanText(m)
		}
		req.Unused = found.unused(req.Method, t.Path, req.Model)
	}
	return req, profile, nil
}

func badTarget(problem string) *refusal.Refusal {
	return &refusal.Refusal{Code: refusal.BadRequest, Detail: problem}
}

func (a *admit) named(name string) *route {
	for _, r := range a.proxy.routes {
		if name != "" && r.o.Name == name {
			return r
		}
	}
	return nil
}
