package tokens

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"mime"
	"strings"
)

// Bounds of what is looked at. An answer itself may be of any size.
const (
	// MaxUsageObject bounds the usage object.
	MaxUsageObject = 64 << 10
	// MaxCompressed bounds the bytes that are kept of an answer that comes
	// compressed although it was asked for plain.
	MaxCompressed = 1 << 20
	// MaxDecompressed bounds what they may become.
	MaxDecompressed = 64 << 20
)

// Outcome of looking for usage.
type Outcome string

// The outcomes.
const (
	Measured  Outcome = "measured"
	None      Outcome = "none"      // a whole JSON object without usage
	Malformed Outcome = "malformed" // usage that is not counts, in whole or in part
	TooLarge  Outcome = "too_large" // past one of the bounds
	Broken    Outcome = "broken"    // the answer is not, or not to its end, a JSON object
	Encoded   Outcome = "encoded"   // in an encoding that is not read
	Partial   Outcome = "partial"   // a stream broke off that told all along what it had used so far
)

// Outcomes lists them all.
func Outcomes() []Outcome {
	return []Outcome{Measured, None, Malformed, TooLarge, Broken, Encoded, Partial}
}

// IsJSON reports whether a content type is JSON's.
func IsJSON(contentType string) bool {
	t, _, err := mime.ParseMediaType(contentType)
	return err == nil && (t == "application/json" || strings.HasSuffix(t, "+json"))
}

// Tap passes a body on and looks for the usage object in what passes by. A plain
// body is scanned as it goes, with constant memory; a gzipped one is kept up to
// MaxCompressed and read at the end; other encodings are not read.
type Tap struct {
	body     io.ReadCloser
	scanner  *Scanner
	zipped   *bytes.Buffer
	tooLarge bool
	encoded  bool
	maxPlain int64 // MaxDecompressed, less in tests
	done     func([]Reading, Outcome)
}

// NewTap wraps a body with this Content-Encoding. done is called once, when the
// body has ended; a body that breaks off has no usage and done hears Broken at
// Close.
func NewTap(body io.ReadCloser, encoding string, done func([]Reading, Outcome)) *Tap {
	t := &Tap{body: body, scanner: NewScanner("usage", MaxUsageObject), maxPlain: MaxDecompressed, done: done}
	switch strings.ToLower(strings.TrimSpace(encoding)) {
	case "", "identity":
	case "gzip", "x-gzip":
		t.zipped = &bytes.Buffer{}
	default:
		t.encoded = true
	}
	return t
}

// Read implements io.Reader.
func (t *Tap) Read(p []byte) (int, error) {
	n, err := t.body.Read(p)
	switch {
	case t.encoded || t.tooLarge:
	case t.zipped == nil:
		_, _ = t.scanner.Write(p[:n]) // never fails
	case t.zipped.Len()+n > MaxCompressed:
		t.tooLarge, t.zipped = true, nil
	default:
		t.zipped.Write(p[:n])
	}
	if errors.Is(err, io.EOF) {
		t.finish()
	}
	return n, err
}

// Close implements io.Closer.
func (t *Tap) Close() error {
	t.end(nil, Broken)
	return t.body.Close()
}

func (t *Tap) finish() {
	switch {
	case t.encoded:
		t.end(nil, Encoded)
		return
	case t.tooLarge:
		t.end(nil, TooLarge)
		return
	case t.zipped != nil:
		if outcome := t.unzip(); outcome != Measured {
			t.end(nil, outcome)
			return
		}
	}
	value, ok := t.scanner.Value()
	switch {
	case !t.scanner.Object():
		t.end(nil, Broken)
	case ok:
		readings, malformed := Read(value)
		switch {
		case malformed:
			t.end(readings, Malformed)
		case len(readings) == 0:
			t.end(nil, None)
		default:
			t.end(readings, Measured)
		}
	case t.scanner.Absent():
		t.end(nil, None)
	case t.scanner.Ended():
		t.end(nil, TooLarge)
	default:
		t.end(nil, Broken)
	}
}

func (t *Tap) unzip() Outcome {
	z, err := gzip.NewReader(t.zipped)
	if err != nil {
		return Broken
	}
	n, err := io.Copy(t.scanner, io.LimitReader(z, t.maxPlain+1))
	switch {
	case err != nil:
		return Broken
	case n > t.maxPlain:
		return TooLarge
	}
	return Measured
}

func (t *Tap) end(r []Reading, o Outcome) {
	if t.done != nil {
		done := t.done
		t.done = nil
		done(r, o)
	}
}
