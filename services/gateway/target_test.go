package gateway

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// recorder is an upstream that keeps requests as they came over the wire: the request
// line, the header and, after an empty line, the trailer.
type recorder struct {
	url  string
	seen chan []string
}

func newRecorder(t *testing.T, answer string) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{url: "http://" + l.Addr().String(), seen: make(chan []string, 64)}
	done := make(chan struct{})
	t.Cleanup(func() { _ = l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.seen <- record(conn)
			_, _ = io.WriteString(conn, answer)
			_ = conn.Close()
		}
	}()
	return r
}

func record(conn net.Conn) []string {
	in := bufio.NewReader(conn)
	lines := func() (out []string) {
		for {
			line, err := in.ReadString('\n')
			if line = strings.TrimRight(line, "\r\n"); err != nil || line == "" {
				return out
			}
			out = append(out, line)
		}
	}
	head := lines()
	if !slices.ContainsFunc(head, func(l string) bool { return strings.EqualFold(l, "Transfer-Encoding: chunked") }) {
		return head
	}
	for {
		size, err := in.ReadString('\n')
		if err != nil || strings.TrimSpace(size) == "0" {
			return append(append(head, ""), lines()...)
		}
		var n int
		_, _ = fmt.Sscanf(size, "%x", &n)
		_, _ = io.CopyN(io.Discard, in, int64(n)+2)
	}
}

const noContent = "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"

// A client can't choose a route by how it spells a path that the upstream reads in
// another way: what is passed on has one route in every reading, and is passed on as it
// came; everything else is 400.
func TestTheUpstreamReadsTheTargetThatTheRouteWasFoundBy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := newRecorder(t, noContent)
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{Routes: []RouteConfig{
			{Name: "all", Upstream: up.url + "/base"},
			{Name: "chat", Prefix: "/v1/chat/completions", Methods: []string{"POST"}, Upstream: up.url},
			{Name: "fold", Prefix: "/Fold", IgnoreCase: true, StripPrefix: true, Upstream: up.url},
			{Name: "strip", Prefix: "/strip", StripPrefix: true, Upstream: up.url},
			{Name: "ours", Host: "ours.example", Upstream: up.url, KeepHost: true},
		}}
	})
	g.ready()
	n := 0
	send := func(line, host, more string) (int, string) {
		n++
		id := fmt.Sprint("target-", n)
		_, resp := raw(t, g.proxy, line+"\r\nHost: "+host+"\r\nAuthorization: Bearer sk-search\r\nContent-Length: 0\r\nX-Request-Id: "+id+"\r\n"+more+"\r\n")
		return resp.StatusCode, id
	}
	for _, c := range []string{
		"POST http:http://h/v1/chat/completions", "POST http:/v1/chat/completions", "POST mailto:x", "POST ftp://h/v1/chat/completions", "POST http:///v1/chat/completions",
		"POST http://u:p@h/v1/chat/completions", "POST http://h/v1/chat/completions#x", "POST /v1/chat/completions#x", "POST h:80", "POST v1/chat/completions",
		"CONNECT h:80", "TRACE /v1/chat/completions", "CONNECT /v1/chat/completions", "OPTIONS *", "POST *", "POST ", "POST ?x",
		"POST /v1/chat;x/completions", "POST /v1/chat%3Bx/completions", "POST /v1;/chat/completions", "POST //v1/chat/completions", "POST //h/v1/chat/completions",
		"POST /v1//chat/completions", `POST /v1\chat\completions`, `POST /\h/v1/chat/completions`, "POST /v1%5cchat%5Ccompletions", "POST /v1%2Fchat/completions", "POST /v1%252fchat/completions",
		"POST /%76%31/chat/completions", "POST /v1/chat/completion%73", "POST /v1/chat/completion%2573", "POST /v1/chat/./completions", "POST /v1/x/../chat/completions",
		"POST /v1/x/%2e%2e/chat/completions", "POST /v1/x/%252e%252e/chat/completions", "POST /v1/x/..;/chat/completions", "POST /v1/x/..%5cchat/completions", "POST /v1/x%2f..%2fchat/completions",
		"POST /v1/chat/completions%3Fx", "POST /v1/chat/completions%23x", "POST /v1/chat/completions%00", "POST /v1/chat/completions%20", "POST /v1/chat/completions.", "POST /v1/chat%09/completions",
		"POST /v1/chat\xc0\xafcompletions", "POST /v1/chat%c0%afcompletions", "POST /v1/chat%ff", "POST /v1%0d%0ax", "POST /v1/\uff0fchat/completions", "POST /v1%ef%bc%8fchat/completions",
		"post /v1/chat/completions", "Post /v1/chat/completions", "POST /strip//h/x", "POST /fold//x", "POST http://h:x/v1", "POST http://h%00/v1", "POST /%zz", "POST /a b",
	} {
		if status, _ := send(c+" HTTP/1.1", "h", ""); status != http.StatusBadRequest {
			t.Errorf("%s: %d", c, status)
		}
	}
	for _, more := range []string{"X-HTTP-Method-Override: DELETE\r\n", "X-Method-Override: get\r\n"} {
		if status, _ := send("POST /v1/chat/completions HTTP/1.1", "h", more); status != http.StatusBadRequest {
			t.Errorf("%s: %d", more, status)
		}
	}
	if status, _ := send("POST / HTTP/1.1", "ours.example:80:80", ""); status != http.StatusBadRequest {
		t.Errorf("no host: %d", status)
	}
	select {
	case got := <-up.seen:
		t.Fatalf("the upstream has seen %q", got)
	default:
	}
	for _, c := range []struct{ line, host, more, sent, route string }{
		{"POST /v1/chat/completions", "h", "", "POST /v1/chat/completions", "chat"},
		{"POST http://h/v1/chat/completions?x", "other", "", "POST /v1/chat/completions?x", "chat"},
		{"POST HTTPS://h:8443/v1/chat/completions", "h", "X-HTTP-Method-Override: post\r\n", "POST /v1/chat/completions", "chat"},
		{"GET /v1/chat/completions", "h", "", "GET /base/v1/chat/completions", "all"},
		{"GET http://h", "h", "", "GET /base/", "all"},
		{"GET http://h?q=/v1/chat/completions", "h", "", "GET /base/?q=/v1/chat/completions", "all"},
		{"GET /?a=1;b=2&c=%zz", "h", "", "GET /base/?a=1;b=2&c=%zz", "all"},
		{"GET /v1/models/meta-llama%2FLlama-3", "h", "", "GET /base/v1/models/meta-llama%2FLlama-3", "all"},
		{"GET /files/a;v=2//b%20c%25", "h", "", "GET /base/files/a;v=2//b%20c%25", "all"},
		{"GET /caf%C3%A9", "h", "", "GET /base/caf%C3%A9", "all"},
		{"GET /caf\xc3\xa9", "h", "", "GET /base/caf%C3%A9", "all"},
		{"POST /V1/Chat/Completions", "h", "", "POST /base/V1/Chat/Completions", "all"},
		{"POST /fOLD/X%2fy", "h", "", "POST /X%2fy", "fold"},
		{"POST /fold", "h", "", "POST /", "fold"},
		{"POST /strip/a//b", "h", "", "POST /a//b", "strip"},
		{"DELETE http://OURS.example.:8080/x", "h", "", "DELETE /x", "ours"},
		{"OPTIONS /x", "h", "", "OPTIONS /base/x", "all"},
	} {
		status, id := send(c.line+" HTTP/1.1", c.host, c.more)
		if status != http.StatusNoContent {
			t.Errorf("%s: %d", c.line, status)
			continue
		}
		if got := <-up.seen; got[0] != c.sent+" HTTP/1.1" {
			t.Errorf("%s: the upstream sees %s", c.line, got[0])
		}
		w.callsUntil(func(all []usage.Call) bool {
			i := slices.IndexFunc(all, func(u usage.Call) bool { return u.RequestID == id })
			if i >= 0 && all[i].Route != c.route {
				t.Errorf("%s is counted for %s", c.line, all[i].Route)
			}
			return i >= 0
		})
	}
	// HTTP/1.0 has no Host, and no way to go on in another version.
	if _, resp := raw(t, g.proxy, "GET /old HTTP/1.0\r\nAuthorization: Bearer sk-search\r\n\r\n"); resp.StatusCode != http.StatusNoContent {
		t.Errorf("HTTP/1.0: %d", resp.StatusCode)
	}
	<-up.seen
}

// Only the gateway says who calls, what it sets and whence the call comes: in headers,
// in trailers, announced or not, however they are spelled. What is harmless passes.
func TestAClientsTrailersAndHeadersSayNothingThatOnlyTheGatewayMaySay(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := newRecorder(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Request-Id, Grpc-Status, Units\r\nConnection: close\r\n\r\n2\r\nok\r\n0\r\nX-Request-Id: upstream\r\nGrpc-Status: 0\r\nUnits: x=1\r\nX-More: 1\r\n\r\n")
	g := startGateway(t, w.srv.ClientURL(), func(o *Options) {
		o.Config = Config{KeyHeaders: []string{"Authorization", "X-Api-Key"}, Routes: []RouteConfig{
			{Name: "stream", Upstream: up.url, SetHeaders: map[string]string{"X-Secret": "s3"}, Model: ModelConfig{Header: "X-Model"}, Usage: UsageNone, MetersHeader: "Units"},
			{Name: "read", Prefix: "/read", Upstream: up.url, SetHeaders: map[string]string{"X-Secret": "s3"}, Model: ModelConfig{JSON: "model"}, Usage: UsageNone},
		}}
	})
	g.ready()
	names := []string{
		"X-Tollkeeper-Account", "x-tollkeeper-key-id", "X_Tollkeeper_Account", "X.Tollkeeper.Account", "X-Tollkeeper_Account", "X-TOLLKEEPER-ADMITTED-UNKNOWN", "X-Secret", "x_secret", "X-Model", "X_Model",
		"X-Api-Key", "x_api_key", "Authorization", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X_Forwarded_For", "Forwarded", "X-Original-Url", "X_Rewrite_Url",
		"X-Request-Id", "X_Request_Id", "Host", "Content-Type", "Content-Encoding", "X-Http-Method-Override", "Tollkeeper-Event-Time", "Cookie",
	}
	var trailer strings.Builder
	for _, n := range names {
		fmt.Fprintf(&trailer, "%s: evil\r\n", n)
	}
	for _, path := range []string{"/stream", "/read"} {
		for _, announce := range []string{"", "Trailer: " + strings.Join(names, ", ") + ", Checksum, Grpc-Message\r\n", "Trailer: Checksum, Grpc-Message\r\n", "Connection: X-Tollkeeper-Account, X-Secret, X-Forwarded-For, X-Request-Id, X-Model\r\nTrailer: Checksum, Grpc-Message\r\n"} {
			_, resp := raw(t, g.proxy, "POST "+path+" HTTP/1.1\r\nHost: x\r\nX-Api-Key: sk-search\r\nX-Request-Id: mine\r\nX-Model: m\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nContent-Type: application/json\r\n"+announce+
				"\r\ne\r\n{\"model\":\"mo\"}\r\n0\r\nChecksum: c1\r\nGrpc-Message: hi\r\n"+trailer.String()+"\r\n")
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
				t.Fatalf("%d, %v", resp.StatusCode, err)
			}
			seen := <-up.seen
			text := strings.Join(seen, "\n")
			if path == "/read" { // its model is in the body: the header X-Model is nobody's
				text = strings.NewReplacer("X-Model: evil", "", "X_model: evil", "").Replace(text)
			}
			if strings.Contains(text, "evil") || !strings.Contains(text, "X-Tollkeeper-Account: search") || !strings.Contains(text, "X-Secret: s3") || !strings.Contains(text, "X-Request-Id: mine") || !strings.Contains(text, "X-Forwarded-For: 127.0.0.1") || path == "/stream" && !strings.Contains(text, "X-Model: m") {
				t.Errorf("%s, %q: the upstream sees\n%s", path, announce, text)
			}
			for _, line := range seen {
				if name, value, _ := strings.Cut(line, ": "); strings.EqualFold(name, "Trailer") && strings.Contains(strings.ToLower(value), "tollkeeper") {
					t.Errorf("it is announced: %s", line)
				}
			}
			if announce != "" && (!slices.Contains(seen, "Checksum: c1") || !slices.Contains(seen, "Grpc-Message: hi")) {
				t.Errorf("%s, %q: harmless trailers do not pass: %q", path, announce, seen)
			}
			for name, want := range map[string]string{"Grpc-Status": "0", "X-More": "1", "X-Request-Id": "", "Units": "x=1"} {
				if name == "Units" && path == "/stream" {
					want = ""
				}
				if got := resp.Trailer.Get(name); got != want {
					t.Errorf("%s: the client's trailer %s is %q", path, name, got)
				}
			}
			if resp.Header.Get("X-Request-Id") != "mine" {
				t.Errorf("the client's request id is %q", resp.Header.Get("X-Request-Id"))
			}
		}
	}
	// In headers, likewise.
	var header strings.Builder
	for _, n := range names {
		if n != "Host" && n != "Content-Encoding" && n != "Content-Type" && n != "Authorization" && n != "X-Request-Id" && n != "X-Model" && n != "Cookie" && n != "X-Http-Method-Override" {
			fmt.Fprintf(&header, "%s: evil\r\n", n)
		}
	}
	_, resp := raw(t, g.proxy, "GET /stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-search\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"+header.String()+"X-Harmless_Name: yes\r\n\r\n")
	if resp.StatusCode != 200 {
		t.Errorf("%d", resp.StatusCode)
	}
	if text := strings.Join(<-up.seen, "\n"); strings.Contains(text, "evil") || !strings.Contains(text, "X-Harmless_name: yes") || strings.Contains(strings.ToLower(text), "upgrade") || strings.Contains(text, "Http2") {
		t.Errorf("the upstream sees\n%s", text)
	}
}
