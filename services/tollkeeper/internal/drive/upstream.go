package drive

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
)

// ServeUpstream answers calls as their trace recorded them, in the shape of OpenAI's
// chat completions, until ctx is done. It reports what the trace reports and nothing
// else: what was not recorded stays unknown.
func ServeUpstream(ctx context.Context, l net.Listener) error {
	s := &fasthttp.Server{
		Handler: upstream, NoDefaultServerHeader: true, NoDefaultDate: true, MaxRequestBodySize: mostPadding + 1<<16,
		DisablePreParseMultipartForm: true, IdleTimeout: time.Minute, CloseOnShutdown: true, Logger: quiet{},
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := s.ShutdownWithContext(stop); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("stop the replay's upstream: %w", err)
	}
	return nil
}

// quiet drops what a server says of connections that gateways break off.
type quiet struct{}

func (quiet) Printf(string, ...any) {}

func upstream(c *fasthttp.RequestCtx) {
	status, inBody, inHeader, err := prescribed(string(c.Request.Header.Peek(answerHeader)))
	if err != nil {
		c.Error(err.Error(), fasthttp.StatusBadRequest)
		return
	}
	c.SetStatusCode(status)
	good := status/100 == 2 && status != fasthttp.StatusNoContent && !c.IsHead()
	if !good {
		// Token counts are read out of the body of a good answer only.
		inHeader, inBody = append(inHeader, inBody...), nil
	}
	if len(inHeader) > 0 {
		texts := make([]string, len(inHeader))
		for i, q := range inHeader {
			texts[i] = string(q.Meter) + "=" + strconv.FormatInt(q.Value, 10)
		}
		c.Response.Header.Set(modelserver.MetersHeader, strings.Join(texts, ", "))
	}
	if status == fasthttp.StatusNoContent || status == fasthttp.StatusNotModified {
		return
	}
	c.SetContentType("application/json")
	body := c.Response.Body()[:0]
	switch {
	case status >= 400:
		body = append(body, `{"error":{"message":"the trace recorded this status","type":"replayed"}}`...)
	default:
		body = append(body, `{"id":"chatcmpl-replayed","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Recorded answer."},"finish_reason":"stop"}]`...)
		body = appendUsage(body, inBody)
		body = append(body, '}')
	}
	c.SetBody(body)
}

// prescribed reads what the answer is to be.
func prescribed(s string) (status int, inBody, inHeader []usage.Quantity, err error) {
	status = fasthttp.StatusOK
	for part := range strings.SplitSeq(s, ",") {
		name, text, _ := strings.Cut(part, "=")
		v, err := strconv.ParseInt(text, 10, 64)
		if s != "" && err != nil {
			return 0, nil, nil, fmt.Errorf("%s: %q is not a number", answerHeader, text)
		}
		switch m := usage.Meter(name); {
		case s == "":
		case name == "status":
			status = int(v)
		case m == usage.InputTokens, m == usage.OutputTokens, m == usage.CachedInputTokens, m == usage.ReasoningTokens:
			inBody = append(inBody, usage.Quantity{Meter: m, Value: v})
		default:
			inHeader = append(inHeader, usage.Quantity{Meter: m, Value: v})
		}
	}
	if status < 200 || status > 599 {
		return 0, nil, nil, fmt.Errorf("%s: %d is not the status of an answer", answerHeader, status)
	}
	return status, inBody, inHeader, nil
}

// appendUsage writes OpenAI's usage object. A count that is not known is left out,
// and with it the total.
func appendUsage(b []byte, counts []usage.Quantity) []byte {
	if len(counts) == 0 {
		return b
	}
	var of [4]int64
	var known [4]bool
	for _, q := range counts {
		for i, m := range [...]usage.Meter{usage.InputTokens, usage.OutputTokens, usage.CachedInputTokens, usage.ReasoningTokens} {
			if q.Meter == m {
				of[i], known[i] = q.Value, true
			}
		}
	}
	b = append(b, `,"usage":{`...)
	member := func(name string, v int64, end string) {
		if b[len(b)-1] != '{' {
			b = append(b, ',')
		}
		b = append(b, name...)
		b = strconv.AppendInt(b, v, 10)
		b = append(b, end...)
	}
	if known[0] {
		member(`"prompt_tokens":`, of[0], "")
	}
	if known[1] {
		member(`"completion_tokens":`, of[1], "")
	}
	if known[0] && known[1] {
		member(`"total_tokens":`, of[0]+of[1], "")
	}
	if known[2] {
		member(`"prompt_tokens_details":{"cached_tokens":`, of[2], "}")
	}
	if known[3] {
		member(`"completion_tokens_details":{"reasoning_tokens":`, of[3], "}")
	}
	return append(b, '}')
}
