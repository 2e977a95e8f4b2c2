package direct

import (
	"bufio"
	"net/http"
	"strconv"
	"strings"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
)

// write writes a request with its body, as Request.Write does, without sorting the
// headers and without fmt, which took a twentieth of a call's time. What is not plain in
// its first line is left to Request.Write, whose rules for it are longer.
func write(w *bufio.Writer, r *http.Request, body inmemory.Body) error {
	host := r.Host
	if host == "" {
		host = r.URL.Host
	}
	target := r.URL.RequestURI()
	if !token(r.Method) || !plainHost(host) || !visible(target) {
		return r.Write(w)
	}
	// The writer keeps its first error for the end.
	for _, s := range [...]string{r.Method, " ", target, " HTTP/1.1\r\nHost: ", host, "\r\n"} {
		_, _ = w.WriteString(s)
	}
	for name, values := range r.Header {
		switch name {
		case "Host", "Content-Length", "Transfer-Encoding", "Trailer":
			continue // which are the request's own
		case "User-Agent":
			values = values[:min(len(values), 1)]
			if len(values) == 1 && values[0] == "" {
				continue
			}
		}
		if !token(name) {
			continue
		}
		for _, v := range values {
			_, _ = w.WriteString(name)
			_, _ = w.WriteString(": ")
			_, _ = w.WriteString(oneLine(v))
			_, _ = w.WriteString("\r\n")
		}
	}
	if r.ContentLength > 0 || r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch {
		_, _ = w.WriteString("Content-Length: ")
		_, _ = w.Write(strconv.AppendInt(w.AvailableBuffer(), r.ContentLength, 10))
		_, _ = w.WriteString("\r\n")
	}
	_, _ = w.WriteString("\r\n")
	if body.Reader != nil {
		if _, err := body.WriteTo(w); err != nil {
			return err
		}
	}
	return nil // what was kept is Flush's
}

// oneLine is a value as it may stand in a header.
func oneLine(v string) string {
	if strings.IndexByte(v, '\n') >= 0 || strings.IndexByte(v, '\r') >= 0 {
		v = strings.NewReplacer("\n", " ", "\r", " ").Replace(v)
	}
	return strings.Trim(v, " \t\r\n")
}

// tokens are the bytes of methods and of headers' names (RFC 9110, 5.6.2).
var tokens = func() (set [256]bool) {
	for c := range set {
		switch b := byte(c); {
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9', strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0:
			set[c] = true
		}
	}
	return set
}()

func token(s string) bool {
	for i := range len(s) {
		if !tokens[s[i]] {
			return false
		}
	}
	return s != ""
}

// visible reports that a target has no space and no control character in it.
func visible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return s != ""
}

// plainHost reports that a host is a name, or an address of version 4, with or without a
// port.
func plainHost(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != ':' {
			return false
		}
	}
	return s != ""
}
