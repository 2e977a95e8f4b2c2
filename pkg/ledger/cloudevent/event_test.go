package cloudevent

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const example = `{"specversion":"1.0","type":"io.tollkeeper.call.v1","source":"s","id":"1","subject":"a","time":"2026-01-02T03:04:05Z","traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","data":{"key_id":"k","request_id":"r","method":"POST","route":"/v1","model":"m","region":"eu","status":200,"duration_micros":12,"meters":{"calls":1,"input_tokens":1e2,"output_tokens":null,"images":3},"currency":"USD","admitted_unknown":true}}`

func TestAnExampleSaysAllThatACallCan(t *testing.T) {
	t.Parallel()
	e, err := Read([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	c, err := e.Call(0)
	if err != nil {
		t.Fatal(err)
	}
	in, _ := c.Quantities.Get(usage.InputTokens)
	_, out := c.Quantities.Get(usage.OutputTokens)
	images, _ := c.Quantities.Get("images")
	if c.Account != "a" || c.KeyID != "k" || c.RequestID != "r" || c.Method != "POST" || c.Route != "/v1" || c.Model != "m" || c.Region != "eu" ||
		c.Status != 200 || c.Duration != 12 || c.Currency != "USD" || c.Flags != usage.AdmittedUnknown || c.Source != "s" || c.EventID != "1" ||
		in != 100 || out || images != 3 || c.TraceFlags != 1 || c.SpanID[7] != 0x31 || c.Time != 1767323045_000000 {
		t.Errorf("%+v", c)
	}
}

func TestAnEventWithoutATimeNeedsItsArrival(t *testing.T) {
	t.Parallel()
	e, err := Read([]byte(strings.Replace(example, `"time":"2026-01-02T03:04:05Z",`, "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := e.Call(5); err != nil || c.Time != 5 {
		t.Errorf("%v %v", c.Time, err)
	}
	var invalid *usage.InvalidError
	if _, err := e.Call(0); !errors.As(err, &invalid) || invalid.Reason != usage.ReasonMalformed {
		t.Errorf("%v", err)
	}
}

func TestABadEventIsNamedByWhatCouldBeRead(t *testing.T) {
	t.Parallel()
	e, err := Read([]byte(`{"x":{},"source":"s","extensions":[],"id":"i"}`))
	if err == nil || e.Source != "s" || e.ID != "i" {
		t.Errorf("%+v %v", e, err)
	}
}

func TestWhichNamesAreNearly(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"meter", "meters", true},
		{"Meters", "meters", true},
		{"metres", "meters", true},
		{"matters", "meters", false},
		{"keyId", "key_id", true},
		{"mdel", "model", true},
		{"modell", "model", true},
		{"mosel", "model", true},
		{"mole", "model", false},
		{"sequence", "source", false},
		{"", "id", false},
		{strings.Repeat("a", 1000), strings.Repeat("a", 1001), false},
	} {
		if got := nearly(c.a, c.b); got != c.want {
			t.Errorf("%q, %q: %v", c.a, c.b, got)
		}
	}
}

// FuzzRead: no text breaks the reader, and an event that is taken says the same thing
// when the standard library spells it, which also knows no member that was left out.
func FuzzRead(f *testing.F) {
	f.Add([]byte(example))
	for _, r := range [][2]string{
		{`"s"`, `"\ud83d\ude00\\\u0041"`}, {`1e2`, `-0.10e1`}, {`"time"`, `"time":null,"x"`}, {`{"key`, ` { "data_base64" : "e30=" , "key`}, {`05Z`, `60.5+01:00`}, {`"1"`, "\"\xff\""},
	} {
		f.Add([]byte(strings.Replace(example, r[0], r[1], 1)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := Read(data)
		if err != nil {
			return
		}
		c, err := e.Call(1e15)
		if err != nil {
			return
		}
		if !utf8.Valid(data) && c.Validate(c.Time) == nil && !utf8.ValidString(c.EventID) {
			t.Fatal("an id that is not UTF-8 was taken")
		}
		d := json.NewDecoder(bytes.NewReader(data))
		d.UseNumber()
		var generic map[string]any
		if err := d.Decode(&generic); err != nil {
			t.Fatalf("the standard library does not read it: %v", err)
		}
		if call, ok := generic["data"].(map[string]any); ok {
			for name := range call {
				if !slices.Contains(dataMembers, name) {
					t.Fatalf("member %q was left out", name)
				}
			}
		}
		again, err := json.Marshal(generic)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > MaxBytes {
			return // escaped at its worst
		}
		e2, err := Read(again)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		c2, err := e2.Call(1e15)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		if !equal(&c, &c2) {
			t.Fatalf("%+v became %+v by another spelling\n%s\n%s", c, c2, data, again)
		}
	})
}

func equal(a, b *usage.Call) bool {
	qa, qb := a.Quantities, b.Quantities
	x, y := *a, *b
	x.Quantities, y.Quantities = usage.Quantities{}, usage.Quantities{}
	for i := range usage.NumBuiltIn {
		va, oka := qa.BuiltIn(usage.BuiltIn(i))
		vb, okb := qb.BuiltIn(usage.BuiltIn(i))
		if va != vb || oka != okb {
			return false
		}
	}
	return x.Time == y.Time && x.Account == y.Account && x.EventID == y.EventID && x.Source == y.Source && x.Model == y.Model &&
		x.Status == y.Status && x.Flags == y.Flags && x.Duration == y.Duration && slices.Equal(qa.Custom(), qb.Custom())
}

func parseStandard(s string) (usage.Micros, error) {
	at, err := time.Parse(time.RFC3339Nano, s)
	return usage.At(at), err
}

// FuzzTime: a time that is taken is one that time.Parse takes too, at the same moment,
// but for what it does not know.
func FuzzTime(f *testing.F) {
	for _, s := range []string{"2026-03-01T12:00:00Z", "2016-12-31t23:59:60.25z", "2024-02-29T23:59:59.9999999-23:59", "0000-01-01T00:00:00+00:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		at, ok := parseTime(s)
		if !ok {
			return
		}
		upper := strings.ToUpper(s)
		leap := strings.Contains(upper, ":60")
		want, err := parseStandard(strings.Replace(upper, ":60", ":59", 1))
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if leap {
			want = usage.At(want.Time().Truncate(time.Second)) + 999_999
		}
		if at != want {
			t.Fatalf("%q: %d, want %d", s, at, want)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	text := []byte(example)
	b.ReportAllocs()
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		e, err := Read(text)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := e.Call(0); err != nil {
			b.Fatal(err)
		}
	}
}
