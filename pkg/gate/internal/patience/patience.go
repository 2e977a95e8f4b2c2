// Package patience bounds a wait that seldom takes place: its timer starts when somebody
// begins to wait, so that all others cost nothing.
package patience

import (
	"context"
	"sync"
	"time"
)

// Context has the values of another one, but neither its deadline nor its end. It is done
// when it was waited for as long as New says. It may be used by several goroutines at
// once.
type Context struct {
	values context.Context
	limit  time.Duration

	mu      sync.Mutex
	bounded context.Context // nil: nobody has waited
	cancel  context.CancelFunc
	stopped bool
}

// New returns a context with the values of parent. Stop frees what it needs.
func New(parent context.Context, limit time.Duration) *Context {
	return &Context{values: parent, limit: limit}
}

// Stop ends it.
func (c *Context) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	if c.cancel != nil {
		c.cancel()
	}
}

// wait returns the context that is waited for.
func (c *Context) wait() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bounded == nil {
		c.bounded, c.cancel = context.WithTimeout(context.WithoutCancel(c.values), c.limit)
		if c.stopped {
			c.cancel()
		}
	}
	return c.bounded
}

// Done implements context.Context; the first call starts the time.
func (c *Context) Done() <-chan struct{} { return c.wait().Done() }

// Err implements context.Context. It starts no time.
func (c *Context) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.bounded != nil:
		return c.bounded.Err()
	case c.stopped:
		return context.Canceled
	}
	return nil
}

// Deadline implements context.Context: there is none before somebody waits.
func (c *Context) Deadline() (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bounded == nil {
		return time.Time{}, false
	}
	return c.bounded.Deadline()
}

// Value implements context.Context.
func (c *Context) Value(key any) any { return c.values.Value(key) }
