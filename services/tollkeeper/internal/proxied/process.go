package proxied

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a child that is measured.
type process struct {
	cmd  *exec.Cmd
	addr string
	log  *tail
}

// start starts a child, which ends with this process.
func start(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, log: &tail{}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Stderr = p.log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	return p, nil
}

// stop asks the child to end, and after a while makes it.
func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", filepath.Base(p.cmd.Path), err)
	}
	kill := time.AfterFunc(stuckAfter, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() < 0 {
		err = nil // it ended by the signal
	}
	if err != nil {
		return fmt.Errorf("%s ended with %w: %s", filepath.Base(p.cmd.Path), err, p.log.last())
	}
	return nil
}

// failed says what a target that was loaded has to say about it itself.
func (p *process) failed(name string, kind Kind, err error) error {
	return fmt.Errorf("%s, %s: %w: %s", name, kind, err, p.log.last())
}

// part starts this program as one of the parts that Part serves.
func part(program string, args ...string) (*process, error) {
	cmd := exec.Command(program, append([]string{PartCommand}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := start(cmd)
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the %s does not start: %w", args[0], err), p.stop())
	}
	p.addr = strings.TrimSpace(line)
	return p, nil
}

// PartCommand is the command of this program whose arguments Part takes.
const PartCommand = "bench-part"

// Part serves one part of the bench on a free port, whose address it prints: the
// upstream, or the bare proxy before one. It ends with ctx.
func Part(ctx context.Context, name, upstream string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if _, err := fmt.Println(l.Addr()); err != nil {
		return errors.Join(err, l.Close())
	}
	switch name {
	case "upstream":
		return ServeUpstream(ctx, l)
	case "bare":
		return ServeBare(ctx, l, upstream)
	}
	return errors.Join(fmt.Errorf("there is no part %q of the bench", name), l.Close())
}

// cpu returns what a process and its children have used so far. A child that has ended
// counts from when its parent has waited for it.
func cpu(pid int) (time.Duration, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	parents, used := make(map[int]int), make(map[int]time.Duration)
	for _, file := range stats {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return 0, err
		}
		if parents[id], used[id], err = parseStat(data); err != nil {
			return 0, fmt.Errorf("process %d: %w", id, err)
		}
	}
	var total time.Duration
	for id := range used {
		for at, steps := id, 0; at != 0 && steps < len(parents); at, steps = parents[at], steps+1 {
			if at == pid {
				total += used[id]
				break
			}
		}
	}
	return total, nil
}

// tick of /proc, which Linux has fixed for programs.
const tick = 10 * time.Millisecond

// parseStat reads a process's parent and the time it used from /proc/PID/stat.
func parseStat(data []byte) (parent int, used time.Duration, err error) {
	// The name in parentheses may hold anything. Behind it stand the state, the parent,
	// and as the 12th to 15th field the time of the process and of children it has
	// waited for, in ticks.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 15 {
		return 0, 0, errors.New("/proc says too little")
	}
	if parent, err = strconv.Atoi(fields[1]); err != nil {
		return 0, 0, err
	}
	for _, f := range fields[11:15] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, 0, err
		}
		used += time.Duration(n) * tick
	}
	return parent, used, nil
}

// tail keeps the end of what a child logs. Safe for concurrent use.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailBytes = 4 << 10

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	t.text = t.text[max(0, len(t.text)-tailBytes):]
	return len(p), nil
}

func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.text))
}
