// Package sized measures what a Tollkeeper with many accounts costs: how long their
// import takes, how much memory everything in one process has, and how long after a
// kill -9 the first right answers come.
package sized

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Options of a measurement.
type Options struct {
	// Accounts to import, each with a key and a plan of three limits.
	Accounts int
	// Kills after which the first right answers are awaited.
	Kills int
	// Program is tollkeeper, the command.
	Program   string
	EngineDir string
	Out       io.Writer
}

// keyLimit is how many calls the account may make that is refused afterwards.
const keyLimit = 3

// Bounds of one step.
const (
	readyWithin  = 2 * time.Minute
	importWithin = 30 * time.Minute
	askEvery     = 5 * time.Millisecond
)

// system is a Tollkeeper in a process of its own.
type system struct {
	o       Options
	dir     string
	listen  []string // its flags and addresses
	gateway string
	api     string
	cmd     *exec.Cmd
	log     *os.File
	client  *http.Client
	next    int // account that has not called yet
}

// Run measures and prints.
func Run(ctx context.Context, o Options) (err error) {
	dir, err := os.MkdirTemp("", "tollkeeper-bench-")
	if err != nil {
		return fmt.Errorf("make a scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for the upstream: %w", err)
	}
	upstream := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = upstream.Serve(l) }() // ends with Close
	defer func() { err = errors.Join(err, upstream.Close()) }()
	s := &system{o: o, dir: dir, client: &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
	if err := s.prepare(l.Addr().String()); err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	return s.measure(ctx)
}

func (s *system) prepare(upstream string) error {
	var err error
	if s.log, err = os.Create(filepath.Join(s.dir, "log")); err != nil {
		return fmt.Errorf("write its log: %w", err)
	}
	// Ports of its own, the same after each kill.
	for _, flag := range []string{"nats", "clickhouse", "clickhouse-http", "api", "gateway-admin", "gateway"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("find a free port: %w", err)
		}
		if s.gateway = l.Addr().String(); flag == "api" {
			s.api = s.gateway
		}
		s.listen = append(s.listen, "--"+flag+"-listen="+s.gateway)
		if err := l.Close(); err != nil {
			return fmt.Errorf("find a free port: %w", err)
		}
	}
	config := "routes:\n- name: api\n  prefix: /\n  upstream: http://" + upstream + "\n"
	if err := os.WriteFile(s.path("gateway.yaml"), []byte(config), 0o600); err != nil {
		return fmt.Errorf("write the gateway's configuration: %w", err)
	}
	return s.writePlans()
}

func (s *system) path(name string) string { return filepath.Join(s.dir, name) }

func key(account int) string { return "sk-bench-" + strconv.Itoa(account) }

func (s *system) writePlans() (err error) {
	f, err := os.Create(s.path("plans.yaml"))
	if err != nil {
		return fmt.Errorf("write the plans file: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriter(f)
	plan := func(id string, month int) {
		_, _ = fmt.Fprintf(w, "- id: %s\n  limits:\n  - {id: minute, meter: calls, window: minute, amount: 1000000}\n", id)
		_, _ = fmt.Fprintf(w, "  - {id: tokens, meter: output_tokens, window: day, amount: 1000000}\n  - {id: month, meter: calls, window: month, amount: %d}\n", month)
	}
	_, _ = fmt.Fprint(w, "version: 1\nplans:\n")
	plan("spent", keyLimit)
	plan("many", 1_000_000)
	_, _ = fmt.Fprint(w, "accounts:\n")
	for i := range s.o.Accounts {
		name := "many"
		if i == 0 {
			name = "spent"
		}
		_, _ = fmt.Fprintf(w, "- id: account-%07d\n  plan: %s\n  keys:\n  - id: key-%07d\n    sha256: %x\n", i, name, i, sha256.Sum256([]byte(key(i))))
	}
	// A bufio.Writer keeps its first error.
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write the plans file: %w", err)
	}
	return nil
}

func (s *system) start() error {
	arguments := append([]string{"up", "--no-demo", "--log-level=warn", "--data-dir=" + s.path("data"), "--gateway-config=" + s.path("gateway.yaml")}, s.listen...)
	if s.o.EngineDir != "" {
		arguments = append(arguments, "--engine-dir="+s.o.EngineDir)
	}
	s.cmd = exec.Command(s.o.Program, arguments...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("start tollkeeper: %w", err)
	}
	return nil
}

// kill returns when nothing is left of the process.
func (s *system) kill() error {
	if err := s.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill tollkeeper: %w", err)
	}
	_ = s.cmd.Wait() // it was killed
	return nil
}

func (s *system) end() error {
	if err := s.cmd.Process.Signal(os.Interrupt); err != nil {
		return errors.Join(fmt.Errorf("stop tollkeeper: %w", err), s.log.Close())
	}
	late := time.AfterFunc(20*time.Second, func() { _ = s.cmd.Process.Kill() }) // it may have ended meanwhile
	defer late.Stop()
	err := s.cmd.Wait()
	if err != nil {
		err = fmt.Errorf("stop tollkeeper: %w", err)
	}
	return errors.Join(err, s.log.Close())
}

// ask returns the status that an account's call is answered; 0: not at all.
func (s *system) ask(ctx context.Context, account int) (int, []byte) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.gateway+"/x", nil)
	if err != nil {
		return 0, nil
	}
	req.Header.Set("X-Api-Key", key(account))
	res, err := s.client.Do(req)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = res.Body.Close() }() // read or given up
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return 0, nil
	}
	return res.StatusCode, body
}

// until asks until done says so.
func until(ctx context.Context, within time.Duration, what string, done func(ctx context.Context) bool) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for !done(ctx) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %s", what, within)
		}
	}
	return nil
}

// running is the file that a Tollkeeper writes when everything is up.
const running = "running.json"

func (s *system) measure(ctx context.Context) error {
	if err := s.failed(until(ctx, readyWithin, "tollkeeper is up", func(context.Context) bool {
		_, err := os.Stat(filepath.Join(s.path("data"), running))
		return err == nil
	})); err != nil {
		return err
	}
	importing, cancel := context.WithTimeout(ctx, importWithin)
	defer cancel()
	apply := exec.CommandContext(importing, s.o.Program, "apply", "--yes", "--data-dir="+s.path("data"), "-f", s.path("plans.yaml"))
	var said bytes.Buffer
	apply.Stderr = &said
	began := time.Now()
	if err := apply.Run(); err != nil {
		return s.failed(fmt.Errorf("apply: %w: %s", err, said.String()))
	}
	took := time.Since(began)
	if err := s.failed(until(ctx, readyWithin, "the last account's call is admitted", func(ctx context.Context) bool {
		status, _ := s.ask(ctx, s.o.Accounts-1)
		return status == http.StatusOK
	})); err != nil {
		return err
	}
	usable := time.Since(began)
	if err := s.failed(until(ctx, readyWithin, "the spent account is refused", func(ctx context.Context) bool {
		status, _ := s.ask(ctx, 0)
		return status == http.StatusPaymentRequired
	})); err != nil {
		return err
	}
	applied := apply.ProcessState.UserTime() + apply.ProcessState.SystemTime()
	_, err := fmt.Fprintf(s.o.Out, "\n%d accounts × 3 limits, a key each; everything in one process, the ClickHouse engine in another\n"+
		"  import (tollkeeper apply)          %8.1f s   %.0f accounts/s; %.1f s until the last one's call is admitted; apply itself used %.1f s of CPU, the rest is the disk's and the server's\n",
		s.o.Accounts, took.Seconds(), float64(s.o.Accounts)/took.Seconds(), usable.Seconds(), applied.Seconds())
	if err != nil {
		return err
	}
	if err := s.memory("after the import"); err != nil {
		return err
	}
	var refused, admitted, used []float64
	for range s.o.Kills {
		r, err := s.restart(ctx)
		if err != nil {
			return s.failed(err)
		}
		refused, admitted, used = append(refused, r.refused.Seconds()), append(admitted, r.admitted.Seconds()), append(used, r.used.Seconds())
	}
	if len(refused) == 0 {
		return nil
	}
	if _, err := fmt.Fprintf(s.o.Out, "  kill -9 → first right 402 / 200    %8.2f s / %.2f s   median of %d, for which the process used %.1f s of CPU; nothing but 503 or no answer before\n", median(refused), median(admitted), len(refused), median(used)); err != nil {
		return err
	}
	return s.memory("after the restarts")
}

// recovery is how long after a new start a spent account is refused, and one that never
// called is admitted, and the CPU time that the process has used by then.
type recovery struct{ refused, admitted, used time.Duration }

// restart kills everything and starts it again. A wrong answer meanwhile is an error.
func (s *system) restart(ctx context.Context) (r recovery, err error) {
	if err := s.kill(); err != nil {
		return r, err
	}
	began := time.Now()
	if err := s.start(); err != nil {
		return r, err
	}
	var wrong error
	if err := until(ctx, readyWithin, "the first right answers after a kill", func(ctx context.Context) bool {
		switch status, body := s.ask(ctx, 0); status {
		case http.StatusPaymentRequired:
			if r.refused == 0 {
				r.refused = time.Since(began)
			}
		case 0, http.StatusServiceUnavailable:
		default:
			wrong = errors.Join(wrong, fmt.Errorf("the spent account was answered %d %s", status, body))
		}
		s.next++
		switch status, body := s.ask(ctx, 1+s.next%(s.o.Accounts-1)); status {
		case http.StatusOK:
			if r.admitted == 0 {
				r.admitted = time.Since(began)
			}
		case 0, http.StatusServiceUnavailable:
		default:
			wrong = errors.Join(wrong, fmt.Errorf("an account with everything left was answered %d %s", status, body))
		}
		return wrong != nil || r.refused > 0 && r.admitted > 0
	}); err != nil {
		return r, err
	}
	if wrong != nil {
		return r, wrong
	}
	if r.used, err = s.used(); err != nil {
		return r, err
	}
	// The next kill must hit all of it, and so must the end.
	return r, until(ctx, readyWithin, "everything is up again", func(ctx context.Context) bool {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.api)
		if err != nil {
			return false
		}
		_ = c.Close() // it has answered
		return true
	})
}

// ticksPerSecond of /proc, on every Linux that Go runs on.
const ticksPerSecond = 100

// used is the CPU time of the process, its children not included.
func (s *system) used() (time.Duration, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(s.cmd.Process.Pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("read the CPU time of tollkeeper: %w", err)
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	var ticks int64
	for _, i := range []int{11, 12} { // utime, stime
		if i >= len(f) {
			return 0, errors.New("read the CPU time of tollkeeper: /proc says less than expected")
		}
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the CPU time of tollkeeper: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond, nil
}

// memory prints the resident memory of the process and, apart, of the ClickHouse engine,
// which is its child.
func (s *system) memory(when string) error {
	pid := strconv.Itoa(s.cmd.Process.Pid)
	now, most, err := resident(pid)
	if err != nil {
		return err
	}
	// A child belongs to the thread that started it.
	lists, err := filepath.Glob("/proc/" + pid + "/task/*/children")
	if err != nil {
		return fmt.Errorf("look for the engine: %w", err)
	}
	var engineNow, engineMost float64
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that has ended
		}
		for _, child := range strings.Fields(string(children)) {
			n, m, err := resident(child)
			if err != nil {
				return err
			}
			engineNow, engineMost = engineNow+n, engineMost+m
		}
	}
	_, err = fmt.Fprintf(s.o.Out, "  memory %-28s%8.0f MB  at most %.0f MB; the ClickHouse engine %.0f MB, at most %.0f MB\n", when, now, most, engineNow, engineMost)
	return err
}

// resident is the resident memory of a process in MB, now and at most.
func resident(pid string) (now, most float64, err error) {
	data, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return 0, 0, fmt.Errorf("read the memory of process %s: %w", pid, err)
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseFloat(f[1], 64) // only the two below are numbers for us
		switch f[0] {
		case "VmRSS:":
			now = kb / 1024
		case "VmHWM:":
			most = kb / 1024
		}
	}
	return now, most, nil
}

// failed adds the last that Tollkeeper said to an error.
func (s *system) failed(err error) error {
	if err == nil {
		return nil
	}
	data, _ := os.ReadFile(s.log.Name()) // the error is told without it
	const last = 2000
	return fmt.Errorf("%w; tollkeeper said last: %s", err, data[max(0, len(data)-last):])
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
