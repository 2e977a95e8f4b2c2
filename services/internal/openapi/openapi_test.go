package openapi

import (
	"net/http/httptest"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/tollkeeper/tollkeeper/schemas"
)

// What the recommended rules of the usual linter ask for, so that it has nothing to say.
func lint(t *testing.T, name string, doc *openapi3.T) {
	t.Helper()
	if doc.Info.License == nil || doc.Info.License.URL == "" {
		t.Errorf("%s: it has no licence", name)
	}
	tags := map[string]bool{}
	for _, tag := range doc.Tags {
		tags[tag.Name] = false
		if tag.Description == "" {
			t.Errorf("%s: the tag %s has no description", name, tag.Name)
		}
	}
	ids := map[string]string{}
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			at := name + ": " + method + " " + path
			if other, twice := ids[op.OperationID]; twice || op.OperationID == "" {
				t.Errorf("%s: its operationId %q is that of %s", at, op.OperationID, other)
			}
			ids[op.OperationID] = at
			if op.Summary == "" || len(op.Tags) == 0 {
				t.Errorf("%s has no summary or no tag", at)
			}
			for _, tag := range op.Tags {
				if _, declared := tags[tag]; !declared {
					t.Errorf("%s: the tag %s is not declared", at, tag)
				}
				tags[tag] = true
			}
			refused := false
			for status, r := range op.Responses.Map() {
				refused = refused || status[0] == '4'
				if r.Value.Description == nil || *r.Value.Description == "" {
					t.Errorf("%s: %s has no description", at, status)
				}
			}
			if !refused {
				t.Errorf("%s documents no 4XX", at)
			}
		}
	}
	for tag, used := range tags {
		if !used {
			t.Errorf("%s: the tag %s is not used", name, tag)
		}
	}
	for id, s := range doc.Components.Schemas {
		nullable(t, name+": "+id, s, map[*openapi3.Schema]bool{})
	}
}

// nullable says something of a type only: beside allOf alone it is ignored.
func nullable(t *testing.T, at string, s *openapi3.SchemaRef, seen map[*openapi3.Schema]bool) {
	if s == nil || s.Value == nil || seen[s.Value] {
		return
	}
	seen[s.Value] = true
	if s.Value.Nullable && s.Value.Type == nil {
		t.Errorf("%s: nullable without a type", at)
	}
	for n, p := range s.Value.Properties {
		nullable(t, at+"."+n, p, seen)
	}
	nullable(t, at+"[]", s.Value.Items, seen)
	nullable(t, at+"{}", s.Value.AdditionalProperties.Schema, seen)
	for _, list := range []openapi3.SchemaRefs{s.Value.AllOf, s.Value.AnyOf, s.Value.OneOf} {
		for _, x := range list {
			nullable(t, at, x, seen)
		}
	}
}

func load(t *testing.T, data []byte) *openapi3.T {
	t.Helper()
	loader := openapi3.NewLoader()
	doc, err := loader.LoadFromData(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(loader.Context); err != nil {
		t.Fatal(err)
	}
	return doc
}

func TestTheDocumentAndWhatServersServeOfItAreClean(t *testing.T) {
	t.Parallel()
	whole := load(t, schemas.OpenAPI)
	lint(t, "openapi.yaml", whole)
	served := map[string]int{}
	for _, s := range []Server{Console, Gateway} {
		w := httptest.NewRecorder()
		Handler(s).ServeHTTP(w, httptest.NewRequest("GET", "/openapi.yaml", nil))
		if w.Code != 200 || w.Header().Get("Content-Type") != "application/yaml" {
			t.Fatalf("%s: %d %s", s, w.Code, w.Body)
		}
		part := load(t, w.Body.Bytes())
		lint(t, string(s), part)
		if part.Info.Title != whole.Info.Title || part.Info.Version != whole.Info.Version || len(part.Servers) != 1 || part.Servers[0].URL != "/" {
			t.Errorf("%s: %+v %+v", s, part.Info, part.Servers)
		}
		if len(part.Components.Schemas) >= len(whole.Components.Schemas) {
			t.Errorf("%s: it has schemas of paths that it does not serve", s)
		}
		for path := range part.Paths.Map() {
			served[path]++
		}
	}
	for path := range whole.Paths.Map() {
		want := 1
		switch path {
		case "/healthz", "/readyz", "/metrics", "/openapi.yaml":
			want = 2
		}
		if served[path] != want {
			t.Errorf("%s is served by %d servers, want %d", path, served[path], want)
		}
	}
}
