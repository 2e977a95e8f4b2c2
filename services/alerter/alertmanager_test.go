package alerter

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func jsonInto(data []byte, v any) error { return json.Unmarshal(data, v) }

// notification is what Alertmanager's webhook receiver posts.
type notification struct {
	Status string `json:"status"`
	Alerts []struct {
		Status       string            `json:"status"`
		Labels       map[string]string `json:"labels"`
		Annotations  map[string]string `json:"annotations"`
		StartsAt     time.Time         `json:"startsAt"`
		EndsAt       time.Time         `json:"endsAt"`
		GeneratorURL string            `json:"generatorURL"`
	} `json:"alerts"`
	at time.Time
}

// postedAlert is what is posted to an Alertmanager.
type postedAlert struct {
	Labels   map[string]string `json:"labels"`
	StartsAt time.Time         `json:"startsAt"`
	EndsAt   time.Time         `json:"endsAt"`
}

// pager is the webhook that Alertmanager notifies.
func pager(t *testing.T) (string, <-chan notification) {
	t.Helper()
	pages := make(chan notification, 100)
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		n := notification{at: time.Now()}
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = json.Unmarshal(body, &n)
		}
		if err != nil {
			t.Errorf("page: %v", err)
		}
		pages <- n
	}))
	t.Cleanup(srv.Close)
	return srv.URL, pages
}

// startAlertmanager starts Debian's Alertmanager, which notifies the pager at
// once, and returns its base URL.
func startAlertmanager(t *testing.T, page string) string {
	t.Helper()
	const binary = "/usr/bin/prometheus-alertmanager"
	if _, err := os.Stat(binary); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is needed: apt-get install prometheus-alertmanager", binary)
		}
		t.Skipf("NOT TESTED against a real Alertmanager: %v (apt-get install prometheus-alertmanager)", err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "alertmanager.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
route:
  receiver: pager
  group_by: [alertname, episode]
  group_wait: 0s
  group_interval: 200ms
  repeat_interval: 1h
receivers:
  - name: pager
    webhook_configs:
      - url: %s
        send_resolved: true
`, page), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, binary, "--config.file="+config, "--storage.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+addr, "--cluster.listen-address=", "--log.level=warn")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // killed
	})
	base := "http://" + addr
	eventually(t, "Alertmanager is ready", func() bool {
		res, err := http.Get(base + "/-/ready")
		if err != nil {
			return false
		}
		return res.Body.Close() == nil && res.StatusCode == 200
	})
	return base
}

func nextPage(t *testing.T, pages <-chan notification) notification {
	t.Helper()
	select {
	case n := <-pages:
		return n
	case <-time.After(deadline):
		t.Fatal("nobody was paged")
		return notification{}
	}
}

func TestARealAlertmanagerPagesTheSpikeOnceAndItsResolveOnce(t *testing.T) {
	t.Parallel()
	page, pages := pager(t)
	base := startAlertmanager(t, page)
	b := newBed(t)
	o := quickOptions(b.url)
	o.Alertmanagers = []string{base}
	o.Links = Links{Runbook: "https://example.com/runbook", Dashboard: "https://example.com/dashboard", Generator: "https://example.com/source"}
	// Repeated often, to end sooner than the episode without being repeated: it stays one
	// page. A busy machine may hold a repetition up for a second.
	o.RepeatEvery, o.EndsAfter = 100*time.Millisecond, 2*time.Second
	start(t, o)
	tr := b.traffic()
	tr.spike(8)

	firing := nextPage(t, pages)
	if firing.Status != "firing" || len(firing.Alerts) != 1 {
		t.Fatalf("first page: %+v", firing)
	}
	a := firing.Alerts[0]
	for label, want := range map[string]string{"alertname": "TollkeeperRefusedAccounts", "rule": "refused_accounts", "scope": "global", "severity": "page"} {
		if a.Labels[label] != want {
			t.Errorf("label %s is %q, want %q", label, a.Labels[label], want)
		}
	}
	for _, annotation := range []string{"summary", "description", "top_accounts", "codes", "runbook_url", "dashboard_url"} {
		if a.Annotations[annotation] == "" {
			t.Errorf("no annotation %s in %v", annotation, a.Annotations)
		}
	}
	if a.GeneratorURL != "https://example.com/source" {
		t.Errorf("generator %q", a.GeneratorURL)
	}
	t.Logf("spike → page through Alertmanager: %s, of which %s are the rule's own wait", firing.at.Sub(tr.spikeBegan()).Round(time.Millisecond), quick().For+quick().Step)

	if a.Annotations["description"] == a.Annotations["summary"] || strings.Contains(a.Annotations["description"], a.Annotations["summary"]) {
		t.Errorf("the description repeats the summary: %q", a.Annotations["description"])
	}

	tr.spike(0)
	resolved := nextPage(t, pages)
	if resolved.Status != "resolved" || len(resolved.Alerts) != 1 || resolved.Alerts[0].Labels["episode"] != a.Labels["episode"] {
		t.Fatalf("second page: %+v", resolved)
	}
	stored := b.stored()
	if len(stored) != 2 || a.Labels["episode"] != stored[0].EpisodeID || !a.StartsAt.Equal(stored[0].StartedAt.Time()) || !resolved.Alerts[0].EndsAt.Equal(stored[1].At.Time()) {
		t.Errorf("paged from %s to %s, stored is %+v", a.StartsAt, resolved.Alerts[0].EndsAt, stored)
	}
	// Longer than repetitions and Alertmanager's own intervals: no third page.
	select {
	case n := <-pages:
		t.Errorf("paged once more: %+v", n)
	case <-time.After(1200 * time.Millisecond):
	}
}

func TestAnAlertmanagerThatIsAwayHoldsUpNoOtherAndIsToldLater(t *testing.T) {
	t.Parallel()
	page, pages := pager(t)
	base := startAlertmanager(t, page)
	b := newBed(t)
	// A member that refuses the first attempts.
	var posted = make(chan []postedAlert, 1000)
	n := 0
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var alerts []postedAlert
		if err := json.NewDecoder(r.Body).Decode(&alerts); err != nil || r.URL.Path != "/prefix/api/v2/alerts" {
			t.Errorf("%s: %v", r.URL.Path, err)
		}
		if n++; n < 4 {
			w.WriteHeader(500)
			return
		}
		posted <- alerts
	}))
	defer other.Close()
	o := quickOptions(b.url)
	o.Alertmanagers = []string{other.URL + "/prefix/", base}
	s := start(t, o)
	tr := b.traffic()
	tr.spike(10)
	if p := nextPage(t, pages); p.Status != "firing" {
		t.Errorf("%+v", p)
	}
	tr.spike(0)
	if p := nextPage(t, pages); p.Status != "resolved" {
		t.Errorf("%+v", p)
	}
	var resolvedAt time.Time
	for resolvedAt.IsZero() {
		select {
		case alerts := <-posted:
			for _, a := range alerts {
				if a.Labels["alertname"] != "TollkeeperRefusedAccounts" || a.EndsAt.Before(a.StartsAt) {
					t.Errorf("%+v", a)
				}
				if a.EndsAt.Before(time.Now()) {
					resolvedAt = a.EndsAt
				}
			}
		case <-time.After(deadline):
			t.Fatal("the other was never told of the resolve")
		}
	}
	// From then on it is only ever told the same end.
	s.stop()
	for len(posted) > 0 {
		for _, a := range <-posted {
			if !a.EndsAt.Equal(resolvedAt) {
				t.Errorf("after the resolve it fires again: %+v", a)
			}
		}
	}
}
