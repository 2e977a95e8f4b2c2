package deliver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// testSecret is "whsec_" and base64 of 24 bytes.
const testSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

func TestSignaturesAreThoseOfTheOfficialLibrary(t *testing.T) {
	t.Parallel()
	const second = "whsec_c2Vjb25kIHNlY3JldCBmb3Igcm90YXRpb24h"
	s, err := ParseSecret(testSecret + "\n" + second + "\n")
	if err != nil {
		t.Fatal(err)
	}
	body := []byte(`{"type":"alert.firing","summary":"ü"}`)
	now := time.Now()
	h := http.Header{}
	h.Set("webhook-id", "2Y4:firing")
	h.Set("webhook-timestamp", fmt.Sprint(now.Unix()))
	h.Set("webhook-signature", s.sign("2Y4:firing", now, body))
	for _, secret := range []string{testSecret, second} {
		wh, err := standardwebhooks.NewWebhook(secret)
		if err != nil {
			t.Fatal(err)
		}
		if err := wh.Verify(body, h); err != nil {
			t.Errorf("signed with both while rotating: %v", err)
		}
		if wh.Verify(append(body, ' '), h) == nil {
			t.Error("another body verifies")
		}
	}
}

func TestSecretsAreReadStrictlyAndNeverPrinted(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", " \n", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_!!!hidden", "whsec_aGlkZGVu", strings.Repeat(testSecret+" ", 5)} {
		if _, err := ParseSecret(text); err == nil || strings.Contains(err.Error(), "hidden") || strings.Contains(err.Error(), "aGlkZGVu") {
			t.Errorf("%q: %v", text, err)
		}
	}
	s, err := ParseSecret(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	hooks := []Webhook{{Name: "a", Secret: s}}
	var log strings.Builder
	l := zerolog.New(&log)
	l.Info().Interface("webhooks", hooks).Msg("")
	asJSON, err := json.Marshal(hooks)
	if err != nil {
		t.Fatal(err)
	}
	raw := fmt.Sprintf("%d", s.keys[0])
	for _, out := range []string{fmt.Sprintf("%v %+v %s", hooks, hooks, s), fmt.Sprintf("%#v", s), log.String(), string(asJSON)} {
		if strings.Contains(out, "MfKQ9") || strings.Contains(out, raw) {
			t.Errorf("printed: %s", out)
		}
	}
}

func TestAnswersAreUnderstood(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, c := range []struct {
		name    string
		status  int
		after   string
		outcome string
		gone    bool
		wait    time.Duration
	}{
		{"ok", 200, "", "", false, 0},
		{"accepted", 202, "", "", false, 0},
		{"redirects are not followed", 307, "", "status_3xx", false, 0},
		{"bad request", 400, "", "status_4xx", false, 0},
		{"gone", 410, "", "gone", true, 0},
		{"too many, with seconds", 429, "7", "status_4xx", false, 7 * time.Second},
		{"unavailable, with a date", 503, now.Add(90 * time.Second).UTC().Format(http.TimeFormat), "status_5xx", false, 90 * time.Second},
		{"asks for a year", 503, "31536000", "status_5xx", false, time.Hour},
		{"asks for the past", 503, now.Add(-time.Hour).UTC().Format(http.TimeFormat), "status_5xx", false, 0},
		{"asks for nonsense", 503, "soon", "status_5xx", false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if c.after != "" {
					w.Header().Set("Retry-After", c.after)
				}
				w.Header().Set("Location", "http://127.0.0.1:1/")
				w.WriteHeader(c.status)
			}))
			defer srv.Close()
			to, err := url.Parse(srv.URL)
			if err != nil {
				t.Fatal(err)
			}
			err = post(t.Context(), newClient(5*time.Second), to, http.Header{}, []byte("{}"), func() time.Time { return now })
			var r *refusal
			if !errors.As(err, &r) {
				if err != nil || c.outcome != "" {
					t.Fatal(err)
				}
				return
			}
			if r.outcome != c.outcome || r.gone != c.gone || (r.retryAfter-c.wait).Abs() > time.Second {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestAnUnreachableReceiverIsNamedWithoutItsSecretPath(t *testing.T) {
	t.Parallel()
	over := make(chan struct{})
	hang := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-over }))
	t.Cleanup(func() { close(over); hang.Close() })
	for _, c := range []struct{ address, outcome string }{
		{"http://user:hidden@127.0.0.1:1/services/hidden?token=hidden", "unreachable"},
		{hang.URL + "/services/hidden", "timeout"},
	} {
		to, err := url.Parse(c.address)
		if err != nil {
			t.Fatal(err)
		}
		err = post(t.Context(), newClient(100*time.Millisecond), to, http.Header{}, []byte("{}"), time.Now)
		var r *refusal
		if !errors.As(err, &r) || r.outcome != c.outcome {
			t.Errorf("%s: %v", c.outcome, err)
		}
		if strings.Contains(err.Error(), "hidden") || !strings.Contains(err.Error(), to.Host) {
			t.Errorf("%v", err)
		}
	}
}

func TestPausesGrowToACapWithJitter(t *testing.T) {
	t.Parallel()
	for try := range 100 {
		want := time.Minute
		if try < 6 {
			want = time.Second << try
		}
		for range 20 {
			if d := backoff(try, time.Second, time.Minute); d > want || d < want/2 {
				t.Fatalf("try %d: %s", try, d)
			}
		}
	}
}

func TestAnEpisodeDoesNotEndAtAlertmanagerBecauseItsStateCannotBeRead(t *testing.T) {
	t.Parallel()
	var got []postableAlert
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got = nil
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
			t.Error(err)
		}
	}))
	defer srv.Close()
	now := time.UnixMicro(1_700_000_000_000_000)
	am, err := newAlertmanager(srv.URL, newClient(time.Second), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	am.endsAfter = 5 * time.Minute
	a := usage.Alert{EpisodeID: "e", Transition: usage.AlertFiring, Rule: "r", Scope: "global", StartedAt: usage.At(now), At: usage.At(now)}
	away := error(nil)
	am.newest = func(context.Context) ([]usage.Alert, error) {
		if away != nil {
			return nil, away
		}
		return []usage.Alert{a}, nil
	}
	if err := am.refresh(t.Context()); err != nil || len(got) != 1 {
		t.Fatal(err, got)
	}
	away = context.DeadlineExceeded
	now = now.Add(time.Hour)
	if err := am.refresh(t.Context()); err == nil || len(got) != 1 || !got[0].EndsAt.Equal(now.Add(5*time.Minute)) {
		t.Fatalf("%v %+v", err, got)
	}
	// Unless the resolve was delivered in between.
	a.Transition, a.At = usage.AlertResolved, usage.At(now)
	if err := am.deliver(t.Context(), &a); err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Minute)
	if err := am.refresh(t.Context()); err == nil || len(got) != 1 || got[0].EndsAt.After(now) {
		t.Fatalf("%v %+v", err, got)
	}
	// A resolve is repeated for a while, then forgotten.
	got, now = nil, now.Add(15*time.Minute)
	if err := am.refresh(t.Context()); err == nil || got != nil {
		t.Fatalf("%v %+v", err, got)
	}
}

// message is one whose time runs from the moment it was given out.
type message struct {
	jetstream.Msg
	steps *[]string
}

func (message) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Stream: 1}, NumDelivered: 1}, nil
}
func (message) Data() []byte { return []byte(`{"episode_id":"e","transition":"firing"}`) }
func (m message) InProgress() error {
	*m.steps = append(*m.steps, "its time begins")
	return nil
}
func (m message) DoubleAck(context.Context) error {
	*m.steps = append(*m.steps, "acknowledged")
	return nil
}

type notedReceiver struct {
	receiver
	steps *[]string
}

func (notedReceiver) name() string { return "noted" }
func (r notedReceiver) deliver(context.Context, *usage.Alert) error {
	*r.steps = append(*r.steps, "delivered")
	return nil
}

func TestADeliveryHasItsWholeTimeHoweverLongItsTransitionHasWaited(t *testing.T) {
	t.Parallel()
	m, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	var steps []string
	d := &Delivery{to: notedReceiver{steps: &steps}, log: zerolog.Nop(), metrics: m, timeout: time.Second, now: time.Now}
	if _, err := d.one(t.Context(), message{steps: &steps}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"its time begins", "delivered", "acknowledged"}; !slices.Equal(steps, want) {
		t.Errorf("%q, wanted %q", steps, want)
	}
}
