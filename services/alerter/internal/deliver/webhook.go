package deliver

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Webhook is a receiver by the Standard Webhooks convention.
type Webhook struct {
	// Name is the receiver's identity: what was not delivered to it is
	// delivered to whatever address it has later. Letters, digits, '_', '-'.
	Name string
	// URL is http or https.
	URL string
	// Secret signs; it is never logged.
	Secret Secret
}

// Secret is one key or, while it is being rotated, several. Its values print
// as "whsec_…".
type Secret struct{ keys [][]byte }

const secretPrefix = "whsec_"

// ParseSecret reads "whsec_" and base64 of 24 to 64 bytes; several, separated
// by white space, sign side by side. Its errors do not repeat it.
func ParseSecret(text string) (Secret, error) {
	var s Secret
	for i, word := range strings.Fields(text) {
		encoded, ok := strings.CutPrefix(word, secretPrefix)
		if !ok {
			return Secret{}, fmt.Errorf("webhook secret %d does not begin with %s", i+1, secretPrefix)
		}
		key, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || len(key) < 24 || len(key) > 64 {
			return Secret{}, fmt.Errorf("webhook secret %d is not base64 of 24 to 64 bytes after %s", i+1, secretPrefix)
		}
		s.keys = append(s.keys, key)
	}
	if len(s.keys) == 0 {
		return Secret{}, errors.New("the webhook secret is empty: generate one with: echo whsec_$(head -c 32 /dev/urandom | base64)")
	}
	if len(s.keys) > 4 {
		return Secret{}, fmt.Errorf("%d webhook secrets: at most 4 can sign side by side", len(s.keys))
	}
	return s, nil
}

// String hides the secret, also from %v of what holds it.
func (Secret) String() string { return secretPrefix + "…" }

// GoString hides the secret from %#v.
func (s Secret) GoString() string { return s.String() }

// MarshalText hides the secret from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Secret) sign(id string, at time.Time, body []byte) string {
	var signatures []string
	for _, key := range s.keys {
		h := hmac.New(sha256.New, key)
		_, _ = fmt.Fprintf(h, "%s.%d.", id, at.Unix()) // hash.Hash never fails
		_, _ = h.Write(body)
		signatures = append(signatures, "v1,"+base64.StdEncoding.EncodeToString(h.Sum(nil)))
	}
	return strings.Join(signatures, " ")
}

// webhookBody is what a webhook gets.
type webhookBody struct {
	// Type is "alert.firing" or "alert.resolved".
	Type string `json:"type"`
	usage.Alert
}

type webhook struct {
	id     string
	to     *url.URL
	secret Secret
	client *http.Client
	now    func() time.Time
}

func newWebhook(w Webhook, client *http.Client, now func() time.Time) (*webhook, error) {
	if !validName(w.Name) {
		return nil, fmt.Errorf("%q can't name a webhook: use 1 to 40 letters, digits, '_' and '-'", w.Name)
	}
	to, err := parseURL(w.URL)
	if err != nil {
		return nil, fmt.Errorf("webhook %s: %w", w.Name, err)
	}
	if len(w.Secret.keys) == 0 {
		return nil, fmt.Errorf("webhook %s has no secret: alerts are always signed", w.Name)
	}
	return &webhook{id: "webhook_" + w.Name, to: to, secret: w.Secret, client: client, now: now}, nil
}

func validName(s string) bool {
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= 40
}

// parseURL does not repeat the address in its errors: it may hold a secret.
func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, errors.New("its address is not of the form https://host/path")
	}
	return u, nil
}

func (w *webhook) name() string                  { return w.id }
func (w *webhook) refreshEvery() time.Duration   { return 0 }
func (w *webhook) refresh(context.Context) error { return nil }

func (w *webhook) deliver(ctx context.Context, a *usage.Alert) error {
	body, err := json.Marshal(webhookBody{Type: "alert." + string(a.Transition), Alert: *a})
	if err != nil {
		return fmt.Errorf("write the alert as JSON: %w", err)
	}
	id, now := a.TransitionID(), w.now()
	h := http.Header{}
	h.Set("webhook-id", id)
	h.Set("webhook-timestamp", strconv.FormatInt(now.Unix(), 10))
	h.Set("webhook-signature", w.secret.sign(id, now, body))
	return post(ctx, w.client, w.to, h, body, w.now)
}
