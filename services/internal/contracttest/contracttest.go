// Package contracttest holds real servers against schemas/openapi.yaml, for tests.
package contracttest

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// Contract is a server's part of the document, and what of it was seen.
type Contract struct {
	t   testing.TB
	Doc *openapi3.T
	// Seen are answers that were valid, as "METHOD path status".
	Seen map[string]bool
}

// New reads the part of a server, as it serves it.
func New(t testing.TB, s openapi.Server) *Contract {
	t.Helper()
	data, err := openapi.Part(s)
	if err != nil {
		t.Fatal(err)
	}
	loader := openapi3.NewLoader()
	doc, err := loader.LoadFromData(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(loader.Context); err != nil {
		t.Fatal(err)
	}
	return &Contract{t: t, Doc: doc, Seen: map[string]bool{}}
}

// Exchange is a request and the status that it must be answered with; 0 is 200.
type Exchange struct {
	Method, Path string
	Header       map[string]string
	Host         string
	Body         string
	Status       int
}

// Do sends a request to a server, checks status and body against the contract, and
// returns the body.
func (c *Contract) Do(base string, e Exchange) []byte {
	c.t.Helper()
	if e.Method == "" {
		e.Method = http.MethodGet
	}
	if e.Status == 0 {
		e.Status = http.StatusOK
	}
	build := func() *http.Request {
		req, err := http.NewRequestWithContext(c.t.Context(), e.Method, base+e.Path, strings.NewReader(e.Body))
		if err != nil {
			c.t.Fatal(err)
		}
		for k, v := range e.Header {
			req.Header.Set(k, v)
		}
		req.Host = e.Host
		return req
	}
	res, err := http.DefaultClient.Do(build())
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }() // it is read
	body, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	if res.StatusCode != e.Status {
		c.t.Fatalf("%s %s: %s, want %d: %s", e.Method, e.Path, res.Status, e.Status, body)
	}
	doc := *c.Doc
	doc.Servers = openapi3.Servers{{URL: base}}
	router, err := gorillamux.NewRouter(&doc)
	if err != nil {
		c.t.Fatal(err)
	}
	req := build()
	req.Host = ""
	route, params, err := router.FindRoute(req)
	if err != nil {
		c.t.Fatalf("%s %s is not in openapi.yaml: %v", e.Method, e.Path, err)
	}
	options := &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true}
	in := &openapi3filter.RequestValidationInput{Request: req, PathParams: params, Route: route, Options: options}
	out := &openapi3filter.ResponseValidationInput{RequestValidationInput: in, Status: res.StatusCode, Header: res.Header, Options: options}
	out.SetBodyBytes(body)
	if err := openapi3filter.ValidateResponse(c.t.Context(), out); err != nil {
		c.t.Errorf("%s %s: %v\n%s", e.Method, e.Path, err, body)
		return body
	}
	if documented := route.Operation.Responses.Status(res.StatusCode); documented != nil && documented.Value.Content.Get(problem.ContentType) != nil {
		if got := res.Header.Get("Content-Type"); got != problem.ContentType {
			c.t.Errorf("%s %s: %d is %s, want a problem: %s", e.Method, e.Path, res.StatusCode, got, body)
		}
	}
	c.Seen[fmt.Sprintf("%s %s %d", route.Method, route.Path, res.StatusCode)] = true
	return body
}

// Complete checks that every documented status of every operation was seen, but for those
// excepted, which say why.
func (c *Contract) Complete(except map[string]string) {
	c.t.Helper()
	left := maps.Clone(except)
	for path, item := range c.Doc.Paths.Map() {
		for method, op := range item.Operations() {
			for status := range op.Responses.Map() {
				answer := method + " " + path + " " + status
				_, excepted := except[answer]
				delete(left, answer)
				switch seen := c.Seen[answer]; {
				case !seen && !excepted:
					c.t.Errorf("%s is documented and was not provoked", answer)
				case seen && excepted:
					c.t.Errorf("%s was provoked: it is no exception", answer)
				}
			}
		}
	}
	for answer := range left {
		c.t.Errorf("%s is excepted and not documented", answer)
	}
}

// Routes checks that the server has the documented operations and no others, but for
// those excepted. Patterns are those of a ServeMux.
func (c *Contract) Routes(patterns []string, except ...string) {
	c.t.Helper()
	documented := map[string]bool{}
	for path, item := range c.Doc.Paths.Map() {
		for method := range item.Operations() {
			documented[method+" "+path] = true
		}
	}
	for _, p := range patterns {
		p = strings.ReplaceAll(p, "...}", "}")
		if slices.Contains(except, p) {
			continue
		}
		if !documented[p] {
			c.t.Errorf("%s is served and not documented", p)
		}
		delete(documented, p)
	}
	for p := range documented {
		if !slices.Contains(except, p) {
			c.t.Errorf("%s is documented and not served", p)
		}
	}
}

// methods that are tried where they are not documented.
var methods = [...]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"}

// Undocumented asks every path with every method that it does not document: all are
// refused with 405 and a problem. Path parameters become "x".
func (c *Contract) Undocumented(base string, header map[string]string, skip ...string) {
	c.t.Helper()
	for path, item := range c.Doc.Paths.Map() {
		if slices.Contains(skip, path) {
			continue
		}
		for _, method := range methods {
			if item.Operations()[method] != nil || method == "HEAD" && item.Get != nil {
				continue
			}
			concrete := path
			for i := strings.IndexByte(concrete, '{'); i >= 0; i = strings.IndexByte(concrete, '{') {
				concrete = concrete[:i] + "x" + concrete[i+strings.IndexByte(concrete[i:], '}')+1:]
			}
			req, err := http.NewRequestWithContext(c.t.Context(), method, base+concrete, nil)
			if err != nil {
				c.t.Fatal(err)
			}
			for k, v := range header {
				req.Header.Set(k, v)
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				c.t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, res.Body) // its status and type are what counts
			_ = res.Body.Close()
			if res.StatusCode != http.StatusMethodNotAllowed || res.Header.Get("Content-Type") != problem.ContentType || res.Header.Get("Allow") == "" {
				c.t.Errorf("%s %s: %s, %s, Allow %q; want 405 and a problem", method, concrete, res.Status, res.Header.Get("Content-Type"), res.Header.Get("Allow"))
			}
		}
	}
}
