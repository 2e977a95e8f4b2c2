package deliver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
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

// alertName is the alertname label of an alert about refused accounts.
const alertName = "TollkeeperRefusedAccounts"

// nameOf is the alertname label: it says what kind of trouble it is.
func nameOf(a *usage.Alert) string {
	if a.Rule == usage.RuleConservation {
		return "TollkeeperConservation"
	}
	return alertName
}

// resolvedFor is how long a resolve is repeated: an Alertmanager keeps alerts
// in memory, and one that was killed after it took the resolve has forgotten it.
const resolvedFor = 15 * time.Minute

// postableAlert is what Alertmanager's v2 API takes.
type postableAlert struct {
	Labels       map[string]string `json:"labels"`
	Annotations  map[string]string `json:"annotations"`
	StartsAt     time.Time         `json:"startsAt"`
	EndsAt       time.Time         `json:"endsAt"`
	GeneratorURL string            `json:"generatorURL,omitempty"`
}

// alertmanager is one Alertmanager. The members of its cluster are receivers of
// their own, so that one that is away holds up no other.
type alertmanager struct {
	id        string
	to        *url.URL
	generator string
	client    *http.Client
	every     time.Duration
	endsAfter time.Duration
	now       func() time.Time
	newest    Newest

	last []usage.Alert // what newest said last
}

func newAlertmanager(base string, client *http.Client, now func() time.Time) (*alertmanager, error) {
	u, err := parseURL(base)
	if err != nil {
		return nil, fmt.Errorf("alertmanager: %w", err)
	}
	// The user and password may change without its being another receiver.
	plain := *u
	plain.User = nil
	sum := sha256.Sum256([]byte(plain.String()))
	u.Path = strings.TrimSuffix(u.Path, "/") + "/api/v2/alerts"
	return &alertmanager{id: "alertmanager_" + hex.EncodeToString(sum[:4]), to: u, client: client, now: now}, nil
}

func (m *alertmanager) name() string                { return m.id }
func (m *alertmanager) refreshEvery() time.Duration { return m.every }

func (m *alertmanager) deliver(ctx context.Context, a *usage.Alert) error {
	// A firing delivered late may be over by now; the resolve then comes next.
	if err := m.send(ctx, []postableAlert{m.postable(a)}); err != nil {
		return err
	}
	// What refresh would send when KV can't be read must not bring it back.
	for i := range m.last {
		if m.last[i].EpisodeID == a.EpisodeID {
			m.last[i] = *a
		}
	}
	return nil
}

// refresh repeats active alerts with a later end, as Alertmanager wants it, and
// for a while the resolved ones. It runs between deliveries, never beside one:
// a repetition that overtook the resolve would fire again.
func (m *alertmanager) refresh(ctx context.Context) error {
	newest, err := m.newest(ctx)
	if err == nil {
		m.last = newest
	}
	// With KV away the last known ones are repeated: an alert must not end
	// because NATS is away.
	var alerts []postableAlert
	for i := range m.last {
		a := &m.last[i]
		if a.Transition == usage.AlertFiring || m.now().Sub(a.At.Time()) < resolvedFor {
			alerts = append(alerts, m.postable(a))
		}
	}
	if len(alerts) > 0 {
		if serr := m.send(ctx, alerts); serr != nil {
			return serr
		}
	}
	return err
}

func (m *alertmanager) postable(a *usage.Alert) postableAlert {
	p := postableAlert{
		Labels: map[string]string{
			"alertname": nameOf(a), "rule": a.Rule, "scope": a.Scope, "severity": a.Severity, "episode": a.EpisodeID,
		},
		Annotations: map[string]string{
			"summary":     a.Summary,
			"description": describe(a),
		},
		StartsAt: a.StartedAt.Time(), GeneratorURL: m.generator,
	}
	for key, value := range map[string]string{"runbook_url": a.RunbookURL, "dashboard_url": a.DashboardURL, "top_accounts": accounts(a), "codes": codes(a)} {
		if value != "" {
			p.Annotations[key] = value
		}
	}
	if a.Transition == usage.AlertFiring {
		p.EndsAt = m.now().Add(m.endsAfter).UTC()
	} else {
		p.EndsAt = a.At.Time()
	}
	return p
}

// describe adds to the summary, which receivers show beside it, and repeats none of it.
func describe(a *usage.Alert) string {
	if a.Rule == usage.RuleConservation {
		return "GET /v1/audit of the console has all findings."
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Rule %s, scope %s, since %s.", a.Rule, a.Scope, a.StartedAt.Time().Format(time.RFC3339))
	switch s := accounts(a); {
	case s == "":
	case a.Transition == usage.AlertResolved:
		fmt.Fprintf(&b, " Still refused: %s.", s)
	default:
		fmt.Fprintf(&b, " Top accounts: %s.", s)
	}
	fmt.Fprintf(&b, " Data up to %s, %.1f s behind.", a.At.Time().Format(time.RFC3339), a.LagSeconds)
	return b.String()
}

func accounts(a *usage.Alert) string {
	var parts []string
	for _, t := range a.Accounts {
		if t.Code == "" { // not about refusals
			parts = append(parts, t.Account)
			continue
		}
		parts = append(parts, t.Account+" ("+string(t.Code)+", "+strconv.FormatInt(t.Refusals, 10)+" refusals)")
	}
	return strings.Join(parts, ", ")
}

func codes(a *usage.Alert) string {
	var parts []string
	for _, c := range a.Codes {
		parts = append(parts, string(c.Code)+" "+strconv.Itoa(c.Accounts))
	}
	return strings.Join(parts, ", ")
}

func (m *alertmanager) send(ctx context.Context, alerts []postableAlert) error {
	body, err := json.Marshal(alerts)
	if err != nil {
		return fmt.Errorf("write alerts as JSON: %w", err)
	}
	err = post(ctx, m.client, m.to, http.Header{}, body, m.now)
	var r *refusal
	if errors.As(err, &r) {
		r.gone = false // an Alertmanager has no such answer: a proxy's mistake
	}
	return err
}
