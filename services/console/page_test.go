package console

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// missing fails in CI and says loudly elsewhere what was not tested.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip("NOT TESTED: " + what)
}

func TestThePagesOwnTests(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("web/node_modules/vitest"); err != nil {
		missing(t, "the page's packages are not installed: go tool task setup")
	}
	out, err := exec.CommandContext(t.Context(), "node", "web/node_modules/vitest/vitest.mjs", "run", "--root", "web").CombinedOutput()
	if err != nil {
		t.Errorf("vitest: %v\n%s", err, out)
	}
}

// browser starts a headless Chromium with a page of a size, and reports what the
// page throws or logs as an error.
func browser(t *testing.T, width, height int64, scheme string) (ctx context.Context, complaints func() []string) {
	t.Helper()
	path := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	if path == "" {
		missing(t, "there is no Chromium")
	}
	allocator, cancelAllocator := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("no-first-run", true), chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true),
	)...)
	t.Cleanup(cancelAllocator)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx, colors(scheme), chromedp.EmulateViewport(width, height)); err != nil {
		t.Fatalf("Chromium: %v", err)
	}
	var mu sync.Mutex
	var said []string
	messages := chromedp.Console(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for m, err := range messages {
			if err != nil {
				return // the browser was closed
			}
			if m.IsException() || m.Type == chromedp.ConsoleError {
				mu.Lock()
				said = append(said, m.String())
				mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return ctx, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return append([]string(nil), said...)
	}
}

// colors makes the page believe in a preference of its user.
func colors(scheme string) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
		return err
	})
}

// traffic publishes calls of a few accounts until ctx is done; some of them run
// into their limits.
func (w *world) traffic(ctx context.Context) {
	random := rand.New(rand.NewPCG(1, 2))
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		var calls []usage.Call
		for range 6 + int(4*float64(n%200)/200) + random.IntN(5) {
			switch k := random.IntN(100); {
			case k < 46:
				calls = append(calls, okCall("acme/support-bot", int64(random.IntN(4000)), int64(random.IntN(600))))
			case k < 72:
				calls = append(calls, okCall("hooli", int64(random.IntN(9000)), int64(random.IntN(900))))
			case k < 82:
				calls = append(calls, w.limited("acme/search", usage.QuotaExceeded))
			case k < 92:
				calls = append(calls, w.limited("initech", usage.QuotaExceeded))
			case k < 96:
				calls = append(calls, w.limited("umbrella", usage.RateLimited))
			case k < 98 && n > 100:
				calls = append(calls, refusedCall("globex", usage.SpendCapReached))
			}
		}
		w.publish(calls...)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// limited is a call of an account with a limit of 100 calls. Sent calls are
// told apart from counted ones: counting may lag, and then more would be sent.
func (w *world) limited(account string, code usage.Code) usage.Call {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sent[account] >= 100 {
		return refusedCall(account, code)
	}
	w.sent[account]++
	return okCall(account, 300, 120)
}

// pastCalls makes up a history.
func pastCalls() []history.CallsPoint {
	var out []history.CallsPoint
	for step := range 180 {
		wave := int64(600 + 250*((step/7)%3) + 13*(step%11))
		out = append(out, history.CallsPoint{Step: step, Admitted: wave, InputTokens: wave * 900}, history.CallsPoint{Step: step, Name: "QUOTA_EXCEEDED", Refused: wave / 6})
		if step > 80 {
			out = append(out, history.CallsPoint{Step: step, Name: "RATE_LIMITED", Refused: wave / 14})
		}
	}
	return out
}

func TestThePageShowsWhatHappens(t *testing.T) {
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
	ctx, cancel := context.WithCancel(t.Context())
	var parts sync.WaitGroup
	parts.Go(func() { w.own(ctx) })
	parts.Go(func() { w.traffic(ctx) })
	defer func() { cancel(); parts.Wait() }()
	now := time.Now()
	w.alert(usage.Alert{EpisodeID: "e0", Transition: usage.AlertResolved, N: 2, Rule: "refused accounts", Scope: "global", At: usage.At(now.Add(-time.Hour)), Summary: "12 of 80 accounts began to be refused, mostly with QUOTA_EXCEEDED"})
	w.alert(usage.Alert{EpisodeID: "e1", Transition: usage.AlertFiring, N: 1, Rule: "refused accounts", Scope: "global", At: usage.At(now), Summary: "3 of 6 accounts began to be refused within 5 minutes, mostly with QUOTA_EXCEEDED"})
	w.deadLetter(usage.ReasonMalformed, "the event needs a source and an id: they are its identity", "gateway-1")
	w.decide(usage.Decision{ID: decisionID("acme/search"), Account: "acme/search", LimitID: "free/calls-per-minute", Meter: usage.Calls, Verdict: usage.Deny, Code: usage.QuotaExceeded, Revision: 1, Used: 100, Amount: 100, Window: usage.Minute, PeriodEnd: usage.At(now.Add(time.Hour))})

	bucket, err := w.js.KeyValue(t.Context(), ledger.AuditBucket)
	if err == nil {
		_, err = bucket.Put(t.Context(), ledger.AuditStatusKey, fmt.Appendf(nil, `{"at_unix_micros":%d,"whole":true}`, usage.At(now.Add(time.Hour))))
	}
	if err != nil {
		t.Fatal(err)
	}

	// The console is stopped and started again below, on the same port.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	listener.Close()
	serve := func() (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		opened := make(chan struct{})
		go func() {
			done <- Run(ctx, Options{Listen: addr, NATS: natsconn.Options{URL: w.url}, History: &fakeHistory{calls: pastCalls(), corrected: pastCorrections(), position: 1 << 40}, Logger: zerolog.Nop(), Ready: func(net.Addr) { close(opened) }})
		}()
		<-opened
		return sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("the console ended with %v", err)
			}
		})
	}
	stop := serve()
	defer func() { stop() }()

	text := func(selector string) string {
		s, err := chromedp.Run(tab, chromedp.Evaluate[string](fmt.Sprintf(`Array.from(document.querySelectorAll(%q)).map(e => e.innerText).join("\n")`, selector)))
		if err != nil {
			t.Fatalf("%s: %v", selector, err)
		}
		return s
	}
	if err := chromedp.Do(tab, chromedp.Navigate("http://"+addr+"/"), chromedp.WaitVisible(chromedp.CSS("main[data-ready=yes]"))); err != nil {
		t.Fatal(err)
	}
	w.until("the page is live and counts calls", func() bool {
		n, err := strconv.ParseFloat(text(".figure:nth-child(1) b"), 64)
		return text(".status") == "Live" && err == nil && n > 10
	})
	w.until("accounts run into their limits, and what is left is shown", func() bool {
		rows := text(".accounts tbody tr")
		return strings.Contains(rows, "acme/search") && strings.Contains(rows, "Blocked") && strings.Contains(rows, "100 of 100 calls, minute") && strings.Contains(rows, "plan pro")
	})
	w.until("refusals are shown by code", func() bool { return strings.Contains(text(".codes tbody tr"), "Quota exceeded") })
	count := func() float64 {
		n, err := chromedp.Run(tab, chromedp.Evaluate[float64](`Array.from(document.querySelectorAll(".codes tbody tr td:nth-child(3)")).reduce((n, e) => n + Number(e.title.replaceAll(",", "")), 0)`))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	w.until("the numbers move", func() bool { return count() > before })
	for selector, want := range map[string]string{
		".refusals tbody tr":                    "Quota exceeded",
		".refusals .copy":                       "…",
		".limits tbody tr":                      "pro/calls-per-minute, exact",
		".limits .use":                          "of 1k calls, minute, resets in",
		".area-explain":                         "Paste the decision_id of a 402",
		".area-alerts":                          "Firing",
		".area-dead":                            usage.ReasonMalformed,
		".area-history .card-note":              "calls, 5 s steps",
		".area-live .legend":                    "Admitted",
		`.strip [aria-label^="Auditor: well."]`: "Auditor",
	} {
		w.until(selector+" says "+want, func() bool { return strings.Contains(text(selector), want) })
	}
	// The charts are drawn, and have words beside them.
	painted, err := chromedp.Run(tab, chromedp.Evaluate[bool](`Array.from(document.querySelectorAll("canvas")).filter(c => {
		const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data
		let n = 0
		for (let i = 3; i < d.length; i += 4) if (d[i] > 0) n++
		return n > 5000
	}).length === 2`))
	if err != nil || !painted {
		t.Errorf("the charts are not drawn: %v", err)
	}
	if err := chromedp.Do(tab, chromedp.Click(chromedp.CSS(".area-live summary"))); err != nil {
		t.Fatal(err)
	}
	w.until("the chart can be read as a table", func() bool { return strings.Contains(text(".area-live table thead"), "Quota exceeded") })
	if err := chromedp.Do(tab, chromedp.Focus(chromedp.CSS(".area-live .chart-box")), chromedp.KeyEvent("\u0302"), chromedp.KeyEvent("\u0302")); err != nil {
		t.Fatal(err)
	}
	w.until("arrow keys read single values", func() bool { return !strings.Contains(text(".area-live .legend-when"), "last second") })
	if err := chromedp.Do(tab, chromedp.Click(chromedp.CSS(".area-live summary"))); err != nil {
		t.Fatal(err)
	}
	if dir := os.Getenv("TOLLKEEPER_SCREENSHOTS"); dir != "" {
		screenshots(t, w, tab, dir, addr)
	}
	noOverflow(t, tab, 1280, 800)
	noOverflow(t, tab, 390, 844)
	if said := complaints(); len(said) > 0 {
		t.Errorf("the page complains: %q", said)
	}

	stop()
	w.until("the page says that the stream broke", func() bool {
		return text(".status") == "Disconnected" && strings.Contains(text(".notice"), "The console does not answer.")
	})
	if dir := os.Getenv("TOLLKEEPER_SCREENSHOTS"); dir != "" {
		shoot(t, tab, filepath.Join(dir, "disconnected.png"))
	}
	stop = serve()
	w.until("the page is back by itself", func() bool { return text(".status") == "Live" })
}

// noOverflow checks that nothing is wider than the page.
func noOverflow(t *testing.T, tab context.Context, width, height int64) {
	t.Helper()
	if err := chromedp.Do(tab, chromedp.EmulateViewport(width, height)); err != nil {
		t.Fatal(err)
	}
	wide, err := chromedp.Run(tab, chromedp.Evaluate[[]string](`
		Array.from(document.querySelectorAll("body *")).filter(e => {
			const r = e.getBoundingClientRect()
			return r.width > 1 && r.right > innerWidth + 1 && !e.closest(".scroll, .table-scroll, .tip, .uplot, .sr, thead")
		}).map(e => e.tagName + "." + e.className)`))
	if err != nil {
		t.Fatal(err)
	}
	if len(wide) > 0 {
		t.Errorf("at %d pixels these are cut off: %v", width, wide)
	}
}

func screenshots(t *testing.T, w *world, tab context.Context, dir, addr string) {
	t.Helper()
	seconds, err := strconv.Atoi(os.Getenv("TOLLKEEPER_SCREENSHOTS_AFTER"))
	if err != nil {
		seconds = 1
	}
	<-time.After(time.Duration(seconds) * time.Second)
	for _, scheme := range []string{"light", "dark"} {
		if err := chromedp.Do(tab, colors(scheme)); err != nil {
			t.Fatal(err)
		}
		for name, size := range map[string][2]int64{"wide": {1280, 800}, "narrow": {390, 844}} {
			if err := chromedp.Do(tab, chromedp.EmulateViewport(size[0], size[1]), chromedp.Reload(), chromedp.WaitVisible(chromedp.CSS("main[data-ready=yes]"))); err != nil {
				t.Fatal(err)
			}
			w.until("it is drawn", func() bool {
				s, err := chromedp.Run(tab, chromedp.Evaluate[string](`document.querySelector(".area-history .card-note")?.innerText ?? ""`))
				return err == nil && s != ""
			})
			<-time.After(2 * time.Second)
			shoot(t, tab, filepath.Join(dir, name+"-"+scheme+".png"))
			full, err := chromedp.Run(tab, chromedp.FullScreenshot(100))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name+"-"+scheme+"-full.png"), full, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func shoot(t *testing.T, tab context.Context, file string) {
	t.Helper()
	png, err := chromedp.Run(tab, chromedp.CaptureScreenshot())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, png, 0o644); err != nil {
		t.Fatal(err)
	}
}

func pastCorrections() []history.PastCorrection {
	now := usage.At(time.Now())
	return []history.PastCorrection{
		{Sequence: 812, StreamTime: now - 60_000_000, ID: ksuid.New().String(), Author: "ada", Account: "acme/search", Time: now - 3600_000_000,
			Adjustments: map[string]int64{"calls": -3, "output_tokens": -1200}, Reason: "the batch was sent twice", Reference: "batch/17"},
		{Sequence: 640, StreamTime: now - 7200_000_000, ID: ksuid.New().String(), Author: "billing", Account: "hooli", Time: now - 86400_000_000,
			Adjustments: map[string]int64{"cost": 2_500_000_000}, Reason: "the provider's invoice says more"},
	}
}
