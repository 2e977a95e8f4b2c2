// Package answer sees what an HTTP handler answers, and can hold the last byte back.
package answer

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"strconv"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Writer sees what is answered, and holds the last byte of an answer of announced
// length back until the call is recorded.
type Writer struct {
	http.ResponseWriter
	header   string // that carries id
	id       string
	status   int
	bytes    int64
	length   int64 // announced; -1: not known
	bodyless bool
	hijacked bool
	held     [1]byte
	holds    bool
	failed   bool // the client could not be written to
}

// New returns a Writer on w that sees to it that the answer carries the id of its
// request in a header. A bodyless answer has no body, whatever is written.
func New(w http.ResponseWriter, header, id string, bodyless bool) *Writer {
	return &Writer{ResponseWriter: w, header: header, id: id, length: -1, bodyless: bodyless}
}

// Unwrap is for http.ResponseController.
func (a *Writer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (a *Writer) WriteHeader(status int) {
	if status >= 100 && status < 200 && status != http.StatusSwitchingProtocols {
		a.ResponseWriter.WriteHeader(status)
		return
	}
	if a.status == 0 {
		a.status = status
		if h := a.Header(); h.Get(a.header) == "" {
			// httputil.ReverseProxy clears the header after a 1xx.
			h.Set(a.header, a.id)
		}
		if n, err := strconv.ParseInt(a.Header().Get("Content-Length"), 10, 64); err == nil && n >= 0 {
			a.length = n
		}
	}
	a.ResponseWriter.WriteHeader(status)
}

// Write implements io.Writer.
func (a *Writer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	left := a.length - a.bytes
	if a.bodyless || a.length < 0 || int64(len(p)) < left || len(p) == 0 {
		n, err := a.ResponseWriter.Write(p)
		if !a.bodyless {
			a.bytes += int64(n)
			a.failed = a.failed || err != nil && !errors.Is(err, http.ErrBodyNotAllowed) && !errors.Is(err, http.ErrContentLength)
		}
		return n, err
	}
	if left == 0 {
		return 0, http.ErrContentLength // the byte that is held is the last one
	}
	n, err := a.ResponseWriter.Write(p[:left-1])
	a.bytes += int64(n)
	if err != nil {
		a.failed = true
		return n, err
	}
	a.held[0], a.holds = p[left-1], true
	a.bytes++
	if int64(len(p)) > left {
		return int(left), http.ErrContentLength
	}
	return len(p), nil
}

// Release sends the byte that was held back. Its error is the client's having
// gone.
func (a *Writer) Release() {
	if a.holds {
		a.holds = false
		_, _ = a.ResponseWriter.Write(a.held[:])
	}
}

// Flush implements http.Flusher.
func (a *Writer) Flush() {
	// Who wants to know uses http.ResponseController.
	_ = a.FlushError()
}

// FlushError is what http.ResponseController looks for.
func (a *Writer) FlushError() error {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	if a.bodyless || a.length == 0 || a.status == http.StatusNoContent || a.status == http.StatusNotModified {
		return nil // the header is the whole answer, and leaves when the handler has returned
	}
	err := http.NewResponseController(a.ResponseWriter).Flush()
	a.failed = a.failed || err != nil && !errors.Is(err, http.ErrNotSupported)
	return err
}

// Hijack implements http.Hijacker.
func (a *Writer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err == nil {
		a.hijacked = true
	}
	return conn, rw, err
}

// Bytes is how many bytes of a body were answered, the one that is held included;
// false: the connection was handed over, so nobody has seen what went over it.
func (a *Writer) Bytes() (int64, bool) { return a.bytes, !a.hijacked }

// End is how the call ended whose handler has returned, or panicked as
// httputil.ReverseProxy does when an answer breaks off. left: the request's context is
// done.
func (a *Writer) End(returned, left bool) usage.Ending {
	switch {
	case a.failed, !returned && left, a.status == clientGone:
		return usage.ClientLeft
	case !returned && !a.hijacked, !a.bodyless && !a.hijacked && a.length > a.bytes && a.status != http.StatusNotModified && a.status != http.StatusNoContent:
		return usage.UpstreamFailed
	}
	return usage.Finished
}

// clientGone is gate.StatusClientGone.
const clientGone = 499

// Status that was answered, when the handler has returned or panicked.
func (a *Writer) Status(returned bool) int {
	switch {
	case a.status != 0:
		return a.status
	case a.hijacked:
		return http.StatusSwitchingProtocols
	case returned:
		return http.StatusOK
	}
	return http.StatusInternalServerError
}
