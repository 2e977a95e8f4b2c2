package tokens

import (
	"bytes"
	"encoding/json"
	"strconv"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// object is every shape of a provider's usage object in one. Numbers stay as they
// were written: a fraction or a text is not rounded into a count.
type object struct {
	PromptTokens     json.RawMessage `json:"prompt_tokens"`
	CompletionTokens json.RawMessage `json:"completion_tokens"`
	InputTokens      json.RawMessage `json:"input_tokens"`
	OutputTokens     json.RawMessage `json:"output_tokens"`

	PromptDetails     details `json:"prompt_tokens_details"`
	CompletionDetails details `json:"completion_tokens_details"`
	InputDetails      details `json:"input_tokens_details"`
	OutputDetails     details `json:"output_tokens_details"`

	CacheRead     json.RawMessage `json:"cache_read_input_tokens"`
	CacheCreation json.RawMessage `json:"cache_creation_input_tokens"`
}

type details struct {
	Cached    json.RawMessage
	Reasoning json.RawMessage
}

// UnmarshalJSON takes what it knows and ignores the rest, also a value that is
// not an object.
func (d *details) UnmarshalJSON(data []byte) error {
	var v struct {
		Cached    json.RawMessage `json:"cached_tokens"`
		Reasoning json.RawMessage `json:"reasoning_tokens"`
	}
	if json.Unmarshal(data, &v) == nil {
		d.Cached, d.Reasoning = v.Cached, v.Reasoning
	}
	return nil
}

// Reading is one meter's reading.
type Reading struct {
	Meter usage.Meter
	Value int64
}

// Read takes the readings from a usage object: of OpenAI's chat completions,
// embeddings and responses, and of Anthropic's messages. What is not there, or is
// not a count, is unknown and left out; malformed says that there was such a value.
//
// input_tokens counts all input. Anthropic reports what was read from and written
// to its cache beside its input_tokens; here both are added, so that the meter
// means the same for every provider. cached_input_tokens is the part of it that
// came from the cache.
func Read(raw []byte) (readings []Reading, malformed bool) {
	o, ok := parse(raw)
	if !ok {
		return nil, !isNull(raw)
	}
	return o.readings()
}

func parse(raw []byte) (o object, ok bool) {
	if err := json.Unmarshal(raw, &o); err != nil || !bytes.HasPrefix(bytes.TrimSpace(raw), []byte("{")) {
		return object{}, false
	}
	return o, true
}

func isNull(raw []byte) bool { return bytes.Equal(bytes.TrimSpace(raw), []byte("null")) }

// add takes over what a later report of the same answer says.
func (o *object) add(later *object) {
	to, from := o.members(), later.members()
	for i, v := range from {
		if len(*v) > 0 && !isNull(*v) {
			*to[i] = *v
		}
	}
}

func (o *object) members() [14]*json.RawMessage {
	return [...]*json.RawMessage{
		&o.PromptTokens, &o.CompletionTokens, &o.InputTokens, &o.OutputTokens, &o.CacheRead, &o.CacheCreation,
		&o.PromptDetails.Cached, &o.CompletionDetails.Cached, &o.InputDetails.Cached, &o.OutputDetails.Cached,
		&o.PromptDetails.Reasoning, &o.CompletionDetails.Reasoning, &o.InputDetails.Reasoning, &o.OutputDetails.Reasoning,
	}
}

func (o *object) readings() (readings []Reading, malformed bool) {
	count := func(candidates ...json.RawMessage) (int64, bool) {
		for _, c := range candidates {
			if len(c) == 0 || string(c) == "null" {
				continue
			}
			n, err := strconv.ParseInt(string(c), 10, 64)
			if err != nil || n < 0 || n > usage.MaxQuantity {
				malformed = true
				return 0, false
			}
			return n, true
		}
		return 0, false
	}
	add := func(m usage.Meter, v int64, ok bool) {
		if ok {
			readings = append(readings, Reading{m, v})
		}
	}
	input, ok := count(o.PromptTokens, o.InputTokens)
	before := malformed
	read, haveRead := count(o.CacheRead)
	created, haveCreated := count(o.CacheCreation)
	if ok && (len(o.PromptTokens) == 0 || isNull(o.PromptTokens)) {
		if haveRead {
			input += read
		}
		if haveCreated {
			input += created
		}
		ok = malformed == before // else a part of it is not known
	}
	if input > usage.MaxQuantity {
		malformed, ok = true, false
	}
	add(usage.InputTokens, input, ok)
	output, ok := count(o.CompletionTokens, o.OutputTokens)
	add(usage.OutputTokens, output, ok)
	cached, ok := count(o.PromptDetails.Cached, o.InputDetails.Cached, o.CacheRead)
	add(usage.CachedInputTokens, cached, ok)
	reasoning, ok := count(o.CompletionDetails.Reasoning, o.OutputDetails.Reasoning)
	add(usage.ReasoningTokens, reasoning, ok)
	return readings, malformed
}
