package embednats

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start starts a server that is stopped with the test.
func start(t *testing.T, o Options) *Server {
	t.Helper()
	if o.StoreDir == "" {
		o.StoreDir = t.TempDir()
	}
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func connect(t *testing.T, s *Server, opts ...nats.Option) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect(s.ClientURL(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func publish(t *testing.T, js jetstream.JetStream, subject, body string) uint64 {
	t.Helper()
	ack, err := js.Publish(t.Context(), subject, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	return ack.Sequence
}

func TestWhatWasAcknowledgedIsThereAfterARestart(t *testing.T) {
	t.Parallel()
	for name, sync := range map[string]time.Duration{"synced before the acknowledgement": 0, "synced now and then": time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := start(t, Options{StoreDir: dir, Sync: sync})
			js := connect(t, s)
			if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
				Name: "LEDGER", Subjects: []string{"calls.*"}, AllowAtomicPublish: true, AllowMsgTTL: true,
			}); err != nil {
				t.Fatal(err)
			}
			publish(t, js, "calls.7", "frame")
			begin := time.Now()
			stop(t, s)
			if took := time.Since(begin); took > 2*time.Second {
				t.Errorf("stopping took %s", took)
			}

			s = start(t, Options{StoreDir: dir, Sync: sync})
			stream, err := connect(t, s).Stream(t.Context(), "LEDGER")
			if err != nil {
				t.Fatal(err)
			}
			m, err := stream.GetMsg(t.Context(), 1)
			if err != nil || string(m.Data) != "frame" {
				t.Errorf("got %v, %v", m, err)
			}
		})
	}
}

func TestInProcessConnections(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	nc, err := nats.Connect("", nats.InProcessServer(s.InProcess()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.AccountInfo(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestATakenPortNamesItsFlag(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	port := l.Addr().(*net.TCPAddr).Port
	for flag, o := range map[string]Options{
		"nats-listen":         {Port: port},
		"nats-monitor-port":   {MonitorPort: port},
		"nats-cluster-listen": {Cluster: &ClusterOptions{Name: "c", Port: port, Routes: []string{"nats://127.0.0.1:1"}}},
	} {
		o.StoreDir = t.TempDir()
		_, err = Start(t.Context(), o)
		var le *telemetry.ListenError
		if !errors.As(err, &le) || le.Flag != flag || !strings.Contains(err.Error(), "--"+flag) {
			t.Errorf("%s: got %v", flag, err)
		}
		// The failed start has let go of the store.
		o = Options{StoreDir: o.StoreDir}
		stop(t, start(t, o))
	}
}

func TestAPortTakenDuringTheStartNamesItsFlagToo(t *testing.T) {
	t.Parallel()
	// nats-server reports it through its logger, which is all we have then.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	_, taken := net.Listen("tcp", l.Addr().String())
	if taken == nil {
		t.Fatal("the port is not taken")
	}
	o := withDefaults(Options{Port: 4222, Cluster: &ClusterOptions{Port: 6222}})
	for format, want := range map[string]string{
		"Error listening on port: %s, %q":         "listen 127.0.0.1:4222: address in use: choose another with --nats-listen or TOLLKEEPER_NATS_LISTEN",
		"Error listening on router port: %d - %v": "listen 127.0.0.1:6222: address in use: choose another with --nats-cluster-listen or TOLLKEEPER_NATS_CLUSTER_LISTEN",
	} {
		fatal := make(chan error, 1)
		newLogger(o, fatal).Fatalf(format, 4222, taken)
		if got := (<-fatal).Error(); got != want {
			t.Errorf("got %q", got)
		}
	}
}

func TestOneServerPerStore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := start(t, Options{StoreDir: dir})
	_, err := Start(t.Context(), Options{StoreDir: dir})
	if !errors.Is(err, ErrStoreInUse) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v", err)
	}
	stop(t, s)
	start(t, Options{StoreDir: dir})
}

// heard is a log's writer that passes each line on.
type heard chan string

func (h heard) Write(line []byte) (int, error) {
	select {
	case h <- string(line):
	default:
	}
	return len(line), nil
}

func TestAStartWaitsForTheStoreOfAProcessThatEnds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	killed := start(t, Options{StoreDir: dir})
	port := killed.Addr().(*net.TCPAddr).Port
	lines := make(heard, 16)
	type started struct {
		s   *Server
		err error
	}
	again := make(chan started, 1)
	go func() {
		s, err := Start(t.Context(), Options{StoreDir: dir, Port: port, StoreWait: time.Minute, Logger: zerolog.New(lines)})
		again <- started{s, err}
	}()
	// It says that it waits, and why.
	if line := <-lines; !strings.Contains(line, "waiting for it to end") || !strings.Contains(line, dir) {
		t.Errorf("it said %q", line)
	}
	stop(t, killed)
	got := <-again
	if got.err != nil {
		t.Fatal(got.err)
	}
	stop(t, got.s)
}

func TestAStoreThatIsHeldIsWaitedForWithinBounds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	start(t, Options{StoreDir: dir})
	if _, err := Start(t.Context(), Options{StoreDir: dir, StoreWait: 50 * time.Millisecond}); !errors.Is(err, ErrStoreInUse) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Start(ctx, Options{StoreDir: dir, StoreWait: time.Hour}); !errors.Is(err, context.Canceled) {
		t.Errorf("a start that was given up: %v", err)
	}
}

func TestAPortOfAnotherProgramIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Close() }) // nothing was written to it
	var listen *telemetry.ListenError
	if _, err := Start(t.Context(), Options{StoreDir: t.TempDir(), Port: other.Addr().(*net.TCPAddr).Port, StoreWait: time.Hour}); !errors.As(err, &listen) {
		t.Errorf("got %v", err)
	}
}

func TestOtherMachinesNeedCredentials(t *testing.T) {
	t.Parallel()
	route := []string{"nats://127.0.0.1:1"}
	for name, o := range map[string]Options{
		"clients": {Host: "0.0.0.0"},
		"cluster": {Cluster: &ClusterOptions{Name: "c", Host: "0.0.0.0", Routes: route}},
	} {
		o.StoreDir = t.TempDir()
		if _, err := Start(t.Context(), o); !errors.Is(err, telemetry.ErrNotLoopback) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	s := start(t, Options{Host: "0.0.0.0", User: "toll", Password: "keeper"})
	url := fmt.Sprintf("nats://127.0.0.1:%d", s.Addr().(*net.TCPAddr).Port)
	if _, err := nats.Connect(url); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("without credentials: %v", err)
	}
	nc, err := nats.Connect(url, nats.UserInfo("toll", "keeper"))
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
}

func TestTokensAndNKeys(t *testing.T) {
	t.Parallel()
	s := start(t, Options{Token: "s3cret"})
	connect(t, s, nats.Token("s3cret"))
	if _, err := nats.Connect(s.ClientURL(), nats.Token("wrong")); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("got %v", err)
	}
	public, sign := newNKey(t)
	s = start(t, Options{NKeys: []string{public}})
	js := connect(t, s, nats.Nkey(public, sign))
	if _, err := js.AccountInfo(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := nats.Connect(s.ClientURL()); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("got %v", err)
	}
}

func TestWrongOptionsAreRefused(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]Options{
		"no store":         {},
		"two kinds":        {StoreDir: t.TempDir(), Token: "t", User: "u", Password: "p"},
		"half a password":  {StoreDir: t.TempDir(), User: "u"},
		"negative":         {StoreDir: t.TempDir(), MaxFile: -1},
		"a lonely cluster": {StoreDir: t.TempDir(), Cluster: &ClusterOptions{Name: "c"}},
		"a bad route":      {StoreDir: t.TempDir(), Cluster: &ClusterOptions{Name: "c", Routes: []string{"://user:s3cret@"}}},
		"a bad nkey":       {StoreDir: t.TempDir(), NKeys: []string{"nonsense"}},
	} {
		s, err := Start(t.Context(), o)
		if err == nil {
			stop(t, s)
			t.Errorf("%s was accepted", name)
			continue
		}
		if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: a secret is in %v", name, err)
		}
	}
}

// lines is a log that can be read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestTheServersLogIsOursAndHasNoSecrets(t *testing.T) {
	t.Parallel()
	var log lines
	s := start(t, Options{
		User: "toll", Password: "pass word", Logger: zerolog.New(&log).Level(zerolog.TraceLevel),
		Cluster: &ClusterOptions{Name: "c", User: "route", Password: "r0ute pass", Routes: []string{"nats://route:r0ute%20pass@127.0.0.1:1"}},
	})
	_, _ = nats.Connect(s.ClientURL(), nats.UserInfo("toll", "wrong"))
	stop(t, s)
	got := log.String()
	if !strings.Contains(got, "Server is ready") || !strings.Contains(got, `"component":"nats"`) {
		t.Errorf("not routed to our logger: %s", got)
	}
	for _, secret := range []string{"pass word", "pass%20word", "pass+word", "r0ute"} {
		if strings.Contains(got, secret) {
			t.Errorf("%q is in the log:\n%s", secret, got)
		}
	}
}

func TestMonitoringIsOnLoopback(t *testing.T) {
	t.Parallel()
	s := start(t, Options{Host: "0.0.0.0", Token: "t", MonitorPort: -1})
	if !strings.HasPrefix(s.MonitorURL(), "http://127.0.0.1:") {
		t.Fatalf("monitoring at %q", s.MonitorURL())
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Get(s.MonitorURL() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("healthz: %s", resp.Status)
	}
}

func TestAStartThatIsGivenUpFreesTheStore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s, err := Start(ctx, Options{StoreDir: dir})
	if err == nil {
		stop(t, s) // it was up before anyone looked at the context
	} else if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for {
		s, err := Start(t.Context(), Options{StoreDir: dir})
		if err == nil {
			stop(t, s)
			return
		}
		if !errors.Is(err, ErrStoreInUse) {
			t.Fatal(err)
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("the store is still in use")
		}
	}
}
