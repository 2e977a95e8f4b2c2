package cloudevent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// maxMembers bounds the members of one JSON object: an envelope with extension
// attributes, the data of a call, and its meters are all smaller.
const maxMembers = 64

func malformed(format string, args ...any) *usage.InvalidError {
	return &usage.InvalidError{Reason: usage.ReasonMalformed, Message: fmt.Sprintf(format, args...)}
}

func oversized(format string, args ...any) *usage.InvalidError {
	return &usage.InvalidError{Reason: usage.ReasonOversized, Message: fmt.Sprintf(format, args...)}
}

// checkJSON reports why a text is not exactly one JSON value. The standard library
// judges the grammar; the readers below rest on that and check the rest, which it
// would let pass: UTF-8, halves of surrogate pairs, members that are there twice.
func checkJSON(what string, text []byte) *usage.InvalidError {
	if json.Valid(text) {
		return nil
	}
	blank := bytes.TrimLeft(text, " \t\r\n")
	switch {
	case len(blank) == 0:
		return malformed("%s is empty: send JSON", what)
	case bytes.HasPrefix(text, []byte("\xef\xbb\xbf")):
		return malformed("%s begins with a byte order mark: send UTF-8 without one", what)
	case bytes.HasPrefix(text, []byte("\xff\xfe")), bytes.HasPrefix(text, []byte("\xfe\xff")):
		return malformed("%s is UTF-16: send UTF-8", what)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	var first json.RawMessage
	err := d.Decode(&first)
	if err == nil {
		return malformed("%s has more after its JSON value, from byte %d on: send one value a request, several events as one array (%s)", what, d.InputOffset(), BatchType)
	}
	if err == io.ErrUnexpectedEOF {
		return malformed("%s breaks off within its JSON value: send it whole", what)
	}
	return malformed("%s is not JSON: %v", what, err)
}

// kindOf names a JSON value for people by its first byte.
func kindOf(value []byte) string {
	switch value[0] {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a text"
	case 't', 'f':
		return "true or false"
	case 'n':
		return "null"
	}
	return "a number"
}

func isNull(value []byte) bool { return value[0] == 'n' }

// valueEnd returns where the JSON value that begins at text[0] ends. The text is
// valid JSON, so that strings and brackets are all that has to be told apart.
func valueEnd(text []byte) int {
	depth := 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '"':
			for i++; text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			depth--
		default:
			if depth > 0 {
				continue
			}
			for i+1 < len(text) && strings.IndexByte(",]} \t\r\n", text[i+1]) < 0 {
				i++
			}
		}
		if depth == 0 {
			return i + 1
		}
	}
	return len(text)
}

func skipBlank(text []byte, i int) int {
	for i < len(text) && (text[i] == ' ' || text[i] == '\t' || text[i] == '\r' || text[i] == '\n') {
		i++
	}
	return i
}

// elements calls take with the values of a JSON array in order, until it reports
// false.
func elements(array []byte, take func(value []byte) bool) {
	for i := skipBlank(array, 1); array[i] != ']'; {
		end := i + valueEnd(array[i:])
		if !take(array[i:end]) {
			return
		}
		if i = skipBlank(array, end); array[i] == ',' {
			i = skipBlank(array, i+1)
		}
	}
}

// members calls take with the members of a JSON object in order. It goes on after an
// error, so that the identity of a bad event can be read, and returns the first. A
// name counts as it is decoded: a member that is spelled in two ways is there twice.
func members(what string, object []byte, take func(name string, value []byte) *usage.InvalidError) *usage.InvalidError {
	var (
		names [24]string
		seen  = names[:0]
		first *usage.InvalidError
	)
	for i := skipBlank(object, 1); object[i] != '}'; {
		end := i + valueEnd(object[i:])
		name, err := text("a member's name in ", what, object[i:end])
		i = skipBlank(object, skipBlank(object, end)+1) // the colon
		end = i + valueEnd(object[i:])
		switch {
		case err != nil:
		case slices.Contains(seen, name):
			err = malformed("%s has the member %q twice: send it once", what, clip(name))
		case len(seen) == maxMembers:
			return oversized("%s has more than %d members", what, maxMembers)
		default:
			seen = append(seen, name)
			err = take(name, object[i:end])
		}
		if first == nil {
			first = err
		}
		if i = skipBlank(object, end); object[i] == ',' {
			i = skipBlank(object, i+1)
		}
	}
	return first
}

// text decodes a JSON string; of and what name it in an error.
func text(of, what string, value []byte) (string, *usage.InvalidError) {
	if value[0] != '"' {
		return "", malformed("%s%s is %s: send a text", of, clip(what), kindOf(value))
	}
	if !utf8.Valid(value) {
		return "", malformed("%s%s is not UTF-8", of, clip(what))
	}
	inner := value[1 : len(value)-1]
	if bytes.IndexByte(inner, '\\') < 0 {
		return string(inner), nil
	}
	if halfPair(inner) {
		return "", malformed("%s%s has half a surrogate pair (\\ud800 to \\udfff): escape both halves, or send UTF-8", of, clip(what))
	}
	var s string
	if err := json.Unmarshal(value, &s); err != nil {
		return "", malformed("%s%s is not a JSON string: %v", of, clip(what), err)
	}
	return s, nil
}

// halfPair reports whether a JSON string's content escapes a surrogate without its
// other half, for which decoders put a replacement character: different texts would
// become one.
func halfPair(s []byte) bool {
	unit := func(i int) uint64 {
		if i+6 > len(s) || s[i] != '\\' || s[i+1] != 'u' {
			return 0
		}
		u, err := strconv.ParseUint(string(s[i+2:i+6]), 16, 16)
		if err != nil {
			return 0
		}
		return u
	}
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			continue
		}
		switch u := unit(i); {
		case u >= 0xd800 && u < 0xdc00:
			if low := unit(i + 6); low < 0xdc00 || low > 0xdfff {
				return true
			}
			i += 11
		case u >= 0xdc00 && u <= 0xdfff:
			return true
		default:
			i++ // the escaped character
		}
	}
	return false
}

// whole reads a JSON number whose value is a whole number, however it is written:
// 1000, 1e3, 1000.0, -0.
func whole(of, what string, value []byte) (int64, *usage.InvalidError) {
	switch value[0] {
	case '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9':
	default:
		return 0, malformed("%s%s is %s: send a number without quotes", of, clip(what), kindOf(value))
	}
	if n, err := strconv.ParseInt(string(value), 10, 64); err == nil {
		return n, nil
	}
	digits, exponent, _ := strings.Cut(strings.ToLower(string(value)), "e")
	digits, negative := strings.CutPrefix(digits, "-")
	integer, fraction, _ := strings.Cut(digits, ".")
	digits = strings.TrimLeft(integer+fraction, "0")
	if digits == "" {
		return 0, nil
	}
	shift, err := strconv.ParseInt(strings.TrimPrefix(exponent, "+"), 10, 32)
	if err != nil && exponent != "" {
		shift = math.MaxInt32
		if exponent[0] == '-' {
			shift = math.MinInt32
		}
	}
	shift -= int64(len(fraction))
	significant := strings.TrimRight(digits, "0")
	shift += int64(len(digits) - len(significant))
	if shift < 0 {
		return 0, malformed("%s%s is %s: send a whole number", of, clip(what), clip(string(value)))
	}
	if int64(len(significant))+shift <= 18 {
		n, err := strconv.ParseInt(significant+strings.Repeat("0", int(shift)), 10, 64)
		if err == nil {
			if negative {
				n = -n
			}
			return n, nil
		}
	}
	if negative {
		return 0, &usage.InvalidError{Reason: usage.ReasonNegativeCount, Message: fmt.Sprintf("%s%s is %s: it can't be negative", of, clip(what), clip(string(value)))}
	}
	return 0, oversized("%s%s is %s, at most %d is allowed", of, clip(what), clip(string(value)), usage.MaxQuantity)
}

// boolean reads true or false.
func boolean(what string, value []byte) (bool, *usage.InvalidError) {
	if value[0] != 't' && value[0] != 'f' {
		return false, malformed("%s is %s: send true or false", what, kindOf(value))
	}
	return value[0] == 't', nil
}

// clip shortens a text of an event for a message about it.
func clip(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	end := most
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}
