package tollkeeper_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/engine"
)

// A limit of the tier eventual on output tokens holds for those whose calls nobody
// measures: streams that are not asked to tell, and clients that hang up before an answer
// has told what it used.
func TestATokenLimitHoldsForCallsThatNobodyMeasures(t *testing.T) {
	t.Parallel()
	served := make(chan struct{}, 64)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		switch {
		case strings.Contains(string(body), "silent"):
			served <- struct{}{}
			<-r.Context().Done()
		case strings.Contains(string(body), "hang"):
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, `data: {"choices":[{"delta":{"content":"Hello"}}]}`+"\n\n")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		default:
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, `data: {"choices":[{"delta":{"content":"Hello"}}]}`+"\n\n")
			if strings.Contains(string(body), `"include_usage":true`) {
				_, _ = io.WriteString(w, `data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}`+"\n\n")
			}
			_, _ = io.WriteString(w, "data: [DONE]\n\n")
		}
	}))
	t.Cleanup(up.Close)

	// Who calls how, and how the history has it.
	callers := []struct {
		account, body string
		hangsUp       bool
		ending        string
		estimated     bool
	}{
		{"streams", `{"model":"m","stream":true}`, false, "finished", false},
		{"leaves", `{"model":"hang","stream":true}`, true, "client_left", true},
		{"never-waits", `{"model":"silent"}`, true, "client_left", true},
	}
	plans := "version: 1\nplans:\n  - id: day\n    limits:\n      - {id: out, meter: output_tokens, window: lifetime, amount: 30, tier: eventual}\naccounts:\n"
	for _, c := range callers {
		plans += fmt.Sprintf("  - id: %s\n    plan: day\n    keys: [{id: k-%s, sha256: %x}]\n", c.account, c.account, sha256.Sum256([]byte("sk-"+c.account)))
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "plans.yaml")
	if err := os.WriteFile(file, []byte(plans), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan tollkeeper.Addresses, 1), make(chan error, 1)
	go func() {
		done <- tollkeeper.Run(ctx, tollkeeper.Options{
			Engines: engine.Options{DataDir: filepath.Join(dir, "data"), NATSListen: "127.0.0.1:0", ClickHouseListen: "127.0.0.1:0", ClickHouseHTTPListen: "127.0.0.1:0", Logger: zerolog.Nop()},
			Gateway: &gateway.Options{Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", Config: gateway.Config{Routes: []gateway.RouteConfig{{Name: "chat", Upstream: up.URL, Model: gateway.ModelConfig{JSON: "model"}}}}},
			Plans:   file, Logger: zerolog.New(zerolog.NewTestWriter(t)).Level(zerolog.ErrorLevel), Ready: func(a tollkeeper.Addresses) { ready <- a },
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("tollkeeper: %v", err)
		}
	})
	var addr tollkeeper.Addresses
	select {
	case addr = <-ready:
	case err := <-done:
		done <- nil
		t.Fatalf("tollkeeper did not start: %v", err)
	}
	url := addr.Gateway
	if !strings.Contains(url, "://") {
		url = "http://" + url
	}
	wait, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	for _, c := range callers {
		refused := false
		for n := 0; !refused && wait.Err() == nil; n++ {
			refused = call(wait, t, url, c.account, c.body, c.hangsUp, served) == http.StatusPaymentRequired
		}
		if !refused {
			t.Errorf("%s: is never refused", c.account)
		}
	}
	o := addr.ClickHouseOptions
	ch, err := clickhouse.Open(&clickhouse.Options{Addr: o.Addrs, Auth: clickhouse.Auth{Database: o.Database, Username: o.User, Password: o.Password}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ch.Close() })
	for _, c := range callers {
		eventually(wait, t, c.account+" is in the history", func() (bool, string) {
			var n uint64
			err := ch.QueryRow(wait, "SELECT count() FROM v_calls WHERE account = ? AND admitted AND ending = ? AND estimated = ? AND output_tokens > 0", c.account, c.ending, c.estimated).Scan(&n)
			return err == nil && n > 0, fmt.Sprint(n, " ", err)
		})
	}
}

// call returns the status of an answer, 0 where the client hung up before there was one.
func call(ctx context.Context, t *testing.T, url, account, body string, hangsUp bool, served <-chan struct{}) int {
	t.Helper()
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer sk-"+account)
	req.Header.Set("Content-Type", "application/json")
	if strings.Contains(body, "silent") {
		go func() {
			select {
			case <-served:
				leave()
			case <-ctx.Done():
			}
		}()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	if hangsUp && resp.StatusCode == http.StatusOK {
		_, _ = resp.Body.Read(make([]byte, 1))
		return resp.StatusCode
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}
