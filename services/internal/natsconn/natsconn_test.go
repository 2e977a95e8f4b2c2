package natsconn

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var _ Readiness = (*telemetry.Component)(nil)

// heard is a Readiness that can be waited for.
type heard struct {
	mu   sync.Mutex
	said []string // "ok" or the reason
	more chan struct{}
}

func newHeard() *heard { return &heard{more: make(chan struct{}, 1000)} }

func (h *heard) OK() { h.NotReady("ok") }

func (h *heard) NotReady(reason string) {
	h.mu.Lock()
	h.said = append(h.said, reason)
	h.mu.Unlock()
	h.more <- struct{}{}
}

func (h *heard) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.said...)
}

// wait waits until the last thing said contains s.
func (h *heard) wait(t *testing.T, s string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		if all := h.all(); len(all) > 0 && strings.Contains(all[len(all)-1], s) {
			return
		}
		select {
		case <-h.more:
		case <-deadline:
			t.Fatalf("%q was not said last: %q", s, h.all())
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

func start(t *testing.T, o embednats.Options) *embednats.Server {
	t.Helper()
	if o.StoreDir == "" {
		o.StoreDir = t.TempDir()
	}
	s, err := embednats.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *embednats.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func end(t *testing.T, nc *nats.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := Close(ctx, nc); err != nil {
		t.Error(err)
	}
}

func TestWaitsForNATSAndSaysSoOnce(t *testing.T) {
	t.Parallel()
	// A port that is ours and closed until the server takes it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var log lines
	h := newHeard()
	type result struct {
		nc  *nats.Conn
		err error
	}
	done := make(chan result, 1)
	go func() {
		nc, err := Connect(t.Context(), Options{URL: "nats://" + addr.String(), Logger: zerolog.New(&log), Readiness: h})
		done <- result{nc, err}
	}()
	h.wait(t, "connection refused")
	start(t, embednats.Options{Port: addr.Port})
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer end(t, r.nc)
	h.wait(t, "ok")
	said := h.all()
	if len(said) != 3 || !strings.HasPrefix(said[0], "connecting to NATS at nats://127.0.0.1:") || said[2] != "ok" {
		t.Errorf("readiness heard %q", said)
	}
	if n := strings.Count(log.String(), "can't be reached"); n != 1 {
		t.Errorf("the log says it %d times:\n%s", n, log.String())
	}
}

func TestGivingUpTheWait(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Millisecond)
	defer cancel()
	_, err := Connect(ctx, Options{URL: "nats://toll:s3cret@127.0.0.1:1"})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("got %v", err)
	}
}

func TestALostServerFailsPublishesFastAndComesBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := start(t, embednats.Options{StoreDir: dir})
	h := newHeard()
	nc, err := Connect(t.Context(), Options{URL: s.ClientURL(), Readiness: h})
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, nc)
	back := s.Options()
	stop(t, s)
	h.wait(t, "NATS at")
	begin := time.Now()
	if err := nc.Publish("calls.1", []byte("frame")); !errors.Is(err, nats.ErrReconnectBufExceeded) {
		t.Errorf("published while NATS is away: %v", err)
	}
	if took := time.Since(begin); took > 100*time.Millisecond {
		t.Errorf("failing took %s", took)
	}
	start(t, back)
	h.wait(t, "ok")
	if err := nc.Publish("calls.1", []byte("frame")); err != nil {
		t.Error(err)
	}
}

func TestAConnectionThatIsAwayClosesAtOnce(t *testing.T) {
	t.Parallel()
	s := start(t, embednats.Options{})
	h := newHeard()
	nc, err := Connect(t.Context(), Options{URL: s.ClientURL(), Readiness: h})
	if err != nil {
		t.Fatal(err)
	}
	stop(t, s)
	h.wait(t, "NATS at")
	end(t, nc)
	h.wait(t, "closed")
	end(t, nc) // twice is harmless
	end(t, nil)
}

func TestCloseDrains(t *testing.T) {
	t.Parallel()
	s := start(t, embednats.Options{})
	h := newHeard()
	nc, err := Connect(t.Context(), Options{InProcess: s.InProcess(), Readiness: h})
	if err != nil {
		t.Fatal(err)
	}
	const sent = 500
	got := 0
	if _, err := nc.Subscribe("calls.*", func(*nats.Msg) { got++ }); err != nil {
		t.Fatal(err)
	}
	for range sent {
		if err := nc.Publish("calls.1", nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	end(t, nc)
	if got != sent {
		t.Errorf("%d of %d messages were handled before the end", got, sent)
	}
	h.wait(t, "closed")
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	withToken := start(t, embednats.Options{Token: "s3cret"})
	withUser := start(t, embednats.Options{User: "toll", Password: "s3cret"})
	for name, o := range map[string]Options{
		"token file":        {URL: withToken.ClientURL(), TokenFile: file},
		"user and password": {URL: withUser.ClientURL(), User: "toll", Password: "s3cret"},
		"in the address":    {URL: strings.Replace(withUser.ClientURL(), "://", "://toll:s3cret@", 1)},
	} {
		nc, err := Connect(t.Context(), o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		end(t, nc)
	}
}

func TestWhatWaitingWontMendFailsAtOnceWithoutSecrets(t *testing.T) {
	t.Parallel()
	s := start(t, embednats.Options{User: "toll", Password: "right"})
	missing := filepath.Join(t.TempDir(), "missing")
	for name, o := range map[string]Options{
		"refused":            {URL: s.ClientURL(), User: "toll", Password: "s3cret"},
		"refused in address": {URL: strings.Replace(s.ClientURL(), "://", "://toll:s3cret@", 1)},
		"no address":         {},
		"bad address":        {URL: "nats://toll:s3cret@127.0.0.1:port"},
		"no creds file":      {URL: s.ClientURL(), CredsFile: missing},
		"no seed file":       {URL: s.ClientURL(), NKeySeedFile: missing},
		"no token file":      {URL: s.ClientURL(), TokenFile: missing},
		"no authority":       {URL: s.ClientURL(), CAFile: missing},
		"two kinds":          {URL: s.ClientURL(), CredsFile: "a", User: "u", TokenFile: missing},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log lines
			o.Logger = zerolog.New(&log)
			h := newHeard()
			o.Readiness = h
			nc, err := Connect(t.Context(), o)
			if err == nil {
				nc.Close()
				t.Fatal("connected")
			}
			all := err.Error() + log.String() + strings.Join(h.all(), "\n")
			if strings.Contains(all, "s3cret") {
				t.Errorf("a secret was told: %s", all)
			}
			if strings.HasPrefix(name, "refused") && !errors.Is(err, nats.ErrAuthorization) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestRedact(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"nats://127.0.0.1:4222":                        "nats://127.0.0.1:4222",
		"nats://toll:s3cret@127.0.0.1:4222":            "nats://127.0.0.1:4222",
		"tls://t0ken@a.example:4222, nats://u:p@b:422": "tls://a.example:4222,nats://b:422",
		"toll:s3cret@127.0.0.1:4222":                   "nats://127.0.0.1:4222",
		"nats://toll:s3%zzcret@127.0.0.1":              "(an address that can't be parsed)",
	} {
		if got := Redact(in); got != want {
			t.Errorf("%s became %s, want %s", in, got, want)
		}
	}
}

func TestPausesGrowToTwoSecondsAndAreJittered(t *testing.T) {
	t.Parallel()
	for tries, want := range map[int]time.Duration{
		0: 50 * time.Millisecond, 1: 100 * time.Millisecond, 5: 1600 * time.Millisecond,
		6: 2 * time.Second, 1 << 40: 2 * time.Second, -1: 2 * time.Second,
	} {
		if got := delay(tries, 0); got != want {
			t.Errorf("after %d tries without jitter %s, want %s", tries, got, want)
		}
		if got := delay(tries, 0.999); got < want/2 || got > want*51/100 {
			t.Errorf("after %d tries with the greatest jitter %s of %s", tries, got, want)
		}
	}
}
