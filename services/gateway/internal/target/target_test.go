package target

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func read(t *testing.T, method, host, uri string) (Target, string) {
	t.Helper()
	u, err := url.ParseRequestURI(uri)
	if err != nil {
		t.Fatalf("net/http answers 400 to %q by itself: %v", uri, err)
	}
	return Of(&http.Request{Method: method, Host: host, URL: u, RequestURI: uri})
}

func TestWhatIsNoTargetIsRefused(t *testing.T) {
	t.Parallel()
	for _, uri := range []string{
		"http:http://h/v1/chat", "http:/v1/chat", "http:v1", "https:", "mailto:x", "ftp://h/v1", "ws://h/v1", "//h/v1", "///v1", "*",
		"http://u@h/v1", "http://u:p@h/v1", "http:///v1", "http://:80/v1/../x",
		"/v1#x", "/v1?q#x", "/#", "http://h/v1#x",
		`/v1\chat`, `/\h/v1`, "/a/../b", "/a/..", "/.", "/a/%2e%2e/b", "/a/.%2E", "/a/..;x/b", "/a/%252e%252e/b", "/a/..%2fb", "/a/..%5cb", "/a/.%20/b", "/a/..%00/b", "/%2e./",
		"/a%00", "/a%0d%0aHost:x", "/a%7f", "/a%2500", "/a%c0%ae", "/a%c0%af", "/a%ff", "/a%25c0%25af", "/\xc0\xaf", "/a%ed%a0%80",
		"/a%2fb\"c", "/%2525252525252541",
	} {
		if _, problem := read(t, "POST", "h", uri); problem == "" {
			t.Errorf("%q is a target", uri)
		}
	}
	for _, method := range []string{"CONNECT", "TRACE", "post", "Post", "gET"} {
		if _, problem := read(t, method, "h", "/v1"); problem == "" {
			t.Errorf("%s is a method", method)
		}
	}
	for _, host := range []string{"a b", "h/v1", "u@h", "h:", "h:80:80", "h:x", "[::1", "[x]", "[::1]:x", ":80", "h,g", "h%41"} {
		if _, problem := read(t, "GET", host, "/v1"); problem == "" && host != "h:" {
			t.Errorf("%q is a host", host)
		}
	}
}

func TestATargetHasOneReadingOrNamesAllOthers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		uri, path string
		others    []string // some of them
	}{
		{"/", "/", nil},
		{"/v1/chat/completions?a=b;c=%zz&d=//x", "/v1/chat/completions", nil},
		{"/v1/models/a:b@c,(d)!$&'*+=~_-.e", "/v1/models/a:b@c,(d)!$&'*+=~_-.e", nil},
		{"http://h", "/", nil},
		{"http://h?x=/y", "/", nil},
		{"HTTPS://h:8080/v1/x?u=http://y", "/v1/x", nil},
		{"/v1/chat;x/completions", "/v1/chat;x/completions", []string{"/v1/chat/completions"}},
		{"/v1/chat%3bx/completions", "/v1/chat;x/completions", []string{"/v1/chat/completions"}},
		{"/v1//chat", "/v1//chat", []string{"/v1/chat"}},
		{"/v1%2fchat", "/v1/chat", []string{"/v1%2fchat"}},
		{"/v1%5Cchat", `/v1\chat`, []string{"/v1/chat", "/v1%5Cchat"}},
		{"/%76%31/chat", "/v1/chat", []string{"/%76%31/chat"}},
		{"/v1%252fchat", "/v1%2fchat", []string{"/v1/chat"}},
		{"/v1/chat%3Fx", "/v1/chat?x", []string{"/v1/chat"}},
		{"/v1/chat%23", "/v1/chat#", []string{"/v1/chat"}},
		{"/v1./chat%20/x", "/v1./chat /x", []string{"/v1/chat/x"}},
		{"/v1/\uff0fchat", "/v1/\uff0fchat", []string{"/v1/chat"}},
		{"/%C3%BC/x", "/ü/x", []string{}},
		{"/ü/x", "/ü/x", []string{}},
		{"/a..b/...", "/a..b/...", []string{}},
		{"/50%25", "/50%", []string{"/50%25"}},
	} {
		got, problem := read(t, "GET", "h", c.uri)
		if problem != "" || got.Path != c.path || got.Plain() != (c.others == nil) {
			t.Errorf("%q: %q, %+v", c.uri, problem, got)
		}
		for _, o := range c.others {
			if !slices.Contains(got.Others, o) {
				t.Errorf("%q is not read as %q, but as %q", c.uri, o, got.Others)
			}
		}
		if len(c.others) == 0 && len(got.Others) > 0 {
			t.Errorf("%q is read as %q", c.uri, got.Others)
		}
	}
	for _, host := range []string{"", "h", "H.example.", "h:80", "127.0.0.1:8080", "[::1]", "[::1]:80", "a_b-c.d"} {
		if _, problem := read(t, "GET", host, "/v1"); problem != "" {
			t.Errorf("%q: %s", host, problem)
		}
	}
}

func TestAPlainPathCostsNothing(t *testing.T) {
	r := &http.Request{Method: "POST", Host: "api.example.com:8080", URL: &url.URL{Path: "/v1/chat/completions"}, RequestURI: "/v1/chat/completions?x=y"}
	if n := testing.AllocsPerRun(100, func() { _, _ = Of(r) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Whatever a path looks like: it is refused, or its readings are bounded, without dots
// and without what ends a line.
func FuzzPath(f *testing.F) {
	for _, s := range []string{"/v1/chat", "/a%2f..;x\\", "/%252e%2e/", "//", "/ü%c3", "http://h/%2e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		u, err := url.ParseRequestURI(uri)
		if err != nil {
			return
		}
		got, problem := Of(&http.Request{Method: "GET", URL: u, RequestURI: uri})
		if problem != "" {
			return
		}
		for _, p := range append(got.Others, got.Path) {
			if strings.ContainsAny(p, "\x00\r\n") || !Resolved(p) || len(p) > len(uri)+1 || len(got.Others) > 16 {
				t.Errorf("%q: %q", uri, got)
			}
		}
	})
}
