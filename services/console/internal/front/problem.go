package front

import (
	"encoding/json"
	"net/http"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// Problem is an RFC 9457 body.
type Problem struct {
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
	CodeBadRequest  = problem.CodeBadRequest
	CodeNotFound    = problem.CodeNotFound
	CodeGone        = "GONE"
	CodeForbidden   = problem.CodeForbidden
	CodeUnauthed    = problem.CodeUnauthorized
	CodeMediaType   = problem.CodeMediaType
	CodeTooLarge    = problem.CodeTooLarge
	CodeBadPlans    = "INVALID_PLANS"
	CodeConflict    = "CONFLICT"
	CodeBusy        = "BUSY"
	CodeUnavailable = "UNAVAILABLE"
	CodeTooMany     = "TOO_MANY_STREAMS"
)

// Write answers with the problem.
func (p Problem) Write(w http.ResponseWriter) {
	p.Type = "about:blank"
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	problem.Write(w, p.Status, p)
}

// WriteJSON answers with a value.
func WriteJSON(w http.ResponseWriter, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		problem.Of(http.StatusInternalServerError, problem.CodeInternal, "the answer can't be written as JSON").Write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	// An error here is the client's going away.
	_, _ = w.Write(append(data, '\n'))
}

// BadRequest is the problem of a request that can't be meant.
func BadRequest(detail string) Problem {
	return Problem{Status: http.StatusBadRequest, Code: CodeBadRequest, Detail: detail}
}

// Unavailable is the problem of a part that is away.
func Unavailable(detail string) Problem {
	return Problem{Status: http.StatusServiceUnavailable, Code: CodeUnavailable, Detail: detail}
}
