package bounds

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
)

// elsewhere are members for input that is not in the request; provided are those for
// tools that the provider runs.
var (
	provided  = []string{"web_search_options", "mcp_servers", "container"}
	elsewhere = slices.Concat([]string{"previous_response_id", "conversation"}, provided)
)

// settings change neither what goes in nor how much can come out.
var settings = []string{
	"model", "user", "metadata", "store", "stream", "stream_options", "seed", "stop", "stop_sequences", "suffix", "echo", "service_tier",
	"temperature", "top_p", "top_k", "min_p", "typical_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs",
	"functions", "function_call", "tool_choice", "parallel_tool_calls", "max_tool_calls", "response_format", "text", "verbosity", "reasoning", "reasoning_effort",
	"thinking", "include", "truncation", "background", "instructions", "system", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
	"dimensions", "encoding_format", "output_config", "output_format", "ignore_eos", "min_tokens", "stop_token_ids",
}

// looked are those that are looked at, however they are spelled.
var (
	looked = slices.Concat(Maxima(), choices, elsewhere, []string{"messages", "input", "prompt", "tools", "modalities", "prediction", "stream", "stream_options", "system"})
	named  = slices.Concat(looked, settings)
)

// known refuses members of which nobody here knows what they add to a call. Null and
// false ask for nothing.
func known(members map[string]json.RawMessage) error {
	for name, v := range members {
		if !slices.Contains(named, name) && string(v) != "null" && string(v) != "false" {
			return unbounded("what the member %s adds to it is not known: leave it out, or have the route reserve what such calls can use", strconv.Quote(name))
		}
	}
	return nil
}

// plain refuses input that is more than the request's text.
func plain(members map[string]json.RawMessage) error {
	for _, name := range elsewhere {
		if present(members, name) {
			return unbounded("%s stands for input that is not in the request", name)
		}
	}
	for _, name := range []string{"messages", "input", "system"} {
		var v any
		if raw, ok := members[name]; ok && json.Unmarshal(raw, &v) == nil {
			if err := content(name, v, 0); err != nil {
				return err
			}
		}
	}
	return ownTools(members)
}

// texts are the kinds of content whose tokens are their bytes at most.
var texts = []string{
	"message", "text", "input_text", "output_text", "refusal", "tool_use", "tool_result", "function_call", "function_call_output", "custom_tool_call",
	"custom_tool_call_output", "thinking", "redacted_thinking", "reasoning", "summary_text", "reasoning_text",
}

// parts are the members of content that stand for themselves; inner are those that
// can have more content in them, and free may be any JSON that is passed on as text.
var (
	parts = []string{
		"type", "role", "name", "id", "status", "phase", "text", "refusal", "reasoning_content", "thinking", "signature", "data", "encrypted_content", "cache_control",
		"tool_call_id", "tool_use_id", "call_id", "is_error", "tool_calls", "function_call", "arguments", "logprobs",
	}
	inner = []string{"content", "output", "summary"}
	free  = []string{"input"}
)

// maxDepth of content in content.
const maxDepth = 8

// content refuses what is no text, in the member in.
func content(in string, v any, depth int) error {
	if depth > maxDepth {
		return unbounded("what is in %s is nested too deeply to be told", in)
	}
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			if err := content(in, item, depth+1); err != nil {
				return err
			}
		}
	case map[string]any:
		return part(in, v, depth)
	}
	return nil
}

func part(in string, v map[string]any, depth int) error {
	typ, typed := v["type"].(string)
	_, role := v["role"]
	_, text := v["text"]
	_, sealed := v["encrypted_content"]
	switch {
	case typed && !slices.Contains(texts, typ):
		return unbounded("what %s costs is not told by its size (in %s)", typ, in)
	case !typed && (v["type"] != nil || !role && !text):
		return unbounded("an item of %s does not say what it is (type)", in)
	case typ == "reasoning" && v["id"] != nil && !sealed:
		return unbounded("reasoning that is known by its id stands for input that is not in the request (in %s)", in)
	}
	for name, value := range v {
		switch {
		case slices.Contains(inner, name):
			if err := content(in, value, depth+1); err != nil {
				return err
			}
		case value == nil || slices.Contains(parts, name) || typ == "tool_use" && slices.Contains(free, name) || typ == "custom_tool_call" && slices.Contains(free, name):
		case name == "annotations" || name == "citations":
			if list, ok := value.([]any); !ok || len(list) > 0 {
				return unbounded("what %s in %s cost is not told by their size: leave them out", name, in)
			}
		default:
			return unbounded("what %s in %s adds to it is not known: leave it out", strconv.Quote(name), in)
		}
	}
	return nil
}

// toolParts are the members of a tool that the client runs.
var toolParts = []string{"type", "name", "description", "function", "parameters", "input_schema", "strict", "cache_control", "custom", "format"}

// ownTools refuses tools that the provider runs: what they read is input that is
// not in the request, and what they cost is not bounded by it.
func ownTools(members map[string]json.RawMessage) error {
	if present(members, "modalities") && !strings.EqualFold(strings.Join(strings.Fields(string(members["modalities"])), ""), `["text"]`) {
		return unbounded("an answer that is not text alone (modalities)")
	}
	for _, name := range provided {
		if present(members, name) {
			return unbounded("%s lets the provider use tools of its own", name)
		}
	}
	if present(members, "prediction") {
		return unbounded("of a prediction also what is not used is charged")
	}
	if v := members["prompt"]; len(v) > 0 && v[0] == '{' {
		return unbounded("prompt stands for input that is not in the request")
	}
	if !present(members, "tools") {
		return nil
	}
	var list []map[string]any
	if err := json.Unmarshal(members["tools"], &list); err != nil {
		return unreadable("The tools can't be read")
	}
	for _, t := range list {
		if typ, _ := t["type"].(string); t["type"] != nil && typ != "function" && typ != "custom" {
			return unbounded("the tool %s is the provider's own", strconv.Quote(typ))
		}
		for name, v := range t {
			if v != nil && !slices.Contains(toolParts, name) {
				return unbounded("a tool with %s may be the provider's own", strconv.Quote(name))
			}
		}
	}
	return nil
}
