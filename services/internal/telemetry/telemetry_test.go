package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestATakenPortNamesTheFlag(t *testing.T) {
	t.Parallel()
	l, err := Listen("api-listen", "127.0.0.1:0", false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	addr := l.Addr().String()

	_, err = Listen("api-listen", addr, false)
	want := "listen " + addr + ": address in use: choose another with --api-listen or TOLLKEEPER_API_LISTEN"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	var le *ListenError
	if !errors.As(err, &le) || le.Flag != "api-listen" || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a machine can't tell what happened from %#v", err)
	}
}

func TestOnlyLoopbackWithoutCredentials(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{":0", "0.0.0.0:0", "[::]:0", "192.0.2.1:0"} {
		if _, err := Listen("api-listen", addr, false); !errors.Is(err, ErrNotLoopback) || !strings.Contains(err.Error(), "--api-listen") {
			t.Errorf("%s: got %v", addr, err)
		}
	}
	for _, addr := range []string{"127.0.0.1:0", "localhost:0", "127.9.8.7:0"} {
		l, err := Listen("api-listen", addr, false)
		if err != nil {
			t.Errorf("%s: %v", addr, err)
			continue
		}
		_ = l.Close()
	}
	l, err := Listen("api-listen", "0.0.0.0:0", true)
	if err != nil {
		t.Fatalf("refused although credentials are configured: %v", err)
	}
	_ = l.Close()
	if _, err := Listen("api-listen", "8402", false); err == nil || !strings.Contains(err.Error(), "host:port") {
		t.Errorf("got %v", err)
	}
}

func TestReadinessTellsWhatIsNotReadyWhyAndSinceWhen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		get := func(r *Readiness) (int, ReadinessStatus) {
			rec := httptest.NewRecorder()
			r.ServeHTTP(rec, httptest.NewRequest("GET", "/readyz", nil))
			var s ReadinessStatus
			if err := json.Unmarshal(rec.Body.Bytes(), &s); err != nil {
				t.Fatal(err)
			}
			return rec.Code, s
		}
		r := NewReadiness()
		if code, s := get(r); code != 200 || !s.Ready {
			t.Errorf("nothing to wait for: %d %+v", code, s)
		}
		begin := time.Now().UTC()
		history, nats := r.Component("history"), r.Component("nats")
		nats.OK()
		if code, s := get(r); code != 503 || s.Ready || s.Components[0].Reason != "starting" {
			t.Errorf("a new component is starting: %d %+v", code, s)
		}
		history.OK()
		if code, _ := get(r); code != 200 {
			t.Errorf("got %d", code)
		}

		time.Sleep(time.Minute) // the bubble's clock
		nats.NotReady("connection refused")
		time.Sleep(time.Minute)
		nats.NotReady("no route to host")
		code, s := get(r)
		want := ReadinessStatus{Components: []ComponentStatus{
			{Name: "history", OK: true, Since: begin},
			{Name: "nats", Reason: "no route to host", Since: begin.Add(time.Minute)},
		}}
		if diff := cmp.Diff(want, s); code != 503 || diff != "" {
			t.Errorf("%d %s", code, diff)
		}
		if r.Component("nats") != nats {
			t.Error("one name is one component")
		}
	})
}

func TestReadinessIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	r := NewReadiness()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				r.Component("nats").NotReady("away")
				r.Component("nats").OK()
				r.Status()
			}
		})
	}
	wg.Wait()
	if !r.Status().Ready {
		t.Error("not ready")
	}
}

func TestHandler(t *testing.T) {
	t.Parallel()
	reg := NewRegistry()
	ready := NewReadiness()
	reg.MustRegister(ready)
	ready.Component("nats").OK()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "tollkeeper_calls_total", Help: "Calls."})
	reg.MustRegister(c)
	c.Add(3)
	h := NewHandler(HandlerOptions{Gatherer: reg, Readiness: ready, Pprof: true})

	get := func(path, remote string) *httptest.ResponseRecorder {
		req := httptest.NewRequest("GET", path, nil)
		req.RemoteAddr = remote
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		return rec
	}
	const here, there = "127.0.0.1:4711", "192.0.2.7:4711"
	if rec := get("/metrics", there); rec.Code != 200 ||
		!strings.Contains(rec.Body.String(), "tollkeeper_calls_total 3") ||
		!strings.Contains(rec.Body.String(), `tollkeeper_component_ready{component="nats"} 1`) ||
		!strings.Contains(rec.Body.String(), "go_goroutines") {
		t.Errorf("/metrics: %d %s", rec.Code, rec.Body)
	}
	if rec := get("/healthz", there); rec.Code != 200 {
		t.Errorf("/healthz: %d", rec.Code)
	}
	if rec := get("/readyz", there); rec.Code != 200 {
		t.Errorf("/readyz: %d", rec.Code)
	}
	if rec := get("/debug/pprof/", here); rec.Code != 200 {
		t.Errorf("pprof from this machine: %d", rec.Code)
	}
	if rec := get("/debug/pprof/", there); rec.Code != 403 {
		t.Errorf("pprof from another machine: %d", rec.Code)
	}
	h = NewHandler(HandlerOptions{})
	for _, path := range []string{"/metrics", "/readyz", "/debug/pprof/"} {
		if rec := get(path, here); rec.Code != 404 {
			t.Errorf("%s was not asked for: %d", path, rec.Code)
		}
	}
}

// serve runs Serve on a free port until the test ends or stop is called.
func serve(t *testing.T, o ServeOptions) (url string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	addr, done := make(chan net.Addr, 1), make(chan error, 1)
	o.Flag, o.Addr, o.Ready = "api-listen", "127.0.0.1:0", func(a net.Addr) { addr <- a }
	go func() { done <- Serve(ctx, o) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	select {
	case a := <-addr:
		return "http://" + a.String(), stop
	case err := <-done:
		t.Fatal(err)
		return "", nil
	}
}

func fetch(t *testing.T, url, authorization string) int {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	return resp.StatusCode
}

func TestServeAsksForTheToken(t *testing.T) {
	t.Parallel()
	url, stop := serve(t, ServeOptions{Handler: NewHandler(HandlerOptions{Readiness: NewReadiness()}), Token: "s3cret"})
	for _, c := range []struct {
		path, authorization string
		want                int
	}{
		{"/readyz", "", 401},
		{"/readyz", "Bearer wrong", 401},
		{"/readyz", "Basic s3cret", 401},
		{"/readyz", "Bearer s3cret", 200},
		{"/readyz", "bearer s3cret", 200},
		{"/healthz", "", 200},
	} {
		if got := fetch(t, url+c.path, c.authorization); got != c.want {
			t.Errorf("%s with %q: %d, want %d", c.path, c.authorization, got, c.want)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestServeRefusesOtherMachinesWithoutCredentials(t *testing.T) {
	t.Parallel()
	err := Serve(t.Context(), ServeOptions{Flag: "api-listen", Addr: "0.0.0.0:0", Handler: http.NotFoundHandler()})
	if !errors.Is(err, ErrNotLoopback) {
		t.Errorf("got %v", err)
	}
}

func TestServeLetsAnswersFinishAndEndsStreams(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}, 2), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-release
		w.WriteHeader(http.StatusTeapot)
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-r.Context().Done() // as a stream of live events does
	})
	url, stop := serve(t, ServeOptions{Handler: mux, Grace: 200 * time.Millisecond})
	codes := make(chan int, 2)
	go func() { codes <- fetch(t, url+"/slow", "") }()
	go func() { codes <- fetch(t, url+"/stream", "") }()
	<-entered
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	close(release)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	got := []int{<-codes, <-codes}
	if got[0] != http.StatusTeapot {
		t.Errorf("the answer in flight got %d", got[0])
	}
}

func TestLogger(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	l, err := NewLogger(LogOptions{Out: &out, Level: "warn", Service: "gateway"})
	if err != nil {
		t.Fatal(err)
	}
	l.Info().Msg("not seen")
	l.Warn().Str("account", "acme").Msg("seen")
	var line map[string]string
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("not one line of JSON: %q", out.String())
	}
	if _, err := time.Parse("2006-01-02T15:04:05.000Z", line["time"]); err != nil {
		t.Error(err)
	}
	delete(line, "time")
	want := map[string]string{"level": "warn", "service": "gateway", "account": "acme", "message": "seen"}
	if diff := cmp.Diff(want, line); diff != "" {
		t.Error(diff)
	}

	out.Reset()
	l, err = NewLogger(LogOptions{Out: &out, Format: "console"})
	if err != nil {
		t.Fatal(err)
	}
	l.Info().Msg("hello")
	if s := out.String(); strings.HasPrefix(s, "{") || !strings.Contains(s, "hello") {
		t.Errorf("console wrote %q", s)
	}
	for _, o := range []LogOptions{{Level: "loud"}, {Level: "disabled"}, {Format: "xml"}} {
		if _, err := NewLogger(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}
