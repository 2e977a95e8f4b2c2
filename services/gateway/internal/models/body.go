// Package models finds out which model a request asks for.
package models

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
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
	if e := strings.Join(r.Header.Values("Content-Encoding"), ","); e != "" && !strings.EqualFold(e, "identity") {
		return "", &refusal.Refusal{Code: refusal.BadRequest, Status: http.StatusUnsupportedMediaType, Detail: "The body is compressed, so the model it asks for can't be read: send it plain."}
	}
	types := r.Header.Values("Content-Type")
	if !legible(types) {
		return "", illegible()
	}
	if boundary, ok, err := form(r); err != nil {
		return "", err
	} else if ok {
		return inForm(r, member, boundary, max(bound, maxForm), bodies)
	}
	if r.ContentLength > bound && tokens.IsJSON(r.Header.Get("Content-Type")) {
		return "", tooLarge()
	}
	kept := make([]byte, 0, max(min(r.ContentLength, bound, smallBody), 0)+leastRead)
	scanner := tokens.NewScanner(member, maxModel)
	for taken := int64(0); ; {
		if need := int64(len(kept)); need > smallBody && need >= taken {
			if !bodies.Take(r.Context(), roomStep) {
				return "", noRoom()
			}
			taken = need + roomStep
		}
		// No more than so much beyond bound and what is taken.
		kept = slices.Grow(kept, leastRead)
		n, err := r.Body.Read(kept[len(kept):min(cap(kept), len(kept)+mostRead)])
		fresh := kept[len(kept) : len(kept)+n]
		kept = kept[:len(kept)+n]
		_, _ = scanner.Write(fresh) // never fails
		switch {
		case wide(kept) && mayBeText(types):
			return "", illegible()
		case scanner.Alike():
			return "", &refusal.Refusal{Code: refusal.BadRequest, Detail: "The member " + member + " that names the model is written in other letters, and some parsers do not mind, so which model is meant can't be told."}
		case errors.Is(err, io.EOF):
			r.Body = inmemory.New(kept, r.Body)
			return modelName(scanner)
		case err != nil:
			return "", &refusal.Refusal{Code: refusal.BadRequest, Detail: "The body could not be read to its end."}
		case !scanner.Object():
			r.Body = whole{io.MultiReader(bytes.NewReader(kept), r.Body), r.Body}
			return modelName(scanner)
		case int64(len(kept)) > bound:
			return "", tooLarge()
		}
	}
}

// leastRead is room for what is read at once at least, mostRead is what is read at most.
const (
	leastRead = 512
	mostRead  = 64 << 10
)

// characters are those in which ASCII is what it is in UTF-8: what else the upstream
// makes of a body in others nobody here knows.
var characters = []string{"", "utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin1", "windows-1252"}

// legible: the body is not said to be in other characters.
func legible(types []string) bool {
	for _, t := range types {
		if t == "application/json" {
			continue // most are
		}
		_, params, err := mime.ParseMediaType(t)
		if err != nil && strings.Contains(strings.ToLower(t), "charset") || !slices.Contains(characters, strings.ToLower(params["charset"])) {
			return false
		}
	}
	return true
}

// wide: the body begins as JSON in UTF-16 or UTF-32 does, which many parsers find out
// by themselves. In UTF-8 none does.
func wide(body []byte) bool {
	return len(body) > 0 && body[0] >= 0xfe || bytes.IndexByte(body[:min(len(body), 4)], 0) >= 0
}

// mayBeText: nothing says that the body is of a kind that no parser of JSON is given.
func mayBeText(types []string) bool {
	for _, t := range types {
		media, _, err := mime.ParseMediaType(t)
		kind, _, _ := strings.Cut(media, "/")
		if err != nil || !slices.Contains([]string{"audio", "video", "image", "font", "multipart"}, kind) {
			return true
		}
	}
	return len(types) == 0
}

func illegible() error {
	return &refusal.Refusal{Code: refusal.BadRequest, Status: http.StatusUnsupportedMediaType, Detail: "The body is not in UTF-8, so the model it asks for can't be read: send it in UTF-8."}
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
	if name, ok := ascii(value); ok {
		return name, nil
	}
	var name string
	if err := json.Unmarshal(value, &name); err != nil {
		return "", nil // not a name: the upstream will say what it thinks of it
	}
	return name, nil
}

// ascii is what a JSON string says in which every byte stands for itself, as in most
// names; false: it has others, or is none.
func ascii(value []byte) (string, bool) {
	last := len(value) - 1
	if last < 1 || value[0] != '"' || value[last] != '"' {
		return "", false
	}
	for _, c := range value[1:last] {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return "", false
		}
	}
	return string(value[1:last]), true
}

// whole is a body that was read in part, and closes as the one it was.
type whole struct {
	io.Reader
	io.Closer
}
