package console

import (
	"encoding/json"
	"net/http"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// problem is an RFC 9457 body.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Code   string `json:"code"`
	Detail string `json:"detail"`
	// Problems of a plans file.
	Problems []plans.Problem `json:"problems,omitempty"`
	// More problems than are told.
	More int `json:"more,omitempty"`
}

// Codes of problems.
const (
	codeBadRequest  = "BAD_REQUEST"
	codeNotFound    = "NOT_FOUND"
	codeForbidden   = "FORBIDDEN"
	codeUnauthed    = "UNAUTHORIZED"
	codeMediaType   = "UNSUPPORTED_MEDIA_TYPE"
	codeTooLarge    = "TOO_LARGE"
	codeBadPlans    = "INVALID_PLANS"
	codeConflict    = "CONFLICT"
	codeBusy        = "BUSY"
	codeUnavailable = "UNAVAILABLE"
	codeTooMany     = "TOO_MANY_STREAMS"
)

func (p problem) write(w http.ResponseWriter) {
	p.Type = "about:blank"
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	writeBody(w, p.Status, "application/problem+json", p)
}

func writeJSON(w http.ResponseWriter, v any) {
	writeBody(w, http.StatusOK, "application/json", v)
}

func writeBody(w http.ResponseWriter, status int, contentType string, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "the answer can't be written as JSON", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// An error here is the client's going away.
	_, _ = w.Write(append(data, '\n'))
}

func badRequest(detail string) problem {
	return problem{Status: http.StatusBadRequest, Code: codeBadRequest, Detail: detail}
}

func unavailable(detail string) problem {
	return problem{Status: http.StatusServiceUnavailable, Code: codeUnavailable, Detail: detail}
}
