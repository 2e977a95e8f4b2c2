package tokens

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"strings"
)

// MaxUsageObject bounds the usage object that is looked at, in bytes. An answer itself
// may be of any size.
const MaxUsageObject = 64 << 10

// Outcome of looking for usage in an answer.
type Outcome uint8

// The outcomes.
const (
	Measured   Outcome = iota // it tells what was used
	None                      // it is whole, and does not tell
	Malformed                 // usage that is not counts, in whole or in part
	TooLarge                  // past the bound
	Broken                    // it broke off before it told
	Encoded                   // in an encoding that is not read
	Partial                   // it broke off, and told all along what it had used so far
	Unreadable                // it is neither JSON nor events
	Media                     // sound, pictures and the like
	Empty                     // it has no body
	Retrieved                 // it is of a call that creates nothing: a stored answer was counted when it was made
	Failed                    // its status tells of a failure
	Background                // it is made in the background, and tells later
	NumOutcomes
)

var outcomes = [NumOutcomes]string{"measured", "none", "malformed", "too_large", "broken", "encoded", "partial", "unreadable", "media", "empty", "retrieved", "failed", "background"}

// String is the outcome in metrics.
func (o Outcome) String() string { return outcomes[o] }

// Result of looking for usage in an answer.
type Result struct {
	Readings []Reading
	Outcome  Outcome
	// Passed is how many tokens of output passed at most since the answer last told
	// (a token is a byte of the model's text at least), and at least one for each
	// event and document.
	Passed int64
	// Complete: the answer's last word came by, so that who hangs up then misses
	// nothing.
	Complete bool
	// OfModel: the answer has choices or candidates, as those of models have.
	OfModel bool
	// Background: the answer says that it is made in the background, so that its
	// usage may be told later, to those who ask for it by its ID. Model is the name
	// that it has in the answer. Both are told of such answers only.
	Background bool
	ID, Model  string
}

// IsJSON reports whether a content type is JSON's.
func IsJSON(contentType string) bool {
	t, _, err := mime.ParseMediaType(contentType)
	return err == nil && (t == "application/json" || strings.HasSuffix(t, "+json"))
}

// IsStream reports whether a content type is that of server-sent events.
func IsStream(contentType string) bool {
	t, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(t), "text/event-stream")
}

// IsMedia reports whether a content type is of sound, pictures and the like, which no
// usage is told in.
func IsMedia(contentType string) bool {
	kind, _, _ := strings.Cut(contentType, "/")
	switch strings.ToLower(strings.TrimSpace(kind)) {
	case "audio", "video", "image", "font":
		return true
	}
	return false
}

// Options of a Reader.
type Options struct {
	// Stream: the answer is said to be of server-sent events. What it is its first
	// byte tells, since providers label answers in many ways; this is for those whose
	// first byte does not.
	Stream bool
	// Opaque: the answer is in an encoding that is not read.
	Opaque bool
	// Length that was announced; below 0: none.
	Length int64
	// Drops: the client has not asked for usage, but the gateway has: what the stream
	// has in it only because of that is taken off.
	Drops bool
}

// Reader passes an answer on and looks for usage in what passes by, with constant
// memory: in JSON, in several JSON documents one after another (NDJSON) or in a list,
// and in server-sent events. Of several reports each is cumulative.
type Reader struct {
	body   io.ReadCloser
	o      Options
	done   func(*Result)
	form   form
	passed int64 // bytes
	report report
	docs   walker
	events *events
	err    error // of body, when events have passed on everything
}

type form uint8

const (
	undecided form = iota
	documents
	stream
	opaque
)

// NewReader wraps a body. done is called once: at the body's end, or at Close when that
// was not reached.
func NewReader(body io.ReadCloser, o Options, done func(*Result)) *Reader {
	r := &Reader{body: body, o: o, done: done}
	if o.Opaque {
		r.form = opaque
	}
	return r
}

func (r *Reader) openStream() {
	r.form = stream
	r.events = &events{drops: r.o.Drops, blank: true, report: &r.report}
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	for {
		if r.events != nil && r.events.drops {
			switch {
			case r.events.out.Len() > 0:
				return r.events.out.Read(p)
			case r.err != nil || len(p) == 0:
				return 0, r.err
			}
		}
		n, err := r.body.Read(p)
		r.passed += int64(n)
		r.see(p[:n])
		ended := err != nil && errors.Is(err, io.EOF)
		if r.events != nil && r.events.drops {
			if r.err = err; err != nil {
				r.events.finish()
			}
			if ended {
				r.end(true)
			}
			continue
		}
		if ended {
			if r.events != nil {
				r.events.finish()
			}
			r.end(true)
		}
		return n, err
	}
}

// see looks at the next bytes.
func (r *Reader) see(p []byte) {
	if r.form == undecided {
		r.decide(p)
	}
	switch r.form {
	case documents:
		_, _ = r.docs.Write(p) // never fails
	case stream:
		r.events.write(p)
	}
}

// decide by the first byte that is not space, nor a byte order mark.
func (r *Reader) decide(p []byte) {
	for _, c := range p {
		switch c {
		case ' ', '\t', '\r', '\n', recordSeparator:
		case byteOrderMark[0], byteOrderMark[1], byteOrderMark[2]:
			// The walker says whether they are one.
		case '{', '[':
			r.form = documents
			r.docs.ended = func() { r.report.take(&r.docs) }
			return
		case ':', 'd', 'e', 'i', 'r': // a comment, or data, event, id, retry
			r.openStream()
			return
		default:
			if r.form = opaque; r.o.Stream {
				r.openStream()
			}
			return
		}
	}
	if r.o.Stream && len(p) > 0 {
		r.openStream()
	}
}

// Close implements io.Closer.
func (r *Reader) Close() error {
	r.end(false)
	return r.body.Close()
}

func (r *Reader) end(whole bool) {
	if r.done == nil {
		return
	}
	done := r.done
	r.done = nil
	result := r.result(whole)
	done(&result)
}

func (r *Reader) result(whole bool) Result {
	if r.form == opaque || r.form == undecided {
		o := Unreadable
		switch {
		case r.o.Opaque:
			o = Encoded
		case r.passed == 0 && !whole:
			o = Broken
		case r.passed == 0:
			o = Empty
		case !whole:
			o = Broken
		}
		return Result{Outcome: o, Passed: r.passed + r.missing()}
	}
	complete := whole
	if r.form == documents {
		if r.docs.begun && !r.docs.whole() {
			r.report.passed += r.docs.output()
			complete = false
		}
		complete = complete && !r.docs.broken
	} else {
		complete = complete || r.events.last
		if !whole {
			r.report.passed += r.events.pending()
		}
	}
	result := r.report.result()
	switch {
	case r.form == stream && whole && !r.events.data:
		result.Outcome = Unreadable
	case complete:
	case r.report.partial:
		result.Outcome = Partial
	case r.report.told && result.Outcome == Measured:
		complete = !r.docs.broken // only what nobody needs did not come
	default:
		result.Outcome = Broken
	}
	result.Complete = complete
	if !complete {
		result.Passed += r.missing()
	}
	return result
}

// missing is what of the announced length did not pass.
func (r *Reader) missing() int64 { return max(r.o.Length-r.passed, 0) }

const (
	dataField = "data:"
	// lastWord of chat completions; maxWord is enough to see that it is nothing else.
	lastWord = "[DONE]"
	maxWord  = 16
	// maxHeld bounds the event that is held to see what is to be taken off it.
	maxHeld = 1 << 20
)

// events takes server-sent events apart.
type events struct {
	report *report
	walk   walker

	begun bool // a byte of the stream that is of no byte order mark came by
	mark  int  // bytes of the mark that stands before the first field

	// The line, and the event so far.
	field int  // bytes of it that are those of dataField
	other bool // the line is another field
	began bool // the line has bytes
	cr    bool // a line feed that follows belongs to the line before
	blank bool // the event has had no line
	lines int  // of data in the event
	word  []byte
	data  bool // some event had data
	last  bool // the last word came by

	drops   bool
	held    []byte // of the event, where drops
	dataAt  int    // where its data begins in held
	loose   bool   // the event is too large to be held
	dropped bool   // the event before was not passed on
	out     bytes.Buffer
}

func (s *events) write(p []byte) {
	for len(p) > 0 {
		if s.drops && s.cr && s.fresh() && p[0] == '\n' {
			// The other half of what ended an event.
			if s.cr = false; !s.dropped {
				s.out.WriteByte('\n')
			}
			p = p[1:]
			continue
		}
		taken, ended := s.scan(p)
		if s.drops {
			s.hold(p[:taken])
		}
		p = p[taken:]
		if ended {
			s.endEvent()
		}
	}
}

// finish ends the event that is open, also where the empty line is missing.
func (s *events) finish() { s.endEvent() }

// pending is the output in the event that is open.
func (s *events) pending() int64 {
	if s.walk.begun {
		return s.walk.output()
	}
	return 0
}

// fresh: the event has no bytes yet.
func (s *events) fresh() bool { return s.blank && !s.began && len(s.held) == 0 }

// hold keeps a piece of the event, and lets it go when it is too large.
func (s *events) hold(p []byte) {
	s.held = append(s.held, p...)
	if s.loose = s.loose || len(s.held) > maxHeld; s.loose {
		s.release()
	}
}

func (s *events) release() {
	s.out.Write(s.held)
	s.held = s.held[:0]
}

// scan takes bytes to the end of an event, or all.
func (s *events) scan(p []byte) (taken int, ended bool) {
	feed := -1
	for i := 0; i < len(p); {
		if s.cr {
			if s.cr = false; p[i] == '\n' {
				i++
				continue
			}
		}
		feed = next(p, i, feed, '\n')
		line := p[i:feed]
		if cr := bytes.IndexByte(line, '\r'); cr >= 0 {
			line = line[:cr]
		}
		s.part(line, i)
		if i += len(line); i == len(p) {
			break
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

// part takes a piece of a line, which is at i of the bytes that are scanned.
func (s *events) part(p []byte, i int) {
	if len(p) == 0 {
		return
	}
	s.began = true
	for !s.begun && len(p) > 0 {
		if s.mark < len(byteOrderMark) && p[0] == byteOrderMark[s.mark] {
			s.mark++
			i++
			p = p[1:]
			continue
		}
		s.begun = true
		s.other = s.mark%len(byteOrderMark) != 0
	}
	for !s.other && s.field < len(dataField) && len(p) > 0 {
		if p[0] != dataField[s.field] {
			s.other = true
			return
		}
		s.field++
		p = p[1:]
		i++
		if s.field == len(dataField) {
			s.data = true
			if s.lines++; s.lines == 1 {
				s.dataAt = len(s.held) + i
			}
		}
	}
	if s.other || len(p) == 0 {
		return
	}
	s.datum(p)
}

func (s *events) datum(p []byte) {
	if len(s.word) < maxWord {
		s.word = append(s.word, p[:min(len(p), maxWord-len(s.word))]...)
	}
	_, _ = s.walk.Write(p) // never fails
}

// endLine reports whether the line was the empty one that ends an event.
func (s *events) endLine() bool {
	if !s.began {
		return !s.blank
	}
	if s.field == len(dataField) && !s.other {
		s.datum([]byte{'\n'}) // between the lines of one datum
	}
	s.began, s.other, s.field, s.blank = false, false, 0, false
	return false
}

// endEvent takes what the event reports, and passes on what is held of it.
func (s *events) endEvent() {
	s.dropped = false
	switch {
	case s.walk.whole():
		reported := s.report.take(&s.walk)
		if s.drops && !s.loose {
			s.takeOff(reported)
		}
	case s.walk.begun:
		s.report.passed += s.walk.output()
	case string(bytes.TrimSpace(s.word)) == lastWord:
		s.report.partial, s.last = false, true
	}
	if s.drops && !s.dropped {
		s.release()
	}
	if s.word = s.word[:0]; s.walk.at > 0 {
		s.walk.reset()
	}
	s.held, s.loose = s.held[:0], false
	s.began, s.other, s.field, s.blank, s.lines = false, false, 0, true, 0
}

// takeOff takes off what the event has in it because usage was asked for: the whole of
// an event that only tells usage, and the null of those that come before.
func (s *events) takeOff(reported bool) {
	choices, usage := &s.walk.members[slotChoices], &s.walk.members[slotUsage]
	switch {
	case reported:
		s.dropped = choices.found && (emptyList(choices) || isNull(choices.raw))
	case usage.found && !usage.tooLong && isNull(usage.raw) && s.lines == 1:
		from, to := usage.before, usage.to
		if usage.first {
			if from = usage.from; usage.next > 0 {
				to = usage.next
			}
		}
		s.held = append(s.held[:s.dataAt+from], s.held[s.dataAt+to:]...)
	}
}
