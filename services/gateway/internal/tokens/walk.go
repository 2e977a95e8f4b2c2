package tokens

import (
	"bytes"
	"encoding/json"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/counts"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/pictures"
)

// slot is a member of an answer that is worth a look.
type slot uint8

const (
	noSlot slot = iota
	// Usage objects, wherever providers put them.
	slotUsage    // usage: OpenAI, Anthropic, Bedrock, Mistral
	slotMetadata // usageMetadata: Gemini
	slotInner    // response.usage, response.usageMetadata: OpenAI's responses, Gemini's interactions
	slotBegin    // message.usage: how Anthropic's stream begins
	slotAside    // x_groq.usage, delta.usage, meta: Groq, Cohere, Bedrock
	// What the answer is.
	slotChoices
	slotID
	slotModel
	slotBackground
	// Counts that stand beside everything else: Ollama, llama.cpp, Bedrock's Llama and Titan.
	slotCountIn
	slotCountOut
	numSlots

	// Objects that have such members.
	slotResponse
	slotMessage
	slotParent
	// slotLabel is a member whose text is not the model's.
	slotLabel
	// slotMedia is one of pictures or sound.
	slotMedia
)

// slotOf says what a member of the outermost object is.
func slotOf(name []byte) slot {
	switch string(name) {
	case "usage":
		return slotUsage
	case "usageMetadata":
		return slotMetadata
	case "response", "interaction":
		return slotResponse
	case "message":
		return slotMessage
	case "x_groq", "delta":
		return slotParent
	case "meta", "amazon-bedrock-invocationMetrics":
		return slotAside
	case "choices", "candidates":
		return slotChoices
	case "id":
		return slotID
	case "model":
		return slotModel
	case "background":
		return slotBackground
	case "prompt_eval_count", "tokens_evaluated", "prompt_token_count", "inputTextTokenCount":
		return slotCountIn
	case "eval_count", "tokens_predicted", "generation_token_count":
		return slotCountOut
	}
	return label(name)
}

// slotWithin says what a member of an object below the outermost is.
func slotWithin(parent slot, name []byte) slot {
	usage := string(name) == "usage"
	switch {
	case parent == slotResponse && (usage || string(name) == "usageMetadata"):
		return slotInner
	case parent == slotResponse && string(name) == "meta":
		return slotAside
	case parent == slotResponse && string(name) == "id":
		return slotID
	case parent == slotResponse && string(name) == "model":
		return slotModel
	case parent == slotResponse && string(name) == "background":
		return slotBackground
	case parent == slotMessage && usage:
		return slotBegin
	case parent == slotParent && usage:
		return slotAside
	}
	return label(name)
}

// label tells members of which nobody pays for the text.
func label(name []byte) slot {
	switch string(name) {
	case "id", "object", "model", "type", "role", "status", "finish_reason", "native_finish_reason", "stop_reason", "finishReason", "done_reason", "severity",
		"system_fingerprint", "service_tier", "obfuscation", "item_id", "call_id", "response_id", "responseId", "modelVersion", "created_at", "provider", "signature", "thoughtSignature", "mimeType", "mime_type", "event_type":
		return slotLabel
	case "b64_json", "partial_image_b64":
		return slotMedia
	}
	return noSlot
}

// bounds of what is kept of a member.
func (s slot) bound() int {
	switch s {
	case slotChoices, slotBackground, slotCountIn, slotCountOut:
		return 32
	case slotID, slotModel:
		return maxID
	}
	return MaxUsageObject
}

// maxID bounds an answer's id and its model's name, in JSON.
const maxID = 512

// member is what is kept of one.
type member struct {
	raw     []byte
	found   bool
	tooLong bool
	// Where it stands among the bytes of the document: from the comma or the brace
	// before it, from its name, and to its end.
	before, from, to int
	first            bool // no member stands before it
	next             int  // where the one after it begins; 0: there is none
}

// walker passes over JSON documents in a stream of bytes, one after another or in one
// list, and keeps the members of each that tell what it has used. It takes constant
// memory whatever the documents are. Not safe for concurrent use.
type walker struct {
	// ended is called at the end of each document, unless it is nil.
	ended func()

	at       int    // bytes of the document so far
	mark     int    // of a byte order mark
	depth    int    // of open objects and lists
	objects  uint64 // bit d: the one at depth d is an object; of the first 64
	list     bool   // the documents stand in a list
	listOver bool
	begun    bool // there was a document
	broken   bool // it is no JSON that is known here

	inString bool
	escaped  bool
	naming   bool // the string is a member's name
	wantName bool
	key      []byte // of the string, where it is a name that may matter
	keyAt    int

	parent slot // of the object at depth 2
	slot   slot // of the member whose value comes
	label  bool // strings are not the model's
	media  bool // strings are pictures or sound

	capture slot // which is being kept
	deep    int  // the depth at which its value ends
	comma   int  // where the last comma or brace at depth 1 was
	some    bool // the document has had a member
	members [numSlots]member
	again   counts.Counts // of usage objects that another one of the name follows
	text    int64         // bytes of the model's
	coded   int64         // bytes of its pictures and sound
}

// reset forgets the document.
func (w *walker) reset() {
	for i := range w.members {
		m := &w.members[i]
		*m = member{raw: m.raw[:0]}
	}
	w.at, w.depth, w.objects, w.text, w.coded, w.comma = 0, 0, 0, 0, 0, 0
	w.inString, w.escaped, w.naming, w.wantName, w.label, w.media = false, false, false, false, false, false
	w.parent, w.slot, w.capture = noSlot, noSlot, noSlot
	if !w.again.None() {
		w.again = counts.Counts{}
	}
	w.begun, w.broken, w.mark, w.some, w.list, w.listOver = false, false, 0, false, false, false
}

// structural are the bytes that end or begin something.
var structural = [256]bool{'{': true, '}': true, '[': true, ']': true, ',': true, ':': true, '"': true}

// Write takes the next bytes. It never fails.
func (w *walker) Write(p []byte) (int, error) {
	from := 0 // of what is being kept
	base := w.at
	for i := 0; i < len(p) && !w.broken; {
		if w.inString {
			i = w.pass(p, i, base)
			continue
		}
		c := p[i]
		if !structural[c] {
			if w.depth == 0 {
				w.outside(c)
			}
			i++
			continue
		}
		if w.depth == 0 {
			if c != '{' || w.listOver || w.begun && w.ended == nil || w.mark%len(byteOrderMark) != 0 {
				w.outside(c)
				i++
				continue
			}
			if w.begun {
				w.restart()
			}
			w.begun = true
		}
		switch c {
		case '"':
			w.inString = true
			w.naming = w.wantName
			if w.naming {
				w.key, w.keyAt = w.key[:0], base+i
			}
		case ':':
			if w.slot > noSlot && w.slot < numSlots && w.capture == noSlot {
				w.begin()
				from = i + 1
			}
		case ',':
			from = w.endCapture(p, from, i, base)
			w.separate(base + i)
		case '{', '[':
			w.open(c, base+i)
		case '}', ']':
			from = w.endCapture(p, from, i, base)
			w.shut(c)
		}
		i++
	}
	w.at = base + len(p)
	if w.capture != noSlot {
		w.keep(p[from:])
	}
	return len(p), nil
}

// restart begins the next document.
func (w *walker) restart() {
	list := w.list
	w.reset()
	w.list = list
}

// recordSeparator stands before each document of application/json-seq.
const recordSeparator = 0x1e

// outside takes what stands outside of documents.
func (w *walker) outside(c byte) {
	switch {
	case c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == recordSeparator:
	case !w.begun && !w.list && w.mark < len(byteOrderMark) && c == byteOrderMark[w.mark]:
		w.mark++
	case c == '[' && !w.begun && !w.list:
		w.list = true
	case c == ',' && w.list && w.begun && !w.listOver:
	case c == ']' && w.list && !w.listOver:
		w.listOver = true
	default:
		w.broken = true
	}
}

// pass goes on from p[i], which is inside a string, and returns the index behind what
// it took.
func (w *walker) pass(p []byte, i, base int) int {
	from, quote := i, -1
	for i < len(p) {
		if w.escaped {
			w.escaped = false
			i++
			continue
		}
		quote = next(p, i, quote, '"')
		if e := bytes.IndexByte(p[i:quote], '\\'); e >= 0 {
			w.escaped = true
			i += e + 1
			continue
		}
		if i = quote; i == len(p) {
			break
		}
		w.inString = false
		w.took(p[from:i])
		if w.naming {
			w.named()
		}
		return i + 1
	}
	w.took(p[from:])
	return len(p)
}

// took takes a piece of a string.
func (w *walker) took(p []byte) {
	switch {
	case w.naming && len(w.key)+len(p) <= maxKey:
		if w.key == nil {
			w.key = make([]byte, 0, usualKey)
		}
		w.key = append(w.key, p...)
	case w.naming:
		w.key = append(w.key[:0], '!') // too long for what is wanted
	case !w.label && (w.capture == noSlot || w.capture == slotChoices):
		if w.media {
			w.coded += int64(len(p))
			return
		}
		w.text += int64(len(p))
	}
}

// named ends a member's name.
func (w *walker) named() {
	w.naming, w.wantName = false, false
	name := w.key
	if bytes.IndexByte(name, '\\') >= 0 {
		var s string
		if json.Unmarshal(append(append([]byte{'"'}, name...), '"'), &s) != nil {
			s = ""
		}
		name = []byte(s)
	}
	s := noSlot
	switch {
	case w.capture != noSlot && w.capture != slotChoices:
	case w.depth == 1:
		s = slotOf(name)
		w.parent = s
	case w.depth == 2:
		s = slotWithin(w.parent, name)
	case string(name) == "data":
		s = slotMedia // of inlineData, audio, source
	default:
		s = label(name)
	}
	w.label, w.media = s == slotLabel || s == slotID || s == slotModel, s == slotMedia
	w.slot = s
	if w.depth == 1 {
		if u := &w.members[slotUsage]; u.found && u.next == 0 && u.to > 0 {
			u.next = w.keyAt
		}
	}
}

// begin keeps the value that comes.
func (w *walker) begin() {
	m := &w.members[w.slot]
	if w.slot == slotUsage && m.found && !m.tooLong {
		var earlier counts.Counts
		if earlier.Parse(m.raw) {
			w.again.Add(&earlier)
		}
	}
	*m = member{raw: m.raw[:0], found: true, before: w.comma, from: w.keyAt, first: !w.some || w.depth != 1}
	w.capture, w.deep = w.slot, w.depth
}

func (w *walker) keep(p []byte) {
	m := &w.members[w.capture]
	if len(m.raw)+len(p) > w.capture.bound() {
		m.tooLong = true
	}
	if !m.tooLong {
		m.raw = append(m.raw, p...)
	}
}

// endCapture ends what is being kept at p[i] if it ends there.
func (w *walker) endCapture(p []byte, from, i, base int) int {
	if w.capture == noSlot || w.depth != w.deep {
		return from
	}
	w.keep(p[from:i])
	m := &w.members[w.capture]
	// What is too long has no place to be taken off from.
	m.to = base + i - (len(m.raw) - len(bytes.TrimRight(m.raw, " \t\r\n")))
	w.capture = noSlot
	return i
}

// separate takes the comma between members or items.
func (w *walker) separate(at int) {
	w.slot = noSlot
	if w.object() {
		w.wantName = true
		w.label, w.media = false, false
	}
	if w.depth == 1 {
		w.comma = at
		w.some = true
	}
}

func (w *walker) object() bool { return w.depth < 64 && w.objects&(1<<w.depth) != 0 }

func (w *walker) open(c byte, at int) {
	w.depth++
	if w.depth < 64 {
		w.objects &^= 1 << w.depth
		if c == '{' {
			w.objects |= 1 << w.depth
		}
	}
	if w.depth == 1 {
		w.comma = at
	}
	w.wantName = c == '{' && w.depth < 64
	w.slot = noSlot
}

func (w *walker) shut(c byte) {
	if w.depth < 64 && w.object() != (c == '}') {
		w.broken = true
		return
	}
	w.depth--
	w.wantName, w.slot, w.label, w.media = false, noSlot, false, false
	if w.depth == 0 && w.ended != nil {
		w.ended()
	}
}

// output is how many tokens of the model's the document has at most, and one at least.
func (w *walker) output() int64 {
	return max(w.text+w.coded/pictures.PerToken, 1)
}

// whole: the document is there to its end.
func (w *walker) whole() bool { return w.begun && w.depth == 0 && !w.broken }
