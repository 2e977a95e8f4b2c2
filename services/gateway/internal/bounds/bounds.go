// Package bounds says what a call to a model provider can cost at most, before it
// is made: input by the bytes of the request, output by what the request or the
// gateway's clamp allows. What can't be bounded so is refused.
package bounds

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/tokens"
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
	if input {
		if err := plain(members); err != nil {
			return out, err
		}
	}
	most := int64(0)
	if output {
		if err := ownTools(members); err != nil {
			return out, err
		}
		var rewritten []byte
		if most, rewritten, err = rules.output(members); err != nil {
			return out, err
		}
		if rewritten != nil {
			body = rewritten
		}
	}
	r.Body = whole{bytes.NewReader(body), r.Body}
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

type whole struct {
	io.Reader
	io.Closer
}

func unbounded(format string, args ...any) error {
	return &refusal.Refusal{Code: usage.CostExceedsLimit, Detail: "What this call can cost is not bounded: " + fmt.Sprintf(format, args...) + "."}
}

func unreadable(format string, args ...any) error {
	return &refusal.Refusal{Code: refusal.BadRequest, Detail: fmt.Sprintf(format, args...) + "."}
}

func (rules *Rules) read(r *http.Request) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, unreadable("The account has a limit that needs to know what a call can cost, and the request has no body that says")
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return nil, &refusal.Refusal{Code: refusal.BadRequest, Status: http.StatusUnsupportedMediaType, Detail: "The body is compressed, so what the call can cost can't be read: send it plain."}
	}
	if t := r.Header.Get("Content-Type"); t != "" && !tokens.IsJSON(t) {
		return nil, unbounded("its body is not JSON")
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, rules.MaxBody+1))
	switch {
	case err != nil:
		return nil, unreadable("The body could not be read to its end")
	case int64(len(body)) > rules.MaxBody:
		return nil, &refusal.Refusal{Code: refusal.TooLarge, Detail: "The body is too large to find out what the call can cost."}
	}
	return body, nil
}

// parse takes the body apart. A member that stands twice is refused: which of them
// counts is the upstream's choice.
func parse(body []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(bytes.TrimPrefix(body, []byte("\xef\xbb\xbf"))))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, unreadable("The body is not a JSON object, so what the call can cost can't be read")
	}
	members := make(map[string]json.RawMessage)
	for d.More() {
		t, err := d.Token()
		name, ok := t.(string)
		var v json.RawMessage
		if err == nil && ok {
			err = d.Decode(&v)
		}
		if err != nil || !ok {
			return nil, unreadable("The body is not JSON, so what the call can cost can't be read")
		}
		if _, twice := members[name]; twice {
			return nil, unreadable("The member %q stands twice in the body", name)
		}
		// Some parsers do not mind.
		if folded := strings.ToLower(name); folded != name && slices.Contains(looked, folded) {
			return nil, unreadable("The member %q is not written as providers write it: %s", name, folded)
		}
		members[name] = v
	}
	if _, err := d.Token(); err != nil {
		return nil, unreadable("The body is not JSON, so what the call can cost can't be read")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, unreadable("Something follows the JSON object in the body")
	}
	return members, nil
}

// Members that bound the output, and those that multiply it.
var (
	maxima  = []string{"max_tokens", "max_completion_tokens", "max_output_tokens"}
	choices = []string{"n", "best_of"}
	// elsewhere: what they stand for is not in the request.
	elsewhere = []string{"previous_response_id", "conversation", "web_search_options", "mcp_servers", "container"}
	looked    = slices.Concat(maxima, choices, elsewhere, []string{"messages", "input", "system", "instructions", "prompt", "tools", "modalities", "prediction"})
)

// Maxima are the members that bound a request's output.
func Maxima() []string { return slices.Clone(maxima) }

func present(members map[string]json.RawMessage, name string) bool {
	v, ok := members[name]
	return ok && string(v) != "null"
}

// output returns how many tokens the answer can have, and the body if the clamp had
// to be written into it.
func (rules *Rules) output(members map[string]json.RawMessage) (most int64, rewritten []byte, err error) {
	times := int64(1)
	for _, name := range choices {
		if present(members, name) {
			n, err := count(members, name)
			if err != nil {
				return 0, nil, err
			}
			times = max(times, n)
		}
	}
	times *= prompts(members["prompt"])
	given := false
	for _, name := range maxima {
		if present(members, name) {
			n, err := count(members, name)
			if err != nil {
				return 0, nil, err
			}
			most, given = max(most, n), true
		}
	}
	if !given {
		if rules.ClampMember == "" {
			return 0, nil, unreadable("The account's limit admits only calls whose output is bounded: send %s", strings.Join(maxima, ", or "))
		}
		most = rules.Clamp
		for _, name := range maxima {
			delete(members, name) // null
		}
		members[rules.ClampMember] = strconv.AppendInt(nil, most, 10)
		if rewritten, err = json.Marshal(members); err != nil {
			return 0, nil, unreadable("The body could not be written again with its output bounded")
		}
	}
	if most > usage.MaxQuantity/times {
		return 0, nil, unreadable("The output that is asked for is larger than any limit")
	}
	return most * times, rewritten, nil
}

// prompts is how many answers a list of prompts asks for.
func prompts(raw json.RawMessage) int64 {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil || len(list) == 0 || list[0][0] != '"' && list[0][0] != '[' {
		return 1 // one text, or one list of tokens
	}
	return int64(len(list))
}

func count(members map[string]json.RawMessage, name string) (int64, error) {
	n, err := strconv.ParseInt(string(members[name]), 10, 64)
	if err != nil || n < 0 || n > usage.MaxQuantity {
		return 0, unreadable("%s is not a count", name)
	}
	return n, nil
}

// plain refuses input that is more than the request's text.
func plain(members map[string]json.RawMessage) error {
	for _, name := range elsewhere {
		if present(members, name) {
			return unbounded("%s stands for input that is not in the request", name)
		}
	}
	if v, ok := members["prompt"]; ok && len(v) > 0 && v[0] == '{' {
		return unbounded("prompt stands for input that is not in the request")
	}
	for _, name := range []string{"messages", "input", "system"} {
		var v any
		if raw, ok := members[name]; ok && json.Unmarshal(raw, &v) == nil {
			if kind := foreign(v, 0); kind != "" {
				return unbounded("what %s costs is not told by its size (in %s)", kind, name)
			}
		}
	}
	return ownTools(members)
}

// texts are the kinds of content whose tokens are their bytes at most.
var texts = []string{
	"", "message", "text", "input_text", "output_text", "refusal", "tool_use", "tool_result", "function_call", "function_call_output", "custom_tool_call",
	"custom_tool_call_output", "thinking", "redacted_thinking", "reasoning", "summary_text", "reasoning_text",
}

// maxDepth of content in content.
const maxDepth = 8

// foreign returns the first kind of content that is no text.
func foreign(v any, depth int) string {
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			if kind := foreign(item, depth+1); kind != "" {
				return kind
			}
		}
	case map[string]any:
		kind, _ := v["type"].(string)
		if !slices.Contains(texts, kind) || depth > maxDepth {
			return kind
		}
		for _, inner := range []string{"content", "output", "summary"} {
			if kind := foreign(v[inner], depth+1); kind != "" {
				return kind
			}
		}
	}
	return ""
}

// ownTools refuses tools that the provider runs: what they read is input that is
// not in the request, and what they cost is not bounded by it.
func ownTools(members map[string]json.RawMessage) error {
	if present(members, "modalities") && !strings.EqualFold(strings.Join(strings.Fields(string(members["modalities"])), ""), `["text"]`) {
		return unbounded("an answer that is not text alone (modalities)")
	}
	for _, name := range []string{"web_search_options", "mcp_servers", "container"} {
		if present(members, name) {
			return unbounded("%s lets the provider use tools of its own", name)
		}
	}
	if present(members, "prediction") {
		return unbounded("of a prediction also what is not used is charged")
	}
	if !present(members, "tools") {
		return nil
	}
	var list []struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(members["tools"], &list); err != nil {
		return unreadable("The tools can't be read")
	}
	for _, t := range list {
		if t.Type != "" && t.Type != "function" && t.Type != "custom" {
			return unbounded("the tool %s is the provider's own", strconv.Quote(t.Type))
		}
	}
	return nil
}
