package intake

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// Defaults of HandlerOptions.
const (
	DefaultMaxBody  = 8 << 20
	DefaultMaxBatch = 5000
)

// Gate is what the handler needs of one.
type Gate interface {
	AccountByID(id string) (*gate.Account, gate.Lookup)
	SettleShard(ctx context.Context, shard uint32, c *usage.Call) error
}

// HandlerOptions configure a handler of POST /v1/events.
type HandlerOptions struct {
	Gate        Gate
	DeadLetters *DeadLetters
	// MaxBody in bytes and MaxBatch in events bound a request.
	MaxBody  int64
	MaxBatch int
	// Parallel is how many events of a batch are handed over at once: 1, except
	// where each waits for the disk.
	Parallel int
	// Timeout bounds how long a request waits for room in the outbox and for the
	// dead-letter stream; 5 s when 0.
	Timeout    time.Duration
	Logger     zerolog.Logger
	Registerer prometheus.Registerer // may be nil
	Now        func() time.Time      // time.Now when nil
}

// Handler answers POST /v1/events:
//
//	202 all events are with the outbox
//	207 some are, the others are dead letters: the body lists them by their index
//	422 all are dead letters
//	400, 413, 415 the body can't be read, or not be cut into events: it is one dead
//	    letter as a whole, and nothing of it was taken
//	405 the method is not POST
//	503 some could not be taken now: send the whole request again, what was taken
//	    is known by its (account, source, id)
//
// A dead letter need not be sent again: it would be one again.
type Handler struct {
	o      HandlerOptions
	events *prometheus.CounterVec
}

// NewHandler returns a handler.
func NewHandler(o HandlerOptions) (*Handler, error) {
	if o.MaxBody <= 0 {
		o.MaxBody = DefaultMaxBody
	}
	if o.MaxBatch <= 0 {
		o.MaxBatch = DefaultMaxBatch
	}
	if o.Timeout <= 0 {
		o.Timeout = 5 * time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	h := &Handler{o: o, events: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tollkeeper_gateway_events_total", Help: "Events that were posted, by outcome.",
	}, []string{"outcome"})}
	if o.Registerer != nil {
		if err := o.Registerer.Register(h.events); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Reply is the body of every answer. One that is an error is a problem of RFC 9457,
// whose members type to code come first.
type Reply struct {
	Type   string `json:"type,omitempty"`
	Title  string `json:"title,omitempty"`
	Status int    `json:"status,omitempty"`
	Code   string `json:"code,omitempty"`

	Accepted int        `json:"accepted"`
	Rejected []Rejected `json:"rejected,omitempty"`
	// Unavailable counts good events that could not be taken now.
	Unavailable int    `json:"unavailable,omitempty"`
	Detail      string `json:"detail,omitempty"`
}

// Rejected is an event that can't be counted.
type Rejected struct {
	Index  int    `json:"index"`
	Source string `json:"source,omitempty"`
	ID     string `json:"id,omitempty"`
	Reason string `json:"reason"`
	Detail string `json:"detail"`
	// Kept: it is in the dead-letter stream; else it waits for it.
	Kept bool `json:"kept"`
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		h.reply(w, http.StatusMethodNotAllowed, Reply{Detail: "Events are taken by POST."})
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, h.o.MaxBody))
	// From now on: a client may take its time to send.
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			h.rejectBody(ctx, w, body, bodyError(http.StatusRequestEntityTooLarge, usage.ReasonOversized, "the body is larger than %d bytes: send several requests", h.o.MaxBody))
			return
		}
		// A client that has only closed its sending half is still there to hear it.
		h.events.WithLabelValues("unavailable").Inc()
		h.reply(w, http.StatusBadRequest, Reply{Detail: "The body broke off before its end, and nothing of it was taken: send the whole request again."})
		return
	}
	events, err := Parse(r.Header, body, h.o.Now(), h.o.MaxBatch)
	if err != nil {
		var whole *BodyError
		if errors.As(err, &whole) {
			if whole.Status == http.StatusUnsupportedMediaType {
				w.Header().Set("Accept-Encoding", "identity")
			}
			h.rejectBody(ctx, w, body, whole)
		}
		return
	}
	h.take(ctx, w, events)
}

func (h *Handler) take(ctx context.Context, w http.ResponseWriter, events []Event) {
	shards := make([]uint32, len(events))
	unknown := false
	for i := range events {
		e := &events[i]
		if e.Err != nil {
			continue
		}
		a, found := h.o.Gate.AccountByID(e.Call.Account)
		if found == gate.Found {
			if _, shard, ok := a.Root(); ok {
				shards[i] = shard
				continue
			}
		}
		if found == gate.NotFound {
			events[i] = bad(*e, usage.ReasonUnknownAccount, "there is no account %q", e.Call.Account)
			continue
		}
		unknown = true
	}
	if unknown {
		// Whether the account exists can't be told: nothing is taken, so that
		// nobody has to find out what was.
		h.events.WithLabelValues("unavailable").Add(float64(len(events)))
		h.reply(w, http.StatusServiceUnavailable, Reply{Unavailable: len(events), Detail: "The directory of accounts could not be read yet: send the request again."})
		return
	}
	errs := h.settle(ctx, events, shards)
	reply := Reply{}
	var letters []Letter
	for i := range events {
		e := &events[i]
		var invalid *usage.InvalidError
		if e.Err == nil && errors.As(errs[i], &invalid) {
			e.Err = invalid
		}
		switch {
		case e.Err != nil:
			reply.Rejected = append(reply.Rejected, Rejected{Index: i, Source: e.Source, ID: e.ID, Reason: e.Err.Reason, Detail: e.Err.Message})
			letters = append(letters, Letter{Reason: e.Err.Reason, Detail: e.Err.Message, Event: e.Raw})
		case errs[i] != nil:
			reply.Unavailable++
			reply.Detail = "Some events could not be taken now: send the whole request again, what was taken is not counted twice."
		default:
			reply.Accepted++
		}
	}
	full := !h.bury(ctx, letters, reply.Rejected)
	h.events.WithLabelValues("accepted").Add(float64(reply.Accepted))
	h.events.WithLabelValues("rejected").Add(float64(len(reply.Rejected)))
	h.events.WithLabelValues("unavailable").Add(float64(reply.Unavailable))
	status := http.StatusAccepted
	switch {
	case full:
		status = http.StatusServiceUnavailable
		reply.Detail = "Too many bad events wait to be kept: send the whole request again, what was taken is not counted twice."
	case reply.Unavailable > 0:
		status = http.StatusServiceUnavailable
	case len(reply.Rejected) == 0:
	case reply.Accepted > 0:
		status = http.StatusMultiStatus
	default:
		status = http.StatusUnprocessableEntity
	}
	h.reply(w, status, reply)
}

// settle hands the good events over and returns what became of each.
func (h *Handler) settle(ctx context.Context, events []Event, shards []uint32) []error {
	errs := make([]error, len(events))
	workers := max(min(h.o.Parallel, len(events)), 1)
	if workers == 1 {
		for i := range events {
			if events[i].Err == nil {
				errs[i] = h.o.Gate.SettleShard(ctx, shards[i], &events[i].Call)
			}
		}
		return errs
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := w; i < len(events); i += workers {
				if events[i].Err == nil {
					errs[i] = h.o.Gate.SettleShard(ctx, shards[i], &events[i].Call)
				}
			}
		}()
	}
	wg.Wait()
	return errs
}

// bury makes dead letters and reports whether there was room for them.
func (h *Handler) bury(ctx context.Context, letters []Letter, rejected []Rejected) bool {
	if len(letters) == 0 {
		return true
	}
	// Batches may be larger than the queue: in pieces.
	for from := 0; from < len(letters); {
		n := min(len(letters)-from, 512)
		kept, err := h.o.DeadLetters.Add(letters[from : from+n])
		if err != nil {
			return false
		}
		wait, cancel := context.WithTimeout(ctx, 2*time.Second)
		all := kept(wait)
		cancel()
		for i := from; i < from+n; i++ {
			rejected[i].Kept = all
		}
		from += n
	}
	return true
}

func (h *Handler) rejectBody(ctx context.Context, w http.ResponseWriter, body []byte, e *BodyError) {
	rejected := []Rejected{{Index: 0, Reason: e.Err.Reason, Detail: e.Err.Message}}
	h.events.WithLabelValues("rejected").Inc()
	status := e.Status
	if e.Raw != nil {
		body = e.Raw
	}
	if !h.bury(ctx, []Letter{{Reason: e.Err.Reason, Detail: e.Err.Message, Event: body}}, rejected) {
		status = http.StatusServiceUnavailable
	}
	h.reply(w, status, Reply{Rejected: rejected, Detail: e.Err.Message})
}

// code of an answer that is an error, for machines.
func code(status int) string {
	switch status {
	case http.StatusBadRequest:
		return problem.CodeBadRequest
	case http.StatusMethodNotAllowed:
		return problem.CodeMethodNotAllowed
	case http.StatusRequestEntityTooLarge:
		return problem.CodeTooLarge
	case http.StatusUnsupportedMediaType:
		return problem.CodeMediaType
	case http.StatusUnprocessableEntity:
		return "REJECTED"
	}
	return "UNAVAILABLE"
}

func (h *Handler) reply(w http.ResponseWriter, status int, reply Reply) {
	contentType := "application/json"
	if status >= 400 {
		contentType = problem.ContentType
		if reply.Detail == "" {
			reply.Detail = "No event was taken: rejected says why."
		}
		p := problem.Of(status, code(status), reply.Detail)
		reply.Type, reply.Title, reply.Status, reply.Code = p.Type, p.Title, p.Status, p.Code
	}
	data, err := json.Marshal(reply)
	if err != nil {
		h.o.Logger.Error().Err(err).Msg("the reply can't be written as JSON")
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "no-store")
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	w.WriteHeader(status)
	// An error here is the client's going away.
	_, _ = w.Write(append(data, '\n'))
}
