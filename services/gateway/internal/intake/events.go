package intake

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/cloudevent"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Event is one event of a request: a call, or why it is none.
type Event struct {
	Call usage.Call
	Err  *usage.InvalidError // nil: Call is good
	// Source and ID as far as they could be read.
	Source, ID string
	// Raw is the event in JSON, for the dead letter.
	Raw []byte
}

// BodyError says why a request as a whole could not be read.
type BodyError struct {
	Status int
	Err    *usage.InvalidError
	// Raw is what a dead letter keeps instead of the body; nil: the body.
	Raw []byte
}

// Error is the sentence for people.
func (e *BodyError) Error() string { return e.Err.Message }

// Parse reads the events of a request with this header and body, in the
// structured, batch or binary mode of the HTTP binding. now stands in for the time
// of events that have none: the attribute is optional, and no part of the event's
// identity, so that a second try that is stamped later is still the same event. One
// bad event spoils no other; what can't be cut into events, or read at all, is a
// *BodyError. At most maxBatch events are taken.
func Parse(h http.Header, body []byte, now time.Time, maxBatch int) ([]Event, error) {
	if err := readable(h); err != nil {
		return nil, err
	}
	media, err := mediaType(h)
	if err != nil {
		return nil, err
	}
	switch {
	case media == cloudevent.BatchType:
		return parseBatch(body, now, maxBatch)
	case media == cloudevent.StructuredType:
		if err := checkBody("the body", body); err != nil {
			return nil, err
		}
		return []Event{parseStructured(body, now)}, nil
	case strings.HasPrefix(media, "application/cloudevents"):
		return nil, unsupported("%s can't be read: send %s, %s, or the binary mode", media, cloudevent.StructuredType, cloudevent.BatchType)
	case len(h.Values("Ce-Specversion")) > 0:
		return parseBinary(h, media, body, now)
	}
	return nil, unsupported("this is no CloudEvent: send Content-Type %s or %s, or the headers of the binary mode (ce-specversion, ce-id, ce-source, ce-type)", cloudevent.StructuredType, cloudevent.BatchType)
}

func bodyError(status int, reason, format string, args ...any) *BodyError {
	return &BodyError{Status: status, Err: &usage.InvalidError{Reason: reason, Message: fmt.Sprintf(format, args...)}}
}

func unsupported(format string, args ...any) *BodyError {
	return bodyError(http.StatusUnsupportedMediaType, usage.ReasonUnknownSchema, format, args...)
}

// checkBody reports a body that is not one JSON value: where an event ends can't be
// told then, so neither can what another one is.
func checkBody(what string, body []byte) error {
	var invalid *usage.InvalidError
	if errors.As(cloudevent.Check(what, body), &invalid) {
		return &BodyError{Status: http.StatusBadRequest, Err: invalid}
	}
	return nil
}

func parseBatch(body []byte, now time.Time, maxBatch int) ([]Event, error) {
	texts, err := cloudevent.Batch(body, maxBatch)
	var (
		invalid *usage.InvalidError
		tooMany *cloudevent.ErrTooMany
	)
	switch {
	case errors.As(err, &tooMany):
		return nil, bodyError(http.StatusRequestEntityTooLarge, usage.ReasonOversized, "%v", tooMany)
	case errors.As(err, &invalid):
		return nil, &BodyError{Status: http.StatusBadRequest, Err: invalid}
	case err != nil:
		return nil, bodyError(http.StatusBadRequest, usage.ReasonMalformed, "%v", err)
	}
	events := make([]Event, len(texts))
	for i, text := range texts {
		events[i] = parseStructured(text, now)
	}
	return events, nil
}

func parseStructured(raw []byte, now time.Time) Event {
	e, err := cloudevent.Read(raw)
	return finish(&e, err, raw, now)
}

func parseBinary(h http.Header, media string, body []byte, now time.Time) ([]Event, error) {
	attributes, bad := attributes(h)
	raw := asStructured(attributes, h.Get("Content-Type"), body)
	if media == "" && h.Get("Content-Type") != "" {
		return nil, &BodyError{Status: http.StatusUnsupportedMediaType, Raw: raw, Err: &usage.InvalidError{
			Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the Content-Type %q is no media type: send application/json", h.Get("Content-Type"))}}
	}
	if err := cloudevent.JSONType(media); media != "" && err != nil {
		var invalid *usage.InvalidError
		if errors.As(err, &invalid) {
			return nil, &BodyError{Status: http.StatusUnsupportedMediaType, Raw: raw, Err: invalid}
		}
	}
	if err := checkBody("the event's data", body); err != nil {
		var whole *BodyError
		if errors.As(err, &whole) {
			whole.Raw = raw
		}
		return nil, err
	}
	e, err := cloudevent.Binary(attributes, media, body)
	if bad != nil {
		err = bad
	}
	return []Event{finish(&e, err, raw, now)}, nil
}

// finish makes a call of an event that was read, or of err why it is none.
func finish(e *cloudevent.Event, err error, raw []byte, now time.Time) Event {
	out := Event{Source: e.Source, ID: e.ID, Raw: raw}
	if err == nil {
		out.Call, err = ledger.CallOfEvent(e, usage.At(now))
	}
	var invalid *usage.InvalidError
	switch {
	case errors.As(err, &invalid):
		out.Err = invalid
	case err != nil:
		return bad(out, usage.ReasonMalformed, "%v", err)
	}
	return out
}

// asStructured is an event of the binary mode as the structured mode has it, as well
// as it can be told: it can be posted again.
func asStructured(attributes []cloudevent.Attribute, contentType string, body []byte) []byte {
	m := map[string]any{}
	for _, a := range attributes {
		m[a.Name] = a.Value
	}
	if contentType != "" {
		m["datacontenttype"] = contentType
	}
	if json.Valid(body) {
		m["data"] = json.RawMessage(body)
	} else {
		m["data_base64"] = body
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return body
	}
	return raw
}

func bad(e Event, reason, format string, args ...any) Event {
	e.Err = &usage.InvalidError{Reason: reason, Message: fmt.Sprintf(format, args...)}
	return e
}

func itoa(n int) string { return strconv.Itoa(n) }

// headerValue makes a text fit for a NATS header: one line, bounded.
func headerValue(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r == utf8.RuneError {
			return ' '
		}
		return r
	}, s)
	if len(s) > 512 {
		s = strings.ToValidUTF8(s[:512], "")
	}
	return s
}
