// Package inmemory is for request bodies that were read before they are sent on.
package inmemory

import (
	"bytes"
	"io"
	"net/http"
)

// Body is the whole of a request's body. It closes as the one it was.
type Body struct {
	*bytes.Reader
	io.Closer
}

// New returns the body with these bytes, which stay as they are, of a request that had
// the body was.
func New(data []byte, was io.Closer) Body { return Body{bytes.NewReader(data), was} }

// Send gives out, which is sent on for in, the body of in as it is in memory, so that a
// transport can see that: header and body leave in one piece then, and no goroutine
// copies what the end of the request may take away. A body that is not all in memory, or
// has trailers or another length, stays as it is.
func Send(out, in *http.Request) {
	body, ok := in.Body.(Body)
	if !ok || out.ContentLength != int64(body.Len()) || body.Len() == 0 || len(out.TransferEncoding) > 0 || len(out.Trailer) > 0 {
		return
	}
	out.Body = Body{body.Reader, io.NopCloser(nil)} // which the request's end closes, not the transport
}

// Bytes are those of the whole body, however far it was read. They must not be changed.
func (b Body) Bytes() []byte {
	r := *b.Reader
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return nil // not with this offset
	}
	var all view
	_, _ = r.WriteTo(&all) // never fails
	return all
}

// view is what was written to it last, without a copy: a bytes.Reader writes all at once.
type view []byte

// Write implements io.Writer.
func (v *view) Write(p []byte) (int, error) {
	*v = p
	return len(p), nil
}
