package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// Kinds of processes.
const (
	NATS       = "nats"
	ClickHouse = "clickhouse"
	Aggregator = "aggregator"
	Historian  = "historian"
	Gateway    = "gateway"
	Auditor    = "auditor"
)

// Options of a fleet.
type Options struct {
	// Dir holds everything, logs included.
	Dir string
	// Programs is the folder with the programs tollkeeper, aggregator, historian,
	// gateway and auditor.
	Programs string
	// Nodes of NATS: 1, or 3 as a cluster in which every stream has 3 replicas.
	Nodes int
	// Aggregators and Gateways: how many; 1 when 0.
	Aggregators, Gateways int
	// NoHistory leaves ClickHouse and the historian out.
	NoHistory bool
	// Auditor holds all points against each other as well; it needs the history.
	Auditor bool
	// SpoolBeforeAnswer of the gateways.
	SpoolBeforeAnswer bool
	// UnknownMaxCalls passes for an account whose verdict can't be known.
	UnknownMaxCalls uint32
	// Upstream of the gateways: a URL that they can reach.
	Upstream string
	// Links lets every aggregator and gateway reach NATS over a Link of its own.
	// For one node only: clients of a cluster find its other nodes by themselves.
	Links bool
	// Net puts NATS, aggregators and gateways into network namespaces; nil:
	// everything is on loopback.
	Net *Namespaces
	// GatewayArgs and AggregatorArgs are added to the programs' own.
	GatewayArgs, AggregatorArgs []string
}

// The fleet's secrets guard nothing: they are needed where a listener is not on
// loopback.
const (
	natsUser = "soak"
	secret   = "soak"
)

// Fleet is all processes of a Tollkeeper. Its methods are safe for concurrent use
// once Start has returned.
type Fleet struct {
	o         Options
	processes []*Process
	links     map[string]*Link
	gateways  []gatewayAt
	nats      []string // host:port as others reach it
	native    string   // ClickHouse
	http      string
	password  string
}

type gatewayAt struct{ proxy, admin string }

// Start starts all of it and returns when everything answers. On an error
// nothing is left running.
func Start(ctx context.Context, o Options) (*Fleet, error) {
	o.Nodes, o.Aggregators, o.Gateways = max(o.Nodes, 1), max(o.Aggregators, 1), max(o.Gateways, 1)
	f := &Fleet{o: o, links: map[string]*Link{}}
	if err := f.start(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (f *Fleet) start(ctx context.Context) error {
	if err := f.addNATS(); err != nil {
		return err
	}
	if err := f.startAll(f.processes); err != nil {
		return err
	}
	for _, addr := range f.nats {
		if err := awaitPort(ctx, addr); err != nil {
			return fmt.Errorf("NATS: %w", err)
		}
	}
	if !f.o.NoHistory {
		if err := f.startClickHouse(ctx); err != nil {
			return err
		}
	}
	if err := f.addServices(); err != nil {
		return err
	}
	if err := f.startAll(f.processes); err != nil {
		return err
	}
	for i := range f.gateways {
		if err := f.awaitReady(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (f *Fleet) startAll(list []*Process) error {
	var errs []error
	for _, p := range list {
		errs = append(errs, p.Start())
	}
	return errors.Join(errs...)
}

// add remembers a process; place is where its namespace is named by.
func (f *Fleet) add(kind string, number int, env []string, argv ...string) *Process {
	name := kind
	if number > 0 {
		name += "-" + strconv.Itoa(number)
	}
	if f.o.Net != nil {
		argv = f.o.Net.inside(name, argv)
	}
	p := &Process{Name: name, Kind: kind, Log: filepath.Join(f.o.Dir, name+".log"), argv: argv, env: env}
	f.processes = append(f.processes, p)
	return p
}

func (f *Fleet) addNATS() error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("the harness's own program: %w", err)
	}
	nodes := make([]node, f.o.Nodes)
	var routes []string
	for i := range nodes {
		number := i + 1
		n := node{Name: fmt.Sprintf("n%d", number), StoreDir: filepath.Join(f.o.Dir, fmt.Sprintf("nats-%d", number)), User: natsUser, Password: secret}
		if n.Host, n.Port, err = f.place(NATS, number, 4222); err != nil {
			return err
		}
		if f.o.Nodes > 1 {
			if _, n.ClusterPort, err = f.place(NATS, number, 6222); err != nil {
				return err
			}
			routes = append(routes, "nats://"+net.JoinHostPort(n.Host, strconv.Itoa(n.ClusterPort)))
		}
		nodes[i] = n
		f.nats = append(f.nats, net.JoinHostPort(n.Host, strconv.Itoa(n.Port)))
	}
	for i, n := range nodes {
		n.Routes = routes
		value, err := json.Marshal(n)
		if err != nil {
			return fmt.Errorf("NATS node: %w", err)
		}
		f.add(NATS, i+1, []string{nodeVariable + "=" + string(value)}, self)
	}
	return nil
}

// place returns where a process listens: on a free port of loopback, or on a
// port of its own in its namespace.
func (f *Fleet) place(kind string, number, port int) (string, int, error) {
	if f.o.Net != nil {
		host, err := f.o.Net.host(kind + "-" + strconv.Itoa(number))
		return host, port, err
	}
	addr, err := FreeAddr()
	if err != nil {
		return "", 0, err
	}
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.Atoi(p)
	return host, n, err
}

// FreeAddr returns an address of loopback on which nobody listens. Its port is
// below those that the kernel gives to connections, so that it is still free
// when a killed process wants it back.
func FreeAddr() (string, error) {
	var last error
	for range 100 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(20_000+rand.IntN(12_000)))
		l, err := net.Listen("tcp", addr)
		if err != nil {
			last = err
			continue
		}
		return addr, l.Close()
	}
	return "", fmt.Errorf("no free port: %w", last)
}

func (f *Fleet) startClickHouse(ctx context.Context) (err error) {
	if f.native, err = FreeAddr(); err != nil {
		return err
	}
	if f.http, err = FreeAddr(); err != nil {
		return err
	}
	data := filepath.Join(f.o.Dir, "data")
	p := f.add(ClickHouse, 0, nil, filepath.Join(f.o.Programs, "tollkeeper"), "clickhouse", "--data-dir", data, "--clickhouse-listen", f.native, "--clickhouse-http-listen", f.http)
	if err := p.Start(); err != nil {
		return err
	}
	if err := awaitPort(ctx, f.native); err != nil {
		return fmt.Errorf("ClickHouse: %w", err)
	}
	c, err := embedclickhouse.ReadCredentials(filepath.Join(data, "clickhouse"))
	if err != nil {
		return err
	}
	f.password = c.ServicePassword
	return nil
}

func (f *Fleet) addServices() error {
	replicas := "1"
	if f.o.Nodes > 1 {
		replicas = "3"
	}
	for i := 1; i <= f.o.Aggregators; i++ {
		url, err := f.natsURL(Aggregator, i)
		if err != nil {
			return err
		}
		if f.o.Net != nil {
			if _, err := f.o.Net.host(Aggregator + "-" + strconv.Itoa(i)); err != nil {
				return err
			}
		}
		f.add(Aggregator, i, f.secrets(), append([]string{
			filepath.Join(f.o.Programs, "aggregator"), "--nats-url", url, "--admin-listen", "", "--replicas", replicas, "--snapshot-interval", "5s", "--log-format", "json",
			"--member", fmt.Sprintf("%s-%d", Aggregator, i),
		}, f.o.AggregatorArgs...)...)
	}
	if !f.o.NoHistory {
		f.add(Historian, 0, append(f.secrets(), "TOLLKEEPER_CLICKHOUSE_PASSWORD="+f.password),
			filepath.Join(f.o.Programs, "historian"), "--nats-url", f.urls(), "--clickhouse-addr", f.native, "--admin-listen", "", "--replicas", replicas, "--log-format", "json")
	}
	if f.o.Auditor && !f.o.NoHistory {
		f.add(Auditor, 0, append(f.secrets(), "TOLLKEEPER_CLICKHOUSE_PASSWORD="+f.password),
			filepath.Join(f.o.Programs, "auditor"), "--nats-url", f.urls(), "--clickhouse-addr", f.native, "--admin-listen", "", "--replicas", replicas, "--log-format", "json",
			"--every", "2s", "--overdue", "30s")
	}
	for i := 1; i <= f.o.Gateways; i++ {
		url, err := f.natsURL(Gateway, i)
		if err != nil {
			return err
		}
		host, port, err := f.place(Gateway, i, 8080)
		if err != nil {
			return err
		}
		_, adminPort, err := f.place(Gateway, i, 8081)
		if err != nil {
			return err
		}
		if f.o.Net != nil {
			if host, err = f.o.Net.front(Gateway + "-" + strconv.Itoa(i)); err != nil {
				return err
			}
		}
		at := gatewayAt{net.JoinHostPort(host, strconv.Itoa(port)), net.JoinHostPort(host, strconv.Itoa(adminPort))}
		f.gateways = append(f.gateways, at)
		argv := []string{
			filepath.Join(f.o.Programs, "gateway"), "--nats-url", url, "--upstream", f.o.Upstream, "--gateway-listen", at.proxy, "--gateway-admin-listen", at.admin,
			"--spool-dir", filepath.Join(f.o.Dir, fmt.Sprintf("spool-%d", i)), "--name", fmt.Sprintf("gateway-%d", i), "--log-format", "json",
		}
		if f.o.UnknownMaxCalls > 0 {
			argv = append(argv, "--unknown-max-calls", strconv.FormatUint(uint64(f.o.UnknownMaxCalls), 10))
		}
		if f.o.SpoolBeforeAnswer {
			argv = append(argv, "--spool-before-answer")
		}
		f.add(Gateway, i, f.secrets(), append(argv, f.o.GatewayArgs...)...)
	}
	return nil
}

func (f *Fleet) secrets() []string {
	return []string{"TOLLKEEPER_NATS_USER=" + natsUser, "TOLLKEEPER_NATS_PASSWORD=" + secret, "TOLLKEEPER_ADMIN_TOKEN=" + secret}
}

// urls of NATS, without a link.
func (f *Fleet) urls() string {
	list := make([]string, len(f.nats))
	for i, addr := range f.nats {
		list[i] = "nats://" + addr
	}
	return strings.Join(list, ",")
}

// natsURL is how a process reaches NATS.
func (f *Fleet) natsURL(kind string, number int) (string, error) {
	if !f.o.Links {
		return f.urls(), nil
	}
	if len(f.nats) > 1 {
		return "", errors.New("links are for one node of NATS")
	}
	k, err := NewLink(f.nats[0])
	if err != nil {
		return "", err
	}
	f.links[kind+"-"+strconv.Itoa(number)] = k
	return "nats://" + k.Addr(), nil
}

// Processes are all processes, in the order of their start.
func (f *Fleet) Processes() []*Process { return f.processes }

// Process returns a process by its name; nil: there is none.
func (f *Fleet) Process(name string) *Process {
	for _, p := range f.processes {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// Cut pulls a process's cable to NATS; Mend plugs it in again. Only processes of
// a fleet with links or namespaces have one.
func (f *Fleet) Cut(name string) error {
	if k := f.links[name]; k != nil {
		k.Cut()
		return nil
	}
	if f.o.Net != nil {
		return f.o.Net.cut(name)
	}
	return fmt.Errorf("%s has no cable", name)
}

// Mend is described at Cut.
func (f *Fleet) Mend(name string) error {
	if k := f.links[name]; k != nil {
		k.Mend()
		return nil
	}
	if f.o.Net != nil {
		return f.o.Net.mend(name)
	}
	return fmt.Errorf("%s has no cable", name)
}

// CanCut says whether a process has a cable.
func (f *Fleet) CanCut(name string) bool {
	return f.links[name] != nil || f.o.Net != nil && f.o.Net.has(name)
}

// GatewayURLs are the proxies' addresses.
func (f *Fleet) GatewayURLs() []string {
	out := make([]string, len(f.gateways))
	for i, g := range f.gateways {
		out[i] = "http://" + g.proxy
	}
	return out
}

// NATSOptions connect to NATS as the harness does.
func (f *Fleet) NATSOptions() natsconn.Options {
	return natsconn.Options{URL: f.urls(), User: natsUser, Password: secret, Name: "soak", Logger: zerolog.Nop()}
}

// NodeOptions connect to one node of NATS.
func (f *Fleet) NodeOptions(i int) natsconn.Options {
	o := f.NATSOptions()
	o.URL = "nats://" + f.nats[i]
	return o
}

// HistoryOptions connect to ClickHouse.
func (f *Fleet) HistoryOptions() history.Options {
	return history.Options{Addrs: []string{f.native}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: f.password, Logger: zerolog.Nop()}
}

// ClickHouseHTTP is the base URL of ClickHouse's HTTP interface.
func (f *Fleet) ClickHouseHTTP() string { return "http://" + f.http }

// AdminGet asks a gateway's admin listener; gateways count from 0.
func (f *Fleet) AdminGet(ctx context.Context, gateway int, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+f.gateways[gateway].admin+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	return http.DefaultClient.Do(req)
}

// AwaitReady waits until every gateway is ready.
func (f *Fleet) AwaitReady(ctx context.Context) error {
	for i := range f.gateways {
		if err := f.awaitReady(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

func (f *Fleet) awaitReady(ctx context.Context, i int) error {
	last := errors.New("it was not asked")
	return poll(ctx, func() (bool, error) {
		ask, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		resp, err := f.AdminGet(ask, i, "/readyz")
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return true, nil
			}
			err = fmt.Errorf("status %d", resp.StatusCode)
		}
		last = err
		return false, nil
	}, func() error { return fmt.Errorf("gateway-%d is not ready: %w", i+1, last) })
}

// StateHashes has the state of every shard recomputed from the ledger and compared
// with snapshots and running aggregators, by the program's own command. Its error
// says what differs.
func (f *Fleet) StateHashes(ctx context.Context) error {
	c := exec.CommandContext(ctx, filepath.Join(f.o.Programs, "tollkeeper"), "audit", "--nats-url", f.urls())
	c.Env = append(os.Environ(), f.secrets()...)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("tollkeeper audit: %w\n%s", err, out)
	}
	return nil
}

// Close ends everything in the reverse of its order, and returns what did not end
// in time.
func (f *Fleet) Close() error {
	var errs []error
	for _, k := range f.links {
		k.Mend()
	}
	for i := len(f.processes) - 1; i >= 0; i-- {
		p := f.processes[i]
		_ = p.Thaw() // it may not run
		errs = append(errs, p.Stop(15*time.Second))
	}
	for _, k := range f.links {
		_ = k.Close() // nobody uses it any more
	}
	return errors.Join(errs...)
}

func awaitPort(ctx context.Context, addr string) error {
	var last error
	return poll(ctx, func() (bool, error) {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
		if err != nil {
			last = err
			return false, nil
		}
		return true, c.Close()
	}, func() error { return fmt.Errorf("nothing listens: %w", last) })
}

// poll asks a foreign process until it says yes, for a minute at most.
func poll(ctx context.Context, ask func() (bool, error), why func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := ask()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(why(), context.Cause(ctx))
		case <-tick.C:
		}
	}
}
