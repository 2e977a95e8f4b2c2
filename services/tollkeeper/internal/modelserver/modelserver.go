// Package modelserver is the upstream of demo and replay: an HTTP server that
// answers chat completions in the shape of OpenAI's API. It runs no model: it
// reports the token counts that the request asks it to report, or counts that
// follow from the request's size.
package modelserver

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/segmentio/ksuid"
)

// maxBody bounds a request, bytes.
const maxBody = 4 << 20

// MetersHeader carries readings of meters that the usage object has no field
// for: "name=value, name=value".
const MetersHeader = "Tollkeeper-Meters"

// Options configure the server.
type Options struct {
	// Delay before an answer; 0 is at once.
	Delay time.Duration
}

// Request is the part of a chat completion request that is looked at.
// Metadata may prescribe the answer: input_tokens, output_tokens,
// cached_input_tokens, reasoning_tokens, status, and meter.<name>.
type Request struct {
	Model     string            `json:"model"`
	MaxTokens int64             `json:"max_tokens,omitempty"`
	Messages  []Message         `json:"messages"`
	Metadata  map[string]string `json:"metadata,omitempty"`
}

// Message is one message of a chat.
type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type completion struct {
	ID      string           `json:"id"`
	Object  string           `json:"object"`
	Created int64            `json:"created"`
	Model   string           `json:"model"`
	Choices []choice         `json:"choices"`
	Usage   map[string]any   `json:"usage,omitempty"`
	Error   *completionError `json:"error,omitempty"`
}

type completionError struct {
	Message string `json:"message"`
	Type    string `json:"type"`
}

type choice struct {
	Index        int     `json:"index"`
	Message      Message `json:"message"`
	FinishReason string  `json:"finish_reason"`
}

// Handler returns the server's handler. Safe for concurrent use.
func Handler(o Options) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			http.Error(w, "the request is larger than 4 MiB", http.StatusRequestEntityTooLarge)
			return
		}
		var req Request
		if len(body) > 0 {
			if err := json.Unmarshal(body, &req); err != nil {
				http.Error(w, "the request is not JSON: "+err.Error(), http.StatusBadRequest)
				return
			}
		}
		if o.Delay > 0 {
			select {
			case <-time.After(o.Delay):
			case <-r.Context().Done():
				return
			}
		}
		if err := answer(w, r, &req, len(body)); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
}

func answer(w http.ResponseWriter, r *http.Request, req *Request, size int) error {
	status := http.StatusOK
	c := completion{ID: "chatcmpl-" + ksuid.New().String(), Object: "chat.completion", Created: time.Now().Unix(), Model: req.Model}
	counts := map[string]int64{}
	var meters []string
	for k, s := range req.Metadata {
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return fmt.Errorf("metadata %s is %q, which is not a number", k, s)
		}
		if name, ok := strings.CutPrefix(k, "meter."); ok {
			meters = append(meters, name+"="+s)
		} else if k == "status" {
			status = int(v)
		} else {
			counts[k] = v
		}
	}
	if status < 200 || status > 599 {
		return fmt.Errorf("metadata status is %d, which is not a final HTTP status", status)
	}
	if len(counts) == 0 && len(meters) == 0 && r.Method == http.MethodPost {
		// About four bytes a token; an answer as long as it may be, up to 256.
		counts["input_tokens"] = int64(size)/4 + 1
		counts["output_tokens"] = min(max(req.MaxTokens, 16), 256)
	}
	c.Usage = usageObject(counts)
	if status >= 400 {
		c.Error = &completionError{Message: "the request asked for this status", Type: "replayed"}
	} else {
		c.Choices = []choice{{Message: Message{Role: "assistant", Content: "Recorded answer."}, FinishReason: "stop"}}
	}
	slices.Sort(meters)
	if len(meters) > 0 {
		w.Header().Set(MetersHeader, strings.Join(meters, ", "))
	}
	out, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if status == http.StatusNoContent || status == http.StatusNotModified {
		w.WriteHeader(status) // no body is allowed
		return nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(out)))
	w.WriteHeader(status)
	_, _ = w.Write(out) // the client may be gone; there is nobody to tell
	return nil
}

// usageObject writes counts as OpenAI's usage; a count that is not given is
// left out.
func usageObject(counts map[string]int64) map[string]any {
	if len(counts) == 0 {
		return nil
	}
	u := map[string]any{}
	var total int64
	if v, ok := counts["input_tokens"]; ok {
		u["prompt_tokens"] = v
		total += v
	}
	if v, ok := counts["output_tokens"]; ok {
		u["completion_tokens"] = v
		total += v
	}
	if v, ok := counts["cached_input_tokens"]; ok {
		u["prompt_tokens_details"] = map[string]any{"cached_tokens": v}
	}
	if v, ok := counts["reasoning_tokens"]; ok {
		u["completion_tokens_details"] = map[string]any{"reasoning_tokens": v}
	}
	u["total_tokens"] = total
	return u
}
