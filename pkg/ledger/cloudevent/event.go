// Package cloudevent reads calls of gateways that are not ours, which come as
// CloudEvents 1.0: the one reader for both doors, the gateway's POST /v1/events and the
// ledger's stream. It takes a whole event or none of it. What an event says and the
// reader does not understand makes the event uncountable, with the reason, because to
// leave it out would count less than the sender meant. The exception is the protocol's
// own: extension attributes, which brokers add on the way. Of them traceparent is
// taken, the others are not read (extension says which of those are refused).
//
// It is pure, and safe for concurrent use.
package cloudevent

import (
	"encoding/base64"
	"fmt"
	"mime"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Type is the type attribute of a call.
const Type = "io.tollkeeper.call.v1"

// Media types of CloudEvents in JSON.
const (
	StructuredType = "application/cloudevents+json"
	BatchType      = "application/cloudevents-batch+json"
)

// MaxBytes bounds an event in JSON, and the data of one in binary mode: a call's texts
// and meters, escaped at their worst, are far smaller.
const MaxBytes = 64 << 10

// Data is the data of a call as a CloudEvent.
type Data struct {
	Account        string            `json:"account,omitempty"` // or the event's subject
	KeyID          string            `json:"key_id,omitempty"`
	RequestID      string            `json:"request_id,omitempty"`
	Method         string            `json:"method,omitempty"`
	Route          string            `json:"route,omitempty"`
	Model          string            `json:"model,omitempty"`
	Region         string            `json:"region,omitempty"`
	Status         int64             `json:"status,omitempty"`
	Code           string            `json:"code,omitempty"` // of a refusal
	DurationMicros int64             `json:"duration_micros,omitempty"`
	Meters         map[string]*int64 `json:"meters,omitempty"` // null: unknown
	Currency       string            `json:"currency,omitempty"`
	// AdmittedUnknown: it passed under the policy for unknown verdicts, as the
	// answer of /v1/admit has said (law 5).
	AdmittedUnknown bool `json:"admitted_unknown,omitempty"`
}

// dataMembers are the members of Data.
var dataMembers = []string{
	"account", "key_id", "request_id", "method", "route", "model", "region", "status", "code", "duration_micros", "meters", "currency", "admitted_unknown",
}

// optional are the attributes that an event may lack.
var optional = []string{"subject", "time", "datacontenttype", "dataschema", "traceparent"}

// Event is a CloudEvent that was read. After an error it holds what could be read all
// the same, so that a report can name the event.
type Event struct {
	Source, ID string

	specVersion, eventType, subject, time, contentType, traceparent string
	// extensions are the names of the attributes that are not the protocol's.
	extensions []string
	// misplaced are those with the name of a member of Data: data must say it too, or the
	// event would be taken with less than it says.
	misplaced []string
	told      []string // members that data has
	data      []byte   // nil: there is none
	base64    bool
	checked   bool // data is JSON for certain
}

// Attribute is a context attribute in its text form.
type Attribute struct{ Name, Value string }

// Read reads an event in JSON (structured mode, or an element of a batch). Its errors
// are *usage.InvalidError.
func Read(json []byte) (Event, error) {
	var e Event
	if err := e.structured(json); err != nil {
		return e, err
	}
	return e, nil
}

// Binary reads an event whose attributes came beside its data. contentType is the
// datacontenttype and may be empty. Its errors are *usage.InvalidError.
func Binary(attributes []Attribute, contentType string, data []byte) (Event, error) {
	e := Event{contentType: contentType, data: data}
	var first *usage.InvalidError
	for i, a := range attributes {
		err := e.attribute(a.Name, a.Value)
		switch {
		case a.Name == "datacontenttype":
			err = malformed("the event has the attribute datacontenttype beside a Content-Type: send the Content-Type only")
		case slices.ContainsFunc(attributes[:i], func(b Attribute) bool { return b.Name == a.Name }):
			err = malformed("the event has the attribute %s twice: send it once", clip(a.Name))
		case a.Value == "" && (a.Name == "time" || a.Name == "specversion"):
			err = malformed("the event's %s is empty: leave it out, or fill it in", a.Name)
		case !utf8.ValidString(a.Value):
			err = malformed("the event's attribute %s is not UTF-8", clip(a.Name))
		}
		if first == nil {
			first = err
		}
	}
	if first == nil {
		first = e.known()
	}
	if first == nil && len(data) > MaxBytes {
		first = oversized("the event's data has %d bytes, at most %d are allowed", len(data), MaxBytes)
	}
	if first != nil {
		return e, first
	}
	return e, nil
}

// ErrTooMany says that a batch has more events than may be taken at once.
type ErrTooMany struct{ Most int }

func (e *ErrTooMany) Error() string {
	return fmt.Sprintf("a batch holds at most %d events: send several", e.Most)
}

// Batch cuts a batch into its events. It checks the JSON of the whole: an error, an
// *usage.InvalidError or *ErrTooMany, is of the whole batch.
func Batch(text []byte, most int) ([][]byte, error) {
	if err := checkJSON("the batch", text); err != nil {
		return nil, err
	}
	array := text[skipBlank(text, 0):]
	if array[0] != '[' {
		return nil, malformed("the batch is %s: send a JSON array of events", kindOf(array))
	}
	var events [][]byte
	tooMany := false
	elements(array, func(value []byte) bool {
		tooMany = len(events) == most
		events = append(events, value)
		return !tooMany
	})
	if tooMany {
		return nil, &ErrTooMany{most}
	}
	return events, nil
}

// Check reports why a text is not one JSON value, as an *usage.InvalidError; what names
// it in the message.
func Check(what string, text []byte) error {
	if err := checkJSON(what, text); err != nil {
		return err
	}
	return nil
}

func (e *Event) structured(json []byte) *usage.InvalidError {
	if len(json) > MaxBytes {
		return oversized("the event has %d bytes, at most %d are allowed", len(json), MaxBytes)
	}
	if err := checkJSON("the event", json); err != nil {
		return err
	}
	json = json[skipBlank(json, 0):]
	if json[0] != '{' {
		return malformed("the event is %s: send a JSON object", kindOf(json))
	}
	err := members("the event", json, func(name string, value []byte) *usage.InvalidError {
		// The JSON format: null is the same as to leave the attribute out.
		null := isNull(value)
		switch name {
		case "data":
			if e.base64 {
				return errBothDatas
			}
			e.data, e.checked = value, true
			return nil
		case "data_base64":
			if null {
				return nil
			}
			if e.data != nil {
				return errBothDatas
			}
			s, err := text("the event's ", name, value)
			if err != nil {
				return err
			}
			if e.data, e.base64 = []byte{}, true; len(s) > 0 {
				data, bad := base64.StdEncoding.DecodeString(s)
				if bad != nil {
					return malformed("the event's data_base64 is not base64: %v", bad)
				}
				e.data = data
			}
			return nil
		}
		if value[0] == '{' || value[0] == '[' {
			if slices.Contains(dataMembers, name) {
				return misplaced(name)
			}
			return malformed("the event's attribute %q is %s: attributes hold a text, a number, or true or false", clip(name), kindOf(value))
		}
		if null {
			return e.attribute(name, "")
		}
		s := string(value)
		if value[0] == '"' || !e.extended(name) {
			var err *usage.InvalidError
			if s, err = text("the event's ", name, value); err != nil {
				return err
			}
			if s == "" && (name == "time" || name == "datacontenttype") {
				return malformed("the event's %s is empty: leave it out, or fill it in", name)
			}
		}
		return e.attribute(name, s)
	})
	if err != nil {
		return err
	}
	return e.known()
}

var errBothDatas = malformed("the event has both data and data_base64: send one of them")

func misplaced(name string) *usage.InvalidError {
	return malformed("the event has %q beside its data: move it into data", name)
}

// place returns where an attribute of the protocol is kept; nil: it is an extension.
func (e *Event) place(name string) *string {
	switch name {
	case "specversion":
		return &e.specVersion
	case "id":
		return &e.ID
	case "source":
		return &e.Source
	case "type":
		return &e.eventType
	case "subject":
		return &e.subject
	case "time":
		return &e.time
	case "datacontenttype":
		return &e.contentType
	case "traceparent":
		return &e.traceparent
	}
	return nil
}

func (e *Event) extended(name string) bool { return name != "dataschema" && e.place(name) == nil }

// attribute takes an attribute; an empty value says nothing.
func (e *Event) attribute(name, value string) *usage.InvalidError {
	if place := e.place(name); place != nil {
		*place = value
		return nil
	}
	if name == "dataschema" {
		// The type says already what the data is.
		return nil
	}
	if name == "meters" || name == "data" {
		return misplaced(name)
	}
	if slices.Contains(dataMembers, name) {
		if value == "" {
			return nil
		}
		e.misplaced = append(e.misplaced, name)
		return nil
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return malformed("the event's attribute %q is none of CloudEvents 1.0, whose names are of lower-case letters and digits%s", clip(name), suggest(name, append(append([]string{"id", "source", "type", "specversion", "data"}, optional...), dataMembers...)))
		}
	}
	if name == "" {
		return malformed("the event has an attribute without a name")
	}
	if name == "sampledrate" && value != "" && value != "1" {
		return malformed("the event's sampledrate is %s: an event is one call; send an event for each, or their number in the meter calls", clip(value))
	}
	e.extensions = append(e.extensions, name)
	return nil
}

// known reports an extension attribute that was meant for one of the protocol's: it
// differs by a letter from one that the event lacks.
func (e *Event) known() *usage.InvalidError {
	for _, name := range e.extensions {
		for _, o := range []string{"id", "source", "type", "specversion", "subject", "time", "traceparent"} {
			if *e.place(o) == "" && len(o) > 2 && nearly(name, o) {
				return malformed("the event has an attribute %q and no %s: is it misspelt? Rename it", clip(name), o)
			}
		}
		if name == "dataref" && e.data == nil {
			return malformed("the event has a dataref and no data: references are not followed, send the data")
		}
	}
	return nil
}

// Call makes a call of the event. arrived stands in for the time of an event that has
// none, and is what its time is held against; 0: such events are refused. Its errors
// are *usage.InvalidError.
func (e *Event) Call(arrived usage.Micros) (usage.Call, error) {
	c, err := e.call(arrived)
	if err != nil {
		return usage.Call{}, err
	}
	return c, nil
}

func (e *Event) call(arrived usage.Micros) (c usage.Call, err *usage.InvalidError) {
	if e.specVersion != "1.0" || e.eventType != Type {
		return c, &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the event is of type %q, specversion %q; send type %q, specversion \"1.0\"", clip(e.eventType), clip(e.specVersion), Type)}
	}
	if e.Source == "" || e.ID == "" {
		return c, malformed("the event needs a source and an id: they are its identity")
	}
	c.Time, c.Source, c.EventID = arrived, e.Source, e.ID
	switch at, ok := parseTime(e.time); {
	case ok:
		c.Time = at
	case e.time != "":
		return c, malformed("the event's time %q is not RFC 3339: send one like 2026-01-31T23:59:59.123Z", clip(e.time))
	case arrived == 0:
		return c, malformed("the event has no time: send one like 2026-01-31T23:59:59.123Z")
	}
	if e.contentType != "" {
		if err := jsonType(e.contentType); err != nil {
			return c, err
		}
	}
	if err := e.readData(&c); err != nil {
		return c, err
	}
	for _, name := range e.misplaced {
		if !slices.Contains(e.told, name) && (name != "account" || e.subject == "") {
			return c, misplaced(name)
		}
	}
	if c.Account == "" {
		c.Account = e.subject
	}
	c.TraceID, c.SpanID, c.TraceFlags, _ = usage.ParseTraceparent(e.traceparent)
	return c, nil
}

// JSONType reports why data of a media type can't be read, as an *usage.InvalidError.
func JSONType(contentType string) error {
	if err := jsonType(contentType); err != nil {
		return err
	}
	return nil
}

func jsonType(contentType string) *usage.InvalidError {
	media, params, err := mime.ParseMediaType(contentType)
	if err != nil || media != "application/json" && media != "text/json" && !strings.HasSuffix(media, "+json") {
		return &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the event's data is %q: send application/json", clip(contentType))}
	}
	return charset(params)
}

// charset reports a charset that is not UTF-8 or a part of it.
func charset(params map[string]string) *usage.InvalidError {
	switch cs := params["charset"]; strings.ToLower(cs) {
	case "", "utf-8", "utf8", "us-ascii", "ascii":
		return nil
	default:
		return &usage.InvalidError{Reason: usage.ReasonUnknownSchema, Message: fmt.Sprintf("the charset %q can't be read: send UTF-8", clip(cs))}
	}
}

// MediaType reads a Content-Type: its media type in lower case, or why its charset
// can't be read, as an *usage.InvalidError. A text that is no media type is "".
func MediaType(contentType string) (string, error) {
	media, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		return "", nil
	}
	if err := charset(params); err != nil {
		return media, err
	}
	return media, nil
}

func (e *Event) readData(c *usage.Call) *usage.InvalidError {
	if e.data == nil {
		return malformed("the event has no data: send the call as its data")
	}
	if !e.checked {
		if err := checkJSON("the event's data", e.data); err != nil {
			return err
		}
	}
	data := e.data[skipBlank(e.data, 0):]
	if data[0] != '{' {
		return malformed("the event's data is %s: send a JSON object", kindOf(data))
	}
	return members("the event's data", data, func(name string, value []byte) *usage.InvalidError {
		if !slices.Contains(dataMembers, name) {
			return malformed("the event's data has an unknown member %q%s", clip(name), suggest(name, dataMembers))
		}
		if isNull(value) {
			return nil
		}
		if e.misplaced != nil {
			e.told = append(e.told, name)
		}
		var err *usage.InvalidError
		switch name {
		case "account":
			c.Account, err = text("", name, value)
		case "key_id":
			c.KeyID, err = text("", name, value)
		case "request_id":
			c.RequestID, err = text("", name, value)
		case "method":
			c.Method, err = text("", name, value)
		case "route":
			c.Route, err = text("", name, value)
		case "model":
			c.Model, err = text("", name, value)
		case "region":
			c.Region, err = text("", name, value)
		case "currency":
			c.Currency, err = text("", name, value)
		case "code":
			var code string
			if code, err = text("", name, value); err == nil && code != "" && usage.Code(code).Status() == 0 {
				return malformed("%q is not a refusal code: send one such as %s, or none where the call was admitted", clip(code), usage.QuotaExceeded)
			}
			c.Code = usage.Code(code)
		case "status":
			var status int64
			if status, err = whole("", name, value); err != nil || status < 0 || status > usage.MaxStatus {
				return malformed("%s is not an HTTP status", clip(string(value)))
			}
			c.Status = uint16(status)
		case "duration_micros":
			c.Duration, err = whole("", name, value)
		case "admitted_unknown":
			var unknown bool
			if unknown, err = boolean(name, value); unknown {
				c.Flags |= usage.AdmittedUnknown
			}
		case "meters":
			return readMeters(value, c)
		}
		return err
	})
}

func readMeters(object []byte, c *usage.Call) *usage.InvalidError {
	if object[0] != '{' {
		return malformed("meters is %s: send an object of names and numbers", kindOf(object))
	}
	const most = usage.NumBuiltIn + usage.MaxCustomMeters
	n := 0
	return members("meters", object, func(name string, value []byte) *usage.InvalidError {
		if n++; n > most {
			return oversized("the event reports more than %d meters", most)
		}
		if meant, ok := builtIn(name); ok {
			return malformed("the meter %q is spelled %q: send that, or another name for a meter of your own", clip(name), meant)
		}
		if isNull(value) {
			return nil // unknown, which is not 0
		}
		v, err := whole("meter ", name, value)
		if err == nil {
			c.Quantities.Set(usage.Meter(name), v)
		}
		return err
	})
}
