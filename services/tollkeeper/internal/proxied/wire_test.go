package proxied

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// Two answers in a row are told apart, however they are cut on their way.
func TestAnswersAreReadWholeAndNotBeyond(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"announced": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		"chunks":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\na\r\n0123456789\r\n0\r\n\r\n",
		"empty":     "HTTP/1.1 204 No Content\r\n\r\n",
	} {
		r := bufio.NewReaderSize(iotest.OneByteReader(strings.NewReader(text+"HTTP/1.1 404 Not Found\r\n\r\n")), maxHeader)
		head, err := header(r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		length, err := framed(head)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := skip(r, length); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if head, err = header(r); err != nil || !strings.HasPrefix(string(head), "HTTP/1.1 404 ") {
			t.Errorf("%s: then %q, %v", name, head, err)
		}
		if _, err = header(r); !errors.Is(err, io.EOF) {
			t.Errorf("%s: at the end %v", name, err)
		}
	}
}

func TestAnswersThatAreCutAreErrors(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
		"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"HTTP/1.1 200 OK\r\n",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxHeader),
	} {
		r := bufio.NewReaderSize(strings.NewReader(text), maxHeader)
		head, err := header(r)
		length := 0
		if err == nil {
			length, err = framed(head)
		}
		if err == nil {
			err = skip(r, length)
		}
		if err == nil {
			t.Errorf("%.60q is taken for whole", text)
		}
	}
}

func TestTimeUsedIsReadAlsoWhereAProgramsNameIsOdd(t *testing.T) {
	t.Parallel()
	parent, used, err := parseStat([]byte("17 (a) b (c)) S 4 17 4 0 -1 4194560 100 200 0 0 30 12 7 1 20 0 9 0 1 2 3"))
	if err != nil || parent != 4 || used != 500*time.Millisecond {
		t.Errorf("parent %d, %v, %v; want 4, 500ms", parent, used, err)
	}
	if _, _, err := parseStat([]byte("17 (a) S 4")); err == nil {
		t.Error("a line that is too short is no error")
	}
}
