// Package paths reads URL paths as upstreams do, so that a client can't choose another
// route by how it spells one.
package paths

import "strings"

// Resolved reports that no segment of a path is "." or "..", also not with
// parameters behind it, which some servers take off first.
func Resolved(path string) bool {
	for segment := range strings.SplitSeq(path, "/") {
		if name, _, _ := strings.Cut(segment, ";"); name == "." || name == ".." {
			return false
		}
	}
	return true
}

// Cut returns what follows a prefix of whole segments: /v1 is none of /v10.
// Several slashes are one, as they are to most upstreams: a client must not choose
// another route by their number.
func Cut(path, prefix string) (rest string, ok bool) {
	if prefix == "/" {
		return path, true
	}
	at := 0
	for i := range len(prefix) {
		if at == len(path) || path[at] != prefix[i] {
			return "", false
		}
		for at++; prefix[i] == '/' && at < len(path) && path[at] == '/'; at++ {
		}
	}
	rest = path[at:]
	return rest, rest == "" || rest[0] == '/'
}

// Stripped takes a prefix off a path. Where an escaped path does not begin with the
// prefix as it is written, net/url goes by the plain one.
func Stripped(path, prefix string) string {
	if rest, _ := Cut(path, prefix); rest != "" {
		return rest
	}
	return "/"
}
