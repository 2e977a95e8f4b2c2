package ownership

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership/fleet"
)

// quick is for tests that wait for balance.
var quick = fleet.Timing{Settle: 200 * time.Millisecond, Dwell: 500 * time.Millisecond}

// register is where the callbacks of a fleet say what they do. It refuses
// nothing: it tells when two act on a shard.
type register struct {
	t  *testing.T
	mu sync.Mutex
	// owner of each shard, its token, and when somebody acted last.
	owner  []string
	token  []uint64
	acted  []time.Time
	gap    time.Duration // longest time without an act since reset
	moves  int
	change chan struct{}
}

func newRegister(t *testing.T, shards int) *register {
	return &register{t: t, owner: make([]string, shards), token: make([]uint64, shards), acted: make([]time.Time, shards), change: make(chan struct{})}
}

func (r *register) changed() {
	close(r.change)
	r.change = make(chan struct{})
}

func (r *register) acquire(member string, c *Claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.Token <= r.token[c.Shard] {
		r.t.Errorf("%s has shard %d with token %d after %d", member, c.Shard, c.Token, r.token[c.Shard])
	}
	r.moves++
	r.owner[c.Shard], r.token[c.Shard] = member, c.Token
	r.changed()
}

func (r *register) act(member string, c *Claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.token[c.Shard] != c.Token {
		r.t.Errorf("%s acts on shard %d with token %d though %s has it with %d", member, c.Shard, c.Token, r.owner[c.Shard], r.token[c.Shard])
	}
	now := time.Now()
	if last := r.acted[c.Shard]; !last.IsZero() {
		r.gap = max(r.gap, now.Sub(last))
	}
	r.acted[c.Shard] = now
}

func (r *register) release(c *Claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.token[c.Shard] == c.Token {
		r.owner[c.Shard] = ""
		r.changed()
	}
}

// reset forgets gaps and moves up to now.
func (r *register) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gap, r.moves = 0, 0
}

func (r *register) seen() (gap time.Duration, moves int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gap, r.moves
}

func (r *register) owners() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.owner)
}

func (r *register) counts() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := map[string]int{}
	for _, o := range r.owner {
		n[o]++
	}
	return n
}

// patience ends a test that hangs. How soon a shard has another owner, the
// simulation tells by its own clock: here others take the processors.
const patience = 30 * time.Second

// until waits until the members own given numbers of shards, and returns how long.
func (r *register) until(what string, cond func(map[string]int) bool) time.Duration {
	r.t.Helper()
	start := time.Now()
	over := time.After(patience)
	for {
		r.mu.Lock()
		change := r.change
		r.mu.Unlock()
		if cond(r.counts()) {
			return time.Since(start)
		}
		select {
		case <-change:
		case <-over:
			r.t.Fatalf("not within %v: %s: %v", patience, what, r.counts())
		}
	}
}

func shared(members ...string) func(map[string]int) bool {
	return func(n map[string]int) bool {
		total, low, high := 0, 1<<30, 0
		for _, c := range n {
			total += c
		}
		for _, m := range members {
			low, high = min(low, n[m]), max(high, n[m])
			total -= n[m]
		}
		return total == 0 && high-low <= 1
	}
}

// running is a member of the test's fleet.
type running struct {
	name string
	nc   *nats.Conn
	stop context.CancelFunc
	done chan error
}

func (r *register) start(url, name string, o Options) *running {
	r.t.Helper()
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectBufSize(-1))
	if err != nil {
		r.t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(r.t.Context())
	x := &running{name: name, nc: nc, stop: stop, done: make(chan error, 1)}
	o.NC, o.JS, o.Member, o.Shards, o.Registerer = nc, js, name, uint32(len(r.owner)), prometheus.NewRegistry()
	o.OnAcquire = func(ctx context.Context, c *Claim) error {
		r.acquire(name, c)
		defer r.release(c)
		beat := time.NewTicker(2 * time.Millisecond)
		defer beat.Stop()
		for {
			if c.Check() == nil {
				r.act(name, c)
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-c.Drain():
				return nil
			case <-beat.C:
			}
		}
	}
	go func() { x.done <- Run(ctx, o) }()
	r.t.Cleanup(func() { x.end(r.t); nc.Close() })
	return x
}

// end stops a member in an orderly way.
func (x *running) end(t *testing.T) {
	t.Helper()
	x.stop()
	select {
	case err := <-x.done:
		if err != nil {
			t.Errorf("%s ended with %v", x.name, err)
		}
		x.done <- nil
	case <-time.After(10 * time.Second):
		t.Errorf("%s does not end", x.name)
	}
}

func server(t *testing.T) *embednats.Server {
	t.Helper()
	s, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopServer(t, s) })
	return s
}

func stopServer(t *testing.T, s *embednats.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func TestTwoMembersShareAndOneTakesOverFromOneThatIsCut(t *testing.T) {
	t.Parallel()
	url := server(t).ClientURL()
	r := newRegister(t, 16)
	a := r.start(url, "a", Options{Timing: quick})
	took := r.until("a has all", shared("a"))
	t.Logf("alone: %v", took)
	r.start(url, "b", Options{Timing: quick})
	r.until("both share", shared("a", "b"))
	r.reset()
	a.nc.Close()
	took = r.until("b has all", shared("b"))
	t.Logf("cut: owned again after %v", took)
}

func TestThreeMembersTakeOverHandOverAndRestart(t *testing.T) {
	t.Parallel()
	url := server(t).ClientURL()
	// Who is only slow is not to be taken for dead, and what waits for a death is
	// to be seen.
	calm := quick
	calm.TTL = 5 * time.Second
	r := newRegister(t, 24)
	fleet := map[string]*running{}
	for _, name := range []string{"a", "b", "c"} {
		fleet[name] = r.start(url, name, Options{Timing: calm})
	}
	r.until("all share", shared("a", "b", "c"))
	for _, name := range []string{"a", "b", "c"} {
		r.reset()
		fleet[name].end(t)
		var rest []string
		for other := range fleet {
			if other != name {
				rest = append(rest, other)
			}
		}
		r.until("the others have its shards", func(n map[string]int) bool { return n[""] == 0 && n[name] == 0 })
		gap, moves := r.seen()
		if moves != 8 {
			t.Errorf("%s had 8 shards, %d moved", name, moves)
		}
		t.Logf("orderly end: a shard was without an act for at most %v", gap)
		if gap >= calm.TTL {
			t.Errorf("a shard was without an owner for %v in an orderly end, as if %s had died", gap, name)
		}
		fleet[name] = r.start(url, name, Options{Timing: calm})
		r.until("all share again", shared("a", "b", "c"))
	}
	r.reset()
	fleet["b"].nc.Close()
	took := r.until("the others have its shards", func(n map[string]int) bool { return n[""] == 0 && n["b"] == 0 })
	t.Logf("cut: owned again after %v", took)
	if _, moves := r.seen(); moves != 8 {
		t.Errorf("8 shards were lost, %d moved", moves)
	}
}

func TestALoopThatHangsDoesNotActAndComesBackAsANewcomer(t *testing.T) {
	t.Parallel()
	url := server(t).ClientURL()
	r := newRegister(t, 8)
	r.start(url, "a", Options{Timing: quick})
	hung, wake := make(chan struct{}), make(chan struct{})
	var hang sync.Once
	var on atomic.Bool
	r.start(url, "b", Options{Timing: quick, hang: func() {
		if on.Load() {
			hang.Do(func() { close(hung); <-wake })
		}
	}})
	r.until("both share", shared("a", "b"))
	on.Store(true)
	<-hung
	// Its callbacks end though its loop hangs: nothing but the clock does it.
	took := r.until("a has all", shared("a"))
	t.Logf("hung: owned again after %v", took)
	close(wake)
	r.until("both share", shared("a", "b"))
}

func TestARestartOfNATSMovesNothing(t *testing.T) {
	t.Parallel()
	s := server(t)
	r := newRegister(t, 12)
	r.start(s.ClientURL(), "a", Options{Timing: quick})
	r.start(s.ClientURL(), "b", Options{Timing: quick})
	r.until("both share", shared("a", "b"))
	before := r.owners()
	stopServer(t, s)
	r.until("nobody acts without proof", func(n map[string]int) bool { return n[""] == 12 })
	back, err := embednats.Start(t.Context(), s.Options())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopServer(t, back) })
	took := r.until("both share", shared("a", "b"))
	t.Logf("restart: owned again after %v", took)
	if after := r.owners(); !slices.Equal(after, before) {
		t.Errorf("the owners were %v and are %v", before, after)
	}
}

func TestALostLeaderOfAnR3BucketStopsNothingForLongerThanTheElection(t *testing.T) {
	t.Parallel()
	var nodes []embednats.Options
	for _, name := range []string{"n1", "n2", "n3"} {
		nodes = append(nodes, embednats.Options{Name: name, StoreDir: t.TempDir(), Cluster: &embednats.ClusterOptions{Name: "toll"}})
	}
	servers, err := embednats.StartCluster(t.Context(), nodes)
	if err != nil {
		t.Fatal(err)
	}
	var urls []string
	for _, s := range servers {
		t.Cleanup(func() { stopServer(t, s) })
		urls = append(urls, s.ClientURL())
	}
	url := strings.Join(urls, ",")
	r := newRegister(t, 12)
	for _, name := range []string{"a", "b", "c"} {
		r.start(url, name, Options{Timing: quick, Replicas: 3})
	}
	r.until("all share", shared("a", "b", "c"))
	before := r.owners()
	leader := -1
	for i, s := range servers {
		if s.LeadsStream("KV_" + DefaultBucket) {
			leader = i
		}
	}
	if leader < 0 {
		t.Fatal("nobody leads the bucket")
	}
	r.reset()
	start := time.Now()
	stopServer(t, servers[leader])
	// An election after a death takes some seconds; one who stops in order
	// hands the lead over first.
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	over := time.After(15 * time.Second)
	for led := false; !led; {
		select {
		case <-look.C:
		case <-over:
			t.Fatal("nobody leads the bucket any more")
		}
		for i, s := range servers {
			led = led || i != leader && s.LeadsStream("KV_"+DefaultBucket)
		}
	}
	election := time.Since(start)
	took := r.until("all share", shared("a", "b", "c"))
	gap, moves := r.seen()
	t.Logf("lost leader: elected %v after the stop began, all owned %v later; longest time without an act %v, %d times acquired anew", election, took, gap, moves)
	if after := r.owners(); !slices.Equal(after, before) {
		t.Errorf("the owners were %v and are %v", before, after)
	}
}

func TestAKilledLeaderOfAnR3BucketIsOutlivedWithinItsElection(t *testing.T) {
	t.Parallel()
	// Two nodes here, one in a process that can be killed.
	var routes []string
	var ports []int
	for len(ports) < 3 {
		// Below the range that systems give away: tests beside this one must
		// not be given the port before the node opens it.
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
		routes = append(routes, "nats://"+l.Addr().String())
		l.Close()
	}
	node := func(i int) embednats.Options {
		return embednats.Options{Name: fmt.Sprintf("n%d", i), StoreDir: t.TempDir(), Cluster: &embednats.ClusterOptions{Name: "toll", Port: ports[i], Routes: routes}}
	}
	text, err := json.Marshal(node(2))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childNode+"="+string(text))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var urls []string
	var servers []*embednats.Server
	for i := range 2 {
		s, err := embednats.Start(t.Context(), node(i))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stopServer(t, s) })
		servers = append(servers, s)
		urls = append(urls, s.ClientURL())
	}
	r := newRegister(t, 12)
	a := r.start(strings.Join(urls, ","), "a", Options{Timing: quick, Replicas: 3})
	r.start(strings.Join(urls, ","), "b", Options{Timing: quick, Replicas: 3})
	r.until("both share", shared("a", "b"))

	stream := "KV_" + DefaultBucket
	leads := func() string {
		m, err := a.nc.Request("$JS.API.STREAM.INFO."+stream, nil, time.Second)
		if err != nil {
			return ""
		}
		var info jetstream.StreamInfo
		if json.Unmarshal(m.Data, &info) != nil || info.Cluster == nil {
			return ""
		}
		return info.Cluster.Leader
	}
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	over := time.After(20 * time.Second)
	for leads() != "n2" {
		_, err := a.nc.Request("$JS.API.STREAM.LEADER.STEPDOWN."+stream, []byte(`{"placement":{"preferred":"n2"}}`), time.Second)
		if err != nil {
			t.Log(err)
		}
		select {
		case <-look.C:
		case <-over:
			t.Fatal("the node that is to be killed does not come to lead")
		}
	}
	r.until("both share", shared("a", "b"))
	before := r.owners()
	r.reset()
	start := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	over = time.After(20 * time.Second)
	for led := false; !led; {
		select {
		case <-look.C:
		case <-over:
			t.Fatal("nobody leads the bucket any more")
		}
		led = servers[0].LeadsStream(stream) || servers[1].LeadsStream(stream)
	}
	election := time.Since(start)
	took := r.until("both share again", shared("a", "b"))
	gap, moves := r.seen()
	t.Logf("killed leader: elected after %v, all owned %v later; longest time without an act %v, %d times acquired anew", election, took, gap, moves)
	if after := r.owners(); !slices.Equal(after, before) {
		t.Errorf("the owners were %v and are %v", before, after)
	}
}

// A process that is stopped and continued, or killed: the test runs itself as the
// other member, or as a node of NATS.
const (
	childURL  = "OWNERSHIP_TEST_URL"
	childNode = "OWNERSHIP_TEST_NODE"
)

func TestMain(m *testing.M) {
	if text := os.Getenv(childNode); text != "" {
		var o embednats.Options
		err := json.Unmarshal([]byte(text), &o)
		if err == nil {
			_, err = embednats.Start(context.Background(), o)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		select {}
	}
	if url := os.Getenv(childURL); url != "" {
		if err := child(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child acts by publishing its token; it ends with its standard input.
func child(url string) error {
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		cancel()
	}()
	return Run(ctx, Options{NC: nc, JS: js, Member: "child", Shards: 8, Timing: quick, OnAcquire: func(ctx context.Context, c *Claim) error {
		for ctx.Err() == nil {
			select {
			case <-c.Drain():
				return nil
			default:
			}
			if c.Check() == nil {
				// Asked, not published: what stands in a client's buffer when its
				// process is stopped leaves when it goes on.
				_, err := nc.RequestWithContext(ctx, fmt.Sprintf("acts.%d", c.Shard), fmt.Append(nil, c.Token))
				if err != nil && ctx.Err() == nil {
					return err
				}
			}
		}
		return nil
	}})
}

func TestAProcessThatIsStoppedAndContinuedDoesNotAct(t *testing.T) {
	t.Parallel()
	url := server(t).ClientURL()
	r := newRegister(t, 8)
	a := r.start(url, "a", Options{Timing: quick})
	r.until("a has all", shared("a"))

	acts := make(chan bool, 1<<16) // whether one came too late
	sub, err := a.nc.Subscribe("acts.*", func(m *nats.Msg) {
		var shard uint32
		var token uint64
		if _, err := fmt.Sscanf(m.Subject+" "+string(m.Data), "acts.%d %d", &shard, &token); err != nil {
			t.Errorf("%s %s: %v", m.Subject, m.Data, err)
			return
		}
		r.mu.Lock()
		late := r.token[shard] > token
		r.mu.Unlock()
		if err := m.Respond(nil); err != nil {
			t.Error(err)
		}
		acts <- late
	})
	if err != nil {
		t.Fatal(err)
	}
	take := func(n int) (late int) {
		t.Helper()
		over := time.After(10 * time.Second)
		for range n {
			select {
			case l := <-acts:
				if l {
					late++
				}
			case <-over:
				t.Fatal("the other process does not act")
			}
		}
		return late
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childURL+"="+url)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	r.until("it has half", func(n map[string]int) bool { return n["a"] == 4 })
	if late := take(500); late > 0 {
		t.Errorf("%d acts came too late before it was stopped", late)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	took := r.until("a has all", shared("a"))
	t.Logf("SIGSTOP: owned again after %v", took)
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	r.until("it has half again", func(n map[string]int) bool { return n["a"] == 4 })
	// At most one act a shard was between its check and its sending.
	late := take(len(acts) + 500)
	if late > 4 {
		t.Errorf("it acted %d times with tokens of before", late)
	}
	t.Logf("%d acts were under way when it was stopped", late)
}

func TestABucketThatIsMadeOtherwiseIsRefused(t *testing.T) {
	t.Parallel()
	nc, err := nats.Connect(server(t).ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: DefaultBucket}); err != nil {
		t.Fatal(err)
	}
	o := Options{NC: nc, JS: js, Member: "a", Shards: 1, OnAcquire: func(context.Context, *Claim) error { return nil }}
	if err := Run(t.Context(), o); !errors.Is(err, errUnfit) || !strings.Contains(err.Error(), "delete it") {
		t.Errorf("got %v", err)
	}
	for name, spoil := range map[string]func(*Options){
		"name":   func(o *Options) { o.Member = "" },
		"shards": func(o *Options) { o.Shards = 0 },
		"TTL":    func(o *Options) { o.Timing.TTL = time.Hour },
		"safety": func(o *Options) { o.Timing.Safety = time.Second },
		"OnAcq":  func(o *Options) { o.OnAcquire = nil },
		"NATS":   func(o *Options) { o.NC = nil },
	} {
		bad := o
		spoil(&bad)
		if err := Run(t.Context(), bad); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
