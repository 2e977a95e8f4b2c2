package deploycheck

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// lines is a process's output; safe for concurrent use.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// process is one service of compose.yaml as a process on this machine: its
// program, its environment, with loopback for the containers' network.
type process struct {
	out   lines
	admin string // host:port of /readyz
	token string
}

func (c *cluster) start(t *testing.T, service string, listens map[string]string) *process {
	t.Helper()
	p := &process{}
	s := project(t).Services[service]
	secrets := t.TempDir()
	cmd := exec.Command(binary(t, program(s)))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	for name, v := range s.Environment {
		if v == nil {
			continue
		}
		value := *v
		switch {
		case listens[name] != "":
			value = net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort(t)))
			if listens[name] == "admin" {
				p.admin = value
			}
		case name == "TOLLKEEPER_NATS_URL":
			value = "nats://" + strings.Join(c.addresses, ",nats://")
		case name == "TOLLKEEPER_CLICKHOUSE_ADDR":
			value = "127.0.0.1:1" // it is away: the service waits
		case name == "TOLLKEEPER_SPOOL_DIR":
			value = t.TempDir()
		case name == "TOLLKEEPER_GATEWAY_CONFIG":
			value = filepath.Join(root, "deploy/gateway.example.yaml")
		case strings.HasPrefix(value, "/run/secrets/"):
			secret := filepath.Base(value)
			i := slices.IndexFunc(s.Secrets, func(g composeSecret) bool { return g.Source == secret })
			if i < 0 {
				t.Fatalf("%s is not given secret %s", service, secret)
			}
			p.token = env(t)[project(t).Secrets[secret].Environment]
			value = filepath.Join(secrets, secret)
			write(t, value, p.token)
		}
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt) // it may have ended, which Wait tells
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%s ended with %v", service, err)
			}
		case <-time.After(15 * time.Second):
			_ = cmd.Process.Kill() // it is not going to end by itself
			t.Errorf("%s does not stop within 15 s", service)
		}
		if strings.Contains(strings.ToLower(p.out.String()), "permissions violation") {
			t.Errorf("%s lacks rights in NATS", service)
		}
		if t.Failed() {
			t.Logf("%s:\n%s", service, p.out.String())
		}
	})
	return p
}

// get asks the service's admin address, with or without its token.
func (p *process) get(path, token string) (int, string) {
	req, err := http.NewRequest(http.MethodGet, "http://"+p.admin+path, nil)
	if err != nil {
		return 0, err.Error()
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	client := http.Client{Timeout: 2 * time.Second}
	res, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	body, err := io.ReadAll(res.Body)
	if cerr := res.Body.Close(); err != nil || cerr != nil {
		return 0, "cut off"
	}
	return res.StatusCode, string(body)
}

// Each service comes up with the environment, the user and the token that
// compose.yaml gives it, against the cluster that nats.conf makes.
func TestServicesComeUpAgainstTheCluster(t *testing.T) {
	c := startCluster(t)
	t.Run("services", func(t *testing.T) {
		admin := map[string]string{"TOLLKEEPER_ADMIN_LISTEN": "admin"}
		// It makes the streams, which the others may not.
		aggregator := c.start(t, "aggregator", admin)
		ready := func(p *process) {
			waitFor(t, "the service is ready", func() bool { code, _ := p.get("/readyz", p.token); return code == http.StatusOK })
		}
		ready(aggregator)
		historian := c.start(t, "historian", admin)
		alerter := c.start(t, "alerter", admin)
		auditor := c.start(t, "auditor", admin)
		console := c.start(t, "console", map[string]string{"TOLLKEEPER_CONSOLE_LISTEN": "admin"})
		gateways := []*process{}
		for _, name := range []string{"gateway-1", "gateway-2"} {
			gateways = append(gateways, c.start(t, name, map[string]string{"TOLLKEEPER_GATEWAY_ADMIN_LISTEN": "admin", "TOLLKEEPER_GATEWAY_LISTEN": "proxy"}))
		}

		all := append([]*process{historian, alerter, auditor, console, aggregator}, gateways...)
		for _, p := range all {
			if p.token == "" {
				t.Fatal("a service has no token")
			}
			waitFor(t, "the admin address answers", func() bool { code, _ := p.get("/healthz", ""); return code == http.StatusOK })
			if code, _ := p.get("/metrics", "wrong"); code != http.StatusUnauthorized && p != console {
				t.Errorf("/metrics answers %d without the token", code)
			}
		}
		for _, p := range append([]*process{alerter}, gateways...) {
			ready(p)
		}
		// Without ClickHouse they say so, and that is all they miss.
		for _, p := range []*process{historian, auditor, console} {
			waitFor(t, "the service misses ClickHouse alone", func() bool {
				_, body := p.get("/readyz", p.token)
				return strings.Contains(body, "ClickHouse") && !strings.Contains(body, "waiting for NATS")
			})
		}
		// The health check of the image works on them.
		check := filepath.Join(t.TempDir(), "healthcheck")
		if out, err := exec.Command("go", "build", "-o", check, "../healthcheck").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if out, err := exec.Command(check, "http://"+aggregator.admin+"/healthz").CombinedOutput(); err != nil {
			t.Errorf("healthcheck: %v: %s", err, out)
		}
		if _, err := exec.Command(check, "http://"+aggregator.admin+"/readyz").CombinedOutput(); err == nil {
			t.Error("healthcheck takes 401 for health")
		}
		// What is scraped has the metrics that the rules are made of.
		for p, names := range map[*process][]string{
			gateways[0]: {"tollkeeper_component_ready", "tollkeeper_gate_refusals_total", "tollkeeper_outbox_spool_bytes"},
			aggregator:  {"tollkeeper_aggregator_skipped_frames_total", "tollkeeper_aggregator_shards_catching_up"},
			alerter:     {"tollkeeper_alerter_heartbeat_timestamp_seconds"},
			historian:   {"tollkeeper_component_ready"},
			auditor:     {"tollkeeper_audit_findings_open", "tollkeeper_audit_comparing", "tollkeeper_component_ready"},
			console:     {"tollkeeper_component_ready"},
		} {
			_, body := p.get("/metrics", p.token)
			for _, name := range names {
				if !strings.Contains(body, "\n"+name) {
					t.Errorf("/metrics of %s has no %s", p.admin, name)
				}
			}
		}
	})
}
