package alerter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// auditPairs are the scopes of the rule usage.RuleConservation.
var auditPairs = []string{"gateway-ledger", "ledger-counters", "ledger-history"}

// auditEvery is how often the auditor's word is read.
const auditEvery = 2 * time.Second

// audited is what the alerter reads of the auditor's status.
type audited struct {
	At     usage.Micros `json:"at_unix_micros"`
	Points []struct {
		Pair string `json:"pair"`
		Open int    `json:"open"`
	} `json:"points"`
	Findings []struct {
		Pair       string       `json:"pair"`
		Account    string       `json:"account"`
		Text       string       `json:"text"`
		FirstSeen  usage.Micros `json:"first_seen_unix_micros"`
		ResolvedAt usage.Micros `json:"resolved_at_unix_micros"`
	} `json:"findings"`
}

// alert says how a pair stands: firing as long as a finding of it holds. Its
// times are those of the auditor; false when the auditor does not know the pair.
func (s *audited) alert(pair string) (usage.Alert, bool) {
	for _, p := range s.Points {
		if p.Pair != pair {
			continue
		}
		a := usage.Alert{
			Transition: usage.AlertResolved, Rule: usage.RuleConservation, Scope: pair, Severity: "page", At: s.At, Value: float64(p.Open), Threshold: 1,
			Accounts: []usage.AlertAccount{}, Codes: []usage.AlertCode{}, Reason: usage.ResolvedRecovered, Summary: "every finding of " + pair + " has healed: nothing is missing, doubled or changed any more",
		}
		if p.Open == 0 {
			return a, true
		}
		a.Transition, a.Reason, a.StartedAt, a.Summary = usage.AlertFiring, "", s.At, ""
		// The newest come first: the first of all is what it began with.
		for _, f := range s.Findings {
			if f.Pair != pair || f.ResolvedAt != 0 {
				continue
			}
			a.StartedAt, a.Summary = min(a.StartedAt, f.FirstSeen), f.Text
			if len(a.Accounts) < usage.MaxAlertTop {
				a.Accounts = append(a.Accounts, usage.AlertAccount{Account: f.Account})
			}
		}
		switch {
		case a.Summary == "": // the status names only the newest findings
			a.Summary = fmt.Sprintf("%d findings of %s do not heal", p.Open, pair)
		case p.Open > 1:
			a.Summary += fmt.Sprintf("; and %d more findings", p.Open-1)
		}
		return a, true
	}
	return usage.Alert{}, false
}

// watchConservation makes episodes of what the auditor finds, until ctx is done.
// Several alerters may do so: the journal knows each transition once.
func (e *evaluator) watchConservation(ctx context.Context) {
	tick := time.NewTicker(auditEvery)
	defer tick.Stop()
	for {
		if err := e.conserve(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, errConflict) {
			e.log.Warn().Err(err).Msg("what the conservation audit finds can't be made an alert: trying again")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (e *evaluator) conserve(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	kv, err := e.js.KeyValue(ctx, ledger.AuditBucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil // a ledger that nobody audits
	}
	if err != nil {
		return fmt.Errorf("bucket %s: %w", ledger.AuditBucket, err)
	}
	entry, err := kv.Get(ctx, ledger.AuditStatusKey)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the audit's status: %w", err)
	}
	var s audited
	if err := json.Unmarshal(entry.Value(), &s); err != nil {
		return fmt.Errorf("read the audit's status: %w", err)
	}
	for _, pair := range auditPairs {
		a, known := s.alert(pair)
		if !known {
			continue
		}
		state, err := e.journal.recover(ctx, a.Rule, pair)
		if err != nil {
			return err
		}
		if state.firing() == (a.Transition == usage.AlertFiring) {
			continue
		}
		if a.Transition == usage.AlertResolved {
			a.StartedAt = state.Alert.StartedAt
		} else if state.revision != 0 && a.StartedAt <= state.Alert.At {
			// It is older than the end of the episode before: an episode of its own
			// all the same.
			a.StartedAt = a.At
		}
		a.RunbookURL, a.DashboardURL = e.links.Runbook, e.links.Dashboard
		state, made, err := e.journal.commit(ctx, a)
		if err != nil {
			return err
		}
		if made {
			e.metrics.transition(&state.Alert)
			e.metrics.open(a.Rule, pair, state.firing())
			e.log.Warn().Str("episode", state.Alert.EpisodeID).Str("transition", string(state.Alert.Transition)).Str("scope", pair).Msg(a.Summary)
		}
	}
	return nil
}

// newestConservation appends the newest transition of every pair that had one.
func (e *evaluator) newestConservation(ctx context.Context, all []usage.Alert) ([]usage.Alert, error) {
	for _, pair := range auditPairs {
		s, err := e.journal.load(ctx, usage.RuleConservation, pair)
		if err != nil {
			return nil, err
		}
		if s.revision != 0 {
			all = append(all, s.Alert)
		}
	}
	return all, nil
}
