// Package traffic is the world around a Tollkeeper: clients that remember what
// they themselves saw, and the upstream that serves them.
package traffic

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// TokensHeader tells the upstream how many output tokens it is to report.
const TokensHeader = "Soak-Output-Tokens"

// inputTokens is what every call reports.
const inputTokens = 3

// Upstream answers in the shape of a model's API. What it served is what was
// admitted, whether or not the client heard of it.
type Upstream struct {
	url    string
	server *http.Server
	errs   chan error

	mu     sync.Mutex
	served map[string]Served
}

// Served is what reached the upstream of an account: all of it was admitted.
type Served struct{ Calls, Output int64 }

// StartUpstream listens on a free port of host until Close.
func StartUpstream(host string) (*Upstream, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, fmt.Errorf("listen for the upstream: %w", err)
	}
	u := &Upstream{url: "http://" + l.Addr().String(), errs: make(chan error, 1), served: map[string]Served{}}
	u.server = &http.Server{Handler: http.HandlerFunc(u.answer), ReadHeaderTimeout: 10 * time.Second}
	go func() { u.errs <- u.server.Serve(l) }()
	return u, nil
}

// URL is where it listens.
func (u *Upstream) URL() string { return u.url }

// Served returns what it served of an account, whether or not the client heard of
// it.
func (u *Upstream) Served(account string) Served {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.served[account]
}

// accountHeader is how a gateway names the account to its upstream.
const accountHeader = "X-Tollkeeper-Account"

// Close ends it.
func (u *Upstream) Close() error {
	err := u.server.Close()
	if served := <-u.errs; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

func (u *Upstream) answer(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, io.LimitReader(r.Body, 1<<20)); err != nil {
		return // whoever asked is gone
	}
	output := 1
	if n, err := strconv.Atoi(r.Header.Get(TokensHeader)); err == nil {
		output = n
	}
	account := r.Header.Get(accountHeader)
	u.mu.Lock()
	sum := u.served[account]
	u.served[account] = Served{sum.Calls + 1, sum.Output + int64(output)}
	u.mu.Unlock()
	body := fmt.Sprintf(`{"id":"x","object":"chat.completion","model":"m","choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}`,
		inputTokens, output, inputTokens+output)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = io.WriteString(w, body) // whoever asked may be gone
}
