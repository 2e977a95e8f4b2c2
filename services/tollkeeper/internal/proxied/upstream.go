package proxied

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

// The paths of the upstream, and what it answers there.
const (
	plainPath  = "/plain"
	chatPath   = "/v1/chat/completions"
	streamPath = "/stream/v1/chat/completions"

	plainBytes = 1024
	// A stream goes at a pace: at full speed its chunks would melt into one another.
	streamEvents = 100
	streamPace   = 2 * time.Millisecond
)

// ServeUpstream answers every call with the same bytes until ctx is done: text where
// nothing is asked for, a chat completion with usage, and a stream of chunks, one
// write each. It does as little as an HTTP/1.1 server can, so that the proxies before
// it are most of what is measured.
func ServeUpstream(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		all.Go(func() {
			end := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer end()
			defer func() { _ = conn.Close() }() // the proxy sees it
			answerAll(conn)
		})
	}
}

// answerAll answers the calls of one connection until it ends or makes no sense.
func answerAll(conn net.Conn) {
	r := bufio.NewReaderSize(conn, maxHeader)
	for {
		head, err := header(r)
		if err != nil {
			return
		}
		_, target, _ := bytes.Cut(head[:bytes.IndexByte(head, '\r')], []byte(" "))
		kind := kindOf(target)
		length, err := framed(head)
		if err != nil {
			return
		}
		if err := skip(r, length); err != nil {
			return
		}
		if err := kind.answer(conn); err != nil {
			return
		}
	}
}

func kindOf(target []byte) Kind {
	switch {
	case bytes.HasPrefix(target, []byte(streamPath)):
		return Stream
	case bytes.HasPrefix(target, []byte(chatPath)):
		return Chat
	}
	return Plain
}

// Kind of a call.
type Kind int

// The kinds.
const (
	Plain  Kind = iota // GET, 1 KiB of text
	Chat               // POST of a chat completion's request; the answer has usage
	Stream             // the same, streamed
)

// String names the kind in rows and errors.
func (k Kind) String() string {
	return [...]string{Plain: "plain, GET of 1 KiB", Chat: "chat, model and usage in JSON", Stream: "streamed chat, a chunk"}[k]
}

const chatCompletion = `{"id":"chatcmpl-bench","object":"chat.completion","created":1767225600,"model":"model-1","choices":[{"index":0,"message":{"role":"assistant","content":"` +
	`Metering counts a call once, whatever is redelivered, retried or late. A gateway admits it from memory, and the ledger keeps what it used. ` +
	`When the allowance is used up the answer is 402, with what was used of what, until when, and which decision says so."},"logprobs":null,"finish_reason":"stop"}],` +
	`"usage":{"prompt_tokens":87,"completion_tokens":64,"total_tokens":151,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}},"system_fingerprint":"fp_bench"}`

const chatRequest = `{"model":"model-1","messages":[{"role":"system","content":"You explain billing to engineers. Be brief, and name the thing by its usual term."},` +
	`{"role":"user","content":"What happens to a call whose event is sent twice, once before and once after the gateway was restarted, and how can I see that it was counted once?"}],` +
	`"max_tokens":256,"temperature":0.2,"top_p":1,"user":"bench"`

const streamEvent = `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1767225600,"model":"model-1","system_fingerprint":"fp_bench","choices":[{"index":0,"delta":{"content":" counted"},"logprobs":null,"finish_reason":null}],"usage":null}` + "\n\n"

const streamEnd = `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1767225600,"model":"model-1","system_fingerprint":"fp_bench","choices":[],"usage":{"prompt_tokens":87,"completion_tokens":200,"total_tokens":287}}` + "\n\ndata: [DONE]\n\n"

var (
	plainAnswer = []byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n", plainBytes) + strings.Repeat("a row of text, and so on\r\n", plainBytes/26+1)[:plainBytes])
	chatAnswer  = []byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nOpenai-Processing-Ms: 12\r\nX-Ratelimit-Remaining-Requests: 9999\r\n\r\n", len(chatCompletion)) + chatCompletion)
	streamBegin = []byte("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n")
	streamChunk = chunk(streamEvent)
	streamLast  = append(chunk(streamEnd), "0\r\n\r\n"...)
)

func chunk(data string) []byte { return []byte(fmt.Sprintf("%x\r\n%s\r\n", len(data), data)) }

func (k Kind) answer(conn net.Conn) error {
	switch k {
	case Stream:
		pace := time.NewTicker(streamPace)
		defer pace.Stop()
		// An answer that begins while the proxy still looks for the end of the request's
		// body makes Go's transport break the call off (ErrBodyReadAfterClose).
		<-pace.C
		_, err := conn.Write(streamBegin)
		for range streamEvents {
			if err != nil {
				return err
			}
			<-pace.C
			_, err = conn.Write(streamChunk)
		}
		if err == nil {
			_, err = conn.Write(streamLast)
		}
		return err
	case Chat:
		_, err := conn.Write(chatAnswer)
		return err
	case Plain:
		_, err := conn.Write(plainAnswer)
		return err
	}
	return errors.New("there is no such kind of call")
}

// request returns the bytes of a call with an API key.
func (k Kind) request(host, key string) []byte {
	line, body := "GET "+plainPath+" HTTP/1.1", ""
	switch k {
	case Chat:
		line, body = "POST "+chatPath+" HTTP/1.1", chatRequest+"}"
	case Stream:
		line, body = "POST "+streamPath+" HTTP/1.1", chatRequest+`,"stream":true,"stream_options":{"include_usage":true}}`
	case Plain:
	}
	head := line + "\r\nHost: " + host + "\r\nAuthorization: Bearer " + key + "\r\nUser-Agent: tollkeeper-bench\r\nAccept: */*\r\n"
	if body != "" {
		head += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return []byte(head + "\r\n" + body)
}
