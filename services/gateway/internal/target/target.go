// Package target reads request targets. Servers differ in how they read one: the route
// that the gateway finds must be the route of whatever the upstream makes of it. So a
// target has one canonical path and, where its spelling allows others, all of them.
package target

import (
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"
)

// maxDecodings bounds how often a path is decoded: deeper ones are refused.
const maxDecodings = 4

// Target is where a request goes.
type Target struct {
	// Path is decoded once, as net/url does, and begins with a slash.
	Path string
	// Others are what servers may also take the path for: with parameters taken off,
	// decoded not at all or twice, and so on. It is nil for almost all paths.
	Others []string
}

// Plain reports that a path has only one reading.
func (t *Target) Plain() bool { return t.Others == nil }

// Of reads the target of a request that net/http has parsed. problem says to its client
// why it is refused; empty: it is not. It does not allocate for plain paths.
func Of(r *http.Request) (t Target, problem string) {
	if r.Method == http.MethodConnect {
		return t, "This gateway is no tunnel: send the request itself."
	}
	if r.Method == http.MethodTrace {
		// An upstream that answers it shows the client the credentials that the gateway set.
		return t, "This gateway passes no TRACE on: send the request itself."
	}
	if strings.ContainsFunc(r.Method, func(c rune) bool { return c >= 'a' && c <= 'z' }) {
		return t, "The method has lower-case letters, and methods are case-sensitive: send it in capitals."
	}
	if !validHost(r.Host) {
		return t, "The Host header is not a host."
	}
	raw := r.RequestURI
	if !strings.HasPrefix(raw, "/") {
		if problem := absolute(r.URL); problem != "" {
			return t, problem
		}
		_, raw, _ = strings.Cut(raw, "://")
		raw = raw[max(strings.IndexAny(raw, "/?#"), 0):]
		if !strings.HasPrefix(raw, "/") {
			raw = "/" // a host alone, or with a query
			if r.URL.Path == "" {
				r.URL.Path = "/"
			}
		}
	}
	if strings.IndexByte(r.RequestURI, '#') >= 0 {
		return t, "The request target has a fragment, which is the client's own: send it without."
	}
	raw, _, _ = strings.Cut(raw, "?")
	return OfPath(raw, r.URL.Path)
}

func absolute(u *url.URL) string {
	switch {
	case u.Scheme != "http" && u.Scheme != "https" || u.Opaque != "":
		return "The request target is neither a path nor an http or https URL with a host."
	case u.User != nil:
		return "The request target has user information in it: send credentials in a header."
	case u.Host == "":
		return "The request target is a URL without a host."
	}
	return ""
}

// Parse is Of for a target that somebody else has received: a path, with or without a
// query, or a URL.
func Parse(method, uri string) (t Target, problem string) {
	u, err := url.ParseRequestURI(uri)
	if err != nil {
		return t, "The URI can't be read: send it as the client sent it."
	}
	return Of(&http.Request{Method: method, URL: u, RequestURI: uri})
}

// OfPath reads a path as it was sent (raw), which net/url has decoded to path.
func OfPath(raw, path string) (t Target, problem string) {
	if plain(raw) {
		return Target{Path: path}, ""
	}
	switch {
	case strings.HasPrefix(raw, "//"):
		return t, "The path begins with two slashes, which some servers take for a host: send one."
	case strings.IndexByte(raw, '\\') >= 0:
		return t, "The path has a backslash: send a slash, or %5C where it is part of a name."
	case !utf8.ValidString(path):
		return t, "The path is not UTF-8."
	case strings.IndexByte(raw, '%') >= 0 && (&url.URL{Path: path, RawPath: raw}).EscapedPath() != raw:
		return t, "The path is encoded in part only: encode all characters that a path can't have."
	}
	t = Target{Path: path, Others: []string{}}
	readings := []string{path, nonASCII(raw)}
	for again, n := path, 0; strings.IndexByte(again, '%') >= 0; n++ {
		next, err := url.PathUnescape(again)
		if err != nil || next == again {
			break
		}
		if n == maxDecodings {
			return t, "The path is encoded several times: encode it once."
		}
		readings = append(readings, next)
		again = next
	}
	for _, reading := range readings {
		if !utf8.ValidString(reading) {
			return t, "The path is not UTF-8 when it is decoded twice: encode it once."
		}
		if strings.ContainsFunc(reading, func(c rune) bool { return c < 0x20 || c == 0x7f }) {
			return t, "The path has a control character in it."
		}
		folded := fold(reading)
		if !resolved(folded) || !resolved(reading) {
			return t, Unresolved
		}
		for _, other := range [...]string{reading, folded} {
			if other != path {
				t.Others = append(t.Others, other)
			}
		}
	}
	return t, ""
}

// Problems of a path that only its routes tell.
const (
	// Unresolved is of a path with . or .. in it.
	Unresolved = "The path has a . or .. in it: send it resolved."
	// Ambiguous is of a path whose readings have different routes.
	Ambiguous = "The path can be read in several ways, which have different routes: send it without parameters, doubled slashes and encoded letters, slashes and dots."
)

// Resolved reports that no segment of a path, however it is read, is "." or "..".
func Resolved(path string) bool { return resolved(path) && resolved(fold(path)) }

func resolved(path string) bool {
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "." || segment == ".." {
			return false
		}
	}
	return true
}

// plain reports that a path as it was sent has one reading: most have.
func plain(raw string) bool {
	if raw == "" || raw[0] != '/' {
		return false
	}
	for i := range len(raw) {
		switch c := raw[i]; {
		case c == '/':
			if i > 0 && raw[i-1] == '/' {
				return false
			}
		case c == '.':
			if raw[i-1] == '/' || i+1 == len(raw) || raw[i+1] == '/' {
				return false // not a . or .. for certain, but looked at
			}
		case !one[c]:
			return false
		}
	}
	return true
}

// one are the characters that mean one thing, in whichever way a path is read.
var one = func() (t [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~!$&'()*+,=:@") {
		t[c] = true
	}
	return t
}()

// nonASCII decodes what can't be sent but encoded, and leaves the rest: the path of a
// server that looks at it as it was sent.
func nonASCII(raw string) string {
	if strings.IndexByte(raw, '%') < 0 {
		return raw
	}
	var b strings.Builder
	for i := 0; i < len(raw); i++ {
		if raw[i] == '%' && i+2 < len(raw) && raw[i+1] >= '8' {
			if s, err := url.PathUnescape(raw[i : i+3]); err == nil {
				b.WriteString(s)
				i += 2
				continue
			}
		}
		b.WriteByte(raw[i])
	}
	return b.String()
}

// slashes and dots of other scripts, which some servers turn into the plain ones.
var likes = strings.NewReplacer(`\`, "/", "\uff0f", "/", "\uff3c", "/", "\u2215", "/", "\u2044", "/", "\uff0e", ".", "\u2024", ".", "\uff1b", ";")

// fold makes of a path what the most helpful server would: it ends where a query would
// begin, has no parameters, no dots and spaces at the end of a name, no empty segments.
func fold(path string) string {
	path = likes.Replace(path)
	if end := strings.IndexAny(path, "?#"); end >= 0 {
		path = path[:end]
	}
	var b strings.Builder
	for segment := range strings.SplitSeq(path, "/") {
		segment, _, _ = strings.Cut(segment, ";")
		segment = strings.Trim(segment, " \t")
		if bare := strings.TrimRight(segment, ". "); bare != "" {
			segment = bare
		}
		if segment != "" {
			b.WriteByte('/')
			b.WriteString(segment)
		}
	}
	if b.Len() == 0 || strings.HasSuffix(path, "/") {
		b.WriteByte('/')
	}
	return b.String()
}

// validHost reports whether a Host header is a name or an address, with or without a
// port. An empty one is of HTTP/1.0.
func validHost(host string) bool {
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 0 || strings.ContainsFunc(host[1:end], func(c rune) bool {
			return !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F' || c == ':' || c == '.')
		}) {
			return false
		}
		host = host[end+1:]
		return host == "" || host[0] == ':' && digits(host[1:])
	}
	for i := range len(host) {
		switch c := host[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		case c == ':' && i > 0:
			return digits(host[i+1:])
		default:
			return false
		}
	}
	return true
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return len(s) <= 5
}
