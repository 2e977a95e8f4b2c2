package intake

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/tollkeeper/tollkeeper/pkg/ledger/cloudevent"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// readable reports a body that is encoded: it is read as it comes.
func readable(h http.Header) error {
	for _, v := range h.Values("Content-Encoding") {
		for coding := range strings.SplitSeq(v, ",") {
			if coding = strings.TrimSpace(coding); coding != "" && !strings.EqualFold(coding, "identity") {
				return unsupported("the body's Content-Encoding is %q: send it without one", headerValue(coding))
			}
		}
	}
	return nil
}

// mediaType reads the Content-Type. A text that is none is "", for it may stand beside
// the binary mode's headers; a charset that can't be read is an error.
func mediaType(h http.Header) (string, error) {
	values := h.Values("Content-Type")
	if len(values) > 1 {
		return "", unsupported("the request has %d Content-Type headers: send one", len(values))
	}
	media, err := cloudevent.MediaType(h.Get("Content-Type"))
	var invalid *usage.InvalidError
	if errors.As(err, &invalid) {
		return "", &BodyError{Status: http.StatusUnsupportedMediaType, Err: invalid}
	}
	return media, nil
}

// attributes reads the ce- headers in the order of their names. The error says what is
// wrong with the first bad one, which is returned as it came.
func attributes(h http.Header) (all []cloudevent.Attribute, err error) {
	for name, values := range h {
		attribute, ok := strings.CutPrefix(strings.ToLower(name), "ce-")
		if !ok {
			continue
		}
		for _, v := range values {
			all = append(all, cloudevent.Attribute{Name: attribute, Value: v})
		}
	}
	slices.SortFunc(all, func(a, b cloudevent.Attribute) int { return strings.Compare(a.Name, b.Name) })
	for i := range all {
		v, bad := headerText(all[i].Value)
		if bad != "" {
			if err == nil {
				err = &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf("the header ce-%s %s", headerValue(all[i].Name), bad)}
			}
			continue
		}
		all[i].Value = v
	}
	return all, err
}

// headerText reads a header's value as the HTTP binding has it: one that is a quoted
// string is unquoted (senders of earlier versions quote), then percent-encoding is
// undone, once, so that a text is the same one however it was sent. bad says why it
// can't be read.
func headerText(v string) (s, bad string) {
	if strings.HasPrefix(v, `"`) {
		inner, ok := unquote(v)
		if !ok {
			return "", `begins with a quote and is no quoted string: percent-encode it (" is %22)`
		}
		v = inner
	}
	s, err := url.PathUnescape(v)
	switch {
	case err != nil:
		return "", "has a % that begins no percent-encoding: send %25 for a %"
	case !utf8.ValidString(s):
		return "", "is not UTF-8: send UTF-8, percent-encoded"
	}
	return s, ""
}

// unquote reads a quoted-string of RFC 9110.
func unquote(v string) (string, bool) {
	if len(v) < 2 || v[len(v)-1] != '"' {
		return "", false
	}
	v = v[1 : len(v)-1]
	out := make([]byte, 0, len(v))
	for i := 0; i < len(v); i++ {
		switch v[i] {
		case '"':
			return "", false
		case '\\':
			if i++; i == len(v) {
				return "", false // it was the closing quote that was escaped
			}
		}
		out = append(out, v[i])
	}
	return string(out), true
}
