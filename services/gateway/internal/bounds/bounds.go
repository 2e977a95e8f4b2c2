// Package bounds says what a call to a model provider can cost at most, before it
// is made: input by the bytes of the request, output by what the request or the
// gateway's clamp allows. What can't be bounded so is refused.
package bounds

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/apis"
)

// Rules of a route.
type Rules struct {
	// Reserve are bounds that the operator vouches for, by meter.
	Reserve map[usage.Meter]int64
	// ClampMember and Clamp are written into a request that does not bound its
	// output; an empty member means that such requests are refused.
	ClampMember string
	Clamp       int64
	// InputOverhead is what the provider adds to the input of a call, in tokens.
	InputOverhead int64
	// MaxBody bounds what is read of a request, in bytes.
	MaxBody int64
	// Bodies bounds what large bodies take together; nil: nothing does.
	Bodies Room
}

// Room hands out memory. Take reports whether there are n more bytes, which are free
// again when the request's context is done.
type Room interface {
	Take(request context.Context, n int64) bool
}

// Of returns bounds of the meters that are asked for, as far as there are any. It
// may write the clamp into the request's body. Its errors are *refusal.Refusal.
func (rules *Rules) Of(r *http.Request, meters []usage.Meter) (usage.Quantities, error) {
	var out usage.Quantities
	input, output := false, false
	for _, m := range meters {
		if units, ok := rules.Reserve[m]; ok {
			out.Set(m, units)
			continue
		}
		switch m {
		case usage.InputTokens, usage.CachedInputTokens:
			input = true
		case usage.OutputTokens, usage.ReasoningTokens:
			output = true
		default:
			return out, unbounded("how many %s it uses is known only afterwards, and the route reserves none (reserve)", m)
		}
	}
	if units, ok := rules.Reserve[usage.Calls]; ok {
		out.Set(usage.Calls, units)
	}
	if !input && !output {
		return out, nil
	}
	body, err := rules.read(r)
	if err != nil {
		return out, err
	}
	members, err := parse(body)
	if err != nil {
		return out, err
	}
	if err := known(members); err != nil {
		return out, err
	}
	if input {
		if err := plain(members); err != nil {
			return out, err
		}
	}
	most, changed := int64(0), false
	if output {
		if err := ownTools(members); err != nil {
			return out, err
		}
		if most, changed, err = rules.output(kindOf(r.Method, r.URL.Path, members), members); err != nil {
			return out, err
		}
	}
	if changed {
		if body, err = write(members); err != nil {
			return out, unreadable("The body could not be written again with its output bounded")
		}
	}
	r.Body = whole{bytes.NewReader(body), r.Body, body}
	r.ContentLength = int64(len(body))
	r.Header.Del("Content-Length")
	r.TransferEncoding = nil
	for _, m := range meters {
		if _, fixed := rules.Reserve[m]; fixed {
			continue
		}
		if m == usage.InputTokens || m == usage.CachedInputTokens {
			out.Set(m, int64(len(body))+rules.InputOverhead) // a token is a byte at least
		} else {
			out.Set(m, most)
		}
	}
	return out, nil
}

// whole is a body that was read, and closes as the one it was.
type whole struct {
	io.Reader
	io.Closer
	kept []byte
}

// Bytes are those of the body, which must not be changed.
func (w whole) Bytes() []byte { return w.kept }

func unbounded(format string, args ...any) error {
	return &refusal.Refusal{Code: usage.CostExceedsLimit, Detail: "What this call can cost is not bounded, since " + fmt.Sprintf(format, args...) + "."}
}

func unreadable(format string, args ...any) error {
	return &refusal.Refusal{Code: refusal.BadRequest, Detail: fmt.Sprintf(format, args...) + "."}
}

// kind is what is known of an API that a call is made to.
type kind struct {
	maxima []string // members that bound its output
	silent bool     // it has none
	// guessed: the path does not say which API it is, so its maxima may bound nothing.
	guessed bool
	// boundless: nothing in a request bounds its output.
	boundless bool
}

// Maxima are the members that bound a request's output.
func Maxima() []string { return apis.Maxima() }

// kindOf goes by the path, and where that says nothing by what the body asks about: a
// member that bounds nothing there must not be taken for a bound.
func kindOf(method, path string, members map[string]json.RawMessage) kind {
	if o := apis.Of(method, path, false); o.Known && (!o.Text || len(o.Maxima) > 0) {
		silent := o.Unused.Has(usage.OutputTokens)
		return kind{maxima: o.Maxima, silent: silent, boundless: len(o.Maxima) == 0 && !silent}
	}
	talks, asks := present(members, "messages") || present(members, "prompt"), present(members, "input")
	switch {
	case talks && asks:
		return kind{}
	case talks:
		return kind{maxima: maximaOf("/v1/chat/completions"), guessed: true}
	case asks:
		return kind{maxima: maximaOf("/v1/responses"), guessed: true}
	}
	return kind{maxima: Maxima(), guessed: true}
}

func maximaOf(path string) []string {
	o := apis.Of(http.MethodPost, path, false)
	return o.Maxima
}

// write is as json.Marshal, and leaves texts as they are.
func write(members map[string]json.RawMessage) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(members); err != nil {
		return nil, err
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}

func present(members map[string]json.RawMessage, name string) bool {
	v, ok := members[name]
	return ok && string(v) != "null"
}

// choices are the members that multiply the output.
var choices = []string{"n", "best_of"}

// output returns how many tokens the answer can have, and whether a bound had to be
// written into the members.
func (rules *Rules) output(k kind, members map[string]json.RawMessage) (most int64, changed bool, err error) {
	if k.silent {
		return 0, false, nil
	}
	if k.boundless {
		return 0, false, unbounded("nothing in such a request bounds its output: have the route reserve what it can use (reserve)")
	}
	if len(k.maxima) == 0 {
		return 0, false, unbounded("it has messages or a prompt and an input as well, so it can't be told what bounds its output")
	}
	clamps := slices.Contains(k.maxima, rules.ClampMember)
	if k.guessed && !clamps {
		return 0, false, unbounded("the path is of no API that is known here, so it can't be told what bounds its output: have the route name the member that does (clamp), or reserve what such calls can use")
	}
	if err := streamed(members); err != nil {
		return 0, false, err
	}
	times := int64(1)
	for _, name := range choices {
		if present(members, name) {
			n, err := count(members, name)
			if err != nil {
				return 0, false, err
			}
			times = max(times, n)
		}
	}
	of := prompts(members["prompt"])
	if times > usage.MaxQuantity/of {
		return 0, false, unreadable("More answers are asked for than can be counted")
	}
	times *= of
	by := ""
	for _, name := range k.maxima {
		if present(members, name) {
			n, err := count(members, name)
			if err != nil {
				return 0, false, err
			}
			if n == 0 {
				return 0, false, unreadable("%s is 0, which some providers take for no bound: send at least 1", name)
			}
			if by == "" || name == rules.ClampMember {
				by = name
			}
			most = max(most, n)
		}
	}
	switch {
	case by == "" && !clamps:
		return 0, false, unreadable("The account's limit admits only calls whose output is bounded: send %s", strings.Join(k.maxima, ", or "))
	case by == "":
		most = rules.Clamp
		changed = true
	case clamps && by != rules.ClampMember:
		changed = true // the upstream may not know the other name
	}
	if changed {
		for _, name := range k.maxima {
			delete(members, name)
		}
		members[rules.ClampMember] = strconv.AppendInt(nil, most, 10)
	}
	if most > usage.MaxQuantity/times {
		return 0, false, unreadable("The output that is asked for is larger than any limit")
	}
	return most * times, changed, nil
}

// streamed refuses options of streams of which nobody here knows what they do: with some
// an answer tells all along what it has used so far, which is not what it has used where
// its client hangs up.
func streamed(members map[string]json.RawMessage) error {
	var options map[string]json.RawMessage
	if !present(members, "stream_options") || json.Unmarshal(members["stream_options"], &options) != nil {
		return nil // the upstream will say what it thinks of it
	}
	for name, v := range options {
		if name != "include_usage" && name != "include_obfuscation" && string(v) != "null" && string(v) != "false" {
			return unbounded("what %s in stream_options does is not known: leave it out", strconv.Quote(name))
		}
	}
	return nil
}

// prompts is how many answers a list of prompts asks for.
func prompts(raw json.RawMessage) int64 {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil {
		return 1 // one text
	}
	for _, item := range list {
		if item[0] == '"' || item[0] == '[' {
			return int64(len(list))
		}
	}
	return 1 // one list of tokens
}

func count(members map[string]json.RawMessage, name string) (int64, error) {
	n, err := strconv.ParseInt(string(members[name]), 10, 64)
	if err != nil || n < 0 || n > usage.MaxQuantity {
		return 0, unreadable("%s is not a count", name)
	}
	return n, nil
}
