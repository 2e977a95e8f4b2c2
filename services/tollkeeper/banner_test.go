package tollkeeper_test

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// said returns the lines that the program wrote for people, once the last of them is
// there, without blank ones.
func (u *up) said(ctx context.Context, t *testing.T) []string {
	t.Helper()
	var lines []string
	eventually(ctx, t, "the banner", func() (bool, string) {
		text, err := os.ReadFile(u.out)
		if err != nil {
			return false, err.Error()
		}
		lines = slices.DeleteFunc(strings.Split(string(text), "\n"), func(s string) bool { return s == "" })
		return strings.Contains(string(text), "Ctrl-C stops everything in order."), string(text)
	})
	return lines
}

// parts checks that a line a part comes first, in the order of their start, and the
// banner last.
func (u *up) parts(ctx context.Context, t *testing.T, gateway string) []string {
	t.Helper()
	lines := u.said(ctx, t)
	want := [][2]string{
		{"NATS", "up"}, {"ledger", "up"}, {"ClickHouse", "up"}, {"aggregator", "ready"}, {"historian", "ready"},
		{"alerter", "ready"}, {"auditor", "ready"}, {"gateway", gateway}, {"console", "ready"},
	}
	for i, w := range want {
		if i >= len(lines) {
			t.Fatalf("%d lines: %q", len(lines), lines)
		}
		if f := strings.Fields(lines[i]); len(f) < 2 || f[0] != w[0] || f[1] != w[1] {
			t.Errorf("line %d is %q, want %s %s", i, lines[i], w[0], w[1])
		}
	}
	if lines[len(want)] != "Tollkeeper is up." || lines[len(lines)-1] != "Ctrl-C stops everything in order." {
		t.Errorf("the banner does not come last: %q", lines)
	}
	return lines
}

// curl sends the request of a printed command as a shell and curl would.
func curl(ctx context.Context, t *testing.T, command string) (status int, body string) {
	t.Helper()
	var words []string
	for i, part := range strings.Split(strings.TrimSpace(command), "'") {
		if i%2 == 1 {
			words = append(words, part)
		} else {
			words = append(words, strings.Fields(part)...)
		}
	}
	if len(words) < 3 || words[0] != "curl" || words[1] != "-i" {
		t.Fatalf("%q", command)
	}
	method, data, header := http.MethodGet, "", http.Header{}
	for i := 3; i+1 < len(words); i += 2 {
		switch words[i] {
		case "-H":
			name, value, _ := strings.Cut(words[i+1], ": ")
			header.Add(name, value)
		case "-d":
			method, data = http.MethodPost, words[i+1]
		default:
			t.Fatalf("%q: %s", command, words[i])
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, words[2], strings.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// tries returns the command that the banner shows.
func tries(t *testing.T, lines []string) string {
	t.Helper()
	i := slices.Index(lines, "Try it:")
	if i < 0 || i+1 >= len(lines) {
		t.Fatalf("no command to try: %q", lines)
	}
	return lines[i+1]
}

func outFile(t *testing.T) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "out")
}
