// Package drive sends recorded traffic through a gateway over real HTTP, to an upstream
// of its own that answers as was recorded, and notes what the clients saw.
package drive

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// EventTimeHeader carries a call's recorded time to a gateway that is
// configured to trust it.
const EventTimeHeader = "Tollkeeper-Event-Time"

// Options say how to drive a trace.
type Options struct {
	// Rows in order of time.
	Rows []trace.Row
	// Account returns the number of a row's account, from 0 on.
	Account func(row int) int
	// Speed is how many seconds of the trace pass in one second; 0 sends as
	// fast as the gateway answers.
	Speed float64
	// KeepTime sends the trace's own time stamps as event time.
	KeepTime bool
	// Concurrency bounds the calls in flight.
	Concurrency int
	// Ordered sends an account's calls one after the other, each when the one before
	// is answered: then the same of them are refused every time, as far as the limits'
	// tier allows.
	Ordered bool
	// Steps move the ledger's clock through the trace; nil: its time is not ours.
	Steps *Steps
	// Reserve sends requests whose cost is bounded by what the trace recorded, as
	// limits on tokens of the tiers exact and leased ask for.
	Reserve bool
	// Host is the gateway's host:port.
	Host string
	// Key returns the API key that a row is sent with, Path where it is sent.
	Key  func(row int) string
	Path func(row int) string
	// Answered counts answers while the drive goes on.
	Answered *atomic.Int64
	// Half is called once, when half of the calls are answered; may be nil.
	Half func()
}

// Outcome of a row.
type Outcome uint8

// The outcomes that are no refusal; greater ones are codes of Seen.Codes.
const (
	NotSent Outcome = iota
	Admitted
	// Failed calls got no answer: nobody can say whether they were counted.
	Failed
	firstCode
)

// Seen is what the clients of a whole replay saw, row by row.
type Seen struct {
	Outcomes []Outcome
	// Sent is when each row was sent, after the start.
	Sent  []time.Duration
	Codes []usage.Code
	// Failures is how many rows Failed; LastError says why the last of them did.
	Failures  int64
	LastError error
	Took      time.Duration
	// Longest is the longest time from sending to answer.
	Longest time.Duration
}

// Code returns the code that a row was refused with; empty: it was not refused.
func (s *Seen) Code(row int) usage.Code {
	if o := s.Outcomes[row]; o >= firstCode {
		return s.Codes[o-firstCode]
	}
	return ""
}

// driver is one drive.
type driver struct {
	o     *Options
	seen  *Seen
	start time.Time
	half  int64

	mu      sync.Mutex // of what follows
	codes   map[usage.Code]Outcome
	lastErr error

	flight sync.WaitGroup
}

// callTimeout is far more than a gateway takes for an answer.
const callTimeout = 60 * time.Second

// Run sends every row once and returns what the clients saw. When ctx is done it
// stops, with what it has and ctx's error: rows that were sent are answered.
func Run(ctx context.Context, o Options) (*Seen, error) {
	n := len(o.Rows)
	if n == 0 {
		return nil, errors.New("the trace has no rows (after the filters)")
	}
	d := &driver{
		o: &o, seen: &Seen{Outcomes: make([]Outcome, n), Sent: make([]time.Duration, n)}, start: time.Now(), half: int64(n / 2), codes: map[usage.Code]Outcome{},
	}
	// Each worker has a connection of its own, which it keeps.
	queues := make([]chan int, 1)
	if o.Ordered {
		queues = make([]chan int, o.Concurrency)
	}
	for i := range queues {
		queues[i] = make(chan int, 32)
	}
	var workers sync.WaitGroup
	slowest := make([]time.Duration, o.Concurrency)
	for w := range o.Concurrency {
		workers.Go(func() { slowest[w] = d.work(queues[w%len(queues)]) })
	}
	err := d.dispatch(ctx, queues)
	for _, q := range queues {
		close(q)
	}
	workers.Wait()
	s := d.seen
	s.Took = time.Since(d.start)
	for _, t := range slowest {
		s.Longest = max(s.Longest, t)
	}
	for _, out := range s.Outcomes {
		if out == Failed {
			s.Failures++
		}
	}
	s.LastError = d.lastErr
	return s, err
}

// dispatch hands the rows to the workers, in order and in time.
func (d *driver) dispatch(ctx context.Context, queues []chan int) error {
	o := d.o
	first := o.Rows[0].Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	upTo := 0 // rows whose time the ledger's clock has reached
	for i := range o.Rows {
		if o.Speed > 0 {
			due := d.start.Add(time.Duration(float64(o.Rows[i].Time.Sub(first)) / o.Speed))
			if wait := time.Until(due); wait > 0 {
				timer.Reset(wait)
				select {
				case <-timer.C:
				case <-ctx.Done():
				}
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if o.Steps != nil && i == upTo {
			var err error
			if upTo, err = o.Steps.take(ctx, o.Rows, i, d.flight.Wait); err != nil {
				return err
			}
		}
		q := queues[0]
		if len(queues) > 1 {
			q = queues[o.Account(i)%len(queues)]
		}
		d.flight.Add(1)
		q <- i // workers go on until the queue is closed
	}
	return nil
}

// work sends rows one after the other and returns the longest time to an answer.
func (d *driver) work(queue <-chan int) (slowest time.Duration) {
	client := &connection{host: d.o.Host}
	defer client.close()
	req, resp := fasthttp.AcquireRequest(), fasthttp.AcquireResponse()
	defer fasthttp.ReleaseRequest(req)
	defer fasthttp.ReleaseResponse(resp)
	var body []byte
	for i := range queue {
		req.Reset()
		body = d.request(req, body[:0], i)
		sent := time.Since(d.start)
		d.seen.Sent[i] = sent
		out := Failed
		code, err := answer(client, req, resp)
		switch {
		case err != nil:
			d.mu.Lock()
			d.lastErr = fmt.Errorf("row %s:%d: %w", d.o.Rows[i].File, d.o.Rows[i].Line, err)
			d.mu.Unlock()
		case code == "":
			out = Admitted
		default:
			out = d.code(code)
		}
		if err == nil {
			slowest = max(slowest, time.Since(d.start)-sent)
		}
		d.seen.Outcomes[i] = out
		d.flight.Done()
		if n := d.o.Answered.Add(1); n == d.half && d.o.Half != nil {
			d.o.Half()
		}
	}
	return slowest
}

// code returns a refusal's outcome.
func (d *driver) code(c usage.Code) Outcome {
	d.mu.Lock()
	defer d.mu.Unlock()
	out, ok := d.codes[c]
	if !ok {
		out = firstCode + Outcome(len(d.seen.Codes))
		d.codes[c] = out
		d.seen.Codes = append(d.seen.Codes, c)
	}
	return out
}

const (
	problemType = "application/problem+json"
	// codeHeader has a refusal's code.
	codeHeader = refusal.CodeHeader
)

// answer makes the call and returns the refusal's code, empty when admitted.
func answer(client *connection, req *fasthttp.Request, resp *fasthttp.Response) (usage.Code, error) {
	resp.Reset()
	if err := client.call(req, resp); err != nil {
		return "", err
	}
	if string(resp.Header.ContentType()) != problemType {
		return "", nil
	}
	if code := usage.Code(resp.Header.Peek(codeHeader)); code.Status() != 0 {
		return code, nil // an answer to HEAD has no body
	}
	if req.Header.IsHead() {
		return "", fmt.Errorf("the gateway answered %d to a HEAD request, without saying why", resp.StatusCode())
	}
	var problem struct {
		Code   usage.Code `json:"code"`
		Detail string     `json:"detail"`
	}
	if err := json.Unmarshal(resp.Body(), &problem); err != nil {
		return "", fmt.Errorf("read problem: %w", err)
	}
	if problem.Code.Status() == 0 {
		return "", fmt.Errorf("the gateway answered %d: %s", resp.StatusCode(), problem.Detail)
	}
	return problem.Code, nil
}
