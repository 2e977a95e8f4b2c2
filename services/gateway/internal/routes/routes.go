// Package routes is the configuration of the gateway: its routes, read from a file, and
// what is wrong with them.
package routes

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/bounds"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/crossorigin"
	"github.com/tollkeeper/tollkeeper/services/gateway/internal/target"
)

// Example is a commented configuration with every field.
//
//go:embed example.yaml
var Example []byte

// Config is what the gateway's file says.
type Config struct {
	// KeyHeaders are looked at in this order for the API key; Authorization
	// (Bearer) and X-Api-Key when empty.
	KeyHeaders []string      `yaml:"key_headers"`
	Routes     []RouteConfig `yaml:"routes"`
	// CORS is for routes that have none of their own, and for what has no route.
	CORS *CORSConfig `yaml:"cors"`
}

// CORSConfig lets pages of other origins call: the gateway answers preflights, which
// are no calls, and marks all answers of the route, also refusals, as readable.
type CORSConfig struct {
	// Origins as in https://app.example.com or https://*.example.com; * is any. None:
	// the route is for no other origin, whatever holds for the others.
	Origins []string `yaml:"origins"`
	// Credentials lets browsers send cookies and client certificates along. API keys
	// in headers do not need it. It does not go with the origin *.
	Credentials bool `yaml:"credentials"`
	// Headers that requests may have; any when empty.
	Headers []string `yaml:"headers"`
	// Expose are headers of answers that pages may read, besides those of refusals.
	Expose []string `yaml:"expose"`
	// MaxAge is how long browsers need not ask again; not said when 0.
	MaxAge Duration `yaml:"max_age"`
}

// Policy of a route's answers; nil when it is for no other origin. r may be nil.
func (c *Config) Policy(r *RouteConfig) *crossorigin.Policy {
	from, methods := c.CORS, []string(nil)
	if r != nil {
		methods = r.Methods
		if r.CORS != nil {
			from = r.CORS
		}
	}
	if from == nil {
		return nil
	}
	return crossorigin.New(crossorigin.Options{
		Origins: from.Origins, Credentials: from.Credentials, Headers: from.Headers, Expose: from.Expose, MaxAge: time.Duration(from.MaxAge), Methods: methods,
	})
}

func (c *CORSConfig) problems(at string, add func(path, format string, args ...any)) {
	for i, o := range c.Origins {
		at := fmt.Sprintf("%s.origins[%d]", at, i)
		u, err := url.Parse(strings.Replace(o, "*.", "any.", 1))
		switch {
		case o == "*" && c.Credentials:
			add(at, "* does not go with credentials: any page could call as its visitor; name the origins")
		case o == "*":
		case err != nil || u.Scheme == "" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil || strings.Contains(u.Host, "*"):
			add(at, "%q is not an origin: write it as in https://app.example.com or https://*.example.com, without a path", o)
		case strings.Contains(o, "*.") && strings.Count(u.Hostname(), ".") < 2:
			add(at, "%q is too wide: name a domain after *.", o)
		}
	}
	for _, list := range [][]string{c.Headers, c.Expose} {
		for _, h := range list {
			if !validHeader(h) {
				add(at, "%q is not the name of a header", h)
			}
		}
	}
	if c.MaxAge < 0 {
		add(at+".max_age", "it is negative")
	}
}

// RouteConfig is one route. A request takes the route with its host before those
// for any host, then the one with the longest prefix, then one that names its
// method, then the first.
type RouteConfig struct {
	// Name is the route's name in limits and events.
	Name string `yaml:"name"`
	// Host without port; any when empty.
	Host string `yaml:"host"`
	// Prefix of the path, by whole segments; "/" when empty.
	Prefix  string   `yaml:"prefix"`
	Methods []string `yaml:"methods"` // all when empty
	// IgnoreCase takes /V1 for /v1, as some upstreams do; else they are two paths.
	IgnoreCase bool `yaml:"ignore_case"`
	// Upstream is the base URL; what follows the host stands before the path.
	Upstream string `yaml:"upstream"`
	// StripPrefix takes Prefix off the path.
	StripPrefix bool `yaml:"strip_prefix"`
	// KeepHost sends the client's Host to the upstream instead of its own.
	KeepHost bool `yaml:"keep_host"`
	// KeepKey sends the client's API key on. By default the upstream does not
	// see it, but the account, in X-Tollkeeper-Account.
	KeepKey bool `yaml:"keep_key"`
	// SetHeaders go to the upstream; ${NAME} is taken from the environment.
	SetHeaders map[string]string `yaml:"set_headers"`
	// CORS is instead of Config.CORS.
	CORS *CORSConfig `yaml:"cors"`
	// Profile of refusals: problem, openai, anthropic or flat.
	Profile refusal.Profile `yaml:"profile"`
	// Model says where the model's name is; the call has none when empty.
	Model ModelConfig `yaml:"model"`
	// Usage is json (read token counts from answers in JSON, lines of JSON and
	// server-sent events, whatever they are labelled) or none; json by default when
	// Model or a provider's profile is given.
	Usage string `yaml:"usage"`
	// AskUsage makes streamed chat completions and completions end with their usage
	// (stream_options.include_usage) where the client does not ask for it; what comes
	// only because of that is taken off the answer, byte for byte. True when it is not
	// given. False is for upstreams that refuse the option: what their streams use is
	// then an estimate, unless they tell without being asked.
	AskUsage *bool `yaml:"ask_usage"`
	// MetersHeader is an answer's header in which a trusted upstream reports
	// readings of any meter, as in "images=3, gpu_ms=120"; it is not sent on. A
	// reading that can't be counted is left out, counted and logged. None when
	// empty.
	MetersHeader string `yaml:"meters_header"`
	// Timeout until the answer's header; 10 minutes when 0. What is reserved for a
	// call counts as overdue after it.
	Timeout Duration `yaml:"timeout"`

	// Uncounted are failures of the upstream that count no call: Unanswered (a timeout,
	// a connection that breaks before the answer) and ServerErrors (an answer of 500
	// or more). Unanswered when it is nil. A call that reached nobody counts none
	// anyway; one that limits of the tiers exact and leased concern counts where the
	// upstream may have served it.
	Uncounted []string `yaml:"uncounted"`

	// What follows is for accounts with limits of the tiers exact and leased that
	// count something else than calls: there a call is admitted only if what it can
	// cost is bounded. Tokens are, by the request: its input by its size, its output
	// by max_tokens, max_completion_tokens or max_output_tokens, as the API has it,
	// times its choices. Which API it is the end of the path says, as OpenAI and
	// Anthropic have it; of others Clamp must say what bounds the output. What may add to that in a way that is not known is refused.

	// Reserve are bounds of a call by meter, for what the request does not tell;
	// they must not be less than what it can cost.
	Reserve map[string]int64 `yaml:"reserve"`
	// Clamp is written into JSON requests that do not bound their output; without
	// it they are refused. A bound by another name is written as Clamp.Member, which
	// is to be given where the upstream does not know all names of its API.
	Clamp ClampConfig `yaml:"clamp"`
	// InputOverhead is how many tokens the provider adds to the input of a call.
	InputOverhead int64 `yaml:"input_overhead"`
}

// ClampConfig bounds the output of calls that do not say.
type ClampConfig struct {
	Member string `yaml:"member"` // as the upstream calls it: max_tokens
	Tokens int64  `yaml:"tokens"`
}

// ModelConfig says where a request names its model. At most one is given.
type ModelConfig struct {
	JSON   string `yaml:"json"`   // a member of the JSON body
	Header string `yaml:"header"` // a header
	Fixed  string `yaml:"fixed"`  // always this one
	// MaxBody bounds the bodies that are read for it, in bytes; larger ones are
	// refused with 413. DefaultMaxModelBody when 0.
	MaxBody int64 `yaml:"max_body"`
}

// DefaultMaxModelBody is ModelConfig.MaxBody's default.
const DefaultMaxModelBody = 16 << 20

// DefaultTimeout is RouteConfig.Timeout's default.
const DefaultTimeout = 10 * time.Minute

// Usage of RouteConfig.
const (
	UsageJSON = "json"
	UsageNone = "none"
)

// Failures that Uncounted names.
const (
	Unanswered   = "unanswered"
	ServerErrors = "5xx"
)

// Counts reports whether a call that fails so is counted.
func (r *RouteConfig) Counts(failure string) bool {
	if r.Uncounted == nil {
		return failure != Unanswered
	}
	return !slices.Contains(r.Uncounted, failure)
}

// Duration is written as in "30s".
type Duration time.Duration

// UnmarshalYAML implements yaml.BytesUnmarshaler.
func (d *Duration) UnmarshalYAML(b []byte) error {
	var s string
	if err := yaml.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration: write one such as 30s or 10m", s)
	}
	*d = Duration(v)
	return nil
}

// SingleUpstream is the configuration of a gateway that sends everything to one
// upstream.
func SingleUpstream(route, upstream string, profile refusal.Profile) Config {
	return Config{Routes: []RouteConfig{{
		Name: route, Prefix: "/", Upstream: upstream, Profile: profile, Model: ModelConfig{JSON: "model"}, Usage: UsageJSON,
	}}}
}

// ConfigError says what is wrong with a configuration, and where.
type ConfigError struct {
	File string
	Line int // from 1; 0 when there is none
	Text string
}

// Error is "file:line: what is wrong".
func (e *ConfigError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Text)
	}
	return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Text)
}

// Load reads a configuration file.
func Load(file string) (Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Config{}, fmt.Errorf("read the gateway's configuration: %w", err)
	}
	return Parse(file, data)
}

// Parse reads a configuration; name stands for it in errors, which are
// *ConfigError, joined when there are several.
func Parse(name string, data []byte) (Config, error) {
	var c Config
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return c, yamlError(name, err)
	}
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.DisallowUnknownField()).Decode(&c); err != nil && !errors.Is(err, io.EOF) { // an empty file has no routes
		return c, yamlError(name, err)
	}
	var errs []error
	for _, p := range c.problems() {
		errs = append(errs, &ConfigError{File: name, Line: lineOf(file, p.path), Text: p.text})
	}
	return c, errors.Join(errs...)
}

func yamlError(name string, err error) error {
	var y yaml.Error
	if errors.As(err, &y) {
		e := &ConfigError{File: name, Text: y.GetMessage()}
		switch {
		case strings.HasSuffix(e.Text, "where sequence is expected"):
			e.Text += ": write a list, as in [POST, PUT]"
		case strings.HasSuffix(e.Text, "where mapping is expected"):
			e.Text += ": write names with values, as in {json: model} (the file itself begins with routes:)"
		}
		if t := y.GetToken(); t != nil && t.Position != nil {
			e.Line = t.Position.Line
		}
		return e
	}
	return &ConfigError{File: name, Text: err.Error()}
}

// lineOf finds a path's line, or that of the nearest thing around it.
func lineOf(f *ast.File, path string) int {
	for path != "" && path != "$" {
		if p, err := yaml.PathString(path); err == nil {
			if n, err := p.FilterFile(f); err == nil && n != nil {
				return n.GetToken().Position.Line
			}
		}
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	return 0
}

type problem struct{ path, text string }

// Validate returns what is wrong with a configuration that was not read from a
// file.
func (c *Config) Validate() error {
	var errs []error
	for _, p := range c.problems() {
		errs = append(errs, &ConfigError{File: "gateway configuration, " + p.path, Text: p.text})
	}
	return errors.Join(errs...)
}

// maxRoutes bounds the search for one, and the label sets made of them.
const maxRoutes = 500

func (c *Config) problems() []problem {
	var out []problem
	add := func(path, format string, args ...any) {
		out = append(out, problem{path, fmt.Sprintf(format, args...)})
	}
	for i, h := range c.KeyHeaders {
		if !validHeader(h) {
			add(fmt.Sprintf("$.key_headers[%d]", i), "%q is not the name of a header", h)
		}
	}
	if c.CORS != nil {
		c.CORS.problems("$.cors", add)
	}
	if len(c.Routes) == 0 {
		add("$.routes", "there is no route: the gateway would serve nothing")
	}
	if len(c.Routes) > maxRoutes {
		add("$.routes", "there are %d routes, at most %d are possible", len(c.Routes), maxRoutes)
	}
	type place struct{ host, prefix, methods string }
	seen := make(map[place]string)
	names := make(map[string]bool)
	for i := range c.Routes {
		r, at := &c.Routes[i], fmt.Sprintf("$.routes[%d]", i)
		if r.Name == "" || len(r.Name) > usage.MaxNameBytes {
			add(at+".name", "a route needs a name of 1 to %d bytes", usage.MaxNameBytes)
		}
		if names[r.Name] {
			add(at+".name", "the name %q is taken by another route", r.Name)
		}
		names[r.Name] = true
		switch {
		case r.Prefix != "" && !strings.HasPrefix(r.Prefix, "/"):
			add(at+".prefix", "%q does not begin with /", r.Prefix)
		case strings.ContainsAny(r.Prefix, "*?#{}"):
			add(at+".prefix", "%q is not a prefix: there are no patterns, /v1 means all below it", r.Prefix)
		case strings.Contains(r.Prefix, "//") || !target.Resolved(r.Prefix):
			add(at+".prefix", "%q is never met: write it without empty segments, . and ..", r.Prefix)
		case strings.ContainsAny(r.Prefix, "%;\\ \t") || !utf8.ValidString(r.Prefix):
			add(at+".prefix", "%q is never met for certain: write it decoded, without semicolons, backslashes and spaces", r.Prefix)
		}
		if strings.ContainsAny(r.Host, "*?") {
			add(at+".host", "%q: there are no patterns, leave host out for any", r.Host)
		} else if strings.ContainsAny(r.Host, ":/") {
			add(at+".host", "%q is not a host: write it without scheme and port", r.Host)
		}
		if u, err := url.Parse(r.Upstream); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
			add(at+".upstream", "the upstream is not a URL such as http://127.0.0.1:9000")
		} else if u.User != nil {
			add(at+".upstream", "the upstream's URL has credentials in it: use set_headers with ${NAME}")
		}
		if r.CORS != nil {
			r.CORS.problems(at+".cors", add)
		}
		if !r.Profile.Valid() {
			add(at+".profile", "%q is not a profile: choose problem, openai, anthropic or flat", r.Profile)
		}
		switch r.Usage {
		case "", UsageJSON, UsageNone:
		default:
			add(at+".usage", "%q: choose json or none", r.Usage)
		}
		if r.MetersHeader != "" && !validHeader(r.MetersHeader) {
			add(at+".meters_header", "%q is not the name of a header", r.MetersHeader)
		}
		given := 0
		for _, s := range []string{r.Model.JSON, r.Model.Header, r.Model.Fixed} {
			if s != "" {
				given++
			}
		}
		if given > 1 {
			add(at+".model", "choose one of json, header and fixed")
		}
		if r.Model.Header != "" && !validHeader(r.Model.Header) {
			add(at+".model.header", "%q is not the name of a header", r.Model.Header)
		}
		if r.Model.MaxBody < 0 {
			add(at+".model.max_body", "it is negative")
		}
		for _, m := range slices.Sorted(maps.Keys(r.Reserve)) {
			switch {
			case !usage.Meter(m).Valid():
				add(at+".reserve", "%q cannot name a meter", m)
			case r.Reserve[m] < 0 || r.Reserve[m] > usage.MaxQuantity:
				add(at+".reserve", "%d %s: 0 to %d are possible", r.Reserve[m], m, usage.MaxQuantity)
			}
		}
		switch {
		case r.Clamp.Member == "" && r.Clamp.Tokens != 0, r.Clamp.Member != "" && (r.Clamp.Tokens < 1 || r.Clamp.Tokens > usage.MaxQuantity):
			add(at+".clamp", "give member (max_tokens, max_completion_tokens or max_output_tokens, as the upstream calls it) and tokens, at least 1")
		case r.Clamp.Member != "" && !slices.Contains(bounds.Maxima(), r.Clamp.Member):
			add(at+".clamp.member", "%q: choose max_tokens, max_completion_tokens or max_output_tokens, as the upstream calls it", r.Clamp.Member)
		}
		if r.InputOverhead < 0 || r.InputOverhead > usage.MaxQuantity {
			add(at+".input_overhead", "%d tokens: 0 to %d are possible", r.InputOverhead, usage.MaxQuantity)
		}
		for _, f := range r.Uncounted {
			if f != Unanswered && f != ServerErrors {
				add(at+".uncounted", "%q: choose of %s and %s", f, Unanswered, ServerErrors)
			}
		}
		if r.Timeout < 0 {
			add(at+".timeout", "it is negative")
		}
		for _, m := range r.Methods {
			if m == "" || m != strings.ToUpper(m) || !validHeader(m) {
				add(at+".methods", "%q is not a method: write it as in POST", m)
			}
		}
		for _, h := range slices.Sorted(maps.Keys(r.SetHeaders)) {
			if !validHeader(h) {
				add(at+".set_headers", "%q is not the name of a header", h)
			}
			if http.CanonicalHeaderKey(h) == "Host" {
				add(at+".set_headers", "Host is the upstream's own, or the client's with keep_host: it can't be set here")
			}
			switch value, missing := Expand(r.SetHeaders[h]); {
			case missing != "":
				add(at+".set_headers", "the environment has no variable %s", missing)
			case strings.ContainsFunc(value, unfit):
				add(at+".set_headers", "the value of %s has a line break or another control character in it (at the end of a variable?): every call would fail", h)
			}
		}
		methods := slices.Sorted(slices.Values(r.Methods))
		p := place{strings.ToLower(r.Host), r.PathPrefix(), strings.Join(methods, " ")}
		if other, ok := seen[p]; ok {
			add(at, "route %q is for the same host, prefix and methods as %q", r.Name, other)
		}
		seen[p] = r.Name
	}
	return out
}

// PathPrefix is Prefix without a slash at its end.
func (r *RouteConfig) PathPrefix() string {
	if p := strings.TrimSuffix(r.Prefix, "/"); p != "" {
		return p
	}
	return "/"
}

// AsksUsage reports whether upstreams are asked for usage that clients did not ask for.
func (r *RouteConfig) AsksUsage() bool { return r.ReadsUsage() && (r.AskUsage == nil || *r.AskUsage) }

// ReadsUsage reports whether token counts are worth looking for.
func (r *RouteConfig) ReadsUsage() bool {
	if r.Usage != "" {
		return r.Usage == UsageJSON
	}
	return r.Model != ModelConfig{} || r.Profile == refusal.OpenAI || r.Profile == refusal.Anthropic
}

func validHeader(s string) bool {
	if s == "" {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("()<>@,;:\\\"/[]?={}", c) >= 0 {
			return false
		}
	}
	return http.CanonicalHeaderKey(s) != ""
}

// unfit: a header's value can't have it.
func unfit(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }

// Expand replaces ${NAME} by the environment's value, and names the first one that
// is missing.
func Expand(s string) (value, missing string) {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(s, "${")
		b.WriteString(before)
		if !ok {
			return b.String(), missing
		}
		name, after, closed := strings.Cut(rest, "}")
		if !closed {
			b.WriteString("${" + rest)
			return b.String(), missing
		}
		v, there := os.LookupEnv(name)
		if !there && missing == "" {
			missing = name
		}
		b.WriteString(v)
		s = after
	}
}
