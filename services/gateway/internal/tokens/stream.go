package tokens

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"strings"
)

// IsStream reports whether a content type is that of server-sent events.
func IsStream(contentType string) bool {
	t, _, err := mime.ParseMediaType(contentType)
	return err == nil && t == "text/event-stream"
}

// maxHeld bounds the event that a Stream holds to see whether it is to be dropped;
// one that is larger has more than usage in it.
const maxHeld = 16 << 10

// Stream passes server-sent events on and looks for the usage that OpenAI's chat
// completions and responses and Anthropic's messages report in them. What passes is
// scanned as it goes, with constant memory, and leaves in the piece in which it came.
//
// Of several reports the last one counts, member by member. The output count with
// which Anthropic's answer begins is none: it is the beginning's.
type Stream struct {
	body io.ReadCloser
	done func([]Reading, Outcome)

	// The line, and the event so far.
	field   int  // bytes of it that are those of dataField
	other   bool // the line is another field
	began   bool // the line has bytes
	cr      bool // a line feed that follows belongs to the line before
	blank   bool // the event has had no line
	usage   *Scanner
	message *Scanner
	answer  *Scanner
	choices *Scanner
	drops   bool
	held    []byte // of the event, where drops
	loose   bool   // the event is too large to be held
	dropped bool   // the event before was not passed on
	out     bytes.Buffer
	err     error // of body, when out is empty
	all     object
	bad     bool
	tooLong bool
	word    []byte // the beginning of the event's data
	partial bool   // the newest report came beside choices, so others may follow
}

// NewStream wraps a body without Content-Encoding. done is called once: when the body
// has ended, or at Close with Broken, or Partial, and what was reported until then: Partial
// where the client may have been sent more than that is for. With drops
// events that report usage and have no choices are not passed on: the client has not
// asked for them. An event counts for its reader when it is whole, so holding it until
// then delays nothing.
func NewStream(body io.ReadCloser, drops bool, done func([]Reading, Outcome)) *Stream {
	return &Stream{
		body: body, done: done, drops: drops, blank: true,
		usage:   NewScanner("usage", MaxUsageObject),
		message: within("message", NewScanner("usage", MaxUsageObject)),
		answer:  within("response", NewScanner("usage", MaxUsageObject)),
		choices: NewScanner("choices", len(noChoices)),
	}
}

const (
	dataField = "data:"
	noChoices = "[]"
	// lastWord of chat completions; maxWord is enough to see that it is nothing else.
	lastWord = "[DONE]"
	maxWord  = 16
)

// Read implements io.Reader.
func (s *Stream) Read(p []byte) (int, error) {
	if !s.drops {
		n, err := s.body.Read(p)
		for rest := p[:n]; len(rest) > 0; {
			taken, ended := s.scan(rest)
			rest = rest[taken:]
			if ended {
				s.endEvent()
			}
		}
		s.ends(err)
		return n, err
	}
	for s.out.Len() == 0 {
		if s.err != nil || len(p) == 0 {
			return 0, s.err
		}
		n, err := s.body.Read(p)
		for rest := p[:n]; len(rest) > 0; {
			if s.cr && s.fresh() && rest[0] == '\n' {
				// The other half of what ended an event.
				if s.cr = false; !s.dropped {
					s.out.WriteByte('\n')
				}
				rest = rest[1:]
				continue
			}
			taken, ended := s.scan(rest)
			s.hold(rest[:taken])
			rest = rest[taken:]
			if ended {
				if s.dropped = s.endEvent(); !s.dropped {
					s.release()
				}
				s.held, s.loose = s.held[:0], false
			}
		}
		if err != nil {
			if !s.ends(err) {
				s.release()
			}
			s.err = err
		}
	}
	return s.out.Read(p)
}

// fresh: the event has no bytes yet.
func (s *Stream) fresh() bool { return s.blank && !s.began && len(s.held) == 0 }

// hold keeps a piece of the event, and lets it go when it is too large.
func (s *Stream) hold(p []byte) {
	s.held = append(s.held, p...)
	if s.loose = s.loose || len(s.held) > maxHeld; s.loose {
		s.release()
	}
}

func (s *Stream) release() {
	s.out.Write(s.held)
	s.held = s.held[:0]
}

// ends looks at what the body ended with, and reports whether that is to be dropped.
func (s *Stream) ends(err error) (drop bool) {
	if !errors.Is(err, io.EOF) {
		return false
	}
	drop = s.endEvent() // also where the empty line is missing
	s.end(s.outcome())
	return drop
}

// Close implements io.Closer.
func (s *Stream) Close() error {
	if s.partial {
		s.end(Partial)
	}
	s.end(Broken)
	return s.body.Close()
}

func (s *Stream) end(o Outcome) {
	if s.done == nil {
		return
	}
	done := s.done
	s.done = nil
	readings, _ := s.all.readings()
	done(readings, o)
}

func (s *Stream) outcome() Outcome {
	readings, malformed := s.all.readings()
	switch {
	case s.tooLong:
		return TooLarge
	case s.bad || malformed:
		return Malformed
	case len(readings) == 0:
		return None
	}
	return Measured
}

// scan takes bytes to the end of an event, or all.
func (s *Stream) scan(p []byte) (taken int, ended bool) {
	for i := 0; i < len(p); {
		if s.cr {
			if s.cr = false; p[i] == '\n' {
				i++
				continue
			}
		}
		line := p[i:]
		end := bytes.IndexAny(line, "\r\n")
		if end >= 0 {
			line = line[:end]
		}
		s.part(line)
		i += len(line)
		if end < 0 {
			continue
		}
		s.cr = p[i] == '\r'
		i++
		if s.endLine() {
			if s.cr && i < len(p) && p[i] == '\n' {
				s.cr = false
				i++
			}
			return i, true
		}
	}
	return len(p), false
}

// part takes a piece of a line.
func (s *Stream) part(p []byte) {
	if len(p) == 0 {
		return
	}
	s.began = true
	for !s.other && s.field < len(dataField) && len(p) > 0 {
		if p[0] != dataField[s.field] {
			// A byte order mark may stand before the first field; it is then not
			// looked at, and no provider reports usage there.
			s.other = true
			return
		}
		s.field++
		p = p[1:]
	}
	if s.other || len(p) == 0 {
		return
	}
	s.write(p)
}

func (s *Stream) write(p []byte) {
	s.word = append(s.word, p[:min(len(p), maxWord-len(s.word))]...)
	for _, scanner := range [...]*Scanner{s.usage, s.message, s.answer, s.choices} {
		_, _ = scanner.Write(p) // never fails
	}
}

// endLine reports whether the line was the empty one that ends an event.
func (s *Stream) endLine() bool {
	if !s.began {
		return !s.blank
	}
	if s.field == len(dataField) && !s.other {
		s.write([]byte{'\n'}) // between the lines of one datum
	}
	s.began, s.other, s.field, s.blank = false, false, 0, false
	return false
}

// endEvent takes what the event reports, and says whether it is to be dropped.
func (s *Stream) endEvent() (drop bool) {
	value, ok := s.usage.Value()
	reported := s.note(s.usage, value, ok, false)
	list, ok := s.choices.Value()
	alone := ok && string(list) == noChoices
	switch {
	case reported:
		s.partial = !alone && !s.choices.Absent()
		drop = alone && s.drops && !s.loose
	case string(bytes.TrimSpace(s.word)) == lastWord:
		s.partial = false
	}
	s.word = s.word[:0]
	if _, whole := s.message.Value(); whole {
		value, ok = s.message.inner.Value()
		s.note(s.message.inner, value, ok, true)
	}
	if _, whole := s.answer.Value(); whole {
		value, ok = s.answer.inner.Value()
		s.note(s.answer.inner, value, ok, false)
	}
	for _, scanner := range [...]*Scanner{s.usage, s.message, s.answer, s.choices} {
		scanner.reset()
	}
	s.began, s.other, s.field, s.blank = false, false, 0, true
	return drop
}

// note takes a usage object over and reports whether it was one.
func (s *Stream) note(scanner *Scanner, raw []byte, ok, beginning bool) bool {
	if !ok {
		s.tooLong = s.tooLong || scanner.Ended() && !scanner.Absent()
		return false
	}
	if isNull(raw) {
		return false
	}
	o, ok := parse(raw)
	if !ok {
		s.bad = true
		return false
	}
	if beginning {
		o.OutputTokens, o.OutputDetails = nil, details{}
	}
	s.all.add(&o)
	return true
}

// NewReader wraps an answer's body to look for usage in it: a Stream for server-sent
// events, a Tap for JSON, nil for what is neither. Server-sent events in an encoding
// are not read.
func NewReader(body io.ReadCloser, contentType, encoding string, drops bool, done func([]Reading, Outcome)) io.ReadCloser {
	switch plain := strings.ToLower(strings.TrimSpace(encoding)); {
	case IsJSON(contentType):
		return NewTap(body, encoding, done)
	case !IsStream(contentType):
		return nil
	case plain == "" || plain == "identity":
		return NewStream(body, drops, done)
	}
	t := NewTap(body, "", done)
	t.encoded = true
	return t
}
