// Package openapi serves the part of schemas/openapi.yaml that a server has.
package openapi

import (
	"fmt"
	"net/http"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"

	"github.com/tollkeeper/tollkeeper/schemas"
	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// Server is one that serves a part of the document, as x-served-by names it.
type Server string

// The servers. What has no x-served-by is the console's.
const (
	Console Server = "console"
	Gateway Server = "gateway"
)

const servedBy = "x-served-by"

// Handler answers GET /openapi.yaml with the server's part.
func Handler(s Server) http.Handler {
	part := sync.OnceValues(func() ([]byte, error) { return Part(s) }) // it takes some milliseconds, and few ask
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		data, err := part()
		if err != nil {
			problem.Of(http.StatusInternalServerError, problem.CodeInternal, err.Error()).Write(w)
			return
		}
		w.Header().Set("Content-Type", "application/yaml")
		w.Header().Set("Cache-Control", "no-cache")
		// An error here is the client's going away.
		_, _ = w.Write(data)
	})
}

// Part is the document with the server's paths, what they refer to, and itself as its
// only server.
func Part(s Server) ([]byte, error) {
	var doc yaml.MapSlice
	if err := yaml.UnmarshalWithOptions(schemas.OpenAPI, &doc, yaml.UseOrderedMap()); err != nil {
		return nil, fmt.Errorf("schemas/openapi.yaml: %w", err)
	}
	used := map[string]bool{} // references that are followed
	tags := map[string]bool{}
	for i := range doc {
		switch doc[i].Key {
		case "servers":
			doc[i].Value = []any{yaml.MapSlice{{Key: "url", Value: "/"}}}
		case "paths":
			paths := keep(doc[i].Value, func(_ string, item any) bool { return serves(s, item) })
			for k := range paths {
				paths[k].Value = keep(paths[k].Value, func(name string, _ any) bool { return name != "servers" && name != servedBy })
			}
			doc[i].Value = paths
			follow(paths, used, tags)
		}
	}
	for i := range doc {
		switch doc[i].Key {
		case "components":
			doc[i].Value = prune(doc[i].Value, used, tags)
		case "tags":
			var kept []any
			list, _ := doc[i].Value.([]any)
			for _, t := range list {
				if name, _ := get(t, "name").(string); tags["tag "+name] {
					kept = append(kept, t)
				}
			}
			doc[i].Value = kept
		}
	}
	return yaml.Marshal(doc)
}

func serves(s Server, item any) bool {
	list, given := get(item, servedBy).([]any)
	if !given {
		return s == Console
	}
	for _, name := range list {
		if name == string(s) {
			return true
		}
	}
	return false
}

func get(m any, key string) any {
	slice, _ := m.(yaml.MapSlice)
	for _, item := range slice {
		if item.Key == key {
			return item.Value
		}
	}
	return nil
}

func keep(m any, which func(key string, value any) bool) yaml.MapSlice {
	slice, _ := m.(yaml.MapSlice)
	out := yaml.MapSlice{}
	for _, item := range slice {
		if key, _ := item.Key.(string); which(key, item.Value) {
			out = append(out, item)
		}
	}
	return out
}

// follow notes the references and tags below a value.
func follow(v any, used, tags map[string]bool) {
	switch v := v.(type) {
	case yaml.MapSlice:
		for _, item := range v {
			ref, text := item.Value.(string)
			switch {
			case item.Key == "$ref" && text:
				used[strings.TrimPrefix(ref, "#/components/")] = true
			case item.Key == "tags":
				list, _ := item.Value.([]any)
				for _, name := range list {
					tags[fmt.Sprint("tag ", name)] = true
				}
			}
			follow(item.Value, used, tags)
		}
	case []any:
		for _, x := range v {
			follow(x, used, tags)
		}
	}
}

// prune leaves of the components what is used, and what that uses.
func prune(components any, used, tags map[string]bool) yaml.MapSlice {
	done := map[string]bool{}
	for more := true; more; {
		more = false
		for ref := range used {
			if section, name, _ := strings.Cut(ref, "/"); !done[ref] {
				done[ref], more = true, true
				follow(get(get(components, section), name), used, tags)
			}
		}
	}
	out := yaml.MapSlice{}
	slice, _ := components.(yaml.MapSlice)
	for _, section := range slice {
		name, _ := section.Key.(string)
		kept := keep(section.Value, func(key string, _ any) bool { return name == "securitySchemes" || used[name+"/"+key] })
		if len(kept) > 0 {
			out = append(out, yaml.MapItem{Key: name, Value: kept})
		}
	}
	return out
}
