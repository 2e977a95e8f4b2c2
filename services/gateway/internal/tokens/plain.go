package tokens

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"strings"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
)

// Decodes reports whether Plain takes a body out of this Content-Encoding.
func Decodes(encoding string) bool {
	switch normal(encoding) {
	case "gzip", "br", "zstd":
		return true
	}
	return false
}

// IsPlain reports whether a Content-Encoding leaves a body as it is.
func IsPlain(encoding string) bool { return normal(encoding) == "" }

func normal(encoding string) string {
	switch e := strings.ToLower(strings.TrimSpace(encoding)); e {
	case "identity":
		return ""
	case "x-gzip":
		return "gzip"
	default:
		return e
	}
}

// Plain takes a body out of its Content-Encoding while it is read: of an upstream that
// encodes although it was asked not to. What the body holds of one event leaves as soon
// as the upstream has flushed it. Reading fails where the body is not what it is said
// to be, or breaks off.
func Plain(body io.ReadCloser, encoding string) io.ReadCloser {
	return &plain{body: body, encoding: normal(encoding)}
}

// maxWindow bounds the memory of zstd's window, in bytes: RFC 8878's bound for what
// every reader has to take.
const maxWindow = 8 << 20

type plain struct {
	body     io.ReadCloser
	encoding string
	reader   io.Reader
	close    func()
	err      error
}

// Read implements io.Reader.
func (d *plain) Read(p []byte) (int, error) {
	if d.reader == nil {
		if d.open(); d.err != nil {
			return 0, d.err
		}
	}
	return d.reader.Read(p)
}

// open waits for the first bytes of the body.
func (d *plain) open() {
	if d.err != nil {
		return
	}
	buffered := bufio.NewReader(d.body)
	switch d.encoding {
	case "gzip":
		if magic, _ := buffered.Peek(2); !bytes.Equal(magic, []byte("\x1f\x8b")) {
			d.reader = buffered // it was never encoded, or has no body
			return
		}
		d.reader, d.err = gzip.NewReader(buffered)
	case "br":
		d.reader = brotli.NewReader(buffered)
	case "zstd":
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if d.err = err; err == nil {
			d.reader, d.close = z, z.Close
		}
	}
}

// Close implements io.Closer.
func (d *plain) Close() error {
	if d.close != nil {
		d.close()
	}
	return d.body.Close()
}
