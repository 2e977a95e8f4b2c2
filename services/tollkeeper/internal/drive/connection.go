package drive

import (
	"bufio"
	"fmt"
	"net"
	"time"

	"github.com/valyala/fasthttp"
)

// connection is one to the gateway, for one call at a time. A call that may have been
// counted is never sent again.
type connection struct {
	host string
	conn net.Conn
	in   *bufio.Reader
	out  *bufio.Writer
	last time.Time
}

const (
	// idleAtMost is shorter than any server's patience with an idle connection.
	idleAtMost = 5 * time.Second
	mostAnswer = 1 << 20
)

func (c *connection) call(req *fasthttp.Request, resp *fasthttp.Response) error {
	now := time.Now()
	if c.conn != nil && now.Sub(c.last) > idleAtMost {
		c.close()
	}
	if c.conn == nil {
		conn, err := net.DialTimeout("tcp", c.host, 10*time.Second)
		if err != nil {
			return err
		}
		c.conn, c.in, c.out = conn, bufio.NewReaderSize(conn, 8<<10), bufio.NewWriterSize(conn, 8<<10)
	}
	c.last = now
	err := c.conn.SetDeadline(now.Add(callTimeout))
	if err == nil {
		err = req.Write(c.out)
	}
	if err == nil {
		err = c.out.Flush()
	}
	if err == nil {
		resp.SkipBody = req.Header.IsHead()
		if err = resp.ReadLimitBody(c.in, mostAnswer); err != nil {
			err = fmt.Errorf("read answer: %w", err)
		}
	}
	if err != nil || resp.ConnectionClose() {
		c.close()
	}
	return err
}

func (c *connection) close() {
	if c.conn != nil {
		_ = c.conn.Close() // every answer on it was read, or is given up
		c.conn = nil
	}
}
