package front

import (
	"net/http"
	"testing"
)

func TestTheToken(t *testing.T) {
	t.Parallel()
	ask := func(g *Guard, method, path, token string) int {
		req, err := http.NewRequest(method, "http://console.example"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		if p, refused := g.refuse(req); refused {
			return p.Status
		}
		return 200
	}
	open, local := &Guard{Token: "s3cret"}, &Guard{Token: "s3cret", Loopback: true}
	for _, c := range []struct {
		g                   *Guard
		method, path, token string
		want                int
	}{
		{open, "GET", "/v1/usage", "", 401},
		{open, "GET", "/v1/usage", "wrong", 401},
		{open, "GET", "/v1/usage", "s3cret", 200},
		{open, "GET", "/metrics", "", 401},
		{open, "GET", "/readyz", "", 401},
		{open, "GET", "/healthz", "", 200},
		{open, "GET", "/", "", 200},
		{open, "PUT", "/v1/plans", "", 401},
		{open, "PUT", "/v1/plans", "s3cret", 200},
		{local, "GET", "/v1/usage", "", 200},
		{local, "PUT", "/v1/plans", "", 401},
		{local, "PUT", "/v1/plans", "s3cret", 200},
	} {
		if got := ask(c.g, c.method, c.path, c.token); got != c.want {
			t.Errorf("%s %s with token %q (loopback %v): %d, want %d", c.method, c.path, c.token, c.g.Loopback, got, c.want)
		}
	}
}
