package alerter

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/rs/zerolog"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func newRegistry() *prometheus.Registry  { return prometheus.NewRegistry() }
func newReadiness() *telemetry.Readiness { return telemetry.NewReadiness() }

type nopReadiness struct{}

func (nopReadiness) OK()             {}
func (nopReadiness) NotReady(string) {}

func counter(t *testing.T, c prometheus.Metric) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// gauge returns the sum of a gauge's series.
func gauge(t *testing.T, r *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

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
	o := Options{Webhooks: []Webhook{{Name: "a", Secret: s}}}
	var log strings.Builder
	l := zerolog.New(&log)
	l.Info().Interface("webhooks", o.Webhooks).Msg("")
	asJSON, err := json.Marshal(o.Webhooks)
	if err != nil {
		t.Fatal(err)
	}
	raw := fmt.Sprint(s.keys[0])
	for _, out := range []string{fmt.Sprintf("%v %+v %s", o, o, s), fmt.Sprintf("%#v", s), log.String(), string(asJSON)} {
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
