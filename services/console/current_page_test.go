package console

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// What the page shows is of now and of what its labels say, or it says so: ClickHouse
// stops and comes back, a range is chosen while the answer about another is on its way, an
// account is removed, nobody counts any more, NATS stops.
func TestThePageShowsNothingOldAsIfItWereNow(t *testing.T) {
	t.Parallel()
	page, err := embeddedPage()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Stat(page, "index.html"); err != nil {
		missing(t, "the page is not built: go tool task setup")
	}
	tab, complaints := browser(t, 1280, 800, "light")
	w := newWorld(t)
	w.apply(demoPlans())
	stopOwner := w.owned()
	release := make(chan struct{})
	week := make(chan struct{}, 8)
	h := &fakeHistory{calls: []history.CallsPoint{{Step: 3, Admitted: 111}}, corrected: pastCorrections(), position: 1 << 40}
	h.hold = func(ctx context.Context, span time.Duration) {
		if span < 24*time.Hour {
			return
		}
		week <- struct{}{}
		select {
		case <-release: // also of a question that the page has given up: its answer comes late
		case <-ctx.Done():
		}
	}
	base := w.start(Options{History: h})
	w.audited(time.Now())
	w.publish(okCall("hooli", 1, 1), okCall("umbrella", 1, 1))

	text := func(selector string) string {
		s, err := chromedp.Run(tab, chromedp.Evaluate[string](fmt.Sprintf(`Array.from(document.querySelectorAll(%q)).map(e => e.innerText).join("\n")`, selector)))
		if err != nil {
			t.Fatalf("%s: %v", selector, err)
		}
		return s
	}
	shot := func(name string) {
		if dir := os.Getenv("TOLLKEEPER_SCREENSHOTS"); dir != "" {
			full, err := chromedp.Run(tab, chromedp.FullScreenshot(100))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name+".png"), full, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	choose := func(label string) {
		t.Helper()
		_, err := chromedp.Run(tab, chromedp.Evaluate[bool](fmt.Sprintf(`(() => { const l = Array.from(document.querySelectorAll(".area-history .choice label")).find(e => e.innerText === %q); l.click(); return true })()`, label)))
		if err != nil {
			t.Fatal(err)
		}
	}
	says := func(selector, want string) {
		t.Helper()
		w.until(selector+" says "+want, func() bool { w.audited(time.Now()); return strings.Contains(text(selector), want) })
	}
	if err := chromedp.Do(tab, chromedp.Navigate(base+"/"), chromedp.WaitVisible(chromedp.CSS("main[data-ready=yes]"))); err != nil {
		t.Fatal(err)
	}
	says(".area-history .card-note", "111 calls")
	says(".accounts tbody", "umbrella")
	says(".area-audit .pairs", "agree")
	w.until("nothing says that it is old", func() bool { w.audited(time.Now()); return text(".card-age") == "" })

	// The answer about 15 minutes must not stand under "7 d", nor that about 7 days under
	// "6 h", into which the person has changed before it came.
	choose("7 d")
	<-week
	if s := text(".area-history .card-note, .area-history .legend"); strings.Contains(s, "111") {
		t.Errorf("under another label: %q", s)
	}
	h.mu.Lock()
	h.calls = []history.CallsPoint{{Step: 3, Admitted: 222}}
	h.mu.Unlock()
	choose("6 h")
	says(".area-history .card-note", "222 calls, 2 min steps")
	h.mu.Lock()
	h.calls = []history.CallsPoint{{Step: 3, Admitted: 777}}
	h.mu.Unlock()
	close(release)
	if err := chromedp.Do(tab, chromedp.Focus(chromedp.CSS(".area-corrections input"))); err != nil {
		t.Fatal(err) // a round through the page's loop: what was let go has come
	}
	if s := text(".area-history .card-note"); !strings.Contains(s, "222 calls") {
		t.Errorf("after the late answer: %q", s)
	}

	h.fail(errors.New("dial tcp: connection refused"))
	says(".area-audit .card-age", "ClickHouse does not answer")
	says(".area-audit .pairs", "ClickHouse does not answer")
	if s := text(".area-audit"); strings.Contains(s, "all agree") || strings.Contains(s, "No call is missing") {
		t.Errorf("beside a ClickHouse that is stopped: %q", s)
	}
	choose("15 min")
	says(".area-history", "No history: ClickHouse does not answer")
	shot("clickhouse-stopped")
	h.fail(nil)
	choose("6 h")
	says(".area-history .card-note", "777 calls")
	w.until("conservation is green again", func() bool { w.audited(time.Now()); return text(".area-audit .card-age") == "" })

	less := demoPlans()
	less.Accounts = less.Accounts[:len(less.Accounts)-1]
	w.apply(less)
	says(".accounts tbody", "Removed")

	stopOwner()
	says(".area-accounts .card-age", "Not known: the owner of shard")
	says(".accounts tbody", "limits not known")
	if s := text(".figure:last-child b"); s != "–" {
		t.Errorf("nobody counts, and counting is %q behind", s)
	}
	shot("no-aggregator")

	if err := w.server.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	says = func(selector, want string) {
		t.Helper()
		w.until(selector+" says "+want, func() bool { return strings.Contains(text(selector), want) })
	}
	for _, area := range []string{"live", "codes", "refusals", "alerts", "dead"} {
		says(".area-"+area+" .card-age", "the connection to NATS is lost")
	}
	if s := text(".figure:first-child b"); s != "–" {
		t.Errorf("without NATS it shows %q calls a second", s)
	}
	shot("nats-stopped")
	noOverflow(t, tab, 390, 844)
	shot("nats-stopped-narrow")
	for _, s := range complaints() {
		if !strings.Contains(s, "503") && !strings.Contains(s, "Failed to load resource") {
			t.Errorf("the page complains: %s", s)
		}
	}
}
