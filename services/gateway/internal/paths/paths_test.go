package paths

import "testing"

func TestAPrefixIsOfWholeSegments(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		path, prefix, rest, stripped string
		ok                           bool
	}{
		{"/v1/chat", "/v1", "/chat", "/chat", true},
		{"/v1", "/v1", "", "/", true},
		{"/v10", "/v1", "0", "0", false},
		{"/v2", "/v1", "", "/", false},
		{"//v1///chat", "/v1", "///chat", "///chat", true},
		{"/a//b/c", "/a/b", "/c", "/c", true},
		{"/x", "/", "/x", "/x", true},
	} {
		rest, ok := Cut(c.path, c.prefix)
		if ok != c.ok || rest != c.rest || Stripped(c.path, c.prefix) != c.stripped {
			t.Errorf("%s below %s: %q, %v, %q", c.path, c.prefix, rest, ok, Stripped(c.path, c.prefix))
		}
	}
}

func TestAPathWithDotsIsNotResolved(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{
		"/a/b": true, "/": true, "/a/..": false, "/./a": false, "/a/..;x=1/b": false, "/.;/": false, "/a..b/...": true,
	} {
		if Resolved(path) != want {
			t.Errorf("%s: %v", path, !want)
		}
	}
}
