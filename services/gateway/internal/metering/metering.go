// Package metering finds out what the calls of a route have used: it asks the upstream
// for usage where the client did not, reads it in the answer while that passes, and says
// what is to be taken for used where the answer does not tell.
package metering

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/apis"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/asking"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/pictures"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/tokens"
)

// Metrics of all routes.
type Metrics struct {
	answers   *prometheus.CounterVec
	estimates *prometheus.CounterVec
}

// NewMetrics registers them; r may be nil.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		answers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tollkeeper_gateway_usage_answers_total",
			Help: "Answers on routes that read token counts, by route and by what was found in them.",
		}, []string{"route", "outcome"}),
		estimates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tollkeeper_gateway_usage_estimates_total",
			Help: "Calls whose answer did not tell all that they used, so that an estimate counts where a limit does.",
		}, []string{"route"}),
	}
	if r != nil {
		for _, c := range []prometheus.Collector{m.answers, m.estimates} {
			if err := r.Register(c); err != nil {
				return nil, err
			}
		}
	}
	return m, nil
}

// Options of a route.
type Options struct {
	// Name of the route.
	Name string
	// Provider: all that is served there is of OpenAI's or Anthropic's API.
	Provider bool
	// Ask for usage where the client did not.
	Ask bool
	// MaxBody bounds the requests that are read for it, in bytes, and Bodies what they
	// take together.
	MaxBody int64
	Bodies  asking.Room
	Metrics *Metrics
	// Settle records what a call used that is told later than by its own answer.
	Settle func(ctx context.Context, c usage.Call) error
	// Reserves reports whether what an account's calls use is reserved before they are
	// made: then nothing is recorded later.
	Reserves func(account, model, method string) bool
	// Unwilling hears that the upstream refused to be asked for usage.
	Unwilling func()
	// Unsettled hears that Settle failed.
	Unsettled func(error)
}

// Route meters the calls of one. It may be used by several goroutines at once.
type Route struct {
	o         Options
	outcomes  [tokens.NumOutcomes]prometheus.Counter
	estimated prometheus.Counter
}

// New returns a route.
func New(o Options) *Route {
	r := &Route{o: o, estimated: o.Metrics.estimates.WithLabelValues(o.Name)}
	for i := range r.outcomes {
		r.outcomes[i] = o.Metrics.answers.WithLabelValues(o.Name, tokens.Outcome(i).String())
	}
	return r
}

// Keys of a request's context.
type (
	askedKey struct{} // its usage the gateway asks for, and not the client
	sizeKey  struct{} // *atomic.Int64: bytes of a body whose length was not announced
)

// Request changes what goes to the upstream, and returns it: it asks for usage, and for
// an answer in no encoding.
func (m *Route) Request(out *http.Request) *http.Request {
	out.Header["Accept-Encoding"] = identity
	if m.o.Ask && out.Method == http.MethodPost && mayHaveOptions(out.URL.Path) {
		if o := m.operation(out); o.Options && asking.Of(out, m.o.MaxBody, m.o.Bodies) {
			out = out.WithContext(context.WithValue(out.Context(), askedKey{}, true))
		}
	}
	if out.ContentLength < 0 && out.Body != nil {
		c := &counted{ReadCloser: out.Body}
		out.Body = c
		out = out.WithContext(context.WithValue(out.Context(), sizeKey{}, &c.n))
	}
	return out
}

var identity = []string{"identity"}

// mayHaveOptions saves looking for what is not there.
func mayHaveOptions(path string) bool {
	return strings.HasSuffix(strings.TrimRight(path, "/"), "completions")
}

// counted counts a body while it is sent.
type counted struct {
	io.ReadCloser
	n atomic.Int64
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func (m *Route) operation(r *http.Request) apis.Operation {
	return apis.Of(r.Method, r.URL.Path, m.o.Provider)
}

// Answer looks for what the call has used in an answer while that passes on.
func (m *Route) Answer(resp *http.Response) {
	r := resp.Request
	asked := r.Context().Value(askedKey{}) != nil
	encoding := strings.Join(resp.Header["Content-Encoding"], ",")
	contentType := resp.Header.Get("Content-Type")
	stored := false
	switch {
	case resp.StatusCode == http.StatusSwitchingProtocols:
		m.outcomes[tokens.Unreadable].Inc()
		return
	case resp.StatusCode/100 != 2:
		m.outcomes[tokens.Failed].Inc()
		if asked && (resp.StatusCode == http.StatusBadRequest || resp.StatusCode == http.StatusUnprocessableEntity) {
			resp.Body = &refusing{ReadCloser: resp.Body, hears: m.o.Unwilling}
		}
		return
	case r.Method == http.MethodHead || resp.StatusCode == http.StatusNoContent || resp.StatusCode == http.StatusResetContent:
		m.outcomes[tokens.Empty].Inc()
		return
	case tokens.IsMedia(contentType):
		m.outcomes[tokens.Media].Inc()
		return
	}
	if !m.produces(r) {
		if !ofResponse(r.URL.Path) {
			m.outcomes[tokens.Retrieved].Inc()
			return
		}
		stored = true // it may be of one that is made in the background
	}
	o := tokens.Options{Stream: tokens.IsStream(contentType), Length: resp.ContentLength, Drops: asked}
	switch {
	case tokens.IsPlain(encoding):
	case tokens.Decodes(encoding):
		resp.Body = tokens.Plain(resp.Body, encoding)
		resp.Header.Del("Content-Encoding")
		shorter(resp)
		o.Length = -1
	default:
		o.Opaque = true
	}
	if asked && !tokens.IsJSON(contentType) {
		shorter(resp) // less than was announced may pass
	} else if o.Length >= 0 {
		o.Drops = false
	}
	resp.Body = tokens.NewReader(resp.Body, o, func(result *tokens.Result) {
		if stored {
			m.stored(r, result)
			return
		}
		m.made(r, result)
	})
}

// shorter makes an answer one of no announced length.
func shorter(resp *http.Response) {
	resp.ContentLength = -1
	for _, h := range []string{"Content-Length", "Content-Digest", "Repr-Digest", "Digest", "Content-Md5"} {
		resp.Header.Del(h)
	}
}

// produces reports whether the answer of a call is made by it, and was not stored.
func (m *Route) produces(r *http.Request) bool {
	if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/chat/completions") {
		return true // most are, so this is quick
	}
	o := m.operation(r)
	if !o.Known && r.Method != http.MethodPost && r.Method != http.MethodPut && r.Method != http.MethodPatch {
		return false // it only reads, or deletes
	}
	return o.Produces()
}

// ofResponse: it is the path of one of OpenAI's responses, or of its cancellation.
func ofResponse(path string) bool {
	path = strings.TrimSuffix(strings.TrimRight(path, "/"), "/cancel")
	at := strings.LastIndexByte(path, '/')
	return at > 0 && strings.HasSuffix(path[:at], "/responses")
}

// made settles the call that made an answer.
func (m *Route) made(r *http.Request, result *tokens.Result) {
	report := gate.ReportFrom(r.Context())
	var told usage.MeterSet
	for _, reading := range result.Readings {
		told |= usage.SetOf(reading.Meter)
	}
	if result.Background {
		account, _ := report.Account()
		if !m.o.Reserves(account, result.Model, r.Method) {
			m.background(r, result, told)
			return
		}
	}
	m.outcomes[result.Outcome].Inc()
	for _, reading := range result.Readings {
		_ = report.Set(reading.Meter, reading.Value) // they were checked when they were read
	}
	if result.Outcome == tokens.Partial {
		report.Unknown()
	}
	if result.Complete {
		report.Ended(usage.Finished)
	}
	if !result.Background {
		m.estimate(r, report, result, told)
	}
}

// estimate says what counts for used where the answer did not tell. An answer of an API
// that is not known here, which is whole, tells no usage and does not look like a model's,
// has none.
func (m *Route) estimate(r *http.Request, report *gate.Report, result *tokens.Result, told usage.MeterSet) {
	if result.Outcome == tokens.Measured && told.Has(usage.InputTokens) && told.Has(usage.OutputTokens) {
		return
	}
	o := m.operation(r)
	switch {
	case o.Known && !o.Text && (o.Unused.Has(usage.InputTokens) || !o.Unused.Has(usage.OutputTokens)):
		return
	case !o.Known && !result.OfModel && (result.Outcome == tokens.Measured || result.Outcome == tokens.None || result.Outcome == tokens.Unreadable || result.Outcome == tokens.Empty):
		return
	}
	m.estimated.Inc()
	if !told.Has(usage.InputTokens) {
		if size, ok := m.input(r); ok {
			report.Estimate(usage.InputTokens, size)
			report.Estimate(usage.CachedInputTokens, size)
		}
	}
	if o.Unused.Has(usage.OutputTokens) || told.Has(usage.OutputTokens) && result.Outcome != tokens.Partial {
		return
	}
	output := max(result.Passed, 1)
	for _, reading := range result.Readings {
		if reading.Meter == usage.OutputTokens {
			output = reading.Value + result.Passed
		}
	}
	report.Estimate(usage.OutputTokens, output)
	if !told.Has(usage.ReasoningTokens) {
		report.Estimate(usage.ReasoningTokens, output)
	}
}

// input is how many tokens a request's text can have: a token is a byte at least. Of
// pictures and sound in it are counted as many as they can be, where the body is still in
// memory. What is no text (sound, pictures in forms) has none that can be told so.
func (m *Route) input(r *http.Request) (int64, bool) {
	if t := r.Header.Get("Content-Type"); t != "" && !tokens.IsJSON(t) && !strings.HasPrefix(strings.ToLower(t), "text/") {
		return 0, false
	}
	if n, ok := r.Context().Value(sizeKey{}).(*atomic.Int64); ok {
		return n.Load(), true
	}
	size := max(r.ContentLength, 0)
	if held, ok := r.Body.(asking.Held); ok && size > pictures.Tokens {
		size -= pictures.Beyond(held.Bytes())
	}
	return size, true
}

// Unanswered settles a call whose client left before the upstream, which may have served
// it, answered.
func (m *Route) Unanswered(r *http.Request) {
	if !m.produces(r) {
		return
	}
	m.outcomes[tokens.Broken].Inc()
	m.estimate(r, gate.ReportFrom(r.Context()), &tokens.Result{Outcome: tokens.Broken}, 0)
}

// BackgroundSource is the source of events that say what a response used that was made
// in the background: the id of the response is theirs, so that it counts once, whoever
// asks for it, at whichever gateway, and however often.
const BackgroundSource = "tollkeeper.background-response"

// background records what was used by a response that is made in the background, as
// soon as an answer tells.
func (m *Route) background(r *http.Request, result *tokens.Result, told usage.MeterSet) {
	if !told.Has(usage.OutputTokens) || result.ID == "" || len(result.ID) > usage.MaxIDBytes {
		m.outcomes[tokens.Background].Inc()
		return
	}
	report := gate.ReportFrom(r.Context())
	account, keyID := report.Account()
	call := usage.Call{
		Time: usage.At(time.Now()), Account: account, KeyID: keyID,
		Method: usage.CleanText(r.Method), Route: m.o.Name, Model: usage.CleanText(result.Model), Status: http.StatusOK, Ending: usage.Finished,
		Source: BackgroundSource, EventID: result.ID,
	}
	call.Quantities.Set(usage.Calls, 0) // the one that made it has been counted
	for _, reading := range result.Readings {
		call.Quantities.Set(reading.Meter, reading.Value)
	}
	// The client that leaves now has been told nevertheless.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), settleTimeout)
	defer cancel()
	if err := m.o.Settle(ctx, call); err != nil {
		m.outcomes[tokens.Broken].Inc()
		m.o.Unsettled(err)
		return
	}
	m.outcomes[tokens.Measured].Inc()
}

// settleTimeout bounds how long an answer waits for room in a full outbox.
const settleTimeout = 5 * time.Second

// stored looks at a response that was asked for: if it was made in the background, its
// usage may be told here for the first time.
func (m *Route) stored(r *http.Request, result *tokens.Result) {
	account, _ := gate.ReportFrom(r.Context()).Account()
	if !result.Background || m.o.Reserves(account, result.Model, http.MethodPost) {
		m.outcomes[tokens.Retrieved].Inc()
		return
	}
	var told usage.MeterSet
	for _, reading := range result.Readings {
		told |= usage.SetOf(reading.Meter)
	}
	m.background(r, result, told)
}

// maxRefusal bounds what is looked at of an answer that may say why it refuses.
const maxRefusal = 4 << 10

// refusing looks for the name of the option in an answer that refuses the request.
type refusing struct {
	io.ReadCloser
	hears func()
	seen  []byte
}

// Read implements io.Reader.
func (f *refusing) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	f.seen = append(f.seen, p[:min(n, maxRefusal-len(f.seen))]...)
	return n, err
}

// Close implements io.Closer.
func (f *refusing) Close() error {
	if s := string(f.seen); strings.Contains(s, "stream_options") || strings.Contains(s, "include_usage") {
		f.hears()
	}
	return f.ReadCloser.Close()
}
