// Package ids reads the identities that requests bring.
package ids

import (
	"net/http"
	"strings"

	"github.com/segmentio/ksuid"
)

// Request returns a client's own id of its request when it is fit for logs and
// events, else a new one.
func Request(given string) string {
	if given == "" || len(given) > 128 {
		return ksuid.New().String()
	}
	for i := range len(given) {
		c := given[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-_.~:/+=@", c) >= 0:
		default:
			return ksuid.New().String()
		}
	}
	return given
}

// Key returns a function that takes the API key from the first of these headers that
// has one; of Authorization the scheme Bearer alone counts.
func Key(names ...string) func(*http.Request) string {
	canonical := make([]string, len(names))
	for i, n := range names {
		canonical[i] = http.CanonicalHeaderKey(n)
	}
	return func(r *http.Request) string {
		for _, n := range canonical {
			v := strings.TrimSpace(r.Header.Get(n))
			if n == "Authorization" || n == "Proxy-Authorization" {
				scheme, token, ok := strings.Cut(v, " ")
				if !ok || !strings.EqualFold(scheme, "Bearer") {
					continue
				}
				v = strings.TrimSpace(token)
			}
			if v != "" {
				return v
			}
		}
		return ""
	}
}
