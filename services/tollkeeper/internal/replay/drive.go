// Package replay drives recorded traffic through a gateway over real HTTP and
// checks that what was sent is what was written down, counted and kept.
package replay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// EventTimeHeader carries a call's recorded time to a gateway that is
// configured to trust it.
const EventTimeHeader = "Tollkeeper-Event-Time"

// DriveOptions say how to drive a trace.
type DriveOptions struct {
	Rows []trace.Row
	// Speed is how many seconds of the trace pass in one second; 0 sends as
	// fast as the gateway answers.
	Speed float64
	// KeepTime sends the trace's own time stamps as event time.
	KeepTime bool
	// Concurrency bounds the calls in flight.
	Concurrency int
	// URL of the gateway, without a path.
	URL string
	// Key returns the API key that a row is sent with, Path where it is sent.
	Key  func(trace.Row) string
	Path func(trace.Row) string
	// Progress is told of every answer; called from many goroutines.
	Progress func()
}

// Tally is what clients saw, for one account.
type Tally struct {
	Admitted int64
	// Refused by machine code.
	Refused map[usage.Code]int64
	// Meters that admitted calls reported.
	Meters map[usage.Meter]int64
	// AdmittedAt are the times at which admitted calls were sent, sorted.
	AdmittedAt []time.Time
}

// Refusals returns how many calls were refused.
func (t *Tally) Refusals() int64 {
	var n int64
	for _, v := range t.Refused {
		n += v
	}
	return n
}

// Seen is what the clients of a whole replay saw.
type Seen struct {
	Accounts map[string]*Tally // by the trace's account
	// Failed calls got no answer: nobody can say whether they were counted.
	Failed    int64
	LastError error
	Took      time.Duration
	// Longest is the longest time from sending to answer.
	Longest time.Duration
}

// Drive sends every row once and returns what the clients saw. It stops early,
// with what it has, when ctx is done.
func Drive(ctx context.Context, o DriveOptions) (*Seen, error) {
	if len(o.Rows) == 0 {
		return nil, errors.New("the trace has no rows (after the filters)")
	}
	if o.Concurrency <= 0 {
		o.Concurrency = 32
	}
	transport := &http.Transport{MaxIdleConns: o.Concurrency, MaxIdleConnsPerHost: o.Concurrency, IdleConnTimeout: 30 * time.Second, DisableCompression: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 60 * time.Second}

	seen := &Seen{Accounts: map[string]*Tally{}}
	var mu sync.Mutex
	work := make(chan trace.Row)
	var wg sync.WaitGroup
	for range o.Concurrency {
		wg.Go(func() {
			for row := range work {
				sent := time.Now()
				code, err := send(ctx, client, &o, row)
				took := time.Since(sent)
				mu.Lock()
				seen.note(row, sent, took, code, err)
				mu.Unlock()
				if o.Progress != nil {
					o.Progress()
				}
			}
		})
	}
	start, first := time.Now(), earliest(o.Rows)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for _, row := range o.Rows {
		if o.Speed > 0 {
			due := start.Add(time.Duration(float64(row.Time.Sub(first)) / o.Speed))
			if wait := time.Until(due); wait > 0 {
				timer.Reset(wait)
				select {
				case <-timer.C:
				case <-ctx.Done():
				}
			}
		}
		select {
		case work <- row:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
	}
	close(work)
	wg.Wait()
	seen.Took = time.Since(start)
	for _, t := range seen.Accounts {
		slices.SortFunc(t.AdmittedAt, time.Time.Compare)
	}
	return seen, ctx.Err()
}

func earliest(rows []trace.Row) time.Time {
	first := rows[0].Time
	for _, r := range rows {
		if r.Time.Before(first) {
			first = r.Time
		}
	}
	return first
}

func (s *Seen) note(row trace.Row, sent time.Time, took time.Duration, code usage.Code, err error) {
	if err != nil {
		s.Failed++
		s.LastError = err
		return
	}
	s.Longest = max(s.Longest, took)
	t := s.Accounts[row.Account]
	if t == nil {
		t = &Tally{Refused: map[usage.Code]int64{}, Meters: map[usage.Meter]int64{}}
		s.Accounts[row.Account] = t
	}
	if code != "" {
		t.Refused[code]++
		return
	}
	t.Admitted++
	t.AdmittedAt = append(t.AdmittedAt, sent)
	for _, q := range row.Meters {
		t.Meters[q.Meter] += q.Value
	}
}

// send makes one call and returns the refusal's code, empty when admitted.
func send(ctx context.Context, client *http.Client, o *DriveOptions, row trace.Row) (usage.Code, error) {
	body, err := json.Marshal(request(row))
	if err != nil {
		return "", fmt.Errorf("marshal request: %w", err)
	}
	method := row.Method
	if method == "" {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(ctx, method, o.URL+o.Path(row), bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+o.Key(row))
	req.Header.Set("Content-Type", "application/json")
	if o.KeepTime {
		req.Header.Set(EventTimeHeader, row.Time.Format(time.RFC3339Nano))
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end below
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "", fmt.Errorf("read answer: %w", err)
	}
	if resp.Header.Get("Content-Type") != "application/problem+json" {
		return "", nil
	}
	var problem struct {
		Code   usage.Code `json:"code"`
		Detail string     `json:"detail"`
	}
	if err := json.Unmarshal(answer, &problem); err != nil {
		return "", fmt.Errorf("read problem: %w", err)
	}
	if problem.Code.Status() == 0 {
		return "", fmt.Errorf("the gateway answered %d: %s", resp.StatusCode, problem.Detail)
	}
	return problem.Code, nil
}

// request asks the model server to report what the trace recorded.
func request(row trace.Row) modelserver.Request {
	req := modelserver.Request{Model: row.Model, Messages: []modelserver.Message{{Role: "user", Content: "Recorded question."}}, Metadata: map[string]string{}}
	if row.Status != 0 {
		req.Metadata["status"] = strconv.Itoa(row.Status)
	}
	// Token counts are read out of the body of a good answer; everything else is
	// reported in a header.
	inBody := row.Method != http.MethodHead && (row.Status == 0 || row.Status/100 == 2 && row.Status != http.StatusNoContent)
	for _, q := range row.Meters {
		name := "meter." + string(q.Meter)
		switch q.Meter {
		case usage.InputTokens, usage.OutputTokens, usage.CachedInputTokens, usage.ReasoningTokens:
			if inBody {
				name = string(q.Meter)
			}
		}
		req.Metadata[name] = strconv.FormatInt(q.Value, 10)
	}
	return req
}
