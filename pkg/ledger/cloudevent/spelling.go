package cloudevent

import (
	"fmt"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// fold takes off a name what people and JSON encoders spell differently.
func fold(name string) string {
	name = strings.Map(func(r rune) rune {
		if r == '_' || r == '-' || r == '.' {
			return -1
		}
		return r
	}, strings.ToLower(name))
	return strings.TrimSuffix(name, "s")
}

// builtIn returns the built-in meter that a name means and does not spell: it would be
// a meter of the sender's own, which no limit on the built-in one counts.
func builtIn(name string) (usage.Meter, bool) {
	if _, ok := usage.Meter(name).Index(); ok {
		return "", false
	}
	f := fold(name)
	for _, m := range usage.BuiltInMeters() {
		if f == fold(string(m)) {
			return m, true
		}
	}
	return "", false
}

// suggest says which of some names was meant, or which there are.
func suggest(name string, known []string) string {
	for _, k := range known {
		if nearly(name, k) {
			return fmt.Sprintf("; did you mean %q?", k)
		}
	}
	return "; known are " + strings.Join(known, ", ")
}

// nearly reports whether two names are the same but for case, separators, a final s, or
// one letter that is missing, too many, another, or in its neighbour's place.
func nearly(a, b string) bool {
	if len(a) > 64 || len(b) > 64 {
		return false
	}
	a, b = fold(a), fold(b)
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return len(a) <= 1 && len(b) <= 1 || len(a) == 2 && len(b) == 2 && a[0] == b[1] && a[1] == b[0]
}
