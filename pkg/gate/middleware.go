package gate

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/answer"
	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/ids"
	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/patience"
	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/report"
	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// RequestIDHeader carries the id of a request to the upstream and to the client.
const RequestIDHeader = "X-Request-Id"

// MiddlewareOptions say how one route is metered.
type MiddlewareOptions struct {
	// Route is the route's name in limits' filters and in events; cleaned as by
	// usage.CleanText.
	Route string
	// Region goes into events, likewise; may be empty.
	Region string
	// Profile is the form of refusals.
	Profile refusal.Profile
	// Key takes the API key from a request, empty when there is none; nil means
	// KeyFromHeaders of DefaultKeyHeaders.
	Key func(*http.Request) string
	// Model says which model a request asks for; nil means none. It is called
	// for authenticated requests only and may read the body if it puts it back.
	// A *refusal.Refusal as the error is answered as it is.
	Model func(*http.Request) (string, error)
	// Bound says what a call can cost at most, for limits of the tiers exact and
	// leased that count these meters; nil, and what it does not say, means that it
	// is not known: such calls are refused. It may change the request, so that the
	// upstream keeps to the bounds. A *refusal.Refusal as the error is answered as
	// it is.
	Bound func(r *http.Request, model string, meters []usage.Meter) (usage.Quantities, error)
	// Unused says which meters a call can't use: limits on them do not concern it. It
	// must be certain. Nil: it may use all.
	Unused func(r *http.Request, model string) usage.MeterSet
	// Lifetime bounds how long calls take, for what is reserved for them; ten
	// minutes when 0.
	Lifetime time.Duration
	// Voidable says that the handler tells of calls that reached nobody
	// (Report.Unserved), and of all others when they are sent (Report.Sent).
	Voidable bool
	// Time is the event time of a request when it is not the clock's; nil means
	// the clock. Calls whose units came from leases have the ledger's time.
	Time func(r *http.Request, now time.Time) time.Time
}

// DefaultKeyHeaders are looked at in this order; of Authorization the scheme
// Bearer alone counts.
func DefaultKeyHeaders() []string { return []string{"Authorization", "X-Api-Key"} }

// KeyFromHeaders returns a function that takes the API key from the first of
// these headers that has one.
func KeyFromHeaders(names ...string) func(*http.Request) string { return ids.Key(names...) }

// HashKey returns what the directory knows an API key by. The key itself is kept
// nowhere.
func HashKey(key string) KeyHash { return sha256.Sum256([]byte(key)) }

// settleTimeout bounds how long a call waits for room in a full outbox, or for
// the disk where calls are spooled before they are answered.
const settleTimeout = 5 * time.Second

// Middleware admits, refuses and records the calls to next. A call's record is
// with the outbox before its client can have seen the end of the answer: the last
// byte of an answer whose length was announced is held back until then, and an
// answer of unknown length ends when the handler returns. Only what is flushed
// explicitly goes out before (an answer of unknown length stays open even so).
func (g *Gate) Middleware(o MiddlewareOptions, next http.Handler) http.Handler {
	if o.Key == nil {
		o.Key = KeyFromHeaders(DefaultKeyHeaders()...)
	}
	o.Route, o.Region = usage.CleanText(o.Route), usage.CleanText(o.Region)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := exchange{g: g, o: &o, began: g.now()}
		x.serve(w, r, next)
	})
}

// Report lets a handler behind Middleware say what a call has used. Its methods
// do nothing on nil. It is for the handler's goroutine, until it returns.
type Report = report.Report

type reportKey struct{}

// ReportFrom returns the report of the call whose request has this context; nil
// when it did not pass a Middleware.
func ReportFrom(ctx context.Context) *Report {
	r, _ := ctx.Value(reportKey{}).(*Report)
	return r
}

// exchange is one request on its way.
type exchange struct {
	g      *Gate
	o      *MiddlewareOptions
	began  time.Time
	caller Caller
	shard  uint32
	call   usage.Call
	ticket Ticket
}

func (x *exchange) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	id := RequestID(r.Header.Get(RequestIDHeader))
	w.Header().Set(RequestIDHeader, id)
	key := x.o.Key(r)
	if key == "" {
		x.refuseUnmetered(w, r, unauthenticated, &refusal.Refusal{Code: refusal.Unauthenticated, Detail: "The request carries no API key.", RequestID: id})
		return
	}
	hash := HashKey(key)
	caller, found := x.g.Account(&hash)
	if found != Found {
		if found == NotFound {
			x.refuseUnmetered(w, r, unauthenticated, &refusal.Refusal{Code: refusal.Unauthenticated, Detail: "There is no such API key.", RequestID: id})
			return
		}
		x.g.metrics.refused(usage.BillingStateUnknown)
		x.refuseUnmetered(w, r, refusedOutcome, &refusal.Refusal{Code: usage.BillingStateUnknown, Detail: "The directory of accounts could not be read, so the API key can't be checked.", RequestID: id})
		return
	}
	x.caller = caller
	var known bool
	if _, x.shard, known = caller.Account.Root(); !known {
		// A key can be there before its account, or after it. Where the call's
		// record belongs must not be guessed.
		x.g.metrics.refused(usage.BillingStateUnknown)
		x.refuseUnmetered(w, r, refusedOutcome, &refusal.Refusal{Code: usage.BillingStateUnknown, Detail: "The account of the API key is not in the directory.", RequestID: id})
		return
	}
	model := ""
	if x.o.Model != nil {
		if r.Header.Get("Expect") != "" && x.refuseEarly(w, r, id) {
			return
		}
		var err error
		if model, err = x.o.Model(r); err != nil {
			x.refuseUnmetered(w, r, unreadable, asRefusal(err, id))
			return
		}
	}
	model = usage.CleanText(model) // what is admitted is what is counted
	x.begin(r, id, model)
	req := x.request(r, model)
	cost, err := x.bound(r, req)
	if err != nil {
		if f := asRefusal(err, id); f.Code == usage.CostExceedsLimit {
			x.g.metrics.refused(f.Code)
			x.refuseWith(w, r, f)
		} else {
			x.refuseUnmetered(w, r, unreadable, f)
		}
		return
	}
	v, ticket := x.g.Take(r.Context(), caller.Account, req, cost)
	if !v.Allowed {
		x.refuse(w, r, req, v)
		return
	}
	x.ticket = ticket
	if x.g.full.Refuses(x.began) {
		x.ticket.Void()
		x.refuseUnmetered(w, r, unmetered, &refusal.Refusal{Code: refusal.MeteringUnavailable, RequestID: id})
		return
	}
	if v.Unknown {
		x.call.Flags |= usage.AdmittedUnknown
	}
	x.ticket.Stamp(&x.call)
	x.pass(w, r, next)
}

// request is what limits look at.
func (x *exchange) request(r *http.Request, model string) Request {
	req := Request{Model: model, Route: x.o.Route, Method: usage.CleanText(r.Method)}
	if x.o.Unused != nil && !x.g.fine(x.caller.Account) {
		req.Unused = x.o.Unused(r, model)
	}
	return req
}

// bound returns what the call can cost where a limit of the tiers exact and leased
// wants to know it; nil: one call.
func (x *exchange) bound(r *http.Request, req Request) (*Cost, error) {
	meters := x.g.Measured(x.caller.Account, req)
	if len(meters) == 0 && (!x.o.Voidable || len(x.caller.Account.Leased()) == 0) {
		return nil, nil
	}
	cost := &Cost{Lifetime: x.o.Lifetime, Voidable: x.o.Voidable}
	if x.o.Bound == nil || len(meters) == 0 {
		return cost, nil
	}
	var err error
	cost.Bounds, err = x.o.Bound(r, req.Model, meters)
	return cost, err
}

// refuseEarly answers a client that waits to be told whether to send its body at
// all (100-continue), where no body could change the answer.
func (x *exchange) refuseEarly(w http.ResponseWriter, r *http.Request, id string) bool {
	req := x.request(r, "")
	v := x.g.Violations(x.caller.Account, req, 1)
	if len(v) == 0 || len(v[0].Filter.Models) > 0 {
		return false
	}
	x.g.metrics.refused(v[0].Code)
	x.begin(r, id, "")
	x.refuse(w, r, req, Verdict{Code: v[0].Code, Decision: v[0]})
	return true
}

// begin fills in what is known of the call before it is decided.
func (x *exchange) begin(r *http.Request, id, model string) {
	at := x.g.table.Load().EventTime(x.began)
	if x.o.Time != nil {
		// A time that no event may have would cost the whole event.
		if t := x.o.Time(r, at); usage.At(t) >= usage.OldestTimeMicros && t.Sub(at) <= usage.MaxFuture {
			at = t
		}
	}
	x.call = usage.Call{
		Time: usage.At(at), Account: x.caller.Account.ID(), RequestID: id,
		Method: usage.CleanText(r.Method), Route: x.o.Route, Model: model, Region: x.o.Region,
	}
	if x.caller.KeyID != nil {
		x.call.KeyID = *x.caller.KeyID
	}
	x.call.TraceID, x.call.SpanID, x.call.TraceFlags, _ = ParseTraceparent(r.Header.Get("Traceparent"))
}

// pass serves an admitted call and records it.
func (x *exchange) pass(w http.ResponseWriter, r *http.Request, next http.Handler) {
	x.g.metrics.outcomes[admitted].Inc()
	told := report.New(x.call.Account, x.call.KeyID, x.ticket.Sending())
	r = r.WithContext(context.WithValue(r.Context(), reportKey{}, told))
	r.Header.Set(RequestIDHeader, x.call.RequestID)
	out := answer.New(w, RequestIDHeader, x.call.RequestID, r.Method == http.MethodHead)
	returned := false
	defer func() {
		// Also when the handler panics, as httputil.ReverseProxy does when the
		// upstream breaks off: the call took place.
		x.call.Status = uint16(out.Status(returned))
		x.call.Quantities = report.Readings(told)
		if _, reported := x.call.Quantities.BuiltIn(usage.BytesIndex); !reported {
			if size, seen := out.Bytes(); seen {
				x.call.Quantities.SetBuiltIn(usage.BytesIndex, size)
			}
		}
		x.call.Ending = report.Ending(told, out.End(returned, r.Context().Err() != nil))
		x.release(told)
		err := x.settle(r.Context())
		switch {
		case !returned: // the panic goes on
		case err != nil && x.g.o.AbortUnsettled:
			panic(http.ErrAbortHandler)
		default:
			out.Release()
		}
	}()
	next.ServeHTTP(out, r)
	returned = true
}

// release settles what was reserved: with what was reported, and with the whole
// bound where nothing was, as when a client has hung up, or where it is said to be
// unknown. An answer that tells of a failure and reports nothing has used nothing.
func (x *exchange) release(r *Report) {
	if unserved, uncounted := report.Free(r); unserved && x.ticket.Void() || uncounted && !x.ticket.Leased() {
		x.call.Quantities = usage.Quantities{}
		x.call.Quantities.SetBuiltIn(usage.CallsIndex, 0)
		return
	}
	failed := x.call.Status >= 400 && x.call.Status != StatusClientGone
	measured, nothing := report.Settle(r, &x.call, failed, x.caller.Account.Counts, x.ticket.Reserved)
	x.ticket.SettleKnown(&measured, nothing)
}

// refuse answers and records a call that was not admitted.
func (x *exchange) refuse(w http.ResponseWriter, r *http.Request, req Request, v Verdict) {
	if v.Decision != nil {
		x.call.DecisionID = v.Decision.ID
	}
	x.refuseWith(w, r, x.g.Refusal(x.caller.Account, req, v, x.call.RequestID))
}

func (x *exchange) refuseWith(w http.ResponseWriter, r *http.Request, f *refusal.Refusal) {
	x.g.metrics.outcomes[refusedOutcome].Inc()
	x.call.Code, x.call.Status = f.Code, uint16(f.HTTPStatus())
	if x.g.full.Refuses(x.began) {
		x.g.metrics.unsettled.Inc() // an answer that is held waits for no room
	} else {
		_ = x.settle(r.Context()) // told already; there is no answer to hold back
	}
	x.write(w, r, f)
}

// Refusal makes the answer to a call that Admit has refused with v.
func (g *Gate) Refusal(a *Account, req Request, v Verdict, requestID string) *refusal.Refusal {
	f := &refusal.Refusal{Code: v.Code, Decision: v.Decision, Detail: v.Detail, Requested: -1, RequestID: requestID, Now: g.LedgerNow()}
	switch {
	case v.Decision == nil:
		if f.Detail == "" {
			f.Detail = "Whether this call is covered could not be found out in time."
		}
		return f
	case v.Requested > 0:
		f.Requested = v.Requested
	case v.Decision.Meter == usage.Calls:
		f.Requested = 1
	}
	f.Violated = g.Violations(a, req, refusal.MaxViolated)
	if !slices.ContainsFunc(f.Violated, func(d *usage.Decision) bool {
		return d.LimitID == v.Decision.LimitID && d.Account == v.Decision.Account
	}) {
		// A lease's answer is here before the feed has brought its decision.
		f.Violated = append([]*usage.Decision{v.Decision}, f.Violated[:min(len(f.Violated), refusal.MaxViolated-1)]...)
	}
	return f
}

func (x *exchange) refuseUnmetered(w http.ResponseWriter, r *http.Request, o outcome, f *refusal.Refusal) {
	x.g.metrics.outcomes[o].Inc()
	x.write(w, r, f)
}

func (x *exchange) write(w http.ResponseWriter, r *http.Request, f *refusal.Refusal) {
	if err := f.Write(w, x.o.Profile); err != nil && r.Context().Err() == nil {
		x.g.o.Logger.Debug().Err(err).Str("request_id", f.RequestID).Msg("a refusal could not be delivered")
	}
}

// settle records the call, and counts and tells when it can't be.
func (x *exchange) settle(ctx context.Context) error {
	x.call.Duration = max(x.g.now().Sub(x.began).Microseconds(), 0)
	// A client that hangs up does not get its call for free.
	wait := patience.New(ctx, settleTimeout)
	defer wait.Stop()
	err := x.g.SettleShard(wait, x.shard, &x.call)
	if err != nil && x.g.logs.Allow(x.g.now()) {
		x.g.o.Logger.Error().Err(err).Str("account", x.call.Account).Str("request_id", x.call.RequestID).
			Msg("a call could not be metered (tollkeeper_gate_unsettled_total counts all of them)")
	}
	return err
}

func asRefusal(err error, requestID string) *refusal.Refusal {
	var f *refusal.Refusal
	if errors.As(err, &f) {
		c := *f
		c.RequestID = requestID
		return &c
	}
	return &refusal.Refusal{Code: refusal.BadRequest, Detail: "The model that the request asks for can't be told.", RequestID: requestID}
}

// RequestID returns a client's own id of its request when it is fit for logs and
// events, else a new one.
func RequestID(given string) string { return ids.Request(given) }

// ParseTraceparent reads a W3C traceparent header; what is not one is no trace.
func ParseTraceparent(s string) (trace [16]byte, span [8]byte, flags byte, ok bool) {
	return usage.ParseTraceparent(s)
}

// StatusClientGone is recorded when nobody was there to be answered.
const StatusClientGone = 499
