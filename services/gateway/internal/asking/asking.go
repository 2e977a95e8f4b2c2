// Package asking makes streamed chat completions and completions end with their usage:
// they do so only where stream_options ask for it. The request is changed at that place
// alone, and what the answer has in it only because of that the gateway takes off again
// (package tokens).
package asking

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/tollkeeper/tollkeeper/services/gateway/internal/counts"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/inmemory"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/tokens"
)

// Room hands out memory. Take reports whether there are n more bytes, which are free
// again when the request's context is done.
type Room interface {
	Take(request context.Context, n int64) bool
}

// Held is a request's body that is in memory already.
type Held interface{ Bytes() []byte }

const (
	// smallBody is not worth counting: connections bound those.
	smallBody = 64 << 10
	roomStep  = 1 << 20
)

// Of makes a request ask for its usage, and reports whether it does so only because of
// this: the client does not expect to be told. A body that is encoded, larger than max
// bytes or no JSON object is passed on as it is; so is what can't be read to its end,
// with the error at its place.
func Of(r *http.Request, max int64, room Room) (asks bool) {
	if r.Body == nil || r.Body == http.NoBody || !tokens.IsPlain(strings.Join(r.Header.Values("Content-Encoding"), ",")) {
		return false
	}
	raw, ok := read(r, max, room)
	if !ok {
		return false
	}
	edited, asks := Edit(raw)
	if edited == nil {
		return false
	}
	r.Body = inmemory.New(edited, r.Body)
	r.ContentLength, r.TransferEncoding = int64(len(edited)), nil
	if len(r.Trailer) > 0 {
		r.ContentLength = -1 // only a body in chunks has something behind it
	}
	r.Header.Del("Content-Length")
	for _, digest := range []string{"Content-Digest", "Repr-Digest", "Digest", "Content-Md5"} {
		r.Header.Del(digest) // of the body as it was
	}
	return asks
}

// body closes as the one it was.
type body struct {
	io.Reader
	io.Closer
}

// read takes the body into memory; false: not all of it, and it is put back.
func read(r *http.Request, max int64, room Room) ([]byte, bool) {
	if h, ok := r.Body.(Held); ok {
		raw := h.Bytes()
		return raw, int64(len(raw)) <= max
	}
	if r.ContentLength > max {
		return nil, false
	}
	var kept bytes.Buffer
	back := func(err error) ([]byte, bool) {
		rest := io.Reader(r.Body)
		if err != nil {
			rest = failing{err}
		}
		r.Body = body{io.MultiReader(&kept, rest), r.Body}
		return nil, false
	}
	for taken := int64(smallBody); ; taken += roomStep {
		_, err := io.CopyN(&kept, r.Body, min(taken, max)+1-int64(kept.Len()))
		switch {
		case errors.Is(err, io.EOF):
			raw := kept.Bytes()
			r.Body = inmemory.New(raw, r.Body)
			return raw, true
		case err != nil:
			return back(err)
		case int64(kept.Len()) > max || !room.Take(r.Context(), roomStep):
			return back(nil)
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// edit replaces a stretch of a body.
type edit struct {
	from, to int
	by       string
}

// Edit returns the JSON body of a request with its usage asked for; nil: it needs no
// change, or is none of which a stream can come. asks is as Of has it. Members count in
// any spelling that some parser takes for theirs, and all of those that are there
// several times: which one counts is the upstream's choice, and what it is not asked for
// it does not tell.
func Edit(raw []byte) (edited []byte, asks bool) {
	if !mayStream(raw) {
		return nil, false
	}
	streams, exact, asked := false, false, false
	var edits []edit
	end := 0
	ok := counts.EachMember(raw, func(name []byte, m counts.Span) {
		end = m.To
		value := raw[m.From:m.To]
		switch {
		case bytes.EqualFold(name, []byte("stream")):
			streams = streams || truth(value)
		case bytes.EqualFold(name, []byte("stream_options")):
			exact = exact || string(name) == "stream_options"
			asked = options(value, m.From, &edits)
		}
	})
	if !ok || !streams {
		return nil, false
	}
	if !exact {
		edits = append(edits, edit{end, end, `,"stream_options":{"include_usage":true}`})
		asked = false
	}
	if len(edits) == 0 {
		return nil, false
	}
	out := make([]byte, 0, len(raw)+64)
	at := 0
	for _, e := range edits {
		out = append(append(out, raw[at:e.from]...), e.by...)
		at = e.to
	}
	return append(out, raw[at:]...), !asked
}

// mayStream: a member may be named stream. It only saves work.
func mayStream(raw []byte) bool {
	return bytes.Contains(raw, []byte("tream")) || bytes.Contains(raw, []byte("TREAM")) || bytes.Contains(raw, []byte(`\u`))
}

// options looks at the value of stream_options, which begins at at, and reports whether
// the client asks for its usage itself.
func options(value []byte, at int, edits *[]edit) (asked bool) {
	if string(value) == "null" {
		*edits = append(*edits, edit{at, at + len(value), `{"include_usage":true}`})
		return false
	}
	exact, some := false, false
	var inner, totals []edit
	ok := counts.EachMember(value, func(name []byte, m counts.Span) {
		some = true
		switch {
		case bytes.EqualFold(name, []byte("include_usage")):
			exact = exact || string(name) == "include_usage"
			if asked = truth(value[m.From:m.To]); !asked {
				inner = append(inner, edit{at + m.From, at + m.To, "true"})
			}
		case bytes.EqualFold(name, []byte("continuous_usage_stats")) && truth(value[m.From:m.To]):
			// Nothing where usage is not asked for; vLLM tells it all along where it is.
			totals = append(totals, edit{at + m.From, at + m.To, "false"})
		}
	})
	switch {
	case !ok:
		return false // the upstream will say what it thinks of it
	case !exact:
		by := `"include_usage":true`
		if some {
			by += ","
		}
		inner = append(inner, edit{at + 1, at + 1, by})
		asked = false
	}
	if !asked {
		inner = append(inner, totals...)
	}
	slices.SortStableFunc(inner, func(a, b edit) int { return a.from - b.from })
	*edits = append(*edits, inner...)
	return asked
}

// truth: some parser takes the value for true.
func truth(value []byte) bool {
	switch strings.ToLower(strings.Trim(string(value), `"`)) {
	case "true", "1", "1.0", "yes", "y", "on", "t":
		return true
	}
	return false
}
