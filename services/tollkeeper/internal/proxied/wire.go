package proxied

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// maxHeader bounds the header of a message, bytes.
const maxHeader = 16 << 10

// chunked is what framed returns for a body in chunks.
const chunked = -1

// header returns the header of the next message without its last empty line. The
// bytes are valid until the next read.
func header(r *bufio.Reader) ([]byte, error) {
	for have := 1; ; {
		p, err := r.Peek(have)
		if err != nil {
			if len(p) > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		p, _ = r.Peek(r.Buffered()) // it has as many
		if end := bytes.Index(p, []byte("\r\n\r\n")); end >= 0 {
			if _, err := r.Discard(end + 4); err != nil {
				return nil, err
			}
			return p[:end+2], nil
		}
		if len(p) >= maxHeader {
			return nil, errors.New("the header of a message is too long")
		}
		have = len(p) + 1
	}
}

var (
	lengthField   = []byte("\r\nContent-Length: ")
	encodingField = []byte("\r\nTransfer-Encoding: chunked")
)

// framed returns how long the body behind a header is. It knows the headers as Go
// and nginx write them, which is all that the bench has to read.
func framed(head []byte) (int, error) {
	at := bytes.Index(head, lengthField)
	if at < 0 {
		if bytes.Contains(head, encodingField) {
			return chunked, nil
		}
		return 0, nil
	}
	value, _, _ := bytes.Cut(head[at+len(lengthField):], []byte("\r"))
	n, err := strconv.Atoi(string(value))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("the length of a body is %q", value)
	}
	return n, nil
}

// skip reads a body.
func skip(r *bufio.Reader, length int) error {
	if length != chunked {
		_, err := r.Discard(length)
		return err
	}
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(string(bytes.TrimRight(line, "\r\n")), 16, 32)
		if err != nil {
			return fmt.Errorf("the length of a chunk is %q", line)
		}
		if _, err := r.Discard(int(n) + 2); n == 0 || err != nil {
			return err
		}
	}
}
