// Package counts knows the usage objects of model providers: by which names they call
// what they count, and how their counts relate to each other.
package counts

import (
	"bytes"
	"encoding/json"
	"math"
	"strconv"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Field is a count of a provider's usage object. Providers name the same count in
// several ways; a field is one meaning with one way of relating to the others.
type Field uint8

const (
	Prompt        Field = iota // all input, cached input included
	Input                      // as Prompt, but caches stand beside it
	Output                     // may or may not include reasoning: the total says
	Total                      // input and output
	CacheRead                  // beside Input
	CacheCreation              // beside Input
	Cached                     // the part of the input that came from a cache
	Reasoning                  // may or may not be a part of Output
	Thoughts                   // beside Output unless the total says otherwise
	ToolInput                  // beside Prompt: what tools of the provider put in
	BilledInput                // where nothing else tells the input
	BilledOutput               // where nothing else tells the output
	numFields
)

// fieldOf knows the names by which providers call their counts, at the top of a usage
// object: OpenAI and those who follow it, Anthropic, Gemini, Bedrock, DeepSeek,
// Moonshot, Perplexity, Mistral, and the runtimes of open models.
func fieldOf(name []byte) (Field, bool) {
	switch string(name) {
	case "prompt_tokens", "promptTokenCount", "promptTokens", "prompt_eval_count", "tokens_evaluated", "total_input_tokens":
		return Prompt, true
	case "input_tokens", "inputTokens", "inputTokenCount":
		return Input, true
	case "completion_tokens", "output_tokens", "candidatesTokenCount", "responseTokenCount", "completionTokens", "outputTokens", "outputTokenCount", "eval_count", "tokens_predicted", "total_output_tokens":
		return Output, true
	case "total_tokens", "totalTokenCount", "totalTokens":
		return Total, true
	case "cache_read_input_tokens", "cacheReadInputTokens", "cacheReadInputTokenCount":
		return CacheRead, true
	case "cache_creation_input_tokens", "cacheWriteInputTokens", "cacheWriteInputTokenCount":
		return CacheCreation, true
	case "prompt_cache_hit_tokens", "cached_tokens", "cachedContentTokenCount", "num_cached_tokens", "total_cached_tokens":
		return Cached, true
	case "reasoning_tokens":
		return Reasoning, true
	case "thoughtsTokenCount", "total_thought_tokens":
		return Thoughts, true
	case "toolUsePromptTokenCount", "total_tool_use_tokens", "connector_tokens":
		return ToolInput, true
	}
	return 0, false
}

// Reading is one meter's reading.
type Reading struct {
	Meter usage.Meter
	Value int64
}

// Counts are what one or several usage objects of an answer say.
type Counts struct {
	known, bad uint16 // bits of fields; bad: there, and not a count
	values     [numFields]int64
}

// Set takes the raw value of a field; null is none.
func (c *Counts) Set(f Field, raw []byte) {
	raw = bytes.TrimSpace(raw)
	if string(raw) == "null" {
		return
	}
	v, ok := whole(raw)
	if !ok {
		c.bad |= 1 << f
		return
	}
	// One object may tell a count by several names, some of them 0.
	if c.known&(1<<f) == 0 || v > c.values[f] {
		c.known |= 1 << f
		c.values[f] = v
	}
}

// whole reads a count: an integer, or one that is written with zeros behind a point, or
// with a power of ten.
func whole(raw []byte) (int64, bool) {
	if bytes.ContainsAny(raw, "eE") && len(raw) <= 32 && raw[0] >= '0' && raw[0] <= '9' {
		f, err := strconv.ParseFloat(string(raw), 64)
		return int64(f), err == nil && json.Valid(raw) && f >= 0 && f <= float64(usage.MaxQuantity) && f == math.Trunc(f)
	}
	if i := bytes.IndexByte(raw, '.'); i > 0 && i+1 < len(raw) && len(bytes.Trim(raw[i+1:], "0")) == 0 {
		raw = raw[:i]
	}
	if len(raw) == 0 || len(raw) > 17 {
		return 0, false
	}
	for _, c := range raw {
		if c < '0' || c > '9' {
			return 0, false
		}
	}
	v, err := strconv.ParseInt(string(raw), 10, 64)
	return v, err == nil && v <= usage.MaxQuantity
}

// Parse takes a usage object apart; false: it is none.
func (c *Counts) Parse(raw []byte) bool {
	return eachMember(raw, func(name, value []byte) {
		if f, ok := fieldOf(name); ok {
			c.Set(f, value)
			return
		}
		switch string(name) {
		case "prompt_tokens_details", "input_tokens_details", "completion_tokens_details", "output_tokens_details",
			"prompt_token_details", "input_token_details", "completion_token_details", "output_token_details":
			eachMember(value, func(name, value []byte) {
				switch string(name) {
				case "cached_tokens":
					c.Set(Cached, value)
				case "reasoning_tokens":
					c.Set(Reasoning, value)
				}
			})
		case "cache_creation": // Anthropic's new caches, by how long they are kept
			var sum Counts
			eachMember(value, func(_, value []byte) { sum.plus(CacheCreation, value) })
			c.Add(&sum)
		case "iterations":
			c.iterations(value)
		case "tokens": // Cohere's count of what the model saw
			eachMember(value, func(name, value []byte) {
				switch string(name) {
				case "input_tokens":
					c.Set(Input, value)
				case "output_tokens":
					c.Set(Output, value)
				}
			})
		case "billed_units":
			eachMember(value, func(name, value []byte) {
				switch string(name) {
				case "input_tokens":
					c.Set(BilledInput, value)
				case "output_tokens":
					c.Set(BilledOutput, value)
				}
			})
		}
	})
}

// iterations takes the turns of which an answer of Anthropic's is made. The counts beside
// them leave out those that it did not answer in, as when it compacts what came before.
func (c *Counts) iterations(raw []byte) {
	var turns []json.RawMessage
	if json.Unmarshal(raw, &turns) != nil {
		return
	}
	var sum Counts
	for _, turn := range turns {
		eachMember(turn, func(name, value []byte) {
			switch f, ok := fieldOf(name); {
			case !ok:
			case f == Input, f == Output, f == CacheRead, f == CacheCreation:
				sum.plus(f, value)
			}
		})
	}
	c.Add(&sum)
}

// plus adds a count to a field.
func (c *Counts) plus(f Field, raw []byte) {
	v, ok := whole(bytes.TrimSpace(raw))
	if !ok || v > usage.MaxQuantity-c.values[f] {
		return // the counts beside it are what is known
	}
	c.known |= 1 << f
	c.values[f] += v
}

// Add takes over what a later report of the same answer says. Reports are cumulative:
// what has been counted once does not become less.
func (c *Counts) Add(later *Counts) {
	for f := range numFields {
		bit := uint16(1) << f
		if later.known&bit != 0 && (c.known&bit == 0 || later.values[f] > c.values[f]) {
			c.values[f] = later.values[f]
			c.known |= bit
		}
	}
	c.bad |= later.bad
}

// Get returns a field's count; false: it was not told.
func (c *Counts) Get(f Field) (int64, bool) { return c.values[f], c.known&(1<<f) != 0 }

// Forget makes fields untold.
func (c *Counts) Forget(fields ...Field) {
	for _, f := range fields {
		c.known &^= 1 << f
		c.bad &^= 1 << f
	}
}

// Raise makes a field at least v.
func (c *Counts) Raise(f Field, v int64) { c.values[f] = max(c.values[f], v) }

// None reports whether nothing was told, not even what is no count.
func (c *Counts) None() bool { return c.known|c.bad == 0 }

// lost: the field is there and can't be counted, and nothing else said it.
func (c *Counts) lost(f Field) bool { return c.bad&^c.known&(1<<f) != 0 }

// Readings are the meters' readings; malformed says that something there is not a count.
//
// input_tokens counts all input. Who reports caches beside it (Anthropic, Bedrock) has
// them added, so that the meter means the same for every provider, and
// cached_input_tokens is the part of it that came from a cache. output_tokens counts
// all output, reasoning included: where the total is larger than input and output,
// what is missing was left out of one of them. It is input that caches had or got if
// that is as much, and output otherwise: reasoning that is counted beside it (xAI), or
// not told at all (Gemini's OpenAI endpoint).
func (c *Counts) Readings() (readings []Reading, malformed bool) {
	readings, malformed = make([]Reading, 0, 4), c.bad != 0 // one a meter
	input, haveInput := c.Get(Input)
	read, haveRead := c.Get(CacheRead)
	created, _ := c.Get(CacheCreation)
	prompt, havePrompt := c.Get(Prompt)
	output, haveOutput := c.Get(Output)
	total, haveTotal := c.Get(Total)
	fromCache, haveCached := c.Get(Cached)
	reasoned, haveReasoned := c.Get(Reasoning)
	switch {
	case haveInput && (c.lost(CacheRead) || c.lost(CacheCreation)) && !havePrompt:
		haveInput = false // a part of it is not known
	case haveInput && !(haveTotal && haveOutput && total == input+output):
		input += read + created // the total does not say that they are in it
	}
	if havePrompt {
		tools, _ := c.Get(ToolInput)
		prompt += tools
		input, haveInput = max(input, prompt), true
	}
	if !haveInput && !c.lost(Input) && !c.lost(Prompt) {
		input, haveInput = c.Get(BilledInput)
	}
	if !haveOutput && !c.lost(Output) {
		output, haveOutput = c.Get(BilledOutput)
	}
	if thought, have := c.Get(Thoughts); have {
		if !haveTotal || !haveInput || total != input+output {
			output, haveOutput = output+thought, true
		}
		reasoned, haveReasoned = max(reasoned, thought), true
	}
	if !haveCached && haveRead {
		fromCache, haveCached = read, true
	}
	if haveInput && haveOutput {
		if beyond := total - input - output; haveTotal && beyond > 0 {
			if beyond != reasoned {
				for _, beside := range [...]int64{read + created, read, created, fromCache} {
					if beside > 0 && (beyond == beside || beyond == beside+reasoned) {
						input += beside
						break
					}
				}
			}
			output = total - input
		}
	}
	if haveCached && haveInput && fromCache > input {
		input += fromCache // a part is not more than the whole
	}
	if haveReasoned && haveOutput && reasoned > output {
		output += reasoned
	}
	add := func(m usage.Meter, v int64, ok bool) {
		if ok && v <= usage.MaxQuantity {
			readings = append(readings, Reading{m, v})
		}
		malformed = malformed || v > usage.MaxQuantity
	}
	add(usage.InputTokens, input, haveInput)
	add(usage.OutputTokens, output, haveOutput)
	add(usage.CachedInputTokens, fromCache, haveCached)
	add(usage.ReasoningTokens, reasoned, haveReasoned)
	return readings, malformed
}

// Span is a stretch of bytes: from From up to, and not including, To.
type Span struct{ From, To int }

// EachMember calls f with the name of each member of a JSON object, and where its value
// stands in raw; false: it is no object, or not to its end, and f may have been called
// for what there is. A byte order mark and space may stand around it. Values are not
// checked further.
func EachMember(raw []byte, f func(name []byte, value Span)) bool {
	i := skipSpace(raw, len(raw)-len(bytes.TrimPrefix(raw, []byte("\xef\xbb\xbf"))))
	if i >= len(raw) || raw[i] != '{' {
		return false
	}
	for i++; ; {
		i = skipSpace(raw, i)
		if i >= len(raw) {
			return false
		}
		if raw[i] == '}' {
			return skipSpace(raw, i+1) == len(raw)
		}
		if raw[i] != '"' {
			return false
		}
		end := endOfValue(raw, i)
		name := raw[i+1 : max(end-1, i+1)]
		if bytes.IndexByte(name, '\\') >= 0 {
			var s string
			if json.Unmarshal(raw[i:end], &s) != nil {
				return false
			}
			name = []byte(s)
		}
		if i = skipSpace(raw, end); i >= len(raw) || raw[i] != ':' {
			return false
		}
		from := skipSpace(raw, i+1)
		if i = endOfValue(raw, from); i <= from {
			return false
		}
		f(name, Span{from, i})
		if i = skipSpace(raw, i); i < len(raw) && raw[i] == ',' {
			i++
		}
	}
}

// eachMember is EachMember with the values themselves.
func eachMember(raw []byte, f func(name, value []byte)) bool {
	return EachMember(raw, func(name []byte, v Span) { f(name, raw[v.From:v.To]) })
}

func skipSpace(raw []byte, i int) int {
	for i < len(raw) && (raw[i] == ' ' || raw[i] == '\t' || raw[i] == '\n' || raw[i] == '\r') {
		i++
	}
	return i
}

// endOfValue is the index behind the JSON value that begins at i.
func endOfValue(raw []byte, i int) int {
	depth := 0
	for i < len(raw) {
		switch raw[i] {
		case '"':
			for i++; i < len(raw) && raw[i] != '"'; i++ {
				if raw[i] == '\\' {
					i++
				}
			}
			i++
		case '{', '[':
			depth++
			i++
		case '}', ']':
			if depth == 0 {
				return i
			}
			depth--
			i++
		case ',':
			if depth == 0 {
				return i
			}
			i++
			continue
		case ' ', '\t', '\n', '\r', ':':
			if depth == 0 {
				return i
			}
			i++
			continue
		default:
			i++
			for i < len(raw) && depth == 0 && !bytes.ContainsRune([]byte(",}] \t\n\r\":"), rune(raw[i])) {
				i++
			}
		}
		if depth == 0 {
			return min(i, len(raw))
		}
	}
	return len(raw)
}
