package tollkeeper_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// programs is the directory of the real programs: what `task build` has made, if it
// says so, else they are built once a test binary.
var programs = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("TOLLKEEPER_TEST_PROGRAMS"); dir != "" {
		return dir, nil
	}
	build := exec.Command("go", "build", "-o", scratch+"/", "./cmd/tollkeeper", "../aggregator/cmd/aggregator", "../historian/cmd/historian", "../gateway/cmd/gateway")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return scratch, nil
})

// scratch is what outlives single tests, until all are over.
var scratch string

func TestMain(m *testing.M) {
	embedclickhouse.MaybeRunChild()
	var err error
	if scratch, err = os.MkdirTemp("", "tollkeeper-test-programs-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(scratch)
	os.Exit(code)
}

// system is Tollkeeper spread over processes of its own, on free loopback ports.
type system struct {
	t              testing.TB
	dir, programs  string
	nats           string
	clickhouse     string
	clickhouseHTTP string
	credentials    embedclickhouse.Credentials
	mu             sync.Mutex
	running        map[string]*exec.Cmd
	arguments      map[string][]string // of programs that tests start with their own
	ended          map[string]chan struct{}
}

// newSystem starts NATS, ClickHouse, aggregator and historian.
func newSystem(t testing.TB) *system {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	s := &system{
		t: t, dir: t.TempDir(), programs: dir, running: map[string]*exec.Cmd{}, arguments: map[string][]string{}, ended: map[string]chan struct{}{},
		nats: freeAddr(t), clickhouse: freeAddr(t), clickhouseHTTP: freeAddr(t),
		credentials: embedclickhouse.Credentials{},
	}
	t.Cleanup(s.stop)
	s.start("nats")
	s.start("clickhouse")
	s.readPassword()
	s.start("aggregator")
	s.start("historian")
	s.awaitLedger()
	return s
}

// awaitLedger waits until the services have made the ledger.
func (s *system) awaitLedger() {
	s.t.Helper()
	nc, err := natsconn.Connect(s.t.Context(), s.natsOptions())
	if err != nil {
		s.t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := ledger.ReadGeometry(ctx, js)
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.t.Fatalf("the services have made no ledger: %v", err)
		}
	}
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func (s *system) command(name string) *exec.Cmd {
	var c *exec.Cmd
	switch name {
	case "nats":
		c = exec.Command(filepath.Join(s.programs, "tollkeeper"), "nats", "--data-dir", s.dir, "--nats-listen", s.nats)
	case "clickhouse":
		c = exec.Command(filepath.Join(s.programs, "tollkeeper"), "clickhouse", "--data-dir", s.dir, "--clickhouse-listen", s.clickhouse, "--clickhouse-http-listen", s.clickhouseHTTP)
	case "aggregator":
		c = exec.Command(filepath.Join(s.programs, "aggregator"), "--nats-url", "nats://"+s.nats, "--admin-listen", "")
	case "historian":
		c = exec.Command(filepath.Join(s.programs, "historian"), "--nats-url", "nats://"+s.nats, "--clickhouse-addr", s.clickhouse, "--admin-listen", "")
		c.Env = append(os.Environ(), "TOLLKEEPER_CLICKHOUSE_PASSWORD="+s.credentials.ServicePassword)
	default:
		s.t.Fatalf("there is no program %s", name)
	}
	return c
}

// start starts a program; of the engines it waits until they listen.
func (s *system) start(name string) {
	s.t.Helper()
	s.run(name, s.command(name))
	switch name {
	case "nats":
		s.awaitPort(s.nats)
	case "clickhouse":
		s.awaitPort(s.clickhouse)
	}
}

// run starts c under a name; what it logs goes to the test's log when it fails.
func (s *system) run(name string, c *exec.Cmd) {
	s.t.Helper()
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := c.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Process.Kill() }) // what the test did not end itself
	ended := make(chan struct{})
	s.mu.Lock()
	s.running[name], s.ended[name] = c, ended
	s.mu.Unlock()
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			// What is no log line is why a program could not start, or a panic.
			if line := lines.Text(); strings.Contains(line, `"level":"error"`) || !strings.HasPrefix(line, "{") {
				s.t.Logf("%s: %s", name, line)
			}
		}
		_ = c.Wait() // killed programs have an error, which is meant
	}()
}

func (s *system) awaitPort(addr string) {
	s.t.Helper()
	deadline := time.Now().Add(60 * time.Second) // the engine may have to be fetched
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for time.Now().Before(deadline) {
		if c, err := net.Dial("tcp", addr); err == nil {
			_ = c.Close()
			return
		}
		<-tick.C
	}
	s.t.Fatalf("nothing listens on %s after a minute", addr)
}

// kill ends a program with SIGKILL and returns when it is gone.
func (s *system) kill(name string) {
	s.mu.Lock()
	c, ended := s.running[name], s.ended[name]
	s.mu.Unlock()
	if err := c.Process.Signal(syscall.SIGKILL); err != nil {
		s.t.Errorf("kill %s: %v", name, err)
	}
	<-ended
}

func (s *system) stop() {
	for _, name := range []string{"gateway", "historian", "aggregator", "clickhouse", "nats"} {
		s.mu.Lock()
		c, ended := s.running[name], s.ended[name]
		s.mu.Unlock()
		if c == nil {
			continue
		}
		_ = c.Process.Signal(syscall.SIGTERM) // it may be gone
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			s.t.Errorf("%s did not end within 10 s of SIGTERM", name)
			_ = c.Process.Kill()
		}
	}
}

func (s *system) readPassword() {
	s.t.Helper()
	c, err := embedclickhouse.ReadCredentials(filepath.Join(s.dir, "clickhouse"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.credentials = c
}

func (s *system) natsOptions() natsconn.Options {
	return natsconn.Options{URL: "nats://" + s.nats, Logger: zerolog.Nop()}
}

func (s *system) historyOptions() history.Options {
	return history.Options{Addrs: []string{s.clickhouse}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: s.credentials.ServicePassword, Logger: zerolog.Nop()}
}

// within bounds a whole test.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, errors.New("the test took too long"))
	t.Cleanup(cancel)
	return ctx
}

// processGateway is the real gateway program.
type processGateway struct{ proxy, admin string }

func (g *processGateway) URL() string      { return "http://" + g.proxy }
func (g *processGateway) AdminURL() string { return "http://" + g.admin }

// Await waits until the gateway is ready.
func (g *processGateway) Await(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.AdminURL()+"/readyz", nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the gateway is not ready: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// gateway starts the gateway program in front of an upstream, with a spool that
// outlives it.
func (s *system) gateway(upstream, spool string, safe bool) *processGateway {
	s.t.Helper()
	g := &processGateway{proxy: freeAddr(s.t), admin: freeAddr(s.t)}
	s.arguments["gateway"] = []string{
		"--nats-url", "nats://" + s.nats, "--upstream", upstream, "--gateway-listen", g.proxy, "--gateway-admin-listen", g.admin,
		"--spool-dir", spool, "--unknown-max-calls", "1000000000", "--name", "gateway-under-test",
	}
	if safe {
		s.arguments["gateway"] = append(s.arguments["gateway"], "--spool-before-answer")
	}
	s.restart("gateway")
	return g
}

// restart starts a program again with the arguments it had.
func (s *system) restart(name string) {
	s.run(name, exec.Command(filepath.Join(s.programs, name), s.arguments[name]...))
}
