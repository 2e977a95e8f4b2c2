package deliver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// refusal is an answer other than 2xx, or none.
type refusal struct {
	// outcome is a metric's label: one of a few words.
	outcome string
	// gone says that the receiver wants nothing more.
	gone bool
	// retryAfter is what the receiver asked for; 0 when it did not.
	retryAfter time.Duration
	err        error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

const (
	maxAnswerBytes = 64 << 10
	maxBodyBytes   = 256 << 10
	// maxRetryAfter bounds what a receiver may ask for.
	maxRetryAfter = time.Hour
)

// post sends a body and returns nil on 2xx, else a *refusal without secrets:
// an address may hold some in its path or query, so only its host is named.
func post(ctx context.Context, client *http.Client, to *url.URL, header http.Header, body []byte, now func() time.Time) error {
	if len(body) > maxBodyBytes {
		return &refusal{outcome: "too_large", err: fmt.Errorf("the alert has %d bytes, at most %d are sent", len(body), maxBodyBytes)}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to.String(), strings.NewReader(string(body)))
	if err != nil {
		return &refusal{outcome: "invalid", err: fmt.Errorf("post to %s: the request can't be made", to.Host)}
	}
	req.Header = header
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "tollkeeper-alerter")
	res, err := client.Do(req)
	if err != nil {
		var quoted *url.Error
		if errors.As(err, &quoted) {
			err = quoted.Err // without the address
		}
		r := &refusal{outcome: "unreachable", err: fmt.Errorf("post to %s: %w", to.Host, err)}
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			r.outcome = "timeout"
		}
		return r
	}
	defer func() { _ = res.Body.Close() }() // nothing is lost with it
	// Read so that the connection can be used again, up to a bound.
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswerBytes))
	if res.StatusCode >= 200 && res.StatusCode <= 299 {
		return nil
	}
	r := &refusal{outcome: "status_" + strconv.Itoa(min(max(res.StatusCode/100, 1), 5)) + "xx", retryAfter: retryAfter(res.Header.Get("Retry-After"), now()), err: fmt.Errorf("%s answered %d", to.Host, res.StatusCode)}
	if res.StatusCode == http.StatusGone {
		r.outcome, r.gone = "gone", true
	}
	return r
}

// retryAfter reads seconds or a date; 0 when there is neither.
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return 0
	}
	if s, err := strconv.ParseInt(value, 10, 64); err == nil {
		return time.Duration(min(max(s, 0), int64(maxRetryAfter/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(at.Sub(now), 0), maxRetryAfter)
	}
	return 0
}

// newClient returns a client that follows no redirect: a signed alert goes
// where it was configured to go.
func newClient(timeout time.Duration) *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost, t.MaxConnsPerHost = 2, 4
	t.ResponseHeaderTimeout = timeout
	return &http.Client{Transport: t, Timeout: timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}
