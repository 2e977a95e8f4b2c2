package bounds

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/tokens"
)

// read takes the whole body, which must be one that the upstream reads as it is read
// here.
func (rules *Rules) read(r *http.Request) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, unreadable("The account has a limit that needs to know what a call can cost, and the request has no body that says")
	}
	if e := strings.Join(r.Header.Values("Content-Encoding"), ","); e != "" && !strings.EqualFold(e, "identity") {
		return nil, &refusal.Refusal{Code: refusal.BadRequest, Status: http.StatusUnsupportedMediaType, Detail: "The body is compressed, so what the call can cost can't be read: send it plain."}
	}
	switch types := r.Header.Values("Content-Type"); {
	case len(types) > 1:
		return nil, unreadable("The request has several content types")
	case len(types) == 1 && types[0] != "":
		if !tokens.IsJSON(types[0]) {
			return nil, unbounded("its body is not said to be JSON: send it with Content-Type: application/json")
		}
		_, params, err := mime.ParseMediaType(types[0])
		if c := params["charset"]; err != nil || c != "" && !strings.EqualFold(c, "utf-8") && !strings.EqualFold(c, "utf8") && !strings.EqualFold(c, "us-ascii") {
			return nil, unreadable("The body's characters are not said to be UTF-8")
		}
	}
	var body bytes.Buffer
	for taken := int64(smallBody); ; taken += roomStep {
		// One byte more tells whether it ends there.
		_, err := io.CopyN(&body, r.Body, min(taken, rules.MaxBody)+1-int64(body.Len()))
		switch {
		case errors.Is(err, io.EOF):
			return body.Bytes(), nil
		case err != nil:
			return nil, unreadable("The body could not be read to its end")
		case int64(body.Len()) > rules.MaxBody:
			return nil, &refusal.Refusal{Code: refusal.TooLarge, Detail: "The body is too large to find out what the call can cost."}
		case rules.Bodies != nil && !rules.Bodies.Take(r.Context(), copies*roomStep):
			return nil, &refusal.Refusal{Code: refusal.TooLarge, Status: http.StatusServiceUnavailable, Detail: "Too many large bodies are being read at once: try again in a moment."}
		}
	}
}

const (
	// smallBody is not worth counting: connections bound those.
	smallBody = 64 << 10
	roomStep  = 1 << 20
	// copies of a body while it is looked at: itself, its members, written again.
	copies = 3
)

// parse takes the body apart. A member that stands twice, wherever, is refused: which
// of them counts is the upstream's choice.
func parse(body []byte) (map[string]json.RawMessage, error) {
	body = bytes.TrimPrefix(body, []byte("\xef\xbb\xbf"))
	if err := distinct(body); err != nil {
		return nil, err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil || members == nil {
		return nil, unreadable("The body is not a JSON object, so what the call can cost can't be read")
	}
	for name := range members {
		// Some parsers do not mind how a name is written.
		for _, l := range looked {
			if name != l && strings.EqualFold(name, l) {
				return nil, unreadable("The member %q is not written as providers write it (%s)", name, l)
			}
		}
	}
	return members, nil
}

// maxNesting of objects and lists: each takes far more memory than the byte that opens
// it. encoding/json has the same.
const maxNesting = 10_000

// distinct refuses what is not one JSON value, or has an object with two members of
// the same name.
func distinct(body []byte) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	// Of the objects and lists that are open; nil: a list.
	var open []map[string]bool
	name := false // the next text is a member's name
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) && len(open) == 0 {
			return nil
		}
		if err != nil {
			return unreadable("The body is not JSON, so what the call can cost can't be read")
		}
		if name {
			if s, ok := t.(string); ok {
				names := open[len(open)-1]
				if names[s] {
					return unreadable("The member %q stands twice in the body", s)
				}
				names[s], name = true, false
				continue
			}
		}
		switch t {
		case json.Delim('{'):
			open = append(open, make(map[string]bool))
		case json.Delim('['):
			open = append(open, nil)
		case json.Delim('}'), json.Delim(']'):
			open = open[:len(open)-1]
		}
		if len(open) > maxNesting {
			return unreadable("The body is nested too deeply")
		}
		if len(open) == 0 {
			if _, err := d.Token(); !errors.Is(err, io.EOF) {
				return unreadable("Something follows the JSON object in the body")
			}
			return nil
		}
		name = open[len(open)-1] != nil
	}
}
