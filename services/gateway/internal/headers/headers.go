// Package headers keeps apart what only the gateway may say to an upstream from what
// its clients say.
package headers

import (
	"net/http"
	"net/textproto"
	"strings"
)

// Prefix is that of headers that only the gateway sets.
const Prefix = "X-Tollkeeper-"

// DropOurs takes off a client's request what only the gateway may say, in headers with
// Prefix and in those of set, also where it is spelled with underscores, which many
// upstreams take for dashes. So is another model beside the one in the header model.
// Names are in their canonical form.
func DropOurs(h http.Header, set map[string]string, model string) {
	for name := range h {
		if strings.HasPrefix(name, Prefix) {
			delete(h, name)
			continue
		}
		if strings.IndexByte(name, '_') < 0 {
			continue
		}
		dashed := textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-"))
		if _, ours := set[dashed]; ours || dashed == model || strings.HasPrefix(dashed, Prefix) || strings.HasPrefix(dashed, "X-Forwarded-") {
			delete(h, name)
		}
	}
}

// Safe makes a text fit for a header: an account's id may be anything.
func Safe(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return -1
		}
		return r
	}, s)
}
