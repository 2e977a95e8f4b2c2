// Package paths compares URL paths with the prefixes of routes.
package paths

import (
	"strings"
	"unicode/utf8"
)

// Cut returns what follows a prefix of whole segments: /v1 is none of /v10. With
// ignoreCase /V1 is /v1.
func Cut(path, prefix string, ignoreCase bool) (rest string, ok bool) {
	if prefix == "/" {
		return path, true
	}
	if ignoreCase {
		if rest, ok = cutFold(path, prefix); !ok {
			return "", false
		}
	} else if rest, ok = strings.CutPrefix(path, prefix); !ok {
		return "", false
	}
	return rest, rest == "" || rest[0] == '/'
}

// cutFold cuts a prefix as strings.EqualFold compares: the two may differ in length.
func cutFold(path, prefix string) (string, bool) {
	for prefix != "" {
		_, n := utf8.DecodeRuneInString(prefix)
		_, m := utf8.DecodeRuneInString(path)
		if !strings.EqualFold(prefix[:n], path[:m]) {
			return "", false
		}
		prefix, path = prefix[n:], path[m:]
	}
	return path, true
}

// Stripped takes a prefix off a path that has it.
func Stripped(path, prefix string, ignoreCase bool) string {
	if rest, _ := Cut(path, prefix, ignoreCase); rest != "" {
		return rest
	}
	return "/"
}
