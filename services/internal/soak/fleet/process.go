// Package fleet runs every part of Tollkeeper as an operating system process of
// its own, so that each can be killed, stopped, continued and cut off.
package fleet

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a program that is started again with the same arguments after
// whatever was done to it. Its methods are safe for concurrent use; those that
// start and end it wait for each other.
type Process struct {
	// Name is unique in a fleet, such as gateway-2.
	Name string
	// Kind is what it is: nats, clickhouse, aggregator, historian, gateway.
	Kind string
	// Log is the file that gets what it writes, over all its lives.
	Log string

	argv []string
	env  []string
	life sync.Mutex // held while it is started or ended

	mu    sync.Mutex
	cmd   *exec.Cmd
	ended chan struct{}
	meant bool // its end was asked for
	// byItself counts the ends that nobody asked for.
	byItself int
}

// Start starts it; it is no error when it runs already.
func (p *Process) Start() error {
	p.life.Lock()
	defer p.life.Unlock()
	if p.Running() {
		return nil
	}
	out, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("log of %s: %w", p.Name, err)
	}
	defer func() { _ = out.Close() }() // the process has a copy
	_, _ = fmt.Fprintf(out, "--- started %s\n", time.Now().UTC().Format(time.RFC3339Nano))
	c := exec.Command(p.argv[0], p.argv[1:]...)
	c.Env = append(os.Environ(), p.env...)
	c.Stdout, c.Stderr = out, out
	c.SysProcAttr = attributes()
	if err := c.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	ended := make(chan struct{})
	p.mu.Lock()
	p.cmd, p.ended, p.meant = c, ended, false
	p.mu.Unlock()
	go func() {
		_ = c.Wait() // killed programs have an error, which is meant
		p.mu.Lock()
		if !p.meant {
			p.byItself++
		}
		p.mu.Unlock()
		close(ended)
	}()
	return nil
}

// Running says whether it has been started and has not ended.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// DiedByItself says that it has ended although nobody had asked it to, and has not
// been started since.
func (p *Process) DiedByItself() bool {
	if p.Running() {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd != nil && !p.meant
}

// EndedByItself returns how often it ended although nobody had asked it to.
func (p *Process) EndedByItself() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byItself
}

// Kill ends it with SIGKILL, in whatever state it is, and returns when it is gone.
func (p *Process) Kill() error { return p.end(syscall.SIGKILL, time.Minute) }

// Stop asks it to end, and kills it when it has not within patience: that is an
// error.
func (p *Process) Stop(patience time.Duration) error { return p.end(syscall.SIGTERM, patience) }

func (p *Process) end(sig syscall.Signal, patience time.Duration) error {
	p.life.Lock()
	defer p.life.Unlock()
	if !p.Running() {
		return nil
	}
	p.mu.Lock()
	c, ended := p.cmd, p.ended
	p.meant = true
	p.mu.Unlock()
	if err := c.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end %s: %w", p.Name, err)
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-timer.C:
	}
	_ = c.Process.Kill() // it may have ended right now
	<-ended
	return fmt.Errorf("%s had not ended %s after %s", p.Name, patience, sig)
}

// Freeze stops it and its children where they are, as a paused machine would.
func (p *Process) Freeze() error { return p.tree(syscall.SIGSTOP) }

// Thaw lets it go on.
func (p *Process) Thaw() error { return p.tree(syscall.SIGCONT) }

func (p *Process) tree(sig syscall.Signal) error {
	p.mu.Lock()
	c := p.cmd
	p.mu.Unlock()
	if c == nil || !p.Running() {
		return nil
	}
	var errs []error
	for _, pid := range family(c.Process.Pid) {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("%s to %s: %w", sig, p.Name, err))
		}
	}
	return errors.Join(errs...)
}

// family returns a process and its descendants, as far as the system tells.
func family(pid int) []int {
	all := []int{pid}
	for i := 0; i < len(all) && i < 64; i++ {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", all[i], all[i]))
		if err != nil {
			continue // it is gone, or there is no such file here
		}
		for field := range strings.FieldsSeq(string(data)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(all, child)
			}
		}
	}
	return all
}

// Complaints returns the lines of its log that no fault excuses: panics and data
// races, with their beginning; at most most.
func (p *Process) Complaints(most int) []string {
	f, err := os.Open(p.Log)
	if err != nil {
		return nil // it never ran
	}
	defer func() { _ = f.Close() }() // only read
	var out []string
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 64<<10), 4<<20)
	for lines.Scan() && len(out) < most {
		line := lines.Text()
		if strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") || strings.Contains(line, "DATA RACE") {
			out = append(out, p.Name+": "+line)
		}
	}
	return out
}
