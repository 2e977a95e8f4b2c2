package alerter

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/alert"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/wiretest"
)

func TestASpikeReachesAWebhookOnceThoughItFailsAtFirst(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, func(n int, _ *hookCall) int {
		if n < 3 {
			return 503
		}
		return 200
	})
	start(t, quickOptions(b.url, h.webhook(t)))
	tr := b.traffic()
	tr.spike(8)

	var firing hookCall
	for i := range 4 {
		c := h.next()
		if i > 0 && c.id != firing.id {
			t.Errorf("attempt %d has id %s, the first had %s", i, c.id, firing.id)
		}
		firing = c
	}
	a := firing.body
	if a.Type != "alert.firing" || a.Transition != usage.AlertFiring || a.N != 1 || firing.id != a.EpisodeID+":firing" || firing.status != 200 {
		t.Errorf("the last attempt: %d %s %+v", firing.status, firing.id, a)
	}
	if a.Refused != 8 || a.Active != 20 || a.Rule != "refused_accounts" || a.Scope != "global" || len(a.Accounts) != 8 || a.Codes[0] != (usage.AlertCode{Code: usage.CreditsDepleted, Accounts: 8}) {
		t.Errorf("the alert: %+v", a)
	}
	t.Logf("spike → webhook's 2xx: %s, of which %s are the rule's own wait, and three attempts failed", firing.at.Sub(tr.spikeBegan()).Round(time.Millisecond), quick().For+quick().Step)

	tr.spike(0)
	resolved := h.next()
	if r := resolved.body; r.Type != "alert.resolved" || r.N != 2 || r.EpisodeID != a.EpisodeID || resolved.id != a.EpisodeID+":resolved" || r.Reason != usage.ResolvedRecovered || r.StartedAt != a.StartedAt {
		t.Errorf("then: %s %+v", resolved.id, r)
	}
	b.storedOnce()
	h.none()
}

func TestStoppedBetweenFiringAndDeliveryItIsDeliveredOnceAfterTheRestart(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	var open atomic.Bool
	h := newHook(t, func(int, *hookCall) int {
		if open.Load() {
			return 204
		}
		return 500
	})
	o := quickOptions(b.url, h.webhook(t))
	first := start(t, o)
	tr := b.traffic()
	tr.spike(10)
	h.next()
	first.stop()
	for len(h.calls) > 0 {
		h.next()
	}

	open.Store(true)
	start(t, o)
	firing := h.accepted()
	if firing.body.Transition != usage.AlertFiring {
		t.Errorf("first: %+v", firing.body)
	}
	tr.spike(0)
	resolved := h.accepted()
	if resolved.body.Transition != usage.AlertResolved || resolved.body.EpisodeID != firing.body.EpisodeID {
		t.Errorf("then: %+v", resolved.body)
	}
	b.storedOnce()
	h.none()
}

// TestMain runs an alerter instead of the tests in a process that a test
// started in order to kill it.
func TestMain(m *testing.M) {
	if url := os.Getenv("ALERTER_TEST_CHILD_NATS"); url != "" {
		secret, err := ParseSecret(testSecret)
		if err != nil {
			panic(err)
		}
		go func() {
			// Whatever ends the parent ends the child.
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
		o := quickOptions(url, Webhook{Name: "test", URL: os.Getenv("ALERTER_TEST_CHILD_HOOK"), Secret: secret})
		o.Logger = zerolog.New(os.Stderr)
		if err := Run(context.Background(), o); err != nil {
			panic(err)
		}
		return
	}
	// The tests wait for windows to pass for most of their time.
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("6"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func TestKilledBetweenFiringAndDeliveryItIsDeliveredOnceAfterTheRestart(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	var (
		mu    sync.Mutex
		child *exec.Cmd
	)
	// The first attempt finds the alerter killed before it has an answer.
	killed := make(chan struct{})
	h := newHook(t, func(n int, _ *hookCall) int {
		if n > 0 {
			return 200
		}
		mu.Lock()
		defer mu.Unlock()
		if err := child.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = child.Wait() // killed
		close(killed)
		return 500
	})
	spawn := func() *exec.Cmd {
		mu.Lock()
		defer mu.Unlock()
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), "ALERTER_TEST_CHILD_NATS="+b.url, "ALERTER_TEST_CHILD_HOOK="+h.srv.URL)
		alive, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = alive.Close() })
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		child = c
		return c
	}
	spawn()
	eventually(t, "the child has its consumer", func() bool {
		_, err := b.js.Consumer(t.Context(), ledger.AlertsStream, "alerter_webhook_test")
		return err == nil
	})
	eventually(t, "the child reads", func() bool { return saved(b) })
	tr := b.traffic()
	tr.spike(10)
	<-killed
	second := spawn()
	defer func() {
		_ = second.Process.Kill()
		_ = second.Wait()
	}()
	firing := h.accepted()
	tr.spike(0)
	resolved := h.accepted()
	if firing.body.Transition != usage.AlertFiring || resolved.body.Transition != usage.AlertResolved || firing.body.EpisodeID != resolved.body.EpisodeID {
		t.Errorf("%+v then %+v", firing.body, resolved.body)
	}
	b.storedOnce()
	h.none()
}

// saved reports whether an alerter has saved its position.
func saved(b *bed) bool {
	kv, err := b.js.KeyValue(b.t.Context(), ledger.AlerterBucket)
	if err != nil {
		return false
	}
	_, err = kv.Get(b.t.Context(), positionKey)
	return err == nil
}

func TestWhileNATSIsAwayNothingResolvesAndNothingIsLost(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	var open atomic.Bool
	h := newHook(t, func(int, *hookCall) int {
		if open.Load() {
			return 200
		}
		return 502
	})
	o := quickOptions(b.url, h.webhook(t))
	o.Readiness = newReadiness()
	start(t, o)
	tr := b.traffic()
	tr.spike(10)
	h.next()
	tr.pause()
	b.restart(func() {
		eventually(t, "it says that NATS is away", func() bool { return !o.Readiness.Status().Ready })
		open.Store(true)
	})
	tr.resume()
	firing := h.accepted()
	tr.spike(0)
	resolved := h.accepted()
	if firing.body.Transition != usage.AlertFiring || resolved.body.Transition != usage.AlertResolved || firing.body.EpisodeID != resolved.body.EpisodeID {
		t.Errorf("%+v then %+v", firing.body, resolved.body)
	}
	eventually(t, "ready again", func() bool { return o.Readiness.Status().Ready })
	b.storedOnce()
	h.none()
}

func TestTwoAlertersMakeOneEpisodeAndOneDelivery(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, nil)
	start(t, quickOptions(b.url, h.webhook(t)))
	start(t, quickOptions(b.url, h.webhook(t)))
	tr := b.traffic()
	tr.spike(10)
	if c := h.accepted(); c.body.Transition != usage.AlertFiring {
		t.Errorf("first %+v", c.body)
	}
	tr.spike(0)
	if c := h.accepted(); c.body.Transition != usage.AlertResolved {
		t.Errorf("then %+v", c.body)
	}
	b.storedOnce()
	h.none()
}

// dyingLog is the log of a process that dies before it appends.
type dyingLog struct{ transitionLog }

func (dyingLog) Append(context.Context, *nats.Msg, uint64) (uint64, error) { return 0, errCrash }

func TestWhatADeadAlerterLeftHalfDoneIsDeliveredByTheOneBesideIt(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, nil)
	start(t, quickOptions(b.url, h.webhook(t)))
	kv, err := b.js.KeyValue(t.Context(), ledger.AlerterBucket)
	if err != nil {
		t.Fatal(err)
	}
	dead := &journal{kv: kv, log: dyingLog{alertsLog{b.js}}}
	now := usage.At(time.Now())
	a := usage.Alert{Transition: usage.AlertFiring, Rule: quick().Name, Scope: alert.ScopeGlobal, StartedAt: now, At: now, Summary: "seen by the dead one"}
	if _, _, err := dead.commit(t.Context(), a); !errors.Is(err, errCrash) {
		t.Fatal(err)
	}
	if c := h.accepted(); c.body.Transition != usage.AlertFiring || c.body.Summary != a.Summary {
		t.Errorf("delivered %+v", c.body)
	}
}

func TestAStopWhileNATSSaysNothingAndADeliveryIsUnderWayTakesLessThanFiveSeconds(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	called, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h := newHook(t, func(int, *hookCall) int {
		once.Do(func() { close(called) })
		<-answer
		return 204
	})
	wire := wiretest.New(t, b.server.Addr().String())
	o := quickOptions("nats://"+wire.Addr(), h.webhook(t))
	o.Timeout = 10 * time.Second
	a := start(t, o)
	b.traffic().spike(10)
	select {
	case <-called:
	case <-time.After(deadline):
		t.Fatal("the webhook was not called")
	}
	wire.Cut()
	// As late as an answer can still be waited for.
	timer := time.AfterFunc(1800*time.Millisecond, func() { close(answer) })
	defer timer.Stop()
	began := time.Now()
	a.stop()
	if took := time.Since(began); took > 4500*time.Millisecond {
		t.Errorf("the stop took %s", took)
	}
}

func TestARestartWhileFiringNeitherFiresAgainNorForgetsTheResolve(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, nil)
	o := quickOptions(b.url, h.webhook(t))
	// What begins this long after the spike is another wave: a stop and a start may take
	// seconds on a busy machine.
	o.Rules[0].ResolveAfter = 4 * time.Second
	first := start(t, o)
	tr := b.traffic()
	tr.spike(10)
	firing := h.accepted()
	first.stop()
	// Others begin to be refused meanwhile: still the same episode.
	b.publish(names(10, 15), usage.CreditsDepleted)
	start(t, o)
	tr.spike(0)
	if c := h.accepted(); c.body.Transition != usage.AlertResolved || c.body.EpisodeID != firing.body.EpisodeID {
		t.Errorf("after the restart: %+v", c.body)
	}
	b.storedOnce()
	h.none()
}

func TestASpikeWhileTheAlerterWasAwayFiresWhenItIsBack(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, nil)
	o := quickOptions(b.url, h.webhook(t))
	first := start(t, o)
	b.publish(names(0, 20), "")
	eventually(t, "a position is saved", func() bool { return saved(b) })
	first.stop()
	b.publish(names(0, 10), usage.PaymentFailed)
	b.traffic()
	eventually(t, "the spike is older than the rule waits", func() bool {
		s, err := b.js.Stream(t.Context(), ledger.Stream)
		return err == nil && s.CachedInfo().State.LastSeq > 30
	})
	start(t, o)
	if c := h.accepted(); c.body.Transition != usage.AlertFiring || c.body.Codes[0].Code != usage.PaymentFailed {
		t.Errorf("%+v", c.body)
	}
	h.accepted()
	b.storedOnce()
}

func TestANewWaveIsDeliveredThoughTheFirstIsStillRefused(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, nil)
	o := quickOptions(b.url, h.webhook(t))
	o.Registerer = newRegistry()
	start(t, o)
	tr := b.traffic()
	tr.spike(6)
	first := h.accepted()
	// The window (2 s) and the wave's end (0.5 s) pass while the six are refused.
	eventually(t, "the first wave is over", func() bool {
		return gauge(t, o.Registerer, "tollkeeper_alerter_accounts", "refused") == 0 && time.Since(first.at) > 3*time.Second
	})
	tr.spike(12)
	over, second := h.accepted(), h.accepted()
	if over.body.Transition != usage.AlertResolved || over.body.Reason != usage.ResolvedNewWave || over.body.EpisodeID != first.body.EpisodeID {
		t.Errorf("the first ended as %+v", over.body)
	}
	if second.body.Transition != usage.AlertFiring || second.body.EpisodeID == first.body.EpisodeID || second.body.StillRefused != 12 {
		t.Errorf("the second began as %+v", second.body)
	}
	tr.spike(0)
	if c := h.accepted(); c.body.Reason != usage.ResolvedRecovered || c.body.EpisodeID != second.body.EpisodeID {
		t.Errorf("and ended as %+v", c.body)
	}
	h.none()
}

func TestWithoutTrafficAnEpisodeResolvesWithThatReason(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	h := newHook(t, nil)
	o := quickOptions(b.url, h.webhook(t))
	o.Rules[0].NoTrafficAfter = 3 * time.Second
	start(t, o)
	// One frame, and then only time passes: steps are evaluated without entries.
	b.publish(names(0, 10), usage.TrialEnded)
	if c := h.accepted(); c.body.Transition != usage.AlertFiring || c.body.Value != 1 {
		t.Errorf("%+v", c.body)
	}
	if c := h.accepted(); c.body.Transition != usage.AlertResolved || c.body.Reason != usage.ResolvedNoTraffic {
		t.Errorf("%+v", c.body)
	}
	b.storedOnce()
}

func TestWhatCannotBeDecodedAndWhatCameBeforeIsLeftOut(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	o := quickOptions(b.url)
	js := b.js
	m, err := newMetrics(newRegistry())
	if err != nil {
		t.Fatal(err)
	}
	e := newEvaluator(&o, js, m, nopReadiness{})
	at := time.Now()
	frame := b.publish(names(0, 3), usage.QuotaExceeded)
	msg := func(data []byte, codec string, seq uint64) ledger.Message {
		h := frame.Header
		if codec != "" {
			h = map[string][]string{ledger.CodecHeader: {codec}}
		}
		return ledger.Message{Subject: frame.Subject, Header: h, Data: data, Sequence: seq, Time: at}
	}
	for i, x := range []ledger.Message{msg(frame.Data, "", 1), msg(frame.Data, "", 2), msg([]byte("?"), "", 3), msg(frame.Data, "unheard-of", 4)} {
		if err := e.handle(t.Context(), x); err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
	}
	event := []byte(`{"specversion":"1.0","id":"1","source":"elsewhere","type":"io.tollkeeper.call.v1","subject":"account-9","time":"` + at.Format(time.RFC3339Nano) + `","data":{"status":402,"code":"QUOTA_EXCEEDED"}}`)
	for seq := range uint64(2) {
		if err := e.handle(t.Context(), msg(event, ledger.CodecCloudEvent, 5+seq)); err != nil {
			t.Fatal(err)
		}
	}
	got := map[string]float64{}
	for _, outcome := range []string{"counted", "duplicate", "undecodable"} {
		got[outcome] = counter(t, m.frames.WithLabelValues(outcome))
	}
	if got["counted"] != 3 || got["duplicate"] != 1 || got["undecodable"] != 2 {
		t.Errorf("%v", got)
	}
	d := e.detectors[0]
	d.Advance(usage.At(at)+100_000, usage.At(at)+100_000)
	if s := d.Stats(); s.Refused != 4 || s.Active != 4 {
		t.Errorf("%+v", s)
	}
}

func TestAReceiverOfAnEarlierConfigurationIsForgottenAndANewAddressInherits(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	down := newHook(t, func(int, *hookCall) int { return 500 })
	o := quickOptions(b.url, down.webhook(t))
	other := down.webhook(t)
	other.Name = "dropped"
	o.Webhooks = append(o.Webhooks, other)
	first := start(t, o)
	b.traffic().spike(10)
	down.next()
	first.stop()

	up := newHook(t, nil)
	start(t, quickOptions(b.url, up.webhook(t)))
	if c := up.accepted(); c.body.Transition != usage.AlertFiring {
		t.Errorf("the new address inherits what was not delivered to the old one, but got %+v", c.body)
	}
	s, err := b.js.Stream(t.Context(), ledger.AlertsStream)
	if err != nil {
		t.Fatal(err)
	}
	var consumers []string
	list := s.ConsumerNames(t.Context())
	for name := range list.Name() {
		consumers = append(consumers, name)
	}
	if !slices.Equal(consumers, []string{"alerter_webhook_test"}) {
		t.Errorf("consumers: %v", consumers)
	}
}

func TestAReceiverThatIsGoneIsDisabledUntilItIsConfiguredAnew(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	gone := newHook(t, func(int, *hookCall) int { return 410 })
	o := quickOptions(b.url, gone.webhook(t))
	r := newRegistry()
	o.Registerer = r
	first := start(t, o)
	b.traffic().spike(10)
	gone.next()
	eventually(t, "the metric says so", func() bool {
		return gauge(t, r, "tollkeeper_alerter_receiver_disabled") == 1
	})
	first.stop()
	// Still so after a restart.
	o.Registerer = newRegistry()
	second := start(t, o)
	eventually(t, "the metric says so after the restart", func() bool {
		return gauge(t, o.Registerer, "tollkeeper_alerter_receiver_disabled") == 1
	})
	second.stop()
	gone.none()

	up := newHook(t, nil)
	start(t, quickOptions(b.url, up.webhook(t)))
	if c := up.accepted(); c.body.Transition != usage.AlertFiring {
		t.Errorf("%+v", c.body)
	}
}

func TestItWaitsForTheLedgerToBeProvisioned(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	if err := b.js.DeleteStream(t.Context(), ledger.AlertsStream); err != nil {
		t.Fatal(err)
	}
	o := quickOptions(b.url)
	readiness := newReadiness()
	o.Readiness = readiness
	ready := make(chan struct{})
	o.Ready = func() { close(ready) }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	reason := func() string {
		for _, c := range readiness.Status().Components {
			if c.Name == "alerter" {
				return c.Reason
			}
		}
		return ""
	}
	eventually(t, "it says what it waits for", func() bool { return strings.Contains(reason(), "stream not found") })
	select {
	case <-ready:
		t.Fatal("ready without a stream of alerts")
	default:
	}
	if _, err := ledger.Provision(t.Context(), b.js, ledger.ProvisionOptions{}); err != nil {
		t.Fatal(err)
	}
	<-ready
	eventually(t, "readyz", func() bool { return readiness.Status().Ready })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestItsReadinessIsAMetricToo(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	o := quickOptions(b.url)
	o.Registerer = newRegistry()
	start(t, o)
	b.traffic()
	eventually(t, "both components are ready", func() bool { return gauge(t, o.Registerer, "tollkeeper_component_ready") == 2 })
}

func TestWrongOptionsAreRefusedWithASentence(t *testing.T) {
	t.Parallel()
	secret, err := ParseSecret(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	good := Webhook{Name: "a", URL: "https://example.com/x", Secret: secret}
	for want, o := range map[string]Options{
		"has no secret":             {Webhooks: []Webhook{{Name: "a", URL: "https://example.com"}}},
		"not of the form https://":  {Webhooks: []Webhook{{Name: "a", URL: "ftp://example.com/hidden", Secret: secret}}},
		"can't name a webhook":      {Webhooks: []Webhook{{Name: "a.b", URL: "https://example.com", Secret: secret}}},
		"configured twice":          {Webhooks: []Webhook{good, good}},
		"at most 32":                {Alertmanagers: make([]string, 33)},
		"alertmanager: its address": {Alertmanagers: []string{"127.0.0.1:9093"}},
		"at most a minute":          {RepeatEvery: 2 * time.Minute},
		"would end by mistake":      {EndsAfter: time.Second},
		"two alert rules":           {Rules: []alert.Rule{alert.DefaultRule(), alert.DefaultRule()}},
		"name must have":            {Rules: []alert.Rule{{}}},
		"listen 0.0.0.0:0: other machines could reach it and no credentials are configured: configure them, or choose a loopback address such as 127.0.0.1 with --admin-listen": {AdminListen: "0.0.0.0:0", NATS: natsconn.Options{URL: "nats://127.0.0.1:1"}},
	} {
		err := Run(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestEpisodesAreIdentifiedByRuleScopeAndBeginning(t *testing.T) {
	t.Parallel()
	at := usage.Micros(1_700_000_000_000_000)
	one := episodeID("r", "global", at)
	if one != episodeID("r", "global", at) {
		t.Error("the same episode has two identities")
	}
	for _, other := range []string{episodeID("r2", "global", at), episodeID("r", "globa", at), episodeID("rg", "lobal", at), episodeID("r", "global", at+100_000)} {
		if other == one {
			t.Error("two episodes have one identity")
		}
	}
	if fmt.Sprint(one) != "2Y4jlb6X3DlRQ2S5IFYNF9QYDYR" && len(one) != 27 {
		t.Errorf("%s is not a ksuid", one)
	}
}

// A finding of the conservation audit is an episode of its pair, told once, with
// minute and account, and ends when it has healed.
func TestWhatTheAuditFindsIsAnEpisode(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.publish(names(0, 1), "")
	start(t, quickOptions(b.url))
	start(t, quickOptions(b.url)) // beside each other they tell it once
	kv, err := b.js.KeyValue(t.Context(), ledger.AuditBucket)
	if err != nil {
		t.Fatal(err)
	}
	at := usage.At(time.Now())
	say := func(open int, finding string) {
		at += 1_000_000
		status := fmt.Sprintf(`{"at_unix_micros":%d,"points":[{"pair":"ledger-history","open":%d},{"pair":"ledger-counters","open":0}],"findings":[%s]}`, at, open, finding)
		if _, err := kv.Put(t.Context(), ledger.AuditStatusKey, []byte(status)); err != nil {
			t.Fatal(err)
		}
	}
	transitions := b.stored
	const text = `2026-01-02 15:04 UTC, account \"acme\": ClickHouse does not have what the ledger has (-1 calls)`
	finding := func(first usage.Micros) string {
		return fmt.Sprintf(`{"pair":"ledger-history","account":"acme","text":"%s","first_seen_unix_micros":%d}`, text, first)
	}
	first := at
	say(2, finding(first))
	eventually(t, "an episode begins", func() bool { return len(transitions()) == 1 })
	say(0, "")
	eventually(t, "it ends", func() bool { return len(transitions()) == 2 })
	say(1, finding(first)) // the same one, again
	eventually(t, "another one begins", func() bool { return len(transitions()) == 3 })
	got := transitions()
	if a := got[0]; a.Rule != usage.RuleConservation || a.Scope != "ledger-history" || a.Transition != usage.AlertFiring || a.StartedAt != first ||
		!strings.Contains(a.Summary, "15:04 UTC") || !strings.Contains(a.Summary, "acme") || !strings.Contains(a.Summary, "1 more finding") || a.Accounts[0].Account != "acme" {
		t.Errorf("it began as %+v", a)
	}
	if a := got[1]; a.Transition != usage.AlertResolved || a.EpisodeID != got[0].EpisodeID || a.N != 2 {
		t.Errorf("it ended as %+v", a)
	}
	if got[2].EpisodeID == got[0].EpisodeID {
		t.Error("two episodes have one identity")
	}
}
