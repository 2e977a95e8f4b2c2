// Package ids reads the identities that requests bring.
package ids

import (
	"encoding/hex"
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

// Traceparent reads a W3C traceparent header; what is not one is no trace.
func Traceparent(s string) (trace [16]byte, span [8]byte, flags byte, ok bool) {
	// 00-<32 hex>-<16 hex>-<2 hex>; later versions may append "-…".
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' || strings.ToLower(s[:55]) != s[:55] {
		return trace, span, 0, false
	}
	version := s[:2]
	var v, f [1]byte
	_, errV := hex.Decode(v[:], []byte(version))
	_, errT := hex.Decode(trace[:], []byte(s[3:35]))
	_, errS := hex.Decode(span[:], []byte(s[36:52]))
	_, errF := hex.Decode(f[:], []byte(s[53:55]))
	bad := errV != nil || errT != nil || errS != nil || errF != nil || version == "ff" ||
		version == "00" && len(s) != 55 || len(s) > 55 && s[55] != '-' || trace == [16]byte{} || span == [8]byte{}
	if bad {
		return [16]byte{}, [8]byte{}, 0, false
	}
	return trace, span, f[0], true
}
