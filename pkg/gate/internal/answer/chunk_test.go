package answer

import (
	"net/http"
	"testing"
)

// connected is the answer of a client that takes everything.
type connected struct {
	header http.Header
	bytes  int
	flushs int
}

func (c *connected) Header() http.Header { return c.header }

func (c *connected) Write(p []byte) (int, error) {
	c.bytes += len(p)
	return len(p), nil
}

func (c *connected) WriteHeader(int) {}

func (c *connected) FlushError() error {
	c.flushs++
	return nil
}

func TestAChunkOfAStreamCostsNoAllocation(t *testing.T) {
	c := &connected{header: http.Header{"Content-Type": {"text/event-stream"}}}
	a := New(c, "X-Request-Id", "id", false)
	flush := http.NewResponseController(a).Flush // as a reverse proxy does it
	chunk := []byte("data: {}\n\n")
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := a.Write(chunk); err != nil {
			t.Fatal(err)
		}
		if err := flush(); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a chunk", n)
	}
	if c.flushs == 0 || c.bytes != c.flushs*len(chunk) {
		t.Errorf("%d bytes in %d flushes", c.bytes, c.flushs)
	}
}
