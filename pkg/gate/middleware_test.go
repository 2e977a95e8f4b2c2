package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/pace"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// A key may be known a moment before its account, and an account may go.
func TestACallIsNeverRecordedInAnotherAccountsShard(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	d := &directoryFeed{g}
	account := ""
	for i := 0; ledger.ShardOf(account, 4) != 3; i++ {
		account = fmt.Sprint("late-", i)
	}
	for _, c := range recordsOf(t, nil, directory.Key{Hash: HashKey("sk-late"), ID: "k2", Account: account}) {
		d.Apply(c)
	}
	var record ledger.Change
	for _, c := range recordsOf(t, []directory.Account{{ID: account}}) {
		if c.Key != directory.PlansKey {
			record = c
		}
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for seq := uint64(5); ; seq += 2 {
			select {
			case <-stop:
				return
			default:
			}
			record.Sequence = seq
			d.Apply(record)
			d.Apply(ledger.Change{Key: record.Key, Sequence: seq + 1})
		}
	}()
	began := time.Now()
	for n := 0; n < 20_000 && time.Since(began) < 3*time.Second; n++ {
		serve(g, func(http.ResponseWriter, *http.Request) {}, func(r *http.Request) { r.Header.Set("X-Api-Key", "sk-late") })
	}
	close(stop)
	<-stopped
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, s := range b.shard {
		if s != 3 {
			t.Fatalf("call %d of %d is in shard %d: %+v", i, len(b.shard), s, b.calls[i])
		}
	}
}

// httputil.ReverseProxy clears the header after a 1xx that it passes on.
func TestTheRequestIDOutlivesEarlyHints(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	w := serve(g, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		clear(w.Header())
		_, _ = io.WriteString(w, "answer")
	}, nil)
	if c := b.one(t); c.RequestID == "" || w.Header().Get(RequestIDHeader) != c.RequestID {
		t.Errorf("the client hears %q, the event says %q", w.Header().Get(RequestIDHeader), c.RequestID)
	}
}

// The names come from a program or the environment: odd ones must not make every
// call uncountable.
func TestOddNamesOfRouteAndRegionDoNotMakeCallsUncountable(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header.Set("X-Api-Key", "sk-acme")
	g.Middleware(MiddlewareOptions{Route: strings.Repeat("r", 1000), Region: "eu\x00\xff"}, http.NotFoundHandler()).ServeHTTP(httptest.NewRecorder(), r)
	c := b.one(t)
	if err := c.Validate(c.Time); err != nil {
		t.Error(err)
	}
}

// A 402 is decided locally (law 3): it does not wait for room in the outbox.
func TestARefusalDoesNotWaitForAFullOutbox(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, _ := offline(t)
		(&decisionsFeed{g}).Apply(decision(t, 1, usage.Deny, time.Time{}))
		var full Outbox = blocked{}
		g.outbox.Store(&full)
		never := func(http.ResponseWriter, *http.Request) { t.Error("the handler is called") }
		serve(g, never, nil) // finds out
		began := time.Now()
		if w := serve(g, never, nil); w.Code != 402 {
			t.Errorf("%+v", w)
		}
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %s", d)
		}
	})
}

// blocked is a full outbox where calls wait.
type blocked struct{ Outbox }

func (blocked) Add(ctx context.Context, _ uint32, _ *usage.Call) error {
	<-ctx.Done()
	return fmt.Errorf("%w: %w", outbox.ErrFull, ctx.Err())
}

// Where neither disk nor ledger takes calls in time, the next ones are not begun:
// their answers would only be broken off.
func TestCallsThatCannotBeMadeSafeAreRefusedBeforeTheyCostAnything(t *testing.T) {
	t.Parallel()
	g, b := offline(t)
	served := 0
	handler := func(http.ResponseWriter, *http.Request) { served++ }
	b.err = fmt.Errorf("%w: %w", outbox.ErrNotSafe, context.Canceled)
	serve(g, handler, nil) // somebody went: that says nothing about the disk
	b.err = fmt.Errorf("%w: %w", outbox.ErrNotSafe, context.DeadlineExceeded)
	serve(g, handler, nil)
	if w := serve(g, handler, nil); w.Code != 503 || served != 2 {
		t.Errorf("%d served; %+v", served, w)
	}
}

// Where calls go to ready gateways only, an unready one would wait for ever for
// the call that finds out.
func TestAFullOutboxThatNobodyTriesIsReadyAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g, b := offline(t)
		b.err = outbox.ErrFull
		serve(g, func(http.ResponseWriter, *http.Request) {}, nil)
		g.refresh()
		if g.Ready() == nil {
			t.Error("it is ready although the outbox is full")
		}
		time.Sleep(pace.ToldFor + time.Second)
		g.beacons(1)
		g.refresh()
		if err := g.Ready(); err != nil {
			t.Error(err)
		}
	})
}

// What comes after an announced length is nothing: it must not take the place of the
// byte that is held back, nor let the answer end before the call is recorded.
func TestAnAnswerLongerThanAnnouncedEndsWhereItWasToEnd(t *testing.T) {
	t.Parallel()
	for _, parts := range [][]string{{"abc", "x"}, {"abcx"}, {"a", "bcxyz"}, {"abc", "", "xyz"}} {
		g, b := offline(t)
		srv := httptest.NewServer(g.Middleware(MiddlewareOptions{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "3")
			var last error
			for _, p := range parts {
				_, last = io.WriteString(w, p)
			}
			if !errors.Is(last, http.ErrContentLength) {
				t.Errorf("%q: %v", parts, last)
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			if len(b.calls) != 0 {
				t.Error("recorded already")
			}
		})))
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", "sk-acme")
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || string(body) != "abc" {
			t.Errorf("%q: %q %v", parts, body, err)
		}
		_ = resp.Body.Close()
		srv.Close()
		c := b.one(t)
		if size, _ := c.Quantities.Get(usage.Bytes); size != 3 {
			t.Errorf("%q: %d bytes", parts, size)
		}
	}
}

// A header that is the whole answer is not flushed before the call is recorded: its
// client would have been answered.
func TestAnAnswerThatIsItsHeaderWaitsForItsRecord(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		method, length string
		status         int
		flushed        bool
	}{
		"HEAD":         {http.MethodHead, "", 200, false},
		"no content":   {http.MethodGet, "", 204, false},
		"not modified": {http.MethodGet, "", 304, false},
		"nothing":      {http.MethodGet, "0", 200, false},
		"something":    {http.MethodGet, "5", 200, true},
		"a stream":     {http.MethodGet, "", 200, true},
		"by default":   {http.MethodGet, "", 0, true},
		"HEAD, too":    {http.MethodHead, "", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g, b := offline(t)
			r := httptest.NewRequest(c.method, "/", nil)
			r.Header.Set("X-Api-Key", "sk-acme")
			w := httptest.NewRecorder()
			g.Middleware(MiddlewareOptions{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if c.length != "" {
					w.Header().Set("Content-Length", c.length)
				}
				if c.status != 0 {
					w.WriteHeader(c.status)
				}
				// As httputil.ReverseProxy does for streams and where the length is not known.
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Error(err)
				}
			})).ServeHTTP(w, r)
			if w.Flushed != c.flushed {
				t.Errorf("flushed: %t", w.Flushed)
			}
			if got := b.one(t).Status; int(got) != w.Code {
				t.Errorf("recorded is %d, answered %d", got, w.Code)
			}
		})
	}
}
