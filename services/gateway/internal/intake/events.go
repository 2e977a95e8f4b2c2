package intake

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
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

// structured is the JSON form of a CloudEvent.
type structured struct {
	SpecVersion string          `json:"specversion"`
	ID          string          `json:"id"`
	Source      string          `json:"source"`
	Type        string          `json:"type"`
	Subject     string          `json:"subject,omitempty"`
	Time        string          `json:"time,omitempty"`
	ContentType string          `json:"datacontenttype,omitempty"`
	Traceparent string          `json:"traceparent,omitempty"`
	Data        json.RawMessage `json:"data,omitempty"`
	DataBase64  string          `json:"data_base64,omitempty"`
}

// Media types of the HTTP binding.
const (
	mediaStructured = "application/cloudevents+json"
	mediaBatch      = "application/cloudevents-batch+json"
	mediaJSON       = "application/json"
)

// BodyError says why a request as a whole could not be read.
type BodyError struct {
	Status int
	Err    *usage.InvalidError
}

// Error is the sentence for people.
func (e *BodyError) Error() string { return e.Err.Message }

// Parse reads the events of a request with this header and body, in the
// structured, batch or binary mode of the HTTP binding. now stands in for the time
// of events that have none. One bad event spoils no other. At most maxBatch events
// are taken.
func Parse(h http.Header, body []byte, now time.Time, maxBatch int) ([]Event, error) {
	media, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		media = ""
	}
	switch {
	case media == mediaBatch:
		return parseBatch(body, now, maxBatch)
	case media == mediaStructured:
		return []Event{parseStructured(body, now)}, nil
	case strings.HasPrefix(media, "application/cloudevents"):
		return nil, bodyError(http.StatusUnsupportedMediaType, usage.ReasonUnknownSchema, "%s can't be read: send %s, %s, or the binary mode", media, mediaStructured, mediaBatch)
	case h.Get("Ce-Specversion") != "":
		return []Event{parseBinary(h, media, body, now)}, nil
	}
	return nil, bodyError(http.StatusUnsupportedMediaType, usage.ReasonUnknownSchema,
		"this is no CloudEvent: send Content-Type %s or %s, or the headers of the binary mode (ce-specversion, ce-id, ce-source, ce-type)", mediaStructured, mediaBatch)
}

func bodyError(status int, reason, format string, args ...any) *BodyError {
	return &BodyError{status, &usage.InvalidError{Reason: reason, Message: fmt.Sprintf(format, args...)}}
}

func parseBatch(body []byte, now time.Time, maxBatch int) ([]Event, error) {
	d := json.NewDecoder(bytes.NewReader(body))
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, bodyError(http.StatusBadRequest, usage.ReasonMalformed, "the batch is not a JSON array")
	}
	var events []Event
	for d.More() {
		if len(events) == maxBatch {
			return nil, bodyError(http.StatusRequestEntityTooLarge, usage.ReasonOversized, "a batch holds at most %d events: send several", maxBatch)
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			// Where one event ends can't be told any more, so neither can what
			// the others are.
			return nil, bodyError(http.StatusBadRequest, usage.ReasonMalformed, "the batch is broken off or is not JSON at event %d", len(events))
		}
		events = append(events, parseStructured(raw, now))
	}
	if _, err := d.Token(); err != nil {
		return nil, bodyError(http.StatusBadRequest, usage.ReasonMalformed, "the batch is broken off after event %d", len(events))
	}
	return events, nil
}

func parseStructured(raw []byte, now time.Time) Event {
	var s structured
	if err := json.Unmarshal(raw, &s); err != nil {
		return bad(Event{Raw: raw}, usage.ReasonMalformed, "the event is not a CloudEvent in JSON: %v", err)
	}
	e := Event{Source: s.Source, ID: s.ID, Raw: raw}
	if s.DataBase64 != "" {
		if s.Data != nil {
			return bad(e, usage.ReasonMalformed, "the event has both data and data_base64")
		}
		data, err := base64.StdEncoding.DecodeString(s.DataBase64)
		if err != nil {
			return bad(e, usage.ReasonMalformed, "the event's data_base64 is not base64")
		}
		s.Data = data
	}
	if s.ContentType != "" && !isJSON(s.ContentType) {
		return bad(e, usage.ReasonUnknownSchema, "the event's data is %q, wanted is JSON", s.ContentType)
	}
	return s.event(e, now)
}

func parseBinary(h http.Header, media string, body []byte, now time.Time) Event {
	s := structured{
		SpecVersion: attribute(h, "specversion"), ID: attribute(h, "id"), Source: attribute(h, "source"), Type: attribute(h, "type"),
		Subject: attribute(h, "subject"), Time: attribute(h, "time"), Traceparent: attribute(h, "traceparent"), ContentType: media,
	}
	e := Event{Source: s.Source, ID: s.ID}
	if json.Valid(body) {
		s.Data = body
	} else {
		s.DataBase64 = base64.StdEncoding.EncodeToString(body)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		raw = body
	}
	e.Raw = raw
	if media != "" && !isJSON(media) {
		return bad(e, usage.ReasonUnknownSchema, "the event's data is %q, wanted is JSON", media)
	}
	s.Data = body
	return s.event(e, now)
}

// attribute reads a ce- header, in which the binding percent-encodes what a
// header can't hold.
func attribute(h http.Header, name string) string {
	v := strings.Trim(h.Get("Ce-"+name), `"`)
	if strings.Contains(v, "%") {
		if u, err := url.PathUnescape(v); err == nil {
			return u
		}
	}
	return v
}

func isJSON(media string) bool {
	m, _, err := mime.ParseMediaType(media)
	return err == nil && (m == mediaJSON || m == "text/json" || strings.HasSuffix(m, "+json"))
}

func (s *structured) event(e Event, now time.Time) Event {
	at := s.Time
	if at == "" {
		// The attribute is optional. It is no part of the event's identity, so a
		// second try that is stamped later is still the same event.
		at = now.UTC().Format(time.RFC3339Nano)
	}
	c, err := ledger.CallFromCloudEvent(s.SpecVersion, s.Type, s.Source, s.ID, s.Subject, at, s.Data)
	if err == nil {
		err = c.Validate(usage.At(now))
	}
	var invalid *usage.InvalidError
	switch {
	case errors.As(err, &invalid):
		e.Err = invalid
		return e
	case err != nil:
		return bad(e, usage.ReasonMalformed, "%v", err)
	}
	if s.Traceparent != "" {
		c.TraceID, c.SpanID, c.TraceFlags, _ = gate.ParseTraceparent(s.Traceparent)
	}
	e.Call = c
	return e
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
