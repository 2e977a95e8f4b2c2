// Package models finds out which model a request asks for.
package models

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/tokens"
)

// maxModel bounds a model's name in JSON.
const maxModel = 6*256 + 2

// InBody returns the model that a member of the JSON body names, empty when there is
// none. It reads the body as far as it has to and puts it back. A body that is
// no JSON object is not read on, but of one that something follows the upstream may
// read the object. One that is, is read whole: the last of several
// members of the name counts, for the upstream too.
func InBody(r *http.Request, member string, bound int64, bodies *Room) (string, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return "", nil
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return "", &refusal.Refusal{Code: refusal.BadRequest, Status: http.StatusUnsupportedMediaType, Detail: "The body is compressed, so the model it asks for can't be read: send it plain."}
	}
	if r.ContentLength > bound && tokens.IsJSON(r.Header.Get("Content-Type")) {
		return "", tooLarge()
	}
	var kept bytes.Buffer
	if n := r.ContentLength; n > 0 && n <= bound {
		kept.Grow(int(min(n, 64<<10)) + bytes.MinRead)
	}
	scanner := tokens.NewScanner(member, maxModel)
	chunk := make([]byte, 4096)
	for taken := int64(0); ; {
		if need := int64(kept.Len()); need > smallBody && need >= taken {
			if !bodies.Take(r.Context(), roomStep) {
				return "", &refusal.Refusal{Code: refusal.TooLarge, Status: http.StatusServiceUnavailable, Detail: "Too many large bodies are being read at once: try again in a moment."}
			}
			taken = need + roomStep
		}
		n, err := r.Body.Read(chunk)
		kept.Write(chunk[:n])
		_, _ = scanner.Write(chunk[:n]) // never fails
		switch {
		case errors.Is(err, io.EOF):
			r.Body = whole{bytes.NewReader(kept.Bytes()), r.Body}
			return modelName(scanner)
		case err != nil:
			return "", &refusal.Refusal{Code: refusal.BadRequest, Detail: "The body could not be read to its end."}
		case !scanner.Object():
			r.Body = whole{io.MultiReader(bytes.NewReader(kept.Bytes()), r.Body), r.Body}
			return modelName(scanner)
		case int64(kept.Len()) > bound:
			return "", tooLarge()
		}
	}
}

// Room bounds what the bodies that are read before their calls are admitted take together. Safe for
// concurrent use.
type Room struct {
	limit int64
	used  atomic.Int64
}

const (
	// DefaultRoom in bytes. While bodies grow their buffers may take twice as much.
	DefaultRoom = 1 << 30
	// smallBody is not worth counting: connections bound those.
	smallBody = 64 << 10
	roomStep  = 1 << 20
)

// NewRoom returns one of that many bytes.
func NewRoom(limit int64) *Room { return &Room{limit: limit} }

// Take reports whether there are n more bytes; they are free again when the request
// is over.
func (r *Room) Take(request context.Context, n int64) bool {
	if r.used.Add(n) > r.limit {
		r.used.Add(-n)
		return false
	}
	context.AfterFunc(request, func() { r.used.Add(-n) })
	return true
}

func tooLarge() error {
	return &refusal.Refusal{Code: refusal.TooLarge, Detail: "The body is too large for the model it asks for to be found."}
}

func modelName(s *tokens.Scanner) (string, error) {
	value, ok := s.Value()
	if !ok {
		if s.Ended() && !s.Absent() {
			return "", &refusal.Refusal{Code: refusal.BadRequest, Detail: "The model's name is too long."}
		}
		return "", nil
	}
	var name string
	if err := json.Unmarshal(value, &name); err != nil {
		return "", nil // not a name: the upstream will say what it thinks of it
	}
	return name, nil
}

// whole is a body that was read, and closes as the one it was.
type whole struct {
	io.Reader
	io.Closer
}
