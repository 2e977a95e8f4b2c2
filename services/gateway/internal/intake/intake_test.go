package intake

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	cloudevents "github.com/cloudevents/sdk-go/v2"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/cloudevent"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// What CloudEvents' own SDK sends is understood, in all modes.
func TestEventsOfTheOfficialSDK(t *testing.T) {
	t.Parallel()
	e := cloudevents.NewEvent()
	e.SetID("id 1/ü")
	e.SetSource("https://gateway.example/eu-1") // the SDK does not encode "%" as the binding wants
	e.SetType(ledger.CloudEventType)
	e.SetTime(now)
	e.SetSubject("account of the subject")
	e.SetExtension("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	if err := e.SetData(cloudevents.ApplicationJSON, cloudevent.Data{Method: "POST", Status: 200, Meters: map[string]*int64{"input_tokens": new(int64), "output_tokens": nil}}); err != nil {
		t.Fatal(err)
	}
	requests := make(map[string]*http.Request)
	for name, encode := range map[string]func(context.Context) context.Context{"binary": cloudevents.WithEncodingBinary, "structured": cloudevents.WithEncodingStructured} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://x/", nil)
		if err != nil {
			t.Fatal(err)
		}
		m := cloudevents.ToMessage(&e)
		if err := cehttp.WriteRequest(encode(t.Context()), m, r); err != nil {
			t.Fatal(err)
		}
		requests[name] = r
	}
	batch, err := cehttp.NewHTTPRequestFromEvents(t.Context(), "http://x/", []cloudevents.Event{e, e})
	if err != nil {
		t.Fatal(err)
	}
	requests["batch"] = batch
	for name, r := range requests {
		var body bytes.Buffer
		if _, err := body.ReadFrom(r.Body); err != nil {
			t.Fatal(err)
		}
		events, err := Parse(r.Header, body.Bytes(), now, 10)
		if err != nil || len(events) == 0 {
			t.Fatalf("%s: %v", name, err)
		}
		for _, got := range events {
			c := got.Call
			in, ok := c.Quantities.Get(usage.InputTokens)
			_, known := c.Quantities.Get(usage.OutputTokens)
			if got.Err != nil || c.EventID != e.ID() || c.Source != e.Source() || c.Account != e.Subject() || c.Time != usage.At(now) || !ok || in != 0 || known || c.TraceFlags != 1 || !json.Valid(got.Raw) {
				t.Errorf("%s: %+v %v", name, c, got.Err)
			}
		}
	}
}

func TestWhatIsWrongWithAnEvent(t *testing.T) {
	t.Parallel()
	event := func(edit func(map[string]any)) string {
		m := map[string]any{"specversion": "1.0", "type": ledger.CloudEventType, "source": "s", "id": "i", "time": "2026-03-01T12:00:00Z", "data": map[string]any{"account": "a"}}
		edit(m)
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for name, c := range map[string]struct {
		body   string
		reason string
	}{
		"good":            {event(func(map[string]any) {}), ""},
		"no time":         {event(func(m map[string]any) { delete(m, "time") }), ""},
		"base64":          {event(func(m map[string]any) { delete(m, "data"); m["data_base64"] = "eyJhY2NvdW50IjoiYSJ9" }), ""},
		"both datas":      {event(func(m map[string]any) { m["data_base64"] = "eyJhY2NvdW50IjoiYSJ9" }), usage.ReasonMalformed},
		"bad base64":      {event(func(m map[string]any) { delete(m, "data"); m["data_base64"] = "?" }), usage.ReasonMalformed},
		"no data":         {event(func(m map[string]any) { delete(m, "data") }), usage.ReasonMalformed},
		"data is a text":  {event(func(m map[string]any) { m["data"] = "x" }), usage.ReasonMalformed},
		"data is XML":     {event(func(m map[string]any) { m["datacontenttype"] = "text/xml" }), usage.ReasonUnknownSchema},
		"no id":           {event(func(m map[string]any) { delete(m, "id") }), usage.ReasonMalformed},
		"id is a number":  {event(func(m map[string]any) { m["id"] = 5 }), usage.ReasonMalformed},
		"no source":       {event(func(m map[string]any) { m["source"] = "" }), usage.ReasonMalformed},
		"another type":    {event(func(m map[string]any) { m["type"] = "x" }), usage.ReasonUnknownSchema},
		"another version": {event(func(m map[string]any) { m["specversion"] = "2.0" }), usage.ReasonUnknownSchema},
		"no account":      {event(func(m map[string]any) { m["data"] = map[string]any{} }), usage.ReasonMalformed},
		"long account":    {event(func(m map[string]any) { m["data"] = map[string]any{"account": strings.Repeat("a", 257)} }), usage.ReasonOversized},
		"time is no time": {event(func(m map[string]any) { m["time"] = "yesterday" }), usage.ReasonMalformed},
		"a day ahead":     {event(func(m map[string]any) { m["time"] = "2026-03-02T12:00:01Z" }), usage.ReasonAbsurdTime},
		"before 2000":     {event(func(m map[string]any) { m["time"] = "1999-12-31T23:59:59Z" }), usage.ReasonAbsurdTime},
		"negative": {event(func(m map[string]any) {
			m["data"] = map[string]any{"account": "a", "meters": map[string]any{"calls": -1}}
		}), usage.ReasonNegativeCount},
		"a fraction": {event(func(m map[string]any) {
			m["data"] = map[string]any{"account": "a", "meters": map[string]any{"calls": 1.5}}
		}), usage.ReasonMalformed},
		"beyond 2^53": {event(func(m map[string]any) {
			m["data"] = map[string]any{"account": "a", "meters": map[string]any{"x": 1 << 60}}
		}), usage.ReasonOversized},
		"a meter's name":    {event(func(m map[string]any) { m["data"] = map[string]any{"account": "a", "meters": map[string]any{"a b": 1}} }), usage.ReasonMalformed},
		"an unknown code":   {event(func(m map[string]any) { m["data"] = map[string]any{"account": "a", "code": "NOPE"} }), usage.ReasonMalformed},
		"not an object":     {`[]`, usage.ReasonMalformed},
		"nothing":           {``, usage.ReasonMalformed},
		"zero byte in a id": {event(func(m map[string]any) { m["id"] = "a\x00b" }), usage.ReasonMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			events, err := Parse(http.Header{"Content-Type": {"application/cloudevents+json; charset=utf-8"}}, []byte(c.body), now, 10)
			var whole *BodyError
			if errors.As(err, &whole) {
				events = []Event{{Err: whole.Err}}
			} else if err != nil || len(events) != 1 {
				t.Fatal(err)
			}
			reason := ""
			if events[0].Err != nil {
				reason = events[0].Err.Reason
			}
			if reason != c.reason {
				t.Errorf("%q (%v), want %q", reason, events[0].Err, c.reason)
			}
		})
	}
}

// ledgerless is a gate with one account.
type ledgerless struct {
	t     *table.Table
	calls []usage.Call
	err   error
}

func newGate(loaded bool) *ledgerless {
	g := &ledgerless{t: table.New(2, ledger.ShardOf, table.Policy{StaleAfter: 1})}
	if loaded {
		g.t.SetAccount(table.AccountRecord{ID: "acme", Path: []string{"acme"}})
		g.t.DirectoryRead()
	}
	return g
}

func (g *ledgerless) AccountByID(id string) (*gate.Account, gate.Lookup) { return g.t.ByID(id) }

func (g *ledgerless) SettleShard(_ context.Context, _ uint32, c *usage.Call) error {
	if g.err != nil {
		return g.err
	}
	g.calls = append(g.calls, *c)
	return nil
}

func post(t *testing.T, g Gate, d *DeadLetters, body string) (int, Reply) {
	t.Helper()
	h, err := NewHandler(HandlerOptions{Gate: g, DeadLetters: d, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/events", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/cloudevents-batch+json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var reply Reply
	if err := json.Unmarshal(w.Body.Bytes(), &reply); err != nil {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Code, reply
}

func good(account string) string {
	return fmt.Sprintf(`{"specversion":"1.0","type":%q,"source":"s","id":"i","data":{"account":%q}}`, ledger.CloudEventType, account)
}

func letters(t *testing.T) *DeadLetters {
	t.Helper()
	d, err := NewDeadLetters("g1", zerolog.Nop(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestWhileTheLedgerIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { // waiting for the dead-letter stream takes no time here
		d := letters(t)
		g := newGate(true)
		status, reply := post(t, g, d, "["+good("acme")+","+good("nobody")+"]")
		if status != 207 || reply.Accepted != 1 || len(reply.Rejected) != 1 || reply.Rejected[0].Kept || reply.Rejected[0].Reason != usage.ReasonUnknownAccount {
			t.Errorf("a bad event waits: %d %+v", status, reply)
		}
		if d.waiting() != 1 {
			t.Errorf("%d wait", d.waiting())
		}

		g.err = outbox.ErrFull
		if status, reply = post(t, g, d, "["+good("acme")+"]"); status != 503 || reply.Unavailable != 1 {
			t.Errorf("a full outbox: %d %+v", status, reply)
		}
		g.err = fmt.Errorf("settle: %w", &usage.InvalidError{Reason: usage.ReasonOversized, Message: "m"})
		if status, reply = post(t, g, d, "["+good("acme")+"]"); status != 422 || reply.Rejected[0].Reason != usage.ReasonOversized {
			t.Errorf("the outbox finds it bad: %d %+v", status, reply)
		}
		if status, reply = post(t, newGate(false), d, "["+good("acme")+"]"); status != 503 || reply.Accepted != 0 || reply.Unavailable != 1 {
			t.Errorf("no directory: %d %+v", status, reply)
		}
	})
}

func TestTheQueueOfDeadLettersIsBounded(t *testing.T) {
	t.Parallel()
	d := letters(t)
	n := 0
	for {
		if _, err := d.Add([]Letter{{Reason: "malformed", Event: make([]byte, 2*MaxPayload)}}); err != nil {
			if !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
			break
		}
		n++
	}
	if d.bytes > MaxLetterBytes || n < 100 || n > MaxLetters {
		t.Errorf("%d letters, %d bytes", n, d.bytes)
	}
	if h := d.queue[0].msg.Header; h.Get(TruncatedHeader) != fmt.Sprint(2*MaxPayload) {
		t.Errorf("%v", h)
	}
	small := letters(t)
	if _, err := small.Add(make([]Letter, MaxLetters+1)); !errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
	if got := headerValue("a\r\nb\x00" + strings.Repeat("ü", 400)); strings.ContainsAny(got, "\r\n\x00") || len(got) > 512 {
		t.Errorf("%q", got)
	}
}

// patient waits for the disk as long as it is allowed to.
type patient struct{ *ledgerless }

func (g patient) SettleShard(ctx context.Context, shard uint32, c *usage.Call) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", outbox.ErrNotSafe, err)
	}
	return g.ledgerless.SettleShard(ctx, shard, c)
}

type slowly struct{ strings.Reader }

func (s *slowly) Read(p []byte) (int, error) {
	time.Sleep(time.Second) // of the bubble's clock
	return s.Reader.Read(p[:min(len(p), 20)])
}

func TestASlowSendersEventsAreTaken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h, err := NewHandler(HandlerOptions{Gate: patient{newGate(true)}, DeadLetters: letters(t)})
		if err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(http.MethodPost, "/v1/events", &slowly{*strings.NewReader("[" + good("acme") + "]")})
		r.Header.Set("Content-Type", "application/cloudevents-batch+json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != http.StatusAccepted {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}

// What passed while the verdict was unknown leaves an audit trail (law 5), also
// where another gateway let it pass.
func TestAForeignCallThatPassedUnknownSaysSo(t *testing.T) {
	t.Parallel()
	for extra, want := range map[string]usage.Flags{`,"admitted_unknown":true`: usage.AdmittedUnknown, `,"admitted_unknown":false`: 0, "": 0} {
		e := parseStructured([]byte(strings.Replace(good("acme"), `"account":"acme"`, `"account":"acme"`+extra, 1)), now)
		if e.Err != nil || e.Call.Flags != want {
			t.Errorf("%s: %v %v", extra, e.Call.Flags, e.Err)
		}
	}
}
