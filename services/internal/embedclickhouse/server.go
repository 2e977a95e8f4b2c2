// Package embedclickhouse installs and supervises a real ClickHouse as a child process. What it
// gives others is an address and credentials, so a service works with it exactly as with a
// ClickHouse server elsewhere.
package embedclickhouse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

// Reasons Start refuses or fails; compare with errors.Is.
var (
	ErrAddressInUse        = errors.New("address in use")
	ErrDataDirInUse        = errors.New("data directory in use")
	ErrCredentialsRequired = errors.New("credentials required")
	ErrNotReady            = errors.New("the engine did not become ready")
	// ErrKilled is returned by Stop when the engine had to be killed. Acknowledged rows are safe.
	ErrKilled = errors.New("the engine did not end in time and was killed")
)

const (
	defaultHost         = "127.0.0.1"
	defaultStartTimeout = 30 * time.Second
	defaultLogLevel     = "warning"

	readyPoll     = 10 * time.Millisecond
	livePoll      = 2 * time.Second
	lockWait      = 10 * time.Second // a large engine on a busy machine takes some seconds to be gone
	freePortTries = 5
	maxOutBytes   = 4 << 20
	lockName      = "lock"
)

// State is where the supervised engine stands.
type State string

// The states. A server that Start returned is ready; down means it waits to be restarted.
const (
	StateStarting State = "starting"
	StateReady    State = "ready"
	StateDown     State = "down"
	StateStopped  State = "stopped"
)

// StateChange tells what happened. Err says why the engine is down; RetryIn when it starts again.
type StateChange struct {
	State    State
	PID      int
	Restarts int
	Err      error
	RetryIn  time.Duration
}

// Options of Start. DataDir and EnginePath are required.
type Options struct {
	// DataDir holds data, configuration, passwords and logs of one engine; it is made 0700.
	DataDir string
	// EnginePath is what Install returned.
	EnginePath string
	// Host is an IP address or "localhost"; empty means 127.0.0.1. Any other than loopback needs
	// both passwords in Credentials.
	Host string
	// TCPPort and HTTPPort; 0 takes a free port and keeps it over restarts.
	TCPPort  int
	HTTPPort int
	// Credentials that are empty are generated and kept in DataDir.
	Credentials Credentials
	// MaxMemoryBytes bounds the engine; 0 means half of the machine's memory.
	MaxMemoryBytes uint64
	// NoSync leaves fsync out of inserts: faster, and what a power loss then takes is what the
	// kernel had not written yet. A killed process loses nothing either way.
	NoSync bool
	// LogLevel of the engine's own log, DataDir/engine.log: fatal, critical, error, warning, notice,
	// information, debug, trace, none; empty means warning.
	LogLevel string
	// StartTimeout bounds one start until ready; 0 means 30 s.
	StartTimeout time.Duration
	// OnStateChange is called from one goroutine at a time and must not block or call Stop.
	OnStateChange func(StateChange)
	Logger        zerolog.Logger
}

// Server is a supervised engine. Its methods may be used from many goroutines.
type Server struct {
	options     Options
	credentials Credentials
	tcp, http   netip.AddrPort
	lock        *os.File
	client      *http.Client

	stop     chan struct{}
	stopOnce sync.Once
	kill     chan struct{}
	killOnce sync.Once
	done     chan struct{}

	mu       sync.Mutex
	state    State
	pid      int
	restarts int
	final    error
}

// Start runs the engine and returns when it answers queries on both addresses. ctx bounds the start
// alone; Stop ends the engine, and so does the end of this process, however it dies. The program's
// main must call MaybeRunChild first.
func Start(ctx context.Context, o Options) (*Server, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	if os.Getenv(childMarker) != "" {
		// Without this a forgotten call would have every child start a child of its own.
		return nil, errors.New("main must call embedclickhouse.MaybeRunChild before anything else")
	}
	o, host, err := withDefaults(o)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the ClickHouse data directory: %w", err)
	}
	held, err := lockDataDir(ctx, o.DataDir, o.Logger)
	if err != nil {
		return nil, err
	}
	s := &Server{
		options: o, lock: held,
		// No shared transport: idle connections of it would outlive the engine.
		client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}},
		stop:   make(chan struct{}), kill: make(chan struct{}), done: make(chan struct{}),
		state: StateStarting,
	}
	fail := func(err error) (*Server, error) { return nil, errors.Join(err, held.Close()) }
	if s.credentials, err = resolveCredentials(o.DataDir, o.Credentials); err != nil {
		return fail(err)
	}
	if err := writeConfig(o, s.credentials, host.IsLoopback()); err != nil {
		return fail(err)
	}
	c, err := s.firstStart(ctx, host)
	if err != nil {
		return fail(err)
	}
	s.setReady(c)
	go s.supervise(c)
	return s, nil
}

func withDefaults(o Options) (Options, netip.Addr, error) {
	if o.DataDir == "" || o.EnginePath == "" {
		return o, netip.Addr{}, errors.New("the embedded ClickHouse needs a data directory and the path of its engine")
	}
	dir, err := filepath.Abs(o.DataDir)
	if err != nil {
		return o, netip.Addr{}, err
	}
	o.DataDir = dir
	if o.Host == "" || o.Host == "localhost" {
		o.Host = defaultHost
	}
	host, err := netip.ParseAddr(o.Host)
	if err != nil {
		return o, netip.Addr{}, fmt.Errorf("the ClickHouse host must be an IP address or localhost: %w", err)
	}
	host = host.Unmap()
	if !host.IsLoopback() && !o.Credentials.complete() {
		return o, netip.Addr{}, fmt.Errorf("%w: %s can be reached from other machines; give passwords for the users %s and %s, or listen on 127.0.0.1",
			ErrCredentialsRequired, host, ServiceUser, AnalystUser)
	}
	for _, port := range []int{o.TCPPort, o.HTTPPort} {
		if port < 0 || port > 65535 {
			return o, netip.Addr{}, fmt.Errorf("port %d is not between 0 and 65535", port)
		}
	}
	if o.StartTimeout <= 0 {
		o.StartTimeout = defaultStartTimeout
	}
	switch o.LogLevel {
	case "":
		o.LogLevel = defaultLogLevel
	case "none", "fatal", "critical", "error", "warning", "notice", "information", "debug", "trace":
	default:
		return o, netip.Addr{}, fmt.Errorf("%q is no log level of ClickHouse: use error, warning, information, debug or trace", o.LogLevel)
	}
	if o.OnStateChange == nil {
		o.OnStateChange = func(StateChange) {}
	}
	return o, host, nil
}

// lockDataDir waits a little, since the engine of a supervisor that was just killed holds the lock
// until it has ended.
func lockDataDir(ctx context.Context, dir string, log zerolog.Logger) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	path := filepath.Join(dir, lockName)
	held, err := lockFile(ctx, path, func() {
		log.Info().Dur("up_to_ms", lockWait).Msg("the data directory is in use: waiting for an engine that may be about to end")
	})
	if errors.Is(err, context.DeadlineExceeded) {
		holder, readErr := os.ReadFile(path)
		if readErr != nil || len(holder) == 0 {
			holder = []byte("another process")
		}
		return nil, fmt.Errorf("%w: %s is held by %s; stop that one or choose another data directory",
			ErrDataDirInUse, dir, strings.TrimSpace(string(holder)))
	}
	if err != nil {
		return nil, fmt.Errorf("cannot lock the ClickHouse data directory: %w", err)
	}
	note := fmt.Sprintf("process %d (%s)\n", os.Getpid(), filepath.Base(os.Args[0]))
	if err := errors.Join(held.Truncate(0), writeAt(held, note)); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot write the lock of the data directory: %w", err), held.Close())
	}
	return held, nil
}

func writeAt(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// firstStart chooses free ports where none were given and tries again when another program was
// quicker to take one.
func (s *Server) firstStart(ctx context.Context, host netip.Addr) (*child, error) {
	choose := s.options.TCPPort == 0 || s.options.HTTPPort == 0
	for try := 1; ; try++ {
		var err error
		if s.tcp, s.http, err = choosePorts(host, s.options.TCPPort, s.options.HTTPPort); err != nil {
			return nil, err
		}
		c, err := s.startChild(ctx)
		if err == nil || !choose || try == freePortTries || !errors.Is(err, ErrAddressInUse) {
			return c, err
		}
	}
}

func choosePorts(host netip.Addr, tcpPort, httpPort int) (tcp, http netip.AddrPort, err error) {
	var held []net.Listener
	defer func() {
		for _, l := range held {
			_ = l.Close()
		}
	}()
	chosen := make([]netip.AddrPort, 2)
	for i, port := range []int{tcpPort, httpPort} {
		l, err := net.Listen("tcp", netip.AddrPortFrom(host, uint16(port)).String())
		if err != nil {
			return tcp, http, addressError(netip.AddrPortFrom(host, uint16(port)), err)
		}
		held = append(held, l)
		addr, err := netip.ParseAddrPort(l.Addr().String())
		if err != nil {
			return tcp, http, err
		}
		chosen[i] = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	}
	return chosen[0], chosen[1], nil
}

// AddressError says which address ClickHouse cannot listen on; its Err is the
// operating system's. It is ErrAddressInUse where another program listens there.
type AddressError struct {
	Addr netip.AddrPort
	Err  error
}

// Error is a sentence.
func (e *AddressError) Error() string {
	if e.Is(ErrAddressInUse) {
		return fmt.Sprintf("%v: ClickHouse cannot listen on %s, another program does; stop it or choose another port", ErrAddressInUse, e.Addr)
	}
	return fmt.Sprintf("ClickHouse cannot listen on %s: %v", e.Addr, e.Err)
}

// Unwrap returns the operating system's error.
func (e *AddressError) Unwrap() error { return e.Err }

// Is says whether the address is in use.
func (e *AddressError) Is(target error) bool {
	return target == ErrAddressInUse && errors.Is(e.Err, syscall.EADDRINUSE)
}

func addressError(addr netip.AddrPort, err error) error {
	if err == nil {
		return nil
	}
	return &AddressError{Addr: addr, Err: err}
}

// child is one run of the engine. exited is closed after the process was reaped.
type child struct {
	cmd     *exec.Cmd
	control *os.File
	started time.Time
	exited  chan struct{}
	waitErr error // valid once exited is closed
}

func (s *Server) startChild(ctx context.Context) (*child, error) {
	ctx, cancel := context.WithTimeout(ctx, s.options.StartTimeout)
	defer cancel()
	c, err := s.spawn()
	if err != nil {
		return nil, err
	}
	if err := s.awaitReady(ctx, c); err != nil {
		_ = c.cmd.Process.Kill()
		<-c.exited
		_ = c.control.Close()
		return nil, err
	}
	return c, nil
}

func (s *Server) spawn() (*child, error) {
	out, err := s.openOut()
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	spec, err := json.Marshal(childSpec{EnginePath: s.options.EnginePath, Args: s.engineArgs(),
		Ports: []uint16{s.tcp.Port(), s.http.Port()}})
	if err != nil {
		return nil, err
	}
	inherited, control, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("cannot make the engine's control pipe: %w", err)
	}
	defer func() { _ = inherited.Close() }()
	// Not os.Executable: the running program stays reachable here when its file was replaced.
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"tollkeeper-clickhouse", s.options.DataDir}
	cmd.Dir = s.options.DataDir
	// The engine reads ~/.clickhouse-local and ./config.xml; and nothing of our environment, where
	// secrets may be, is its business.
	cmd.Env = []string{childMarker + "=1", "HOME=" + s.options.DataDir, "TZ=UTC", "LANG=C.UTF-8", "TERM=dumb"}
	cmd.Stdout, cmd.Stderr = out, out
	// The lock goes along: an engine that outlives a killed supervisor still holds its directory.
	cmd.ExtraFiles = []*os.File{inherited, s.lock}
	// A session of its own keeps the terminal's Ctrl-C away from it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot start the engine: %w", err), control.Close())
	}
	c := &child{cmd: cmd, control: control, started: time.Now(), exited: make(chan struct{})}
	go func() {
		c.waitErr = cmd.Wait()
		close(c.exited)
	}()
	if _, err := control.Write(append(spec, '\n')); err != nil {
		_ = cmd.Process.Kill()
		<-c.exited
		return nil, errors.Join(fmt.Errorf("cannot tell the engine what to run: %w", err), control.Close())
	}
	return c, nil
}

func (s *Server) engineArgs() []string {
	return []string{
		"--path", filepath.Join(s.options.DataDir, storeName),
		"--config-file", filepath.Join(s.options.DataDir, configName),
		"--listen_host", s.tcp.Addr().String(),
		"--tcp_port", strconv.Itoa(int(s.tcp.Port())),
		"--http_port", strconv.Itoa(int(s.http.Port())),
		"--interactive", "--progress=off", "--disable_suggestion", "--history_file=/dev/null",
		"--query", "SYSTEM START LISTEN TCP; SYSTEM START LISTEN HTTP",
	}
}

func (s *Server) outPath() string { return filepath.Join(s.options.DataDir, engineOutName) }

// openOut keeps what the engine printed in its last two runs.
func (s *Server) openOut() (*os.File, error) {
	if err := os.Rename(s.outPath(), s.outPath()+".1"); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("cannot rotate the engine's output: %w", err)
	}
	out, err := os.OpenFile(s.outPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the engine's output file: %w", err)
	}
	return out, nil
}

func (s *Server) awaitReady(ctx context.Context, c *child) error {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w on %s and %s after %s (%w); see %s and %s", ErrNotReady, s.tcp, s.http,
				time.Since(c.started).Round(time.Millisecond), context.Cause(ctx), s.outPath(), filepath.Join(s.options.DataDir, engineLogName))
		case <-c.exited:
			return fmt.Errorf("%w: it ended at once (%w). It said: %s", ErrNotReady, exitError(c), s.outTail())
		case <-tick.C:
		}
		if owned, err := ownsListeners(c.cmd.Process.Pid, s.tcp, s.http); err != nil || !owned {
			// An error here is the process being gone, which the next turn sees.
			if said := s.outTail(); strings.Contains(said, "Exception") {
				return s.explainRefusal(said)
			}
			continue
		}
		if err := s.ensureDatabase(ctx); err != nil {
			return fmt.Errorf("%w: %w", ErrNotReady, err)
		}
		if _, err := c.control.Write([]byte{controlReady}); err != nil {
			return fmt.Errorf("%w: it ended while it started: %w", ErrNotReady, err)
		}
		return nil
	}
}

// explainRefusal names the address when the engine was refused one.
func (s *Server) explainRefusal(said string) error {
	for _, addr := range []netip.AddrPort{s.tcp, s.http} {
		l, err := net.Listen("tcp", addr.String())
		if err != nil {
			if owner := addressError(addr, err); strings.Contains(said, "Listen ["+addr.Addr().String()+"]:"+strconv.Itoa(int(addr.Port()))) {
				return owner
			}
			continue
		}
		_ = l.Close()
	}
	return fmt.Errorf("%w. It said: %s", ErrNotReady, said)
}

// ensureDatabase is also the proof that the engine answers a query of the service user.
func (s *Server) ensureDatabase(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+dialable(s.http)+"/",
		strings.NewReader("CREATE DATABASE IF NOT EXISTS "+Database))
	if err != nil {
		return err
	}
	request.SetBasicAuth(ServiceUser, s.credentials.ServicePassword)
	response, err := s.client.Do(request)
	if err != nil {
		return fmt.Errorf("its first query failed: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(response.Body, 1000))
		return fmt.Errorf("its first query was refused with HTTP %d: %s", response.StatusCode, strings.TrimSpace(string(said)))
	}
	return nil
}

func (s *Server) outTail() string {
	const tail = 2000
	f, err := os.Open(s.outPath())
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	if info, err := f.Stat(); err == nil && info.Size() > tail {
		_, _ = f.Seek(-tail, io.SeekEnd)
	}
	raw, err := io.ReadAll(io.LimitReader(f, tail))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

func exitError(c *child) error {
	if c.waitErr != nil {
		return c.waitErr
	}
	return errors.New("exit status 0")
}
