package traffic

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
)

// Outcome is what a client saw of a call.
type Outcome uint8

// The outcomes. Nothing is what a client saw whose answer was cut off or did not
// come: the call may have been counted, or not.
const (
	NotSent Outcome = iota
	Passed          // 2xx, to its last byte
	Refused         // 402, 403 or 429
	Unknown         // 503
	Other           // another answer
	Nothing
)

// Seen is what clients saw of one call.
type Seen struct {
	Outcome Outcome
	Gateway uint8
	Account uint16
	// Ended in microseconds since the traffic began.
	Ended int64
}

// maxCalls bounds the memory of one Traffic.
const maxCalls = 20_000_000

// Account is one that calls are made for.
type Account struct{ ID, Key string }

// Traffic numbers its calls; the number is part of each call's request id, which
// finds it again in the ledger and in the history. Safe for concurrent use.
type Traffic struct {
	// Run is unique for this traffic.
	Run      string
	accounts []Account
	gateways []string
	began    time.Time
	client   *http.Client

	mu    sync.Mutex
	seen  []Seen
	errs  map[string]int
	count [Nothing + 1]atomic.Int64
}

// New returns traffic of accounts through gateways, which are base URLs.
func New(run string, accounts []Account, gateways []string) *Traffic {
	return &Traffic{
		Run: run, accounts: accounts, gateways: gateways, began: time.Now(), errs: map[string]int{},
		client: &http.Client{
			Timeout:   15 * time.Second,
			Transport: &http.Transport{MaxIdleConnsPerHost: 256, IdleConnTimeout: time.Minute, DisableCompression: true},
		},
	}
}

// Accounts are those it was made for.
func (t *Traffic) Accounts() []Account { return t.accounts }

// Began is when call times count from.
func (t *Traffic) Began() time.Time { return t.began }

// Count returns how many calls had an outcome.
func (t *Traffic) Count(o Outcome) int64 { return t.count[o].Load() }

// Sent returns how many calls were made.
func (t *Traffic) Sent() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return int64(len(t.seen))
}

// Seen returns what was seen of every call, by number. The calls must have ended.
func (t *Traffic) Seen() []Seen {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.seen
}

// Errors are the kinds of what clients heard instead of an answer.
func (t *Traffic) Errors() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[string]int, len(t.errs))
	for k, v := range t.errs {
		out[k] = v
	}
	return out
}

// Number returns the number in a request id of this traffic.
func (t *Traffic) Number(requestID string) (int, bool) {
	rest, ok := strings.CutPrefix(requestID, t.Run+"-")
	if !ok {
		return 0, false
	}
	n, err := strconv.Atoi(rest)
	return n, err == nil
}

// Answer is a call's outcome with its answer.
type Answer struct {
	Outcome Outcome
	Status  int
	Body    []byte
	Header  http.Header
	Took    time.Duration
	Number  int
}

// Shape of a call.
type Shape struct {
	Account, Gateway int
	// Output tokens the upstream is to report; MaxTokens is what the request
	// names as their bound, 0: none.
	Output, MaxTokens int
}

// Call makes one call and remembers what it saw.
func (t *Traffic) Call(ctx context.Context, s Shape) Answer {
	t.mu.Lock()
	n := len(t.seen)
	if n == maxCalls {
		t.mu.Unlock()
		return Answer{Outcome: NotSent}
	}
	t.seen = append(t.seen, Seen{Account: uint16(s.Account), Gateway: uint8(s.Gateway)})
	t.mu.Unlock()
	began := time.Now()
	a := t.call(ctx, n, s)
	a.Number, a.Took = n, time.Since(began)
	t.mu.Lock()
	t.seen[n].Outcome, t.seen[n].Ended = a.Outcome, time.Since(t.began).Microseconds()
	t.mu.Unlock()
	t.count[a.Outcome].Add(1)
	return a
}

func (t *Traffic) call(ctx context.Context, n int, s Shape) Answer {
	body := `{"model":"m","messages":[{"role":"user","content":"hi"}]}`
	if s.MaxTokens > 0 {
		body = fmt.Sprintf(`{"model":"m","max_tokens":%d,"messages":[{"role":"user","content":"hi"}]}`, s.MaxTokens)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.gateways[s.Gateway]+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return t.nothing(err)
	}
	// A request that is sent again by the client's own library would be two calls.
	req.GetBody = nil
	req.Header.Set("Authorization", "Bearer "+t.accounts[s.Account].Key)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(gate.RequestIDHeader, t.Run+"-"+strconv.Itoa(n))
	if s.Output > 0 {
		req.Header.Set(TokensHeader, strconv.Itoa(s.Output))
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return t.nothing(err)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	_ = resp.Body.Close() // it is read to its end
	if err != nil {
		return t.nothing(err)
	}
	a := Answer{Status: resp.StatusCode, Body: data, Header: resp.Header}
	switch {
	case resp.StatusCode/100 == 2:
		a.Outcome = Passed
	case resp.StatusCode == http.StatusPaymentRequired, resp.StatusCode == http.StatusForbidden, resp.StatusCode == http.StatusTooManyRequests:
		a.Outcome = Refused
	case resp.StatusCode == http.StatusServiceUnavailable:
		a.Outcome = Unknown
	default:
		a.Outcome = Other
		t.note(fmt.Sprintf("status %d", resp.StatusCode))
	}
	return a
}

func (t *Traffic) nothing(err error) Answer {
	text := err.Error()
	if i := strings.LastIndex(text, ": "); i >= 0 {
		text = text[i+2:]
	}
	t.note(text)
	return Answer{Outcome: Nothing}
}

func (t *Traffic) note(kind string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.errs[kind]; known || len(t.errs) < 20 {
		t.errs[kind]++
	}
}

// Drive lets workers make calls until ctx is done or next says no, each at most
// one at a time, together at most rate a second (0: unbounded). It returns when
// the last call has ended: ctx's end does not break calls off.
func (t *Traffic) Drive(ctx context.Context, workers int, rate float64, next func(worker, round int) (Shape, bool)) {
	calls := context.WithoutCancel(ctx)
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			pause := time.Duration(0)
			if rate > 0 {
				pause = time.Duration(float64(workers) / rate * float64(time.Second))
			}
			due := time.Now().Add(pause * time.Duration(worker) / time.Duration(workers))
			for round := 0; ctx.Err() == nil; round++ {
				if !waitUntil(ctx, due) {
					return
				}
				s, ok := next(worker, round)
				if !ok {
					return
				}
				a := t.Call(calls, s)
				if a.Outcome == NotSent {
					return
				}
				due = due.Add(pause)
				if now := time.Now(); due.Before(now) {
					due = now // what was missed is not made up for
				}
				if a.Outcome == Nothing {
					due = due.Add(10 * time.Millisecond) // nobody listens: no busy loop
				}
			}
		})
	}
	wg.Wait()
}

func waitUntil(ctx context.Context, due time.Time) bool {
	d := time.Until(due)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Close closes the clients' connections.
func (t *Traffic) Close() { t.client.CloseIdleConnections() }
