package embedclickhouse

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/ebitengine/purego"
	"golang.org/x/sys/unix"
)

const (
	maxChildSpec  = 64 << 10
	endPoll       = 20 * time.Millisecond
	endGrace      = 5 * time.Second
	kernelSignals = 31

	exitBadSpec = 70
	exitEngine  = 71
	exitStuck   = 72
)

// MaybeRunChild must be the first call of main (and of TestMain): when this process was started as
// the engine's child it runs the engine and exits the process; else it returns at once.
func MaybeRunChild() {
	if os.Getenv(childMarker) != "1" {
		return
	}
	// Straight to the kernel: os.Exit would first run hooks of the Go runtime (the race detector's
	// waits a second), and this process has nothing left to flush.
	syscall.Exit(runChild())
}

func runChild() int {
	// The engine's main thread must stay one thread: it keeps thread-local state from start to end.
	runtime.LockOSThread()
	// Ctrl-C in a terminal is for the supervisor, which ends the engine last.
	signal.Ignore(unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, unix.SIGTERM)

	// What the engine writes is its owner's alone, also in a directory that others may enter.
	unix.Umask(0o077)
	unix.CloseOnExec(controlFD)
	unix.CloseOnExec(lockFD)
	control := bufio.NewReader(os.NewFile(controlFD, "control"))
	line, err := readSpecLine(control)
	if err != nil {
		return childFailed(exitBadSpec, err)
	}
	var spec childSpec
	if err := json.Unmarshal(line, &spec); err != nil {
		return childFailed(exitBadSpec, fmt.Errorf("reading the start order: %w", err))
	}
	terminal, err := openTerminal()
	if err != nil {
		return childFailed(exitEngine, err)
	}
	end := &ending{ports: spec.Ports, terminal: terminal}
	before := signalActions()
	go func() {
		<-terminate
		end.begin()
	}()
	go func() {
		for {
			b, err := control.ReadByte()
			switch {
			case err != nil:
				// The supervisor closed the pipe, or is dead: either way the engine ends.
				end.begin()
				return
			case b == controlReady:
				// The engine is up and has had its chance to install handlers; Go's own must be back,
				// or a crash in this process is reported by the wrong side.
				restoreSignalActions(before)
			}
		}
	}()
	message, err := runEngine(spec)
	if err != nil {
		return childFailed(exitEngine, err)
	}
	if end.begun() {
		return 0
	}
	if message == "" {
		message = "the engine ended by itself"
	}
	return childFailed(exitEngine, errors.New(message))
}

func readSpecLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for len(line) < maxChildSpec {
		b, err := r.ReadByte()
		if err != nil {
			return nil, fmt.Errorf("reading the start order: %w", err)
		}
		if b == '\n' {
			return line, nil
		}
		line = append(line, b)
	}
	return nil, errors.New("the start order is too long")
}

func childFailed(code int, err error) int {
	fmt.Fprintln(os.Stderr, "tollkeeper engine:", err)
	return code
}

// runEngine blocks until the engine's session ends and returns the engine's error text.
func runEngine(spec childSpec) (message string, err error) {
	handle, err := purego.Dlopen(spec.EnginePath, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return "", fmt.Errorf("cannot load the engine library: %w", err)
	}
	symbols := make(map[string]uintptr, 3)
	for _, name := range []string{"chdb_set_signal_handlers_enabled", "chdb_query_cmdline", "chdb_result_error"} {
		if symbols[name], err = purego.Dlsym(handle, name); err != nil {
			return "", fmt.Errorf("the engine library has no %s: %w", name, err)
		}
	}
	var setSignalHandlers func(int32)
	var queryCmdline func(int32, unsafe.Pointer) uintptr
	var resultError func(uintptr) string
	purego.RegisterFunc(&setSignalHandlers, symbols["chdb_set_signal_handlers_enabled"])
	purego.RegisterFunc(&queryCmdline, symbols["chdb_query_cmdline"])
	purego.RegisterFunc(&resultError, symbols["chdb_result_error"])

	setSignalHandlers(0)
	args := append([]string{"clickhouse"}, spec.Args...)
	var pinner runtime.Pinner
	defer pinner.Unpin()
	argv := make([]*byte, 0, len(args)+1)
	for _, arg := range args {
		p, err := unix.BytePtrFromString(arg)
		if err != nil {
			return "", fmt.Errorf("a start argument holds a NUL byte: %w", err)
		}
		pinner.Pin(p)
		argv = append(argv, p)
	}
	argv = append(argv, nil)
	pinner.Pin(&argv[0])
	result := queryCmdline(int32(len(args)), unsafe.Pointer(&argv[0]))
	if result == 0 {
		return "the engine gave no result", nil
	}
	return resultError(result), nil
}

// openTerminal makes standard input a pseudo-terminal, which the engine needs twice: only an
// interactive session survives an exception on a connection's thread, and after START LISTEN the
// session waits at its prompt for input that never comes. Closing the returned side hangs up; the
// prompt then reads the end of its input and the engine ends cleanly.
func openTerminal() (*os.File, error) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open /dev/ptmx (a container needs devpts mounted): %w", err)
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot unlock the pseudo-terminal: %w", err), unix.Close(master))
	}
	slave, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
	if errno != 0 {
		return nil, errors.Join(fmt.Errorf("cannot open the pseudo-terminal's other side: %w", errno), unix.Close(master))
	}
	if err := errors.Join(unix.Dup3(int(slave), 0, 0), unix.Close(int(slave))); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make the pseudo-terminal standard input: %w", err), unix.Close(master))
	}
	terminal := os.NewFile(uintptr(master), "/dev/ptmx")
	go func() {
		// A terminal nobody reads fills up and blocks the session that writes to it.
		_, _ = io.Copy(io.Discard, terminal)
	}()
	return terminal, nil
}

// ending ends the engine once, from whichever side asks first.
type ending struct {
	ports    []uint16
	terminal *os.File

	mu      sync.Mutex
	started bool
}

func (e *ending) begun() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.started
}

func (e *ending) begin() {
	e.mu.Lock()
	if e.started {
		e.mu.Unlock()
		return
	}
	e.started = true
	e.mu.Unlock()
	go e.closeConnections()
	_ = e.terminal.Close()
}

// closeConnections shuts what clients hold open, again and again until the process is gone, since
// the engine waits five seconds for them; past the grace the process ends hard, which its storage
// survives like any kill.
func (e *ending) closeConnections() {
	deadline := time.Now().Add(endGrace)
	for ; time.Now().Before(deadline); time.Sleep(endPoll) {
		shutAccepted(e.ports)
	}
	syscall.Exit(exitStuck)
}

func shutAccepted(ports []uint16) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, entry := range entries {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if _, err := unix.Getpeername(fd); err != nil {
			continue
		}
		local, err := unix.Getsockname(fd)
		if err != nil {
			continue
		}
		for _, port := range ports {
			if sockaddrPort(local) == port {
				_ = unix.Shutdown(fd, unix.SHUT_RDWR)
			}
		}
	}
}

func sockaddrPort(sa unix.Sockaddr) uint16 {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(a.Port)
	case *unix.SockaddrInet6:
		return uint16(a.Port)
	}
	return 0
}

// signalAction is the kernel's struct sigaction on amd64: handler, flags, restorer, mask.
type signalAction [4]uint64

func signalActions() (actions [kernelSignals + 1]signalAction) {
	for sig := 1; sig <= kernelSignals; sig++ {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&actions[sig])), 8, 0, 0)
	}
	return actions
}

func restoreSignalActions(want [kernelSignals + 1]signalAction) {
	now := signalActions()
	for sig := 1; sig <= kernelSignals; sig++ {
		// SIGWINCH belongs to the engine's line editor; Go has no use for it.
		if now[sig] == want[sig] || syscall.Signal(sig) == syscall.SIGWINCH {
			continue
		}
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&want[sig])), 0, 8, 0, 0)
	}
}
