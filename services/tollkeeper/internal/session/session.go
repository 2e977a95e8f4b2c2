// Package session connects the commands that a person waits for. A service waits for
// NATS as long as it takes; a command says within seconds what is wrong, also when NATS
// goes away while it is at work.
package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// DefaultWait is how long a command waits for NATS.
const DefaultWait = 5 * time.Second

// Options of a session.
type Options struct {
	NATS natsconn.Options
	// Wait is how long NATS may not answer, at the start and later, and how long its
	// ledger may be missing at the start; DefaultWait when 0. A single request may take
	// as long.
	Wait time.Duration
}

// Session is a connection to a NATS that has a ledger.
type Session struct {
	NC       *nats.Conn
	JS       jetstream.JetStream
	Geometry ledger.Geometry

	target string
	wait   time.Duration
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}
}

// Open connects, or says within o.Wait why it can't. The session's Context ends with
// ctx, or when NATS does not answer any more. Close it.
func Open(ctx context.Context, o Options) (*Session, error) {
	if o.Wait <= 0 {
		o.Wait = DefaultWait
	}
	s := &Session{target: natsconn.Redact(o.NATS.URL), wait: o.Wait, done: make(chan struct{})}
	begin, cancel := context.WithTimeout(ctx, o.Wait)
	defer cancel()
	var err error
	if s.NC, err = natsconn.Connect(begin, o.NATS); err != nil {
		return nil, s.unreachable(ctx, err)
	}
	if s.JS, err = jetstream.New(s.NC, jetstream.WithDefaultTimeout(o.Wait)); err == nil {
		err = s.await(begin)
	}
	if err != nil {
		s.NC.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	go s.watch()
	return s, nil
}

// Context ends when the session is closed or NATS is lost.
func (s *Session) Context() context.Context { return s.ctx }

// Close ends the session.
func (s *Session) Close() {
	s.cancel(nil)
	<-s.done
	s.NC.Close()
}

// Lost returns err, or that NATS was lost where that is why something failed.
func (s *Session) Lost(err error) error {
	var lost *LostError
	if err != nil && errors.As(context.Cause(s.ctx), &lost) {
		return lost
	}
	return err
}

// Err is Lost, and says of a request that NATS did not answer in time how long that was.
func (s *Session) Err(err error) error {
	err = s.Lost(err)
	if s.ctx.Err() == nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout)) {
		return fmt.Errorf("NATS at %s did not answer a request within %s: try again, or wait longer with --nats-wait: %w", s.target, s.wait, err)
	}
	return err
}

// LostError says that NATS went away while a command was at work.
type LostError struct {
	Target string
	For    time.Duration
}

// Error says what happened.
func (e *LostError) Error() string {
	return fmt.Sprintf("NATS at %s went away: it has not answered for %s (--nats-wait)", e.Target, e.For)
}

func (s *Session) unreachable(ctx context.Context, err error) error {
	var refused *natsconn.Error
	var timeout *natsconn.TimeoutError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &refused) && errors.Is(err, nats.ErrAuthorization):
		return fmt.Errorf("%w: check the --nats- flags for credentials and their TOLLKEEPER_NATS_ variables", err)
	case errors.As(err, &timeout):
		why := timeout.Last
		if why == "" {
			why = "it accepts connections and says nothing"
		}
		return fmt.Errorf("NATS at %s can't be reached within %s (%s): start it, name another with --nats-url, or wait longer with --nats-wait", s.target, s.wait, why)
	}
	return err
}

// retryEvery is how often a ledger that is missing is looked for.
const retryEvery = 50 * time.Millisecond

// await looks until the ledger is there: a Tollkeeper that has just been started makes it
// after NATS accepts connections. When ctx ends, its error tells the piece that is missing.
func (s *Session) await(ctx context.Context) error {
	tick := time.NewTicker(retryEvery)
	defer tick.Stop()
	var missing *missingError
	for {
		err := s.look(ctx)
		if now := (*missingError)(nil); errors.As(err, &now) {
			missing = now
		} else if missing == nil || ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return missing
		case <-tick.C:
		}
	}
}

// missingError says which piece of a ledger is not there (yet).
type missingError struct {
	text string
	err  error
}

// Error says what to do.
func (e *missingError) Error() string { return e.text }

// Unwrap returns JetStream's answer.
func (e *missingError) Unwrap() error { return e.err }

// look checks that what a command needs is there.
func (s *Session) look(ctx context.Context) error {
	_, err := s.JS.AccountInfo(ctx)
	switch {
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount), errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("NATS at %s has no JetStream for this user, so there is no ledger: name another with --nats-url, or start it with JetStream", s.target)
	case err != nil:
		return s.silent("JetStream", err)
	}
	if s.Geometry, err = ledger.ReadGeometry(ctx, s.JS); errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, jetstream.ErrKeyNotFound) {
		return &missingError{fmt.Sprintf("NATS at %s has no ledger (%v), also not after %s: start Tollkeeper there (tollkeeper up), name another NATS with --nats-url, or wait longer with --nats-wait", s.target, err, s.wait), err}
	}
	if err != nil {
		return s.silent("the bucket "+ledger.ConfigBucket, err)
	}
	if _, err = s.JS.Stream(ctx, ledger.Stream); errors.Is(err, jetstream.ErrStreamNotFound) {
		return &missingError{fmt.Sprintf("NATS at %s has no stream %s, also not after %s: start Tollkeeper there, which makes it, name another NATS with --nats-url, or wait longer with --nats-wait", s.target, ledger.Stream, s.wait), err}
	}
	if err != nil {
		return s.silent("the stream "+ledger.Stream, err)
	}
	return nil
}

func (s *Session) silent(what string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) {
		return fmt.Errorf("NATS at %s is there, but %s did not answer within %s: it has no leader just now, or this user may not ask it; try again, or wait longer with --nats-wait", s.target, what, s.wait)
	}
	return fmt.Errorf("NATS at %s: %w", s.target, err)
}

// watch asks NATS whether it is there, until it is not.
func (s *Session) watch() {
	defer close(s.done)
	every := min(time.Second, s.wait/4)
	heard := time.Now()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if s.NC.IsConnected() && s.NC.FlushTimeout(every) == nil {
			heard = time.Now()
			continue
		}
		if time.Since(heard) >= s.wait {
			s.cancel(&LostError{Target: s.target, For: s.wait})
			return
		}
	}
}
