package models

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
)

// maxForm bounds forms that name a model, in bytes, where the route has no larger bound:
// providers take files of 25 MB.
const maxForm = 32 << 20

// maxParts bounds the parts of a form.
const maxParts = 1000

// named are ends of the paths at which forms name a model.
var named = []string{"/audio/transcriptions", "/audio/translations", "/images/edits", "/images/variations", "/videos"}

// form reports whether a request is a form that names a model, and returns what stands
// between its parts.
func form(r *http.Request) (boundary string, ok bool, err error) {
	path := strings.TrimRight(r.URL.Path, "/")
	types := r.Header.Values("Content-Type")
	if r.Method != http.MethodPost || !slices.ContainsFunc(named, func(end string) bool { return strings.HasSuffix(path, end) }) ||
		!strings.Contains(strings.ToLower(strings.Join(types, ",")), "multipart/") {
		return "", false, nil
	}
	media, params, err := mime.ParseMediaType(types[0])
	if err != nil || len(types) != 1 || media != "multipart/form-data" || params["boundary"] == "" {
		return "", false, ambiguous("The Content-Type of the form can't be read, so which model it asks for can't be told")
	}
	return params["boundary"], true, nil
}

// inForm is InBody of a form. It is read whole, since the model may be its last part.
func inForm(r *http.Request, member, boundary string, bound int64, bodies *Room) (string, error) {
	if r.ContentLength > bound {
		return "", tooLarge()
	}
	var kept bytes.Buffer
	for taken := int64(smallBody); ; taken += roomStep {
		_, err := io.CopyN(&kept, r.Body, min(taken, bound)+1-int64(kept.Len()))
		switch {
		case errors.Is(err, io.EOF):
			r.Body = inmemory.New(kept.Bytes(), r.Body)
			return fieldOf(kept.Bytes(), member, boundary)
		case err != nil:
			return "", &refusal.Refusal{Code: refusal.BadRequest, Detail: "The body could not be read to its end."}
		case int64(kept.Len()) > bound:
			return "", tooLarge()
		case !bodies.Take(r.Context(), roomStep):
			return "", noRoom()
		}
	}
}

func noRoom() error {
	return &refusal.Refusal{Code: refusal.TooLarge, Status: http.StatusServiceUnavailable, Detail: "Too many large bodies are being read at once: try again in a moment."}
}

// fieldOf returns the one value that a form has for a field.
func fieldOf(body []byte, field, boundary string) (string, error) {
	model, found := "", false
	parts := multipart.NewReader(bytes.NewReader(body), boundary)
	for range maxParts {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			return model, nil
		}
		if err != nil {
			return "", ambiguous("The form can't be read, so which model it asks for can't be told")
		}
		name := part.FormName()
		if !strings.EqualFold(strings.Trim(name, "[] "), field) {
			continue
		}
		value, err := io.ReadAll(io.LimitReader(part, maxModel+1))
		switch {
		case err != nil:
			return "", ambiguous("The form can't be read, so which model it asks for can't be told")
		case len(value) > maxModel:
			return "", ambiguous("The model's name is too long")
		case name != field || part.FileName() != "" || part.Header.Get("Content-Transfer-Encoding") != "" || wide(value):
			return "", ambiguous("The field " + field + " that names the model is written in another way, and some parsers do not mind, so which model is meant can't be told")
		case found && string(value) != model:
			return "", ambiguous("The form has several fields " + field + ", so which model is meant can't be told")
		}
		model, found = string(value), true
	}
	return "", ambiguous("The form has too many parts for the model it asks for to be found")
}

func ambiguous(text string) error {
	return &refusal.Refusal{Code: refusal.BadRequest, Detail: text + "."}
}
