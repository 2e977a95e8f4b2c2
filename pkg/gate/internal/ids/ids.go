// Package ids reads the identities that requests bring.
package ids

import (
	"encoding/binary"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"

	"github.com/segmentio/ksuid"
)

// Request returns a client's own id of its request when it is fit for logs and
// events, else a new one.
func Request(given string) string {
	if given == "" || len(given) > 128 {
		return fresh()
	}
	for i := range len(given) {
		c := given[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-_.~:/+=@", c) >= 0:
		default:
			return fresh()
		}
	}
	return given
}

// fresh is a new id. It has to be another than all others, and not to be secret: the
// runtime's generator, which is seeded by the system, spares every call a system call.
func fresh() string {
	var payload [16]byte
	binary.NativeEndian.PutUint64(payload[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(payload[8:], rand.Uint64())
	id, err := ksuid.FromParts(time.Now(), payload[:])
	if err != nil {
		return ksuid.New().String() // the payload would have to have another length
	}
	return id.String()
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
