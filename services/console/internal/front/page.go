package front

import (
	"io/fs"
	"net/http"
	"strings"

	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// notBuilt is what stands in for a page that was not built.
const notBuilt = `<!doctype html><html lang="en"><meta charset="utf-8"><title>Tollkeeper</title>
<body style="font:16px/1.5 system-ui;margin:10vh auto;max-width:36rem;padding:0 1rem">
<h1>The page was not built</h1>
<p>This program was compiled before the page was. Run <code>go tool task setup</code> and build it again.</p>
<p>The API is there nevertheless, under <code>/v1/</code>.</p>
`

// PageRoutes are the page's.
func PageRoutes(web fs.FS) problem.Routes {
	page := Page(web)
	return problem.Routes{"GET /{$}": page, "GET /assets/": page, "GET /favicon.svg": page}
}

// Page serves the built page; assets have their content's hash in their
// names and may be kept for ever.
func Page(web fs.FS) http.Handler {
	files := http.FileServerFS(web)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			w.Header().Set("Cache-Control", "no-cache")
			if _, err := fs.Stat(web, "index.html"); err != nil {
				w.Header().Set("Content-Type", "text/html; charset=utf-8")
				w.WriteHeader(http.StatusServiceUnavailable)
				// An error here is the client's going away.
				_, _ = w.Write([]byte(notBuilt))
				return
			}
		} else if r.URL.Path == "/favicon.svg" {
			if _, err := fs.Stat(web, "favicon.svg"); err != nil {
				Problem{Status: http.StatusNotFound, Code: CodeNotFound, Detail: "the page was not built: go tool task setup"}.Write(w)
				return
			}
		} else if strings.HasPrefix(r.URL.Path, "/assets/") {
			if info, err := fs.Stat(web, strings.TrimPrefix(r.URL.Path, "/")); err != nil || info.IsDir() {
				Problem{Status: http.StatusNotFound, Code: CodeNotFound, Detail: "the page has no such file: load it again"}.Write(w)
				return
			}
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		}
		files.ServeHTTP(w, r)
	})
}
