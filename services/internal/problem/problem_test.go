package problem

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Whatever is asked of a door that has no such thing, the answer is a problem.
func TestWhatIsNotServedIsAProblem(t *testing.T) {
	t.Parallel()
	ok := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte(r.PathValue("id"))) })
	routes := Routes{"GET /v1/things": ok, "GET /v1/things/{id...}": ok, "PUT /v1/plans": ok}
	routes.Add(Routes{"GET /{$}": ok})
	h := routes.Handler("the list is in /openapi.yaml")
	for _, c := range []struct {
		method, target string
		status         int
		allow          string
	}{
		{"GET", "/v1/things", 200, ""},
		{"HEAD", "/v1/things", 200, ""},
		{"GET", "/v1/things/a%2Fb", 200, ""},
		{"GET", "/", 200, ""},
		{"POST", "/v1/things", 405, "GET, HEAD"},
		{"BREW", "/v1/plans", 405, "PUT"},
		{"GET", "/v1/plans", 405, "PUT"},
		{"DELETE", "/", 405, "GET, HEAD"},
		{"GET", "/v1", 404, ""},
		{"GET", "/v1/", 404, ""},
		{"GET", "/v1/thing", 404, ""},
		{"PUT", "/v1/\xff" + strings.Repeat("x", 1000), 404, ""},
		{"OPTIONS", "*", 404, ""},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Method, r.RequestURI, r.URL.Path = c.method, c.target, c.target
		if c.target == "/v1/things/a%2Fb" {
			r.URL.Path, r.URL.RawPath = "/v1/things/a/b", c.target
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.status || w.Header().Get("Allow") != c.allow {
			t.Errorf("%s %.20q: %d, Allow %q, want %d, %q", c.method, c.target, w.Code, w.Header().Get("Allow"), c.status, c.allow)
		}
		if w.Code == 200 {
			continue
		}
		var p Problem
		if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Status != c.status || p.Code == "" || p.Title == "" || !strings.Contains(p.Detail, "/openapi.yaml") || w.Header().Get("Content-Type") != ContentType {
			t.Errorf("%s %.20q: %v, %s", c.method, c.target, err, w.Body)
		}
		if w.Body.Len() > 1000 {
			t.Errorf("%s: the answer repeats %d bytes", c.method, w.Body.Len())
		}
	}
}
