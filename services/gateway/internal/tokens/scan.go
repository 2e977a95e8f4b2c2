// Package tokens reads what a call has used from the JSON that a model provider
// answers, while it passes by.
package tokens

import (
	"bytes"
	"encoding/json"
	"strings"
)

// Scanner finds one member of the outermost JSON object in a stream of bytes and
// keeps its value, whatever the size of the rest. The zero value is not usable:
// see NewScanner. Not safe for concurrent use.
type Scanner struct {
	want  string
	name  []byte // want
	bound int
	inner *Scanner // gets the value instead; nil: it is kept

	state    state
	mark     int // bytes of a byte order mark so far
	depth    int // of the value that is being passed, below the outermost object
	inString bool
	escaped  bool
	key      []byte
	value    []byte
	capture  bool
	tooLong  bool
	found    bool
	complete bool
	alike    bool // a member is named so but for upper and lower case
}

type state uint8

const (
	beforeObject state = iota
	beforeKey          // or the object's end
	inKey
	beforeColon
	beforeValue
	inValue
	afterObject
	followed // by something else
	broken   // it is not a JSON object
)

// byteOrderMark is passed over as many parsers do.
const byteOrderMark = "\xef\xbb\xbf"

// usualKey and usualValue are room for what most bodies have, in bytes.
const usualKey, usualValue = 32, 64

// maxKey bounds the member names that are looked at; "\u0075" makes a byte six.
const maxKey = 6 * 64

// NewScanner looks for the member of that name. A value of more than bound bytes
// counts as not found. Of members of the same name the last one counts, as with
// most parsers.
func NewScanner(member string, bound int) *Scanner {
	return &Scanner{want: member, name: []byte(member), bound: bound, key: make([]byte, 0, usualKey), value: make([]byte, 0, min(bound, usualValue))}
}

// within looks for a member of the object that the member outer is.
func within(outer string, inner *Scanner) *Scanner {
	return &Scanner{want: outer, name: []byte(outer), inner: inner}
}

// reset begins anew.
func (s *Scanner) reset() {
	if s.inner != nil {
		s.inner.reset()
	}
	*s = Scanner{want: s.want, name: s.name, bound: s.bound, inner: s.inner, key: s.key[:0], value: s.value[:0]}
}

// Write takes the next bytes. It never fails.
func (s *Scanner) Write(p []byte) (int, error) {
	for i := 0; i < len(p); i++ {
		if s.inString {
			i = s.passString(p, i)
			continue
		}
		s.step(p[i])
	}
	return len(p), nil
}

// passString goes on from p[i], which is inside a string, and returns the index of
// the last byte it took.
func (s *Scanner) passString(p []byte, i int) int {
	from, quote := i, -1
	for ; i < len(p); i++ {
		if s.escaped {
			s.escaped = false
			continue
		}
		quote = next(p, i, quote, '"')
		if e := bytes.IndexByte(p[i:quote], '\\'); e >= 0 {
			s.escaped = true
			i += e
			continue
		}
		if i = quote; i < len(p) {
			s.inString = false
			s.keep(p[from : i+1])
			if s.state == inKey {
				s.endKey()
			}
			return i
		}
	}
	s.keep(p[from:])
	return i
}

// next is the index of the first c from i on, len(p) without one; known was that from
// before i, or is -1. So p is looked through once, also where other bytes that matter
// stand before each c.
func next(p []byte, i, known int, c byte) int {
	if known >= i {
		return known
	}
	if n := bytes.IndexByte(p[i:], c); n >= 0 {
		return i + n
	}
	return len(p)
}

func (s *Scanner) keep(p []byte) {
	switch {
	case s.state == inKey:
		if len(s.key)+len(p) > maxKey {
			s.key = append(s.key[:0], '!') // too long for what is wanted, and not a string any more
			return
		}
		s.key = append(s.key, p...)
	case s.capture && s.inner != nil:
		_, _ = s.inner.Write(p) // never fails
	case s.capture:
		if len(s.value)+len(p) > s.bound {
			s.tooLong = true
			s.value = s.value[:0]
		}
		if !s.tooLong {
			s.value = append(s.value, p...)
		}
	}
}

func (s *Scanner) endKey() {
	s.state = beforeColon
	s.capture = s.named()
	s.alike = s.alike || !s.capture && s.almost()
	if s.capture {
		s.value, s.tooLong, s.found, s.complete = s.value[:0], false, true, false
		if s.inner != nil {
			s.inner.reset()
		}
	}
}

// named reports whether the key is the one that is looked for.
func (s *Scanner) named() bool {
	if bytes.IndexByte(s.key, '\\') < 0 {
		return len(s.key) == len(s.want)+2 && s.key[0] == '"' && string(s.key[1:len(s.key)-1]) == s.want
	}
	var name string
	return json.Unmarshal(s.key, &name) == nil && name == s.want
}

// almost reports whether the key is the one that is looked for to parsers that do not
// mind upper and lower case.
func (s *Scanner) almost() bool {
	if bytes.IndexByte(s.key, '\\') >= 0 {
		var name string
		return json.Unmarshal(s.key, &name) == nil && strings.EqualFold(name, s.want)
	}
	// Letters that fold into one of ASCII have three bytes at most.
	n := len(s.key)
	return n >= 2 && n-2 <= 3*len(s.want) && s.key[0] == '"' && bytes.EqualFold(s.key[1:n-1], s.name)
}

func (s *Scanner) step(c byte) {
	if c == ' ' || c == '\t' || c == '\n' || c == '\r' {
		return
	}
	switch s.state {
	case beforeObject:
		if s.mark < len(byteOrderMark) && c == byteOrderMark[s.mark] {
			s.mark++
			return
		}
		s.state = broken
		if c == '{' && s.mark%len(byteOrderMark) == 0 {
			s.state = beforeKey
		}
	case beforeKey:
		switch c {
		case '"':
			s.state, s.inString = inKey, true
			s.key = append(s.key[:0], '"')
		case '}':
			s.state = afterObject
		case ',':
		default:
			s.state = broken
		}
	case beforeColon:
		s.state = broken
		if c == ':' {
			s.state = beforeValue
		}
	case beforeValue:
		s.state = inValue
		s.stepValue(c)
	case inValue:
		s.stepValue(c)
	case afterObject:
		s.state = followed
	}
}

func (s *Scanner) stepValue(c byte) {
	if s.depth == 0 && (c == ',' || c == '}') {
		s.complete = s.complete || s.capture
		s.capture = false
		s.state = beforeKey
		if c == '}' {
			s.state = afterObject
		}
		return
	}
	one := [1]byte{c}
	s.keep(one[:])
	switch c {
	case '"':
		s.inString = true
	case '{', '[':
		s.depth++
	case '}', ']':
		s.depth--
	}
}

// Object reports whether the bytes so far were, or can become, a JSON object and
// nothing else.
func (s *Scanner) Object() bool { return s.state != broken && s.state != followed }

// Ended reports whether there was a whole object, whatever followed it.
func (s *Scanner) Ended() bool { return s.state == afterObject || s.state == followed }

// Value returns the member's JSON. ok is false when it was not there, was too
// long, or the object did not end. What followed the object is not looked at, as
// by parsers that read one value from a stream.
func (s *Scanner) Value() (value []byte, ok bool) {
	return s.value, s.Ended() && s.found && s.complete && !s.tooLong
}

// Alike reports that a member was there whose name differs from the one that is looked
// for in upper and lower case only.
func (s *Scanner) Alike() bool { return s.alike }

// Absent reports that the object is whole and has no such member.
func (s *Scanner) Absent() bool { return s.Ended() && !s.found }
