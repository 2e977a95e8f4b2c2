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
		{"/v1//chat", "/v1", "//chat", "//chat", true},
		{"/a//b/c", "/a/b", "", "/", false},
		{"/x", "/", "/x", "/x", true},
		{"/V1/chat", "/v1", "", "/", false},
	} {
		rest, ok := Cut(c.path, c.prefix, false)
		if ok != c.ok || rest != c.rest || Stripped(c.path, c.prefix, false) != c.stripped {
			t.Errorf("%s below %s: %q, %v, %q", c.path, c.prefix, rest, ok, Stripped(c.path, c.prefix, false))
		}
	}
}

func TestCaseIsIgnoredWhereTheRouteSaysSo(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{"/V1/Chat": "/Chat", "/v1": "/", "/V10": "", "/v": "", "/\u212Aey": ""} {
		rest, ok := Cut(path, "/v1", true)
		if ok != (want != "") || ok && Stripped(path, "/v1", true) != want {
			t.Errorf("%s: %q, %v", path, rest, ok)
		}
	}
	// The Kelvin sign is a k to whoever folds as Unicode does, and is longer.
	if rest, ok := Cut("/\u212Aey/x", "/key", true); !ok || rest != "/x" {
		t.Errorf("%q, %v", rest, ok)
	}
}
