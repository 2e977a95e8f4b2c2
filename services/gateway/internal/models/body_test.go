package models

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"unicode/utf16"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
)

func TestBodiesThatAreReadForTheirModelsAreBoundedTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		bodies := NewRoom(3 * roomStep)
		body := `{"model":"big","x":"` + strings.Repeat("y", 3*roomStep/2) + `"}`
		read := func(ctx context.Context) error {
			r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", strings.NewReader(body))
			_, err := InBody(r, "model", 16<<20, bodies)
			return err
		}
		first, over := context.WithCancel(t.Context())
		if err := read(first); err != nil {
			t.Fatal(err)
		}
		second, secondOver := context.WithCancel(t.Context())
		var f *refusal.Refusal
		if err := read(second); !errors.As(err, &f) || f.HTTPStatus() != http.StatusServiceUnavailable {
			t.Errorf("there is no room for two: %v", err)
		}
		over()
		secondOver()
		synctest.Wait()
		if n := bodies.used.Load(); n != 0 {
			t.Errorf("%d bytes are not free again", n)
		}
		if err := read(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// in16 is a text in UTF-16 or, where wider, UTF-32, as many JSON parsers read it unasked.
func in16(s string, order binary.AppendByteOrder, wider bool) string {
	var b []byte
	if wider {
		for _, c := range s {
			b = order.AppendUint32(b, uint32(c))
		}
		return string(b)
	}
	for _, c := range utf16.Encode([]rune(s)) {
		b = order.AppendUint16(b, c)
	}
	return string(b)
}

// What the upstream may read otherwise than it is read here could be another model, whose
// limits the call would pass by.
func TestABodyThatMayNameAnotherModelIsRefused(t *testing.T) {
	t.Parallel()
	const dear = `{"model":"dear"}`
	const json = "application/json"
	for name, c := range map[string]struct {
		types  []string
		body   string
		status int // 0: model is what is found
		model  string
	}{
		"plain":                              {[]string{json}, dear, 0, "dear"},
		"UTF-8, said so":                     {[]string{json + "; charset=UTF-8"}, dear, 0, "dear"},
		"characters that contain ASCII":      {[]string{json + "; charset=ISO-8859-1"}, dear, 0, "dear"},
		"UTF-16":                             {[]string{json}, in16(dear, binary.LittleEndian, false), 415, ""},
		"UTF-16, the other way":              {nil, in16(dear, binary.BigEndian, false), 415, ""},
		"UTF-16 with its mark":               {[]string{json}, in16("\ufeff"+dear, binary.LittleEndian, false), 415, ""},
		"UTF-16 with its mark the other way": {[]string{"text/plain"}, in16("\ufeff"+dear, binary.BigEndian, false), 415, ""},
		"UTF-16 after spaces":                {[]string{json}, in16("   "+dear, binary.LittleEndian, false), 415, ""},
		"UTF-32":                             {[]string{json}, in16(dear, binary.LittleEndian, true), 415, ""},
		"UTF-32, the other way":              {[]string{json}, in16(dear, binary.BigEndian, true), 415, ""},
		"UTF-7":                              {[]string{json + "; charset=utf-7"}, `{"model":"cheap","+AG0AbwBkAGUAbA-":"dear"}`, 415, ""},
		"characters said in a second header": {[]string{json, json + "; charset=utf-16"}, dear, 415, ""},
		"characters that can't be read":      {[]string{json + "; ;charset=utf-16"}, dear, 415, ""},
		"a recording":                        {[]string{"audio/wav"}, "RI\x00\x00", 0, ""},
		"a form":                             {[]string{"multipart/form-data; boundary=x"}, "--x\r\n", 0, ""},
		"as Go reads it":                     {[]string{json}, `{"Model":"dear"}`, 400, ""},
		"as Go reads it, beside another":     {[]string{json}, `{"model":"cheap","MODEL":"dear"}`, 400, ""},
		"as Go reads it, escaped":            {[]string{json}, `{"\u004dodel":"dear","model":"cheap"}`, 400, ""},
		"inside something else":              {[]string{json}, `{"x":{"Model":"cheap"},"model":"dear"}`, 0, "dear"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for how, body := range map[string]io.Reader{"at once": strings.NewReader(c.body), "byte by byte": iotest.OneByteReader(strings.NewReader(c.body))} {
				r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", body)
				r.Header["Content-Type"] = c.types
				model, err := InBody(r, "model", 1<<20, NewRoom(1<<20))
				var f *refusal.Refusal
				switch {
				case c.status == 0 && err == nil:
					if sent, err := io.ReadAll(r.Body); err != nil || string(sent) != c.body || model != c.model {
						t.Errorf("%s: model %q, and the upstream gets %q: %v", how, model, sent, err)
					}
				case !errors.As(err, &f) || f.HTTPStatus() != c.status:
					t.Errorf("%s: model %q: %v", how, model, err)
				}
			}
		})
	}
	// A second encoding counts as the first does.
	zipped := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", strings.NewReader("\x1f\x8b"))
	zipped.Header["Content-Encoding"] = []string{"identity", "gzip"}
	if model, err := InBody(zipped, "model", 1<<20, NewRoom(1<<20)); err == nil {
		t.Errorf("model %q", model)
	}
	// Where letters of another alphabet stand for those of the name, to some.
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", strings.NewReader("{\"tas\u212a\":\"dear\"}"))
	if model, err := InBody(r, "task", 1<<20, NewRoom(1<<20)); err == nil {
		t.Errorf("model %q", model)
	}
}
