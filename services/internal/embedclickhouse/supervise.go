package embedclickhouse

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"time"
)

const (
	backoffFirst = 100 * time.Millisecond
	backoffMost  = 10 * time.Second
	// healthyAfter is how long a run must last for the next restart to be quick again.
	healthyAfter = 30 * time.Second
)

// restartDelay doubles with each failure in a row, up to ten seconds: the rate of restarts is
// bounded, their number is not, since only a person can decide to give history up.
func restartDelay(failures int) time.Duration {
	delay := backoffFirst
	for range failures {
		if delay *= 2; delay >= backoffMost {
			return backoffMost
		}
	}
	return delay
}

// failuresAfter counts failures in a row: a run that lasted starts the count anew.
func failuresAfter(failures int, lasted time.Duration) int {
	if lasted >= healthyAfter {
		return 0
	}
	return failures + 1
}

func (s *Server) supervise(c *child) {
	defer close(s.done)
	failures := 0
	for {
		reason, stopping := s.watch(c)
		lasted := time.Since(c.started)
		_ = c.control.Close()
		if stopping {
			s.finish(nil)
			return
		}
		for {
			delay := restartDelay(failures)
			failures = failuresAfter(failures, lasted)
			lasted = 0
			s.setDown(reason, delay)
			if !s.pause(delay) {
				s.finish(nil)
				return
			}
			next, err := s.restart()
			if errors.Is(err, errStopping) {
				s.finish(nil)
				return
			}
			if err == nil {
				c = next
				break
			}
			reason = err
		}
		s.mu.Lock()
		s.restarts++
		s.mu.Unlock()
		s.setReady(c)
	}
}

var errStopping = errors.New("stopping")

// restart gives up as soon as Stop is called.
func (s *Server) restart() (*child, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	over := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-s.stop:
			cancel(errStopping)
		case <-over:
		}
	}()
	defer func() { close(over); <-watched }()
	s.transition(StateChange{State: StateStarting})
	c, err := s.startChild(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errStopping) {
		return nil, errStopping
	}
	return c, err
}

func (s *Server) pause(delay time.Duration) bool {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.stop:
		return false
	}
}

// watch returns when the child is gone: by itself, by our doing when it no longer owns its
// addresses, or because Stop asked.
func (s *Server) watch(c *child) (reason error, stopping bool) {
	tick := time.NewTicker(livePoll)
	defer tick.Stop()
	missed := 0
	for {
		select {
		case <-s.stop:
			s.end(c)
			return nil, true
		case <-c.exited:
			return fmt.Errorf("the ClickHouse engine ended by itself: %w", exitError(c)), false
		case <-tick.C:
		}
		s.boundOut()
		owned, err := ownsListeners(c.cmd.Process.Pid, s.tcp, s.http)
		if owned || err != nil {
			missed = 0
			continue
		}
		// Twice in a row: one look can fall between two reads of a changing table.
		if missed++; missed < 2 {
			continue
		}
		_ = c.cmd.Process.Kill()
		<-c.exited
		return errors.New("the ClickHouse engine no longer listened on its addresses and was killed"), false
	}
}

// end closes the control pipe, on which the child ends itself, and kills when told so.
func (s *Server) end(c *child) {
	_ = c.control.Close()
	select {
	case <-c.exited:
	case <-s.kill:
		_ = c.cmd.Process.Kill()
		<-c.exited
		s.setFinal(ErrKilled)
		return
	}
	if c.waitErr != nil {
		s.setFinal(fmt.Errorf("the ClickHouse engine ended uncleanly: %w", c.waitErr))
	}
}

// boundOut keeps the engine's printed output from growing for ever; it is opened for appending, so
// cutting it is safe.
func (s *Server) boundOut() {
	if info, err := os.Stat(s.outPath()); err == nil && info.Size() > maxOutBytes {
		if err := os.Truncate(s.outPath(), 0); err != nil {
			s.options.Logger.Warn().Err(err).Msg("cannot cut the ClickHouse engine's output file")
		}
	}
}

func (s *Server) setReady(c *child) {
	s.options.Logger.Info().Int("pid", c.cmd.Process.Pid).Stringer("tcp", s.tcp).Stringer("http", s.http).
		Dur("took_ms", time.Since(c.started)).Msg("ClickHouse is ready")
	s.transition(StateChange{State: StateReady, PID: c.cmd.Process.Pid})
}

func (s *Server) setDown(reason error, delay time.Duration) {
	s.options.Logger.Error().Err(reason).Dur("retry_in_ms", delay).Msg("ClickHouse is down")
	s.transition(StateChange{State: StateDown, Err: reason, RetryIn: delay})
}

func (s *Server) finish(err error) {
	if err != nil {
		s.setFinal(err)
	}
	if err := s.lock.Close(); err != nil {
		s.options.Logger.Warn().Err(err).Msg("cannot close the lock of the ClickHouse data directory")
	}
	s.transition(StateChange{State: StateStopped, Err: s.Err()})
}

func (s *Server) setFinal(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.final = errors.Join(s.final, err)
}

func (s *Server) transition(change StateChange) {
	s.mu.Lock()
	s.state, s.pid = change.State, change.PID
	change.Restarts = s.restarts
	s.mu.Unlock()
	s.options.OnStateChange(change)
}

// Stop ends the engine: clients' connections are shut, then it ends cleanly, in well under two
// seconds. When ctx ends first the engine is killed and ErrKilled returned. Later calls wait for the
// first and return the same.
func (s *Server) Stop(ctx context.Context) error {
	s.stopOnce.Do(func() { close(s.stop) })
	select {
	case <-s.done:
	case <-ctx.Done():
		s.killOnce.Do(func() { close(s.kill) })
		<-s.done
	}
	return s.Err()
}

// Done is closed when the engine has ended after Stop and its directory is free again.
func (s *Server) Done() <-chan struct{} { return s.done }

// Err is nil until Done is closed, and then what Stop returns.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.final
}

// State is where the engine stands now.
func (s *Server) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Restarts counts how often the engine was brought back after it had died by itself.
func (s *Server) Restarts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.restarts
}

// PID of the engine's process, 0 while there is none that is ready.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid
}

// Addr is host:port of the native protocol.
func (s *Server) Addr() string { return s.tcp.String() }

// HTTPAddr is host:port of the HTTP protocol.
func (s *Server) HTTPAddr() string { return s.http.String() }

// Credentials in use, given or generated.
func (s *Server) Credentials() Credentials { return s.credentials }

// DSN for ServiceUser over the native protocol. It holds the password: do not log it.
func (s *Server) DSN() string {
	return dsn("clickhouse", dialable(s.tcp), ServiceUser, s.credentials.ServicePassword)
}

// HTTPDSN for ServiceUser over HTTP. It holds the password: do not log it.
func (s *Server) HTTPDSN() string {
	return dsn("http", dialable(s.http), ServiceUser, s.credentials.ServicePassword)
}

// AnalystDSN for AnalystUser over the native protocol. It holds the password: do not log it.
func (s *Server) AnalystDSN() string {
	return dsn("clickhouse", dialable(s.tcp), AnalystUser, s.credentials.AnalystPassword)
}

// dialable replaces "every address of this machine" by one that can be connected to.
func dialable(addr netip.AddrPort) string {
	switch addr.Addr() {
	case netip.IPv4Unspecified():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addr.Port()).String()
	case netip.IPv6Unspecified():
		return netip.AddrPortFrom(netip.IPv6Loopback(), addr.Port()).String()
	}
	return addr.String()
}

func dsn(scheme, addr, user, password string) string {
	u := url.URL{Scheme: scheme, User: url.UserPassword(user, password), Host: addr, Path: "/" + Database}
	return u.String()
}
