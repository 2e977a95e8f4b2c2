package session

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/wiretest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/nats-io/nats-server/v2/server.(*Server).logRejectedTLSConns"))
}

// serve starts a NATS server and returns its host:port.
func serve(t *testing.T, edit func(*server.Options)) (*server.Server, string) {
	t.Helper()
	o := &server.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, StoreDir: t.TempDir()}
	edit(o)
	s, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	go s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("NATS does not start")
	}
	return s, s.Addr().String()
}

func withJetStream(o *server.Options) { o.JetStream, o.JetStreamMaxStore = true, 100<<30 }

// provision makes a ledger.
func provision(t *testing.T, addr string) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect("nats://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 1}); err != nil {
		t.Fatal(err)
	}
	return js
}

// wait is how long the tests' sessions wait.
const wait = time.Second

func open(t *testing.T, url string) (*Session, error) {
	t.Helper()
	return Open(t.Context(), Options{NATS: natsconn.Options{URL: url, Logger: zerolog.Nop()}, Wait: wait})
}

func TestACommandSaysInTimeWhatIsWrongWithNATS(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		url  func(t *testing.T) string
		says []string
	}{
		"nothing listens": {func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			return "nats://user:secret@" + l.Addr().String()
		}, []string{"can't be reached within 1s (connection refused)", "--nats-url", "--nats-wait"}},
		"a port that says nothing": {func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			return "nats://" + l.Addr().String()
		}, []string{"can't be reached within 1s", "--nats-url"}},
		"a port that closes at once": {func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_ = c.Close()
				}
			}()
			return "nats://" + l.Addr().String()
		}, []string{"can't be reached within 1s", "--nats-url"}},
		"the port of a page": {func(t *testing.T) string {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
			t.Cleanup(s.Close)
			return "nats://" + s.Listener.Addr().String()
		}, []string{"can't be reached within 1s", "--nats-url"}},
		"an address that is none": {func(*testing.T) string { return "nats://[::1" }, []string{"nats://127.0.0.1:4222"}},
		"wrong credentials": {func(t *testing.T) string {
			_, addr := serve(t, func(o *server.Options) { o.Username, o.Password = "a", "b" })
			return "nats://a:secret@" + addr
		}, []string{"Authorization Violation", "credentials"}},
		"no JetStream": {func(t *testing.T) string {
			_, addr := serve(t, func(*server.Options) {})
			return "nats://" + addr
		}, []string{"has no JetStream", "--nats-url"}},
		"no ledger": {func(t *testing.T) string {
			_, addr := serve(t, withJetStream)
			return "nats://" + addr
		}, []string{"has no ledger", "tollkeeper up", "--nats-url"}},
		"no stream": {func(t *testing.T) string {
			_, addr := serve(t, withJetStream)
			if err := provision(t, addr).DeleteStream(t.Context(), ledger.Stream); err != nil {
				t.Fatal(err)
			}
			return "nats://" + addr
		}, []string{"has no stream LEDGER", "--nats-url"}},
		"a user who may not ask": {func(t *testing.T) string {
			_, addr := serve(t, func(o *server.Options) {
				o.JetStream, o.JetStreamMaxStore = true, 100<<30
				o.Users = []*server.User{{Username: "a", Password: "secret", Permissions: &server.Permissions{Publish: &server.SubjectPermission{Deny: []string{"$JS.>"}}}}}
			})
			return "nats://a:secret@" + addr
		}, []string{"JetStream did not answer within 1s", "may not ask"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := c.url(t)
			began := time.Now()
			s, err := open(t, url)
			if err == nil {
				s.Close()
				t.Fatal("it was opened")
			}
			// A busy machine is slow, and not by a multiple.
			if took := time.Since(began); took > 3*wait {
				t.Errorf("it took %s", took)
			}
			for _, part := range c.says {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", err, part)
				}
			}
			for _, never := range []string{"secret", "applied", "context deadline exceeded"} {
				if strings.Contains(err.Error(), never) {
					t.Errorf("%q says %q", err, never)
				}
			}
		})
	}
}

// A ledger is made after NATS accepts connections, piece by piece.
func TestACommandWaitsForALedgerThatIsBeingMade(t *testing.T) {
	t.Parallel()
	_, addr := serve(t, withJetStream)
	type opened struct {
		s   *Session
		err error
	}
	done := make(chan opened, 1)
	asked := make(chan struct{})
	nc, err := nats.Connect("nats://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	// The command has seen that there is no ledger before one is made.
	var once sync.Once
	if _, err := nc.Subscribe("$JS.API.STREAM.INFO.KV_"+ledger.ConfigBucket, func(*nats.Msg) { once.Do(func() { close(asked) }) }); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	go func() {
		s, err := Open(t.Context(), Options{NATS: natsconn.Options{URL: "nats://" + addr, Logger: zerolog.Nop()}, Wait: time.Minute})
		done <- opened{s, err}
	}()
	<-asked
	provision(t, addr)
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	defer got.s.Close()
	if got.s.Geometry.Shards != 1 {
		t.Errorf("%+v", got.s.Geometry)
	}
}

func TestACommandThatLosesNATSGivesUp(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(s *server.Server, w *wiretest.Wire){
		"it ends":          func(s *server.Server, _ *wiretest.Wire) { s.Shutdown() },
		"it says nothing":  func(_ *server.Server, w *wiretest.Wire) { w.Cut() },
		"it is in trouble": func(s *server.Server, w *wiretest.Wire) { w.Cut(); s.Shutdown() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv, addr := serve(t, withJetStream)
			provision(t, addr)
			w := wiretest.New(t, addr)
			s, err := open(t, "nats://"+w.Addr())
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if s.Geometry.Shards != 1 {
				t.Errorf("%+v", s.Geometry)
			}
			lose(srv, w)
			began := time.Now()
			<-s.Context().Done()
			if took := time.Since(began); took > 4*wait {
				t.Errorf("it took %s", took)
			}
			var lost *LostError
			if err := s.Err(s.Context().Err()); !errors.As(err, &lost) || !strings.Contains(err.Error(), "went away") {
				t.Errorf("%v", err)
			}
			if err := s.Err(nil); err != nil {
				t.Errorf("nothing failed: %v", err)
			}
		})
	}
}

func TestASessionEndsWithItsCommand(t *testing.T) {
	t.Parallel()
	_, addr := serve(t, withJetStream)
	provision(t, addr)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := Open(ctx, Options{NATS: natsconn.Options{URL: "nats://" + addr, Logger: zerolog.Nop()}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cancel()
	<-s.Context().Done()
	if err := s.Err(s.Context().Err()); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := Open(ctx, Options{NATS: natsconn.Options{URL: "nats://" + addr, Logger: zerolog.Nop()}}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
