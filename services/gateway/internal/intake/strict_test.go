package intake

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// data puts a call's data into an event of account acme.
func data(members string) string {
	return fmt.Sprintf(`{"specversion":"1.0","type":%q,"source":"s","id":"i","subject":"acme","data":{%s}}`, ledger.CloudEventType, members)
}

// envelope adds members to an event's envelope.
func envelope(members string) string {
	return strings.Replace(good("acme"), "{", "{"+members+",", 1)
}

// one reads a body of one event in structured mode: its call, or why there is none.
func one(t *testing.T, body string) (usage.Call, string) {
	t.Helper()
	events, err := Parse(http.Header{"Content-Type": {"application/cloudevents+json"}}, []byte(body), now, 10)
	var whole *BodyError
	if errors.As(err, &whole) {
		if whole.Status != http.StatusBadRequest {
			t.Errorf("status %d", whole.Status)
		}
		return usage.Call{}, whole.Error()
	}
	if err != nil || len(events) != 1 {
		t.Fatal(err)
	}
	if events[0].Err != nil {
		return usage.Call{}, events[0].Err.Message
	}
	return events[0].Call, ""
}

func TestAnEventIsTakenWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ body, says string }{ // says is a part of the error; empty: it is taken
		"meter for meters":            {data(`"meter":{"output_tokens":9}`), `did you mean "meters"`},
		"Meters for meters":           {data(`"Meters":{"output_tokens":9}`), `did you mean "meters"`},
		"a member of nobody":          {data(`"tokens":9`), "known are account"},
		"an account misspelt":         {data(`"acount":"acme"`), `did you mean "account"`},
		"durationMicros":              {data(`"durationMicros":5`), `did you mean "duration_micros"`},
		"a member twice":              {data(`"status":200,"status":402`), `"status" twice`},
		"a member twice, escaped":     {data(`"status":200,"\u0073tatus":402`), `"status" twice`},
		"a meter twice":               {data(`"meters":{"calls":1,"calls":2}`), `"calls" twice`},
		"an id twice":                 {envelope(`"id":"j"`), `"id" twice`},
		"data twice":                  {envelope(`"data":{"account":"b"}`), `"data" twice`},
		"a built-in meter, otherwise": {data(`"meters":{"outputTokens":9}`), `spelled "output_tokens"`},
		"a built-in meter, singular":  {data(`"meters":{"Output_Token":9}`), `spelled "output_tokens"`},
		"a meter of one's own":        {data(`"meters":{"images":9}`), ""},
		"meters is a list":            {data(`"meters":[1]`), "meters is an array"},
		"meters is null":              {data(`"meters":null`), ""},
		"a meter is null":             {data(`"meters":{"calls":null}`), ""},
		"a model is null":             {data(`"model":null`), ""},
		"a model is a number":         {data(`"model":5`), "model is a number"},
		"a status is a text":          {data(`"status":"200"`), "not an HTTP status"},
		"a truth is a text":           {data(`"admitted_unknown":"true"`), "send true or false"},
		"a meter is a text":           {data(`"meters":{"calls":"5"}`), "without quotes"},
		"a meter is true":             {data(`"meters":{"calls":true}`), "without quotes"},
		"a meter is an object":        {data(`"meters":{"calls":{"n":5}}`), "is an object"},
		"a fraction":                  {data(`"meters":{"calls":1.5}`), "whole number"},
		"a small fraction":            {data(`"meters":{"calls":1e-400}`), "whole number"},
		"a huge number":               {data(`"meters":{"calls":1e400}`), "at most"},
		"beyond an int64":             {data(`"meters":{"calls":99999999999999999999}`), "at most"},
		"a huge negative number":      {data(`"meters":{"calls":-1e400}`), "negative"},
		"NaN":                         {data(`"meters":{"calls":NaN}`), "not JSON"},
		"a number with a plus":        {data(`"meters":{"calls":+1}`), "not JSON"},
		"a number with a zero before": {data(`"meters":{"calls":01}`), "not JSON"},
		"two events":                  {good("acme") + "\n" + good("acme"), "more after its JSON value"},
		"an event and a half":         {good("acme") + "{", "more after its JSON value"},
		"blanks around":               {"\r\n\t " + good("acme") + "\n\n", ""},
		"a byte order mark":           {"\ufeff" + good("acme"), "byte order mark"},
		"UTF-16":                      {"\xff\xfe{\x00", "UTF-16"},
		"broken off":                  {good("acme")[:40], "breaks off"},
		"a trailing comma":            {strings.Replace(good("acme"), `"i",`, `"i",,`, 1), "not JSON"},
		"a comment":                   {good("acme") + "/*x*/", "more after its JSON value"},
		"invalid UTF-8 in an id":      {strings.Replace(good("acme"), `"i"`, "\"\xff\"", 1), "id is not UTF-8"},
		"invalid UTF-8 in a name":     {data("\"sta\xc3tus\":200"), "not UTF-8"},
		"half a pair":                 {strings.Replace(good("acme"), `"i"`, `"\ud83d"`, 1), "half a surrogate pair"},
		"the other half":              {strings.Replace(good("acme"), `"i"`, `"\uDE00x"`, 1), "half a surrogate pair"},
		"two first halves":            {strings.Replace(good("acme"), `"i"`, `"\ud83d\ud83d\ude00"`, 1), "half a surrogate pair"},
		"a pair":                      {strings.Replace(good("acme"), `"i"`, `"\ud83d\ude00"`, 1), ""},
		"a backslash before u":        {strings.Replace(good("acme"), `"i"`, `"\\ud83d"`, 1), ""},
		"a zero byte":                 {strings.Replace(good("acme"), `"i"`, `"a\u0000"`, 1), "zero byte"},
		"a raw zero byte":             {strings.Replace(good("acme"), `"i"`, "\"a\x00\"", 1), "not JSON"},
		"nested too deep":             {data(`"x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000)), "depth"},
		"nested within the grammar":   {data(`"x":` + strings.Repeat("[", 9_000) + strings.Repeat("]", 9_000)), "unknown member"},
		"many members":                {envelope(strings.TrimSuffix(fmt.Sprintf(strings.Repeat(`"x%d":1,`, 70), numbers(70)...), ",")), "more than 64 members"},
		"too long":                    {data(`"model":"` + strings.Repeat("x", 70_000) + `"`), "at most 65536"},

		"an extension":                     {envelope(`"partitionkey":"p","sequence":5,"x1":true,"x2":null`), ""},
		"an extension of capitals":         {envelope(`"Subject":"acme"`), `did you mean "subject"`},
		"an extension with an underscore":  {envelope(`"my_ext":"x"`), "lower-case letters and digits"},
		"an extension that is an object":   {envelope(`"extensions":{"a":1}`), "attributes hold"},
		"time misspelt":                    {envelope(`"tiem":"2026-03-01T12:00:00Z"`), "no time"},
		"subject misspelt":                 {envelope(`"subjct":"acme"`), "no subject"},
		"an extension account":             {envelope(`"account":"123456789012"`), ""}, // data says whose call it is
		"an extension account and subject": {strings.Replace(envelope(`"account":"1234","subject":"acme"`), `"data":{"account":"acme"}`, `"data":{}`, 1), ""},
		"an extension region":              {strings.Replace(envelope(`"region":"us-east-1"`), `{"account":"acme"}`, `{"account":"acme","region":"eu"}`, 1), ""},
		"account beside data":              {strings.Replace(envelope(`"account":"acme"`), `"data":{"account":"acme"}`, `"data":{}`, 1), "move it into data"},
		"region beside data":               {envelope(`"region":"eu"`), "move it into data"},
		"region beside null":               {strings.Replace(envelope(`"region":"eu"`), `{"account":"acme"}`, `{"account":"acme","region":null}`, 1), "move it into data"},
		"status beside data":               {envelope(`"status":500`), "move it into data"},
		"meters beside data":               {envelope(`"meters":{"calls":5}`), "move it into data"},
		"a sampled event":                  {envelope(`"sampledrate":30`), "sampledrate is 30"},
		"an event that is not sampled":     {envelope(`"sampledrate":1`), ""},
		"data by reference":                {strings.Replace(envelope(`"dataref":"http://x/"`), `"data":{"account":"acme"}`, `"x":1`, 1), "references are not followed"},
		"a number as specversion":          {strings.Replace(good("acme"), `"1.0"`, `1.0`, 1), "specversion is a number"},
		"a null subject":                   {envelope(`"subject":null,"time":null,"datacontenttype":null,"data_base64":null`), ""},
		"null data":                        {strings.Replace(good("acme"), `{"account":"acme"}`, `null`, 1), "data is null"},
		"an empty time":                    {envelope(`"time":""`), "time is empty"},
		"data in another charset":          {envelope(`"datacontenttype":"application/json; charset=utf-16"`), "send UTF-8"},
		"data in UTF-8, loudly":            {envelope(`"datacontenttype":"Application/JSON; Charset=UTF-8"`), ""},
		"both datas, one of them is empty": {envelope(`"data_base64":""`), "both data and data_base64"},
		"empty base64":                     {strings.Replace(good("acme"), `"data":{"account":"acme"}`, `"data_base64":""`, 1), "data is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, says := one(t, c.body)
			if c.says == "" && says != "" || !strings.Contains(says, c.says) || len(says) > 600 {
				t.Errorf("%q, want %q in it", says, c.says)
			}
		})
	}
}

func numbers(n int) []any {
	all := make([]any, n)
	for i := range all {
		all[i] = i
	}
	return all
}

func TestANumberCountsHoweverItIsWritten(t *testing.T) {
	t.Parallel()
	for written, want := range map[string]int64{
		"0": 0, "-0": 0, "-0.0e5": 0, "1000": 1000, "1e3": 1000, "1E+3": 1000, "1.0": 1, "1000.00": 1000, "0.001e6": 1000, "10e-1": 1, "12.50e1": 125,
		"9007199254740992": 1 << 53, "9007199254740992.000": 1 << 53, "0e999999999999": 0,
	} {
		c, says := one(t, data(`"meters":{"output_tokens":`+written+`}`))
		if got, ok := c.Quantities.Get(usage.OutputTokens); says != "" || !ok || got != want {
			t.Errorf("%s: %d %v %s", written, got, ok, says)
		}
	}
}

func TestTimesAreThoseOfRFC3339(t *testing.T) {
	t.Parallel()
	at := func(s string) usage.Micros {
		v, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return usage.At(v)
	}
	for written, want := range map[string]string{ // want "": refused
		"2026-03-01T12:00:00Z":             "2026-03-01T12:00:00Z",
		"2026-03-01t12:00:00z":             "2026-03-01T12:00:00Z",
		"2026-03-01T12:00:00.5Z":           "2026-03-01T12:00:00.5Z",
		"2026-03-01T12:00:00.1234567891Z":  "2026-03-01T12:00:00.123456Z",
		"2026-03-01T12:00:00.000000000Z":   "2026-03-01T12:00:00Z",
		"2026-03-01T14:30:00+02:30":        "2026-03-01T12:00:00Z",
		"2026-03-01T12:00:00-00:00":        "2026-03-01T12:00:00Z",
		"2026-02-28T12:01:00-23:59":        "2026-03-01T12:00:00Z",
		"2024-02-29T00:00:00Z":             "2024-02-29T00:00:00Z",
		"2016-12-31T23:59:60Z":             "2016-12-31T23:59:59.999999Z",
		"2016-12-31t23:59:60.5z":           "2016-12-31T23:59:59.999999Z",
		"2016-12-31T15:59:60-08:00":        "2016-12-31T23:59:59.999999Z",
		"2017-01-01T05:29:60+05:30":        "2016-12-31T23:59:59.999999Z",
		"2025-06-30T23:59:60Z":             "2025-06-30T23:59:59.999999Z",
		"2026-02-15T23:59:60Z":             "", // leap seconds end a month
		"2026-01-31T12:00:60Z":             "", // in UTC
		"2016-12-31T23:59:60+01:00":        "",
		"2016-12-31T23:59:61Z":             "",
		"2026-03-01T12:00:00,5Z":           "",
		"2026-03-01T12:00:00.Z":            "",
		"2026-03-01 12:00:00Z":             "",
		"2026-03-01T12:00:00":              "",
		"2026-03-01T12:00:00+0200":         "",
		"2026-03-01T12:00:00+24:00":        "",
		"2026-03-01T12:00:00+02:60":        "",
		"2026-03-01T12:00Z":                "",
		"2026-03-01T24:00:00Z":             "",
		"2026-03-01T12:60:00Z":             "",
		"2026-02-30T12:00:00Z":             "",
		"2026-13-01T12:00:00Z":             "",
		"2026-00-01T12:00:00Z":             "",
		"2026-03-00T12:00:00Z":             "",
		"26-03-01T12:00:00Z":               "",
		"+2026-03-01T12:00:00Z":            "",
		"2026-3-1T12:00:00Z":               "",
		"2026-03-01T1:00:00Z":              "",
		"2026-03-01T12:00:00Z ":            "",
		"2026-03-01T12:00:00ZZ":            "",
		"20260301T120000Z":                 "",
		"2026-W09-7":                       "",
		"1772366400":                       "",
		"２０２６-03-01T12:00:00Z":             "",
		"2026-03-01T12:00:00\u221202:00":   "",
		"2026-03-01T12:00:00.5\u00a0Z":     "",
		"Sun, 01 Mar 2026 12:00:00 GMT":    "",
		"2026-03-01T12:00:00.999999999Z":   "2026-03-01T12:00:00.999999Z",
		"2026-03-01T12:00:00.0000005Z":     "2026-03-01T12:00:00Z",
		"2000-01-01T00:00:00.000001+00:00": "2000-01-01T00:00:00.000001Z",
	} {
		c, says := one(t, envelope(fmt.Sprintf(`"time":%q`, written)))
		if want == "" {
			if !strings.Contains(says, "is not RFC 3339: send one like") {
				t.Errorf("%q: %v %s", written, c.Time, says)
			}
			continue
		}
		if says != "" || c.Time != at(want) {
			t.Errorf("%q: %v %s, want %s", written, c.Time.Time(), says, want)
		}
	}
	if c, says := one(t, good("acme")); says != "" || c.Time != usage.At(now) {
		t.Errorf("no time: %v %s", c.Time, says)
	}
}

// A second spelling of an identity would count a second time.
func TestAnIdentityIsOneHoweverItIsSpelled(t *testing.T) {
	t.Parallel()
	const id = `q"1 %ü` + "\U0001F600"
	for name, body := range map[string]string{
		"as it is": `"q\"1 %ü😀"`,
		"escaped":  `"\u0071\u00221\u0020\u0025\u00fc\uD83D\uDE00"`,
	} {
		if c, says := one(t, strings.Replace(good("acme"), `"i"`, body, 1)); says != "" || c.EventID != id {
			t.Errorf("%s: %q %s", name, c.EventID, says)
		}
	}
	for name, c := range map[string]struct {
		header []string
		id     string // empty: refused
		says   string
	}{
		"percent-encoded":             {[]string{"q%221%20%25%C3%BC%F0%9F%98%80"}, id, ""},
		"in lower case":               {[]string{"q%221%20%25%c3%bc%f0%9f%98%80"}, id, ""},
		"more than needed":            {[]string{"%71%221%20%25%C3%BC%F0%9F%98%80"}, id, ""},
		"quoted":                      {[]string{`"q\"1 %25%C3%BC%F0%9F%98%80"`}, id, ""},
		"quoted, more than needed":    {[]string{`"\q\"\1 %25%C3%BC%F0%9F%98%80"`}, id, ""},
		"neither (CloudEvents 1.0.0)": {[]string{`q"1 %25ü😀`}, id, ""},
		"once and no more":            {[]string{"q%25221"}, "q%221", ""},
		"a plus":                      {[]string{"a+b"}, "a+b", ""},
		"quotes that are encoded":     {[]string{"%22q%22"}, `"q"`, ""},
		"a quote that does not end":   {[]string{`"q`}, "", "begins with a quote"},
		"an escape that does not end": {[]string{`"q\"`}, "", "begins with a quote"},
		"more after the quote":        {[]string{`"q"1`}, "", "begins with a quote"},
		"a quote within quotes":       {[]string{`"q"1"`}, "", "begins with a quote"},
		"a bare percent":              {[]string{"50%"}, "", "send %25"},
		"a percent of no digits":      {[]string{"50%zz"}, "", "send %25"},
		"an overlong space":           {[]string{"a%C0%A0"}, "", "not UTF-8"},
		"a surrogate":                 {[]string{"a%ED%A0%80"}, "", "not UTF-8"},
		"Latin-1":                     {[]string{"a\xfc"}, "", "not UTF-8"},
		"a zero byte":                 {[]string{"a%00"}, "", "zero byte"},
		"twice":                       {[]string{"a", "b"}, "", "id twice"},
		"twice the same":              {[]string{"a", "a"}, "", "id twice"},
		"empty":                       {[]string{""}, "", "needs a source and an id"},
	} {
		h := http.Header{"Content-Type": {"application/json"}, "Ce-Specversion": {"1.0"}, "Ce-Type": {ledger.CloudEventType}, "Ce-Source": {"s"}, "Ce-Subject": {"acme"}, "Ce-Id": c.header}
		events, err := Parse(h, []byte(`{}`), now, 10)
		if err != nil || len(events) != 1 {
			t.Fatalf("%s: %v", name, err)
		}
		e := events[0]
		if c.id == "" {
			if e.Err == nil || !strings.Contains(e.Err.Message, c.says) || !json.Valid(e.Raw) {
				t.Errorf("%s: %q %v %s", name, e.Call.EventID, e.Err, e.Raw)
			}
			continue
		}
		if e.Err != nil || e.Call.EventID != c.id {
			t.Errorf("%s: %q %v", name, e.Call.EventID, e.Err)
		}
	}
}

func TestTheBinaryModesOtherHeaders(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		header, value, body string
		status              int // of the whole body; 0: of its event
		says                string
	}{
		"an extension":           {"Ce-Partitionkey", "p", `{}`, 0, ""},
		"a trace":                {"Ce-Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", `{}`, 0, ""},
		"the type twice over":    {"Ce-Datacontenttype", "application/json", `{}`, 0, "Content-Type only"},
		"a member of data":       {"Ce-Region", "eu", `{}`, 0, "move it into data"},
		"data":                   {"Ce-Data", "{}", `{}`, 0, "move it into data"},
		"a misspelt time":        {"Ce-Tiem", "2026-03-01T12:00:00Z", `{}`, 0, "no time"},
		"an empty time":          {"Ce-Time", "", `{}`, 0, "time is empty"},
		"an underscore":          {"Ce-Key_id", "k", `{}`, 0, "move it into data"},
		"an encoded time":        {"Ce-Time", "2026-03-01T12%3A00%3A00Z", `{}`, 0, ""},
		"sampled":                {"Ce-Sampledrate", "2", `{}`, 0, "sampledrate is 2"},
		"a structured event":     {"X-A", "b", good("acme"), 0, "unknown member"},
		"two datas":              {"X-A", "b", `{}{}`, 400, "more after its JSON value"},
		"no data":                {"X-A", "b", ``, 400, "is empty"},
		"data that is no JSON":   {"X-A", "b", `<a/>`, 400, "not JSON"},
		"data of another type":   {"Content-Type", "text/xml", `<a/>`, 415, "send application/json"},
		"no type":                {"Content-Type", "", `{}`, 0, ""},
		"a type in odd case":     {"Content-Type", `APPLICATION/Json;CharSet="UTF-8"`, `{}`, 0, ""},
		"a type of one's own":    {"Content-Type", "application/vnd.acme+json", `{}`, 0, ""},
		"another charset":        {"Content-Type", "application/json; charset=iso-8859-1", `{}`, 415, "send UTF-8"},
		"a type that is none":    {"Content-Type", "json", `{}`, 415, "send application/json"},
		"a broken type":          {"Content-Type", "application/json; charset", `{}`, 415, "is no media type"},
		"a batch of the headers": {"Content-Type", "application/cloudevents-batch+json", `[]`, 0, "no events"},
	} {
		h := http.Header{"Content-Type": {"application/json"}, "Ce-Specversion": {"1.0"}, "Ce-Type": {ledger.CloudEventType}, "Ce-Source": {"s"}, "Ce-Subject": {"acme"}, "Ce-Id": {"i"}}
		h.Set(c.header, c.value)
		if c.header == "Content-Type" && c.value == "" {
			h.Del("Content-Type")
		}
		events, err := Parse(h, []byte(c.body), now, 10)
		var whole *BodyError
		says, status := "", 0
		switch {
		case errors.As(err, &whole):
			says, status = whole.Error(), whole.Status
			if whole.Raw != nil && (!json.Valid(whole.Raw) || !bytes.Contains(whole.Raw, []byte(`"id":"i"`))) {
				t.Errorf("%s: the dead letter does not say of what event it is: %s", name, whole.Raw)
			}
		case len(events) == 0:
			says = "no events"
		case events[0].Err != nil:
			says = events[0].Err.Message
		}
		if status != c.status || c.says == "" && says != "" || !strings.Contains(says, c.says) {
			t.Errorf("%s: %d %q, want %d %q", name, status, says, c.status, c.says)
		}
	}
}

// request posts a body and returns the answer.
func request(t *testing.T, g Gate, method, body string, header http.Header) (*httptest.ResponseRecorder, Reply) {
	t.Helper()
	h, err := NewHandler(HandlerOptions{Gate: g, DeadLetters: letters(t), Now: func() time.Time { return now }, Timeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(method, "/v1/events", strings.NewReader(body))
	r.Header = header
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var reply Reply
	if err := json.Unmarshal(w.Body.Bytes(), &reply); err != nil {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w, reply
}

func TestABodyThatCannotBeReadIsRefusedAsAWhole(t *testing.T) {
	t.Parallel()
	zipped := func() string {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		if _, err := z.Write([]byte(good("acme"))); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}()
	const structured, batch = "application/cloudevents+json", "application/cloudevents-batch+json"
	for name, c := range map[string]struct {
		contentType, encoding, body string
		status                      int
		says                        string
	}{
		"gzip":                        {structured, "gzip", zipped, 415, `Content-Encoding is "gzip"`},
		"deflate":                     {structured, "Deflate", "x", 415, "Content-Encoding"},
		"br, of a batch":              {batch, "br", "x", 415, "Content-Encoding"},
		"zstd within identity":        {structured, "identity, zstd", "x", 415, "Content-Encoding"},
		"identity":                    {structured, "identity", good("acme"), 202, ""},
		"gzip that does not say so":   {structured, "", zipped, 400, "not JSON"},
		"no type":                     {"", "", good("acme"), 415, "send Content-Type"},
		"plain JSON":                  {"application/json", "", good("acme"), 415, "send Content-Type"},
		"lines of JSON":               {"application/x-ndjson", "", good("acme") + "\n" + good("acme"), 415, "send Content-Type"},
		"another charset":             {structured + "; charset=latin1", "", good("acme"), 415, "send UTF-8"},
		"odd case":                    {"Application/CloudEvents+JSON; Charset=\"Utf-8\"", "", good("acme"), 202, ""},
		"a batch as one event":        {structured, "", "[" + good("acme") + "]", 422, "is an array"},
		"an event as a batch":         {batch, "", good("acme"), 400, "is an object"},
		"two batches":                 {batch, "", "[" + good("acme") + "]\n[" + good("acme") + "]", 400, "more after its JSON value"},
		"lines of events as a batch":  {batch, "", good("acme") + "\n" + good("acme"), 400, "more after its JSON value"},
		"a batch and rubbish":         {batch, "", "[" + good("acme") + "]x", 400, "more after its JSON value"},
		"a batch that breaks off":     {batch, "", "[" + good("acme") + ",", 400, "breaks off"},
		"a batch without a comma":     {batch, "", "[" + good("acme") + good("acme") + "]", 400, "not JSON"},
		"a batch that ends in comma":  {batch, "", "[" + good("acme") + ",]", 400, "not JSON"},
		"an empty batch":              {batch, "", " [ ] ", 202, ""},
		"no batch at all":             {batch, "", "", 400, "is empty"},
		"a deep batch":                {batch, "", strings.Repeat("[", 20_000), 400, "depth"},
		"protobuf":                    {"application/cloudevents+protobuf", "", "x", 415, "can't be read"},
		"a batch in another encoding": {"application/cloudevents-batch+avro", "", "x", 415, "can't be read"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGate(true)
			h := http.Header{}
			if c.contentType != "" {
				h.Set("Content-Type", c.contentType)
			}
			if c.encoding != "" {
				h.Set("Content-Encoding", c.encoding)
			}
			w, reply := request(t, g, http.MethodPost, c.body, h)
			said := ""
			if len(reply.Rejected) > 0 {
				said = reply.Rejected[0].Detail
			}
			if w.Code != c.status || c.says == "" && said != "" || !strings.Contains(said, c.says) {
				t.Errorf("%d %s, want %d %q", w.Code, w.Body, c.status, c.says)
			}
			if c.status == 415 && w.Header().Get("Accept-Encoding") != "identity" {
				t.Errorf("%v", w.Header())
			}
			if c.status != 202 && len(g.calls) > 0 {
				t.Errorf("%d calls were taken", len(g.calls))
			}
		})
	}
}

func TestABatchSaysWhichEventsWereTaken(t *testing.T) {
	t.Parallel()
	for name, bad := range map[string]string{
		"null": "null", "a number": "5", "a batch": "[" + good("acme") + "]", "no id": strings.Replace(good("acme"), `"i"`, `""`, 1),
		"invalid UTF-8": strings.Replace(good("acme"), `"i"`, "\"\xff\"", 1), "an unknown member": data(`"meter":{}`),
	} {
		g := newGate(true)
		w, reply := request(t, g, http.MethodPost, "["+good("acme")+","+bad+","+good("acme")+"]", http.Header{"Content-Type": {"application/cloudevents-batch+json"}})
		if w.Code != 207 || reply.Accepted != 2 || len(reply.Rejected) != 1 || reply.Rejected[0].Index != 1 || len(g.calls) != 2 {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
}

func TestOnlyPOSTTakesEvents(t *testing.T) {
	t.Parallel()
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete, http.MethodPatch, http.MethodOptions} {
		g := newGate(true)
		w, reply := request(t, g, method, good("acme"), http.Header{"Content-Type": {"application/cloudevents+json"}})
		if w.Code != 405 || w.Header().Get("Allow") != "POST" || reply.Detail == "" || len(g.calls) > 0 {
			t.Errorf("%s: %d %v %s", method, w.Code, w.Header(), w.Body)
		}
	}
}

// A handler that only returns is answered for with 200 by the server.
func TestABodyThatBreaksOffIsNoSuccess(t *testing.T) {
	t.Parallel()
	h, err := NewHandler(HandlerOptions{Gate: newGate(true), DeadLetters: letters(t)})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/v1/events", iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(good("acme")))))
	r.Header.Set("Content-Type", "application/cloudevents+json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "send the whole request again") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}
