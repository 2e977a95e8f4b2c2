package telemetry

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
)

// EnvName returns the environment variable that stands for a flag:
// TOLLKEEPER_API_LISTEN for api-listen.
func EnvName(flagName string) string {
	return "TOLLKEEPER_" + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

// ErrNotLoopback is wrapped by the error for an address that other machines can
// reach while no credentials are configured.
var ErrNotLoopback = errors.New("other machines could reach it and no credentials are configured")

// ListenError says what is wrong with a listen address and which flag changes it.
type ListenError struct {
	Flag string // without dashes, as in api-listen
	Addr string // as it was asked for
	Err  error
}

// Error is a sentence that tells what to do next.
func (e *ListenError) Error() string {
	knobs := fmt.Sprintf("--%s or %s", e.Flag, EnvName(e.Flag))
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		return fmt.Sprintf("listen %s: address in use: choose another with %s", e.Addr, knobs)
	case errors.Is(e.Err, syscall.EACCES):
		return fmt.Sprintf("listen %s: not permitted: choose a port above 1023 with %s", e.Addr, knobs)
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL):
		return fmt.Sprintf("listen %s: this machine has no such address: choose another with %s", e.Addr, knobs)
	case errors.Is(e.Err, ErrNotLoopback):
		return fmt.Sprintf("listen %s: %v: configure them, or choose a loopback address such as 127.0.0.1 with %s", e.Addr, e.Err, knobs)
	default:
		return fmt.Sprintf("listen %s: %v: choose another address with %s", e.Addr, e.Err, knobs)
	}
}

// Unwrap returns the cause.
func (e *ListenError) Unwrap() error { return e.Err }

// CheckAddr splits "host:port" and says whether only this machine can reach it.
// An empty host means all interfaces. A name counts as loopback when all its
// addresses are.
func CheckAddr(addr string) (host, port string, loopback bool, err error) {
	host, port, err = net.SplitHostPort(addr)
	if err != nil {
		return "", "", false, fmt.Errorf("not of the form host:port: %w", err)
	}
	loopback, err = IsLoopback(host)
	return host, port, loopback, err
}

// IsLoopback says whether only this machine can reach a listener on host.
func IsLoopback(host string) (bool, error) {
	if host == "" {
		return false, nil
	}
	if ip := net.ParseIP(host); ip != nil {
		return ip.IsLoopback(), nil
	}
	ips, err := net.LookupIP(host)
	if err != nil {
		return false, err
	}
	for _, ip := range ips {
		if !ip.IsLoopback() {
			return false, nil
		}
	}
	return len(ips) > 0, nil
}

// Listen opens a TCP listener on "host:port" (port 0: a free one). flagName is the
// flag, without dashes, that the address came from: every error is a *ListenError
// that names it. An address that other machines can reach is refused unless
// allowNonLoopback.
func Listen(flagName, addr string, allowNonLoopback bool) (net.Listener, error) {
	_, _, loopback, err := CheckAddr(addr)
	if err != nil {
		return nil, &ListenError{Flag: flagName, Addr: addr, Err: err}
	}
	if !loopback && !allowNonLoopback {
		return nil, &ListenError{Flag: flagName, Addr: addr, Err: ErrNotLoopback}
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, &ListenError{Flag: flagName, Addr: addr, Err: bare(err)}
	}
	// A name may have resolved differently this time.
	if tcp, ok := l.Addr().(*net.TCPAddr); !allowNonLoopback && (!ok || !tcp.IP.IsLoopback()) {
		return nil, errors.Join(&ListenError{Flag: flagName, Addr: addr, Err: ErrNotLoopback}, l.Close())
	}
	return l, nil
}

// bare drops net.OpError's own "listen tcp ADDR:", which ListenError says itself.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
