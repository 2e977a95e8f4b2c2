package tollkeeper_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/demo"
)

// up is the real program, run as its README says, on free ports.
type up struct {
	dir                                                   string
	api, gateway, admin, nats, clickhouse, clickhouseHTTP string
	out                                                   string // file of its standard output
	s                                                     *system
}

func startUp(t *testing.T, dir string, args ...string) *up {
	t.Helper()
	programs, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	var u *up
	for range 3 {
		u = &up{
			dir: dir,
			api: freeAddr(t), gateway: freeAddr(t), admin: freeAddr(t), nats: freeAddr(t), clickhouse: freeAddr(t), clickhouseHTTP: freeAddr(t),
			out: outFile(t), s: &system{t: t, running: map[string]*exec.Cmd{}, ended: map[string]chan struct{}{}},
		}
		program := exec.Command(filepath.Join(programs, "tollkeeper"), append([]string{
			"up", "--data-dir", dir, "--api-listen", u.api, "--gateway-listen", u.gateway, "--gateway-admin-listen", u.admin,
			"--nats-listen", u.nats, "--clickhouse-listen", u.clickhouse, "--clickhouse-http-listen", u.clickhouseHTTP,
		}, args...)...)
		out, err := os.Create(u.out)
		if err != nil {
			t.Fatal(err)
		}
		program.Stdout = out
		u.s.run("up", program)
		if err := out.Close(); err != nil {
			t.Error(err)
		}
		if u.listens(t) {
			return u
		}
		// A port that was free a moment ago is somebody else's: other tests run beside.
		t.Log("the program has ended at its start: trying other ports")
	}
	t.Fatal("the program ends at its start, on whatever ports")
	return nil
}

// listens waits until the API listens, and reports false when the program has ended
// before.
func (u *up) listens(t *testing.T) bool {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	tooLong := time.After(2 * time.Minute) // the engine may have to be fetched
	for {
		select {
		case <-u.s.ended["up"]:
			return false
		case <-tooLong:
			t.Fatal("the program does not listen after two minutes")
		case <-tick.C:
			if c, err := net.Dial("tcp", u.api); err == nil {
				_ = c.Close()
				return true
			}
		}
	}
}

// interrupt sends Ctrl-C, or another signal that ends it in order, and returns how long
// the program took to end.
func (u *up) interrupt(t *testing.T, by syscall.Signal) time.Duration {
	t.Helper()
	start := time.Now()
	if err := u.s.running["up"].Process.Signal(by); err != nil {
		t.Fatal(err)
	}
	select {
	case <-u.s.ended["up"]:
	case <-time.After(15 * time.Second):
		t.Fatalf("it has not ended 15 s after %s", by)
	}
	if code := u.s.running["up"].ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d after %s", code, by)
	}
	return time.Since(start)
}

// get reads a URL; the answer's status is 0 while nobody answers.
// history asks ClickHouse as an analyst does.
func (u *up) history(ctx context.Context, query string) (status int, body []byte) {
	c, err := embedclickhouse.ReadCredentials(filepath.Join(u.dir, "clickhouse"))
	if err != nil {
		return 0, []byte(err.Error())
	}
	return get(ctx, "http://"+u.clickhouseHTTP+"/?query="+url.QueryEscape(query), "X-ClickHouse-User", embedclickhouse.AnalystUser, "X-ClickHouse-Key", c.AnalystPassword)
}

func get(ctx context.Context, u string, header ...string) (status int, body []byte) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return 0, []byte(err.Error())
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, []byte(err.Error())
	}
	defer func() { _ = resp.Body.Close() }()
	body, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, []byte(err.Error())
	}
	return resp.StatusCode, body
}

// eventually polls a foreign process until done says so.
func eventually(ctx context.Context, t *testing.T, what string, done func() (bool, string)) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, state := done()
		if ok {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v; last: %s", what, context.Cause(ctx), state)
		case <-tick.C:
		}
	}
}

// call makes a call as a client of the demo does.
func (u *up) call(ctx context.Context, account string) (status int, body []byte) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+u.gateway+"/v1/chat/completions", strings.NewReader(`{"model":"small","messages":[]}`))
	if err != nil {
		return 0, []byte(err.Error())
	}
	req.Header.Set("Authorization", "Bearer "+demo.Key(account))
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, []byte(err.Error())
	}
	defer func() { _ = resp.Body.Close() }()
	body, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, []byte(err.Error())
	}
	return resp.StatusCode, body
}

// A newcomer's first minutes: start, 402 at the quota, unblocked at the minute's
// turn, everything to be read by ordinary clients, Ctrl-C, and a second start
// that is quick and remembers.
func TestTheFirstMinutesOfANewcomer(t *testing.T) {
	t.Parallel()
	ctx := within(t, 3*time.Minute)
	dir := t.TempDir()
	u := startUp(t, dir)
	ready := func() (bool, string) {
		status, body := get(ctx, "http://"+u.api+"/readyz")
		return status == http.StatusOK, string(body)
	}
	eventually(ctx, t, "first start", ready)
	lines := u.parts(ctx, t, "ready")
	if status, body := curl(ctx, t, tries(t, lines)); status != http.StatusOK || !strings.Contains(body, "usage") {
		t.Errorf("the printed command: %d %s", status, body)
	}
	for _, key := range demo.Keys() {
		if !strings.Contains(strings.Join(lines, "\n"), key) {
			t.Errorf("the key %s is not shown", key)
		}
	}

	// Use up the 60 calls a minute of an account, well before the minute ends.
	if left := 60 - time.Now().Second(); left < 8 {
		eventually(ctx, t, "the minute's turn", func() (bool, string) { return time.Now().Second() < 30, "" })
	}
	var problem struct {
		Status     int       `json:"status"`
		Code       string    `json:"code"`
		Meter      string    `json:"meter"`
		Limit      int64     `json:"limit"`
		Used       int64     `json:"used"`
		PeriodEnd  time.Time `json:"period_end"`
		DecisionID string    `json:"decision_id"`
	}
	eventually(ctx, t, "402", func() (bool, string) {
		status, body := u.call(ctx, "litware")
		if status != http.StatusPaymentRequired {
			return false, fmt.Sprint(status, " ", string(body))
		}
		if err := json.Unmarshal(body, &problem); err != nil {
			t.Fatalf("the 402's body: %v", err)
		}
		return true, ""
	})
	if problem.Code != "QUOTA_EXCEEDED" || problem.Meter != "calls" || problem.Limit != 60 || problem.Used < 60 || problem.DecisionID == "" || problem.Status != 402 {
		t.Errorf("the 402 says %+v", problem)
	}
	if until := time.Until(problem.PeriodEnd); until <= 0 || until > time.Minute {
		t.Errorf("the block ends at %s, which is not this minute's end", problem.PeriodEnd)
	}
	eventually(ctx, t, "unblocked", func() (bool, string) {
		status, body := u.call(ctx, "litware")
		return status == http.StatusOK, fmt.Sprint(status, " ", string(body))
	})
	if late := time.Since(problem.PeriodEnd); late > 2*time.Second || late < -50*time.Millisecond {
		t.Errorf("unblocked %s after the period's end", late)
	}

	// Ordinary clients read what happened: NATS on its port, ClickHouse on both.
	nc, err := nats.Connect("nats://" + u.nats)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(ctx, ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Msgs; n == 0 {
		t.Error("the ledger is empty")
	}
	query := "SELECT countIf(code = ''), countIf(code = 'QUOTA_EXCEEDED') FROM tollkeeper.v_calls WHERE account = 'litware'"
	eventually(ctx, t, "ClickHouse over HTTP", func() (bool, string) {
		status, body := u.history(ctx, query)
		fields := strings.Fields(string(body))
		if status != http.StatusOK || len(fields) != 2 {
			return false, string(body)
		}
		admitted, _ := strconv.Atoi(fields[0])
		refused, _ := strconv.Atoi(fields[1])
		return admitted > 60 && refused > 0, string(body)
	})
	if status, body := get(ctx, "http://"+u.api+"/"); status != http.StatusOK || !strings.Contains(string(body), "<title>") {
		t.Errorf("the page: %d %s", status, body)
	}

	if took := u.interrupt(t, syscall.SIGINT); took > 5*time.Second {
		t.Errorf("Ctrl-C took %s", took)
	}
	start := time.Now()
	u = startUp(t, dir, "--no-demo")
	eventually(ctx, t, "second start", func() (bool, string) {
		status, body := get(ctx, "http://"+u.api+"/readyz")
		return status == http.StatusOK, string(body)
	})
	lines = u.parts(ctx, t, "none")
	if status, body := curl(ctx, t, tries(t, lines)); status != http.StatusOK {
		t.Errorf("the printed command: %d %s", status, body)
	}
	if !slices.ContainsFunc(lines, func(s string) bool { return strings.HasPrefix(s, "There is no gateway: ") }) {
		t.Errorf("without a gateway: %q", lines)
	}
	t.Logf("second start: ready after %s", time.Since(start).Round(time.Millisecond))
	status, body := get(ctx, "http://"+u.api+"/v1/accounts/litware")
	var account struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(body, &account); err != nil || status != http.StatusOK {
		t.Errorf("the account after the second start: %d %s (%v)", status, body, err)
	}
	if took := u.interrupt(t, syscall.SIGHUP); took > 5*time.Second {
		t.Errorf("SIGHUP took %s", took)
	}
}
