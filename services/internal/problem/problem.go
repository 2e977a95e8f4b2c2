// Package problem answers errors as RFC 9457 says, also those that a ServeMux would
// answer in plain text: an unknown path, a method that a path does not have.
package problem

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// ContentType of a problem.
const ContentType = "application/problem+json"

// Codes of problems that any door has.
const (
	CodeBadRequest       = "BAD_REQUEST"
	CodeUnauthorized     = "UNAUTHORIZED"
	CodeForbidden        = "FORBIDDEN"
	CodeNotFound         = "NOT_FOUND"
	CodeMethodNotAllowed = "METHOD_NOT_ALLOWED"
	CodeTooLarge         = "TOO_LARGE"
	CodeMediaType        = "UNSUPPORTED_MEDIA_TYPE"
	CodeInternal         = "INTERNAL"
)

// Problem is the body of an error.
type Problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	// Code is for machines, Detail for people: what is wrong and what to do.
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

// Of is a problem of our own, whose title is that of its status.
func Of(status int, code, detail string) Problem {
	return Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Code: code, Detail: detail}
}

// Write answers with the problem. Nothing may have been written before.
func (p Problem) Write(w http.ResponseWriter) { Write(w, p.Status, p) }

// Write answers with a body that has the members of a Problem, and others.
func Write(w http.ResponseWriter, status int, body any) {
	data, err := json.Marshal(body)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"type":"about:blank","title":"Internal Server Error","status":500,"code":"INTERNAL","detail":"The problem can't be written as JSON."}`)
	}
	w.Header().Set("Content-Type", ContentType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// An error here is the client's going away.
	_, _ = w.Write(append(data, '\n'))
}

// Routes are handlers by the patterns of a ServeMux.
type Routes map[string]http.Handler

// Add adds others; a pattern that is there already is a mistake of the program.
func (r Routes) Add(others Routes) {
	for pattern, h := range others {
		if _, there := r[pattern]; there {
			panic("problem: two handlers for " + pattern)
		}
		r[pattern] = h
	}
}

// Patterns in order.
func (r Routes) Patterns() []string {
	out := make([]string, 0, len(r))
	for p := range r {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

// Handler serves the routes, and answers what is none of them with a problem; where tells
// a person where the routes are listed.
func (r Routes) Handler(where string) http.Handler {
	mux := http.NewServeMux()
	for pattern, h := range r {
		mux.Handle(pattern, h)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		h, pattern := mux.Handler(req)
		if pattern != "" {
			mux.ServeHTTP(w, req)
			return
		}
		// The mux knows whether it is the path or the method, and which methods there are.
		var said verdict
		h.ServeHTTP(&said, req)
		if allowed := said.Header().Get("Allow"); said.status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", allowed)
			Of(http.StatusMethodNotAllowed, CodeMethodNotAllowed, fmt.Sprintf("%s has no %s: its methods are %s; %s", cut(req.URL.Path), cut(req.Method), allowed, where)).Write(w)
			return
		}
		Of(http.StatusNotFound, CodeNotFound, fmt.Sprintf("there is no %s %s; %s", cut(req.Method), cut(req.URL.Path), where)).Write(w)
	})
}

// cut bounds what a client wrote and is told again, and takes out what is no UTF-8.
func cut(s string) string {
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}

// verdict takes what a ServeMux says of a request that it has no handler for.
type verdict struct {
	header http.Header
	status int
}

func (v *verdict) Header() http.Header {
	if v.header == nil {
		v.header = http.Header{}
	}
	return v.header
}

func (v *verdict) WriteHeader(status int) { v.status = status }

func (v *verdict) Write(p []byte) (int, error) { return len(p), nil }
