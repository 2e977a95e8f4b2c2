// Package proxied measures calls through the gateway beside the same calls through
// Go's bare reverse proxy, and nginx where it is installed: every proxy in a process
// of its own, before the same upstream, under the same load, by turns.
package proxied

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Options of a run.
type Options struct {
	// Rounds of every row; one more warms up.
	Rounds int
	// Each is how long a proxy is loaded with a kind of call in a round.
	Each time.Duration
	// Callers at once; each has a connection, an account and a key.
	Callers int
	// Program is tollkeeper: the parts and the gateway are it.
	Program string
	// EngineDir is where the ClickHouse engine is installed.
	EngineDir string
	// Running returns the addresses of the Tollkeeper that runs in a data directory.
	Running func(dataDir string) (gateway, admin string, ok bool, err error)
	Out     io.Writer
}

// target is a proxy that is measured.
type target struct {
	name    string
	process *process
}

// row has the figures of a target for a kind of call, one a round.
type row struct {
	rate, p50, cost, ofBare, more []float64
}

// Run measures and prints.
func Run(ctx context.Context, o Options) (err error) {
	dir, err := os.MkdirTemp("", "tollkeeper-proxied-")
	if err != nil {
		return fmt.Errorf("make a scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	keys := make([]string, o.Callers)
	for i := range keys {
		keys[i] = "bench-key-" + strconv.Itoa(i)
	}
	targets, stop, err := startAll(ctx, o, dir, keys)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	rows := make(map[string]*row)
	for round := range o.Rounds + 1 {
		for _, kind := range [...]Kind{Plain, Chat, Stream} {
			if err := turn(ctx, o, targets, kind, round, keys, rows); err != nil {
				return err
			}
		}
	}
	return print(o, targets, rows)
}

// turn loads every target with one kind of call. The order rotates, so that no target
// always follows the same other one.
func turn(ctx context.Context, o Options, targets []target, kind Kind, round int, keys []string, rows map[string]*row) error {
	bare := 0
	figures := make([]row, len(targets))
	for i := range targets {
		at := (i + round) % len(targets)
		t, f := targets[at], &figures[at]
		before, err := cpu(t.process.cmd.Process.Pid)
		if err != nil {
			return err
		}
		many, err := drive(ctx, t.process.addr, kind, keys, o.Each)
		if err != nil {
			return t.process.failed(t.name, kind, err)
		}
		after, err := cpu(t.process.cmd.Process.Pid)
		if err != nil {
			return err
		}
		one, err := drive(ctx, t.process.addr, kind, keys[:1], o.Each/4)
		if err != nil {
			return t.process.failed(t.name, kind, err)
		}
		n := many.calls
		if kind == Stream {
			n *= streamEvents
		}
		f.rate = append(f.rate, float64(n)/many.took.Seconds())
		f.cost = append(f.cost, float64((after-before).Nanoseconds())/1e3/float64(n))
		f.p50 = append(f.p50, float64(one.p50.Nanoseconds())/1e6)
		if t.name == bareName {
			bare = at
		}
		// What a proxy has put off must not fall into the next one's turn.
		if err := wait(ctx, o.Each/4); err != nil {
			return err
		}
	}
	if round == 0 {
		return nil
	}
	for i, t := range targets {
		r := rows[t.name+strconv.Itoa(int(kind))]
		if r == nil {
			r = &row{}
			rows[t.name+strconv.Itoa(int(kind))] = r
		}
		f := &figures[i]
		r.rate, r.p50, r.cost = append(r.rate, f.rate...), append(r.p50, f.p50...), append(r.cost, f.cost...)
		r.ofBare = append(r.ofBare, f.rate[0]/figures[bare].rate[0])
		r.more = append(r.more, f.cost[0]-figures[bare].cost[0])
	}
	return nil
}

// await asks again and again until the answer is yes.
func await(ctx context.Context, ready func() (bool, error)) error {
	for {
		if ok, err := ready(); ok || err != nil {
			return err
		}
		if err := wait(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// Names of the targets.
const (
	bareName  = "Go's ReverseProxy with a pool of buffers"
	oursName  = "Tollkeeper: gateway, NATS, aggregator, historian, ClickHouse"
	nginxName = "nginx"
)

func print(o Options, targets []target, rows map[string]*row) error {
	tw := tabwriter.NewWriter(o.Out, 0, 0, 3, ' ', 0)
	_, err := fmt.Fprintf(o.Out, "\nproxied calls, %d callers; upstream, load and proxy each a process on the same %d CPUs\n", o.Callers, runtime.NumCPU())
	for _, kind := range [...]Kind{Plain, Chat, Stream} {
		for _, t := range targets {
			r := rows[t.name+strconv.Itoa(int(kind))]
			if r == nil {
				continue // of no round
			}
			beside := ""
			if t.name != bareName {
				beside = fmt.Sprintf("%.2f of bare", median(r.ofBare))
			}
			alone := fmt.Sprintf("%.2f ms", median(r.p50))
			if kind == Stream {
				// The upstream sets the pace; the cost tells.
				alone = ""
				if beside != "" {
					beside = fmt.Sprintf("%+.1f µs CPU", median(r.more))
				}
			}
			_, e := fmt.Fprintf(tw, "  %s: %s\t%.1f k/s\t%s\t%s\t%.1f µs CPU\n", kind, t.name, median(r.rate)/1e3, beside, alone, median(r.cost))
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, tw.Flush())
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// startAll starts the upstream and the proxies. stop ends those that were started,
// also when there is an error.
func startAll(ctx context.Context, o Options, dir string, keys []string) (targets []target, stop func() error, err error) {
	var running []*process
	stop = func() error {
		var err error
		for _, p := range slices.Backward(running) {
			err = errors.Join(err, p.stop())
		}
		return err
	}
	add := func(name string, p *process, err error) error {
		if p != nil {
			running = append(running, p)
			if name != "" {
				targets = append(targets, target{name, p})
			}
		}
		return err
	}
	upstream, err := part(o.Program, "upstream")
	if err = add("", upstream, err); err != nil {
		return nil, stop, err
	}
	bare, err := part(o.Program, "bare", "http://"+upstream.addr)
	if err = add(bareName, bare, err); err != nil {
		return nil, stop, err
	}
	ours, err := startTollkeeper(ctx, o, filepath.Join(dir, "tollkeeper"), "http://"+upstream.addr, keys)
	if err = add(oursName, ours, err); err != nil {
		return nil, stop, err
	}
	nginxDir := filepath.Join(dir, "nginx")
	if err := os.Mkdir(nginxDir, 0o755); err != nil {
		return nil, stop, err
	}
	// Its workers may be of another user, who must get through.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, stop, err
	}
	nginx, err := startNginx(ctx, nginxDir, upstream.addr)
	if err = add(nginxName, nginx, err); err != nil {
		return nil, stop, err
	}
	return targets, stop, nil
}

const gatewayConfig = `routes:
  - name: plain
    prefix: /
    upstream: %[1]s
  - name: chat
    prefix: /v1
    upstream: %[1]s
    profile: openai
    model: {json: model}
  - name: stream
    prefix: /stream
    upstream: %[1]s
    profile: openai
    model: {json: model}
`

// plansFile gives every account limits on calls and tokens that no bench reaches.
func plansFile(keys []string) string {
	var b strings.Builder
	b.WriteString(`version: 1
plans:
  - id: bench
    limits:
      - {id: calls, meter: calls, window: day, amount: 1000000000000}
      - {id: tokens, meter: output_tokens, window: month, amount: 1000000000000}
accounts:
`)
	for i, key := range keys {
		fmt.Fprintf(&b, "  - {id: bench-%d, plan: bench, keys: [{id: bench-%d, sha256: \"%x\"}]}\n", i, i, sha256.Sum256([]byte(key)))
	}
	return b.String()
}

// startTollkeeper starts all of Tollkeeper and waits until its gateway is ready.
func startTollkeeper(ctx context.Context, o Options, dir, upstream string, keys []string) (_ *process, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	config, plans := filepath.Join(dir, "gateway.yaml"), filepath.Join(dir, "plans.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, gatewayConfig, upstream), 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(plans, []byte(plansFile(keys)), 0o600); err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	arguments := []string{"up", "--no-demo", "--data-dir", data, "--gateway-config", config, "--plans", plans, "--log-level", "warn"}
	if o.EngineDir != "" {
		arguments = append(arguments, "--engine-dir", o.EngineDir)
	}
	for _, listen := range [...]string{"nats", "clickhouse", "clickhouse-http", "api", "gateway", "gateway-admin"} {
		arguments = append(arguments, "--"+listen+"-listen", "127.0.0.1:0")
	}
	p, err := start(exec.Command(o.Program, arguments...))
	if err != nil {
		return nil, err
	}
	within, cancel := context.WithTimeout(ctx, upWithin)
	defer cancel()
	if err := await(within, func() (bool, error) {
		gateway, admin, ok, err := o.Running(data)
		if err != nil || !ok {
			return false, err
		}
		p.addr = gateway
		return isReady(within, admin), nil
	}); err != nil {
		return nil, errors.Join(fmt.Errorf("tollkeeper up is not ready: %w", err), p.stop())
	}
	return p, nil
}

// upWithin is enough to fetch the engine.
const upWithin = 2 * time.Minute

func isReady(ctx context.Context, admin string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/readyz", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	return resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
}
