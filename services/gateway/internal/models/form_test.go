package models

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
)

// A form names its model in any of its parts, and arrives as it came.
func TestTheModelOfAForm(t *testing.T) {
	t.Parallel()
	part := func(header, value string) string {
		return "--b\r\nContent-Disposition: form-data; " + header + "\r\n\r\n" + value + "\r\n"
	}
	file := part(`name="file"; filename="a.mp3"`+"\r\nContent-Type: audio/mpeg", "\xff\xfb"+strings.Repeat("\x00", 100_000))
	model := part(`name="model"`, "whisper-1")
	const end = "--b--\r\n"
	for name, c := range map[string]struct {
		path, types, body string
		status            int // 0: model is what is found
		model             string
	}{
		"before the file":             {"/v1/audio/transcriptions", "", model + file + end, 0, "whisper-1"},
		"behind the file":             {"/v1/audio/transcriptions", "", file + model + end, 0, "whisper-1"},
		"of Azure":                    {"/openai/deployments/d/audio/translations", "", file + model + end, 0, "whisper-1"},
		"with a quoted boundary":      {"/v1/images/edits/", `Multipart/Form-Data; boundary="b"`, model + end, 0, "whisper-1"},
		"with a charset":              {"/v1/images/edits", `multipart/form-data; charset=utf-8; boundary=b`, model + end, 0, "whisper-1"},
		"a name without quotes":       {"/v1/videos", "", part("name=model", "sora-2") + end, 0, "sora-2"},
		"a type of its own":           {"/v1/videos", "", part("name=\"model\"\r\nContent-Type: text/plain", "sora-2") + end, 0, "sora-2"},
		"a preamble":                  {"/v1/videos", "", "hello\r\n" + model + end, 0, "whisper-1"},
		"twice the same":              {"/v1/videos", "", model + model + end, 0, "whisper-1"},
		"none":                        {"/v1/audio/transcriptions", "", file + end, 0, ""},
		"a file of that name's text":  {"/v1/audio/transcriptions", "", part(`name="file"; filename="model"`, "x") + end, 0, ""},
		"where forms name none":       {"/v1/files", "", model + end, 0, ""},
		"two models":                  {"/v1/audio/transcriptions", "", model + part(`name="model"`, "dear") + end, 400, ""},
		"another spelling":            {"/v1/audio/transcriptions", "", model + part(`name="Model"`, "dear") + end, 400, ""},
		"a list":                      {"/v1/audio/transcriptions", "", part(`name="model[]"`, "dear") + end, 400, ""},
		"a model in a file":           {"/v1/audio/transcriptions", "", part(`name="model"; filename="x"`, "dear") + end, 400, ""},
		"a model in another encoding": {"/v1/audio/transcriptions", "", part("name=\"model\"\r\nContent-Transfer-Encoding: base64", "ZGVhcg==") + end, 400, ""},
		"too long a name":             {"/v1/audio/transcriptions", "", part(`name="model"`, strings.Repeat("x", maxModel+1)) + end, 400, ""},
		"without an end":              {"/v1/audio/transcriptions", "", model, 400, ""},
		"too many parts":              {"/v1/audio/transcriptions", "", strings.Repeat(part(`name="x"`, "y"), maxParts) + model + end, 400, ""},
		"two boundaries":              {"/v1/audio/transcriptions", "multipart/form-data; boundary=b; boundary=c", model + end, 400, ""},
		"no boundary":                 {"/v1/audio/transcriptions", "multipart/form-data", model + end, 400, ""},
		"no form":                     {"/v1/audio/transcriptions", "multipart/mixed; boundary=b", model + end, 400, ""},
		"too large":                   {"/v1/audio/transcriptions", "", model + part(`name="file"; filename="x"`, strings.Repeat("x", maxForm)) + end, 413, ""},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, c.path, strings.NewReader(c.body))
		r.Header.Set("Content-Type", "multipart/form-data; boundary=b")
		if c.types != "" {
			r.Header.Set("Content-Type", c.types)
		}
		got, err := InBody(r, "model", 1<<10, NewRoom(64<<20))
		var f *refusal.Refusal
		switch {
		case c.status != 0:
			if !errors.As(err, &f) || f.HTTPStatus() != c.status {
				t.Errorf("%s: %q, %v", name, got, err)
			}
			continue
		case err != nil || got != c.model:
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if body, err := io.ReadAll(r.Body); err != nil || string(body) != c.body {
			t.Errorf("%s: the body arrives otherwise, %v", name, err)
		}
	}
}
