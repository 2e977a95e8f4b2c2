// Package bulk reads the accounts of a large plans file one by one. A YAML parser makes
// an object of every word, ten gigabytes of a million accounts; nearly all accounts are
// written in a few plain forms, which are read here in one pass. What is not surely
// one of them is left to the parser, account by account. It is pure.
package bulk

import (
	"bytes"
	"strings"
)

// Account is who pays.
type Account struct {
	ID     string `json:"id"`
	Parent string `json:"parent,omitempty"`
	Plan   string `json:"plan,omitempty"`
	Keys   []Key  `json:"keys,omitempty"`
}

// Key is an API key, known by its hash only.
type Key struct {
	ID string `json:"id"`
	// SHA256 of the key in lower-case hex (HashKey).
	SHA256 string `json:"sha256"`
}

// Bounds of the schema for what is read here.
const (
	maxID   = 256
	maxName = 64
	maxKeys = 1000
	hexHash = 64
)

// Item is where one account stands in the file.
type Item struct {
	Start, End int
	// Line from 1, and Column from 1, of its first byte.
	Line, Column int
}

// File is a plans file whose accounts are taken out.
type File struct {
	// Rest is the file with an empty list of accounts; other lines keep their numbers.
	Rest  []byte
	Items []Item
	// Flow: the accounts are elements of a JSON array, not of a YAML block.
	Flow bool
}

// Split takes the accounts out of a file; false when it is not written so that this is
// surely right.
func Split(data []byte) (File, bool) {
	if text := bytes.TrimLeft(data, " \t\r\n"); len(text) > 0 && text[0] == '{' {
		return splitJSON(data)
	}
	return splitBlock(data)
}

// line is one of a file: data[start:end], without its end.
type lines struct {
	data       []byte
	start, end int
	number     int
	next       int
}

func (l *lines) more() bool {
	if l.next >= len(l.data) {
		return false
	}
	l.start = l.next
	l.number++
	if n := bytes.IndexByte(l.data[l.start:], '\n'); n >= 0 {
		l.end, l.next = l.start+n, l.start+n+1
	} else {
		l.end, l.next = len(l.data), len(l.data)
	}
	return true
}

// indent returns how many spaces the line begins with; false when nothing follows but
// a comment.
func (l *lines) indent() (int, bool) {
	for i := l.start; i < l.end; i++ {
		switch l.data[i] {
		case ' ':
		case '#', '\r':
			return 0, false
		default:
			return i - l.start, true
		}
	}
	return 0, false
}

func splitBlock(data []byte) (File, bool) {
	const field = "accounts:"
	l := &lines{data: data}
	for {
		if !l.more() {
			return File{}, false
		}
		if line := bytes.TrimRight(data[l.start:l.end], " \r"); string(line) == field {
			break
		} else if bytes.HasPrefix(line, []byte(field)) || bytes.HasPrefix(line, []byte("---")) || bytes.HasPrefix(line, []byte("%")) {
			return File{}, false
		}
	}
	f := File{}
	head, first := l.end, l.number
	tail, indent := len(data), -1
	for l.more() {
		at, something := l.indent()
		if !something {
			continue
		}
		if data[l.start+at] == '\t' {
			return File{}, false
		}
		dash := data[l.start+at] == '-' && (l.start+at+1 == l.end || data[l.start+at+1] == ' ')
		if indent < 0 {
			if !dash {
				return File{}, false
			}
			indent = at
		}
		if at < indent || at == indent && !dash {
			tail = l.start
			break
		}
		if at == indent {
			if n := len(f.Items); n > 0 {
				f.Items[n-1].End = l.start
			}
			f.Items = append(f.Items, Item{Start: l.start, Line: l.number, Column: 1})
		}
	}
	if len(f.Items) == 0 {
		return File{}, false
	}
	f.Items[len(f.Items)-1].End = tail
	f.Rest = append(append([]byte(nil), data[:head]...), " []\n"...)
	if tail < len(data) {
		for n := first + 1; n < l.number; n++ {
			f.Rest = append(f.Rest, '\n')
		}
		f.Rest = append(f.Rest, data[tail:]...)
	}
	return f, true
}

// splitJSON is for files that begin with a brace. It is as strict as it has to be to
// find where values begin and end; the parser sees all of Rest.
func splitJSON(data []byte) (File, bool) {
	f := File{Flow: true}
	depth, line, begun := 0, 1, 0 // begun: where the line does
	inAccounts, found, open, closed := false, false, 0, 0
	last := "" // the string before a colon at depth 1
	for i := 0; i < len(data); i++ {
		switch c := data[i]; c {
		case '\n':
			line, begun = line+1, i+1
		case '"':
			from := i + 1
			for i++; i < len(data) && data[i] != '"'; i++ {
				switch data[i] {
				case '\\':
					i++
				case '\n':
					return File{}, false
				}
			}
			if i >= len(data) {
				return File{}, false
			}
			if depth == 1 {
				last = string(data[from:i])
			}
		case '{', '[':
			if depth == 1 && c == '[' && last == "accounts" {
				if found {
					return File{}, false
				}
				found, inAccounts, open = true, true, i+1
			} else if inAccounts && depth == 2 {
				if c != '{' {
					return File{}, false
				}
				f.Items = append(f.Items, Item{Start: i, Line: line, Column: i - begun + 1})
			}
			depth++
		case '}', ']':
			depth--
			switch {
			case depth < 0:
				return File{}, false
			case inAccounts && depth == 2:
				f.Items[len(f.Items)-1].End = i + 1
			case inAccounts && depth == 1:
				inAccounts, closed = false, i
			}
		case ' ', '\t', '\r', ',', ':':
		default:
			// YAML's comments and plain words need the parser.
			if inAccounts && depth == 2 || c == '#' || c == '\'' {
				return File{}, false
			}
		}
	}
	if depth != 0 || !found || len(f.Items) == 0 || !separated(data, f.Items, open, closed) {
		return File{}, false
	}
	f.Rest = append(append([]byte(nil), data[:open]...), bytes.Repeat([]byte{'\n'}, bytes.Count(data[open:closed], []byte{'\n'}))...)
	f.Rest = append(f.Rest, data[closed:]...)
	return f, true
}

// separated reports whether there is exactly a comma between two elements.
func separated(data []byte, items []Item, open, closed int) bool {
	at := open
	for i := range items {
		want := ","
		if i == 0 {
			want = ""
		}
		if string(bytes.TrimSpace(data[at:items[i].Start])) != want {
			return false
		}
		at = items[i].End
	}
	return len(bytes.TrimSpace(data[at:closed])) == 0
}

// Read reads the text of an item; false when it is not surely one of the plain forms,
// or not within the schema's bounds. The strings are parts of text.
func Read(text string, flow bool) (Account, bool) {
	var a Account
	if flow {
		s := &scanner{text: text}
		return a, s.account(&a) && s.end()
	}
	return a, readBlock(text, &a) && a.ID != ""
}

// cutLine returns the next line with something on it, its indent and what follows.
func cutLine(text string) (indent int, line, rest string) {
	for text != "" {
		line, text, _ = strings.Cut(text, "\n")
		line = strings.TrimRight(line, " \r")
		trimmed := strings.TrimLeft(line, " ")
		if trimmed == "" || trimmed[0] == '#' {
			continue
		}
		return len(line) - len(trimmed), trimmed, text
	}
	return 0, "", ""
}

// entry takes the dash off a line and returns where what follows it begins.
func entry(indent int, line string) (int, string, bool) {
	after, ok := strings.CutPrefix(line, "- ")
	if !ok {
		return 0, "", false
	}
	value := strings.TrimLeft(after, " ")
	return indent + 2 + len(after) - len(value), value, value != ""
}

func readBlock(text string, a *Account) bool {
	indent, line, rest := cutLine(text)
	at, line, ok := entry(indent, line)
	if !ok {
		return false
	}
	if line[0] == '{' {
		s := &scanner{text: line}
		if _, more, _ := cutLine(rest); more != "" {
			return false
		}
		return s.account(a) && s.end()
	}
	for line != "" {
		name, value, ok := field(line)
		if !ok {
			return false
		}
		if name == "keys" && value == "" {
			if a.Keys != nil {
				return false
			}
			if rest, ok = readKeys(rest, at, a); !ok {
				return false
			}
		} else if !a.set(name, value) {
			return false
		}
		indent, line, rest = cutLine(rest)
		if line != "" && indent != at {
			return false
		}
	}
	return true
}

// readKeys reads the lines of a list of keys below a field that begins at column at.
func readKeys(text string, at int, a *Account) (rest string, ok bool) {
	indent, line, rest := cutLine(text)
	if line == "" || indent < at || line[0] != '-' {
		return "", false
	}
	list := indent
	for line != "" && indent == list && line[0] == '-' {
		inner, entryLine, ok := entry(indent, line)
		if !ok || len(a.Keys) == maxKeys {
			return "", false
		}
		var k Key
		if entryLine[0] == '{' {
			s := &scanner{text: entryLine}
			if !s.key(&k) || !s.end() {
				return "", false
			}
			text = rest
			indent, line, rest = cutLine(rest)
		} else {
			line = entryLine
			for indent = inner; line != "" && indent == inner; indent, line, rest = cutLine(rest) {
				name, value, ok := field(line)
				if !ok || !k.set(name, value) {
					return "", false
				}
				text = rest
			}
		}
		if k.ID == "" || k.SHA256 == "" {
			return "", false
		}
		a.Keys = append(a.Keys, k)
	}
	if line != "" && indent >= list && list > at {
		return "", false
	}
	return text, true
}

// field cuts "name: value" or "name:".
func field(line string) (name, value string, ok bool) {
	name, value, ok = strings.Cut(line, ":")
	if !ok || value != "" && value[0] != ' ' {
		return "", "", false
	}
	return name, strings.TrimLeft(value, " "), true
}

// set takes a field as it is written; false when it is there already, unknown, or not
// surely text of the right form.
func (a *Account) set(name, value string) bool {
	if name == "keys" {
		s := &scanner{text: value}
		return a.Keys == nil && s.keys(a) && s.end()
	}
	v, ok := scalar(value)
	return ok && a.put(name, v)
}

func (a *Account) put(name, v string) bool {
	switch name {
	case "id":
		return put(&a.ID, v, len(v) <= maxID)
	case "parent":
		return put(&a.Parent, v, len(v) <= maxID)
	case "plan":
		return put(&a.Plan, v, isName(v))
	}
	return false
}

func (k *Key) set(name, value string) bool {
	v, ok := scalar(value)
	return ok && k.put(name, v)
}

func (k *Key) put(name, v string) bool {
	switch name {
	case "id":
		return put(&k.ID, v, len(v) <= maxID)
	case "sha256":
		return put(&k.SHA256, v, isHash(v))
	}
	return false
}

// put sets a field that has no value yet.
func put(to *string, v string, valid bool) bool {
	if *to != "" || v == "" || !valid {
		return false
	}
	*to = v
	return true
}

func isName(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; !isLetter(c) && !isDigit(c) && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return len(s) <= maxName
}

func isHash(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; !isDigit(c) && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == hexHash
}

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
func isDigit(c byte) bool  { return c >= '0' && c <= '9' }

// scalar returns the text of a value that is surely text.
func scalar(s string) (string, bool) {
	if s == "" {
		return "", false
	}
	if q := s[0]; q == '"' || q == '\'' {
		if len(s) < 2 || s[len(s)-1] != q {
			return "", false
		}
		s = s[1 : len(s)-1]
		return s, quotable(s)
	}
	// A colon that nothing follows would make a mapping; in a flow collection, more do.
	return s, plain(strings.ReplaceAll(s[:len(s)-1], ":", "_") + s[len(s)-1:])
}

// quotable: between quotes it stands for itself.
func quotable(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\'' || c == '\\' {
			return false
		}
	}
	return true
}

// plain: without quotes it is text for every reader of YAML, and nothing else.
func plain(s string) bool {
	text, letters, dashes := false, false, false // text: something that no number has
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case isDigit(c):
		case isLetter(c):
			// Digits, e, x, o, b, inf and nan make numbers, and a to f do after 0x.
			text = text || i > 0 && strings.IndexByte("abcdefinoxABCDEFINOX", c) < 0
			letters = true
		case i > 0 && (c == '_' || c == '-' || c == '.' || c == '/' || c == '@'):
			text = text || c == '/' || c == '@'
			dashes = dashes || c == '-' && s[i-1] != 'e' && s[i-1] != 'E'
		default:
			return false
		}
	}
	switch {
	case s == "":
		return false
	case isLetter(s[0]):
		switch strings.ToLower(s) {
		case "true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf", "nan":
			return false
		}
		return true
	case len(s) == hexHash && isHash(s):
		// A number has no a, c, d or f, unless it begins with 0x, and b only in 0b.
		return strings.ContainsAny(s, "acdf")
	}
	return text || letters && dashes // as ids are that begin with a digit
}

// scanner reads {a: b} and {"a":"b"} within one line, or over many of JSON.
type scanner struct {
	text string
	at   int
}

func (s *scanner) space() {
	for s.at < len(s.text) && strings.IndexByte(" \t\r\n", s.text[s.at]) >= 0 {
		s.at++
	}
}

// take takes a byte, after any space.
func (s *scanner) take(c byte) bool {
	s.space()
	if s.at < len(s.text) && s.text[s.at] == c {
		s.at++
		return true
	}
	return false
}

func (s *scanner) end() bool {
	s.space()
	return s.at == len(s.text)
}

// word reads a scalar of a flow collection.
func (s *scanner) word() (string, bool) {
	s.space()
	from := s.at
	if from == len(s.text) {
		return "", false
	}
	if q := s.text[from]; q == '"' || q == '\'' {
		n := strings.IndexByte(s.text[from+1:], q)
		if n < 0 {
			return "", false
		}
		s.at = from + n + 2
		v := s.text[from+1 : s.at-1]
		return v, quotable(v)
	}
	for s.at < len(s.text) && strings.IndexByte(" \t\r\n,:{}[]", s.text[s.at]) < 0 {
		s.at++
	}
	v := s.text[from:s.at]
	return v, plain(v)
}

// object reads an object, field by field.
func (s *scanner) object(field func(name string) bool) bool {
	if !s.take('{') {
		return false
	}
	for {
		name, ok := s.word()
		quoted := s.at > 0 && (s.text[s.at-1] == '"' || s.text[s.at-1] == '\'')
		if !ok || !s.take(':') {
			return false
		}
		if !quoted && s.at < len(s.text) && s.text[s.at] != ' ' {
			return false // a:b is one word
		}
		if !field(name) {
			return false
		}
		if s.take('}') {
			return true
		}
		if !s.take(',') {
			return false
		}
	}
}

func (s *scanner) account(a *Account) bool {
	return s.object(func(name string) bool {
		if name == "keys" {
			return a.Keys == nil && s.keys(a)
		}
		v, ok := s.word()
		return ok && a.put(name, v)
	}) && a.ID != ""
}

func (s *scanner) keys(a *Account) bool {
	if !s.take('[') {
		return false
	}
	if s.take(']') {
		a.Keys = []Key{}
		return true
	}
	for len(a.Keys) < maxKeys {
		var k Key
		if !s.key(&k) {
			return false
		}
		a.Keys = append(a.Keys, k)
		if s.take(']') {
			return true
		}
		if !s.take(',') {
			return false
		}
	}
	return false
}

func (s *scanner) key(k *Key) bool {
	return s.object(func(name string) bool {
		v, ok := s.word()
		return ok && k.put(name, v)
	}) && k.ID != "" && k.SHA256 != ""
}

// Valid reports whether an account is surely within the schema's bounds, however it
// was read.
func Valid(a *Account) bool {
	if !isID(a.ID) || a.Parent != "" && !isID(a.Parent) || !isName(a.Plan) || len(a.Keys) > maxKeys {
		return false
	}
	for i := range a.Keys {
		if !isID(a.Keys[i].ID) || !isHash(a.Keys[i].SHA256) {
			return false
		}
	}
	return true
}

// isID: printable ASCII; the schema takes more, and is asked then.
func isID(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return s != "" && len(s) <= maxID
}
