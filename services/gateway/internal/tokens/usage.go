package tokens

import (
	"bytes"
	"encoding/json"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/counts"
)

// Reading is one meter's reading.
type Reading = counts.Reading

func isNull(raw []byte) bool { return bytes.Equal(bytes.TrimSpace(raw), []byte("null")) }

// report is what an answer has told so far of what it has used.
type report struct {
	all     counts.Counts
	begun   counts.Counts // at the answer's beginning: its output is not yet what it used
	bad     bool          // usage that is no object
	tooLong bool
	told    bool  // what the answer's end tells was told
	partial bool  // the newest report came beside content, so that others may follow
	passed  int64 // output since the newest report, in tokens at most
	id      string
	model   string
	ofModel bool
	later   bool // the answer is made in the background
}

// take takes a document over, and reports whether it tells of usage at its outermost.
func (t *report) take(w *walker) (outermost bool) {
	t.passed += w.output()
	choices := &w.members[slotChoices]
	t.ofModel = t.ofModel || choices.found
	beside := choices.found && !emptyList(choices) && !isNull(choices.raw)
	for _, s := range [...]slot{slotUsage, slotMetadata, slotInner, slotAside} {
		m := &w.members[s]
		if !m.found || m.to == 0 && !m.tooLong {
			continue
		}
		c, ok := t.read(m)
		if s == slotUsage && !w.again.None() {
			c.Add(&w.again)
			ok = true
		}
		if !ok {
			continue
		}
		t.all.Add(&c)
		outermost = outermost || s == slotUsage
		if s == slotAside && c.None() {
			continue // meta without counts
		}
		t.noted(&c)
		// Gemini tells all along; Groq and the responses only at the end.
		t.partial = s == slotUsage && beside || s == slotMetadata
	}
	if m := &w.members[slotBegin]; m.found && m.to > 0 {
		if c, ok := t.read(m); ok {
			t.begun.Add(&c)
			c.Forget(counts.Output, counts.Reasoning)
			t.all.Add(&c)
		}
	}
	for _, s := range [...]slot{slotCountIn, slotCountOut} {
		m := &w.members[s]
		if !m.found || m.to == 0 {
			continue
		}
		f := counts.Prompt
		if s == slotCountOut {
			f = counts.Output
		}
		var c counts.Counts
		c.Set(f, m.raw)
		t.all.Add(&c)
		t.noted(&c)
		t.partial = false
	}
	if m := &w.members[slotBackground]; m.found && string(bytes.TrimSpace(m.raw)) == "true" {
		t.later = true
		t.id, t.model = w.members[slotID].text(), w.members[slotModel].text()
	}
	return outermost
}

// noted: what passed until now is counted where output was told.
func (t *report) noted(c *counts.Counts) {
	_, output := c.Get(counts.Output)
	if _, billed := c.Get(counts.BilledOutput); output || billed {
		t.passed, t.told = 0, true
	}
}

func (t *report) read(m *member) (c counts.Counts, ok bool) {
	if m.tooLong {
		t.tooLong = true
		return c, false
	}
	if isNull(m.raw) {
		return c, false
	}
	if !c.Parse(m.raw) {
		t.bad = true
		return c, false
	}
	return c, true
}

// text is the string that a member is; empty: it is none.
func (m *member) text() (s string) {
	if !m.found || m.tooLong || json.Unmarshal(m.raw, &s) != nil {
		return ""
	}
	return s
}

func emptyList(m *member) bool {
	raw := bytes.TrimSpace(m.raw)
	return !m.tooLong && len(raw) >= 2 && raw[0] == '[' && len(bytes.TrimSpace(raw[1:len(raw)-1])) == 0
}

// result of the report, as it is now.
func (t *report) result() Result {
	all := t.all
	if out, ok := t.begun.Get(counts.Output); ok {
		// It counts for no reading by itself, but does not become less either.
		if have, told := all.Get(counts.Output); told && have < out {
			all.Raise(counts.Output, out)
		} else if !told {
			t.passed = max(t.passed, out)
		}
	}
	readings, malformed := all.Readings()
	r := Result{Readings: readings, Passed: t.passed, ID: t.id, Model: t.model, Background: t.later, OfModel: t.ofModel}
	switch {
	case t.tooLong:
		r.Outcome = TooLarge
	case t.bad || malformed:
		r.Outcome = Malformed
	case len(readings) > 0:
		r.Outcome = Measured
	default:
		r.Outcome = None
	}
	return r
}
