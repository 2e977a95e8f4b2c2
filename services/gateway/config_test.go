package gateway

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
)

func TestTheExampleIsValid(t *testing.T) {
	t.Parallel()
	c, err := ParseConfig("example.yaml", Example)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Routes) != 2 || c.Routes[0].Model.JSON != "model" || c.Routes[0].Profile != refusal.OpenAI {
		t.Errorf("%+v", c)
	}
	for _, part := range []reflect.Type{reflect.TypeFor[Config](), reflect.TypeFor[RouteConfig](), reflect.TypeFor[ModelConfig](), reflect.TypeFor[CORSConfig]()} {
		for i := range part.NumField() {
			if field := part.Field(i).Tag.Get("yaml"); !bytes.Contains(Example, []byte(field+":")) {
				t.Errorf("the example does not have %s", field)
			}
		}
	}
	single := SingleUpstream("x", "http://127.0.0.1:1", "")
	if err := single.Validate(); err != nil {
		t.Error(err)
	}
}

func TestABadConfigurationNamesFileLineAndReason(t *testing.T) {
	t.Parallel()
	const head = "routes:\n  - name: a\n    upstream: http://127.0.0.1:1\n"
	for name, c := range map[string]struct{ yaml, want string }{
		"no YAML":             {"routes: [", "f.yaml:1: "},
		"unknown field":       {head + "    upstrem: x\n", "f.yaml:4: unknown field"},
		"wrong type":          {"routes: 5\n", "f.yaml:1: "},
		"duration":            {head + "    timeout: soon\n", `"soon" is not a duration`},
		"no routes":           {"key_headers: [X]\n", "f.yaml: there is no route"},
		"no name":             {"routes:\n  - upstream: http://127.0.0.1:1\n", "f.yaml:2: a route needs a name"},
		"name twice":          {head + "  - name: a\n    prefix: /x\n    upstream: http://127.0.0.1:1\n", "f.yaml:4: the name \"a\" is taken"},
		"the same place":      {head + "  - name: b\n    upstream: http://127.0.0.1:1\n", `route "b" is for the same host, prefix and methods as "a"`},
		"upstream":            {"routes:\n  - name: a\n    upstream: 127.0.0.1\n", "f.yaml:3: the upstream is not a URL"},
		"upstream's password": {"routes:\n  - name: a\n    upstream: http://u:hunter2@h\n", "f.yaml:3: the upstream's URL has credentials"},
		"prefix":              {head + "    prefix: v1\n", "f.yaml:4: \"v1\" does not begin with /"},
		"host":                {head + "    host: a.example:80\n", "f.yaml:4: "},
		"profile":             {head + "    profile: soap\n", "f.yaml:4: \"soap\" is not a profile"},
		"usage":               {head + "    usage: xml\n", "f.yaml:4: \"xml\": choose json or none"},
		"two models":          {head + "    model: {json: model, fixed: x}\n", "f.yaml:4: choose one of json, header and fixed"},
		"method":              {head + "    methods: [post]\n", "f.yaml:4: \"post\" is not a method"},
		"any origin":          {"cors: {origins: [\"*\"], credentials: true}\n" + head, "f.yaml:1: * does not go with credentials"},
		"an origin's path":    {head + "    cors: {origins: [\"https://a.example/x\"]}\n", "f.yaml:4: \"https://a.example/x\" is not an origin"},
		"the origin null":     {head + "    cors: {origins: [\"null\"]}\n", "is not an origin"},
		"a wide origin":       {head + "    cors: {origins: [\"https://*.com\"]}\n", "is too wide"},
		"stars":               {head + "    cors: {origins: [\"https://*\"]}\n", "is not an origin"},
		"a failure":           {head + "    uncounted: [4xx]\n", "f.yaml:4: \"4xx\": choose of unanswered and 5xx"},
		"an odd prefix":       {head + "    prefix: /v1;x\n", "f.yaml:4: \"/v1;x\" is never met for certain"},
		"an empty file":       {"", "f.yaml: there is no route"},
		"only comments":       {"# routes:\n", "f.yaml: there is no route"},
		"number for duration": {head + "    timeout: 10\n", "is not a duration"},
		"one method":          {head + "    methods: POST\n", "f.yaml:4: string was used where sequence is expected: write a list"},
		"a model's name":      {head + "    model: gpt\n", "f.yaml:4: string was used where mapping is expected: write names with values"},
		"routes alone":        {"- name: a\n  upstream: http://127.0.0.1:1\n", "begins with routes:"},
		"prefix pattern":      {head + "    prefix: /v1/*\n", "f.yaml:4: \"/v1/*\" is not a prefix: there are no patterns"},
		"prefix slashes":      {head + "    prefix: /v1//x\n", "f.yaml:4: \"/v1//x\" is never met"},
		"prefix dots":         {head + "    prefix: /v1/../x\n", "f.yaml:4: \"/v1/../x\" is never met"},
		"host pattern":        {head + "    host: \"*.example\"\n", "f.yaml:4: \"*.example\": there are no patterns"},
		"host header":         {head + "    set_headers: {host: a.example}\n", "f.yaml:4: Host is the upstream's own"},
		"missing variable":    {head + "    set_headers: {Authorization: \"Bearer ${TOLLKEEPER_TEST_NO_SUCH}\"}\n", "the environment has no variable TOLLKEEPER_TEST_NO_SUCH"},
		"reserve":             {head + "    reserve: {\"a b\": 1}\n", "f.yaml:4: \"a b\" cannot name a meter"},
		"reserve less":        {head + "    reserve: {gpu_ms: -1}\n", "f.yaml:4: -1 gpu_ms"},
		"half a clamp":        {head + "    clamp: {tokens: 5}\n", "f.yaml:4: give member"},
		"clamp of what":       {head + "    clamp: {member: limit, tokens: 5}\n", "f.yaml:4: \"limit\": choose max_tokens"},
		"overhead":            {head + "    input_overhead: -1\n", "f.yaml:4: -1 tokens"},
		"key header":          {"key_headers: [\"a b\"]\n" + head, "f.yaml:1: \"a b\" is not the name of a header"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := ParseConfig("f.yaml", []byte(c.yaml))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %s", err, c.want)
			}
			var e *ConfigError
			if !errors.As(err, &e) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestAllMistakesAreToldAtOnce(t *testing.T) {
	t.Parallel()
	_, err := ParseConfig("f.yaml", []byte("routes:\n  - name: a\n    upstream: x\n    prefix: y\n"))
	if err == nil || strings.Count(err.Error(), "f.yaml:") != 2 {
		t.Errorf("%v", err)
	}
}

func TestWhichRouteARequestTakes(t *testing.T) {
	t.Parallel()
	c, err := ParseConfig("f.yaml", []byte(`
routes:
  - {name: all, upstream: "http://u"}
  - {name: v1, prefix: /v1/, upstream: "http://u"}
  - {name: chat, prefix: /v1/chat, upstream: "http://u"}
  - {name: chat-post, prefix: /v1/chat, methods: [POST], upstream: "http://u"}
  - {name: host, host: API.example, upstream: "http://u"}
  - {name: host-get, host: api.example, prefix: /only, methods: [GET], upstream: "http://u"}
`))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := newProxyWithoutGate(t, c)
	for _, x := range []struct{ host, method, path, want string }{
		{"h", "GET", "/", "all"},
		{"h", "GET", "/v10", "all"},
		{"h", "GET", "/v1", "v1"},
		{"h", "GET", "/v1/", "v1"},
		{"h", "GET", "/v1/chat", "chat"},
		{"h", "GET", "/v1/chatter", "v1"},
		{"h", "POST", "/v1/chat/x", "chat-post"},
		{"api.example", "GET", "/v1/chat", "host"},
		{"Api.Example:8080", "GET", "/", "host"},
		{"api.example.", "GET", "/", "host"}, // the same host, written in full
		{"api.example.:8080", "GET", "/", "host"},
		{"api.example", "GET", "/only/x", "host-get"},
		{"api.example", "POST", "/only/x", "host"},
	} {
		if got := p.find(x.host, x.path, x.method); got == nil || got.o.Name != x.want {
			t.Errorf("%+v: %+v", x, got)
		}
	}
}
