// Package refusal writes the answer to a call that was not let through: the
// status, the headers, and the body in the form that a route's clients read.
package refusal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Profile is the form of the body.
type Profile string

// The profiles. OpenAI's and Anthropic's are those providers' own error objects,
// which their client libraries understand, with the whole problem beside them
// under "problem".
const (
	Problem   Profile = "problem" // RFC 9457, the default
	OpenAI    Profile = "openai"
	Anthropic Profile = "anthropic"
	Flat      Profile = "flat" // {status, code, message}
)

// Valid reports whether p is a profile; the empty one means Problem.
func (p Profile) Valid() bool {
	switch p {
	case "", Problem, OpenAI, Anthropic, Flat:
		return true
	}
	return false
}

// Codes of answers that are not about billing.
const (
	// Unauthenticated: there is no such key, or none was sent.
	Unauthenticated usage.Code = "UNAUTHENTICATED"
	// BadRequest and TooLarge: the gateway can't tell what the call asks for,
	// so it can't tell which limits are meant.
	BadRequest usage.Code = "BAD_REQUEST"
	TooLarge   usage.Code = "REQUEST_TOO_LARGE"
	NoRoute    usage.Code = "NO_ROUTE"
	// BadGateway and GatewayTimeout: the upstream gave no answer.
	BadGateway     usage.Code = "UPSTREAM_UNREACHABLE"
	GatewayTimeout usage.Code = "UPSTREAM_TIMEOUT"
	// MeteringUnavailable: the call could not be recorded, so it is not served.
	MeteringUnavailable usage.Code = "METERING_UNAVAILABLE"
)

// MaxViolated bounds the policies that one answer lists.
const MaxViolated = 16

// Refusal is what is to be answered.
type Refusal struct {
	Code usage.Code
	// Status; 0 means the code's own.
	Status int
	// Detail says to a person what happened, and after a last colon what to do, which
	// is the resolution then; empty for one made from Decision.
	Detail string
	// Decision that refused; nil when none did.
	Decision *usage.Decision
	// Violated are all decisions that stand against the call, the gravest
	// first; Decision alone when empty.
	Violated []*usage.Decision
	// Requested is how much of the decision's meter the call asked for; -1: not
	// known.
	Requested int64
	RequestID string
	// Now is the ledger's time, for what is left of a window.
	Now usage.Micros
}

// document is the body of RFC 9457 with our members.
type document struct {
	Type             string     `json:"type"`
	Title            string     `json:"title"`
	Status           int        `json:"status"`
	Detail           string     `json:"detail"`
	Code             usage.Code `json:"code"`
	Retryable        bool       `json:"retryable"`
	ViolatedPolicies []string   `json:"violated-policies,omitempty"`
	Meter            string     `json:"meter,omitempty"`
	Limit            *int64     `json:"limit,omitempty"`
	Used             *int64     `json:"used,omitempty"`
	Requested        *int64     `json:"requested,omitempty"`
	PeriodEnd        string     `json:"period_end,omitempty"`
	Resolution       string     `json:"resolution"`
	ActionURL        string     `json:"action_url,omitempty"`
	DecisionID       string     `json:"decision_id,omitempty"`
	DecisionRevision uint64     `json:"decision_revision,omitempty"`
	RequestID        string     `json:"request_id,omitempty"`
}

// quotaExceeded is the problem type that the RateLimit draft registers.
const quotaExceeded = "https://iana.org/assignments/http-problem-types#quota-exceeded"

// problemBase: types of our own are names, not addresses that must answer.
const problemBase = "https://github.com/tollkeeper/tollkeeper/problems#"

type wording struct {
	title, resolution string
	iana              bool
	// detail of a refusal that has none of its own.
	detail string
}

func words(c usage.Code) wording {
	switch c {
	case usage.QuotaExceeded:
		return wording{"The plan's quota is used up", "Raise the limit or change the plan, or wait until the period ends.", true, "A limit of the account stands against this call."}
	case usage.SpendCapReached:
		return wording{"The spending cap is reached", "Raise the spending cap.", false, "A limit on what the account may spend stands against this call."}
	case usage.CreditsDepleted:
		return wording{"The prepaid credit is used up", "Buy credit.", false, "The account has no credit left for this call."}
	case usage.CreditsInsufficient:
		return wording{"The prepaid credit does not cover this call", "Buy credit, or ask for less.", false, "This call can cost more than the credit that is left."}
	case usage.SubscriptionExpired:
		return wording{"The subscription has expired", "Renew the subscription.", false, "The account may call again when it has a subscription."}
	case usage.TrialEnded:
		return wording{"The trial has ended", "Choose a plan.", false, "The account may call again when it has a plan."}
	case usage.PaymentFailed:
		return wording{"A payment has failed", "Update the means of payment.", false, "The account may call again when it is paid for."}
	case usage.PlanRequired:
		return wording{"This needs a plan that includes it", "Choose a plan that includes it.", false, "The account's plan does not have what this call asks for."}
	case usage.RateLimited:
		return wording{"Too many calls", "Wait as long as Retry-After says.", true, "A limit on the rate of calls stands against this one."}
	case usage.CostExceedsLimit:
		return wording{"This call costs more than one call may", "Ask for less.", false, "A limit of the account is smaller than what this call can use."}
	case usage.BillingStateUnknown:
		return wording{"The billing state can't be known right now", "Try again later.", false, "Whether this call is covered could not be found out in time."}
	case Unauthenticated:
		return wording{"No valid API key", "Send a valid API key.", false, "The API key of this call is not known."}
	case BadRequest:
		return wording{"The request can't be read", "Correct the request.", false, "The gateway can not tell what this call asks for."}
	case TooLarge:
		return wording{"The request is too large", "Send a smaller request.", false, "The gateway reads less of a request than this one has."}
	case NoRoute:
		return wording{"Nothing is served here", "Check method, host and path.", false, "The gateway has no route for this request."}
	case MeteringUnavailable:
		return wording{"Calls can't be recorded right now", "Try again later.", false, "This call was not served, because it could not have been metered."}
	case BadGateway:
		return wording{"The upstream can't be reached", "Try again later.", false, "The call got no answer from the server behind the gateway."}
	case GatewayTimeout:
		return wording{"The upstream did not answer in time", "Try again later.", false, "The server behind the gateway took longer than the route allows."}
	}
	return wording{"Refused", "Ask the operator of this service.", false, "The gateway does not say more."}
}

func ownStatus(c usage.Code) int {
	switch c {
	case Unauthenticated:
		return http.StatusUnauthorized
	case BadRequest:
		return http.StatusBadRequest
	case TooLarge:
		return http.StatusRequestEntityTooLarge
	case NoRoute:
		return http.StatusNotFound
	case MeteringUnavailable:
		return http.StatusServiceUnavailable
	case BadGateway:
		return http.StatusBadGateway
	case GatewayTimeout:
		return http.StatusGatewayTimeout
	}
	if s := c.Status(); s != 0 {
		return s
	}
	return http.StatusInternalServerError
}

// HTTPStatus is the status that is answered.
func (r *Refusal) HTTPStatus() int {
	if r.Status != 0 {
		return r.Status
	}
	return ownStatus(r.Code)
}

// retryable: the same call can pass later without anybody doing anything, and
// soon. A 402 says no even where the period will end: clients that retry it do
// so for ever.
func retryable(status int) bool {
	switch status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return true
	}
	return false
}

func (r *Refusal) violated() []*usage.Decision {
	if len(r.Violated) == 0 && r.Decision != nil {
		return []*usage.Decision{r.Decision}
	}
	var out []*usage.Decision
	names := make(map[string]bool, len(r.Violated))
	for _, v := range r.Violated {
		// The accounts of a path may have the same plan: a policy is named once,
		// by the gravest.
		if len(out) < MaxViolated && !names[v.LimitID] {
			names[v.LimitID] = true
			out = append(out, v)
		}
	}
	return out
}

func (r *Refusal) document() document {
	w := words(r.Code)
	status := r.HTTPStatus()
	d := document{
		Type: problemBase + strings.ToLower(strings.ReplaceAll(string(r.Code), "_", "-")), Title: w.title, Status: status, Detail: r.Detail,
		Code: r.Code, Retryable: retryable(status), Resolution: w.resolution, RequestID: r.RequestID,
	}
	if w.iana {
		d.Type = quotaExceeded
	}
	if what, todo := divided(r.Detail); todo != "" {
		d.Detail, d.Resolution = what, todo
	}
	if p := r.Decision; p != nil {
		limit := p.Amount
		d.Meter, d.Limit = string(p.Meter), &limit
		if told(p) {
			used := p.Used
			d.Used = &used
		}
		d.ActionURL, d.DecisionID, d.DecisionRevision = p.ActionURL, p.ID, p.Revision
		if r.Requested >= 0 {
			requested := r.Requested
			d.Requested = &requested
		}
		if p.PeriodEnd != 0 {
			d.PeriodEnd = p.PeriodEnd.Time().Format(time.RFC3339)
		} else if r.Code == usage.QuotaExceeded || r.Code == usage.RateLimited {
			d.Resolution = "Raise the limit or change the plan." // nothing ends by itself
		}
		if d.Detail == "" {
			d.Detail = r.detail(d.PeriodEnd)
			if hint := r.hint(); hint != "" {
				d.Resolution = hint + " " + d.Resolution
			}
		}
		for _, v := range r.violated() {
			d.ViolatedPolicies = append(d.ViolatedPolicies, v.LimitID)
		}
	}
	if d.Detail == "" {
		d.Detail = w.detail
	}
	return d
}

// divided takes what is to be done off the end of a detail. What is quoted there is a
// client's, in which a colon means nothing.
func divided(detail string) (what, todo string) {
	at := strings.LastIndex(detail, ": ")
	if at < 0 || strings.ContainsAny(detail[at:], "\"\\") {
		return detail, ""
	}
	todo = detail[at+2:]
	return detail[:at] + ".", strings.ToUpper(todo[:1]) + todo[1:]
}

// told: the decision is the ledger's. One without an id is the limit's terms alone: how
// much is used of it is not known here.
func told(d *usage.Decision) bool { return d.ID != "" }

// short reports that the limit still has units, but not as many as the call needs.
func (r *Refusal) short() bool {
	return r.Decision.Verdict == usage.Deny && r.Decision.Tier.Leased() && r.Decision.Room > 0
}

// detail says what the decision says; end is that of its period, empty for a lifetime.
func (r *Refusal) detail(end string) string {
	p, period := r.Decision, "over its lifetime"
	if end != "" {
		period = "in the period that ends at " + end
	}
	needs := fmt.Sprintf("This call needs %d %s", r.Requested, p.Meter)
	if p.Meter != usage.Calls {
		needs = fmt.Sprintf("This call may use up to %d %s", r.Requested, p.Meter)
	}
	switch {
	case !told(p) && r.Requested > 0:
		return fmt.Sprintf("%s, and account %s does not have them left of the %d that it has %s (limit %s).", needs, p.Account, p.Amount, period, p.LimitID)
	case !told(p):
		return fmt.Sprintf("Account %s does not have enough left of the %d %s that it has %s (limit %s).", p.Account, p.Amount, p.Meter, period, p.LimitID)
	case !r.short() || r.Requested <= 0:
		return fmt.Sprintf("Account %s has used %d of %d %s (limit %s) %s.", p.Account, p.Used, p.Amount, p.Meter, p.LimitID, period)
	case r.Requested <= p.Room:
		return fmt.Sprintf("%s, and account %s has used %d of %d %s (limit %s): too many of the %d that are left are held for other calls.", needs, p.Account, p.Used, p.Amount, period, p.LimitID, p.Room)
	}
	return fmt.Sprintf("%s, and account %s has used %d of %d %s (limit %s): no more than %d are left.", needs, p.Account, p.Used, p.Amount, period, p.LimitID, p.Room)
}

// hint says what this call, made otherwise, might be admitted as.
func (r *Refusal) hint() string {
	switch {
	case !told(r.Decision) || !r.short():
		return ""
	case r.Requested > 1 && r.Requested > r.Decision.Room:
		return fmt.Sprintf("A smaller call may pass: ask for at most %d.", r.Decision.Room)
	case r.Requested > 1:
		return "A smaller call may pass, or this one when what is held comes back unused."
	}
	return "It may pass when what is held comes back unused."
}

// left is how many units of a limit are left as far as that is known here: of a limit
// that has refused this call, fewer than it needs.
func (r *Refusal) left(v *usage.Decision) int64 {
	n := max(v.Amount-v.Used, 0)
	if v.Tier.Leased() {
		n = min(n, v.Room)
		if v == r.Decision && r.Requested > 0 {
			n = min(n, r.Requested-1)
		}
	}
	return n
}

// Headers of refusals.
const (
	// DecisionIDHeader leads to what the refusal rests on; there is none where no
	// decision was published yet.
	DecisionIDHeader = "X-Tollkeeper-Decision-Id"
	// CodeHeader is the refusal's code, also for those who see no body of it (HEAD).
	CodeHeader = "X-Tollkeeper-Code"
	// requestIDHeader is where OpenAI's clients look for the id of their request,
	// anthropicIDHeader where Anthropic's do.
	requestIDHeader   = "X-Request-Id"
	anthropicIDHeader = "Request-Id"
)

// Write answers. Nothing may have been written before. The error is the
// connection's.
func (r *Refusal) Write(w http.ResponseWriter, p Profile) error {
	d := r.document()
	r.SetHeaders(w.Header())
	if p == Anthropic && r.RequestID != "" {
		w.Header().Set(anthropicIDHeader, r.RequestID)
	}
	contentType, body := render(&d, p)
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false) // an action_url stays readable
	if err := e.Encode(body); err != nil {
		return fmt.Errorf("write refusal: %w", err)
	}
	data := buf.Bytes()
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(d.Status)
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("write refusal: %w", err)
	}
	return nil
}

// SetHeaders sets what goes with the refusal whatever the body's form is.
func (r *Refusal) SetHeaders(h http.Header) {
	status := r.HTTPStatus()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if r.RequestID != "" {
		h.Set(requestIDHeader, r.RequestID)
	}
	if r.Code != "" {
		h.Set(CodeHeader, string(r.Code))
	}
	if r.Decision != nil && r.Decision.ID != "" {
		h.Set(DecisionIDHeader, r.Decision.ID)
	}
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Bearer realm="tollkeeper"`)
	}
	if !retryable(status) {
		// The client libraries of both model providers heed it.
		h.Set("X-Should-Retry", "false")
	}
	var policies, limits []string
	for _, v := range r.violated() {
		name := structuredString(v.LimitID)
		policy := name + ";q=" + sfInteger(v.Amount)
		if unit := quotaUnit(v.Meter); unit != "" {
			policy += ";qu=" + structuredString(unit)
		}
		limit := name + ";r=" + sfInteger(r.left(v))
		if v.PeriodEnd != 0 {
			policy += ";w=" + strconv.FormatInt(seconds(v.PeriodEnd-v.PeriodStart), 10)
			after := strconv.FormatInt(seconds(v.PeriodEnd-r.Now), 10)
			limit += ";t=" + after
			if v == r.Decision && status == http.StatusTooManyRequests {
				h.Set("Retry-After", after)
			}
		}
		policies = append(policies, policy)
		if told(v) {
			limits = append(limits, limit)
		}
	}
	if len(policies) > 0 {
		h.Set("RateLimit-Policy", strings.Join(policies, ", "))
	}
	if len(limits) > 0 {
		h.Set("RateLimit", strings.Join(limits, ", "))
	}
	if status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	if r.Decision != nil && linkable(r.Decision.ActionURL) {
		h.Add("Link", "<"+r.Decision.ActionURL+`>; rel="payment"`)
	}
}

// seconds rounds up: who comes back then is not early.
func seconds(m usage.Micros) int64 {
	if m <= 0 {
		return 0
	}
	return int64((m + 999_999) / 1_000_000)
}

// linkable: the URL comes from a plans file and goes into a header.
func linkable(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != "" && !strings.ContainsAny(s, "<> \"\r\n\t")
}

// quotaUnit of the RateLimit draft: requests is the default and not written.
func quotaUnit(m usage.Meter) string {
	switch m {
	case usage.Calls:
		return ""
	case usage.Bytes:
		return "content-bytes"
	}
	return string(m)
}

// sfInteger is an Integer of structured fields, which has at most 15 digits.
func sfInteger(v int64) string {
	return strconv.FormatInt(min(max(v, 0), 999_999_999_999_999), 10)
}

// structuredString is a String of structured fields; what it can't hold is "?".
func structuredString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			b.WriteByte('\\')
			b.WriteRune(c)
		case c < 0x20 || c > 0x7e:
			b.WriteByte('?')
		default:
			b.WriteRune(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// Error makes a Refusal an error, for those who find out while they read a request.
func (r *Refusal) Error() string {
	if r.Detail != "" {
		return r.Detail
	}
	return string(r.Code)
}
