// Package apis is what the gateway knows of model providers' APIs by method and path:
// what bounds the output of a call, and what a call can't use. All of it stands in one
// table.
package apis

import (
	"net/http"
	"slices"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Operation is what a call does. The zero Operation is not known.
type Operation struct {
	// Known reports whether the table has it.
	Known bool
	// Maxima are the members of its body that bound its output; without one of them
	// the output has no bound that a request can tell.
	Maxima []string
	// Options reports whether its streamed answer ends with its usage if stream_options
	// ask for that.
	Options bool
	// Text: its answer is made of tokens, so that one which does not tell its usage has
	// some.
	Text bool
	// versioned: others have operations of the name too, so that it is known behind a
	// version only.
	versioned bool
	// Unused are the meters that it can't use.
	Unused usage.MeterSet
	// models are beginnings of the names of those models with which it can't use
	// unusedWith either.
	models     []string
	unusedWith usage.MeterSet
}

// UnusedBy is Unused of a call to a model; empty: it is not known which.
func (o *Operation) UnusedBy(model string) usage.MeterSet {
	for _, m := range o.models {
		if strings.HasPrefix(model, m) {
			return o.Unused | o.unusedWith
		}
	}
	return o.Unused
}

// Produces reports whether the usage that an answer tells is of this call. That of a
// stored answer that is fetched has been counted.
func (o *Operation) Produces() bool { return !o.Known || o.Unused&output == 0 || o.Unused&input == 0 }

var (
	input  = usage.SetOf(usage.InputTokens, usage.CachedInputTokens)
	output = usage.SetOf(usage.OutputTokens, usage.ReasoningTokens)
	tokens = input | output
	// nothing is of calls that no provider charges for.
	nothing = tokens | usage.SetOf(usage.Cost)
)

// entry of the table. The path is the end of one, behind a version; * is one segment,
// also with an end of its own, ** is any number of them, also none.
type entry struct {
	methods, path string
	Operation
}

const (
	read   = "GET HEAD"
	manage = "GET HEAD DELETE"
	post   = "POST"
)

var table = []entry{
	// Connections over which answers are made of tokens later.
	{read, "realtime/**", Operation{}},
	{read, "responses", Operation{}},
	// Answers made of tokens.
	{post, "chat/completions", Operation{Maxima: []string{"max_tokens", "max_completion_tokens"}, Options: true, Text: true}},
	{post, "completions", Operation{Maxima: []string{"max_tokens"}, Options: true, Text: true}},
	{post, "messages", Operation{Maxima: []string{"max_tokens"}, Text: true}},
	{post, "responses", Operation{Maxima: []string{"max_output_tokens"}, Text: true}},
	{post, "chat", Operation{Text: true, versioned: true}},         // Cohere
	{post, "interactions", Operation{Text: true, versioned: true}}, // Gemini
	{post, "models/*:generateContent", Operation{Text: true}},      // Gemini
	{post, "tunedModels/*:generateContent", Operation{Text: true}},
	{post, "tunedModels/*:streamGenerateContent", Operation{Text: true}},
	{post, "models/*:streamGenerateContent", Operation{Text: true}},
	{post, "models/*:rawPredict", Operation{Text: true}}, // Anthropic and Mistral at Vertex
	{post, "models/*:streamRawPredict", Operation{Text: true}},
	{post, "model/*/converse", Operation{Text: true}}, // Bedrock
	{post, "model/*/converse-stream", Operation{Text: true}},
	{post, "model/*/invoke", Operation{Text: true}},
	{post, "model/*/invoke-with-response-stream", Operation{Text: true}},
	{post, "api/chat", Operation{Text: true}}, // Ollama
	{post, "api/generate", Operation{Text: true}},
	{post, "completion", Operation{Text: true}}, // llama.cpp
	{post, "infill", Operation{Text: true}},
	{post, "generate_stream", Operation{Text: true}},  // TGI
	{read, "chat/deferred-completion/*", Operation{}}, // xAI: tells its usage here alone, once
	{post, "embeddings", Operation{Unused: output}},
	// Answers made of something else, with some models.
	{post, "images/generations", Operation{models: []string{"dall-e-"}, unusedWith: tokens}},
	{post, "images/edits", Operation{models: []string{"dall-e-"}, unusedWith: tokens}},
	{post, "images/variations", Operation{Unused: tokens}}, // dall-e-2 alone has them
	{post, "audio/speech", Operation{models: []string{"tts-1"}, unusedWith: tokens}},
	{post, "audio/transcriptions", Operation{models: []string{"whisper-"}, unusedWith: tokens}},
	{post, "audio/translations", Operation{Unused: tokens}}, // whisper alone has them
	{post, "videos", Operation{Unused: tokens}},
	{post, "videos/*/remix", Operation{Unused: tokens}},
	// No answer of a model.
	{post, "moderations", Operation{Unused: nothing}},
	{post, "messages/count_tokens", Operation{Unused: nothing}},
	{post, "responses/input_tokens", Operation{Unused: nothing}},
	{post, "models/*:countTokens", Operation{Unused: nothing}},
	{post, "interactions/*/cancel", Operation{Unused: nothing}},
	{post, "threads/*/runs/*", Operation{Unused: nothing}}, // its metadata
	{post, "threads/*/runs/*/cancel", Operation{Unused: nothing}},
	{post, "responses/*/cancel", Operation{Unused: nothing}},
	{post, "chat/completions/*", Operation{Unused: nothing}}, // its metadata
	{post, "files", Operation{Unused: nothing}},
	{post, "uploads", Operation{Unused: nothing}},
	{post, "uploads/*/parts", Operation{Unused: nothing}},
	{post, "uploads/*/complete", Operation{Unused: nothing}},
	{post, "uploads/*/cancel", Operation{Unused: nothing}},
	{post, "conversations", Operation{Unused: nothing}},
	{post, "conversations/*", Operation{Unused: nothing}},
	{post, "conversations/*/items", Operation{Unused: nothing}},
	{post, "batches/*/cancel", Operation{Unused: nothing}},
	{post, "messages/batches/*/cancel", Operation{Unused: nothing}},
	{post, "fine_tuning/jobs/*/cancel", Operation{Unused: nothing}},
	{post, "fine_tuning/jobs/*/pause", Operation{Unused: nothing}},
	{manage, "chat/completions/**", Operation{Unused: nothing}},
	{manage, "responses/*/**", Operation{Unused: nothing}},
	{manage, "conversations/*/**", Operation{Unused: nothing}},
	{manage, "models/**", Operation{Unused: nothing}},
	{manage, "files/**", Operation{Unused: nothing}},
	{read, "uploads/*", Operation{Unused: nothing}},
	// What a batch used is told here, as often as somebody asks: it is reported as an
	// event, and not counted here.
	{manage, "batches/**", Operation{Unused: nothing}},
	{manage, "messages/batches/**", Operation{Unused: nothing}},
	{manage, "fine_tuning/jobs/**", Operation{Unused: nothing}},
	{manage, "videos/**", Operation{Unused: nothing}},
	{manage, "vector_stores/**", Operation{Unused: nothing}},
	{manage, "assistants/**", Operation{Unused: nothing}},
	{manage, "threads/*/**", Operation{Unused: nothing}},
	{manage, "evals/**", Operation{Unused: nothing}},
	{manage, "containers/**", Operation{Unused: nothing}},
	{manage, "skills/**", Operation{Unused: nothing}},
}

// byBeginning has the table's entries by method and by the first segment of their paths,
// which is none that stands for others.
var byBeginning = func() map[string]map[string][]*entry {
	all := make(map[string]map[string][]*entry)
	for i := range table {
		e := &table[i]
		segment, _, _ := strings.Cut(e.path, "/")
		for _, method := range strings.Fields(e.methods) {
			if all[method] == nil {
				all[method] = make(map[string][]*entry)
			}
			all[method][segment] = append(all[method][segment], e)
		}
	}
	return all
}()

// versions are the segments behind which an API's own paths begin.
var versions = []string{"v1", "v1beta", "v1alpha", "v2", "openai"}

// Of returns what a call to a path does. A provider's path is known from its version on;
// those of answers made of tokens also without one, because there the table only says
// what bounds them. provider: all that is served there is of OpenAI's or Anthropic's API,
// of which what only reads and deletes makes no answer of a model.
func Of(method, path string, provider bool) Operation {
	if method == http.MethodOptions || method == http.MethodHead {
		return Operation{Known: true, Unused: nothing} // no answer that could have been made
	}
	rest := strings.TrimRight(strings.TrimPrefix(path, "/"), "/")
	anchored, begins := provider, byBeginning[method]
	for more := true; more; {
		var segment, behind string
		segment, behind, more = strings.Cut(rest, "/")
		for _, e := range begins[segment] {
			if (anchored || e.Text && !e.versioned) && matches(e.path, rest) {
				o := e.Operation
				o.Known = true
				return o
			}
		}
		rest, anchored = behind, slices.Contains(versions, segment)
	}
	if provider && (method == http.MethodGet || method == http.MethodDelete) {
		return Operation{Known: true, Unused: nothing}
	}
	return Operation{}
}

func matches(pattern, path string) bool {
	for more := true; pattern != ""; {
		var head, segment string
		head, pattern, _ = strings.Cut(pattern, "/")
		if head == "**" {
			return true
		}
		if !more {
			return false
		}
		segment, path, more = strings.Cut(path, "/")
		switch {
		case segment == "" || head != segment && (head[0] != '*' || !strings.HasSuffix(segment, head[1:])):
			return false
		case pattern == "":
			return !more
		}
	}
	return false // an empty pattern is no entry's
}

// Maxima are all members that bound a request's output.
func Maxima() []string {
	var all []string
	for i := range table {
		for _, m := range table[i].Maxima {
			if !slices.Contains(all, m) {
				all = append(all, m)
			}
		}
	}
	return all
}
